"""The whole transition on Hopper GPUs, whose hidden channels never leave the chip.

    out = residual + h Wd^T + bd,   h = silu(z Wg^T + bg) * (z Wu^T + bu),   z = LayerNorm(x; g, b)

of x [B, R, J, C] in 16 bits, C = 128, 192 or 256. The same arithmetic as in the two plain kernels:
z and h are rounded to the dtype of x, sums are in fp32.

A program has two or three consumers, each for a tile of 64 pairs of one row, whose z it writes over
x in shared memory. All weights stream past once for all consumers, 64 hidden channels a step: the
projections of z to them, which a consumer gates in its registers, and their part of the output,
which it keeps there too. Consumers take turns at the matrix unit: in its turn one multiplies the
hidden channels of the step before and makes the next, in the others' it computes its gates.

Behind a tile's weights its residual comes through the same ring of stages; the output is written
over it and stored from there. A tile's x and residual have been read before its output is written,
so that the output may be the memory of either.

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .._call import Transition, TransitionWeights
from ..triton_parts.device import device_target
from ..triton_parts.launch import Launches, PreparedLaunch, has_descriptor, pointers, strides
from ..triton_parts.settings import LaunchConfig
from .gated_rows import load_rows
from .padding import fill_padding
from .parts import (
    REGISTERS,
    ROWS,
    STEP,
    Tiles,
    advance,
    barriers,
    behind,
    count_tiles,
    halves,
    load_tile,
    lower,
    next_tile,
    parts_of,
    place_of,
    shared_layout,
    sigmoid,
    statistics,
    store_tile,
    tile_at,
    tma_descriptor,
    upper,
    viewed,
)

_STEP = gl.constexpr(STEP)


@gluon.jit
def normalise(
    x_slots, eps, norm_weight_ptr, norm_bias_ptr, hat_ptr, moments, row, inside,
    C: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """z over the rows of x of a consumer.

    If there are `moments`, (pointer to means, to rstds), those of the first `inside` rows are
    stored as row `row` and following, and x^ [..., C] too if there is a `hat_ptr`.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    mean, rstd = statistics(x_slots, ME, eps, C, False, LAYOUT)
    if moments is not None:
        offs = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
        stored = offs < inside
        gl.store(moments[0] + row + offs, mean, mask=stored)
        gl.store(moments[1] + row + offs, rstd, mask=stored)
    for k in range(C // _STEP):
        slot = x_slots.index(ME * (C // _STEP) + k)
        z = (slot.load(LAYOUT).to(gl.float32) - mean.expand_dims(1)) * rstd.expand_dims(1)
        channels = k * _STEP + gl.arange(0, _STEP, layout=gl.SliceLayout(0, LAYOUT))
        if hat_ptr is not None:
            ptrs = hat_ptr + (row + offs).expand_dims(1) * C + channels.expand_dims(0)
            gl.store(ptrs, z.to(x_slots.dtype), mask=stored.expand_dims(1))
        if norm_weight_ptr is not None:
            z = z * gl.load(norm_weight_ptr + channels).to(gl.float32).expand_dims(0)
        if norm_bias_ptr is not None:
            z = z + gl.load(norm_bias_ptr + channels).to(gl.float32).expand_dims(0)
        slot.store(z.to(x_slots.dtype))
    fence_async_shared()


@gluon.jit
def _project(
    x_slots, ring, full, stage, phase, C: gl.constexpr, ME: gl.constexpr
):  # fmt: skip
    """The product of z with both projections to a step's hidden channels, side by side."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * _STEP, 16])
    acc = gl.zeros([64, 2 * _STEP], gl.float32, ACC)
    for k in gl.static_range(C // _STEP):
        mbarrier.wait(full.index(stage), phase)
        weight = ring.index(stage).permute((1, 0))
        rows = x_slots.index(ME * (C // _STEP) + k)
        acc = warpgroup_mma(rows, weight, acc, use_acc=k > 0, is_async=True)
        stage, phase = advance(stage, phase, ring.shape[0])
    return acc, stage, phase


@gluon.jit
def projections(acc, up_bias_ptr, gate_bias_ptr, step):
    """u and p at a step's hidden channels, of z's products with both projections."""
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    up, gate = halves(acc, HALF)
    channels = step * _STEP + gl.arange(0, _STEP, layout=gl.SliceLayout(0, HALF))
    if up_bias_ptr is not None:
        up = up + gl.load(up_bias_ptr + channels).to(gl.float32).expand_dims(0)
    if gate_bias_ptr is not None:
        gate = gate + gl.load(gate_bias_ptr + channels).to(gl.float32).expand_dims(0)
    return up, gate


@gluon.jit
def _gate(acc, held, up_bias_ptr, gate_bias_ptr, step, HELD: gl.constexpr, DTYPE: gl.constexpr):
    """A step's hidden channels, as a left operand in registers, or in the memory `held`."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * _STEP, 16])
    up, gate = projections(acc, up_bias_ptr, gate_bias_ptr, step)
    gated = up * gate * sigmoid(gate)
    if not HELD:
        A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
        return gl.convert_layout(gated.to(DTYPE), A, assert_trivial=True)
    else:
        held.store(gated.to(DTYPE))
        fence_async_shared()
        return held


@gluon.jit
def _add(hidden, out, ring, full, stage, phase, use_out):
    """out + hidden Wd^T of a step, in blocks of 128 columns; `use_out` is whether out is added."""
    made = ()
    for n in gl.static_range(len(out)):
        mbarrier.wait(full.index(stage), phase)
        weight = ring.index(stage).permute((1, 0))
        block = warpgroup_mma(hidden, weight, out[n], use_acc=use_out, is_async=True)
        made = made + (block,)
        stage, phase = advance(stage, phase, ring.shape[0])
    return made, stage, phase


@gluon.jit
def free(empty, stage, START: gl.constexpr, COUNT: gl.constexpr, STAGES: gl.constexpr):
    """COUNT stages of the ring, from the START-th behind `stage` on, may be overwritten."""
    for k in gl.static_range(START, START + COUNT):
        mbarrier.arrive(empty.index(behind(stage, k, STAGES)), count=1)


@gluon.jit
def half(slot, WHICH: gl.constexpr, LAYOUT: gl.constexpr):
    """The lower or upper 64 rows of a stage of the ring."""
    return viewed(slot, [2, _STEP, _STEP], LAYOUT).index(WHICH)


@gluon.jit
def _place(index, entry, base, lengths_ptr, B, R, J, per_row):
    """(entry, row, first column, base, length) of a tile; see `place_of`."""
    return place_of(index, entry, base, lengths_ptr, (0, 0), B, R, J, per_row, 1)


@gluon.jit
def _count(tiles, lengths_ptr, pairs, CONSUMERS: gl.constexpr):
    """How many times all consumers have a tile. Each warp counts: a number from outside spills."""
    if lengths_ptr is None:
        return tiles
    else:
        found = count_tiles(lengths_ptr, (0, 0), pairs[0], pairs[1], pairs[2], 1)
        return (found + CONSUMERS - 1) // CONSUMERS


@gluon.jit
def _consume(
    memory, turns, out, parameters, eps, lengths_ptr, pairs,
    C: gl.constexpr, STEPS: gl.constexpr, CONSUMERS: gl.constexpr, RESIDUAL: gl.constexpr,
    ME: gl.constexpr,
):  # fmt: skip
    """One consumer: every CONSUMERS-th tile of 64 pairs."""
    x_slots, x_full, x_empty, ring, full, empty, held_slots = memory
    STAGES: gl.constexpr = ring.shape[0]
    DTYPE: gl.constexpr = ring.dtype
    LAYOUT: gl.constexpr = x_slots.layout
    OUT_LAYOUT: gl.constexpr = out.layout
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * _STEP, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    PARTS: gl.constexpr = C // _STEP
    BLOCKS: gl.constexpr = (PARTS + 1) // 2
    NEXT: gl.constexpr = (ME + 1) % CONSUMERS
    B, R, J, _, per_row, tiles = pairs
    tiles = _count(tiles, lengths_ptr, pairs, CONSUMERS)
    norm_weight_ptr, norm_bias_ptr, up_bias_ptr, gate_bias_ptr, down_bias_ptr = parameters
    held = held_slots.index(ME)
    stage = 0
    phase = 0
    tile_phase = 0
    turn_phase = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        if lengths_ptr is not None:
            # Where the tile lies, in two numbers, for which the steps have registers: its row, and
            # its first column and how many are no padding.
            entry, i, start, _, length = next_tile(
                tile * CONSUMERS + ME, gl.to_tensor(0), gl.to_tensor(0), lengths_ptr, (0, 0),
                B, R, J, 1,
            )  # fmt: skip
            row = entry * R + i
            columns = start * 2 + gl.minimum(gl.maximum(length - start, 0), 64)
        mbarrier.wait(x_full.index(ME), tile_phase)
        tile_phase ^= 1
        normalise(x_slots, eps, norm_weight_ptr, norm_bias_ptr, None, None, 0, 0, C, ME)
        mbarrier.wait(turns.index(ME), turn_phase)
        turn_phase ^= 1
        begun = stage
        acc, stage, phase = _project(x_slots, ring, full, stage, phase, C, ME)
        mbarrier.arrive(turns.index(NEXT), count=1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        free(empty, begun, 0, PARTS, STAGES)
        hidden = _gate(acc, held, up_bias_ptr, gate_bias_ptr, 0, CONSUMERS == 3, DTYPE)
        parts = ()
        for _n in gl.static_range(BLOCKS):
            parts = parts + (gl.zeros([64, 2 * _STEP], gl.float32, ACC),)
        for step in range(1, STEPS):
            mbarrier.wait(turns.index(ME), turn_phase)
            turn_phase ^= 1
            begun = stage
            parts, stage, phase = _add(hidden, parts, ring, full, stage, phase, step > 1)
            acc, stage, phase = _project(x_slots, ring, full, stage, phase, C, ME)
            mbarrier.arrive(turns.index(NEXT), count=1)
            found = warpgroup_mma_wait(PARTS, deps=(acc,) + parts)
            free(empty, begun, 0, BLOCKS, STAGES)
            found = warpgroup_mma_wait(PARTS // 2, deps=found)
            free(empty, begun, BLOCKS, PARTS - PARTS // 2, STAGES)
            found = warpgroup_mma_wait(0, deps=found)
            free(empty, begun, BLOCKS + PARTS - PARTS // 2, PARTS // 2, STAGES)
            acc = found[0]
            parts = found[1:]
            made = _gate(acc, held, up_bias_ptr, gate_bias_ptr, step, CONSUMERS == 3, DTYPE)
            if CONSUMERS == 2:
                hidden = made
        mbarrier.arrive(x_empty.index(ME), count=1)
        mbarrier.wait(turns.index(ME), turn_phase)
        turn_phase ^= 1
        begun = stage
        parts, stage, phase = _add(hidden, parts, ring, full, stage, phase, STEPS > 1)
        mbarrier.arrive(turns.index(NEXT), count=1)
        if BLOCKS == 1:
            parts = (warpgroup_mma_wait(0, deps=parts),)
        else:
            parts = warpgroup_mma_wait(0, deps=parts)
        free(empty, begun, 0, BLOCKS, STAGES)
        if lengths_ptr is None:
            entry, i, start = tile_at(tile * CONSUMERS + ME, R, per_row)
        else:
            entry = row // R
            i = row - entry * R
            start = columns // 128 * 64
        updates = ()
        for n in gl.static_range(BLOCKS):
            updates = updates + parts_of(parts[n])
        begun = stage
        for one in gl.static_range(PARTS * CONSUMERS // 2):
            mbarrier.wait(full.index(stage), phase)
            for part in gl.static_range(PARTS):
                if (part * CONSUMERS + ME) // 2 == one:
                    update = updates[part]
                    if down_bias_ptr is not None:
                        channels = part * _STEP
                        channels += gl.arange(0, _STEP, layout=gl.SliceLayout(0, PART))
                        bias = gl.load(down_bias_ptr + channels).to(gl.float32)
                        update = update + bias.expand_dims(0)
                    if lengths_ptr is not None:
                        # Beyond the length the operands may be NaN.
                        j = gl.arange(0, 64, layout=gl.SliceLayout(1, PART))
                        update = gl.where((j < columns % 128).expand_dims(1), update, 0.0)
                    made = half(ring.index(stage), (part * CONSUMERS + ME) % 2, LAYOUT)
                    if RESIDUAL:
                        update = update + made.load(PART).to(gl.float32)
                    made.store(update.to(DTYPE))
                    fence_async_shared()
                    store_tile(
                        out, [entry, i, start, part * _STEP],
                        viewed(made, [1, 1, 64, _STEP], OUT_LAYOUT),
                    )  # fmt: skip
                    if part > 0:  # the part before has left its memory
                        tma.store_wait(1)
                        free(empty, begun, ((part - 1) * CONSUMERS + ME) // 2, 1, STAGES)
            if (one * 2 % CONSUMERS != ME) & ((one * 2 + 1) % CONSUMERS != ME):
                free(empty, begun, one, 1, STAGES)
            stage, phase = advance(stage, phase, STAGES)
        tma.store_wait(0)
        free(empty, begun, ((PARTS - 1) * CONSUMERS + ME) // 2, 1, STAGES)


@gluon.jit
def load_projections(
    up_weight, gate_weight, ring, full, empty, stage, phase, step, C: gl.constexpr
):  # fmt: skip
    """The rows of both projections for a step's hidden channels, 64 summed channels a stage."""
    for k in gl.static_range(C // _STEP):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        both = ring.index(stage)
        low, high = lower(both), upper(both)
        mbarrier.expect(bar, 2 * _STEP * _STEP * 2)
        load_tile(up_weight, [step * _STEP, k * _STEP], bar, low)
        load_tile(gate_weight, [step * _STEP, k * _STEP], bar, high)
        stage, phase = advance(stage, phase, ring.shape[0])
    return stage, phase


@gluon.jit
def load_down(down_weight, ring, full, empty, stage, phase, step, BLOCKS: gl.constexpr):
    """Their columns of the last projection, 128 rows a stage."""
    for n in gl.static_range(BLOCKS):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), 2 * _STEP * _STEP * 2)
        load_tile(down_weight, [n * 2 * _STEP, step * _STEP], full.index(stage), ring.index(stage))
        stage, phase = advance(stage, phase, ring.shape[0])
    return stage, phase


@gluon.jit
def _load_weights(
    up_weight, gate_weight, down_weight, residual, memory, lengths_ptr, pairs,
    C: gl.constexpr, STEPS: gl.constexpr, CONSUMERS: gl.constexpr, RESIDUAL: gl.constexpr,
):  # fmt: skip
    """All weights once for the consumers' tiles, in the order of the products.

    Behind them come the tiles' residuals, 64 rows of 64 channels a half of a stage, or memory for
    their outputs.
    """
    x_slots, _, _, ring, full, empty, _ = memory
    PARTS: gl.constexpr = C // _STEP
    BLOCKS: gl.constexpr = (PARTS + 1) // 2
    STAGES: gl.constexpr = ring.shape[0]
    B, R, J, _, per_row, tiles = pairs
    tiles = _count(tiles, lengths_ptr, pairs, CONSUMERS)
    stage = 0
    phase = 1
    at = 0
    base = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for step in range(STEPS + 1):
            if step > 0:
                stage, phase = load_down(
                    down_weight, ring, full, empty, stage, phase, step - 1, BLOCKS
                )
            if step < STEPS:
                stage, phase = load_projections(
                    up_weight, gate_weight, ring, full, empty, stage, phase, step, C
                )
        if RESIDUAL:
            LAYOUT: gl.constexpr = residual.layout
            HALF_LAYOUT: gl.constexpr = x_slots.layout
            for one in range(PARTS * CONSUMERS // 2):
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(full.index(stage), 2 * _STEP * _STEP * 2)
                for which in gl.static_range(2):
                    piece = one * 2 + which
                    last, i, start, first, _ = _place(
                        tile * CONSUMERS + piece % CONSUMERS, at, base, lengths_ptr, B, R, J,
                        per_row,
                    )  # fmt: skip
                    made = half(ring.index(stage), which, HALF_LAYOUT)
                    load_tile(
                        residual, [last, i, start, piece // CONSUMERS * _STEP], full.index(stage),
                        viewed(made, [1, 1, 64, _STEP], LAYOUT),
                    )  # fmt: skip
                stage, phase = advance(stage, phase, STAGES)
            at, _, _, base, _ = _place(
                tile * CONSUMERS, at, base, lengths_ptr, B, R, J, per_row
            )
        else:
            for _ in range(PARTS * CONSUMERS // 2):
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.arrive(full.index(stage), count=1)
                stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _load_rows(
    x, x_slots, x_full, x_empty, lengths_ptr, pairs, C: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    """The consumers' tiles of x."""
    B, R, J, pitch, per_row, tiles = pairs
    tiles = _count(tiles, lengths_ptr, pairs, CONSUMERS)
    pairs = B, R, J, pitch, per_row, tiles
    lengths = lengths_ptr, (0, 0)
    load_rows(x, x_slots, x_full, x_empty, lengths, pairs, C, CONSUMERS, CONSUMERS, False)


@gluon.jit(
    do_not_specialize=[
        "up_bias_ptr", "gate_bias_ptr", "down_bias_ptr", "lengths_ptr", "eps", "B", "R", "J",
        "per_row", "tiles",
    ]
)  # fmt: skip
def _transition_hopper_kernel(
    x, up_weight, gate_weight, down_weight, residual, out,
    norm_weight_ptr, norm_bias_ptr, up_bias_ptr, gate_bias_ptr, down_bias_ptr, lengths_ptr,
    eps, B, R, J, per_row, tiles,
    C: gl.constexpr, H: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    RESIDUAL: gl.constexpr, REGISTERS: gl.constexpr, LAYOUT: gl.constexpr,
    RING_LAYOUT: gl.constexpr,
):  # fmt: skip
    """All C channels of B * R * per_row tiles of 64 pairs, CONSUMERS at a time; H hidden channels.

    With lengths, of those that are not padding alone.
    """
    STEPS: gl.constexpr = H // _STEP
    DTYPE: gl.constexpr = x.dtype
    x_slots = gl.allocate_shared_memory(DTYPE, [CONSUMERS * C // _STEP, 64, _STEP], LAYOUT)
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, 2 * _STEP, _STEP], RING_LAYOUT)
    held = x_slots
    if CONSUMERS == 3:  # which have no registers for the hidden channels of a step
        held = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 64, _STEP], LAYOUT)
    x_full = barriers(CONSUMERS, 1)
    x_empty = barriers(CONSUMERS, 1)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, CONSUMERS)
    turns = barriers(CONSUMERS, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    pairs = B, R, J, J, per_row, tiles
    parameters = norm_weight_ptr, norm_bias_ptr, up_bias_ptr, gate_bias_ptr, down_bias_ptr
    memory = x_slots, x_full, x_empty, ring, full, empty, held
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (
                memory, turns, out, parameters, eps, lengths_ptr, pairs,
                C, STEPS, CONSUMERS, RESIDUAL, 0,
            )),
            (_consume, (
                memory, turns, out, parameters, eps, lengths_ptr, pairs,
                C, STEPS, CONSUMERS, RESIDUAL, 1,
            )),
            (_load_weights, (
                up_weight, gate_weight, down_weight, residual, memory, lengths_ptr, pairs,
                C, STEPS, CONSUMERS, RESIDUAL,
            )),
            (_load_rows, (x, x_slots, x_full, x_empty, lengths_ptr, pairs, C, CONSUMERS)),
        ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                memory, turns, out, parameters, eps, lengths_ptr, pairs,
                C, STEPS, CONSUMERS, RESIDUAL, 0,
            )),
            (_consume, (
                memory, turns, out, parameters, eps, lengths_ptr, pairs,
                C, STEPS, CONSUMERS, RESIDUAL, 1,
            )),
            (_consume, (
                memory, turns, out, parameters, eps, lengths_ptr, pairs,
                C, STEPS, CONSUMERS, RESIDUAL, 2,
            )),
            (_load_weights, (
                up_weight, gate_weight, down_weight, residual, memory, lengths_ptr, pairs,
                C, STEPS, CONSUMERS, RESIDUAL,
            )),
            (_load_rows, (x, x_slots, x_full, x_empty, lengths_ptr, pairs, C, CONSUMERS)),
        ], [4, 4, 1, 1], [REGISTERS, REGISTERS, 24, 24])  # fmt: skip


def takes(call: Transition) -> bool:
    """Whether a whole transition can run here; x is among `hopper.variants`'s."""
    return takes_weights(call) and (call.residual is None or has_descriptor(call.residual))


def takes_weights(call: Transition) -> bool:
    """Whether the weights can be loaded in steps of hidden channels."""
    weights = call.weights
    return call.hidden % STEP == 0 and all([
        has_descriptor(weight)
        for weight in (weights.up_weight, weights.gate_weight, weights.down_weight)
    ])


def descriptors_of(weights: TransitionWeights) -> dict[str, TensorDescriptor]:
    """For `load_projections` and `load_down`."""
    tiles = {"up_weight": STEP, "gate_weight": STEP, "down_weight": 2 * STEP}
    made = {}
    for name, rows in tiles.items():
        weight = getattr(weights, name)
        made[name] = tma_descriptor(weight, weight.shape, weight.stride(), [rows, STEP])
    return made


def prepare(call: Transition, config: LaunchConfig) -> PreparedLaunch:
    """The launch for calls like this one.

    Raises:
        ValueError: a setting whose ring is too short, or with half a stage left of outputs.
    """
    x, residual, weights = call.x, call.residual, call.weights
    batch, rows, columns, channels = x.shape
    parts, consumers = channels // STEP, config.block_m // ROWS
    if config.num_stages < parts + (parts + 1) // 2 or parts * consumers % 2:
        raise ValueError(
            f"the setting must have as many stages as a turn's products take, and an even number "
            f"of parts for {channels} channels; got {config}"
        )
    made = [rows * columns * channels, columns * channels, channels, 1]
    all_strides = [strides(x), made if residual is None else strides(residual)]
    tiles = Tiles.over(batch, rows, columns, all_strides, call.lengths is not None)
    values = tiles.values(consumers)

    return PreparedLaunch(
        _transition_hopper_kernel,
        min(values["tiles"], device_target(x.device).multiprocessors),
        tensors={
            **pointers(
                "norm_weight_ptr", "norm_bias_ptr", "up_bias_ptr", "gate_bias_ptr",
                "down_bias_ptr", "lengths_ptr",
            ),
            "x": tiles.descriptor(x, all_strides[0], channels, STEP),
            **descriptors_of(weights),
            "residual": None if residual is None
            else tiles.descriptor(residual, all_strides[1], channels, STEP),
            "out": tiles.descriptor(x, made, channels, STEP),
        },
        values=dict(eps=call.eps, **values),
        constants=dict(
            C=channels, H=call.hidden, STAGES=config.num_stages, CONSUMERS=consumers,
            RESIDUAL=residual is not None, REGISTERS=REGISTERS[consumers][1],
            LAYOUT=shared_layout([ROWS, STEP]), RING_LAYOUT=shared_layout([2 * STEP, STEP]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[consumers][0]),
        stage="transition",
        variant="hopper",
    )  # fmt: skip


def launch(call: Transition, launches: Launches, prepared: PreparedLaunch, out: Tensor) -> None:
    """Fills out; `prepared` is from `prepare`."""
    weights = call.weights
    prepared.launch(
        x=call.x,
        up_weight=weights.up_weight,
        gate_weight=weights.gate_weight,
        down_weight=weights.down_weight,
        residual=call.residual,
        out=out,
        norm_weight_ptr=weights.norm_weight,
        norm_bias_ptr=weights.norm_bias,
        up_bias_ptr=weights.up_bias,
        gate_bias_ptr=weights.gate_bias,
        down_bias_ptr=weights.down_bias,
        lengths_ptr=call.lengths,
    )
    if call.lengths is not None:
        fill_padding(call, launches, prepared, out, 0)
