"""Stage 1's backward, for some rows of one sequence: from the planes' gradients to dp, dg, dmask.

    z = LayerNorm(x; g1, b1)                                       x [R, L, C], any strides
    p = z Wp^T + bp, s = sigmoid(z Wg^T + bg)                      [R, L, 2D]
    h = p s mask, whose gradient dh comes as planes          [2, APART, R, pitch]

    dp = dh s mask                          the gradient of p
    dg = dh p mask s (1 - s)                the gradient of the gate before its sigmoid
    dmask = sum of dh p s over the 2D channels

The kernel recomputes p and s. It writes x^ = (x - mean) rstd, and dp and dg side by side, rows
[R*L, 4D]. Here planes have the axes of x in both directions.

For a sequence shorter than L, every output is zero at pairs with a residue beyond its length, where
planes and moments may be NaN. Tiles that hold only such pairs write zeros and return.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import hopper
from .._call import Call
from ..fused_dual_gemm import lowest, project_pair, projection_pair
from ..hopper.folded_norm import Folds
from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    PreparedLaunch,
    block_of,
    dot_precision,
    is_aligned,
    named_strides,
    pointers,
    setting_of,
    strides,
)
from ..triton_parts.layer_norm import hold, load_chunks, load_first, normalise
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.split_operands import Split, multiplied, power_of_two
from ..triton_parts.split_rows import store_hat
from ..triton_parts.tiles import (
    any_of,
    load_tile,
    positions,
    sigmoid,
    store_tile,
    store_zeros,
    within_length,
)


@triton.jit(
    do_not_specialize=[
        "R", "L", "first_row", "moments_ptr", "mask_ptr", "lengths_ptr",
        "stride_x_i", "stride_x_j",
        "stride_moments_n", "stride_moments_i", "stride_moments_j",
        "stride_mask_i", "stride_mask_j",
        # As in the forward: a specialised pointer gets 32-bit offsets on AMD; the gap may be more.
        "weight_pair", "weight_gap",
    ]
)  # fmt: skip
def _fused_dual_gemm_bwd_kernel(
    x_ptr, mask_ptr, lengths_ptr, moments_ptr, planes_ptr,
    grads_ptr, hat_ptr, grad_mask_ptr, sums_ptr,
    norm_weight_ptr, norm_bias_ptr, weight_pair, value_bias_ptr, gate_bias_ptr, scales_ptr,
    weight_gap, R, L, pitch, first_row, stride_planes_d,
    stride_x_i, stride_x_j, stride_x_c,
    stride_moments_n, stride_moments_i, stride_moments_j, stride_mask_i, stride_mask_j,
    stride_first, stride_second,
    C: tl.constexpr, D: tl.constexpr, APART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    X_ALIGNMENT: tl.constexpr, WEIGHT_ALIGNMENT: tl.constexpr, GATE_FIRST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, FAST_RECIPROCAL: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """dp, dg, x^, dmask and sums of all 2D channels at BLOCK_M positions m = i * pitch + j.

    M = R * pitch positions, N = 2D hidden channels in blocks, K = C channels. Of the planes of dh
    those of db lie APART planes, D or more, from those of da: [2, APART, R, pitch]. Every output is
    optional: `grads` [R*L, 2, 2, D] (dp, dg; of a, of b), x^ [R*L, C], dmask [R*L], and `sums`
    [programs, 2, 2, D] of dp and dg over the tile. Row i is row first_row + i of its sequence,
    which matters only with lengths. With PRECISION "fp16x3" the operands are split numbers.
    """
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    i, j = positions(start_m, pitch, BLOCK_M)
    valid_m = (i < R) & (j < L)
    valid_plane = offs_m < R * pitch
    dtype = x_ptr.dtype.element_ty
    row = i.to(tl.int64) * L + j
    EVEN_C: tl.constexpr = C % BLOCK_K == 0
    if lengths_ptr is not None:
        within = valid_m & within_length(lengths_ptr, 0, first_row + i, j, L)
        beyond = valid_m & ~within
        if grads_ptr is not None:
            store_zeros(grads_ptr, row * (4 * D), beyond, 4 * D, BLOCK_N)
        if hat_ptr is not None:
            for start_k in range(0, C, BLOCK_K):
                offs_k = start_k + tl.arange(0, BLOCK_K)
                zeros = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
                store_hat(hat_ptr, row, offs_k, zeros, beyond, C, EVEN_C, PRECISION)
        if grad_mask_ptr is not None:
            zeros = tl.zeros([BLOCK_M], grad_mask_ptr.dtype.element_ty)
            tl.store(grad_mask_ptr + row, zeros, mask=beyond)
        valid_m = within
        if not any_of(valid_m):
            if sums_ptr is not None:
                halves_of = tl.program_id(0).to(tl.int64) * 2 + tl.arange(0, 2)
                store_zeros(sums_ptr, halves_of * (2 * D), halves_of >= 0, 2 * D, BLOCK_N)
            return

    offs_x = i.to(tl.int64) * stride_x_i + j.to(tl.int64) * stride_x_j
    offs_x = tl.multiple_of(offs_x, X_ALIGNMENT)
    mean_ptrs = moments_ptr + i.to(tl.int64) * stride_moments_i + j.to(tl.int64) * stride_moments_j
    mean = tl.load(mean_ptrs, mask=valid_m, other=0.0)[:, None]
    rstd = tl.load(mean_ptrs + stride_moments_n, mask=valid_m, other=0.0)[:, None]
    pair_mask = valid_m.to(tl.float32)
    if mask_ptr is not None:
        offs_mask = i.to(tl.int64) * stride_mask_i + j.to(tl.int64) * stride_mask_j
        pair_mask = tl.load(mask_ptr + offs_mask, mask=valid_m, other=0).to(tl.float32)
    first = None
    if dtype == tl.float32:
        first = load_first(x_ptr, offs_x, valid_m)
    z = None
    SPLIT: tl.constexpr = PRECISION == "fp16x3"
    TOTAL: tl.constexpr = 4 * D + 2 * C  # rows of all projections
    if HELD:
        chunks = load_chunks(x_ptr, offs_x, stride_x_c, valid_m, C, BLOCK_K)
        z = hold(chunks, mean, rstd, norm_weight_ptr, norm_bias_ptr, C, BLOCK_K)
    elif BLOCK_K >= C:
        offs_c = tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, offs_x, offs_c, stride_x_c, valid_m, C, EVEN_C).to(tl.float32)
        z = normalise(
            x, offs_c, first, mean, rstd, norm_weight_ptr, norm_bias_ptr, C, EVEN_C
        ).to(dtype)  # fmt: skip
    if hat_ptr is not None:
        for start_k in range(0, C, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            x = load_tile(x_ptr, offs_x, offs_k, stride_x_c, valid_m, C, EVEN_C).to(tl.float32)
            hat = normalise(x, offs_k, first, mean, rstd, None, None, C, EVEN_C)
            store_hat(hat_ptr, row, offs_k, hat, valid_m, C, EVEN_C, PRECISION)

    BLOCKS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    EVEN_D: tl.constexpr = D % BLOCK_N == 0
    grad_mask = tl.zeros([BLOCK_M], tl.float32)
    for block in range(0, 2 * BLOCKS):
        half = block // BLOCKS
        start_n = (block - half * BLOCKS) * BLOCK_N
        offs_n = start_n + tl.arange(0, BLOCK_N)
        value, gate = project_pair(
            z, x_ptr, offs_x, stride_x_c, valid_m, first, mean, rstd,
            norm_weight_ptr, norm_bias_ptr, value_bias_ptr, gate_bias_ptr, scales_ptr,
            weight_pair, weight_gap, stride_first, stride_second,
            half, start_n, (half + 1) * D,
            C, D, BLOCK_M, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, GATE_FIRST, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        if SPLIT:  # the value is in its planes' scale
            rows = half * D + offs_n
            exponent = tl.load(scales_ptr + 2 * TOTAL + rows, mask=rows < 2 * D, other=0.0)
            value *= power_of_two(-exponent.to(tl.int32))[None, :]
        gate = sigmoid(gate, FAST_RECIPROCAL)

        plane = half * APART + offs_n
        planes_ptrs = planes_ptr + (plane.to(tl.int64) * stride_planes_d)[:, None] + offs_m[None, :]
        valid = valid_plane[None, :]
        if not EVEN_D:
            valid = valid & (offs_n < D)[:, None]
        grad = tl.load(planes_ptrs, mask=valid, other=0.0).T.to(tl.float32)  # [BLOCK_M, BLOCK_N]
        # The padding columns of the planes are uninitialised and may be NaN.
        grad = tl.where(valid_m[:, None], grad, 0.0)
        grad_value = grad * gate
        if grad_mask_ptr is not None:
            grad_mask += tl.sum(grad_value * value, 1)
        grad_value *= pair_mask[:, None]
        grad_gate = grad_value * value * (1.0 - gate)
        if sums_ptr is not None:
            sums_ptrs = sums_ptr + tl.program_id(0).to(tl.int64) * 4 * D + half * D + offs_n
            tl.store(sums_ptrs, tl.sum(grad_value, 0), mask=offs_n < D)
            tl.store(sums_ptrs + 2 * D, tl.sum(grad_gate, 0), mask=offs_n < D)
        if grads_ptr is not None:
            base = grads_ptr + half * D
            offs_row = row * (4 * D)
            store_tile(base, offs_row, offs_n, grad_value.to(dtype), valid_m, D, EVEN_D)
            store_tile(base + 2 * D, offs_row, offs_n, grad_gate.to(dtype), valid_m, D, EVEN_D)
    if grad_mask_ptr is not None:
        dtype_mask = grad_mask_ptr.dtype.element_ty
        tl.store(grad_mask_ptr + row, grad_mask.to(dtype_mask), mask=valid_m)


class Stage1Gradients(NamedTuple):
    """The outputs of `fused_dual_gemm_bwd`, None where not wanted."""

    grads: torch.Tensor | None  # [R*L, 4D] in the dtype of x: dp, dg
    # x^ [R*L, C] in the dtype of x; of split numbers [R*L, 2C] in float16, see `store_hat`
    hat_x: torch.Tensor | None
    mask: torch.Tensor | None  # dmask [R, L], contiguous, in the dtype of the mask
    sums: torch.Tensor | None  # [`rows_of_sums`, 4D] in fp32, partial sums of dp and dg


def fused_dual_gemm_bwd(
    call: Call,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    moments: torch.Tensor,
    planes: torch.Tensor,
    prepared: PreparedLaunch,
    out: Stage1Gradients,
    folds: Folds,
    split: Split | None = None,
) -> None:
    """Fills `out` from x [R, L, C], mask [R, L], moments [2, R, L], planes of dh.

    These are some rows of a call of one sequence. `prepared` is from `prepare_dual_gemm_bwd` for
    tensors like these. `split` is of a call of split numbers.
    """
    weights = multiplied(call.weights, split)
    if prepared.variant == "hopper":
        variant = hopper.kernels("gated_rows_backward")
        tensors, made = (x, mask, moments, planes), (out.grads, out.hat_x, out.sums)
        variant.launch(prepared, tensors, made, folds)
        return
    prepared.launch(
        x_ptr=x,
        mask_ptr=mask,
        lengths_ptr=call.lengths,
        moments_ptr=moments,
        planes_ptr=planes,
        grads_ptr=out.grads,
        hat_ptr=out.hat_x,
        grad_mask_ptr=out.mask,
        sums_ptr=out.sums,
        norm_weight_ptr=weights.norm_in_weight,
        norm_bias_ptr=weights.norm_in_bias,
        weight_pair=lowest(weights.p_in_weight, weights.g_in_weight),
        value_bias_ptr=weights.p_in_bias,
        gate_bias_ptr=weights.g_in_bias,
        scales_ptr=None if split is None else split.scales.projections,
    )


def rows_of_sums(prepared: PreparedLaunch) -> int:
    """The first extent of the sums."""
    if prepared.variant == "hopper":
        return hopper.kernels("gated_rows_backward").rows_of_sums(prepared)
    return prepared.programs


def prepare_dual_gemm_bwd(
    call: Call,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    moments: torch.Tensor,
    planes: torch.Tensor,
    apart: int,
    wanted: frozenset[str],
    config: LaunchConfig | None = None,
    first_row: int = 0,
    split: Split | None = None,
) -> PreparedLaunch:
    """The launch of `fused_dual_gemm_bwd`.

    The planes of db lie `apart` planes, D or more, from those of da. `wanted` names outputs of
    `Stage1Gradients`. The first row is row `first_row` of its sequence. `split` is of a call of
    split numbers.
    """
    weights = multiplied(call.weights, split)
    count, length, channels = x.shape
    hidden, pitch = call.hidden, planes.shape[2]
    device = device_target(x.device)
    variants = hopper.variants(
        "gated_rows_backward", "takes", x, hidden, call.lengths, wanted
    )
    if config is None:
        width = max(channels, hidden)
        config = setting_of("fused_dual_gemm_bwd", x, width, length, 1, variants, split is not None)
    if hopper.is_variant(config, variants):
        module = hopper.kernels("gated_rows_backward")
        return module.prepare(call, x, mask, moments, planes, apart, wanted, config)
    block_n = block_of(config.block_n, hidden)
    if hidden % 16 == 0:  # whole blocks, even if smaller
        block_n = math.gcd(hidden, block_n)
    block_k = block_of(config.block_k, channels)
    held = config.held and block_k >= channels
    if held and x.element_size() != 2:
        raise ValueError(f"a held operand is of 16-bit rows; got {config} for {x.dtype}")
    pair = projection_pair(
        weights.p_in_weight, weights.g_in_weight, 2 if split is None else 4, block_n, block_k,
        config.descriptors,
    )  # fmt: skip
    elements = 16 // x.element_size()
    return PreparedLaunch(
        _fused_dual_gemm_bwd_kernel,
        triton.cdiv(count * pitch, config.block_m),
        tensors=pointers(
            "x_ptr", "mask_ptr", "lengths_ptr", "moments_ptr", "planes_ptr", "grads_ptr",
            "hat_ptr", "grad_mask_ptr", "sums_ptr", "norm_weight_ptr", "norm_bias_ptr",
            "value_bias_ptr", "gate_bias_ptr", "scales_ptr",
        ) | {"weight_pair": pair.descriptor},
        values=dict(
            R=count, L=length, pitch=pitch, first_row=first_row, weight_gap=pair.gap,
            stride_planes_d=planes.stride(0),
            stride_first=pair.strides[0], stride_second=pair.strides[1],
            **named_strides("x", "ijc", strides(x)),
            **named_strides("moments", "nij", moments.stride()),
            **named_strides("mask", "ij", (0, 0) if mask is None else strides(mask)),
        ),
        constants=dict(
            C=channels, D=hidden, APART=apart,
            BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            X_ALIGNMENT=elements if is_aligned(x) else 1,
            WEIGHT_ALIGNMENT=pair.alignment, GATE_FIRST=pair.gate_first,
            DESCRIPTORS=pair.descriptor is not None,
            PRECISION=dot_precision(call.precision, device.fp32_dots),
            FAST_RECIPROCAL=device.fast_reciprocal, HELD=held,
        ),
        options=config.options(),
    )  # fmt: skip
