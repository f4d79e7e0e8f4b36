"""The first stage of the transition: LayerNorm, gate and up projection, and the gated unit.

    z      = LayerNorm(x; g, b)                                    x [B, R, J, C], any strides
    hidden = silu(z Wg^T + bg) * (z Wu^T + bu)                     [M, H], M = B * R * J

For a backward it writes the projections p = z Wg^T + bg and u = z Wu^T + bu instead, side by side
[M, 2, H]; x^ = (x - mean) rstd [M, C]; and the moments of x [2, M] in fp32, as stage 1 does.

hidden is contiguous, in the dtype of x. x has R of the rows of its sequences, usually a part of
them: `row_linear` reads hidden before the next part is made. With lengths, the rows of tiles in
which every pair is padding are not written.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .. import hopper
from .._call import Transition
from ..fused_dual_gemm import lowest, project_pair, project_split, projection_pair
from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    Launches,
    PreparedLaunch,
    block_of,
    descriptor_of,
    dot_precision,
    has_descriptor,
    is_aligned,
    named_strides,
    pointers,
    setting_of,
    shared_by,
    strides,
)
from ..triton_parts.layer_norm import (
    chunk_moments,
    chunk_statistics,
    hold,
    hold_split,
    load_chunks,
    load_first,
    normalise,
    row_moments,
    row_statistics,
)
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.split_operands import FP16X3
from ..triton_parts.split_rows import store_hat
from ..triton_parts.tiles import (
    any_of,
    load_tile,
    pairs_of_rows,
    sigmoid,
    store_tile,
    within_lengths,
)


@triton.jit(
    do_not_specialize=[
        "M", "R", "J", "first_row", "eps", "lengths_ptr",
        "stride_x_b", "stride_x_i", "stride_x_j", "weight_pair", "weight_gap",
    ]
)  # fmt: skip
def _swiglu_hidden_kernel(
    x_ptr, lengths_ptr, norm_weight_ptr, norm_bias_ptr,
    weight_pair, weight_gap, up_bias_ptr, gate_bias_ptr, scales_ptr, hidden, hat_ptr, moments_ptr,
    M, R, J, first_row, eps,
    stride_x_b, stride_x_i, stride_x_j, stride_x_c, stride_first, stride_second,
    C: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    X_ALIGNMENT: tl.constexpr, WEIGHT_ALIGNMENT: tl.constexpr, GATE_FIRST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, STORE_DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr, FAST_RECIPROCAL: tl.constexpr,
    HELD: tl.constexpr, SPLIT: tl.constexpr, PROJECTIONS: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """silu(z Wg^T + bg) * (z Wu^T + bu), all H channels of BLOCK_M rows, or both PROJECTIONS.

    M rows m = (b * R + i) * J + j, N = H output channels in blocks, K = C input channels. With
    BLOCK_K >= C the normalised rows stay on the chip while the weights stream past. SPLIT programs
    share the output channels of a tile. With PRECISION "fp16x3" the operands are split numbers, of
    projections whose rows' scales are the first of TOTAL, and x^ is of `store_hat`.
    """
    pid = tl.program_id(0) // SPLIT
    part = tl.program_id(0) - pid * SPLIT
    start_m = pid * BLOCK_M
    valid_m = start_m + tl.arange(0, BLOCK_M) < M
    b, i, j = pairs_of_rows(start_m, R, J, BLOCK_M)
    if lengths_ptr is not None:
        within = valid_m & within_lengths(lengths_ptr, b, first_row + i, j, valid_m, J)
        if not any_of(within):
            return
    offs_x = (
        b.to(tl.int64) * stride_x_b + i.to(tl.int64) * stride_x_i + j.to(tl.int64) * stride_x_j
    )
    offs_x = tl.multiple_of(offs_x, X_ALIGNMENT)
    dtype = x_ptr.dtype.element_ty
    SPLIT_OPERANDS: tl.constexpr = PRECISION == "fp16x3"
    row = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    first = None
    if dtype == tl.float32:
        first = load_first(x_ptr, offs_x, valid_m)
    if SPLIT_OPERANDS:
        WHOLE: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K * BLOCK_K
        chunks = load_chunks(x_ptr, offs_x, stride_x_c, valid_m, C, WHOLE, BLOCK_K)
        mean, rstd = chunk_moments(chunks, first, eps, C)
        if hat_ptr is not None and part == 0:
            for k in tl.static_range(len(chunks)):
                offs_k = k * BLOCK_K + tl.arange(0, BLOCK_K)
                hat = normalise(
                    chunks[k], offs_k, first, mean, rstd, None, None, C, C % BLOCK_K == 0
                )
                store_hat(hat_ptr, row, offs_k, hat, valid_m, C, C % BLOCK_K == 0, PRECISION)
        highs, lows = hold_split(chunks, first, mean, rstd, norm_weight_ptr, norm_bias_ptr, C)
    else:
        z, mean, rstd = normalised_rows(
            x_ptr, offs_x, stride_x_c, first, valid_m, eps, norm_weight_ptr, norm_bias_ptr,
            C, BLOCK_K, HELD,
        )  # fmt: skip

    if PROJECTIONS and part == 0:
        tl.store(moments_ptr + row, tl.sum(mean, 1), mask=valid_m)
        tl.store(moments_ptr + M + row, tl.sum(rstd, 1), mask=valid_m)
        if hat_ptr is not None and not SPLIT_OPERANDS:
            for start_k in range(0, C, BLOCK_K):
                offs_k = start_k + tl.arange(0, BLOCK_K)
                x = load_tile(
                    x_ptr, offs_x, offs_k, stride_x_c, valid_m, C, C % BLOCK_K == 0
                ).to(tl.float32)  # fmt: skip
                hat = normalise(x, offs_k, first, mean, rstd, None, None, C, C % BLOCK_K == 0)
                store_tile(hat_ptr, row * C, offs_k, hat.to(dtype), valid_m, C, C % BLOCK_K == 0)

    PER_PROGRAM: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N // SPLIT
    for step in range(0, PER_PROGRAM):
        start_n = (part * PER_PROGRAM + step) * BLOCK_N
        if SPLIT_OPERANDS:
            up, gate = project_split(
                highs, lows, scales_ptr, weight_pair, weight_gap, stride_first, stride_second,
                0, start_n, H + start_n, C, H, 1, -H, TOTAL,
                BLOCK_M, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, DESCRIPTORS,
            )  # fmt: skip
        else:
            up, gate = project_pair(
                z, x_ptr, offs_x, stride_x_c, valid_m, first, mean, rstd,
                norm_weight_ptr, norm_bias_ptr, up_bias_ptr, gate_bias_ptr, None,
                weight_pair, weight_gap, stride_first, stride_second, 0, start_n, H,
                C, H, BLOCK_M, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, GATE_FIRST, DESCRIPTORS,
                PRECISION,
            )  # fmt: skip
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if PROJECTIONS and STORE_DESCRIPTOR:
            hidden.store([start_m, 0, start_n], gate.to(dtype).reshape(BLOCK_M, 1, BLOCK_N))
            hidden.store([start_m, 1, start_n], up.to(dtype).reshape(BLOCK_M, 1, BLOCK_N))
        elif PROJECTIONS:
            offs = row * 2 * H
            store_tile(hidden, offs, offs_n, gate.to(dtype), valid_m, H, H % BLOCK_N == 0)
            store_tile(hidden + H, offs, offs_n, up.to(dtype), valid_m, H, H % BLOCK_N == 0)
        else:
            gated = (up * gate * sigmoid(gate, FAST_RECIPROCAL)).to(dtype)
            if STORE_DESCRIPTOR:
                hidden.store([start_m, start_n], gated)
            else:
                store_tile(hidden, row * H, offs_n, gated, valid_m, H, H % BLOCK_N == 0)


@triton.jit
def normalised_rows(
    x_ptr, offs_x, stride_x_c, first, valid_m, eps, norm_weight_ptr, norm_bias_ptr,
    C: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """z, mean and rstd of rows of x, for `project_pair`. With BLOCK_K < C it makes z itself."""
    EVEN_C: tl.constexpr = C == BLOCK_K
    if HELD:
        chunks = load_chunks(x_ptr, offs_x, stride_x_c, valid_m, C, BLOCK_K)
        mean, rstd = chunk_statistics(chunks, load_first(x_ptr, offs_x, valid_m), eps, C, BLOCK_K)
        z = hold(chunks, mean, rstd, norm_weight_ptr, norm_bias_ptr, C, BLOCK_K)
    elif BLOCK_K >= C:
        offs_c = tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, offs_x, offs_c, stride_x_c, valid_m, C, EVEN_C).to(tl.float32)
        mean, rstd = row_statistics(x, first, eps, C)
        z = normalise(
            x, offs_c, first, mean, rstd, norm_weight_ptr, norm_bias_ptr, C, EVEN_C
        ).to(x_ptr.dtype.element_ty)  # fmt: skip
    else:
        mean, rstd = row_moments(x_ptr, offs_x, stride_x_c, first, valid_m, eps, C, BLOCK_K)
        z = mean  # not read
    return z, mean, rstd


def swiglu_hidden(
    call: Transition,
    launches: Launches,
    hidden: Tensor,
    first_row: int = 0,
    config: LaunchConfig | None = None,
    moments: Tensor | None = None,
    hat_x: Tensor | None = None,
    folded: tuple[Tensor | None, ...] | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor | None, ...] | None:
    """Fills hidden [M, H] for the rows x [B, R, J, C] of a call.

    With `moments` [2, M] it fills those, hidden [M, 2H] with p and u, and x^ [M, C] where given:
    [M, 2C] in float16 of `store_hat` if the call is one of split numbers.

    Args:
        first_row: the row of the sequences that x begins with; it matters only with lengths.
        config: a setting in place of the shipped one.
        folded: what an earlier chunk of the same call returned.
        scales: of a call of split numbers: see `split_transition`.
    """
    prepared = launches.of(
        ("swiglu_hidden", call.x.shape, call.x.data_ptr() % 16, first_row),
        prepare_swiglu_hidden, call, hidden, first_row, moments is not None, config, scales,
    )  # fmt: skip
    if prepared.variant == "hopper":
        variant = hopper.kernels("gated_rows")
        return variant.launch_hidden(call, launches, prepared, hidden, folded)
    weights = call.weights
    prepared.launch(
        x_ptr=call.x,
        lengths_ptr=call.lengths,
        norm_weight_ptr=weights.norm_weight,
        norm_bias_ptr=weights.norm_bias,
        weight_pair=lowest(weights.up_weight, weights.gate_weight),
        up_bias_ptr=weights.up_bias,
        gate_bias_ptr=weights.gate_bias,
        scales_ptr=scales,
        hidden=hidden,
        hat_ptr=hat_x,
        moments_ptr=moments,
    )
    return None


def prepare_swiglu_hidden(
    call: Transition,
    hidden: Tensor,
    first_row: int,
    projections: bool,
    config: LaunchConfig | None,
    scales: Tensor | None = None,
) -> PreparedLaunch:
    """The launch of `swiglu_hidden` for calls like this one."""
    x, weights = call.x, call.weights
    rows, (row_count, columns, channels) = hidden.shape[0], x.shape[1:]
    device = device_target(x.device)
    variants = frozenset()
    if not projections:
        variants = hopper.variants("gated_rows", "takes_hidden", x, call, hidden)
    if config is None:
        stage = "swiglu_projections" if projections else "swiglu_hidden"
        config = setting_of(
            stage, x, channels, math.isqrt(rows), 1, variants, call.precision == FP16X3
        )
    if hopper.is_variant(config, variants):
        return hopper.kernels("gated_rows").prepare_hidden(call, hidden, first_row, config)
    block_n = block_of(config.block_n, call.hidden)
    block_k = block_of(config.block_k, channels)
    pair = projection_pair(
        weights.up_weight, weights.gate_weight, 1 if scales is None else 2, block_n, block_k,
        config.descriptors,
    )
    store, made, tile = None, hidden, [config.block_m, block_n]
    if projections:
        made, tile = hidden.view(rows, 2, call.hidden), [config.block_m, 1, block_n]
    if config.descriptors and has_descriptor(made, stored=True):
        store = descriptor_of(made, made.shape, made.stride(), tile)
    split = shared_by(config.split, triton.cdiv(call.hidden, block_n))
    return PreparedLaunch(
        _swiglu_hidden_kernel,
        triton.cdiv(rows, config.block_m) * split,
        tensors=pointers(
            "x_ptr", "lengths_ptr", "norm_weight_ptr", "norm_bias_ptr", "up_bias_ptr",
            "gate_bias_ptr", "scales_ptr", "hat_ptr", "moments_ptr",
        ) | {"weight_pair": pair.descriptor, "hidden": store},
        values=dict(
            M=rows, R=row_count, J=columns, first_row=first_row, eps=call.eps,
            weight_gap=pair.gap, stride_first=pair.strides[0], stride_second=pair.strides[1],
            **named_strides("x", "bijc", strides(x)),
        ),
        constants=dict(
            C=channels, H=call.hidden,
            BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            X_ALIGNMENT=16 // x.element_size() if is_aligned(x) else 1,
            WEIGHT_ALIGNMENT=pair.alignment, GATE_FIRST=pair.gate_first,
            DESCRIPTORS=pair.descriptor is not None, STORE_DESCRIPTOR=store is not None,
            PRECISION=dot_precision(call.precision, device.fp32_dots, config.fp32_dot),
            FAST_RECIPROCAL=device.fast_reciprocal,
            HELD=config.held and block_k >= channels and x.element_size() == 2, SPLIT=split,
            PROJECTIONS=projections, TOTAL=0 if scales is None else scales.shape[1],
        ),
        options=config.options(),
    )  # fmt: skip
