"""Two projections with the norm before them folded into their weights, for the Hopper kernels.

    W'[n, k] = W[n, k] g[k]                     in the dtype of W
    s[n]     = sum over k of W'[n, k]           of the rounded W', in fp32
    c[n]     = sum over k of W[n, k] b[k] + bias[n]

    LayerNorm(x; g, b) W^T + bias = rstd (x W'^T - mean s + c / rstd)

s and c are written as further channels of W', 16 of them, so that the product makes the whole
bracket: in three pieces each, s = s1 + s2 + s3 in bfloat16, which meet the pieces of mean and
1 / rstd as

    m1 s1 + m2 s1 + m3 s1 + m1 s2 + m2 s2 + m1 s3

In bfloat16 W' is rounded where otherwise the normalised rows are, to as many bits; the rows are
multiplied as they are. x W'^T and mean s are both of the size of mean, so that their difference
loses digits where |mean| rstd is large: see docs/numerics.md.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..triton_parts.launch import Launches, PreparedLaunch, pointers
from ..triton_parts.tiles import load_channels, load_weight

_BLOCK = 16
EXTRA = 16  # further channels
_EXTRA = tl.constexpr(EXTRA)


@triton.jit
def _fold_norm_kernel(
    first_ptr, second_ptr, first_norm_ptr, first_norm_bias_ptr, second_norm_ptr,
    second_norm_bias_ptr, first_bias_ptr, second_bias_ptr, folded_ptr, extra_ptr,
    stride_first, stride_second,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W' and the further channels of BLOCK_N channels of one of two projections [N, K]."""
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    second = tl.program_id(0) // TILES
    start_n = (tl.program_id(0) - second * TILES) * BLOCK_N
    if second == 0:
        _fold(
            first_ptr, stride_first, first_norm_ptr, first_norm_bias_ptr, first_bias_ptr,
            folded_ptr, extra_ptr, 0, start_n, N, K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _fold(
            second_ptr, stride_second, second_norm_ptr, second_norm_bias_ptr, second_bias_ptr,
            folded_ptr, extra_ptr, 1, start_n, N, K, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _fold(
    weight_ptr, stride_weight, norm_ptr, norm_bias_ptr, bias_ptr, folded_ptr, extra_ptr, which,
    start_n, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    weight = load_weight(
        weight_ptr, start_n, 0, stride_weight, N, K, BLOCK_N, BLOCK_K, False
    ).to(tl.float32)  # fmt: skip
    scale = load_channels(norm_ptr, offs_k, 1.0, K, K == BLOCK_K)
    shift = load_channels(norm_bias_ptr, offs_k, 0.0, K, K == BLOCK_K)
    folded = (weight * scale).to(folded_ptr.dtype.element_ty)
    valid = offs_n < N
    rows = which * N + offs_n
    tl.store(
        folded_ptr + rows[:, None] * K + offs_k[None, :], folded,
        mask=valid[:, None] & (offs_k < K)[None, :],
    )  # fmt: skip
    constant = tl.sum(weight * shift, 1)
    if bias_ptr is not None:
        constant += tl.load(bias_ptr + offs_n, mask=valid, other=0.0).to(tl.float32)
    column = tl.arange(0, _EXTRA)[None, :]
    place = column % 6
    value = tl.where(column < 6, -tl.sum(folded.to(tl.float32), 1)[:, None], constant[:, None])
    first = value.to(tl.bfloat16).to(tl.float32)
    second = (value - first).to(tl.bfloat16).to(tl.float32)
    third = value - first - second
    piece = tl.where(place < 3, first, tl.where(place < 5, second, third))
    piece = tl.where(column < 12, piece, 0.0).to(extra_ptr.dtype.element_ty)
    tl.store(extra_ptr + rows[:, None] * _EXTRA + column, piece, mask=valid[:, None])


def fold_norms(
    launches: Launches,
    stage: str,
    projections: tuple[Tensor, Tensor],
    norms: tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]],
    biases: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """W' [2, N, K] of two projections [N, K], and its further channels [2, N, 16]."""
    first, second = projections
    count, width = first.shape
    folded = launches.empty("folded weights", (2, count, width), first.dtype, first.device)
    extra = launches.empty("folded norms", (2, count, EXTRA), first.dtype, first.device)
    prepared = launches.of(("fold_norm", stage), prepare_fold_norms, first, second)
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
    )
    return folded, extra


def prepare_fold_norms(first: Tensor, second: Tensor) -> PreparedLaunch:
    """The launch of `fold_norms` for projections like these, both [N, K] with unit last stride."""
    count, width = first.shape
    return PreparedLaunch(
        _fold_norm_kernel,
        2 * triton.cdiv(count, _BLOCK),
        tensors=pointers(
            "first_ptr", "second_ptr", "first_norm_ptr", "first_norm_bias_ptr", "second_norm_ptr",
            "second_norm_bias_ptr", "first_bias_ptr", "second_bias_ptr", "folded_ptr", "extra_ptr",
        ),
        values=dict(stride_first=first.stride(0), stride_second=second.stride(0)),
        constants=dict(
            N=count, K=width, BLOCK_N=_BLOCK, BLOCK_K=max(16, triton.next_power_of_2(width))
        ),
        options=dict(num_warps=4, num_stages=2),
    )  # fmt: skip
