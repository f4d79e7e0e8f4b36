"""Split operands whose size nothing bounds beforehand: gradients, and a transition's h.

As in `split_operands` a number is the sum of two in float16. Here the power of two is that of the
largest number of a row, or of a column, of the tile that is multiplied. So it differs from
block to block of the summed axis, and is taken off again where the block's product is added.
"""

import triton
import triton.language as tl

from .split_operands import (
    LOW,
    ROWS_UNIT,
    exponent_for,
    load_split_weight,
    power_of_two,
    product_of_split,
    split_plane,
    split_tile,
)
from .tiles import dot, load_tile, load_weight, store_tile

# A block's product of two columns, up to 2^36, meets their powers of two one after the other.
_BETWEEN = tl.constexpr(20)
# Of rows that are normalised without a norm's weights: sqrt(K) <= 16 times it stays below 2^15.
_HAT = tl.constexpr(2.0**10)


@triton.jit
def dot_rows(
    rows, weight, factors_ptr, first, start_k, start_n, stride_weight, acc,
    K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + rows W in fp32, of BLOCK_N columns: rows [M, BLOCK_K] of W [K, N] from start_k on.

    With PRECISION "fp16x3" W is split by rows, whose factors [K] begin at `first`: high numbers
    [K, N], and below them low ones.
    """
    if PRECISION == "fp16x3":
        offs_k = start_k + tl.arange(0, BLOCK_K)
        rows *= tl.load(factors_ptr + first + offs_k, mask=offs_k < K, other=0.0)[None, :]
        exponent = exponent_for(tl.max(tl.abs(rows), 1))
        high, low = split_tile(rows * power_of_two(exponent)[:, None])
        weight_high, weight_low = load_split_weight(
            weight, start_k, start_n, stride_weight, K, N, BLOCK_K, BLOCK_N, DESCRIPTORS
        )
        block = product_of_split(high, low, weight_high, weight_low)
        return acc + block * power_of_two(-exponent)[:, None]
    else:
        tile = load_weight(
            weight, start_k, start_n, stride_weight, K, N, BLOCK_K, BLOCK_N, DESCRIPTORS
        )
        return dot(rows, tile, acc, PRECISION)


@triton.jit
def multiply_rows(
    rows_ptr, rows, weight, stride_weight, start_m, start_n, valid_m, end_k,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] tile of rows W^T in fp32: contiguous rows [M, K], W [N, K].

    Summed over k below `end_k`, which is K or 0. `rows` describes the rows where there are
    DESCRIPTORS, and `weight` W. With PRECISION "fp16x3" W is split by rows, high numbers [N, K] and
    below them low ones, and the result is in its scale.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    offs_rows = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64) * K
    for start_k in range(0, end_k, BLOCK_K):
        if DESCRIPTORS:
            left = rows.load([start_m, start_k])
        else:
            offs_k = start_k + tl.arange(0, BLOCK_K)
            left = load_tile(rows_ptr, offs_rows, offs_k, 1, valid_m, K, K % BLOCK_K == 0)
        if PRECISION == "fp16x3":
            exponent = tl.minimum(exponent_for(tl.max(tl.abs(left), 1)), 126 - ROWS_UNIT)
            high, low = split_tile(left * power_of_two(exponent)[:, None])
            weight_high, weight_low = load_split_weight(
                weight, start_n, start_k, stride_weight, N, K, BLOCK_N, BLOCK_K, DESCRIPTORS
            )
            block = product_of_split(high, low, weight_high.T, weight_low.T)
            acc += block * power_of_two(-exponent - ROWS_UNIT)[:, None]
        else:
            right = load_weight(
                weight, start_n, start_k, stride_weight, N, K, BLOCK_N, BLOCK_K, DESCRIPTORS
            )
            acc = dot(left, right.T, acc, PRECISION)
    return acc


@triton.jit
def split_columns(x):
    """x [M, N] in fp32 as split numbers, multiplied by powers of two [N], with their inverses."""
    exponent = tl.minimum(exponent_for(tl.max(tl.abs(x), 0)), 126 - _BETWEEN)
    high, low = split_tile(x * power_of_two(exponent)[None, :])
    return high, low, power_of_two(-exponent)


@triton.jit
def dot_hat(high, low, inverse, hat_high, hat_low, acc):
    """acc + left^T hat in fp32: left of `split_columns`, and rows hat [M, K] of `store_hat`."""
    block = tl.dot(high.T, hat_low) * (1.0 / LOW)
    block = tl.dot(low.T, hat_high, block)
    block = tl.dot(high.T, hat_high, block)
    return acc + block * (inverse * (1.0 / _HAT))[:, None]


@triton.jit
def dot_columns(high, low, inverse, right, acc):
    """acc + left^T right in fp32: left of `split_columns`, and right [M, K] in fp32."""
    right_high, right_low, right_inverse = split_columns(right)
    block = product_of_split(high.T, low.T, right_high, right_low)
    block *= (inverse * (2.0**-_BETWEEN))[:, None]
    return acc + block * (right_inverse * (2.0**_BETWEEN))[None, :]


@triton.jit
def sum_columns(high, low, inverse, ones):
    """Of left of `split_columns` the sums over rows, [N, 16] with equal columns."""
    block = tl.dot(low.T, ones)
    return tl.dot(high.T, ones, block) * inverse[:, None]


@triton.jit
def store_hat(
    ptr, row, offs_k, hat, valid_m, K: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr
):
    """Stores channels offs_k of rows [K] that are normalised without a norm's weights.

    With PRECISION "fp16x3" as split numbers, a row's high ones [K] ahead of its low ones.
    """
    if PRECISION == "fp16x3":
        # Rows may be small, where their deviation is far below sqrt(eps).
        high, low = split_plane(hat * _HAT)
        store_tile(ptr, row * (2 * K), offs_k, high, valid_m, K, EVEN_K)
        store_tile(ptr + K, row * (2 * K), offs_k, low, valid_m, K, EVEN_K)
    else:
        store_tile(ptr, row * K, offs_k, hat.to(ptr.dtype.element_ty), valid_m, K, EVEN_K)
