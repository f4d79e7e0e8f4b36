"""Stage 1's backward from dp, dg and dq to dx on Hopper GPUs: see `triton_path.input_backward`.

    dz = dp Wp + dg Wg + dq Wo
    dx = rstd (g1 dz - mean(g1 dz) - x^ mean(g1 dz x^)),   x^ = (x - mean) rstd

of M = R * L rows in bfloat16, C = 128 or 256; the transition's has no dq. Products and sums are in
fp32; dz is never stored.

A program has two consumers, each of which holds a tile of whole rows of dz in registers. They
share the weights, which stream past in steps of 64 summed channels. A consumer's rows come in a
ring of its own: the steps of dp, dg and dq, then x. Its parts of x are read twice, for the means
and for dx, which is written over them and stored from there. One consumer may be ahead of the other
by as many steps as the weights have stages.

A tile's dq has been read before its dx is written: dx may be the memory of dq.
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
from ..triton_parts.launch import (
    PreparedLaunch,
    has_descriptor,
    named_strides,
    pointers,
    strides,
)
from ..triton_parts.settings import LaunchConfig
from .parts import (
    REGISTERS,
    STEP,
    advance,
    barriers,
    behind,
    load_tile,
    parts_of,
    store_tile,
    tma_descriptor,
)

_STEP = gl.constexpr(STEP)


@gluon.jit
def _consume(
    rows_ring, rows_full, rows_empty, ring, full, empty, grad_x, moments_ptr, norm_weight_ptr,
    M, L, tiles, moments_strides,
    STEPS: gl.constexpr, ROWS: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr,
    ME: gl.constexpr,
):  # fmt: skip
    """One consumer: every other tile of this program, all channels."""
    C: gl.constexpr = ring.shape[2]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    AT_ROWS: gl.constexpr = gl.SliceLayout(1, PART)
    zero = gl.zeros([ROWS, C], gl.float32, ACC)
    slot = 0
    slot_phase = 0
    stage = 0
    phase = 0
    programs = gl.num_programs(0)
    for tile in range(gl.program_id(0) + ME * programs, tiles, 2 * programs):
        row = tile * ROWS + gl.arange(0, ROWS, layout=AT_ROWS)
        i = row // L
        offs = i.to(gl.int64) * moments_strides[1] + (row - i * L).to(gl.int64) * moments_strides[2]
        # The moments arrive during the products.
        mean = gl.load(moments_ptr + offs, mask=row < M, other=0.0)
        rstd = gl.load(moments_ptr + moments_strides[0] + offs, mask=row < M, other=0.0)
        if ME == 0:
            alone = tile + programs >= tiles
        acc = zero
        for step in range(STEPS):
            mbarrier.wait(rows_full.index(slot), slot_phase)
            mbarrier.wait(full.index(stage), phase)
            acc = warpgroup_mma(
                rows_ring.index(slot), ring.index(stage), acc, use_acc=step > 0, is_async=True
            )
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The step before this one has been multiplied.
            before = gl.where(slot == 0, SLOTS - 1, slot - 1)
            mbarrier.arrive(rows_empty.index(before), count=1, pred=step > 0)
            before = gl.where(stage == 0, STAGES - 1, stage - 1)
            mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
            if ME == 0:
                # In place of a second consumer without a tile.
                mbarrier.arrive(empty.index(before), count=1, pred=(step > 0) & alone)
            slot, slot_phase = advance(slot, slot_phase, SLOTS)
            stage, phase = advance(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(rows_empty.index(gl.where(slot == 0, SLOTS - 1, slot - 1)), count=1)
        before = gl.where(stage == 0, STAGES - 1, stage - 1)
        mbarrier.arrive(empty.index(before), count=1)
        if ME == 0:
            mbarrier.arrive(empty.index(before), count=1, pred=alone)
        if norm_weight_ptr is not None:
            channels = gl.arange(0, C, layout=gl.SliceLayout(0, ACC))
            acc = acc * gl.load(norm_weight_ptr + channels).to(gl.float32).expand_dims(0)
        parts = parts_of(acc)
        mean = mean.expand_dims(1)
        scale = rstd.expand_dims(1)
        mean_grad = gl.zeros([ROWS], gl.float32, AT_ROWS)
        mean_grad_hat = gl.zeros([ROWS], gl.float32, AT_ROWS)
        first = slot
        for part in gl.static_range(C // _STEP):
            mbarrier.wait(rows_full.index(slot), slot_phase)
            hat = (rows_ring.index(slot).load(PART).to(gl.float32) - mean) * scale
            mean_grad += gl.sum(parts[part], 1)
            mean_grad_hat += gl.sum(parts[part] * hat, 1)
            slot, slot_phase = advance(slot, slot_phase, SLOTS)
        shift = (mean_grad * (-1.0 / C) * rstd).expand_dims(1)
        slope = (mean_grad_hat * (-1.0 / C) * rstd).expand_dims(1)
        for part in gl.static_range(C // _STEP):
            made = rows_ring.index(behind(first, part, SLOTS))
            hat = (made.load(PART).to(gl.float32) - mean) * scale
            made.store((parts[part] * scale + shift + hat * slope).to(gl.bfloat16))
        fence_async_shared()  # which waits for what was written: once for all parts
        for part in gl.static_range(C // _STEP):
            made = rows_ring.index(behind(first, part, SLOTS))
            store_tile(grad_x, [tile * ROWS, part * _STEP], made)
        for part in gl.static_range(C // _STEP):
            tma.store_wait(C // _STEP - 1 - part)
            mbarrier.arrive(rows_empty.index(behind(first, part, SLOTS)), count=1)


@gluon.jit
def _load_steps(tensor, row, ring, full, empty, slot, phase, COUNT: gl.constexpr):
    """COUNT tiles of 64 columns each into a ring, which goes on from (slot, phase)."""
    SLOTS: gl.constexpr = ring.shape[0]
    BYTES: gl.constexpr = ring.shape[1] * ring.shape[2] * 2
    for step in range(COUNT):
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), BYTES)
        load_tile(tensor, [row, step * _STEP], full.index(slot), ring.index(slot))
        slot, phase = advance(slot, phase, SLOTS)
    return slot, phase


@gluon.jit
def _load_rows(
    pair, gate, x, ring, full, empty, tiles,
    C: gl.constexpr, N: gl.constexpr, GATED: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """dp, dg, dq and x of one consumer's tiles."""
    slot = 0
    phase = 1
    programs = gl.num_programs(0)
    for tile in range(gl.program_id(0) + ME * programs, tiles, 2 * programs):
        row = tile * ring.shape[1]
        slot, phase = _load_steps(pair, row, ring, full, empty, slot, phase, 2 * N // _STEP)
        if GATED:
            slot, phase = _load_steps(gate, row, ring, full, empty, slot, phase, C // _STEP)
        slot, phase = _load_steps(x, row, ring, full, empty, slot, phase, C // _STEP)


@gluon.jit
def _load_channels(weight, ring, full, empty, stage, phase, COUNT: gl.constexpr):
    """COUNT steps of a projection [COUNT * 64, C] into a ring, which goes on."""
    STAGES: gl.constexpr = ring.shape[0]
    BYTES: gl.constexpr = ring.shape[1] * ring.shape[2] * 2
    for step in range(COUNT):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), BYTES)
        load_tile(weight, [step * _STEP, 0], full.index(stage), ring.index(stage))
        stage, phase = advance(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _load_weights(
    first_weight, second_weight, gate_weight, ring, full, empty, tiles,
    C: gl.constexpr, N: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Wp, Wg and Wo for each two tiles."""
    stage = 0
    phase = 1
    for _ in range(gl.program_id(0), tiles, 2 * gl.num_programs(0)):
        stage, phase = _load_channels(first_weight, ring, full, empty, stage, phase, N // _STEP)
        stage, phase = _load_channels(second_weight, ring, full, empty, stage, phase, N // _STEP)
        if GATED:
            stage, phase = _load_channels(gate_weight, ring, full, empty, stage, phase, C // _STEP)


@gluon.jit(
    do_not_specialize=[
        "moments_ptr", "norm_weight_ptr", "M", "L", "tiles",
        "stride_moments_n", "stride_moments_i", "stride_moments_j",
    ]
)  # fmt: skip
def _input_bwd_hopper_kernel(
    pair, gate, x, first_weight, second_weight, gate_weight, grad_x, moments_ptr, norm_weight_ptr,
    M, L, tiles, stride_moments_n, stride_moments_i, stride_moments_j,
    C: gl.constexpr, N: gl.constexpr, ROWS: gl.constexpr, SLOTS: gl.constexpr,
    STAGES: gl.constexpr, GATED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dx of `tiles` tiles of ROWS rows, all C channels; K = the 2N columns of `pair`, then dq's."""
    STEPS: gl.constexpr = (2 * N + (C if GATED else 0)) // _STEP
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, _STEP, C], first_weight.layout)
    rows0 = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, ROWS, _STEP], pair.layout)
    rows1 = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, ROWS, _STEP], pair.layout)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, 2)
    full0 = barriers(SLOTS, 1)
    full1 = barriers(SLOTS, 1)
    empty0 = barriers(SLOTS, 1)
    empty1 = barriers(SLOTS, 1)
    fence_async_shared()
    strides = stride_moments_n, stride_moments_i, stride_moments_j
    gl.warp_specialize([
        (_consume, (
            rows0, full0, empty0, ring, full, empty, grad_x, moments_ptr, norm_weight_ptr,
            M, L, tiles, strides, STEPS, ROWS, SLOTS, STAGES, 0,
        )),
        (_consume, (
            rows1, full1, empty1, ring, full, empty, grad_x, moments_ptr, norm_weight_ptr,
            M, L, tiles, strides, STEPS, ROWS, SLOTS, STAGES, 1,
        )),
        (_load_weights, (
            first_weight, second_weight, gate_weight, ring, full, empty, tiles, C, N, GATED,
        )),
        (_load_rows, (pair, gate, x, rows0, full0, empty0, tiles, C, N, GATED, 0)),
        (_load_rows, (pair, gate, x, rows1, full1, empty1, tiles, C, N, GATED, 1)),
    ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip


def takes(
    pair: Tensor, gate: Tensor | None, x: Tensor, weights: tuple[Tensor, ...], padded: bool
) -> bool:
    """Whether dx of rows x [R, L, C] can be computed here: see `input_bwd`."""
    tensors = (pair, *weights) if gate is None else (pair, gate, *weights)
    return (
        not padded
        and pair.shape[1] % (2 * STEP) == 0
        and _row_stride(x) > 0
        and all([t.dtype == x.dtype and has_descriptor(t) for t in tensors])
    )


def _row_stride(x: Tensor) -> int:
    """The distance of the rows of x [R, L, C] if it is one; 0 if not."""
    stride_i, stride_j, _ = strides(x)
    rows, columns, channels = x.shape
    if columns == 1:
        return stride_i or channels
    return stride_j if rows == 1 or stride_i == columns * stride_j else 0


def prepare(
    pair: Tensor,
    gate: Tensor | None,
    x: Tensor,
    moments: Tensor,
    weights: tuple[Tensor, ...],
    config: LaunchConfig,
) -> PreparedLaunch:
    """The launch of `input_bwd` for tensors like these."""
    count, length, channels = x.shape
    total, width = count * length, pair.shape[1] // 2
    rows = config.block_m // 2
    tiles = -(-total // rows)

    def rows_of(tensor: Tensor, width: int, stride: int):
        return tma_descriptor(tensor, [total, width], [stride, 1], [rows, STEP])

    named = dict(
        first_weight=weights[0], second_weight=weights[1],
        gate_weight=None if gate is None else weights[-1],
    )  # fmt: skip
    return PreparedLaunch(
        _input_bwd_hopper_kernel,
        min(tiles, device_target(x.device).multiprocessors),
        tensors={
            **pointers("moments_ptr", "norm_weight_ptr"),
            "pair": rows_of(pair, 2 * width, pair.stride(0)),
            "gate": None if gate is None else rows_of(gate, channels, gate.stride(0)),
            "x": rows_of(x, channels, _row_stride(x)),
            "grad_x": rows_of(x, channels, channels),
        } | {
            name: None if weight is None
            else tma_descriptor(weight, weight.shape, weight.stride(), [STEP, channels])
            for name, weight in named.items()
        },
        values=dict(
            M=total, L=length, tiles=tiles, **named_strides("moments", "nij", moments.stride())
        ),
        constants=dict(
            C=channels, N=width, ROWS=rows, SLOTS=config.split, STAGES=config.num_stages,
            GATED=gate is not None, REGISTERS=REGISTERS[2][1],
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[2][0]),
        stage="input_bwd",
        variant="hopper",
    )  # fmt: skip


def launch(
    prepared: PreparedLaunch,
    pair: Tensor,
    gate: Tensor | None,
    x: Tensor,
    moments: Tensor,
    weights: tuple[Tensor, ...],
    norm_weight: Tensor | None,
    grad_x: Tensor,
) -> None:
    """Fills grad_x; `prepared` is from `prepare`."""
    prepared.launch(
        pair=pair,
        gate=gate,
        x=x,
        grad_x=grad_x,
        first_weight=weights[0],
        second_weight=weights[1],
        gate_weight=None if gate is None else weights[-1],
        moments_ptr=moments,
        norm_weight_ptr=norm_weight,
    )
