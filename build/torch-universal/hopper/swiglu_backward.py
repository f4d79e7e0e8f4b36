"""The backward of the transition's gated unit on Hopper GPUs, projections and all.

    z = LayerNorm(x; g, b), p = z Wg^T + bg, u = z Wu^T + bu       x [B, R, J, C], 16 bits
    dh = G Wd                                                      of h, from the output's gradient
    dp, du, h = as in `triton_path.swiglu_backward`                pair [M, 2 (dp, du), H], h [M, H]
    x^ = (x - mean) rstd, if wanted, and the moments of x          [M, C], [2, M]

The same arithmetic as in the two plain kernels, `swiglu_hidden` and `swiglu_bwd`, except that p and
u are not rounded: they never leave the registers.

The work is cut into blocks: 64 hidden channels for two tiles of 64 pairs, a tile for each consumer.
A program has an equal share of all blocks, in order, and begins and ends within a tile. The weights
stream past once for both tiles, through a ring, whose stages are freed while a step's products go
on. At 256 channels it has room for one step, so that turns at the matrix unit, as elsewhere, would
have one consumer wait for weights that the other still holds. A consumer writes z over x in shared
memory, and keeps G in registers: G's memory takes the blocks on their way out.
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

from .._call import Transition
from ..triton_parts.device import device_target
from ..triton_parts.launch import PreparedLaunch, pointers, strides
from ..triton_parts.settings import LaunchConfig
from .gated_rows_backward import share_of
from .parts import (
    REGISTERS,
    ROWS,
    STEP,
    Tiles,
    advance,
    barriers,
    load_tile,
    shared_layout,
    sigmoid,
    store_tile,
    tile_at,
    viewed,
)
from .transition import (
    descriptors_of,
    free,
    half,
    load_down,
    load_projections,
    normalise,
    projections,
    takes_weights,
)

_STEP = gl.constexpr(STEP)
_CONSUMERS = gl.constexpr(2)
_AHEAD = gl.constexpr(2)  # groups of products that are not waited for when the next are issued


@gluon.jit
def _issue(
    x_slots, rows, acc, grad, ring, full, stage, phase,
    GROUP: gl.constexpr, C: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Issues one group of a step's products, of 64 summed channels; the next stage.

    The first C / 64 groups are the product of z with both projections to the step's hidden
    channels, side by side, with a stage for each. The others are dh, the product of G with 64
    columns of Wd, 128 of whose rows are a stage.
    """
    PARTS: gl.constexpr = C // _STEP
    if GROUP < PARTS:
        mbarrier.wait(full.index(stage), phase)
        weight = ring.index(stage).permute((1, 0))
        slot = x_slots.index(ME * PARTS + GROUP)
        acc = warpgroup_mma(slot, weight, acc, use_acc=GROUP > 0, is_async=True)
        stage, phase = advance(stage, phase, ring.shape[0])
    else:
        PART: gl.constexpr = GROUP - PARTS
        LAYOUT: gl.constexpr = x_slots.layout
        if PART % 2 == 0:
            mbarrier.wait(full.index(stage), phase)
        weight = half(ring.index(stage), PART % 2, LAYOUT)
        grad = warpgroup_mma(rows[PART], weight, grad, use_acc=PART > 0, is_async=True)
        if (PART % 2 == 1) | (PART == PARTS - 1):
            stage, phase = advance(stage, phase, ring.shape[0])
    return acc, grad, stage, phase


@gluon.jit
def _free_read(empty, begun, GROUP: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr):
    """Frees the stage that a group, of a step begun at a stage, was the last to read."""
    if GROUP < PARTS:
        free(empty, begun, GROUP, 1, STAGES)
    elif (GROUP - PARTS) % 2 == 1 or GROUP == 2 * PARTS - 1:
        free(empty, begun, PARTS + (GROUP - PARTS) // 2, 1, STAGES)


@gluon.jit
def _consume(common, C: gl.constexpr, H: gl.constexpr, SLOTS: gl.constexpr, ME: gl.constexpr):
    """One consumer: its tiles of the program's blocks."""
    memory, made, parameters, eps, pairs, blocks = common
    x_slots, made_slots, ring, loaded, freed = memory
    x_full, grad_full, full = loaded
    x_empty, grad_empty, empty = freed
    pair, hidden, hat_ptr, moments_ptr = made
    norm_weight_ptr, norm_bias_ptr, up_bias_ptr, gate_bias_ptr = parameters
    M, R, J, per_row = pairs
    DTYPE: gl.constexpr = ring.dtype
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * _STEP, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, HALF, 2)
    STAGES: gl.constexpr = ring.shape[0]
    STEPS: gl.constexpr = H // _STEP
    PARTS: gl.constexpr = C // _STEP
    begin, end = share_of(blocks)
    stage = 0
    phase = 0
    tile_phase = 0
    for group in range(begin // STEPS, (end + STEPS - 1) // STEPS):
        lo = gl.maximum(begin - group * STEPS, 0)
        hi = gl.minimum(end - group * STEPS, STEPS)
        entry, i, start = tile_at(group * _CONSUMERS + ME, R, per_row)
        mbarrier.wait(x_full.index(ME), tile_phase)
        row = (entry * R + i).to(gl.int64) * J + start
        inside = gl.where((lo == 0) & (row < M), J - start, 0)
        moments = moments_ptr, moments_ptr + M
        normalise(
            x_slots, eps, norm_weight_ptr, norm_bias_ptr, hat_ptr, moments, row, inside, C, ME
        )
        mbarrier.wait(grad_full.index(ME), tile_phase)
        tile_phase ^= 1
        rows = ()
        for k in gl.static_range(PARTS):
            rows = rows + (made_slots.index(ME * SLOTS + k).load(A),)
        for step in range(lo, hi):
            begun = stage
            acc = gl.zeros([64, 2 * _STEP], gl.float32, ACC)
            grad = gl.zeros([64, _STEP], gl.float32, HALF)
            for one in gl.static_range(2 * PARTS):
                acc, grad, stage, phase = _issue(
                    x_slots, rows, acc, grad, ring, full, stage, phase, one, C, ME
                )
                if one == 1:
                    if step > lo:
                        _store(pair, hidden, made_slots, entry, i, start, step - 1, H, SLOTS, ME)
                if one >= _AHEAD:
                    acc, grad = warpgroup_mma_wait(_AHEAD, deps=(acc, grad))
                    _free_read(empty, begun, one - _AHEAD, PARTS, STAGES)
            acc, grad = warpgroup_mma_wait(0, deps=(acc, grad))
            for one in gl.static_range(2 * PARTS - _AHEAD, 2 * PARTS):
                _free_read(empty, begun, one, PARTS, STAGES)
            mbarrier.arrive(x_empty.index(ME), count=1, pred=step == hi - 1)
            up, gate = projections(acc, up_bias_ptr, gate_bias_ptr, step)
            share = sigmoid(gate)
            silu = gate * share
            grad_up = grad * silu
            grad_gate = grad * up * (share + silu * (1.0 - share))
            tma.store_wait(0)  # the blocks before have left their memory
            made_slots.index(ME * SLOTS).store(grad_gate.to(DTYPE))
            made_slots.index(ME * SLOTS + 1).store(grad_up.to(DTYPE))
            if hidden is not None:
                made_slots.index(ME * SLOTS + 2).store((silu * up).to(DTYPE))
        _store(pair, hidden, made_slots, entry, i, start, hi - 1, H, SLOTS, ME)
        tma.store_wait(0)
        mbarrier.arrive(grad_empty.index(ME), count=1)


@gluon.jit
def _store(
    pair, hidden, made_slots, entry, i, start, step,
    H: gl.constexpr, SLOTS: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Stores the blocks of a step, during the next one's products: see `parts`."""
    LAYOUT: gl.constexpr = pair.layout
    fence_async_shared()
    for which in gl.static_range(2):
        made = viewed(made_slots.index(ME * SLOTS + which), [1, 1, 64, _STEP], LAYOUT)
        store_tile(pair, [entry, i, start, which * H + step * _STEP], made)
    if hidden is not None:
        made = viewed(made_slots.index(ME * SLOTS + 2), [1, 1, 64, _STEP], LAYOUT)
        store_tile(hidden, [entry, i, start, step * _STEP], made)


@gluon.jit
def _load_weights(
    up_weight, gate_weight, down_weight, ring, full, empty, blocks, C: gl.constexpr, H: gl.constexpr
):
    STEPS: gl.constexpr = H // _STEP
    begin, end = share_of(blocks)
    stage = 0
    phase = 1
    for block in range(begin, end):
        step = block % STEPS
        stage, phase = load_projections(
            up_weight, gate_weight, ring, full, empty, stage, phase, step, C
        )
        stage, phase = load_down(
            down_weight, ring, full, empty, stage, phase, step, (C // _STEP + 1) // 2
        )


@gluon.jit
def _load_rows(
    rows, slots, full, empty, pairs, blocks, C: gl.constexpr, H: gl.constexpr, SLOTS: gl.constexpr
):
    """The consumers' tiles of x or G; each consumer has SLOTS slots, of 64 channels each."""
    LAYOUT: gl.constexpr = rows.layout
    STEPS: gl.constexpr = H // _STEP
    _, R, _, per_row = pairs
    begin, end = share_of(blocks)
    phase = 1
    for group in range(begin // STEPS, (end + STEPS - 1) // STEPS):
        for me in range(_CONSUMERS):
            entry, i, start = tile_at(group * _CONSUMERS + me, R, per_row)
            mbarrier.wait(empty.index(me), phase)
            mbarrier.expect(full.index(me), 64 * C * 2)
            for k in gl.static_range(C // _STEP):
                slot = viewed(slots.index(me * SLOTS + k), [1, 1, 64, _STEP], LAYOUT)
                load_tile(rows, [entry, i, start, k * _STEP], full.index(me), slot)
        phase ^= 1


@gluon.jit(
    do_not_specialize=[
        "up_bias_ptr", "gate_bias_ptr", "moments_ptr", "eps", "M", "R", "J", "per_row", "blocks",
        "share",
    ]
)  # fmt: skip
def _swiglu_bwd_hopper_kernel(
    x, grad, up_weight, gate_weight, down_weight, pair, hidden,
    norm_weight_ptr, norm_bias_ptr, up_bias_ptr, gate_bias_ptr, hat_ptr, moments_ptr,
    eps, M, R, J, per_row, blocks, share,
    C: gl.constexpr, H: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    LAYOUT: gl.constexpr, RING_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dp, du, and what else is wanted, of `share` of the blocks."""
    DTYPE: gl.constexpr = x.dtype
    PARTS: gl.constexpr = C // _STEP
    SLOTS: gl.constexpr = max(PARTS, 3)  # for G; then dp, du and h
    x_slots = gl.allocate_shared_memory(DTYPE, [_CONSUMERS * PARTS, 64, _STEP], LAYOUT)
    made_slots = gl.allocate_shared_memory(DTYPE, [_CONSUMERS * SLOTS, 64, _STEP], LAYOUT)
    ring = gl.allocate_shared_memory(DTYPE, [STAGES, 2 * _STEP, _STEP], RING_LAYOUT)
    loaded = barriers(_CONSUMERS, 1), barriers(_CONSUMERS, 1), barriers(STAGES, 1)
    freed = barriers(_CONSUMERS, 1), barriers(_CONSUMERS, 1), barriers(STAGES, _CONSUMERS)
    fence_async_shared()
    memory = x_slots, made_slots, ring, loaded, freed
    made = pair, hidden, hat_ptr, moments_ptr
    parameters = norm_weight_ptr, norm_bias_ptr, up_bias_ptr, gate_bias_ptr
    pairs = M, R, J, per_row
    work = blocks, share
    common = memory, made, parameters, eps, pairs, work
    gl.warp_specialize([
        (_consume, (common, C, H, SLOTS, 0)),
        (_consume, (common, C, H, SLOTS, 1)),
        (_load_weights, (
            up_weight, gate_weight, down_weight, ring, loaded[2], freed[2], work, C, H,
        )),
        (_load_rows, (x, x_slots, loaded[0], freed[0], pairs, work, C, H, PARTS)),
        (_load_rows, (grad, made_slots, loaded[1], freed[1], pairs, work, C, H, SLOTS)),
    ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip


def takes(call: Transition) -> bool:
    """Whether the backward of rows without padding can run here; x is among `variants`'s."""
    return takes_weights(call)


def prepare(
    call: Transition, grad: Tensor, hidden: bool, config: LaunchConfig
) -> PreparedLaunch:
    """The launch for rows like x of this call and the output's gradient [M, C], contiguous.

    `hidden` is whether h is wanted.

    Raises:
        ValueError: a setting whose ring is too short.
    """
    x = call.x
    batch, rows, columns, channels = x.shape
    parts = channels // STEP
    if config.num_stages < parts + (parts + 1) // 2:
        raise ValueError(
            f"the setting must have as many stages as a step's products take for {channels} "
            f"channels; got {config}"
        )

    def made(width: int) -> list[int]:
        return [rows * columns * width, columns * width, width, 1]

    all_strides = [strides(x), made(channels), made(2 * call.hidden), made(call.hidden)]
    tiles = Tiles.over(batch, rows, columns, all_strides, False)
    blocks = tiles.values(_CONSUMERS.value)["tiles"] * (call.hidden // STEP)
    share = -(-blocks // device_target(x.device).multiprocessors)

    return PreparedLaunch(
        _swiglu_bwd_hopper_kernel,
        -(-blocks // share),
        tensors={
            **pointers(
                "norm_weight_ptr", "norm_bias_ptr", "up_bias_ptr", "gate_bias_ptr", "hat_ptr",
                "moments_ptr",
            ),
            "x": tiles.descriptor(x, all_strides[0], channels, STEP),
            "grad": tiles.descriptor(grad, all_strides[1], channels, STEP),
            **descriptors_of(call.weights),
            "pair": tiles.descriptor(grad, all_strides[2], 2 * call.hidden, STEP),
            "hidden": tiles.descriptor(grad, all_strides[3], call.hidden, STEP) if hidden else None,
        },
        values=dict(
            eps=call.eps, M=len(grad), R=tiles.rows, J=tiles.columns, per_row=tiles.per_row,
            blocks=blocks, share=share,
        ),
        constants=dict(
            C=channels, H=call.hidden, STAGES=config.num_stages,
            REGISTERS=REGISTERS[2][1],
            LAYOUT=shared_layout([ROWS, STEP]), RING_LAYOUT=shared_layout([2 * STEP, STEP]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[2][0]),
        stage="swiglu_bwd",
        variant="hopper",
    )  # fmt: skip


def launch(
    call: Transition,
    prepared: PreparedLaunch,
    grad: Tensor,
    pair: Tensor,
    moments: Tensor,
    hat: Tensor | None,
    hidden: Tensor | None,
) -> None:
    """Fills pair [M, 2H], moments [2, M], and what is given of x^ [M, C] and h [M, H]."""
    weights = call.weights
    prepared.launch(
        x=call.x,
        grad=grad,
        up_weight=weights.up_weight,
        gate_weight=weights.gate_weight,
        down_weight=weights.down_weight,
        pair=pair,
        hidden=hidden,
        norm_weight_ptr=weights.norm_weight,
        norm_bias_ptr=weights.norm_bias,
        up_bias_ptr=weights.up_bias,
        gate_bias_ptr=weights.gate_bias,
        hat_ptr=hat,
        moments_ptr=moments,
    )
