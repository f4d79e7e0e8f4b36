"""The ATen path: triangle multiplication in plain PyTorch operations.

    z      = LayerNorm(x; g1, b1)                                     [B, L, L, C]
    a, b   = (z Wp^T + bp) * sigmoid(z Wg^T + bg) * mask              [B, L, L, D] each
    t      = sum_k a[i, k] b[j, k] (outgoing) | a[k, i] b[k, j] (incoming)
    delta  = (LayerNorm(t; g2, b2) We^T + be) * sigmoid(z Wo^T + bo)  [B, L, L, C]
    out    = residual + drop_mask * delta

Two forms of it. `trimul_inference` is what CPU tensors run: channel-major GEMMs over blocks of
positions that stay in the CPU's caches, sums, norms and gates in fp32. It holds two pair-sized
tensors: a, which t overwrites, and the output, in whose memory b lies until t is there (where D > C
it doesn't fit, and is a third). Its GEMMs run in bf16 for bf16 inputs where the CPU multiplies bf16
natively, and in fp32 otherwise: emulated 16-bit GEMMs are several times slower than fp32 ones.
`trimul_differentiable` is the formula as written, for autograd to follow on any device.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .validation import Weights

# Positions (i, k) a block. Measured from 256 to 2048 at C = 256, L = 160 on two cores of an AMD
# EPYC with 1 MB of L2 each: larger blocks were faster, by a tenth in all.
_BLOCK_POSITIONS = 2048


class _Parameters(NamedTuple):
    """The parameters as `trimul_inference` uses them: in the GEMMs' dtype where not in fp32."""

    norm_weight: Tensor | None  # [C], fp32
    norm_bias: Tensor | None  # [C], fp32
    in_weight: Tensor  # [4D, C]: values of a, values of b, gates of a, gates of b
    in_bias: Tensor | None  # [4D]
    gate_weight: Tensor  # [C, C]
    gate_bias: Tensor | None  # [C]
    out_weight: Tensor  # [C, D], fp32, times the second norm's weight
    out_bias: Tensor | None  # [C], fp32, with the second norm's bias, projected, in it


def trimul_inference(
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    residual: Tensor | None,
    drop_mask: Tensor | None,
    weights: Weights,
    eps_in: float,
    eps_out: float,
) -> Tensor:
    """x [B, L, L, C], mask [B, L, L], residual like x, drop_mask [B, L, C]; returns like x."""
    batch, length, _, channels = x.shape
    hidden = weights.p_out_weight.shape[1]
    dtype = gemm_dtype(x.dtype, x.device.type)
    parameters = _prepare(weights, dtype)
    positions = _BLOCK_POSITIONS if x.device.type == "cpu" else length * length
    rows = min(length, max(1, positions // length))

    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    a = torch.empty(hidden, length, length, dtype=x.dtype, device=x.device)
    b = torch.empty_like(a) if hidden > channels else None
    for index in range(batch):
        if hidden <= channels:  # b is done with before its place is wanted
            b = out[index].view(-1)[: a.numel()].view(a.shape)
        pair_mask = None if mask is None else mask[index]
        z = _write_planes(a, b, x[index], pair_mask, parameters, rows, eps_in)
        _multiply_planes(a, b, direction, dtype, positions)
        for start in range(0, length, rows):
            window = slice(start, start + rows)
            if rows < length:  # there were several blocks
                z = _normalize_rows(x[index, window], parameters, eps_in)
            delta, gate = _emit(a[:, window], z, parameters, eps_out)
            if drop_mask is not None:
                gate.mul_(drop_mask[index])
            if residual is None:
                torch.mul(delta, gate, out=out[index, window])
            else:
                torch.addcmul(residual[index, window], delta, gate, out=out[index, window])
    return out


def _write_planes(
    a: Tensor, b: Tensor, x: Tensor, mask: Tensor | None, p: _Parameters, rows: int, eps: float
) -> Tensor:
    """a and b [D, L, L] of one sequence x [L, L, C]; returns z of the last block."""
    hidden, length, _ = a.shape
    dtype = p.in_weight.dtype
    # A product with a bool rounds nothing; any other mask multiplies before a and b are rounded.
    exact = mask is None or mask.dtype == torch.bool
    if mask is not None:
        mask = mask.to(dtype if exact else torch.float32)
    # Rows that begin at multiples of 16 elements, whatever L: MKL is slow to write any others.
    pitch = -(-rows * length // 16) * 16
    workspace = torch.empty(4 * hidden, pitch, dtype=dtype, device=x.device)
    for start in range(0, length, rows):
        window = slice(start, start + rows)
        z = _normalize_rows(x[window], p, eps)
        projected = workspace[:, : z.shape[0]]
        _project(p.in_weight, p.in_bias, z, out=projected)
        gated = F.glu(projected if exact else projected.float(), dim=0)  # value * sigmoid(gate)
        if mask is not None:
            gated *= mask[window].reshape(1, -1)
        a[:, window], b[:, window] = gated.view(2, hidden, -1, length)
    return z


def _multiply_planes(
    a: Tensor, b: Tensor, direction: str, dtype: torch.dtype, positions: int
) -> None:
    """t [D, L, L] into the place of a, by GEMMs in `dtype`."""
    hidden, length, _ = a.shape
    # As many channels as hold a block's elements, and on many cores a matrix for each thread.
    channels = max(
        1, min(torch.get_num_threads(), hidden // 16), positions * hidden // (length * length)
    )
    for start in range(0, hidden, channels):
        group = slice(start, start + channels)
        left, right = a[group].to(dtype), b[group].to(dtype)
        if direction == "outgoing":
            right = right.mT
        else:
            left = left.mT
        a[group] = torch.bmm(left, right)


def _emit(product: Tensor, z: Tensor, p: _Parameters, eps: float) -> tuple[Tensor, Tensor]:
    """The projection of t [D, rows, L] and the gate of z, both [rows, L, C] in fp32."""
    shape = (*product.shape[1:], -1)
    mixed = _normalize_columns(product, eps)
    delta = F.linear(mixed.t(), p.out_weight, p.out_bias)
    gate = F.linear(z, p.gate_weight, p.gate_bias).float().sigmoid_()
    return delta.view(shape), gate.view(shape)


def gemm_dtype(dtype: torch.dtype, device_type: str = "cpu") -> torch.dtype:
    """The dtype of the GEMMs for inputs of `dtype`: an accelerator multiplies every one of them."""
    if device_type != "cpu" or (dtype == torch.bfloat16 and _multiplies_bf16()):
        return dtype
    return torch.float32


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products: AVX512-BF16, AMX, or Arm's BF16."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _prepare(w: Weights, dtype: torch.dtype) -> _Parameters:
    """The parameters in the dtypes that they are used in: norms and the last projection in fp32.

    The last projection is a small part of the time, and its rounding would come on top of the
    output's own.
    """
    in_bias = None
    if w.p_in_bias is not None or w.g_in_bias is not None:
        zeros = w.p_in_weight.new_zeros(w.p_in_weight.shape[0])
        halves = (zeros if half is None else half for half in (w.p_in_bias, w.g_in_bias))
        in_bias = torch.cat([half.to(dtype) for half in halves])
    out_weight, out_bias = w.p_out_weight.float(), _cast(w.p_out_bias, torch.float32)
    if w.norm_out_bias is not None:
        shift = out_weight @ w.norm_out_bias.float()
        out_bias = shift if out_bias is None else out_bias + shift
    if w.norm_out_weight is not None:
        out_weight = out_weight * w.norm_out_weight.float()
    return _Parameters(
        _cast(w.norm_in_weight, torch.float32),
        _cast(w.norm_in_bias, torch.float32),
        torch.cat([w.p_in_weight, w.g_in_weight]).to(dtype),
        in_bias,
        w.g_out_weight.to(dtype),
        _cast(w.g_out_bias, dtype),
        out_weight,
        out_bias,
    )


def _cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _layer_norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis in fp32, exact for rows of one constant value.

    A row's own first channel is taken off beforehand: LayerNorm doesn't see a shift, and a constant
    row becomes exact zeros, however large the constant.
    """
    rows = rows.float()
    shifted = rows - rows[..., :1]
    return F.layer_norm(shifted, shifted.shape[-1:], weight, bias, eps)


def _normalize_rows(x: Tensor, p: _Parameters, eps: float) -> Tensor:
    """z [positions, C] of a block [rows, L, C], in the dtype of the GEMMs."""
    z = _layer_norm(x.flatten(0, 1), p.norm_weight, p.norm_bias, eps)
    return z.to(p.in_weight.dtype)


def _normalize_columns(planes: Tensor, eps: float) -> Tensor:
    """LayerNorm over the first axis in fp32, without weights: [D, rows, L] to [D, positions].

    What `_layer_norm` does to rows, the shift by the first channel included, without turning the
    planes around: a transposed copy takes longer than the passes here.
    """
    columns = torch.sub(planes, planes[:1].float()).flatten(1)
    columns -= columns.mean(0)
    variance = columns.square().mean(0)
    columns *= variance.add_(eps).rsqrt_()
    return columns


def _project(weight: Tensor, bias: Tensor | None, z: Tensor, out: Tensor) -> None:
    """out = z @ weight.T + bias, channel-major: [channels out, positions]."""
    if bias is None:
        torch.mm(weight, z.t(), out=out)
    else:
        torch.addmm(bias[:, None], weight, z.t(), out=out)


def trimul_differentiable(
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    residual: Tensor | None,
    drop_mask: Tensor | None,
    weights: Weights,
    eps_in: float,
    eps_out: float,
) -> Tensor:
    """The same function of the same arguments, out of place, so that autograd can follow it."""
    w, dtype = weights, x.dtype

    def linear(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(value, weight, None if bias is None else bias.to(dtype))

    z = _layer_norm_of(x, w.norm_in_weight, w.norm_in_bias, eps_in)
    gated = linear(z, w.p_in_weight, w.p_in_bias)
    gated = gated * torch.sigmoid(linear(z, w.g_in_weight, w.g_in_bias))
    if mask is not None:
        gated = gated * mask.unsqueeze(-1).to(dtype)
    left, right = gated.movedim(-1, 1).chunk(2, dim=1)  # [B, D, L, L]
    if direction == "outgoing":
        product = left @ right.transpose(-1, -2)
    else:
        product = left.transpose(-1, -2) @ right
    mixed = _layer_norm_of(product.movedim(1, -1), w.norm_out_weight, w.norm_out_bias, eps_out)
    delta = linear(mixed, w.p_out_weight, w.p_out_bias)
    delta = delta * torch.sigmoid(linear(z, w.g_out_weight, w.g_out_bias))
    if drop_mask is not None:
        delta = delta * drop_mask.unsqueeze(1).to(dtype)
    return (delta if residual is None else residual + delta).contiguous()


def _layer_norm_of(value: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`_layer_norm` with fp32 parameters, in the dtype of `value`."""
    weight = None if weight is None else weight.float()
    bias = None if bias is None else bias.float()
    return _layer_norm(value, weight, bias, eps).to(value.dtype)
