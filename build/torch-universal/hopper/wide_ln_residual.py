"""Stage 3 on Hopper GPUs above 256 channels: see `fused_ln_residual`, whose arithmetic it has.

    gates = sigmoid(z Wo^T + bo)                                       z = LayerNorm(x[b, i, j])
    out   = residual + drop_mask * (t We^T + be) * gates               16 bits, C = D
            t = LayerNorm(product[b, :, i, j])

A consumer's registers hold the rows of x or those of the product, not both. So the kernel runs
twice, and the gates lie in memory like the output's between. They are float16, as in the plain
kernel's registers, and 2^15 times as large, so that those down to 2^-29 keep all digits.

Both norms are folded into the weights (see `folded_norm`): the product is multiplied as the planes
that it is, and x as it came. The moments of x are stage 1's, those of the product are computed
here.

A program has two consumers, each for a tile of 64 pairs of one row, which it keeps in registers. A
projection streams past once for both, as two of half its channels each. Gates are loaded into the
memory from which the output is stored; the residual has no room there. It is read by the threads
that write over it, so that it may be the memory of the output.

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

from .._call import Call
from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    Launches,
    PreparedLaunch,
    named_strides,
    pointers,
    strides,
)
from ..triton_parts.settings import LaunchConfig
from .folded_norm import EXTRA, Folds
from .ln_residual import load_drop, load_moments, planes_of, tiles_of
from .ln_residual import takes as takes
from .padding import fill_padding
from .parts import (
    LOG2_E,
    REGISTERS,
    ROWS,
    barriers,
    count_tiles,
    free_weights,
    halves,
    load_parts,
    load_tile,
    load_weights,
    part_of,
    place_of,
    ready,
    reciprocal,
    shared_layout,
    statistics_of_wide,
    store_tile,
    viewed,
    weight_tiles,
)

_EXTRA = gl.constexpr(EXTRA)
_GATE_SCALE = gl.constexpr(2.0**15)


@gluon.jit
def _consume(
    common, C: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    EMITS: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """One consumer: all C channels of every other tile of 64 pairs."""
    memory, blocks, loaded, freed, turns, out, further_ptrs, lengths, eps, pairs, strides = common
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    AT_ROWS: gl.constexpr = gl.SliceLayout(1, HALF)
    N: gl.constexpr = C // 2
    FIRST: gl.constexpr = ME * SLOTS
    slots, ring, extras = memory
    block_slots, block_full, block_empty = blocks
    rows_full, ring_full = loaded
    rows_empty, ring_empty = freed
    moments_ptr, residual_ptr, drop_ptr, factors_ptr = further_ptrs
    moments_strides, residual_strides, drop_strides = strides
    B, R, J, per_row, tiles = pairs
    lengths_ptr, first = lengths
    zero = gl.zeros([64, 2 * BLOCK_N], gl.float32, ACC)
    stage = 0
    phase = 0
    tile_phase = 0
    turn_phase = 0
    count = 0
    at = 0
    base = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        entry, i, start, base, length = place_of(
            tile * 2 + ME, at, base, lengths_ptr, first, B, R, J, per_row, 1
        )
        at = entry
        if EMITS:
            mbarrier.wait(rows_full.index(ME), tile_phase)
            mean, rstd = statistics_of_wide(slots, 0, eps, C, True, A)
        else:
            j = start + gl.arange(0, 64, layout=gl.SliceLayout(1, A))
            inside = (j < J) & (entry < B)
            mean, rstd = load_moments(moments_ptr, moments_strides, entry, i, j, inside)
            mbarrier.wait(rows_full.index(ME), tile_phase)
        tile_phase ^= 1
        rows, further, scale = ready(slots, 0, mean, rstd, eps, C, EMITS, A)
        fence_async_shared()
        mbarrier.arrive(rows_empty.index(0), count=1)
        scale = gl.convert_layout(scale, AT_ROWS) * (1.0 / _GATE_SCALE if EMITS else -LOG2_E)
        columns = start + gl.arange(0, 64, layout=AT_ROWS)
        within = ((columns < J) & (entry < B)).expand_dims(1)
        at_residual = entry.to(gl.int64) * residual_strides[0]
        at_residual = at_residual + i.to(gl.int64) * residual_strides[1]
        at_residual = at_residual + columns.to(gl.int64) * residual_strides[2]
        for step in range(N // BLOCK_N):
            # The block before leaves its memory while the other consumer's products run.
            tma.store_wait(0)
            if EMITS:
                before = FIRST + (count + SLOTS - 1) % SLOTS
                mbarrier.arrive(block_empty.index(before), count=1, pred=count > 0)
            low_scale, high_scale = scale, scale
            if factors_ptr is not None:
                low_scale = scale * gl.load(factors_ptr + step)
                high_scale = scale * gl.load(factors_ptr + N // BLOCK_N + step)
            mbarrier.wait(ring_full.index(stage), phase)
            mbarrier.wait(turns.index(ME), turn_phase)
            turn_phase ^= 1
            acc = warpgroup_mma(
                further, extras.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            PARTS: gl.constexpr = ring.shape[0] // STAGES
            for k in gl.static_range(PARTS):
                weight = ring.index(stage * PARTS + k).permute((1, 0))
                acc = warpgroup_mma(rows[k], weight, acc, is_async=True)
            mbarrier.arrive(turns.index(1 - ME), count=1)
            place = FIRST + count % SLOTS
            residuals = ()
            if residual_ptr is not None:
                for half in gl.static_range(2):
                    channels = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, HALF))
                    offs = (half * N + step * BLOCK_N + channels).expand_dims(0)
                    offs = at_residual.expand_dims(1) + offs
                    residuals = residuals + (gl.load(residual_ptr + offs, mask=within, other=0.0),)
            if EMITS:
                mbarrier.wait(block_full.index(place), count // SLOTS & 1)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            stage, phase = free_weights(ring_empty, stage, phase, STAGES, N // BLOCK_N)
            low, high = halves(acc, HALF)
            low = low * low_scale.expand_dims(1)
            high = high * high_scale.expand_dims(1)
            for half in gl.static_range(2):
                slot = block_slots.index(2 * place + half)
                made = low if half == 0 else high
                if EMITS:
                    made = made * slot.load(HALF).to(gl.float16, bitcast=True).to(gl.float32)
                    if drop_ptr is not None:
                        channels = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, HALF))
                        channels = half * N + step * BLOCK_N + channels
                        made = made * load_drop(
                            drop_ptr, drop_strides, entry, columns, channels, within
                        )
                    if lengths_ptr is not None:
                        # Beyond the length the operands may be NaN.
                        made = gl.where((first[1] + columns < length).expand_dims(1), made, 0.0)
                    if residual_ptr is not None:
                        made = made + residuals[half].to(gl.float32)
                    slot.store(made.to(block_slots.dtype))
                else:  # exp2 of this is exp of the negative argument of the sigmoid
                    made = reciprocal(1.0 + gl.exp2(made)) * _GATE_SCALE
                    slot.store(made.to(gl.float16).to(block_slots.dtype, bitcast=True))
            fence_async_shared()
            OUT_LAYOUT: gl.constexpr = out.layout
            for half in gl.static_range(2):
                made = viewed(block_slots.index(2 * place + half), [1, 1, 64, BLOCK_N], OUT_LAYOUT)
                store_tile(out, [entry, i, start, half * N + step * BLOCK_N], made)
            count += 1
    tma.store_wait(0)


@gluon.jit
def _load_rows(
    rows, slots, full, empty, lengths, pairs, C: gl.constexpr, EMITS: gl.constexpr
):  # fmt: skip
    """Both consumers' tiles, of x or of the product's planes, through one slot."""
    B, R, J, per_row, tiles = pairs
    lengths_ptr, first = lengths
    phase = 1
    at = 0
    base = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for me in range(2):
            entry, i, start, base, _ = place_of(
                tile * 2 + me, at, base, lengths_ptr, first, B, R, J, per_row, 1
            )
            at = entry
            mbarrier.wait(empty.index(0), phase)
            phase ^= 1
            load_parts(rows, slots, 0, full.index(me), entry, i, start, C, EMITS)


@gluon.jit
def _load_gates(
    gates, slots, full, empty, lengths, pairs,
    C: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, EMITS: gl.constexpr,
):  # fmt: skip
    """Both consumers' blocks of the gates, into the memory of the output."""
    if EMITS:
        LAYOUT: gl.constexpr = gates.layout
        N: gl.constexpr = C // 2
        B, R, J, per_row, tiles = pairs
        lengths_ptr, first = lengths
        count = 0
        at = 0
        base = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            places = ()
            for me in gl.static_range(2):
                entry, i, start, base, _ = place_of(
                    tile * 2 + me, at, base, lengths_ptr, first, B, R, J, per_row, 1
                )
                at = entry
                places = places + ((entry, i, start),)
            for step in range(N // BLOCK_N):
                for me in gl.static_range(2):
                    entry, i, start = places[me]
                    place = me * SLOTS + count % SLOTS
                    bar = full.index(place)
                    mbarrier.wait(empty.index(place), count // SLOTS & 1 ^ 1)
                    mbarrier.expect(bar, 2 * 64 * BLOCK_N * 2)
                    for half in gl.static_range(2):
                        slot = viewed(slots.index(2 * place + half), [1, 1, 64, BLOCK_N], LAYOUT)
                        load_tile(gates, [entry, i, start, half * N + step * BLOCK_N], bar, slot)
                count += 1


@gluon.jit(
    do_not_specialize=[
        "moments_ptr", "drop_ptr", "factors_ptr", "lengths_ptr", "first_i", "eps",
        "B", "R", "J", "per_row", "tiles",
        "stride_moments_b", "stride_moments_n", "stride_moments_i", "stride_moments_j",
        "stride_drop_b", "stride_drop_j", "stride_drop_c",
    ]
)  # fmt: skip
def _wide_ln_residual_hopper_kernel(
    rows, weights, further, gates, out, moments_ptr, residual_ptr, drop_ptr, factors_ptr,
    lengths_ptr, first_i, eps, B, R, J, per_row, tiles,
    stride_moments_b, stride_moments_n, stride_moments_i, stride_moments_j,
    stride_residual_b, stride_residual_i, stride_residual_j,
    stride_drop_b, stride_drop_j, stride_drop_c,
    C: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    EMITS: gl.constexpr, REGISTERS: gl.constexpr,
    ROWS_LAYOUT: gl.constexpr, OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """All C channels of B * R * per_row tiles of 64 pairs, two at a time.

    EMITS the output from the product and the gates, or makes the gates of x. With lengths, of tiles
    that are not padding alone; row i is row first_i + i of its sequence.
    """
    DTYPE: gl.constexpr = weights.dtype
    PART: gl.constexpr = weights.block_shape[1]
    PARTS: gl.constexpr = C // PART
    shape: gl.constexpr = [PARTS, PART, 64] if EMITS else [PARTS, 64, PART]
    slots = gl.allocate_shared_memory(DTYPE, shape, ROWS_LAYOUT)
    ring = gl.allocate_shared_memory(DTYPE, [STAGES * PARTS, 2 * BLOCK_N, PART], weights.layout)
    extras = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * BLOCK_N, _EXTRA], further.layout)
    block_slots = gl.allocate_shared_memory(DTYPE, [4 * SLOTS, 64, BLOCK_N], OUT_LAYOUT)
    blocks = block_slots, barriers(2 * SLOTS, 1), barriers(2 * SLOTS, 1)
    loaded = barriers(2, 1), barriers(STAGES, 1)
    freed = barriers(1, 1), barriers(STAGES, 2)
    turns = barriers(2, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    memory = slots, ring, extras
    lengths = lengths_ptr, (first_i, 0)
    if lengths_ptr is not None:
        tiles = (count_tiles(lengths_ptr, lengths[1], B, R, J, 1) + 1) // 2
    pairs = B, R, J, per_row, tiles
    further_ptrs = moments_ptr, residual_ptr, drop_ptr, factors_ptr
    strides = (
        (stride_moments_b, stride_moments_n, stride_moments_i, stride_moments_j),
        (stride_residual_b, stride_residual_i, stride_residual_j),
        (stride_drop_b, stride_drop_j, stride_drop_c),
    )
    common = memory, blocks, loaded, freed, turns, out, further_ptrs, lengths, eps, pairs, strides
    gl.warp_specialize([
        (_consume, (common, C, BLOCK_N, STAGES, SLOTS, EMITS, 0)),
        (_consume, (common, C, BLOCK_N, STAGES, SLOTS, EMITS, 1)),
        (load_weights, (
            weights, further, ring, extras, loaded[1], freed[1], tiles, C // 2, BLOCK_N, STAGES,
        )),
        (_load_rows, (rows, slots, loaded[0], freed[0], lengths, pairs, C, EMITS)),
        (_load_gates, (
            gates, blocks[0], blocks[1], blocks[2], lengths, pairs, C, BLOCK_N, SLOTS, EMITS,
        )),
    ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip


def prepare(
    call: Call, product: Tensor, moments: Tensor, first_row: int, config: LaunchConfig
) -> PreparedLaunch:
    """The launch for the output, of calls like this one; see `fused_ln_residual`."""
    constants = dict(BLOCK_N=config.block_n, STAGES=config.num_stages, SLOTS=config.split)
    return _prepare(call, product, moments, first_row, constants, True)


def _prepare(
    call: Call,
    product: Tensor,
    moments: Tensor,
    first_row: int,
    setting: dict[str, int],
    emits: bool,
) -> PreparedLaunch:
    x, residual, drop_mask = call.x, call.residual, call.drop_mask
    rows, length, channels = x.shape[1:]
    made = [rows * length * channels, length * channels, channels, 1]
    tiles, part, block_n = tiles_of(call, product, moments), part_of(channels), setting["BLOCK_N"]
    values, like = tiles.values(2), tiles.descriptor(x, made, channels, block_n)
    if emits:
        given = planes_of(product, tiles, part)
    else:
        given = tiles.descriptor(x, strides(x), channels, part)
    residual_strides = (0, 0, 0) if residual is None else strides(residual)[:3]
    drop_strides = (0, 0, 1) if drop_mask is None else strides(drop_mask)
    return PreparedLaunch(
        _wide_ln_residual_hopper_kernel,
        min(values["tiles"], device_target(x.device).multiprocessors),
        tensors={
            **pointers("moments_ptr", "residual_ptr", "drop_ptr", "factors_ptr", "lengths_ptr"),
            **weight_tiles(x, channels // 2, block_n),
            "rows": given, "gates": like if emits else None, "out": like,
        },
        values=dict(
            eps=call.eps_out if emits else call.eps_in,
            first_i=None if call.lengths is None else first_row,
            **values,
            **named_strides("moments", "bnij", moments.stride()),
            **named_strides("residual", "bij", residual_strides),
            **named_strides("drop", "bjc", drop_strides),
        ),
        constants=dict(
            C=channels, **setting, EMITS=emits, REGISTERS=REGISTERS[2][1],
            ROWS_LAYOUT=shared_layout([part, ROWS] if emits else [ROWS, part]),
            OUT_LAYOUT=shared_layout([ROWS, block_n]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[2][0]),
        stage="fused_ln_residual" if emits else "fused_ln_residual_gates",
        variant="hopper",
    )  # fmt: skip


def launch(
    call: Call,
    launches: Launches,
    prepared: PreparedLaunch,
    product: Tensor,
    moments: Tensor,
    out: Tensor,
    first_row: int,
    folds: Folds,
    scratch: Tensor | None,
) -> None:
    """Fills out; `prepared` is from `prepare`. The gates lie in the scratch memory, if there is."""
    setting = {name: prepared.constants[name] for name in ("BLOCK_N", "STAGES", "SLOTS")}
    folded = folds.residual(setting["BLOCK_N"])
    emit, gate = (
        (weights, further, None if folded.factors is None else folded.factors[which])
        for which, (weights, further) in enumerate(zip(folded.weights, folded.further, strict=True))
    )
    if scratch is None:
        gates = launches.empty("gates", call.x.shape, call.x.dtype, call.x.device)
    else:
        gates = scratch.view(-1)[: call.x.numel()].view(call.x.shape)
    of_gates = launches.of(
        ("gates", prepared), _prepare, call, product, moments, first_row, setting, False
    )
    for stage, rows, given, made, (weights, further, factors) in (
        (of_gates, call.x, None, gates, gate), (prepared, product, gates, out, emit)
    ):  # fmt: skip
        emits = stage is prepared
        stage.launch(
            rows=rows,
            weights=weights,
            further=further,
            gates=given,
            out=made,
            moments_ptr=None if emits else moments,
            residual_ptr=call.residual if emits else None,
            drop_ptr=call.drop_mask if emits else None,
            factors_ptr=factors,
            lengths_ptr=call.lengths,
        )
    if call.lengths is not None:
        fill_padding(call, launches, prepared, out, first_row)
