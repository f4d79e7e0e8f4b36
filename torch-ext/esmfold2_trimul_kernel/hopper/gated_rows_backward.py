"""Stage 1's backward: see `fused_dual_gemm_backward`, whose arithmetic it has.

    p = z Wp^T + bp, s = sigmoid(z Wg^T + bg), z = LayerNorm(x)    x [R, L, C], bfloat16
    dp = dh s mask                                                 dh planes [2, APART, R, pitch]
    dg = dh p mask s (1 - s)                                       grads [R*L, 2 (dp, dg), 2D]
    x^ = (x - mean) rstd                                           [R*L, C], if wanted
    sums of dp and dg over the pairs of a tile, in fp32            [tiles, 2, 2D], if wanted

The norm is folded into the weights (see `folded_norm`); the moments are stage 1's.

The work is cut into blocks: BLOCK_N channels of dh for a group of two or three tiles of 64 pairs, a
tile for each consumer. A program has an equal share of all blocks, in order, so that groups of
tiles need not be a multiple of the programs; it begins and ends within a group. Warps of their own
load the weights, which stream past once for all consumers' tiles; the rows of x; and tiles of dh. A
consumer keeps its rows in registers. Their memory takes x^ on its way out, and then the next rows.
"""

import math

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

from .._call import Call
from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    PreparedLaunch,
    named_strides,
    pointers,
    strides,
)
from ..triton_parts.settings import LaunchConfig
from .folded_norm import EXTRA, Folds
from .parts import (
    LOG2_E,
    REGISTERS,
    ROWS,
    Tiles,
    advance,
    barriers,
    halves,
    load_block,
    load_tile,
    place_in_rows,
    ready,
    reciprocal,
    shared_layout,
    store_tile,
    tma_descriptor,
    viewed,
    weight_tiles,
    without_norm,
)

_EXTRA = gl.constexpr(EXTRA)


def _exchange(lane: int) -> gl.constexpr:
    """Of two lanes that differ by `lane`: the lower keeps $1 and sends $2, the other inversely."""
    return gl.constexpr(
        "{ .reg .pred upper; .reg .b32 lane; .reg .f32 kept, sent; mov.u32 lane, %laneid; "
        f"and.b32 lane, lane, {lane}; setp.ne.u32 upper, lane, 0; "
        "selp.f32 kept, $2, $1, upper; selp.f32 sent, $1, $2, upper; "
        f"shfl.sync.bfly.b32 sent, sent, {lane}, 31, -1; add.f32 $0, kept, sent; }}"
    )


_BY_16, _BY_8, _BY_4 = _exchange(16), _exchange(8), _exchange(4)


@gluon.jit
def share_of(blocks):
    """This program's blocks of `blocks`, which are (all, those of a program): from, to."""
    begin = gl.program_id(0) * blocks[1]
    return begin, gl.minimum(begin + blocks[1], blocks[0])


@gluon.jit
def _kept_of_two(low, high, EXCHANGE: gl.constexpr):
    """Adds to one of two values that of another lane, which adds to the other: see `_exchange`."""
    return gl.inline_asm_elementwise(
        EXCHANGE, "=f,f,f", [low, high], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _sums_of_warps(first, second):
    """[4, 2N]: the sums of two accumulators [64, N] over the 16 rows of each of four warps.

    A lane has values of two rows, 8 apart, and the 8 lanes that differ in their rows share the
    columns between them as they add: 7 / 8 of the values pass from lane to lane, where a sum that
    all lanes get would pass three times as many.
    """
    N: gl.constexpr = first.shape[1]
    one = _two_rows(first)
    other = _two_rows(second)
    both = _kept_of_two(one, other, _BY_16)
    low, high = both.reshape([4, 8, 2, N // 2]).permute((0, 1, 3, 2)).split()
    both = _kept_of_two(low, high, _BY_8)
    low, high = both.reshape([4, 8, 2, N // 4]).permute((0, 1, 3, 2)).split()
    return _kept_of_two(low, high, _BY_4).reshape([4, 2 * N])


@gluon.jit
def _two_rows(x):
    """[4, 8, N], the sums of rows 8 apart of an accumulator [64, N]."""
    low, high = x.reshape([4, 2, 8, x.shape[1]]).permute((0, 2, 3, 1)).split()
    return low + high


@gluon.jit
def _consume(
    memory, made, loaded, freed, turns, grads, hat, mask_ptr, moments_ptr, sums_ptr, eps, pairs,
    blocks, mask_strides, moments_strides,
    N: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, GRAD_STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, MASKED: gl.constexpr, PARAMETERS: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """One consumer: its tiles of the program's blocks."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    AT_ROWS: gl.constexpr = gl.SliceLayout(1, HALF)
    AT_COLUMNS: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0])
    STEPS: gl.constexpr = N // BLOCK_N
    C: gl.constexpr = memory[0].shape[2]
    x_slots, grad_slots, ring, extras = memory
    value_slots, gate_slots, partial_sums = made
    of_values = value_slots.index(ME)
    of_gates = gate_slots.index(ME)
    x_full, grad_full, ring_full = loaded
    x_empty, grad_empty, ring_empty = freed
    R, J, per_row = pairs
    begin, end = share_of(blocks)
    zero = gl.zeros([64, 2 * BLOCK_N], gl.float32, ACC)
    column = gl.arange(0, 2 * BLOCK_N, layout=gl.SliceLayout(0, AT_COLUMNS))
    column = gl.where(column < BLOCK_N, column, column - BLOCK_N + N)
    stage = 0
    phase = 0
    grad_stage = 0
    grad_phase = 0
    tile_phase = 0
    turn_phase = 0
    for group in range(begin // STEPS, (end + STEPS - 1) // STEPS):
        lo = gl.maximum(begin - group * STEPS, 0)
        hi = gl.minimum(end - group * STEPS, STEPS)
        i, start = place_in_rows(group * CONSUMERS + ME, per_row)
        j = start + gl.arange(0, 64, layout=gl.SliceLayout(1, A))
        inside = (j < J) & (i < R)
        offs = i.to(gl.int64) * moments_strides[1] + j.to(gl.int64) * moments_strides[2]
        mean = gl.load(moments_ptr + offs, mask=inside, other=0.0)
        rstd = gl.load(moments_ptr + moments_strides[0] + offs, mask=inside, other=1.0)
        if MASKED:
            j = start + gl.arange(0, 64, layout=AT_ROWS)
            offs = i.to(gl.int64) * mask_strides[0] + j.to(gl.int64) * mask_strides[1]
            mask = gl.load(mask_ptr + offs, mask=(j < J) & (i < R), other=0).to(gl.float32)
        mbarrier.wait(x_full.index(ME), tile_phase)
        tile_phase ^= 1
        slot = x_slots.index(ME)
        parts, further, scale = ready(x_slots, ME, mean, rstd, eps, C, False, A)
        rows = parts[0]
        if PARAMETERS:
            if lo == 0:
                mean = gl.where(without_norm(mean, rstd, eps), 0.0, mean)
                normal = (rows.to(gl.float32) - mean.expand_dims(1)) * rstd.expand_dims(1)
                slot.store(normal.to(gl.bfloat16))
                fence_async_shared()
                HAT_LAYOUT: gl.constexpr = hat.layout
                store_tile(hat, [0, i, start, 0], viewed(slot, [1, 1, 64, C], HAT_LAYOUT))
        scale = gl.convert_layout(scale, AT_ROWS)
        gate_scale = scale * -LOG2_E
        for step in range(lo, hi):
            place = ME * GRAD_STAGES + grad_stage
            mbarrier.wait(grad_full.index(place), grad_phase)
            grad = grad_slots.index(place).permute((1, 0)).load(HALF)
            mbarrier.wait(ring_full.index(stage), phase)
            mbarrier.wait(turns.index(ME), turn_phase)
            turn_phase ^= 1
            extra = extras.index(stage).permute((1, 0))
            acc = warpgroup_mma(further, extra, zero, use_acc=False, is_async=True)
            acc = warpgroup_mma(rows, ring.index(stage).permute((1, 0)), acc, is_async=True)
            mbarrier.arrive(turns.index((ME + 1) % CONSUMERS), count=1)
            if step > lo:
                _store(grads, of_values, of_gates, i, start, step - 1, N)
                mbarrier.arrive(x_empty.index(ME), count=1, pred=step == lo + 1)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(ring_empty.index(stage), count=1)
            stage, phase = advance(stage, phase, STAGES)
            value, gate = halves(acc, HALF)
            # exp2 of this is exp of the negative argument of the sigmoid.
            power = gate * gate_scale.expand_dims(1)
            gate = reciprocal(1.0 + gl.exp2(power))
            grad_value = grad.to(gl.float32) * gate
            if MASKED:
                grad_value = grad_value * mask.expand_dims(1)
            scaled = scale.expand_dims(1)
            grad_gate = grad_value * value * (scaled - scaled * gate)
            tma.store_wait(0)  # the block before has left the slots, and x^ that of x
            of_values.store(grad_value.to(gl.bfloat16))
            of_gates.store(grad_gate.to(gl.bfloat16))
            # All warps have dh: what they made of it is stored.
            mbarrier.arrive(grad_empty.index(place), count=1)
            grad_stage, grad_phase = advance(grad_stage, grad_phase, GRAD_STAGES)
            if PARAMETERS:
                partial_sums.index(ME).store(_sums_of_warps(grad_value, grad_gate))
                sums = gl.sum(partial_sums.index(ME).load(AT_COLUMNS), 0)
                row = (group * CONSUMERS + ME).to(gl.int64) * (2 * N)
                gl.store(sums_ptr + row + step * BLOCK_N + column, sums)
        _store(grads, of_values, of_gates, i, start, hi - 1, N)
        mbarrier.arrive(x_empty.index(ME), count=1, pred=hi == lo + 1)
    tma.store_wait(0)


@gluon.jit
def _store(grads, of_values, of_gates, i, start, step, N: gl.constexpr):
    """Stores the blocks of a step, during the next one's products: see `parts`."""
    BLOCK_N: gl.constexpr = of_values.shape[1]
    LAYOUT: gl.constexpr = grads.layout
    fence_async_shared()
    store_tile(grads, [i, start, step * BLOCK_N], viewed(of_values, [1, 64, BLOCK_N], LAYOUT))
    store_tile(grads, [i, start, N + step * BLOCK_N], viewed(of_gates, [1, 64, BLOCK_N], LAYOUT))


@gluon.jit
def _load_weights(
    weights, further, ring, extras, full, empty, blocks,
    N: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    begin, end = share_of(blocks)
    stage = 0
    phase = 1
    for block in range(begin, end):
        step = block % (N // BLOCK_N)
        load_block(weights, further, ring, extras, full, empty, stage, phase, step, N, BLOCK_N)
        stage, phase = advance(stage, phase, STAGES)


@gluon.jit
def _load_rows(
    x, x_slots, full, empty, per_row, blocks,
    C: gl.constexpr, STEPS: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = x.layout
    begin, end = share_of(blocks)
    phase = 1
    for group in range(begin // STEPS, (end + STEPS - 1) // STEPS):
        for me in range(CONSUMERS):
            i, start = place_in_rows(group * CONSUMERS + me, per_row)
            mbarrier.wait(empty.index(me), phase)
            mbarrier.expect(full.index(me), 64 * C * 2)
            slot = viewed(x_slots.index(me), [1, 1, 64, C], LAYOUT)
            load_tile(x, [0, i, start, 0], full.index(me), slot)
        phase ^= 1


@gluon.jit
def plane_of(channel, N: gl.constexpr, APART: gl.constexpr):
    """The plane of dh of one of N channels, those of a and then those of b, APART from them."""
    return channel + channel // (N // 2) * (APART - N // 2)


@gluon.jit
def _load_grads(
    planes, grad_slots, full, empty, per_row, blocks,
    N: gl.constexpr, APART: gl.constexpr, BLOCK_N: gl.constexpr, GRAD_STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = planes.layout
    STEPS: gl.constexpr = N // BLOCK_N
    begin, end = share_of(blocks)
    stage = 0
    phase = 1
    for block in range(begin, end):
        group = block // STEPS
        plane = plane_of((block - group * STEPS) * BLOCK_N, N, APART)
        for me in range(CONSUMERS):
            i, start = place_in_rows(group * CONSUMERS + me, per_row)
            place = me * GRAD_STAGES + stage
            mbarrier.wait(empty.index(place), phase)
            mbarrier.expect(full.index(place), 64 * BLOCK_N * 2)
            slot = viewed(grad_slots.index(place), [BLOCK_N, 1, 64], LAYOUT)
            load_tile(planes, [plane, i, start], full.index(place), slot)
        stage, phase = advance(stage, phase, GRAD_STAGES)


@gluon.jit(
    do_not_specialize=[
        "mask_ptr", "moments_ptr", "eps", "R", "J", "per_row", "blocks", "share",
        "stride_mask_i", "stride_mask_j",
        "stride_moments_n", "stride_moments_i", "stride_moments_j",
    ]
)  # fmt: skip
def _gated_rows_bwd_hopper_kernel(
    x, weights, further, planes, grads, hat, mask_ptr, moments_ptr, sums_ptr, eps,
    R, J, per_row, blocks, share, stride_mask_i, stride_mask_j,
    stride_moments_n, stride_moments_i, stride_moments_j,
    C: gl.constexpr, D: gl.constexpr, APART: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, GRAD_STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    MASKED: gl.constexpr, PARAMETERS: gl.constexpr, REGISTERS: gl.constexpr,
    X_LAYOUT: gl.constexpr, PLANES_LAYOUT: gl.constexpr, GRADS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dp, dg, x^ and sums of `share` of the blocks, of CONSUMERS tiles of 64 pairs each."""
    N: gl.constexpr = 2 * D
    STEPS: gl.constexpr = N // BLOCK_N
    GRADS: gl.constexpr = CONSUMERS * GRAD_STAGES
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    x_slots = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 64, C], X_LAYOUT)
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * BLOCK_N, C], weights.layout)
    extras = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * BLOCK_N, _EXTRA], further.layout)
    grad_slots = gl.allocate_shared_memory(gl.bfloat16, [GRADS, BLOCK_N, 64], PLANES_LAYOUT)
    value_slots = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 64, BLOCK_N], GRADS_LAYOUT)
    gate_slots = gl.allocate_shared_memory(gl.bfloat16, [CONSUMERS, 64, BLOCK_N], GRADS_LAYOUT)
    partial_sums = x_slots
    if PARAMETERS:
        partial_sums = gl.allocate_shared_memory(gl.float32, [CONSUMERS, 4, 2 * BLOCK_N], FLAT)
    loaded = barriers(CONSUMERS, 1), barriers(GRADS, 1), barriers(STAGES, 1)
    freed = barriers(CONSUMERS, 1), barriers(GRADS, 1), barriers(STAGES, CONSUMERS)
    turns = barriers(CONSUMERS, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    memory = x_slots, grad_slots, ring, extras
    made = value_slots, gate_slots, partial_sums
    pairs = R, J, per_row
    work = blocks, share
    masks = stride_mask_i, stride_mask_j
    moments = stride_moments_n, stride_moments_i, stride_moments_j
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (
                memory, made, loaded, freed, turns, grads, hat, mask_ptr, moments_ptr, sums_ptr,
                eps, pairs, work, masks, moments,
                N, BLOCK_N, STAGES, GRAD_STAGES, CONSUMERS, MASKED, PARAMETERS, 0,
            )),
            (_consume, (
                memory, made, loaded, freed, turns, grads, hat, mask_ptr, moments_ptr, sums_ptr,
                eps, pairs, work, masks, moments,
                N, BLOCK_N, STAGES, GRAD_STAGES, CONSUMERS, MASKED, PARAMETERS, 1,
            )),
            (_load_weights, (
                weights, further, ring, extras, loaded[2], freed[2], work, N, BLOCK_N, STAGES,
            )),
            (_load_rows, (x, x_slots, loaded[0], freed[0], per_row, work, C, STEPS, CONSUMERS)),
            (_load_grads, (
                planes, grad_slots, loaded[1], freed[1], per_row, work,
                N, APART, BLOCK_N, GRAD_STAGES, CONSUMERS,
            )),
        ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                memory, made, loaded, freed, turns, grads, hat, mask_ptr, moments_ptr, sums_ptr,
                eps, pairs, work, masks, moments,
                N, BLOCK_N, STAGES, GRAD_STAGES, CONSUMERS, MASKED, PARAMETERS, 0,
            )),
            (_consume, (
                memory, made, loaded, freed, turns, grads, hat, mask_ptr, moments_ptr, sums_ptr,
                eps, pairs, work, masks, moments,
                N, BLOCK_N, STAGES, GRAD_STAGES, CONSUMERS, MASKED, PARAMETERS, 1,
            )),
            (_consume, (
                memory, made, loaded, freed, turns, grads, hat, mask_ptr, moments_ptr, sums_ptr,
                eps, pairs, work, masks, moments,
                N, BLOCK_N, STAGES, GRAD_STAGES, CONSUMERS, MASKED, PARAMETERS, 2,
            )),
            (_load_weights, (
                weights, further, ring, extras, loaded[2], freed[2], work, N, BLOCK_N, STAGES,
            )),
            (_load_rows, (x, x_slots, loaded[0], freed[0], per_row, work, C, STEPS, CONSUMERS)),
            (_load_grads, (
                planes, grad_slots, loaded[1], freed[1], per_row, work,
                N, APART, BLOCK_N, GRAD_STAGES, CONSUMERS,
            )),
        ], [4, 4, 1, 1, 1], [REGISTERS, REGISTERS, 24, 24, 24])  # fmt: skip


def tiles_of(
    x: Tensor, mask: Tensor | None, moments: Tensor, planes: Tensor
) -> tuple[Tiles, dict[str, int]]:
    """Tiles of 64 pairs over rows like these, and the kernels' strides of mask and moments."""
    rows, length, _ = x.shape
    stride_i, stride_j, _ = strides(x)
    moments_strides = moments.stride()
    mask_strides = (0, 0) if mask is None else strides(mask)
    one_row = (
        planes.shape[2] == length
        and stride_i == length * stride_j
        and moments_strides[1] == length * moments_strides[2]
        and mask_strides[0] == length * mask_strides[1]
    )
    return Tiles.of(1, rows, length, one_row), {
        **named_strides("mask", "ij", mask_strides),
        **named_strides("moments", "nij", moments_strides),
    }


def planes_of(planes: Tensor, tiles: Tiles, block_n: int) -> TensorDescriptor:
    """Of planes [2 APART, R, pitch] in such tiles, `block_n` channels at a time."""
    return tma_descriptor(
        planes, [planes.shape[0], tiles.rows, tiles.columns],
        [planes.stride(0), planes.shape[2], 1], [block_n, 1, ROWS],
    )  # fmt: skip


def takes(hidden: int, lengths: Tensor | None, wanted: frozenset[str]) -> bool:
    """Whether stage 1's backward of rows without padding can run here.

    `wanted` names outputs of `Stage1Gradients`.
    """
    return (
        lengths is None
        and hidden % ROWS == 0
        and wanted in ({"grads"}, {"grads", "hat_x", "sums"})
    )


def prepare(
    call: Call, x: Tensor, mask: Tensor | None, moments: Tensor, planes: Tensor, apart: int,
    wanted: frozenset[str], config: LaunchConfig,
) -> PreparedLaunch:  # fmt: skip
    """The launch for rows like these; see `prepare_dual_gemm_bwd`."""
    channels, hidden = x.shape[2], call.hidden
    consumers, block_n = config.block_m // ROWS, math.gcd(config.block_n, hidden)
    tiles, all_strides = tiles_of(x, mask, moments, planes)
    width = 4 * hidden
    grads = tma_descriptor(
        x, [tiles.rows, tiles.columns, width], [tiles.columns * width, width, 1],
        [1, ROWS, block_n],
    )  # fmt: skip
    hat = None
    if "hat_x" in wanted:
        made = [0, tiles.columns * channels, channels, 1]
        hat = tiles.descriptor(x, made, channels, channels)
    blocks = tiles.values(consumers)["tiles"] * (2 * hidden // block_n)
    share = -(-blocks // device_target(x.device).multiprocessors)
    return PreparedLaunch(
        _gated_rows_bwd_hopper_kernel,
        -(-blocks // share),
        tensors={
            **pointers("mask_ptr", "moments_ptr", "sums_ptr"),
            **weight_tiles(x, 2 * hidden, block_n),
            "x": tiles.descriptor(x, [0, *strides(x)], channels, channels),
            "planes": planes_of(planes, tiles, block_n), "grads": grads, "hat": hat,
        },
        values=dict(
            eps=call.eps_in, R=tiles.rows, J=tiles.columns, per_row=tiles.per_row,
            blocks=blocks, share=share, **all_strides,
        ),
        constants=dict(
            C=channels, D=hidden, APART=apart, BLOCK_N=block_n, STAGES=config.num_stages,
            GRAD_STAGES=config.split, CONSUMERS=consumers, MASKED=mask is not None,
            PARAMETERS=hat is not None, REGISTERS=REGISTERS[consumers][1],
            X_LAYOUT=shared_layout([ROWS, channels]), PLANES_LAYOUT=shared_layout([block_n, ROWS]),
            GRADS_LAYOUT=shared_layout([ROWS, block_n]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[consumers][0]),
        stage="fused_dual_gemm_bwd",
        variant="hopper",
    )  # fmt: skip


def rows_of_sums(prepared: PreparedLaunch) -> int:
    """The first extent of the sums: one for each tile."""
    constants = prepared.constants
    groups = prepared.value_of("blocks") // (2 * constants["D"] // constants["BLOCK_N"])
    return groups * constants["CONSUMERS"]


def launch(
    prepared: PreparedLaunch,
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor],
    out: tuple[Tensor, Tensor | None, Tensor | None],
    folds: Folds,
) -> None:
    """Fills `out`, which is (grads, x^, sums), from (x, mask, moments, planes).

    `prepared` is from `prepare`.
    """
    folded = folds.planes(prepared.constants["BLOCK_N"])
    x, mask, moments, planes = tensors
    grads, hat, sums = out
    prepared.launch(
        x=x,
        weights=folded.weights,
        further=folded.further,
        planes=planes,
        grads=grads,
        hat=hat,
        mask_ptr=mask,
        moments_ptr=moments,
        sums_ptr=sums,
    )
