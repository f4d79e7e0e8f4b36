"""Products of two tall matrices on Hopper GPUs: see `triton_path.row_products`.

    products [P, N, K]      left^T right over the rows of each part    left [M, N], right [M, K]
                            (the last columns of left may be another tensor)
    sums [P, W]             the sums of each part's share of partial [partials, W], or of left

in 16 bits, with sums in fp32. Those of left are products with ones. A step is 64 rows. They come by
TMA as they lie, and the matrix unit reads both operands from shared memory with their axes
exchanged: no value passes a register. A part has every P-th step, from the last one back: all
programs read the same stretch of memory at a time, and begin with the rows that were written last,
some of which are still in the L2 cache. Programs of one part have adjacent ids.

A program has a tile of the products, two consumers with half of its columns of left each, and two
further warps: one loads, the other adds up the partial sums.
"""

import math

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..triton_parts.launch import PreparedLaunch, has_descriptor, pointers
from ..triton_parts.settings import LaunchConfig
from .parts import (
    REGISTERS,
    ROWS,
    advance,
    barriers,
    load_tile,
    shared_layout,
    tma_descriptor,
)

_ROWS = gl.constexpr(ROWS)  # of a step
_COLUMNS = gl.constexpr(128)  # of partial sums at a time
_ONES = gl.constexpr(8)  # columns, the fewest of a product
_REGISTERS = 232  # of a consumer: the warp that adds up has more than one that loads


@gluon.jit
def _columns(tile_n, BLOCK_N: gl.constexpr, ME: gl.constexpr, LAYOUT: gl.constexpr):
    """A consumer's columns of left."""
    return (tile_n * 2 + ME) * BLOCK_N + gl.arange(0, BLOCK_N, layout=LAYOUT)


@gluon.jit
def _addresses(
    parts_ptr, number, tile,
    N: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    ME: gl.constexpr,
):  # fmt: skip
    """Those of a consumer's block of a part's products, and which of them exist."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_K, 16])
    BLOCKS_K: gl.constexpr = K // BLOCK_K
    n = _columns(tile // BLOCKS_K, BLOCK_N, ME, gl.SliceLayout(1, ACC))
    k = tile % BLOCKS_K * BLOCK_K + gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, ACC))
    first = parts_ptr + number.to(gl.int64) * (N * K)
    return first + (n * K).expand_dims(1) + k.expand_dims(0), (n < N).expand_dims(1)


@gluon.jit
def _consume(
    left_ring, right_ring, ones, full, empty, parts_ptr, sums_ptr, rows, tile, accumulate,
    N: gl.constexpr, K: gl.constexpr, OWN_SUMS: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """One consumer: a block of left's columns, and their sums."""
    BLOCK_N: gl.constexpr = left_ring.shape[2]
    BLOCK_K: gl.constexpr = right_ring.shape[2]
    STAGES: gl.constexpr = right_ring.shape[0]
    number, count, steps = rows
    ptrs, valid = _addresses(parts_ptr, number, tile, N, K, BLOCK_N, BLOCK_K, ME)
    # What the part holds arrives while the first steps do.
    acc = gl.load(ptrs, mask=valid & (accumulate != 0), other=0.0)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _ONES, 16])
    sums = gl.zeros([BLOCK_N, _ONES], gl.float32, SUMS)
    stage = 0
    phase = 0
    for step in range(number, steps, count):
        mbarrier.wait(full.index(stage), phase)
        left = left_ring.index(stage * 2 + ME).permute((1, 0))
        acc = warpgroup_mma(left, right_ring.index(stage), acc, is_async=True)
        if OWN_SUMS:
            sums = warpgroup_mma(left, ones.permute((1, 0)), sums, is_async=True)
            acc, sums = warpgroup_mma_wait(2, deps=(acc, sums))
        else:
            acc = warpgroup_mma_wait(1, deps=(acc,))
        # The step before this one has been multiplied.
        before = gl.where(stage == 0, STAGES - 1, stage - 1)
        mbarrier.arrive(empty.index(before), count=1, pred=step > number)
        stage, phase = advance(stage, phase, STAGES)
    acc, sums = warpgroup_mma_wait(0, deps=(acc, sums))
    ptrs, valid = _addresses(parts_ptr, number, tile, N, K, BLOCK_N, BLOCK_K, ME)
    gl.store(ptrs, acc, mask=valid)
    if OWN_SUMS:
        BLOCKS_K: gl.constexpr = K // BLOCK_K
        n = _columns(tile // BLOCKS_K, BLOCK_N, ME, gl.SliceLayout(1, SUMS))
        valid = (n < N) & (tile % BLOCKS_K == 0)
        total = gl.sum(sums, 1) * (1.0 / _ONES)  # the columns are equal
        ptrs = sums_ptr + number.to(gl.int64) * N + n
        total = total + gl.load(ptrs, mask=valid & (accumulate != 0), other=0.0)
        gl.store(ptrs, total, mask=valid)


@gluon.jit
def _load(
    left, last, right, left_ring, right_ring, full, empty, rows, tile,
    N: gl.constexpr, LAST: gl.constexpr, K: gl.constexpr,
):  # fmt: skip
    """The steps of this program; columns beyond the last are zeros."""
    BLOCK_N: gl.constexpr = left_ring.shape[2]
    BLOCK_K: gl.constexpr = right_ring.shape[2]
    BYTES: gl.constexpr = _ROWS * (2 * BLOCK_N + BLOCK_K) * 2
    number, count, steps = rows
    start_n = tile // (K // BLOCK_K) * (2 * BLOCK_N)
    start_k = tile % (K // BLOCK_K) * BLOCK_K
    stage = 0
    phase = 1
    for step in range(number, steps, count):
        row = (steps - 1 - step) * _ROWS
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(bar, BYTES)
        load_tile(right, [row, start_k], bar, right_ring.index(stage))
        for consumer in gl.static_range(2):
            slot = left_ring.index(stage * 2 + consumer)
            column = start_n + consumer * BLOCK_N
            if LAST == 0:
                load_tile(left, [row, column], bar, slot)
            else:
                if column < N - LAST:
                    load_tile(left, [row, column], bar, slot)
                else:
                    load_tile(last, [row, column - (N - LAST)], bar, slot)
        stage, phase = advance(stage, phase, right_ring.shape[0])


@gluon.jit
def _add_sums(
    partial_ptr, sums_ptr, rows, tile, partials, accumulate, W: gl.constexpr, TILES: gl.constexpr
):
    """The sums of a part's share of `partial`, if there is one; its tiles share the columns."""
    if partial_ptr is not None:
        LAYOUT: gl.constexpr = gl.BlockedLayout([4, 4], [1, 32], [1, 1], [1, 0])
        number, count, _ = rows
        share = (partials + count - 1) // count
        end = gl.minimum(number * share + share, partials)
        sums_ptr += number * W
        for start in range(tile * _COLUMNS, W, TILES * _COLUMNS):
            column = start + gl.arange(0, _COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
            earlier = (column < W) & (accumulate != 0)
            total = gl.load(sums_ptr + column, mask=earlier, other=0.0)
            for first in range(number * share, end, 4):
                row = first + gl.arange(0, 4, layout=gl.SliceLayout(1, LAYOUT))
                ptrs = partial_ptr + (row.to(gl.int64) * W).expand_dims(1) + column.expand_dims(0)
                valid = (row < end).expand_dims(1) & (column < W).expand_dims(0)
                total += gl.sum(gl.load(ptrs, mask=valid, other=0.0), 0)
            gl.store(sums_ptr + column, total, mask=column < W)


@gluon.jit(do_not_specialize=["parts", "steps", "accumulate", "partials"])
def _row_products_hopper_kernel(
    left, last, right, parts_ptr, sums_ptr, partial_ptr, parts, steps, accumulate, partials,
    N: gl.constexpr, LAST: gl.constexpr, K: gl.constexpr, W: gl.constexpr, TILES: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    ONES_LAYOUT: gl.constexpr,
):  # fmt: skip
    """A tile [2 * BLOCK_N, BLOCK_K] of a part's products, added to it if `accumulate`."""
    OWN_SUMS: gl.constexpr = sums_ptr is not None and partial_ptr is None
    left_ring = gl.allocate_shared_memory(left.dtype, [STAGES * 2, _ROWS, BLOCK_N], left.layout)
    right_ring = gl.allocate_shared_memory(left.dtype, [STAGES, _ROWS, BLOCK_K], right.layout)
    ones = right_ring
    if OWN_SUMS:
        ones = gl.allocate_shared_memory(left.dtype, [_ONES, _ROWS], ONES_LAYOUT)
        FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
        ones.store(gl.full([_ONES, _ROWS], 1.0, left.dtype, FLAT))
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    fence_async_shared()
    number = gl.program_id(0) // TILES
    tile = gl.program_id(0) - number * TILES
    rows = number, parts, steps
    gl.warp_specialize([
        (_consume, (
            left_ring, right_ring, ones, full, empty, parts_ptr, sums_ptr, rows, tile, accumulate,
            N, K, OWN_SUMS, 0,
        )),
        (_consume, (
            left_ring, right_ring, ones, full, empty, parts_ptr, sums_ptr, rows, tile, accumulate,
            N, K, OWN_SUMS, 1,
        )),
        (_load, (
            left, last, right, left_ring, right_ring, full, empty, rows, tile, N, LAST, K,
        )),
        (_add_sums, (partial_ptr, sums_ptr, rows, tile, partials, accumulate, W, TILES)),
    ], [4, 1, 1], [REGISTERS, 40, 40])  # fmt: skip


def takes(left: Tensor, right: Tensor, last: Tensor | None) -> bool:
    """Whether products of rows like these can be computed here."""
    lefts = (left,) if last is None else (left, last)
    return all([
        t.dtype == right.dtype and t.shape[1] % ROWS == 0 and has_descriptor(t) for t in lefts
    ])


def prepare(
    left: Tensor,
    right: Tensor,
    programs: int,
    parts: int,
    with_sums: bool,
    partial: Tensor | None,
    last: Tensor | None,
    config: LaunchConfig,
) -> PreparedLaunch:
    """The launch of `row_products` for rows like these, by about `programs` programs.

    It adds to `parts` parts, or makes them if there are none. `with_sums` are those of left.
    """
    rows, width_k = right.shape
    width_last = 0 if last is None else last.shape[1]
    width_n = left.shape[1] + width_last
    block_k = math.gcd(config.block_k, width_k)
    block_n = math.gcd(config.block_n // 2, left.shape[1], width_last)  # a consumer's
    tiles = -(-width_n // (2 * block_n)) * (width_k // block_k)
    steps = -(-rows // ROWS)
    count = parts or max(1, min(programs // tiles, steps))

    def of_rows(tensor: Tensor | None, block: int):
        if tensor is None:
            return None
        return tma_descriptor(tensor, tensor.shape, tensor.stride(), [ROWS, block])

    return PreparedLaunch(
        _row_products_hopper_kernel,
        tiles * count,
        tensors={
            **pointers("parts_ptr", "sums_ptr", "partial_ptr"),
            "left": of_rows(left, block_n), "last": of_rows(last, block_n),
            "right": of_rows(right, block_k),
        },
        values=dict(
            parts=count, steps=steps, accumulate=int(parts > 0),
            partials=0 if partial is None else partial.shape[0],
        ),
        constants=dict(
            N=width_n, LAST=width_last, K=width_k, TILES=tiles,
            W=width_n if with_sums else 0 if partial is None else partial.shape[1],
            BLOCK_N=block_n, BLOCK_K=block_k, STAGES=config.num_stages, REGISTERS=_REGISTERS,
            ONES_LAYOUT=shared_layout([_ONES.value, ROWS]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[2][0]),
        stage="row_products",
        variant="hopper",
    )  # fmt: skip


def launch(
    prepared: PreparedLaunch,
    left: Tensor,
    last: Tensor | None,
    right: Tensor,
    products: Tensor,
    sums: Tensor | None,
    partial: Tensor | None,
) -> None:
    """Fills products and sums, or adds to them; `prepared` is from `prepare`."""
    prepared.launch(
        left=left,
        last=last,
        right=right,
        parts_ptr=products,
        sums_ptr=sums,
        partial_ptr=partial,
    )
