"""Batched products of planes on Hopper GPUs: see `trimul_einsum_triton`.

    out[e, d] = left[e, d] right[e, d]^T       planes [L, L], 16 bits, sums in fp32

or both products of stage 2's backward in one launch, da of dt and b, db of dt and a, whose tiles
take turns: so a plane of dt comes from memory once, and its tiles to both while they are in the L2
cache. An operand may be transposed: the matrix unit reads either.

A program takes every so-many-th tile of 128 rows and BLOCK_N columns, two consumers half of its
rows each. What a consumer has made is rounded and stays in registers. It goes out during the next
tile's first steps, a part of 64 columns in each, so that the matrix unit doesn't wait for it.
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
from ..triton_parts.launch import PreparedLaunch, has_descriptor
from ..triton_parts.settings import LaunchConfig
from .parts import (
    REGISTERS,
    ROWS,
    STEP,
    advance,
    barriers,
    load_tile,
    parts_of,
    shared_layout,
    store_tile,
    tma_descriptor,
    viewed,
)

_ROWS = gl.constexpr(ROWS)  # of a consumer's tile
_STEP = gl.constexpr(STEP)  # summed at a time, and columns of a part that is stored
_GROUP = gl.constexpr(8)  # rows of tiles, within which tiles go column by column
# Which entry of an operand a product takes: that of its output, the other of two, or the only one.
OWN, OTHER, ONLY = 0, 1, 2
_OTHER, _ONLY = gl.constexpr(OTHER), gl.constexpr(ONLY)


@gluon.jit
def _place_of(tile, L, D, BOTH: gl.constexpr, BLOCK_N: gl.constexpr):
    """(entry, channel, first row, first column) of a tile.

    Tiles are numbered plane by plane, so that planes are read from L2 after their first use. With
    BOTH products a tile of one is followed by the other's of the same place.
    """
    entry = 0
    if BOTH:
        entry = tile % 2
        tile = tile // 2
    tiles_m = (L + 2 * _ROWS - 1) // (2 * _ROWS)
    tiles_n = (L + BLOCK_N - 1) // BLOCK_N
    channel = tile // (tiles_m * tiles_n)
    rest = tile - channel * (tiles_m * tiles_n)
    group = rest // (_GROUP * tiles_n)
    rows = gl.minimum(tiles_m - group * _GROUP, _GROUP)
    in_group = rest - group * (_GROUP * tiles_n)
    column = in_group // rows
    row = group * _GROUP + in_group - column * rows
    if not BOTH:
        entry = channel // D
        channel = channel - entry * D
    return entry, channel, row * (2 * _ROWS), column * BLOCK_N


@gluon.jit
def _multiply(
    lefts, rights, stage, acc,
    IS_FIRST: gl.constexpr, TURNED_LEFT: gl.constexpr, TURNED_RIGHT: gl.constexpr,
    ME: gl.constexpr,
):  # fmt: skip
    """Begins a step's product, the first of which makes the sum."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    STAGES: gl.constexpr = lefts.shape[0] // 2
    BLOCK_N: gl.constexpr = rights.shape[0] // STAGES * _STEP
    left = lefts.index(stage * 2 + ME)
    if TURNED_LEFT:
        left = left.permute((1, 0))
    if TURNED_RIGHT:
        right = viewed(rights, [STAGES, _STEP, BLOCK_N], LAYOUT).index(stage)
    else:
        right = viewed(rights, [STAGES, BLOCK_N, _STEP], LAYOUT).index(stage).permute((1, 0))
    return warpgroup_mma(left, right, acc, use_acc=not IS_FIRST, is_async=True)


@gluon.jit
def _free(empty, stage, STAGES: gl.constexpr):
    """Gives the stage before this one back."""
    mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)


@gluon.jit
def _store(buffers, out, place, part: gl.constexpr, values, ME: gl.constexpr):
    """A part of a consumer's tile, to where `place` says."""
    LAYOUT: gl.constexpr = out.layout
    entry, channel, row, column = place
    BUFFERS: gl.constexpr = buffers.shape[0]
    buffer = buffers.index(part % BUFFERS)
    tma.store_wait(BUFFERS - 1)
    buffer.store(values)
    fence_async_shared()
    at = [entry, channel, row + ME * _ROWS, column + part * _STEP]
    store_tile(out, at, viewed(buffer, [1, 1, _ROWS, _STEP], LAYOUT))


@gluon.jit
def _product(
    memory, full, empty, out, ring, L, made, place, exists,
    TURNED_LEFT: gl.constexpr, TURNED_RIGHT: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """A consumer's tile in parts, and the ring's next stage.

    The tile `made` before, if it exists, goes to its `place` meanwhile.
    """
    lefts, rights, buffers = memory
    stage, phase, zero = ring
    STAGES: gl.constexpr = lefts.shape[0] // 2
    BLOCK_N: gl.constexpr = rights.shape[0] // STAGES * _STEP
    PARTS: gl.constexpr = BLOCK_N // _STEP
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc = gl.zeros([_ROWS, BLOCK_N], gl.float32, ACC)
    for part in gl.static_range(PARTS):
        mbarrier.wait(full.index(stage), phase)
        acc = _multiply(lefts, rights, stage + zero, acc, part == 0, TURNED_LEFT, TURNED_RIGHT, ME)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        if part > 0:
            _free(empty, stage, STAGES)
        if exists:
            _store(buffers, out, place, part, made[part], ME)
        stage, phase = advance(stage, phase, STAGES)
    for _ in range(PARTS * _STEP, L, _STEP):
        mbarrier.wait(full.index(stage), phase)
        acc = _multiply(lefts, rights, stage + zero, acc, False, TURNED_LEFT, TURNED_RIGHT, ME)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        _free(empty, stage, STAGES)
        stage, phase = advance(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    _free(empty, stage, STAGES)
    parts = parts_of(acc)
    rounded = ()
    for part in gl.static_range(PARTS):
        rounded = rounded + (parts[part].to(lefts.dtype),)
    return rounded, stage, phase


@gluon.jit
def _consume(
    memory, full, empty, out, sizes, BOTH: gl.constexpr, TURNED: gl.constexpr, ME: gl.constexpr
):  # fmt: skip
    """One consumer: half of the rows of each tile."""
    lefts, rights, buffers = memory
    L, D, tiles, zero = sizes
    PARTS: gl.constexpr = rights.shape[0] * 2 // lefts.shape[0]
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    made = ()
    for _ in gl.static_range(PARTS):
        made = made + (gl.zeros([_ROWS, _STEP], lefts.dtype, PART),)
    stage = 0
    phase = 0
    first = gl.program_id(0)
    place = _place_of(first, L, D, BOTH, PARTS * _STEP)
    for tile in range(first, tiles, gl.num_programs(0)):
        this = _place_of(tile, L, D, BOTH, PARTS * _STEP)
        if BOTH:
            # Of addresses in both branches that differ by constants, ptxas 12.8 (Triton 3.6) makes
            # one from a register that only the other branch has written: hence the unknown `zero`.
            if this[0] == 0:
                made, stage, phase = _product(
                    memory, full, empty, out, (stage, phase, 0), L, made, place, tile > first,
                    TURNED[0], TURNED[1], ME,
                )  # fmt: skip
            else:
                made, stage, phase = _product(
                    memory, full, empty, out, (stage, phase, zero), L, made, place, tile > first,
                    TURNED[2], TURNED[3], ME,
                )  # fmt: skip
        else:
            # Else ptxas 12.8 waits after every single wgmma.
            gl.assume(L > PARTS * _STEP)
            made, stage, phase = _product(
                memory, full, empty, out, (stage, phase, 0), L, made, place, tile > first,
                TURNED[0], TURNED[1], ME,
            )  # fmt: skip
        place = this
    for part in gl.static_range(PARTS):
        _store(buffers, out, place, part, made[part], ME)
    tma.store_wait(0)


@gluon.jit
def _load_block(planes, slot, bar, place, start, k, turned, OF: gl.constexpr):
    """64 summed columns of 64 rows of an operand, or of its transpose."""
    LAYOUT: gl.constexpr = planes.layout
    entry, channel, _, _ = place
    if OF == _OTHER:
        entry = 1 - entry
    if OF == _ONLY:
        entry = 0
    at = [entry, channel, gl.where(turned, k, start), gl.where(turned, start, k)]
    load_tile(planes, at, bar, viewed(slot, [1, 1, _STEP, _STEP], LAYOUT))


@gluon.jit
def _load(
    left, right, lefts, rights, full, empty, sizes,
    BOTH: gl.constexpr, TURNED: gl.constexpr, OF: gl.constexpr,
):  # fmt: skip
    """The steps of this program's tiles."""
    STAGES: gl.constexpr = lefts.shape[0] // 2
    BLOCKS: gl.constexpr = rights.shape[0] // STAGES
    L, D, tiles, _ = sizes
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        place = _place_of(tile, L, D, BOTH, BLOCKS * _STEP)
        entry, _, row, column = place
        turned_left = gl.where(entry == 0, TURNED[0], TURNED[2]) != 0
        turned_right = gl.where(entry == 0, TURNED[1], TURNED[3]) != 0
        for k in range(0, L, _STEP):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (2 + BLOCKS) * _STEP * _STEP * 2)
            for part in gl.static_range(2):
                slot = lefts.index(stage * 2 + part)
                _load_block(left, slot, bar, place, row + part * _ROWS, k, turned_left, OF[0])
            for part in gl.static_range(BLOCKS):
                slot, start = rights.index(stage * BLOCKS + part), column + part * _STEP
                _load_block(right, slot, bar, place, start, k, turned_right, OF[1])
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit(do_not_specialize=["L", "D", "tiles", "zero"])
def _plane_products_hopper_kernel(
    left, right, out, L, D, tiles, zero,
    BOTH: gl.constexpr, TURNED: gl.constexpr, OF: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Tiles [128, BLOCK_N] of one product of all planes, or of both: see the module."""
    DTYPE: gl.constexpr = left.dtype
    BLOCKS: gl.constexpr = BLOCK_N // _STEP
    lefts = gl.allocate_shared_memory(DTYPE, [STAGES * 2, _ROWS, _STEP], LAYOUT)
    rights = gl.allocate_shared_memory(DTYPE, [STAGES * BLOCKS, _STEP, _STEP], LAYOUT)
    BUFFERS: gl.constexpr = 1 if BLOCKS == 1 else 2  # for parts that go out
    buffers0 = gl.allocate_shared_memory(DTYPE, [BUFFERS, _ROWS, _STEP], LAYOUT)
    buffers1 = gl.allocate_shared_memory(DTYPE, [BUFFERS, _ROWS, _STEP], LAYOUT)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    fence_async_shared()
    sizes = L, D, tiles, zero
    gl.warp_specialize([
        (_consume, ((lefts, rights, buffers0), full, empty, out, sizes, BOTH, TURNED, 0)),
        (_consume, ((lefts, rights, buffers1), full, empty, out, sizes, BOTH, TURNED, 1)),
        (_load, (left, right, lefts, rights, full, empty, sizes, BOTH, TURNED, OF)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip


def takes(both: bool, lengths: Tensor | None, *planes: Tensor) -> bool:
    """Whether products of planes [..., L, pitch] like these, or both, can be computed here."""
    if lengths is not None or not (both or planes[0].shape[-2] > STEP):
        return False
    return all([has_descriptor(tensor) for tensor in planes])


def prepare(
    left: Tensor,
    right: Tensor,
    out: Tensor,
    config: LaunchConfig,
    of: tuple[int, int] = (OWN, OWN),
    turned: tuple[bool, bool, bool, bool] = (False,) * 4,
) -> PreparedLaunch:
    """The launch for planes [E, D, L, pitch].

    Args:
        of: the entries that left and right give to a product. Without one of `OTHER` or `ONLY`
            there is one product for each entry of `out`; else there are two, of its two entries.
        turned: whether left and right are transposed, for the first of two products or all others,
            and for the second.
    """
    entries, hidden, length = out.shape[:3]
    both = of != (OWN, OWN)
    block_n = columns_of(length, config.block_n, both)
    tiles = -(-length // (2 * ROWS)) * -(-length // block_n) * entries * hidden

    def of_planes(planes: Tensor):
        shape = [planes.shape[0], hidden, length, length]
        return tma_descriptor(planes, shape, planes.stride(), [1, 1, ROWS, STEP])

    return PreparedLaunch(
        _plane_products_hopper_kernel,
        min(tiles, device_target(out.device).multiprocessors),
        tensors={"left": of_planes(left), "right": of_planes(right), "out": of_planes(out)},
        values=dict(L=length, D=hidden, tiles=tiles, zero=0),
        constants=dict(
            BOTH=both, TURNED=turned, OF=of, BLOCK_N=block_n,
            # As much memory, whatever the columns.
            STAGES=config.num_stages * (2 * ROWS + config.block_n) // (2 * ROWS + block_n),
            REGISTERS=REGISTERS[2][1], LAYOUT=shared_layout([ROWS, STEP]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[2][0]),
        stage="trimul_einsum",
        variant="hopper",
    )  # fmt: skip


def columns_of(length: int, most: int, both: bool) -> int:
    """The columns of a tile: `most`, or so many that there are steps enough.

    There must be as many as parts, each of which goes out during a step; of one product, more.
    """
    steps = -(-length // STEP) - (not both)
    while most > max(1, steps) * STEP:
        most //= 2
    return most


def launch(prepared: PreparedLaunch, left: Tensor, right: Tensor, out: Tensor) -> None:
    """Fills `out`; `prepared` is from `prepare`."""
    prepared.launch(left=left, right=right, out=out)
