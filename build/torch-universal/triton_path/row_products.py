"""Products of two tall matrices, summed over their rows, for the parameters' gradients.

    total [N, K] += left^T right        left [M, N], right [M, K]; total and all sums in fp32
    sums [N]     += sum over m of left

M is the number of pairs, thousands of times N and K, so the rows are cut into enough parts to
occupy the device. The parts' products are written separately and added in a fixed order: equal
calls give equal bits.

The vendor's GEMM is no choice: cuBLAS 13.1 omits the last rows for some M (`docs/numerics.md`), and
how it multiplies float32 operands is a setting of the whole process.
"""

import math

import torch
import triton
import triton.language as tl

from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    PreparedLaunch,
    block_of,
    dot_precision,
    pointers,
    setting_of,
)
from ..triton_parts.tiles import dot, load_tile, store_tile

_LEAST_ROWS = 256  # of a part: fewer are not worth a program


@triton.jit(do_not_specialize=["M", "part"])
def _row_products_kernel(
    left_ptr, right_ptr, parts_ptr, sums_ptr, M, part, stride_left, stride_right,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_K] tile of left^T right over `part` rows, a multiple of BLOCK_M.

    Programs of the same rows have adjacent ids, so that the rows are read from memory once. If
    there is a `sums_ptr`, left is also multiplied by ones, for its sums over the rows: a reduction
    of its own would cost many times as much.
    """
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N * BLOCKS_K
    number = tl.program_id(0) // TILES
    tile = tl.program_id(0) - number * TILES
    offs_n = tile // BLOCKS_K * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tile % BLOCKS_K * BLOCK_K + tl.arange(0, BLOCK_K)
    EVEN_N: tl.constexpr = N % BLOCK_N == 0
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if sums_ptr is not None:
        # From float32, because the interpreter has no constants in bfloat16.
        ones = tl.full([BLOCK_M, 16], 1.0, tl.float32).to(left_ptr.dtype.element_ty)
        sums = tl.zeros([BLOCK_N, 16], tl.float32)
    first = number * part
    for start_m in range(first, tl.minimum(first + part, M), BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        row = offs_m.to(tl.int64)
        left = load_tile(left_ptr, row * stride_left, offs_n, 1, offs_m < M, N, EVEN_N)
        right = load_tile(right_ptr, row * stride_right, offs_k, 1, offs_m < M, K, EVEN_K)
        acc = dot(left.T, right, acc, PRECISION)
        if sums_ptr is not None:
            sums = dot(left.T, ones, sums, PRECISION)
    offs_out = number.to(tl.int64) * N * K + offs_n * K
    store_tile(parts_ptr, offs_out, offs_k, acc, offs_n < N, K, EVEN_K)
    if sums_ptr is not None and tile % BLOCKS_K == 0:
        # The 16 columns are equal.
        total = tl.sum(sums, 1) * (1.0 / 16)
        tl.store(sums_ptr + number.to(tl.int64) * N + offs_n, total, mask=offs_n < N)


def add_row_products(
    total: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    prepared: PreparedLaunch,
    sums: torch.Tensor | None = None,
) -> None:
    """total [N, K] += left^T right, and sums [N] += the sums of left.

    `prepared` is from `prepare_row_products` for such rows.
    """
    count = prepared.programs // _tiles_of(**prepared.constants)
    parts = torch.empty(count, *total.shape, dtype=torch.float32, device=total.device)
    partial = None if sums is None else parts.new_empty(count, total.shape[0])
    prepared.launch(left_ptr=left, right_ptr=right, parts_ptr=parts, sums_ptr=partial)
    total.add_(parts.sum(0))
    if sums is not None:
        sums.add_(partial.sum(0))


def prepare_row_products(
    left: torch.Tensor,
    right: torch.Tensor,
    precision: str,
    programs: int | None = None,
    with_sums: bool = False,
) -> PreparedLaunch:
    """The launch of `add_row_products` for rows like these: left [M, N] and right [M, K].

    Rows have unit stride and one dtype; `precision` is a word of the kernels, for float32. About
    `programs` programs share the work, by default one for each multiprocessor of the device. The
    launch has settings of its own `with_sums`.
    """
    rows, width_n = left.shape
    width_k = right.shape[1]
    device = device_target(left.device)
    stage = "row_products_and_sums" if with_sums else "row_products"
    config = setting_of(stage, left, max(width_n, width_k), math.isqrt(rows))
    block_m = config.block_m
    block_n = block_of(config.block_n, width_n)
    block_k = block_of(config.block_k, width_k)
    constants = dict(
        N=width_n, K=width_k, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        PRECISION=dot_precision(precision, device.fp32_dots, config.fp32_dot),
    )  # fmt: skip
    tiles = _tiles_of(**constants)
    if programs is None:
        programs = device.multiprocessors
    parts = max(1, min(programs // tiles, rows // _LEAST_ROWS))
    part = triton.cdiv(triton.cdiv(rows, parts), block_m) * block_m
    return PreparedLaunch(
        _row_products_kernel,
        tiles * triton.cdiv(rows, part),
        tensors=pointers("left_ptr", "right_ptr", "parts_ptr", "sums_ptr"),
        values=dict(
            M=rows, part=part, stride_left=left.stride(0), stride_right=right.stride(0)
        ),
        constants=constants,
        options=config.options(),
    )


def _tiles_of(N: int, K: int, BLOCK_N: int, BLOCK_K: int, **_: int | str) -> int:
    """The tiles of the product, which is also the number of programs for one part."""
    return triton.cdiv(N, BLOCK_N) * triton.cdiv(K, BLOCK_K)
