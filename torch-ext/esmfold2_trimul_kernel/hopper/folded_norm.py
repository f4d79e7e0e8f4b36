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
_NAMES = "first", "second", "third", "fourth"


class Pair(NamedTuple):
    """Two projections [N, K] with unit last stride, the norms before them, and their biases."""

    weights: tuple[Tensor, Tensor]
    norms: tuple[tuple[Tensor | None, Tensor | None], ...]  # (weight, bias) of each
    biases: tuple[Tensor | None, Tensor | None]


class Folded(NamedTuple):
    """What `fold_norms` makes of a pair."""

    weights: Tensor  # W' [2, N, K], of float16 times 2^e
    further: Tensor  # its further channels [2, N, 16] in bfloat16, likewise
    factors: Tensor | None  # 2^-e [2, N / block_n] in float32, of float16
    constants: Tensor | None = None  # c [2, N] in float32, for the backward


@triton.jit(do_not_specialize=["first_row"])
def _fold_norms_kernel(
    first_ptr, first_norm_ptr, first_norm_bias_ptr, first_bias_ptr,
    second_ptr, second_norm_ptr, second_norm_bias_ptr, second_bias_ptr,
    third_ptr, third_norm_ptr, third_norm_bias_ptr, third_bias_ptr,
    fourth_ptr, fourth_norm_ptr, fourth_norm_bias_ptr, fourth_bias_ptr,
    folded_ptr, extra_ptr, factors_ptr, constants_ptr, others_ptr, others_extra_ptr,
    scale_ptr, shift_ptr,
    stride_first, stride_second, stride_third, stride_fourth, first_row,
    ROWS: tl.constexpr, N: tl.constexpr, OTHERS: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W' and the further channels of BLOCK_N channels of a projection.

    The first two are [ROWS, K], of which N channels: all, or N / 2 of either half of the rows, from
    `first_row` of the half on. The other two are [OTHERS, K]. With a `scale_ptr` the third's norm
    is without its bias, and it has its means too.
    """
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    OF_OTHERS: tl.constexpr = (OTHERS + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0)
    if block < 2 * TILES:
        start_n = block % TILES * BLOCK_N
        start_row = start_n
        if N < ROWS:
            start_row += first_row + tl.where(start_n < N // 2, 0, (ROWS - N) // 2)
        if block < TILES:
            _fold(
                first_ptr, stride_first, first_norm_ptr, first_norm_bias_ptr, first_bias_ptr,
                folded_ptr, extra_ptr, factors_ptr, constants_ptr, 0, start_n, start_row,
                ROWS, N, K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _fold(
                second_ptr, stride_second, second_norm_ptr, second_norm_bias_ptr, second_bias_ptr,
                folded_ptr, extra_ptr, factors_ptr, constants_ptr, 1, start_n, start_row,
                ROWS, N, K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    elif OTHERS > 0:
        block -= 2 * TILES
        start = block % OF_OTHERS * BLOCK_N
        if block >= OF_OTHERS:
            _fold(
                fourth_ptr, stride_fourth, fourth_norm_ptr, fourth_norm_bias_ptr, fourth_bias_ptr,
                others_ptr, others_extra_ptr, None, None, 1, start, start,
                OTHERS, OTHERS, K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        elif scale_ptr is None:
            _fold(
                third_ptr, stride_third, third_norm_ptr, third_norm_bias_ptr, third_bias_ptr,
                others_ptr, others_extra_ptr, None, None, 0, start, start,
                OTHERS, OTHERS, K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _fold(
                third_ptr, stride_third, third_norm_ptr, None, None,
                others_ptr, others_extra_ptr, None, None, 0, start, start,
                OTHERS, OTHERS, K, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            store_means_of_projection(
                third_ptr, third_norm_ptr, third_norm_bias_ptr, scale_ptr, shift_ptr, start,
                stride_third, OTHERS, K, BLOCK_N, BLOCK_K, "bf16",
            )  # fmt: skip


@triton.jit
def _fold(
    weight_ptr, stride_weight, norm_ptr, norm_bias_ptr, bias_ptr, folded_ptr, extra_ptr,
    factors_ptr, constants_ptr, which, start_n, start_row,
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
    if constants_ptr is not None:
        tl.store(constants_ptr + which * N + offs_n, constant, mask=valid)
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
    pair: Pair,
    block_n: int,
    group: tuple[int, int] | None = None,
    others: Pair | None = None,
    means: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Folded, Folded | None]:
    """What the projections of a pair, and of others in bfloat16, become by one launch.

    Args:
        stage: with the group, the key of the launch among those of a call.
        block_n: divides N; in float16 so many channels share a factor.
        group: (first row, size) of either half of the pair's rows, which come one behind the other;
            `block_n` divides the size, in bfloat16 16.
        means: for `emit_means` of the others' first, whose bias and norm's bias are then left out.
    """
    first = pair.weights[0]
    rows, width = first.shape
    folded = _memory(launches, first, rows if group is None else 2 * group[1], block_n)
    if means[0] is not None:
        constants = launches.empty("folded constants", (2, rows), torch.float32, first.device)
        folded = folded._replace(constants=constants)
    of_others = None if others is None else _memory(launches, others.weights[0], None, 0)
    name = "fold_norms" if means[0] is None else "fold_norms_bwd"
    key = ("fold_norms", stage, group, block_n)
    prepared = launches.of(key, _prepare, name, pair, others, block_n, group)
    given = {}
    four = [*_projections(pair), *([(None,) * 4] * 2 if others is None else _projections(others))]
    for projection, tensors in zip(_NAMES, four, strict=True):
        given |= zip(_pointers(projection), tensors, strict=True)
    prepared.launch(
        **given,
        folded_ptr=folded.weights,
        extra_ptr=folded.further,
        factors_ptr=folded.factors,
        constants_ptr=folded.constants,
        others_ptr=None if of_others is None else of_others.weights,
        others_extra_ptr=None if of_others is None else of_others.further,
        scale_ptr=means[0],
        shift_ptr=means[1],
    )
    return folded, of_others


def _memory(launches: Launches, weight: Tensor, count: int | None, block_n: int) -> Folded:
    """For the `count` channels of two projections like this one, or for all."""
    rows, width = weight.shape
    count = rows if count is None else count
    factors = None
    if weight.dtype == torch.float16:
        shape = (2, count // block_n)
        factors = launches.empty("folded factors", shape, torch.float32, weight.device)
    return Folded(
        launches.empty("folded weights", (2, count, width), weight.dtype, weight.device),
        launches.empty("folded norms", (2, count, EXTRA), torch.bfloat16, weight.device),
        factors,
    )


def _projections(pair: Pair) -> list[tuple[Tensor | None, ...]]:
    """(weight, norm's weight, norm's bias, bias) of both."""
    return [
        (weight, *norm, bias)
        for weight, norm, bias in zip(pair.weights, pair.norms, pair.biases, strict=True)
    ]


def _pointers(name: str) -> list[str]:
    """The parameters of a projection of this name, in the order of `_projections`."""
    return [f"{name}{part}_ptr" for part in ("", "_norm", "_norm_bias", "_bias")]


def _prepare(
    name: str, pair: Pair, others: Pair | None, block_n: int, group: tuple[int, int] | None
) -> PreparedLaunch:
    first = pair.weights[0]
    rows, width = first.shape
    first_row, count = (0, rows) if group is None else (group[0], 2 * group[1])
    block = block_n if first.dtype == torch.float16 else _BLOCK
    block_k = max(16, triton.next_power_of_2(width))
    more = (None, None) if others is None else others.weights
    of_others = 0 if others is None else more[0].shape[0]
    return PreparedLaunch(
        _fold_norms_kernel,
        2 * (triton.cdiv(count, block) + triton.cdiv(of_others, block)),
        tensors=pointers(
            *[pointer for name in _NAMES for pointer in _pointers(name)], "folded_ptr",
            "extra_ptr", "factors_ptr", "constants_ptr", "others_ptr", "others_extra_ptr",
            "scale_ptr", "shift_ptr",
        ),
        values=dict(first_row=first_row) | {
            f"stride_{name}": 0 if weight is None else weight.stride(0)
            for name, weight in zip(_NAMES, (*pair.weights, *more), strict=True)
        },
        constants=dict(
            ROWS=rows, N=count, OTHERS=of_others, K=width, BLOCK_N=block, BLOCK_K=block_k
        ),
        options=dict(num_warps=4 if block * block_k <= _ELEMENTS else 8, num_stages=2),
        stage=name,
    )  # fmt: skip


class Folds:
    """What a call's stages take of its weights, each made at its first use, and kept.

    In bfloat16 with C = D one launch makes all that a forward takes, unless stage 1 runs in groups,
    and one all that a backward does.
    """

    def __init__(self, launches: Launches, weights: Weights) -> None:
        self._launches, self._weights = launches, weights
        # In float16 by the block that shares a factor too.
        self._planes: dict[tuple, Folded] = {}
        self._residual: dict[int, Folded] = {}

    def planes(self, block_n: int, group: tuple[int, int] | None = None) -> Folded:
        """Stage 1's, of all channels or of a `group`."""
        block_n, emit = self._block(block_n), self._weights.p_out_weight
        key = group, block_n
        if key not in self._planes:
            pair, others = self._of_stage_1(), None
            width = pair.weights[0].shape[1]
            if group is None and emit.dtype == torch.bfloat16 and emit.shape[1] == width:
                others = self._of_stage_3()
            self._planes[key], of_stage_3 = fold_norms(
                self._launches, "planes", pair, block_n, group, others
            )
            if of_stage_3 is not None:
                self._residual[block_n] = of_stage_3
        return self._planes[key]

    def residual(self, block_n: int) -> Folded:
        """Stage 3's."""
        block_n = self._block(block_n)
        if block_n not in self._residual:
            pair = self._of_stage_3()
            self._residual[block_n], _ = fold_norms(self._launches, "residual", pair, block_n)
        return self._residual[block_n]

    def of_backward(self) -> tuple[tuple[Tensor, Tensor | None], Folded]:
        """`emit_means`, and what stage 3's backward takes, in bfloat16 with C = D.

        Of We, whose norm is without its bias, and Wo.
        """
        channels, device = self._weights.p_out_weight.shape[0], self._weights.p_out_weight.device
        means = self._launches.empty("means", (2, channels), torch.float32, device).unbind()
        if self._weights.norm_out_bias is None:
            means = means[0], None
        self._planes[None, _BLOCK], residual = fold_norms(
            self._launches, "backward", self._of_stage_1(), _BLOCK, None, self._of_stage_3(), means
        )
        return means, residual

    def _block(self, block_n: int) -> int:
        """In bfloat16 a fold serves any."""
        return _BLOCK if self._weights.p_in_weight.dtype == torch.bfloat16 else block_n

    def _of_stage_1(self) -> Pair:
        weights = self._weights
        norm = weights.norm_in_weight, weights.norm_in_bias
        return Pair(
            (weights.p_in_weight, weights.g_in_weight), (norm, norm),
            (weights.p_in_bias, weights.g_in_bias),
        )  # fmt: skip

    def _of_stage_3(self) -> Pair:
        weights = self._weights
        norms = (
            (weights.norm_out_weight, weights.norm_out_bias),
            (weights.norm_in_weight, weights.norm_in_bias),
        )
        return Pair(
            (weights.p_out_weight, weights.g_out_weight), norms,
            (weights.p_out_bias, weights.g_out_bias),
        )  # fmt: skip
