"""Products of two tall matrices, summed over their rows, for the parameters' gradients.

    products [P, N, K]      left^T right over the rows of each part    left [M, N], right [M, K]
                            (the last columns of left may be another tensor)
    sums [P, N]             the sums of left over the rows of each part

M is the number of pairs, thousands of times N and K, so the rows are cut into P parts, enough to
occupy the device. Later calls add the rows of other chunks to the parts. At the end the parts are
added in their order (`parameter_gradients`): equal calls give equal bits. All sums are in fp32.

Instead of left's, a launch may add up sums [programs, W] that other programs have written.

The vendor's GEMM is no choice: cuBLAS 13.1 omits the last rows for some M (`docs/numerics.md`), and
how it multiplies float32 operands is a setting of the whole process.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import hopper
from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    PreparedLaunch,
    block_of,
    dot_precision,
    pointers,
    setting_of,
)
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.split_operands import FP16X3
from ..triton_parts.split_rows import dot_columns, dot_hat, split_columns, sum_columns
from ..triton_parts.tiles import dot, load_tile, quarters, store_tile

_LEAST_ROWS = 256  # of a part: fewer are not worth a program


@triton.jit(do_not_specialize=["M", "part", "accumulate", "partials"])
def _row_products_kernel(
    left_ptr, last_ptr, right_ptr, parts_ptr, sums_ptr, partial_ptr,
    M, part, accumulate, partials, stride_left, stride_last, stride_right,
    N: tl.constexpr, LAST: tl.constexpr, K: tl.constexpr, W: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_K] tile of left^T right over `part` rows, a multiple of BLOCK_M.

    The last LAST of left's N columns, which have tiles of their own, are those of `last`.
    Programs of the same rows have adjacent ids, so that the rows are read from memory once. The
    tile is added to what `parts` holds if `accumulate`. If there is a `sums_ptr` [P, W], each part
    also has the sums of its share of partial [partials, W]; without a `partial_ptr` of left (W = N)
    by a product with ones, because a reduction would cost many times as much. With PRECISION
    "fp16x3" left is split here, and so is right in fp32; in float16 it has rows of `store_hat`.
    """
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BEFORE_LAST: tl.constexpr = (N - LAST + BLOCK_N - 1) // BLOCK_N
    number = tl.program_id(0) // TILES
    tile = tl.program_id(0) - number * TILES
    start_n = tile // BLOCKS_K * BLOCK_N
    offs_k = tile % BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)
    first_n, end_n = 0, N - LAST
    if LAST > 0:
        is_last = start_n >= BEFORE_LAST * BLOCK_N
        left_ptr = tl.where(is_last, last_ptr, left_ptr)
        stride_left = tl.where(is_last, stride_last, stride_left)
        first_n = tl.where(is_last, N - LAST, 0)
        end_n = tl.where(is_last, LAST, N - LAST)
        start_n -= tl.where(is_last, BEFORE_LAST * BLOCK_N, 0)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    valid_n = offs_n < end_n
    EVEN_N: tl.constexpr = (N - LAST) % BLOCK_N == 0 and LAST % BLOCK_N == 0
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    OWN_SUMS: tl.constexpr = sums_ptr is not None and partial_ptr is None
    if OWN_SUMS:
        # From float32, because the interpreter has no constants in bfloat16.
        dtype = tl.float16 if PRECISION == "fp16x3" else left_ptr.dtype.element_ty
        ones = tl.full([BLOCK_M, 16], 1.0, tl.float32).to(dtype)
        sums = tl.zeros([BLOCK_N, 16], tl.float32)
    first = number * part
    for start_m in range(first, tl.minimum(first + part, M), BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        row = offs_m.to(tl.int64)
        valid = (offs_m < M)[:, None]
        if not EVEN_N:
            valid = valid & valid_n[None, :]
        left = tl.load(
            left_ptr + (row * stride_left)[:, None] + offs_n[None, :], mask=valid, other=0.0
        )
        right = load_tile(right_ptr, row * stride_right, offs_k, 1, offs_m < M, K, EVEN_K)
        if PRECISION == "fp16x3":
            left_high, left_low, inverse = split_columns(left)
            if right_ptr.dtype.element_ty == tl.float32:
                acc = dot_columns(left_high, left_low, inverse, right, acc)
            else:
                low = load_tile(right_ptr + K, row * stride_right, offs_k, 1, offs_m < M, K, EVEN_K)
                acc = dot_hat(left_high, left_low, inverse, right, low, acc)
            if OWN_SUMS:
                sums += sum_columns(left_high, left_low, inverse, ones)
        else:
            acc = dot(left.T, right, acc, PRECISION)
            if OWN_SUMS:
                sums = dot(left.T, ones, sums, PRECISION)
    offs_out = number.to(tl.int64) * N * K + (first_n + offs_n) * K
    earlier_n = valid_n & (accumulate != 0)
    # A quarter of the columns at a time: the loads need registers of their own.
    columns = quarters(acc)
    WIDTH: tl.constexpr = columns[0].shape[1]
    for quarter in tl.static_range(len(columns)):
        offs = tile % BLOCKS_K * BLOCK_K + quarter * WIDTH + tl.arange(0, WIDTH)
        earlier = load_tile(parts_ptr, offs_out, offs, 1, earlier_n, K, EVEN_K)
        store_tile(parts_ptr, offs_out, offs, columns[quarter] + earlier, valid_n, K, EVEN_K)
    if sums_ptr is not None and tile % BLOCKS_K == 0:
        sums_ptrs = sums_ptr + number.to(tl.int64) * W + first_n + offs_n
        if OWN_SUMS:
            # The 16 columns are equal.
            total = tl.sum(sums, 1) * (1.0 / 16)
            total += tl.load(sums_ptrs, mask=earlier_n, other=0.0)
            tl.store(sums_ptrs, total, mask=valid_n)
        else:
            share = tl.cdiv(partials, tl.num_programs(0) // TILES)
            end = tl.minimum(number * share + share, partials)
            for start_w in range(0, W, N):
                column = start_w + first_n + offs_n
                valid_w = valid_n & (column < W)
                total = tl.load(sums_ptrs + start_w, mask=valid_w & earlier_n, other=0.0)
                for start in range(number * share, end, 16):
                    row = start + tl.arange(0, 16)
                    ptrs = partial_ptr + (row.to(tl.int64) * W)[:, None] + column[None, :]
                    valid = (row < end)[:, None] & valid_w[None, :]
                    total += tl.sum(tl.load(ptrs, mask=valid, other=0.0), 0)
                tl.store(sums_ptrs + start_w, total, mask=valid_w)


class RowParts(NamedTuple):
    """Sums over rows, in parts whose sum over the first axis is meant."""

    products: torch.Tensor  # [P, N, K] in fp32
    sums: torch.Tensor | None  # [P, W] in fp32
    scaled: bool = False  # the second factor's columns are multiplied by a norm's weights


def row_products(
    left: torch.Tensor,
    right: torch.Tensor,
    prepared: PreparedLaunch,
    parts: RowParts | None = None,
    partial: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
) -> RowParts:
    """The products and sums of left [M, N] and right [M, K], added to `parts` if there are.

    `prepared` is from `prepare_row_products` for such rows, such parts, such partial sums
    [programs, W], and such last columns [M, LAST] of left, which are then not in `left`.
    """
    if parts is None:
        constants = prepared.constants
        count = prepared.programs // constants["TILES"]
        size, width = (count, constants["N"], constants["K"]), constants["W"]
        parts = RowParts(
            torch.empty(size, dtype=torch.float32, device=left.device),
            torch.empty(count, width, dtype=torch.float32, device=left.device) if width else None,
        )
    if prepared.variant == "hopper":
        variant = hopper.kernels("row_products")
        variant.launch(prepared, left, last, right, parts.products, parts.sums, partial)
        return parts
    prepared.launch(
        left_ptr=left,
        last_ptr=last,
        right_ptr=right,
        parts_ptr=parts.products,
        sums_ptr=parts.sums,
        partial_ptr=partial,
    )
    return parts


def prepare_row_products(
    left: torch.Tensor,
    right: torch.Tensor,
    precision: str,
    programs: int | None = None,
    with_sums: bool = False,
    parts: RowParts | None = None,
    partial: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
    config: LaunchConfig | None = None,
) -> PreparedLaunch:
    """The launch of `row_products` for rows like these: left [M, N] and right [M, K].

    Rows have unit stride and one dtype; `precision` is a word of the kernels, for float32. With
    "fp16x3" right may be [M, 2K] in float16, of `store_hat`. About `programs` programs share the
    work, by default as many as the setting has for each multiprocessor. The launch has settings of
    its own `with_sums` of left. It adds to parts like `parts`, or makes them.
    """
    rows, width_n = left.shape
    split = precision == FP16X3
    of_hat = split and right.dtype == torch.float16
    width_k = right.shape[1] // 2 if of_hat else right.shape[1]
    width_last = 0 if last is None else last.shape[1]
    width_n += width_last
    device = device_target(left.device)
    stage = "row_products_and_sums" if with_sums else "row_products"
    variants = hopper.variants("row_products", "takes", right, left, right, last)
    if config is None:
        width = max(width_n, width_k)
        config = setting_of(stage, left, width, math.isqrt(rows), 1, variants, split)
    if programs is None:
        programs = device.multiprocessors * max(1, config.persistent)
    if hopper.is_variant(config, variants):
        variant, count = hopper.kernels("row_products"), 0 if parts is None else len(parts.products)
        return variant.prepare(left, right, programs, count, with_sums, partial, last, config)
    block_m = config.block_m
    block_n = block_of(config.block_n, width_n)
    block_k = block_of(config.block_k, width_k)
    width_sums = width_n if with_sums else 0 if partial is None else partial.shape[1]
    # Tiles of the product, which are also the programs of one part.
    tiles = triton.cdiv(width_n - width_last, block_n) + triton.cdiv(width_last, block_n)
    tiles *= triton.cdiv(width_k, block_k)
    constants = dict(
        N=width_n, LAST=width_last, K=width_k, W=width_sums, TILES=tiles,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        PRECISION=dot_precision(precision, device.fp32_dots, config.fp32_dot),
    )  # fmt: skip
    most = programs // tiles if parts is None else parts.products.shape[0]
    part = triton.cdiv(triton.cdiv(rows, max(1, min(most, rows // _LEAST_ROWS))), block_m) * block_m
    return PreparedLaunch(
        _row_products_kernel,
        tiles * triton.cdiv(rows, part),
        tensors=pointers(
            "left_ptr", "last_ptr", "right_ptr", "parts_ptr", "sums_ptr", "partial_ptr"
        ),
        values=dict(
            M=rows, part=part, accumulate=int(parts is not None),
            partials=0 if partial is None else partial.shape[0],
            stride_left=left.stride(0), stride_right=right.stride(0),
            stride_last=0 if last is None else last.stride(0),
        ),
        constants=constants,
        options=config.options(),
    )
