"""Two projections with the norm before them folded into their weights, for the Hopper kernels.

    W'[n, k] = W[n, k] g[k]                     in the dtype of W
    s[n]     = sum over k of W'[n, k]           of the rounded W', in fp32
    c[n]     = sum over k of W[n, k] b[k] + bias[n]

    LayerNorm(x; g, b) W^T + bias = rstd (x W'^T - mean s + c / rstd)

s and c are written as further channels of W', 16 of them, so that the product makes the whole
bracket: in three pieces each, s = s1 + s2 + s3 in bfloat16 (whatever the dtype of W), which meet
the pieces of mean and 1 / rstd as

    m1 s1 + m2 s1 + m3 s1 + m1 s2 + m2 s2 + m1 s3

W' is rounded where otherwise the normalised rows are, to as many bits; the rows are multiplied as
they are. x W'^T and mean s are both of the size of mean, so that their difference loses digits
where |mean| rstd is large: see docs/numerics.md.

The backward's are all made by one launch, with the means that its stage 3 needs.

float16 has few exponents: W', s and c of a block of channels are made 2^e times as large, so that
the block's largest W' is between 2^14 and 2^15. The factors 2^-e are returned.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._call import Weights
from ..triton_parts.launch import Launches, PreparedLaunch, pointers
from ..triton_parts.layer_norm import store_means_of_projection
from ..triton_parts.tiles import load_channels, load_weight

_BLOCK = 16
EXTRA = 16  # further channels
_EXTRA = tl.constexpr(EXTRA)
_ELEMENTS = 8192  # of a block, for four warps


class Folded(NamedTuple):
    """What `fold_norms` makes of two projections [N, K]."""

    weights: Tensor  # W' [2, N, K], of float16 times 2^e
    further: Tensor  # its further channels [2, N, 16] in bfloat16, likewise
    factors: Tensor | None  # 2^-e [2, N / block_n] in float32, of float16


@triton.jit(do_not_specialize=["first_row"])
def _fold_norm_kernel(
    first_ptr, second_ptr, first_norm_ptr, first_norm_bias_ptr, second_norm_ptr,
    second_norm_bias_ptr, first_bias_ptr, second_bias_ptr, folded_ptr, extra_ptr, factors_ptr,
    stride_first, stride_second, first_row,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W' and the further channels of BLOCK_N channels of one of two projections [ROWS, K].

    Of N channels: all, or N / 2 of either half of the rows, from `first_row` of the half on.
    """
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    second = tl.program_id(0) // TILES
    start_n = (tl.program_id(0) - second * TILES) * BLOCK_N
    start_row = start_n
    if N < ROWS:
        start_row += first_row + tl.where(start_n < N // 2, 0, (ROWS - N) // 2)
    if second == 0:
        _fold(
            first_ptr, stride_first, first_norm_ptr, first_norm_bias_ptr, first_bias_ptr,
            folded_ptr, extra_ptr, factors_ptr, 0, start_n, start_row,
            ROWS, N, K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _fold(
            second_ptr, stride_second, second_norm_ptr, second_norm_bias_ptr, second_bias_ptr,
            folded_ptr, extra_ptr, factors_ptr, 1, start_n, start_row,
            ROWS, N, K, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _fold_norms_bwd_kernel(
    emit_ptr, gate_ptr, first_ptr, second_ptr, norm_out_ptr, norm_out_bias_ptr,
    norm_in_ptr, norm_in_bias_ptr, gate_bias_ptr, first_bias_ptr, second_bias_ptr,
    scale_ptr, shift_ptr, residual_ptr, residual_extra_ptr, planes_ptr, planes_extra_ptr,
    stride_emit, stride_gate, stride_first, stride_second,
    C: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W' and the further channels of BLOCK_N channels of We and Wo [C, C], or of Wp and Wg [N, C].

    Of We, whose norm is without its bias here, also We g2 / C and We b2.
    """
    OF_C: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    OF_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0)
    if block < OF_C:
        start = block * BLOCK_N
        _fold(
            emit_ptr, stride_emit, norm_out_ptr, None, None, residual_ptr, residual_extra_ptr,
            None, 0, start, start, C, C, C, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_means_of_projection(
            emit_ptr, norm_out_ptr, norm_out_bias_ptr, scale_ptr, shift_ptr, start, stride_emit,
            C, C, BLOCK_N, BLOCK_K, "bf16",
        )  # fmt: skip
    elif block < 2 * OF_C:
        start = (block - OF_C) * BLOCK_N
        _fold(
            gate_ptr, stride_gate, norm_in_ptr, norm_in_bias_ptr, gate_bias_ptr, residual_ptr,
            residual_extra_ptr, None, 1, start, start, C, C, C, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif block < 2 * OF_C + OF_N:
        start = (block - 2 * OF_C) * BLOCK_N
        _fold(
            first_ptr, stride_first, norm_in_ptr, norm_in_bias_ptr, first_bias_ptr, planes_ptr,
            planes_extra_ptr, None, 0, start, start, N, N, C, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        start = (block - 2 * OF_C - OF_N) * BLOCK_N
        _fold(
            second_ptr, stride_second, norm_in_ptr, norm_in_bias_ptr, second_bias_ptr, planes_ptr,
            planes_extra_ptr, None, 1, start, start, N, N, C, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _fold(
    weight_ptr, stride_weight, norm_ptr, norm_bias_ptr, bias_ptr, folded_ptr, extra_ptr,
    factors_ptr, which, start_n, start_row,
    ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    weight = load_weight(
        weight_ptr, start_row, 0, stride_weight, ROWS, K, BLOCK_N, BLOCK_K, False
    ).to(tl.float32)  # fmt: skip
    scale = load_channels(norm_ptr, offs_k, 1.0, K, K == BLOCK_K)
    shift = load_channels(norm_bias_ptr, offs_k, 0.0, K, K == BLOCK_K)
    valid = offs_n < N
    constant = tl.sum(weight * shift, 1)
    if bias_ptr is not None:
        offs_row = start_row + tl.arange(0, BLOCK_N)
        constant += tl.load(bias_ptr + offs_row, mask=valid, other=0.0).to(tl.float32)
    folded = weight * scale
    if factors_ptr is not None:
        factor, inverse = _powers_of_two(folded)
        folded *= factor
        constant *= factor
        tl.store(factors_ptr + (which * N + start_n) // BLOCK_N, inverse)
    folded = folded.to(folded_ptr.dtype.element_ty)
    rows = which * N + offs_n
    tl.store(
        folded_ptr + rows[:, None] * K + offs_k[None, :], folded,
        mask=valid[:, None] & (offs_k < K)[None, :],
    )  # fmt: skip
    column = tl.arange(0, _EXTRA)[None, :]
    place = column % 6
    value = tl.where(column < 6, -tl.sum(folded.to(tl.float32), 1)[:, None], constant[:, None])
    first = value.to(tl.bfloat16).to(tl.float32)
    second = (value - first).to(tl.bfloat16).to(tl.float32)
    third = value - first - second
    piece = tl.where(place < 3, first, tl.where(place < 5, second, third))
    piece = tl.where(column < 12, piece, 0.0).to(extra_ptr.dtype.element_ty)
    tl.store(extra_ptr + rows[:, None] * _EXTRA + column, piece, mask=valid[:, None])


@triton.jit
def _powers_of_two(folded):
    """2^e and 2^-e, for which the largest finite |folded| 2^e is between 2^14 and 2^15; e <= 64."""
    sizes = tl.abs(folded)
    sizes = tl.where(sizes < float("inf"), sizes, 0.0)
    largest = tl.max(tl.max(sizes, 1), 0)
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    up = tl.minimum(14 - exponent, 64)
    factor = ((127 + up) << 23).to(tl.float32, bitcast=True)
    return factor, ((127 - up) << 23).to(tl.float32, bitcast=True)


def fold_norms(
    launches: Launches,
    stage: str,
    projections: tuple[Tensor, Tensor],
    norms: tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]],
    biases: tuple[Tensor | None, Tensor | None],
    block_n: int,
    group: tuple[int, int] | None = None,
) -> Folded:
    """Two projections [N, K] with the norms before them; `block_n` divides N.

    Of a `group`, (first row, size), of either half of their rows, the two halves one behind the
    other; `block_n` divides the size.
    """
    first, second = projections
    rows, width = first.shape
    count = rows if group is None else 2 * group[1]
    folded = launches.empty("folded weights", (2, count, width), first.dtype, first.device)
    extra = launches.empty("folded norms", (2, count, EXTRA), torch.bfloat16, first.device)
    factors = None
    if first.dtype == torch.float16:
        shape = (2, count // block_n)
        factors = launches.empty("folded factors", shape, torch.float32, first.device)
    prepared = launches.of(
        ("fold_norm", stage, group), prepare_fold_norms, first, second, block_n, group
    )
    prepared.launch(
        first_ptr=first,
        second_ptr=second,
        first_norm_ptr=norms[0][0],
        first_norm_bias_ptr=norms[0][1],
        second_norm_ptr=norms[1][0],
        second_norm_bias_ptr=norms[1][1],
        first_bias_ptr=biases[0],
        second_bias_ptr=biases[1],
        folded_ptr=folded,
        extra_ptr=extra,
        factors_ptr=factors,
    )
    return Folded(folded, extra, factors)


def prepare_fold_norms(
    first: Tensor, second: Tensor, block_n: int, group: tuple[int, int] | None = None
) -> PreparedLaunch:
    """The launch of `fold_norms` for projections like these, both [N, K] with unit last stride."""
    rows, width = first.shape
    first_row, count = (0, rows) if group is None else (group[0], 2 * group[1])
    block = block_n if first.dtype == torch.float16 else _BLOCK
    block_k = max(16, triton.next_power_of_2(width))
    return PreparedLaunch(
        _fold_norm_kernel,
        2 * triton.cdiv(count, block),
        tensors=pointers(
            "first_ptr", "second_ptr", "first_norm_ptr", "first_norm_bias_ptr", "second_norm_ptr",
            "second_norm_bias_ptr", "first_bias_ptr", "second_bias_ptr", "folded_ptr", "extra_ptr",
            "factors_ptr",
        ),
        values=dict(
            stride_first=first.stride(0), stride_second=second.stride(0), first_row=first_row
        ),
        constants=dict(ROWS=rows, N=count, K=width, BLOCK_N=block, BLOCK_K=block_k),
        options=dict(num_warps=4 if block * block_k <= _ELEMENTS else 8, num_stages=2),
    )  # fmt: skip


def fold_norms_bwd(
    launches: Launches, weights: Weights
) -> tuple[tuple[Tensor, Tensor | None], Folded, Folded]:
    """For a backward in bfloat16 with C = D: `emit_means`, and what stages 3 and 1 fold.

    Stage 3's are We, whose norm is without its bias, and Wo; stage 1's Wp and Wg.
    """
    emit, first = weights.p_out_weight, weights.p_in_weight
    channels, device = emit.shape[0], emit.device
    means = launches.empty("means", (2, channels), torch.float32, device).unbind()
    if weights.norm_out_bias is None:
        means = means[0], None
    residual, planes = (
        Folded(
            launches.empty("folded weights", (2, count, channels), emit.dtype, device),
            launches.empty("folded norms", (2, count, EXTRA), torch.bfloat16, device),
            None,
        )
        for count in (channels, first.shape[0])
    )
    prepared = launches.of(("fold_norms_bwd",), _prepare_fold_norms_bwd, weights)
    prepared.launch(
        emit_ptr=emit,
        gate_ptr=weights.g_out_weight,
        first_ptr=first,
        second_ptr=weights.g_in_weight,
        norm_out_ptr=weights.norm_out_weight,
        norm_out_bias_ptr=weights.norm_out_bias,
        norm_in_ptr=weights.norm_in_weight,
        norm_in_bias_ptr=weights.norm_in_bias,
        gate_bias_ptr=weights.g_out_bias,
        first_bias_ptr=weights.p_in_bias,
        second_bias_ptr=weights.g_in_bias,
        scale_ptr=means[0],
        shift_ptr=means[1],
        residual_ptr=residual.weights,
        residual_extra_ptr=residual.further,
        planes_ptr=planes.weights,
        planes_extra_ptr=planes.further,
    )
    return means, residual, planes


def _prepare_fold_norms_bwd(weights: Weights) -> PreparedLaunch:
    channels, count = weights.p_out_weight.shape[0], weights.p_in_weight.shape[0]
    block_k = max(16, triton.next_power_of_2(channels))
    return PreparedLaunch(
        _fold_norms_bwd_kernel,
        2 * (triton.cdiv(channels, _BLOCK) + triton.cdiv(count, _BLOCK)),
        tensors=pointers(
            "emit_ptr", "gate_ptr", "first_ptr", "second_ptr", "norm_out_ptr", "norm_out_bias_ptr",
            "norm_in_ptr", "norm_in_bias_ptr", "gate_bias_ptr", "first_bias_ptr",
            "second_bias_ptr", "scale_ptr", "shift_ptr", "residual_ptr", "residual_extra_ptr",
            "planes_ptr", "planes_extra_ptr",
        ),
        values=dict(
            stride_emit=weights.p_out_weight.stride(0), stride_gate=weights.g_out_weight.stride(0),
            stride_first=weights.p_in_weight.stride(0),
            stride_second=weights.g_in_weight.stride(0),
        ),
        constants=dict(C=channels, N=count, BLOCK_N=_BLOCK, BLOCK_K=block_k),
        options=dict(num_warps=4, num_stages=2),
    )  # fmt: skip
