"""The ATen path: triangle multiplication in plain PyTorch operations.

    z      = LayerNorm(x; g1, b1)                                     [B, L, L, C]
    a, b   = (z Wp^T + bp) * sigmoid(z Wg^T + bg) * mask              [B, L, L, D] each
    t      = sum_k a[i, k] b[j, k] (outgoing) | a[k, i] b[k, j] (incoming)
    delta  = (LayerNorm(t; g2, b2) We^T + be) * sigmoid(z Wo^T + bo)  [B, L, L, C]
    out    = residual + drop_mask * delta

Two forms of it. `trimul_inference` is what CPU tensors run: channel-major GEMMs over blocks of
positions that stay in the CPU's caches, elementwise work in place and in fp32, a, b and t the only
pair-sized tensors besides the output. Its GEMMs run in bf16 for bf16 inputs where the CPU
multiplies bf16 natively, and in fp32 otherwise: emulated 16-bit GEMMs are several times slower than
fp32 ones. `trimul_differentiable` is the formula as written, for autograd to follow on any device.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .validation import Weights

# Positions (i, k) a block. Measured from 256 to 2048 at C = 256, L = 160 on two cores of an AMD
# EPYC with 1 MB of L2 each: larger blocks were faster, by a tenth in all.
_BLOCK_POSITIONS = 2048


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
    batch, length = x.shape[:2]
    w = _in_gemm_dtype(weights, gemm_dtype(x.dtype, x.device.type))
    rows = max(1, _BLOCK_POSITIONS // length) if x.device.type == "cpu" else length
    out = None
    for index in range(batch):
        pair_mask = None if mask is None else mask[index]
        product = _gated_product(x[index], direction, pair_mask, w, rows, eps_in)
        if out is None:  # after a and b of the first sequence are gone
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for start in range(0, length, rows):
            window = slice(start, start + rows)
            delta, gate = _emit(product[:, window], x[index, window], w, eps_in, eps_out)
            if drop_mask is not None:
                gate.mul_(drop_mask[index])
            if residual is None:
                torch.mul(delta, gate, out=out[index, window])
            else:
                torch.addcmul(residual[index, window], delta, gate, out=out[index, window])
        del product
    return out


def _gated_product(
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    w: Weights,
    rows: int,
    eps: float,
) -> Tensor:
    """t [D, L, L] of one sequence x [L, L, C], in x's dtype."""
    length = x.shape[0]
    hidden = w.p_in_weight.shape[0] // 2
    planes = torch.empty(2 * hidden, length, length, dtype=x.dtype, device=x.device)
    for start in range(0, length, rows):
        window = slice(start, start + rows)
        z = _layer_norm(x[window].flatten(0, 1), w.norm_in_weight, w.norm_in_bias, eps)
        z = z.to(w.p_in_weight.dtype)
        value = _project(w.p_in_weight, w.p_in_bias, z)  # [2D, positions]
        gate = _project(w.g_in_weight, w.g_in_bias, z).float().sigmoid_()
        if mask is not None:
            gate.mul_(mask[window].reshape(1, -1))
        shape = (2 * hidden, -1, length)
        torch.mul(value.view(shape), gate.view(shape), out=planes[:, window])
    left, right = planes[:hidden], planes[hidden:]
    if direction == "outgoing":
        right = right.transpose(1, 2)
    else:
        left = left.transpose(1, 2)
    dtype = w.p_in_weight.dtype
    if x.dtype == dtype:
        return torch.bmm(left, right)
    product = torch.empty(hidden, length, length, dtype=x.dtype, device=x.device)
    channels_at_once = max(1, _BLOCK_POSITIONS * hidden // (length * length))
    for start in range(0, hidden, channels_at_once):
        group = slice(start, start + channels_at_once)
        product[group] = torch.bmm(left[group].to(dtype), right[group].to(dtype))
    return product


def _emit(
    product: Tensor, x: Tensor, w: Weights, eps_in: float, eps_out: float
) -> tuple[Tensor, Tensor]:
    """The projection of t [D, rows, L] and the gate of x, both [rows, L, C] in fp32."""
    mixed = product.flatten(1).t().contiguous()  # [positions, D]
    mixed = _layer_norm(mixed, w.norm_out_weight, w.norm_out_bias, eps_out)
    delta = F.linear(mixed, w.p_out_weight, w.p_out_bias)
    z = _layer_norm(x.flatten(0, 1), w.norm_in_weight, w.norm_in_bias, eps_in)
    z = z.to(w.g_out_weight.dtype)
    gate = F.linear(z, w.g_out_weight, w.g_out_bias).float().sigmoid_()
    return delta.view(x.shape), gate.view(x.shape)


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


def _in_gemm_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    """The parameters in the dtypes that they are used in: norms and the last projection in fp32.

    The last projection is a small part of the time, and its rounding would come on top of the
    output's own.
    """
    in_fp32 = ("p_out_weight", "p_out_bias")
    return Weights(
        **{
            name: None
            if value is None
            else value.to(torch.float32 if name.startswith("norm_") or name in in_fp32 else dtype)
            for name, value in weights._asdict().items()
        }
    )


def _layer_norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis in fp32, exact for rows of one constant value.

    A row's own first channel is taken off beforehand: LayerNorm doesn't see a shift, and a constant
    row becomes exact zeros, however large the constant.
    """
    rows = rows.float()
    shifted = rows - rows[..., :1]
    return F.layer_norm(shifted, shifted.shape[-1:], weight, bias, eps)


def _project(weight: Tensor, bias: Tensor | None, z: Tensor) -> Tensor:
    """z @ weight.T + bias, channel-major: [channels out, positions]."""
    if bias is None:
        return torch.mm(weight, z.t())
    return torch.addmm(bias[:, None], weight, z.t())


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
