"""The transition's second stage on Hopper GPUs: see `triton_path.row_linear`.

    out = residual + rows W^T + bias                rows [M, K], W [N, K], out [M, N], 16 bits

A program has two consumers, each for a tile of 64 rows and BLOCK_N columns. They share the weights,
which stream past in steps of 64 summed channels; a consumer's rows come in a ring of its own, and
behind a tile's rows its residual, over which the output is written and from where it is stored. One
consumer may be ahead of the other by as many steps as the weights have stages, so that one
multiplies while the other writes.

A tile's residual has been read before its output is written, so that the output may be its memory.

With lengths, tiles of padding alone are left out, and filled by a launch of their own.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..triton_parts.device import device_target
from ..triton_parts.launch import PreparedLaunch, has_descriptor, pointers, strides
from ..triton_parts.settings import LaunchConfig
from .parts import (
    REGISTERS,
    ROWS,
    STEP,
    Tiles,
    advance,
    barriers,
    count_tiles,
    load_tile,
    parts_of,
    place_of,
    shared_layout,
    store_tile,
    tma_descriptor,
    viewed,
)

_STEP = gl.constexpr(STEP)
_WIDTHS = range(128, 513, 64)  # of the output


@gluon.jit
def _consume(
    rows_ring, rows_full, rows_empty, ring, full, empty, out, bias_ptr, lengths, pairs,
    N: gl.constexpr, STEPS: gl.constexpr, RESIDUAL: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """One consumer: BLOCK_N columns of every other tile of 64 rows."""
    SLOTS: gl.constexpr = rows_ring.shape[0]
    STAGES: gl.constexpr = ring.shape[0]
    BLOCK_N: gl.constexpr = ring.shape[1]
    BLOCKS: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    DTYPE: gl.constexpr = rows_ring.dtype
    OUT_LAYOUT: gl.constexpr = out.layout
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    B, R, J, per_row, tiles = pairs
    lengths_ptr, first = lengths
    zero = gl.zeros([64, BLOCK_N], gl.float32, ACC)
    slot = 0
    slot_phase = 0
    stage = 0
    phase = 0
    at = 0
    base = 0
    for index in range(gl.program_id(0), tiles * BLOCKS, gl.num_programs(0)):
        tile = index // BLOCKS
        column = (index - tile * BLOCKS) * BLOCK_N
        entry, i, start, base, length = place_of(
            tile * 2 + ME, at, base, lengths_ptr, first, B, R, J, per_row, 1
        )
        at = entry
        acc = zero
        for step in range(STEPS):
            mbarrier.wait(rows_full.index(slot), slot_phase)
            mbarrier.wait(full.index(stage), phase)
            weight = ring.index(stage).permute((1, 0))
            acc = warpgroup_mma(
                rows_ring.index(slot), weight, acc, use_acc=step > 0, is_async=True
            )
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The step before this one has been multiplied.
            before = gl.where(slot == 0, SLOTS - 1, slot - 1)
            mbarrier.arrive(rows_empty.index(before), count=1, pred=step > 0)
            before = gl.where(stage == 0, STAGES - 1, stage - 1)
            mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
            slot, slot_phase = advance(slot, slot_phase, SLOTS)
            stage, phase = advance(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(rows_empty.index(gl.where(slot == 0, SLOTS - 1, slot - 1)), count=1)
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
        parts = parts_of(acc)
        for part in gl.static_range(BLOCK_N // _STEP):
            update = parts[part]
            start_n = column + part * _STEP
            if bias_ptr is not None:
                channels = start_n + gl.arange(0, _STEP, layout=gl.SliceLayout(0, PART))
                bias = gl.load(bias_ptr + channels, mask=channels < N, other=0.0)
                update = update + bias.to(gl.float32).expand_dims(0)
            if lengths_ptr is not None:
                # Beyond the length the operands may be NaN.
                j = first[1] + start + gl.arange(0, 64, layout=gl.SliceLayout(1, PART))
                update = gl.where((j < length).expand_dims(1), update, 0.0)
            mbarrier.wait(rows_full.index(slot), slot_phase)
            made = rows_ring.index(slot)
            if RESIDUAL:
                update = update + made.load(PART).to(gl.float32)
            made.store(update.to(DTYPE))
            fence_async_shared()
            store_tile(out, [entry, i, start, start_n], viewed(made, [1, 1, 64, _STEP], OUT_LAYOUT))
            if part > 0:  # the part before has left its memory
                tma.store_wait(1)
                before = gl.where(slot == 0, SLOTS - 1, slot - 1)
                mbarrier.arrive(rows_empty.index(before), count=1)
            slot, slot_phase = advance(slot, slot_phase, SLOTS)
        tma.store_wait(0)
        mbarrier.arrive(rows_empty.index(gl.where(slot == 0, SLOTS - 1, slot - 1)), count=1)


@gluon.jit
def _load_rows(
    rows, residual, ring, full, empty, lengths, pairs,
    N: gl.constexpr, BLOCK_N: gl.constexpr, STEPS: gl.constexpr, RESIDUAL: gl.constexpr,
    ME: gl.constexpr,
):  # fmt: skip
    """The rows of one consumer's tiles, and behind each its residual, or memory for its output."""
    SLOTS: gl.constexpr = ring.shape[0]
    BLOCKS: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    LAYOUT: gl.constexpr = rows.layout
    B, R, J, per_row, tiles = pairs
    lengths_ptr, first = lengths
    slot = 0
    phase = 1
    at = 0
    base = 0
    for index in range(gl.program_id(0), tiles * BLOCKS, gl.num_programs(0)):
        tile = index // BLOCKS
        column = (index - tile * BLOCKS) * BLOCK_N
        entry, i, start, base, _ = place_of(
            tile * 2 + ME, at, base, lengths_ptr, first, B, R, J, per_row, 1
        )
        at = entry
        for step in range(STEPS):
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(full.index(slot), 64 * _STEP * 2)
            made = viewed(ring.index(slot), [1, 1, 64, _STEP], LAYOUT)
            load_tile(rows, [entry, i, start, step * _STEP], full.index(slot), made)
            slot, phase = advance(slot, phase, SLOTS)
        for part in range(BLOCK_N // _STEP):
            mbarrier.wait(empty.index(slot), phase)
            if RESIDUAL:
                mbarrier.expect(full.index(slot), 64 * _STEP * 2)
                made = viewed(ring.index(slot), [1, 1, 64, _STEP], LAYOUT)
                place = [entry, i, start, column + part * _STEP]
                load_tile(residual, place, full.index(slot), made)
            else:
                mbarrier.arrive(full.index(slot), count=1)
            slot, phase = advance(slot, phase, SLOTS)


@gluon.jit
def _load_weight(weight, ring, full, empty, tiles, N: gl.constexpr, STEPS: gl.constexpr):
    """W, BLOCK_N of its rows for each two tiles."""
    STAGES: gl.constexpr = ring.shape[0]
    BLOCK_N: gl.constexpr = ring.shape[1]
    BLOCKS: gl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), tiles * BLOCKS, gl.num_programs(0)):
        for step in range(STEPS):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), BLOCK_N * _STEP * 2)
            place = [index % BLOCKS * BLOCK_N, step * _STEP]
            load_tile(weight, place, full.index(stage), ring.index(stage))
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit(
    do_not_specialize=["bias_ptr", "lengths_ptr", "first_i", "B", "R", "J", "per_row", "tiles"]
)  # fmt: skip
def _row_linear_hopper_kernel(
    rows, weight, residual, out, bias_ptr, lengths_ptr, first_i, B, R, J, per_row, tiles,
    N: gl.constexpr, K: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
    STAGES: gl.constexpr, RESIDUAL: gl.constexpr, REGISTERS: gl.constexpr,
    ROWS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """BLOCK_N of N columns of B * R * per_row tiles of 64 rows, two at a time; K is summed.

    With lengths, of those that are not padding alone; row i is row first_i + i of its sequence.
    """
    STEPS: gl.constexpr = K // _STEP
    DTYPE: gl.constexpr = rows.dtype
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, _STEP], weight.layout)
    rows0 = gl.allocate_shared_memory(DTYPE, [SLOTS, 64, _STEP], ROWS_LAYOUT)
    rows1 = gl.allocate_shared_memory(DTYPE, [SLOTS, 64, _STEP], ROWS_LAYOUT)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    full0 = barriers(SLOTS, 1)
    full1 = barriers(SLOTS, 1)
    empty0 = barriers(SLOTS, 1)
    empty1 = barriers(SLOTS, 1)
    fence_async_shared()
    lengths = lengths_ptr, (first_i, 0)
    if lengths_ptr is not None:
        tiles = (count_tiles(lengths_ptr, lengths[1], B, R, J, 1) + 1) // 2
    pairs = B, R, J, per_row, tiles
    gl.warp_specialize([
        (_consume, (
            rows0, full0, empty0, ring, full, empty, out, bias_ptr, lengths, pairs,
            N, STEPS, RESIDUAL, 0,
        )),
        (_consume, (
            rows1, full1, empty1, ring, full, empty, out, bias_ptr, lengths, pairs,
            N, STEPS, RESIDUAL, 1,
        )),
        (_load_weight, (weight, ring, full, empty, tiles, N, STEPS)),
        (_load_rows, (
            rows, residual, rows0, full0, empty0, lengths, pairs, N, BLOCK_N, STEPS, RESIDUAL, 0,
        )),
        (_load_rows, (
            rows, residual, rows1, full1, empty1, lengths, pairs, N, BLOCK_N, STEPS, RESIDUAL, 1,
        )),
    ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip


def takes(rows: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Whether `row_linear` of rows [M, K] can run here; rows are contiguous."""
    return (
        weight.shape[0] in _WIDTHS
        and has_descriptor(weight)
        and (residual is None or has_descriptor(residual))
    )


def prepare(
    rows: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    pairs: tuple[int, int, int],
    first_row: int | None,
    config: LaunchConfig,
) -> PreparedLaunch:
    """The launch of `row_linear`, with lengths if there is a first row; `pairs` are (B, R, J)."""
    (batch, count, columns), (channels, width) = pairs, weight.shape
    made = [count * columns * channels, columns * channels, channels, 1]
    residual_strides = made if residual is None else strides(residual)
    tiles = Tiles.over(batch, count, columns, [residual_strides], first_row is not None)
    values, part = tiles.values(2), STEP
    of_rows = [count * columns * width, columns * width, width, 1]
    block = [config.block_n, part]
    blocks = -(-channels // config.block_n)
    return PreparedLaunch(
        _row_linear_hopper_kernel,
        min(values["tiles"] * blocks, device_target(rows.device).multiprocessors),
        tensors={
            **pointers("bias_ptr", "lengths_ptr"),
            "rows": tiles.descriptor(rows, of_rows, width, part),
            "weight": tma_descriptor(weight, weight.shape, weight.stride(), block),
            "residual": None if residual is None
            else tiles.descriptor(residual, residual_strides, channels, part),
            "out": tiles.descriptor(rows, made, channels, part),
        },
        values=dict(first_i=first_row, **values),
        constants=dict(
            N=channels, K=width, BLOCK_N=config.block_n, SLOTS=config.split,
            STAGES=config.num_stages, RESIDUAL=residual is not None, REGISTERS=REGISTERS[2][1],
            ROWS_LAYOUT=shared_layout([ROWS, part]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[2][0]),
        stage="row_linear",
        variant="hopper",
    )  # fmt: skip
