"""What the Hopper kernels share: Triton's Gluon dialect, rings of stages, and folded norms.

A Hopper kernel has warps of their own for loads (one warp each, by TMA) and for products
("consumers", four warps each). They meet at barriers in shared memory: "full", a load has arrived,
and "empty", its memory may be overwritten. A ring has several stages, which are filled in turn.
Consumers also take turns at the matrix unit, so that while one multiplies another computes its
gates.

A store by TMA needs a fence ahead of it, which waits for what the warps wrote to shared memory: up
to an eighth of a step. So a block is stored during the next step's products, in the forward's
stages where there are more than 128 channels and no lengths. Ahead of an "empty" a fence waits for
what the warps read to registers: they may only have issued these loads. There is none where
something made of what was read is stored, or multiplied, by then.

Folded norms. A consumer multiplies rows of x as they are. With W' = W diag(g), s the sums of its
rows over k, and c = W b + bias,

    LayerNorm(x) W^T + bias = rstd (x W'^T - mean s + c / rstd)

and the last two terms are summed by the matrix unit too, as 16 further channels: on the side of x
they are mean and 1 / rstd, on that of W' they are -s and c, each in three pieces of bfloat16, which
hold 24 bits. What is left of the norm after the product is one factor a row, and in float16 one a
block of channels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..triton_parts.launch import steps_between
from .folded_norm import EXTRA

ROWS = 64  # of a consumer's tile
_ROWS = gl.constexpr(ROWS)
STEP = 64  # of rings of rows: summed channels of a step, and channels of a part of the output
_STEP = gl.constexpr(STEP)
LOG2_E = gl.constexpr(1.4426950408889634)
# Keeps a row's sum from overflowing; as a power of two it rounds nothing.
_SUM_SCALE = gl.constexpr(2.0**-16)

# Triton 3.8 renamed these two; the old names are still there, and raise.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # 3.8


@gluon.jit
def viewed(buffer, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same bytes of shared memory in another shape."""
    if _REINTERPRET:
        return buffer.reinterpret(buffer.dtype, SHAPE, LAYOUT)
    else:
        return buffer._reinterpret(buffer.dtype, SHAPE, LAYOUT)


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring; the phase of its barriers turns with each round."""
    stage += 1
    wraps = stage == STAGES
    return gl.where(wraps, 0, stage), gl.where(wraps, phase ^ 1, phase)


@gluon.jit
def behind(place, count: gl.constexpr, SLOTS: gl.constexpr):
    """The place of a ring so many behind another, fewer than there are."""
    place += count
    return gl.where(place >= SLOTS, place - SLOTS, place)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each of which waits for ARRIVALS."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def load_weights(
    weights, further, ring, extras, full, empty, tiles,
    N: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Two projections [N, C] and their further channels, BLOCK_N channels a stage, for each tile.

    The first's channels are the lower half of a stage, the second's the upper. If there is a stage
    for all channels, they are loaded once, and stay: see `free_weights`.
    """
    stage = 0
    phase = 1
    if STAGES == N // BLOCK_N:
        tiles = gl.minimum(tiles, gl.program_id(0) + 1)
    for _ in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for step in range(N // BLOCK_N):
            load_block(weights, further, ring, extras, full, empty, stage, phase, step, N, BLOCK_N)
            stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def load_block(
    weights, further, ring, extras, full, empty, stage, phase, step,
    N: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The step-th BLOCK_N channels of `load_weights`."""
    mbarrier.wait(empty.index(stage), phase)
    bar = full.index(stage)
    PARTS: gl.constexpr = ring.shape[0] // extras.shape[0]
    PART: gl.constexpr = ring.shape[2]
    mbarrier.expect(bar, 2 * BLOCK_N * (PARTS * PART + extras.shape[2]) * 2)
    low, high = lower(extras.index(stage)), upper(extras.index(stage))
    load_tile(further, [step * BLOCK_N, 0], bar, low)
    load_tile(further, [N + step * BLOCK_N, 0], bar, high)
    for k in gl.static_range(PARTS):
        both = ring.index(stage * PARTS + k)
        low, high = lower(both), upper(both)
        load_tile(weights, [step * BLOCK_N, k * PART], bar, low)
        load_tile(weights, [N + step * BLOCK_N, k * PART], bar, high)


@gluon.jit
def free_weights(empty, stage, phase, STAGES: gl.constexpr, BLOCKS: gl.constexpr):
    """Gives a consumer's stage back to `load_weights`, unless it stays; the next one."""
    if STAGES == BLOCKS:
        return (stage + 1) % STAGES, phase
    else:
        mbarrier.arrive(empty.index(stage), count=1)
        return advance(stage, phase, STAGES)


@gluon.jit
def lower(both):
    """The first half of the rows of shared memory."""
    return both.slice(0, both.shape[0] // 2, dim=0)


@gluon.jit
def upper(both):
    """The second half."""
    return both.slice(both.shape[0] // 2, both.shape[0] // 2, dim=0)


@gluon.jit
def place_in_rows(index, per_row):
    """(row, first column) of a tile; beyond the last tile the row is beyond the last."""
    row = index // per_row
    return row, (index - row * per_row) * _ROWS


@gluon.jit
def tile_at(index, rows, per_row):
    """(entry, row, first column) of a tile; beyond the last tile the entry is beyond the last."""
    row = index // per_row
    entry = row // rows
    return entry, row - entry * rows, (index - row * per_row) * _ROWS


@gluon.jit
def length_of(lengths_ptr, entry, B, R, J):
    """The length of a sequence without its padding; 0 beyond the last of B."""
    length = gl.load(lengths_ptr + entry, mask=entry < B, other=0)
    return gl.minimum(gl.maximum(length, 0), gl.maximum(R, J))


@gluon.jit
def _tiles_within(length, first, R, J, MULTIPLE: gl.constexpr):
    """(rows, tiles of a row) of those that hold pairs before `length`, rounded up to MULTIPLE."""
    end = (length + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    rows = gl.minimum(gl.maximum(end - first[0], 0), R)
    columns = gl.minimum(gl.maximum(end - first[1], 0), J)
    return rows, (columns + _ROWS - 1) // _ROWS


@gluon.jit
def count_tiles(lengths_ptr, first, B, R, J, MULTIPLE: gl.constexpr):
    """How many tiles `next_tile` finds; J is the end of a row's tiles."""
    total = 0
    for entry in range(B):
        length = length_of(lengths_ptr, entry, B, R, J)
        rows, per_row = _tiles_within(length, first, R, J, MULTIPLE)
        total += rows * per_row
    return total


@gluon.jit
def next_tile(index, entry, base, lengths_ptr, first, B, R, J, MULTIPLE: gl.constexpr):
    """(entry, row, first column, base, length) of a tile, of those that are not padding alone.

    They are numbered without gaps, so that programs share them evenly. `entry` and `base`, the
    number of its first tile, are those of an earlier tile.
    """
    length = length_of(lengths_ptr, entry, B, R, J)
    rows, per_row = _tiles_within(length, first, R, J, MULTIPLE)
    while (entry < B) & (index - base >= rows * per_row):
        base += rows * per_row
        entry += 1
        length = length_of(lengths_ptr, entry, B, R, J)
        rows, per_row = _tiles_within(length, first, R, J, MULTIPLE)
    row = (index - base) // gl.maximum(per_row, 1)
    return entry, row, (index - base - row * per_row) * _ROWS, base, length


@gluon.jit
def place_of(
    index, entry, base, lengths_ptr, first, B, R, J, per_row, MULTIPLE: gl.constexpr
):  # fmt: skip
    """`next_tile`; without lengths, whose place may be None, `tile_at`, and J for the length."""
    if lengths_ptr is None:
        entry, row, start = tile_at(index, R, per_row)
        return entry, row, start, base, J
    else:
        return next_tile(index, entry, base, lengths_ptr, first, B, R, J, MULTIPLE)


@gluon.jit
def slot_of(slots, place: gl.constexpr, k, C: gl.constexpr, PLANES: gl.constexpr):
    """The k-th part of the channels of rows in slot `place` of memory for rows, or for planes."""
    PART: gl.constexpr = slots.shape[1 if PLANES else 2]
    slot = slots.index(place * (C // PART) + k)
    return slot.permute((1, 0)) if PLANES else slot


@gluon.jit
def load_parts(
    rows, slots, place, bar, entry, i, start, C: gl.constexpr, PLANES: gl.constexpr
):  # fmt: skip
    """A tile of 64 rows, or of planes, part by part into slot `place`; `bar` waits for all."""
    LAYOUT: gl.constexpr = rows.layout
    PART: gl.constexpr = slots.shape[1 if PLANES else 2]
    mbarrier.expect(bar, 64 * C * 2)
    for k in gl.static_range(C // PART):
        slot = slots.index(place * (C // PART) + k)
        if PLANES:
            slot = viewed(slot, [1, 1, PART, 64], LAYOUT)
            load_tile(rows, [entry, i, k * PART, start], bar, slot)
        else:
            slot = viewed(slot, [1, 1, 64, PART], LAYOUT)
            load_tile(rows, [entry, i, start, k * PART], bar, slot)


@gluon.jit
def _channels(
    slots, place: gl.constexpr, k: gl.constexpr, C: gl.constexpr, PLANES: gl.constexpr
):  # fmt: skip
    """The k-th 64 channels of them."""
    IN_PART: gl.constexpr = slots.shape[1 if PLANES else 2] // 64
    slot = slot_of(slots, place, k // IN_PART, C, PLANES)
    return slot.slice(k % IN_PART * 64, 64, dim=1)


@gluon.jit
def statistics(
    slots, place: gl.constexpr, eps, C: gl.constexpr, PLANES: gl.constexpr, A: gl.constexpr
):  # fmt: skip
    """The mean and 1 / sqrt(var + eps), [64] each, of 16-bit rows [64, C], in two passes.

    The rows are read a part at a time: held in registers, each value would take one of its own. A
    thread sums its own values of all parts first.
    """
    sums = _channels(slots, place, 0, C, PLANES).load(A).to(gl.float32) * _SUM_SCALE
    for k in gl.static_range(1, C // 64):
        sums = sums + _channels(slots, place, k, C, PLANES).load(A).to(gl.float32) * _SUM_SCALE
    mean = _mean_of(gl.sum(sums, 1), C)
    d = _channels(slots, place, 0, C, PLANES).load(A).to(gl.float32) - mean.expand_dims(1)
    sums = d * d
    for k in gl.static_range(1, C // 64):
        d = _channels(slots, place, k, C, PLANES).load(A).to(gl.float32) - mean.expand_dims(1)
        sums = sums + d * d
    squares = gl.sum(sums, 1)
    return mean, gl.rsqrt(squares * (1.0 / C) + eps)


@gluon.jit
def statistics_of_wide(
    slots, place: gl.constexpr, eps, C: gl.constexpr, PLANES: gl.constexpr, A: gl.constexpr
):  # fmt: skip
    """`statistics` of rows of more than 256 channels, part by part, for which registers suffice."""
    PART: gl.constexpr = slots.shape[1 if PLANES else 2]
    sums = gl.zeros([64, 64], gl.float32, A)
    for part in range(C // PART):
        slot = slot_of(slots, place, part, C, PLANES)
        for k in gl.static_range(PART // 64):
            sums = sums + slot.slice(k * 64, 64, dim=1).load(A).to(gl.float32) * _SUM_SCALE
    mean = _mean_of(gl.sum(sums, 1), C)
    squares = gl.zeros([64, 64], gl.float32, A)
    for part in range(C // PART):
        slot = slot_of(slots, place, part, C, PLANES)
        for k in gl.static_range(PART // 64):
            d = slot.slice(k * 64, 64, dim=1).load(A).to(gl.float32) - mean.expand_dims(1)
            squares = squares + d * d
    return mean, gl.rsqrt(gl.sum(squares, 1) * (1.0 / C) + eps)


@gluon.jit
def _mean_of(total, C: gl.constexpr):
    """The mean of C values from their sum, which is scaled."""
    if C & (C - 1) == 0:
        return total * (1.0 / C / _SUM_SCALE)
    else:  # rounded correctly, so that the mean of a constant row is the constant
        return gl.div_rn(total, gl.zeros_like(total) + C) * (1.0 / _SUM_SCALE)


@gluon.jit
def ready(
    slots, place: gl.constexpr, mean, rstd, eps,
    C: gl.constexpr, PLANES: gl.constexpr, A: gl.constexpr,
):  # fmt: skip
    """(rows, further channels [64, 16], scale [64]) of rows whose norm `fold_norms` folded.

    The rows are a tuple of parts of their channels.

    bfloat16 rows whose norm is the bias alone are replaced by zeros, in the slot:

    - constant rows, which then give the bits that zeros give. x W'^T and mean s, whose difference
      rstd magnifies, would not cancel to the last bit. A row is one if |mean| >= 16 sqrt(eps) and
      rstd is that of var = 0: if bfloat16 values of up to 512 channels that lie so far from 0
      differ at all, var is at least mean^2 2^-25, which is 2^-17 eps.
    - rows whose variance overflows, of which rstd is 0. x W'^T may overflow too, and so would the
      reciprocal of rstd, the least of which is otherwise 2^-64.

    In float16, which has more digits and no such variance, rows with |mean| rstd >= 32 are replaced
    by their differences from the rounded mean. These are exact from half to twice the mean, where
    all of up to 256 channels lie, and elsewhere rounded as a normalised value would be. None
    overflows. A constant row becomes zeros.
    """
    PARTS: gl.constexpr = C // slots.shape[1 if PLANES else 2]
    if slots.dtype == gl.float16:
        far = gl.maximum(mean, -mean) * rstd >= 32.0
        shift = gl.where(far, mean, 0.0).to(gl.float16)
        if gl.max(far.to(gl.int32), 0) > 0:
            for k in gl.static_range(C // 64):
                some = _channels(slots, place, k, C, PLANES)
                some.store(some.load(A) - shift.expand_dims(1))
        mean = mean - shift.to(gl.float32)
        scale = rstd
    else:
        replaced = without_norm(mean, rstd, eps)
        if gl.max(replaced.to(gl.int32), 0) > 0:
            for k in range(PARTS):
                slot = slot_of(slots, place, k, C, PLANES)
                rows = slot.load(A)
                slot.store(gl.where(replaced.expand_dims(1), gl.zeros_like(rows), rows))
        mean = gl.where(replaced, 0.0, mean)
        scale = gl.maximum(rstd, 2.0**-64)
    parts = ()
    for k in gl.static_range(PARTS):
        parts = parts + (slot_of(slots, place, k, C, PLANES).load(A),)
    return parts, _pieces(mean, 1.0 / scale, A), scale


@gluon.jit
def ready_at_once(slot, mean, rstd, eps, A: gl.constexpr):
    """`ready`, but the rows are replaced in registers.

    This is one more instruction for each register. The branch of `ready` has addresses of its own,
    which a consumer with few registers left would have to spill.
    """
    replaced = without_norm(mean, rstd, eps)
    bits = gl.where(replaced, 0, -1).to(gl.int16).expand_dims(1)
    rows = gl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [slot.load(A), bits],
        dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip
    further, scale = _further(replaced, mean, rstd, A)
    return rows, further, scale


@gluon.jit
def _further(replaced, mean, rstd, A: gl.constexpr):
    """(further channels [64, 16], scale [64])."""
    scale = gl.maximum(rstd, 2.0**-64)
    return _pieces(gl.where(replaced, 0.0, mean), 1.0 / scale, A), scale


@gluon.jit
def without_norm(mean, rstd, eps):
    """Whether bfloat16 rows are among those that `ready` replaces, [64]."""
    of_zero = gl.rsqrt(eps) * (1.0 - 2.0**-20)
    constant = (gl.maximum(mean, -mean) * of_zero >= 16.0) & (rstd >= of_zero)
    return constant | (rstd == 0.0)


@gluon.jit
def _pieces(mean, deviation, A: gl.constexpr):
    """Six products of three pieces each, in the order of `folded_norm`: 1 2 3 1 2 1."""
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, A)).expand_dims(0)
    place = column % 6
    value = gl.where(column < 6, mean.expand_dims(1), deviation.expand_dims(1))
    first = value.to(gl.bfloat16).to(gl.float32)
    second = (value - first).to(gl.bfloat16).to(gl.float32)
    third = value - first - second
    piece = gl.where(
        (place == 0) | (place == 3) | (place == 5), first, gl.where(place == 2, third, second)
    )
    return gl.where(column < 12, piece, 0.0).to(gl.bfloat16)


@gluon.jit
def reciprocal(x):
    """1 / x within 1 ulp, in one instruction."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), in two of the special function unit's instructions."""
    return reciprocal(1.0 + gl.exp2(x * -LOG2_E))


@gluon.jit
def halves(x, HALF: gl.constexpr):
    """The two halves of x [M, 2N] along N: registers are renamed, no data moves."""
    left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()
    left = gl.convert_layout(left, HALF, assert_trivial=True)
    return left, gl.convert_layout(right, HALF, assert_trivial=True)


@gluon.jit
def parts_of(acc):
    """acc [M, N] in parts of STEP columns, of which there is a power of two."""
    if acc.shape[1] == _STEP:
        return (acc,)
    else:
        HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, acc.shape[1] // 2, 16])
        left, right = halves(acc, HALF)
        return parts_of(left) + parts_of(right)


def part_of(channels: int) -> int:
    """The channels of a block of shared memory, whose axes must be powers of two: a divisor."""
    return min(channels & -channels, 256)


def shared_layout(block: Sequence[int]) -> gl.NVMMASharedLayout:
    """The layout of a 16-bit block in shared memory that TMA and wgmma agree on."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)


def tma_descriptor(
    tensor: Tensor, shape: Sequence[int], strides: Sequence[int], block: Sequence[int]
) -> TensorDescriptor:
    """`launch.descriptor_of` for a Gluon kernel."""
    steps, layout = steps_between(shape, strides), shared_layout(block)
    found = TensorDescriptor(tensor, list(shape), steps, list(block), layout)
    found.base = None  # or it would keep the tensor alive
    return found


def weight_tiles(like: Tensor, count: int, block_n: int) -> dict[str, TensorDescriptor]:
    """Of what `fold_norms` makes of two projections [count, C], for `load_weights`.

    `like` is [..., C] in their dtype.
    """
    made = {}
    for name, width, dtype in (
        ("weights", like.shape[-1], like.dtype), ("further", EXTRA, torch.bfloat16)
    ):  # fmt: skip
        aligned = like.new_empty(0, dtype=dtype)  # the dtype, and an address for any descriptor
        block = [block_n, part_of(width)]
        made[name] = tma_descriptor(aligned, [2 * count, width], [width, 1], block)
    return made


class Tiles(NamedTuple):
    """How tiles of 64 pairs cover the pairs [B, R, J] of a call."""

    entries: int  # B
    rows: int  # R, or 1 where all pairs of an entry are one row
    columns: int  # J, or R * J
    per_row: int

    @classmethod
    def of(cls, batch: int, rows: int, columns: int, one_row: bool) -> "Tiles":
        """Tiles over rows of `columns` pairs, or over whole entries."""
        if one_row:
            rows, columns = 1, rows * columns
        return cls(batch, rows, columns, -(-columns // ROWS))

    @classmethod
    def over(
        cls, batch: int, rows: int, columns: int, all_strides: Sequence[list[int]], padded: bool
    ) -> "Tiles":
        """Over whole entries, if tensors with all these strides, and lengths, allow it; or rows.

        In rows of one pair the strides along columns become those along rows.
        """
        one_row = not padded and all([
            rows == 1 or columns == 1 or stride[1] == columns * stride[2] for stride in all_strides
        ])
        if columns == 1:
            for stride in all_strides:
                stride[2] = stride[1]
        return cls.of(batch, rows, columns, one_row)

    def values(self, consumers: int) -> dict[str, int]:
        """The kernels' parameters."""
        tiles = -(-self.entries * self.rows * self.per_row // consumers)
        names = dict(B=self.entries, R=self.rows, J=self.columns)
        return dict(**names, per_row=self.per_row, tiles=tiles)

    def descriptor(
        self, tensor: Tensor, strides: Sequence[int], channels: int, block_n: int
    ) -> TensorDescriptor:
        """Of [B, R, J, channels] with these strides, in tiles of 64 pairs."""
        shape = [self.entries, self.rows, self.columns, channels]
        return tma_descriptor(tensor, shape, strides, [1, 1, ROWS, block_n])


# Registers of a thread on average, and of a consumer's, with two or three consumers and four warps,
# at most, that load.
REGISTERS = {2: (168, 240), 3: (128, 160)}
