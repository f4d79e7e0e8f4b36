"""The ATen path: triangle multiplication in plain PyTorch operations.

    z      = LayerNorm(x; g1, b1)                                     [B, L, L, C]
    a, b   = (z Wp^T + bp) * sigmoid(z Wg^T + bg) * mask              [B, L, L, D] each
    t      = sum_k a[i, k] b[j, k] (outgoing) | a[k, i] b[k, j] (incoming)
    delta  = (LayerNorm(t; g2, b2) We^T + be) * sigmoid(z Wo^T + bo)  [B, L, L, C]
    out    = residual + drop_mask * delta

`trimul_inference` runs channel-major GEMMs over blocks of positions that stay in a CPU's caches,
with sums, norms and gates in fp32. It holds two pair-sized tensors: a, which t overwrites, and the
output, whose memory holds b until t is computed (where D > C, b doesn't fit and is a third). On a
CPU the GEMMs run in bf16 for bf16 inputs if it multiplies bf16 natively, and in fp32 otherwise:
emulated 16-bit GEMMs are several times slower. `trimul_saving` returns t too, for the backward in
`gradients`. `trimul_differentiable` is the formula as written, which forward-mode AD and the
transforms of torch.func can follow on any device and to any order.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._call import Call, Weights
from .region import for_each, region_threads

# Positions (i, k) of a block. Measured from 256 to 2048 at C = 256, L = 160 on two cores of an AMD
# EPYC with 1 MB of L2 each: larger blocks were faster, by a tenth in all.
_BLOCK_POSITIONS = 2048
LEAST_POSITIONS = 256  # of a block, however many blocks are wanted
# Threads take turns to call operations, which must last longer the more threads there are. With
# fewer positions per block, PyTorch's own threading was faster on 4 to 16 cores of a Xeon.
LEAST_POSITIONS_A_THREAD = 128


class Parameters(NamedTuple):
    """The parameters as `trimul_inference` uses them: in the GEMMs' dtype where not in fp32."""

    norm_weight: Tensor | None  # [C], fp32 (here and below: float64 for float64)
    norm_bias: Tensor | None  # [C], fp32
    in_weight: Tensor  # [4D, C]: values of a, values of b, gates of a, gates of b
    in_bias: Tensor | None  # [4D]
    gate_weight: Tensor  # [C, C]
    gate_bias: Tensor | None  # [C]
    out_weight: Tensor  # [C, D], fp32, times the second norm's weight
    out_bias: Tensor | None  # [C], fp32, plus the second norm's bias, projected

    def of_channels(self, channels: slice) -> "Parameters":
        """Those that make some channels of a and b."""
        weight, bias = self.in_weight, self.in_bias
        return self._replace(
            in_weight=weight.view(4, -1, weight.shape[1])[:, channels].flatten(0, 1),
            in_bias=None if bias is None else bias.view(4, -1)[:, channels].flatten(),
        )


def trimul_inference(call: Call) -> Tensor:
    """The output [B, L, L, C]. Calls in this module have no lengths."""
    product = empty_planes(call.x, call.weights).expand(call.x.shape[0], -1, -1, -1)
    return _forward(call, product)


def trimul_saving(call: Call) -> tuple[Tensor, Tensor]:
    """The output, and t [B, D, L, L] in the dtype of x."""
    product = call.x.new_empty(saved_shape(call.x, call.weights))
    return _forward(call, product), product


def saved_shape(x: Tensor, weights: Weights) -> tuple[int, int, int, int]:
    """The shape [B, D, L, L] of the t that `trimul_saving` returns."""
    return (x.shape[0], weights.p_out_weight.shape[1], *x.shape[1:3])


def _forward(call: Call, product: Tensor) -> Tensor:
    """The output; t is written to `product` [B, D, L, L], whose sequences may share memory."""
    x = call.x
    stages = Stages(call)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    b = empty_planes(x, call.weights)[0] if call.hidden > x.shape[3] else None
    for index in range(x.shape[0]):
        a = product[index]
        if call.hidden <= x.shape[3]:  # b is no longer needed when the output is written
            b = out[index].view(-1)[: a.numel()].view(a.shape)
        stages.project(index, (a, b))
        stages.emit(index, stages.multiply(index, a, b), out[index])
    return out


class Stages:
    """The three stages of a call, each on one sequence `index` of its x [B, R, L, C].

    Planes have the axes of x in both directions. R may be some of the L rows, except in stage 2.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._dtype = gemm_dtype(call.x.dtype, call.x.device.type)
        self._parameters = prepare(call.weights, self._dtype)
        self._blocks = blocks_of(call.x)

    def project(
        self, index: int, planes: Sequence[Tensor], channels: slice | None = None
    ) -> None:
        """Stage 1: the planes [D, R, L] of a and b, or those of some channels."""
        call, parameters = self._call, self._parameters
        if channels is not None:
            parameters = parameters.of_channels(channels)
        mask = None if call.mask is None else call.mask[index]
        write_planes(*planes, call.x[index], mask, parameters, self._blocks, call.eps_in)

    def multiply(self, index: int, a: Tensor, b: Tensor) -> Tensor:
        """Stage 2: t [G, L, L] of whole planes, written over a."""
        multiply_planes(a, b, self._call.direction, self._dtype, self._blocks)
        return a

    def emit(self, index: int, product: Tensor, out: Tensor) -> None:
        """Stage 3: `out` [R, L, C] of t [D, R, L]."""
        call, parameters = self._call, self._parameters

        def emit_rows(window: slice) -> None:
            rows = call.x[index, window]
            z = normalize_rows(rows, parameters, call.eps_in)
            mixed, _ = normalize_columns(product[:, window], call.eps_out)
            delta, gate = (each.view(rows.shape) for each in emit(mixed, z, parameters))
            if call.drop_mask is not None:
                drop_mask = call.drop_mask[index]
                gate.mul_(drop_mask if drop_mask.ndim == 2 else drop_mask[window])
            if call.residual is None:
                torch.mul(delta, gate, out=out[window])
            else:
                torch.addcmul(call.residual[index, window], delta, gate, out=out[window])

        for_each(self._blocks.windows, emit_rows, self._blocks.threads)


def empty_planes(x: Tensor, weights: Weights) -> Tensor:
    """[1, D, L, L] in the dtype of x, uninitialised."""
    return x.new_empty((1, *saved_shape(x, weights)[1:]))


class Blocks(NamedTuple):
    """The blocks into which the work on a sequence x [L, L, C] is cut."""

    positions: int  # pairs of a block, about
    windows: list[slice]  # the rows [rows, L, C] of each block
    threads: int  # that work on blocks of their own


def blocks_of(x: Tensor, parts: int = 1) -> Blocks:
    """The blocks of a sequence of x [B, R, L, C], which has R of its L rows.

    To bound their buffers, the threads together hold at most 1 / `parts` of a long sequence.
    """
    count, length = x.shape[1:3]
    threads = region_threads(x.device)
    positions = _positions(x, parts, threads)
    if positions < LEAST_POSITIONS_A_THREAD * threads:
        threads = 1
        positions = _positions(x, parts, threads)
    rows = max(1, positions // max(1, length))
    windows = [slice(start, start + rows) for start in range(0, count, rows)]
    return Blocks(positions, windows, threads)


def _positions(x: Tensor, parts: int, threads: int) -> int:
    """The positions of a block."""
    pairs = x.shape[2] ** 2
    positions = max(LEAST_POSITIONS, pairs // (parts * threads))
    if x.device.type == "cpu":
        share = max(_BLOCK_POSITIONS, pairs // 8) // threads
        positions = min(positions, _BLOCK_POSITIONS, max(LEAST_POSITIONS, share))
    return positions


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums, norms and gates: fp32, or float64 for float64, which only torch's gradcheck uses."""
    return torch.promote_types(dtype, torch.float32)


def write_planes(
    a: Tensor, b: Tensor, x: Tensor, mask: Tensor | None, p: Parameters, blocks: Blocks, eps: float
) -> None:
    """a and b [D, R, L] of one sequence x [R, L, C]."""
    hidden, _, length = a.shape
    dtype = p.in_weight.dtype
    # A bool mask rounds nothing; any other mask multiplies before a and b are rounded.
    exact = mask is None or mask.dtype == torch.bool
    if mask is not None:
        mask = mask.to(dtype if exact else sum_dtype(dtype))

    def write(window: slice) -> None:
        z = normalize_rows(x[window], p, eps)
        projected = empty_columns(4 * hidden, z)
        project(p.in_weight, p.in_bias, z, out=projected)
        # value * sigmoid(gate)
        gated = F.glu(projected if exact else projected.to(sum_dtype(dtype)), dim=0)
        if mask is not None:
            gated *= mask[window].reshape(1, -1)
        a[:, window], b[:, window] = gated.view(2, hidden, -1, length)

    for_each(blocks.windows, write, blocks.threads)


def empty_columns(channels: int, z: Tensor) -> Tensor:
    """[channels, positions] for z [positions, C], in its dtype, uninitialised."""
    # Rows begin at multiples of 16 elements, whatever L: MKL is slow to write others.
    pitch = -(-z.shape[0] // 16) * 16
    return z.new_empty(channels, pitch)[:, : z.shape[0]]


def multiply_planes(
    a: Tensor, b: Tensor, direction: str, dtype: torch.dtype, blocks: Blocks
) -> None:
    """Overwrites a with t [D, L, L], by GEMMs in `dtype`."""

    def multiply(group: slice) -> None:
        left, right = a[group].to(dtype), b[group].to(dtype)
        if direction == "outgoing":
            right = right.mT
        else:
            left = left.mT
        a[group] = torch.bmm(left, right)

    for_each(channel_groups(*a.shape[:2], blocks), multiply, blocks.threads)


def channel_groups(hidden: int, length: int, blocks: Blocks) -> list[slice]:
    """Groups of channels of planes [D, L, L]; a group's products are one batch of GEMMs."""
    # As many channels as hold a block's elements; without a region, at least a matrix for each of
    # PyTorch's threads, but no more than D / 16.
    together = 1 if blocks.threads > 1 else min(torch.get_num_threads(), hidden // 16)
    channels = max(1, together, blocks.positions * hidden // (length * length))
    return [slice(start, start + channels) for start in range(0, hidden, channels)]


def emit(mixed: Tensor, z: Tensor, p: Parameters) -> tuple[Tensor, Tensor]:
    """The projection of the normalised t [D, positions] and the gate: [positions, C] in fp32."""
    delta = F.linear(mixed.t(), p.out_weight, p.out_bias)
    gate = F.linear(z, p.gate_weight, p.gate_bias).to(delta.dtype).sigmoid_()
    return delta, gate


def gemm_dtype(dtype: torch.dtype, device_type: str = "cpu") -> torch.dtype:
    """The dtype of the GEMMs for inputs of `dtype`; accelerators multiply every dtype."""
    if device_type != "cpu" or (dtype == torch.bfloat16 and _multiplies_bf16()):
        return dtype
    return sum_dtype(dtype)


@cache
def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products: AVX512-BF16, AMX, or Arm's BF16."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def prepare(w: Weights, dtype: torch.dtype) -> Parameters:
    """The parameters in the dtypes of their use: norms and the last projection in fp32.

    The last projection takes little time, and its rounding would add to the output's own.
    """
    in_bias = None
    if w.p_in_bias is not None or w.g_in_bias is not None:
        zeros = w.p_in_weight.new_zeros(w.p_in_weight.shape[0])
        halves = (zeros if half is None else half for half in (w.p_in_bias, w.g_in_bias))
        in_bias = torch.cat([half.to(dtype) for half in halves])
    wide = sum_dtype(dtype)
    out_weight, out_bias = w.p_out_weight.to(wide), cast(w.p_out_bias, wide)
    if w.norm_out_bias is not None:
        shift = out_weight @ w.norm_out_bias.to(wide)
        out_bias = shift if out_bias is None else out_bias + shift
    if w.norm_out_weight is not None:
        out_weight = out_weight * w.norm_out_weight.to(wide)
    return Parameters(
        cast(w.norm_in_weight, wide),
        cast(w.norm_in_bias, wide),
        torch.cat([w.p_in_weight, w.g_in_weight]).to(dtype),
        in_bias,
        w.g_out_weight.to(dtype),
        cast(w.g_out_bias, dtype),
        out_weight,
        out_bias,
    )


def cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def layer_norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis in fp32, exact for rows of one constant value.

    A row's first channel is subtracted beforehand. The shift doesn't change LayerNorm, and a
    constant row becomes exact zeros, however large the constant.
    """
    shifted = shift_rows(rows)
    return F.layer_norm(shifted, shifted.shape[-1:], weight, bias, eps)


def shift_rows(rows: Tensor) -> Tensor:
    """`rows` in fp32, minus each row's first channel."""
    rows = rows.to(sum_dtype(rows.dtype))
    return rows - rows[..., :1]


def normalize_rows(x: Tensor, p: Parameters, eps: float) -> Tensor:
    """z [positions, C] of a block [rows, L, C], in the dtype of the GEMMs."""
    z = layer_norm(x.flatten(0, 1), p.norm_weight, p.norm_bias, eps)
    return z.to(p.in_weight.dtype)


def normalize_columns(planes: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LayerNorm over the first axis in fp32, without weights: [D, rows, L] to [D, positions].

    As `layer_norm` for rows, with its shift, but without a transposed copy, which takes longer
    than the passes here. Also returns the reciprocal standard deviations [positions].
    """
    columns = torch.sub(planes, planes[:1].to(sum_dtype(planes.dtype))).flatten(1)
    columns -= columns.mean(0)
    rstd = columns.square().mean(0).add_(eps).rsqrt_()
    columns *= rstd
    return columns, rstd


def project(weight: Tensor, bias: Tensor | None, z: Tensor, out: Tensor) -> None:
    """out = z @ weight.T + bias, channel-major: [channels out, positions]."""
    if bias is None:
        torch.mm(weight, z.t(), out=out)
    else:
        torch.addmm(bias[:, None], weight, z.t(), out=out)


def trimul_differentiable(call: Call) -> Tensor:
    """The formula in out-of-place operations, so that autograd can follow it."""
    w, dtype = call.weights, call.x.dtype

    def linear(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(value, weight, None if bias is None else bias.to(dtype))

    z = layer_norm_of(call.x, w.norm_in_weight, w.norm_in_bias, call.eps_in)
    gated = linear(z, w.p_in_weight, w.p_in_bias)
    gated = gated * torch.sigmoid(linear(z, w.g_in_weight, w.g_in_bias))
    if call.mask is not None:
        gated = gated * call.mask.unsqueeze(-1).to(dtype)
    left, right = gated.movedim(-1, 1).chunk(2, dim=1)  # [B, D, L, L]
    if call.direction == "outgoing":
        product = left @ right.transpose(-1, -2)
    else:
        product = left.transpose(-1, -2) @ right
    t = product.movedim(1, -1)
    mixed = layer_norm_of(t, w.norm_out_weight, w.norm_out_bias, call.eps_out)
    delta = linear(mixed, w.p_out_weight, w.p_out_bias)
    delta = delta * torch.sigmoid(linear(z, w.g_out_weight, w.g_out_bias))
    if call.drop_mask is not None:
        delta = delta * call.drop_mask.unsqueeze(1).to(dtype)
    return (delta if call.residual is None else call.residual + delta).contiguous()


def layer_norm_of(value: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` with fp32 parameters, in the dtype of `value`."""
    wide = sum_dtype(value.dtype)
    return layer_norm(value, cast(weight, wide), cast(bias, wide), eps).to(value.dtype)
