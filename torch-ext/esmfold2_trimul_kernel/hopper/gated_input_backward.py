"""Stage 1's backward in one kernel: see `fused_dual_gemm_backward` and `input_backward`.

    x^ = (x - mean) rstd                                           x [R, L, C], bfloat16, C = D
    p = (x^ g1) Wp^T + cp, s = sigmoid((x^ g1) Wg^T + cg)          c: see `folded_norm`
    dp = dh s mask, dg = dh p mask s (1 - s)                       dh planes [2, APART, R, pitch]
    dz = dp Wp + dg Wg + dq Wo                                     in fp32 registers
    dx = rstd (g1 dz - mean(g1 dz) - x^ mean(dz x^ g1))            [R, L, C]

    rows [R*L, 4D + C] of dp, dg and dq side by side, and x^ g1 [R*L, C], if the parameters'
    gradients are wanted: then dq has left the memory that dx may overwrite

The same weights make p and dz, and dp and dg go from one to the other in registers. A program has
two consumers with a tile of 64 pairs each. For a tile it begins with dq, whose products go on while
x arrives. Then come steps of 64 hidden channels: their products with x^ g1, the gates, and their
share in dz, of which a consumer holds all channels. The weights stream past once for both tiles, 64
channels of x a stage; a step's last products free them, so that the ring has room for a step or
more. A consumer's rows come in a ring of its own, 32 channels a slot: those of dq, then those of
dh, which dp overwrites on its way out. x^ g1 is written over x, and dx over x^ g1.

For dx x^ is made of x^ g1 again. So a g1 nearer to 0 than `LEAST_SCALE` counts as that here, which
p and the gate are too coarse to show.

Each consumer is a copy of the code, and what runs once a tile is most of it. With 135 KiB of it the
kernel took an eighth longer than with 111, as if the instruction cache had to be filled for each
tile: so x^ g1 is made in a loop.

A slot of dh is freed when dp has left it, or else when a product has taken what was made of dh: a
warp that has only issued its loads may be held up behind others.
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
from ..triton_parts.launch import PreparedLaunch, has_descriptor, pointers, strides
from ..triton_parts.layer_norm import LEAST_SCALE
from ..triton_parts.settings import LaunchConfig
from .gated_rows_backward import plane_of, planes_of, tiles_of
from .parts import (
    LOG2_E,
    REGISTERS,
    ROWS,
    STEP,
    advance,
    barriers,
    behind,
    halves,
    load_tile,
    lower,
    place_in_rows,
    reciprocal,
    shared_layout,
    store_tile,
    tma_descriptor,
    upper,
    viewed,
)

_STEP = gl.constexpr(STEP)
_LEAST_SCALE = gl.constexpr(LEAST_SCALE)
_SLOT = gl.constexpr(STEP // 2)  # channels of a slot of rows
_PIECES = gl.constexpr(4)  # of _SLOT rows of weights, in a stage: two of Wp, two of Wg


@gluon.jit
def _keep_norm_weight(norm_weight_ptr, scales, PARTS: gl.constexpr):
    """g1 in `scales`, 64 channels each, and behind them the reciprocals of `_away_from_zero`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    for k in range(PARTS):
        weight = gl.full([_STEP], 1.0, gl.float32, LAYOUT)
        if norm_weight_ptr is not None:
            channels = k * _STEP + gl.arange(0, _STEP, LAYOUT)
            weight = gl.load(norm_weight_ptr + channels).to(gl.float32)
        scales.index(k).store(weight)
        scales.index(PARTS + k).store(reciprocal(_away_from_zero(weight)))


@gluon.jit
def _away_from_zero(scale):
    return gl.where(gl.abs(scale) < _LEAST_SCALE, _LEAST_SCALE, scale)


@gluon.jit
def _normalise(x_slots, mean, rstd, scales, PARTS: gl.constexpr, ME: gl.constexpr):
    """x^ g1 over a consumer's rows of x; of rows whose variance overflows, zeros."""
    LAYOUT: gl.constexpr = mean.type.layout.parent
    overflows = (rstd == 0.0).expand_dims(1)
    for k in range(PARTS):
        slot = x_slots.index(ME * PARTS + k)
        normal = (slot.load(LAYOUT).to(gl.float32) - mean.expand_dims(1)) * rstd.expand_dims(1)
        scale = scales.index(k).load(gl.SliceLayout(0, LAYOUT))
        normal *= _away_from_zero(scale).expand_dims(0)
        slot.store(gl.where(overflows, 0.0, normal).to(gl.bfloat16))
    fence_async_shared()


@gluon.jit
def _of_pairs(pointer, i, start, pairs, strides, LAYOUT: gl.constexpr):
    """One number of each pair of a tile, in fp32; 0 beyond the last."""
    j = start + gl.arange(0, 64, layout=LAYOUT)
    offs = i.to(gl.int64) * strides[0] + j.to(gl.int64) * strides[1]
    return gl.load(pointer + offs, mask=(j < pairs[1]) & (i < pairs[0]), other=0).to(gl.float32)


@gluon.jit
def _store_half(
    rows, value_slot, gate_slot, grad_value, grad_gate, i, start, column, N: gl.constexpr
):
    """Stores dp and dg of half of a step's channels, dp over their dh."""
    LAYOUT: gl.constexpr = rows.layout
    value_slot.store(grad_value)
    gate_slot.store(grad_gate)
    fence_async_shared()
    store_tile(rows, [i, start, column], viewed(value_slot, [1, 64, _SLOT], LAYOUT))
    store_tile(rows, [i, start, N + column], viewed(gate_slot, [1, 64, _SLOT], LAYOUT))


@gluon.jit
def _store_parts(out, x_slots, i, start, PARTS: gl.constexpr, ME: gl.constexpr):
    """Stores what has replaced a consumer's rows of x."""
    LAYOUT: gl.constexpr = out.layout
    for k in gl.static_range(PARTS):
        part = viewed(x_slots.index(ME * PARTS + k), [1, 64, _STEP], LAYOUT)
        store_tile(out, [i, start, k * _STEP], part)


@gluon.jit
def _add_hidden(grads, grad_z, ring, begun):
    """dz and the share of a step, whose first stage is `begun`.

    `grads` are dp and dg of the first half of the step's channels, then of the second.
    """
    LAYOUT: gl.constexpr = ring.layout
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, PART, 2)
    rows = ()
    for one in gl.static_range(4):
        rows = rows + (gl.convert_layout(grads[one], A, assert_trivial=True),)
    made = ()
    for k in gl.static_range(len(grad_z)):
        weight = ring.index(behind(begun, k, ring.shape[0]))
        weight = viewed(weight, [_PIECES, _SLOT, _STEP], LAYOUT)
        part = warpgroup_mma(rows[0], weight.index(0), grad_z[k], is_async=True)
        part = warpgroup_mma(rows[2], weight.index(1), part, is_async=True)
        part = warpgroup_mma(rows[1], weight.index(2), part, is_async=True)
        part = warpgroup_mma(rows[3], weight.index(3), part, is_async=True)
        made = made + (part,)
    return made


@gluon.jit
def _add_gate(gate, grad_z, weight):
    """dz and the share of 32 channels of dq, all of whose weights are a stage."""
    LAYOUT: gl.constexpr = weight.layout
    weight = viewed(weight, [_PIECES, _SLOT, _STEP], LAYOUT)
    made = ()
    for k in gl.static_range(len(grad_z)):
        made = made + (warpgroup_mma(gate, weight.index(k), grad_z[k], is_async=True),)
    return made


@gluon.jit
def _to_grad_x(x_slots, grad_z, rstd, scales, ME: gl.constexpr):
    """dx over a consumer's rows of x^ g1, from dz."""
    AT_PART: gl.constexpr = rstd.type.layout
    PART: gl.constexpr = AT_PART.parent
    OF_CHANNELS: gl.constexpr = gl.SliceLayout(0, PART)
    PARTS: gl.constexpr = len(grad_z)
    mean_grad = gl.zeros([64], gl.float32, AT_PART)
    mean_grad_hat = gl.zeros([64], gl.float32, AT_PART)
    for k in gl.static_range(PARTS):
        normal = x_slots.index(ME * PARTS + k).load(PART).to(gl.float32)
        mean_grad_hat += gl.sum(grad_z[k] * normal, 1)
        mean_grad += gl.sum(grad_z[k] * scales.index(k).load(OF_CHANNELS).expand_dims(0), 1)
    shift = (mean_grad * (-1.0 / (PARTS * _STEP)) * rstd).expand_dims(1)
    slope = (mean_grad_hat * (-1.0 / (PARTS * _STEP)) * rstd).expand_dims(1)
    for k in gl.static_range(PARTS):
        slot = x_slots.index(ME * PARTS + k)
        hats = slot.load(PART).to(gl.float32)
        hats *= scales.index(PARTS + k).load(OF_CHANNELS).expand_dims(0)
        part = grad_z[k] * scales.index(k).load(OF_CHANNELS).expand_dims(0)
        slot.store((part * rstd.expand_dims(1) + shift + hats * slope).to(gl.bfloat16))
    fence_async_shared()


@gluon.jit
def _consume(
    common, C: gl.constexpr, N: gl.constexpr, MASKED: gl.constexpr, PARAMETERS: gl.constexpr,
    ME: gl.constexpr,
):  # fmt: skip
    """One consumer: its tile of each group of this program's."""
    memory, loaded, freed, made, tensors, pairs, all_strides = common
    x_slots, slots, gate_slots, ring, scales = memory
    x_full, slot_full, full = loaded
    x_empty, slot_empty, empty = freed
    rows, normal, grad_x = made
    constants_ptr, mask_ptr, moments_ptr = tensors
    _, _, per_row, groups = pairs
    of_mask, of_moments = all_strides
    rstds_ptr = moments_ptr + of_moments[0]
    of_moments = of_moments[1], of_moments[2]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * _STEP, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _SLOT, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, PART, 2)
    AT_PART: gl.constexpr = gl.SliceLayout(1, PART)
    NORM: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    PARTS: gl.constexpr = C // _STEP
    STEPS: gl.constexpr = N // _STEP
    SLOTS: gl.constexpr = slots.shape[0] // 2
    STAGES: gl.constexpr = ring.shape[0]
    WIDE: gl.constexpr = ring.layout  # of 64 columns
    NARROW: gl.constexpr = slots.layout
    column = gl.arange(0, 2 * _STEP, layout=gl.SliceLayout(0, ACC))
    column = gl.where(column < _STEP, column, column - _STEP + N)
    stage = 0
    phase = 0
    slot = 0
    slot_phase = 0
    tile_phase = 0
    for group in range(gl.program_id(0), groups, gl.num_programs(0)):
        i, start = place_in_rows(group * 2 + ME, per_row)
        mean = _of_pairs(moments_ptr, i, start, pairs, of_moments, gl.SliceLayout(1, NORM))
        scale = _of_pairs(rstds_ptr, i, start, pairs, of_moments, gl.SliceLayout(1, NORM))
        if MASKED:
            mask = _of_pairs(mask_ptr, i, start, pairs, of_mask, gl.SliceLayout(1, HALF))
        grad_z = ()
        for _k in gl.static_range(PARTS):
            grad_z = grad_z + (gl.zeros([64, _STEP], gl.float32, PART),)
        for piece in range(C // _SLOT):
            at = ME * SLOTS + slot
            mbarrier.wait(slot_full.index(at), slot_phase)
            gate = viewed(slots.index(at), [64, _SLOT], NARROW)
            if PARAMETERS:
                ROWS_LAYOUT: gl.constexpr = rows.layout
                store_tile(
                    rows, [i, start, 2 * N + piece * _SLOT],
                    viewed(gate, [1, 64, _SLOT], ROWS_LAYOUT),
                )  # fmt: skip
            gate = gate.load(A)
            mbarrier.wait(full.index(stage), phase)
            added = _add_gate(gate, grad_z, ring.index(stage))
            if PARAMETERS:
                tma.store_wait(0)
            grad_z = warpgroup_mma_wait(0, deps=added)
            mbarrier.arrive(slot_empty.index(at), count=1)
            slot, slot_phase = advance(slot, slot_phase, SLOTS)
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
        mbarrier.wait(x_full.index(ME), tile_phase)
        tile_phase ^= 1
        _normalise(x_slots, mean, scale, scales, PARTS, ME)
        if PARAMETERS:
            _store_parts(normal, x_slots, i, start, PARTS, ME)
        for step in range(STEPS):
            constants = gl.load(constants_ptr + column + step * _STEP)
            acc = gl.zeros([64, 2 * _STEP], gl.float32, ACC) + constants.expand_dims(0)
            begun = stage
            for k in gl.static_range(PARTS):
                mbarrier.wait(full.index(stage), phase)
                weight = ring.index(stage).permute((1, 0))
                acc = warpgroup_mma(x_slots.index(ME * PARTS + k), weight, acc, is_async=True)
                stage, phase = advance(stage, phase, STAGES)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            values, gates = halves(acc, PART)
            values = halves(values, HALF)
            gates = halves(gates, HALF)
            grads = ()
            first = ME * SLOTS + slot
            for h in gl.static_range(2):
                at = ME * SLOTS + slot
                mbarrier.wait(slot_full.index(at), slot_phase)
                grad = viewed(slots.index(at), [_SLOT, 64], WIDE).permute((1, 0)).load(HALF)
                slot, slot_phase = advance(slot, slot_phase, SLOTS)
                share = reciprocal(1.0 + gl.exp2(gates[h] * -LOG2_E))
                grad_value = grad.to(gl.float32) * share
                if MASKED:
                    grad_value = grad_value * mask.expand_dims(1)
                grad_gate = grad_value * values[h]
                grad_gate = grad_gate - grad_gate * share
                grads = grads + (grad_value.to(gl.bfloat16), grad_gate.to(gl.bfloat16))
                if PARAMETERS:
                    tma.store_wait(0)  # the half before has left its memory
                    if h == 1:
                        mbarrier.arrive(slot_empty.index(first), count=1)
                    start_n = step * _STEP + h * _SLOT
                    _store_half(
                        rows, slots.index(at), gate_slots.index(ME), grads[2 * h],
                        grads[2 * h + 1], i, start, start_n, N,
                    )  # fmt: skip
            added = _add_hidden(grads, grad_z, ring, begun)
            for k in gl.static_range(PARTS):
                added = warpgroup_mma_wait((PARTS - 1 - k) * _PIECES, deps=added)
                mbarrier.arrive(empty.index(behind(begun, k, STAGES)), count=1)
                if not PARAMETERS and k == 0:
                    mbarrier.arrive(slot_empty.index(first), count=1)
                    mbarrier.arrive(slot_empty.index(at), count=1)
            grad_z = added
            if PARAMETERS:
                tma.store_wait(0)  # so has the second half
                mbarrier.arrive(slot_empty.index(at), count=1)
        rstd = _of_pairs(rstds_ptr, i, start, pairs, of_moments, AT_PART)
        _to_grad_x(x_slots, grad_z, rstd, scales, ME)
        _store_parts(grad_x, x_slots, i, start, PARTS, ME)
        tma.store_wait(0)
        mbarrier.arrive(x_empty.index(ME), count=1)


@gluon.jit
def _load_weights(
    first_weight, second_weight, gate_weight, ring, full, empty, groups,
    C: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """For each group of tiles Wo, then Wp and Wg, 64 hidden channels of both a step."""
    STAGES: gl.constexpr = ring.shape[0]
    LAYOUT: gl.constexpr = gate_weight.layout
    stage = 0
    phase = 1
    for _ in range(gl.program_id(0), groups, gl.num_programs(0)):
        for piece in range(C // _SLOT):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, _SLOT * C * 2)
            parts = viewed(ring.index(stage), [_PIECES, _SLOT, _STEP], LAYOUT)
            for k in gl.static_range(C // _STEP):
                load_tile(gate_weight, [piece * _SLOT, k * _STEP], bar, parts.index(k))
            stage, phase = advance(stage, phase, STAGES)
        for step in range(N // _STEP):
            for k in gl.static_range(C // _STEP):
                mbarrier.wait(empty.index(stage), phase)
                bar = full.index(stage)
                mbarrier.expect(bar, 2 * _STEP * _STEP * 2)
                both = ring.index(stage)
                low, high = lower(both), upper(both)
                load_tile(first_weight, [step * _STEP, k * _STEP], bar, low)
                load_tile(second_weight, [step * _STEP, k * _STEP], bar, high)
                stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _load_rows(
    x, planes, gate, x_slots, slots, full, empty, pairs,
    C: gl.constexpr, N: gl.constexpr, APART: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """A consumer's tiles: dq, meanwhile x, and dh."""
    x_full, slot_full, _ = full
    x_empty, slot_empty, _ = empty
    _, _, per_row, groups = pairs
    X_LAYOUT: gl.constexpr = x.layout
    PLANES_LAYOUT: gl.constexpr = planes.layout
    GATE_LAYOUT: gl.constexpr = gate.layout
    PARTS: gl.constexpr = C // _STEP
    SLOTS: gl.constexpr = slots.shape[0] // 2
    slot = 0
    slot_phase = 1
    phase = 1
    for group in range(gl.program_id(0), groups, gl.num_programs(0)):
        i, start = place_in_rows(group * 2 + ME, per_row)
        for piece in range(C // _SLOT):
            if piece == 2:  # the least number of slots
                mbarrier.wait(x_empty.index(ME), phase)
                phase ^= 1
                mbarrier.expect(x_full.index(ME), 64 * C * 2)
                for k in gl.static_range(PARTS):
                    part = viewed(x_slots.index(ME * PARTS + k), [1, 1, 64, _STEP], X_LAYOUT)
                    load_tile(x, [0, i, start, k * _STEP], x_full.index(ME), part)
            place = ME * SLOTS + slot
            mbarrier.wait(slot_empty.index(place), slot_phase)
            mbarrier.expect(slot_full.index(place), 64 * _SLOT * 2)
            part = viewed(slots.index(place), [1, 64, _SLOT], GATE_LAYOUT)
            load_tile(gate, [i, start, piece * _SLOT], slot_full.index(place), part)
            slot, slot_phase = advance(slot, slot_phase, SLOTS)
        for block in range(N // _SLOT):
            plane = plane_of(block * _SLOT, N, APART)
            place = ME * SLOTS + slot
            mbarrier.wait(slot_empty.index(place), slot_phase)
            mbarrier.expect(slot_full.index(place), 64 * _SLOT * 2)
            part = viewed(slots.index(place), [_SLOT, 1, 64], PLANES_LAYOUT)
            load_tile(planes, [plane, i, start], slot_full.index(place), part)
            slot, slot_phase = advance(slot, slot_phase, SLOTS)


@gluon.jit(
    do_not_specialize=[
        "norm_weight_ptr", "mask_ptr", "moments_ptr", "R", "J", "per_row", "groups",
        "stride_mask_i", "stride_mask_j",
        "stride_moments_n", "stride_moments_i", "stride_moments_j",
    ]
)  # fmt: skip
def _gated_input_bwd_hopper_kernel(
    x, first_weight, second_weight, gate_weight, planes, gate, rows, normal, grad_x,
    constants_ptr, norm_weight_ptr, mask_ptr, moments_ptr,
    R, J, per_row, groups, stride_mask_i, stride_mask_j,
    stride_moments_n, stride_moments_i, stride_moments_j,
    C: gl.constexpr, APART: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    MASKED: gl.constexpr, PARAMETERS: gl.constexpr, REGISTERS: gl.constexpr,
    LAYOUT: gl.constexpr, RING_LAYOUT: gl.constexpr, SLOT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dx of `groups` groups of two tiles of 64 pairs, and what else is wanted."""
    N: gl.constexpr = 2 * C
    PARTS: gl.constexpr = C // _STEP
    x_slots = gl.allocate_shared_memory(gl.bfloat16, [2 * PARTS, 64, _STEP], LAYOUT)
    slots = gl.allocate_shared_memory(gl.bfloat16, [2 * SLOTS, 64, _SLOT], SLOT_LAYOUT)
    gate_slots = slots
    if PARAMETERS:
        gate_slots = gl.allocate_shared_memory(gl.bfloat16, [2, 64, _SLOT], SLOT_LAYOUT)
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * _STEP, _STEP], RING_LAYOUT)
    SCALES_LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = gl.allocate_shared_memory(gl.float32, [2 * PARTS, _STEP], SCALES_LAYOUT)
    _keep_norm_weight(norm_weight_ptr, scales, PARTS)
    loaded = barriers(2, 1), barriers(2 * SLOTS, 1), barriers(STAGES, 1)
    freed = barriers(2, 1), barriers(2 * SLOTS, 1), barriers(STAGES, 2)
    fence_async_shared()
    memory = x_slots, slots, gate_slots, ring, scales
    made = rows, normal, grad_x
    tensors = constants_ptr, mask_ptr, moments_ptr
    pairs = R, J, per_row, groups
    moments = stride_moments_n, stride_moments_i, stride_moments_j
    all_strides = (stride_mask_i, stride_mask_j), moments
    common = memory, loaded, freed, made, tensors, pairs, all_strides
    gl.warp_specialize([
        (_consume, (common, C, N, MASKED, PARAMETERS, 0)),
        (_consume, (common, C, N, MASKED, PARAMETERS, 1)),
        (_load_weights, (
            first_weight, second_weight, gate_weight, ring, loaded[2], freed[2], groups, C, N,
        )),
        (_load_rows, (x, planes, gate, x_slots, slots, loaded, freed, pairs, C, N, APART, 0)),
        (_load_rows, (x, planes, gate, x_slots, slots, loaded, freed, pairs, C, N, APART, 1)),
    ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip


def takes(call: Call) -> bool:
    """Whether stage 1's backward can run here to dx."""
    return (
        call.lengths is None
        and call.hidden == call.x.shape[3]
        and all([has_descriptor(weight) for weight in _weights(call).values()])
    )


def _weights(call: Call) -> dict[str, Tensor]:
    """Wp, Wg and Wo, by the kernel's parameters."""
    weights = call.weights
    return dict(
        first_weight=weights.p_in_weight,
        second_weight=weights.g_in_weight,
        gate_weight=weights.g_out_weight,
    )


def prepare(
    call: Call, x: Tensor, mask: Tensor | None, moments: Tensor, planes: Tensor, apart: int,
    parameters: bool, config: LaunchConfig,
) -> PreparedLaunch:  # fmt: skip
    """The launch for x [R, L, C], mask [R, L], moments [2, R, L] and planes of dh.

    These are some rows of a call. The planes of db lie `apart` planes from those of da;
    `parameters` is whether their gradients are wanted.

    Raises:
        ValueError: a setting with other blocks, or whose rings are too short.
    """
    rows, length, channels = x.shape
    blocks = config.block_m, config.block_n, config.block_k
    if blocks != (2 * ROWS, STEP, STEP) or config.num_stages < channels // STEP or config.split < 2:
        raise ValueError(
            f"the setting must have blocks of {2 * ROWS}, {STEP} and {STEP}, for {channels} "
            f"channels {channels // STEP} stages or more, and split in 2 or more; got {config}"
        )
    tiles, all_strides = tiles_of(x, mask, moments, planes)
    slot = _SLOT.value

    def rows_of(width: int, block: int):
        return tma_descriptor(
            x, [tiles.rows, tiles.columns, width], [tiles.columns * width, width, 1],
            [1, ROWS, block],
        )  # fmt: skip

    groups = tiles.values(2)["tiles"]
    return PreparedLaunch(
        _gated_input_bwd_hopper_kernel,
        min(groups, device_target(x.device).multiprocessors),
        tensors={
            **pointers("constants_ptr", "norm_weight_ptr", "mask_ptr", "moments_ptr"),
            "x": tiles.descriptor(x, [0, *strides(x)], channels, STEP),
            **{
                name: tma_descriptor(
                    weight, weight.shape, weight.stride(),
                    [slot if name == "gate_weight" else STEP, STEP],
                )
                for name, weight in _weights(call).items()
            },
            "planes": planes_of(planes, tiles, slot),
            "gate": rows_of(channels, slot),
            "rows": rows_of(5 * channels, slot) if parameters else None,
            "normal": rows_of(channels, STEP) if parameters else None,
            "grad_x": rows_of(channels, STEP),
        },
        values=dict(
            R=tiles.rows, J=tiles.columns, per_row=tiles.per_row, groups=groups,
            **all_strides,
        ),
        constants=dict(
            C=channels, APART=apart, STAGES=config.num_stages, SLOTS=config.split,
            MASKED=mask is not None, PARAMETERS=parameters, REGISTERS=REGISTERS[2][1],
            LAYOUT=shared_layout([ROWS, STEP]), RING_LAYOUT=shared_layout([2 * STEP, STEP]),
            SLOT_LAYOUT=shared_layout([ROWS, slot]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[2][0]),
        stage="fused_dual_gemm_bwd",
        variant="whole",
    )  # fmt: skip


def launch(
    prepared: PreparedLaunch,
    call: Call,
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
    out: tuple[Tensor | None, Tensor | None, Tensor],
    constants: Tensor,
) -> None:
    """Fills `out`, (rows, x^ g1, dx), from (x, mask, moments, planes, dq).

    `prepared` is from `prepare`; `constants` are those of `Folded`, of stage 1.
    """
    x, mask, moments, planes, gate = tensors
    rows, normal, grad_x = out
    prepared.launch(
        **_weights(call),
        x=x,
        planes=planes,
        gate=gate,
        rows=rows,
        normal=normal,
        grad_x=grad_x,
        constants_ptr=constants,
        norm_weight_ptr=call.weights.norm_in_weight,
        mask_ptr=mask,
        moments_ptr=moments,
    )
