"""The backward of the output's LayerNorm on Hopper GPUs: see `triton_path.norm_backward`.

    dt = rstd (g2 dn - mean(g2 dn) - t^ mean(g2 dn t^)),   dn = de We      t [D, R, pitch], planes

of R * L pairs in bfloat16, D = 128 or 256, and t^ [R*L, D], if wanted. Products and sums are in
fp32; dn is never stored.

A program has the whole projection in shared memory, and two consumers, each of which holds a tile
of 64 pairs of dn, all D channels, in registers. A consumer's steps of 64 channels of de come in a
ring of its own, then t, 64 channels at a time. dt is written over t, there and, if its memory is
that of t, outside.
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

from .._call import Weights
from ..triton_parts.device import device_target
from ..triton_parts.launch import PreparedLaunch, has_descriptor, pointers
from ..triton_parts.settings import LaunchConfig
from .parts import (
    REGISTERS,
    STEP,
    Tiles,
    advance,
    barriers,
    load_tile,
    parts_of,
    place_in_rows,
    shared_layout,
    store_tile,
    tma_descriptor,
    viewed,
)

_STEP = gl.constexpr(STEP)


@gluon.jit
def _consume(
    ring, hats, full, empty, weights, loaded, grad_t, hat, rows_ptr, norm_weight_ptr, pairs,
    ROWS: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """One consumer: every other tile of this program, all channels."""
    D: gl.constexpr = weights.shape[2]
    STEPS: gl.constexpr = weights.shape[0]
    SLOTS: gl.constexpr = ring.shape[0]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    AT_ROWS: gl.constexpr = gl.SliceLayout(1, PART)
    PLANES: gl.constexpr = grad_t.layout
    zero = gl.zeros([64, D], gl.float32, ACC)
    slot = 0
    phase = 0
    programs = gl.num_programs(0)
    R, J, per_row, tiles = pairs
    for tile in range(gl.program_id(0) + ME * programs, tiles, 2 * programs):
        i, start = place_in_rows(tile, per_row)
        column = start + gl.arange(0, 64, layout=AT_ROWS)
        inside = column < J
        pairs_of_plane = R.to(gl.int64) * J
        ptrs = rows_ptr + (i.to(gl.int64) * J + pairs_of_plane) + column
        # They arrive during the products.
        mean = gl.load(ptrs, mask=inside, other=0.0)
        rstd = gl.load(ptrs + pairs_of_plane, mask=inside, other=0.0)
        mean_grad = gl.load(ptrs + 2 * pairs_of_plane, mask=inside, other=0.0)
        mean_grad_hat = gl.load(ptrs + 3 * pairs_of_plane, mask=inside, other=0.0)
        later = tile >= 2 * programs
        acc = zero
        for step in range(STEPS):
            mbarrier.wait(loaded.index(step), 0)
            mbarrier.wait(full.index(slot), phase)
            acc = warpgroup_mma(
                ring.index(slot), weights.index(step), acc, use_acc=step > 0, is_async=True
            )
            tma.store_wait(0)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # The step before this one has been multiplied; or dt before it has left its memory.
            before = gl.where(slot == 0, SLOTS - 1, slot - 1)
            mbarrier.arrive(empty.index(before), count=1, pred=(step > 0) | later)
            slot, phase = advance(slot, phase, SLOTS)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(gl.where(slot == 0, SLOTS - 1, slot - 1)), count=1)
        parts = parts_of(acc)
        scale = rstd.expand_dims(1)
        shift = (mean_grad * rstd).expand_dims(1)
        slope = (mean_grad_hat * rstd).expand_dims(1)
        for part in gl.static_range(D // _STEP):
            mbarrier.wait(full.index(slot), phase)
            made = ring.index(slot)
            planes = made.permute((1, 0))
            normal = (planes.load(PART).to(gl.float32) - mean.expand_dims(1)) * scale
            grad = parts[part] * scale
            if norm_weight_ptr is not None:
                channels = part * _STEP + gl.arange(0, _STEP, layout=gl.SliceLayout(0, PART))
                grad = grad * gl.load(norm_weight_ptr + channels).to(gl.float32).expand_dims(0)
            grad = grad - shift - normal * slope
            # Padding columns of t are uninitialised and may be NaN; those of dt are zeros.
            grad = gl.where(inside.expand_dims(1), grad, 0.0)
            planes.store(grad.to(gl.bfloat16))
            if hat is not None:
                hats.index(part % 2).store(normal.to(gl.bfloat16))
            fence_async_shared()
            store_tile(grad_t, [part * _STEP, i, start], viewed(made, [_STEP, 1, 64], PLANES))
            if hat is not None:
                of_part = viewed(hats.index(part % 2), [1, 64, _STEP], ROWS)
                store_tile(hat, [i, start, part * _STEP], of_part)
            if part > 0:  # the part before has left its memory
                tma.store_wait(1 if hat is None else 2)
                before = gl.where(slot == 0, SLOTS - 1, slot - 1)
                mbarrier.arrive(empty.index(before), count=1)
            slot, phase = advance(slot, phase, SLOTS)
    tma.store_wait(0)


@gluon.jit
def _load_rows(
    grad_emit, t, ring, full, empty, per_row, tiles,
    C: gl.constexpr, D: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """de and t of one consumer's tiles."""
    SLOTS: gl.constexpr = ring.shape[0]
    ROWS: gl.constexpr = grad_emit.layout
    PLANES: gl.constexpr = t.layout
    slot = 0
    phase = 1
    programs = gl.num_programs(0)
    for tile in range(gl.program_id(0) + ME * programs, tiles, 2 * programs):
        i, start = place_in_rows(tile, per_row)
        for step in range(C // _STEP):
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(bar, 64 * _STEP * 2)
            some = viewed(ring.index(slot), [1, 64, _STEP], ROWS)
            load_tile(grad_emit, [i, start, step * _STEP], bar, some)
            slot, phase = advance(slot, phase, SLOTS)
        for part in range(D // _STEP):
            bar = full.index(slot)
            mbarrier.wait(empty.index(slot), phase)
            mbarrier.expect(bar, 64 * _STEP * 2)
            some = viewed(ring.index(slot), [_STEP, 1, 64], PLANES)
            load_tile(t, [part * _STEP, i, start], bar, some)
            slot, phase = advance(slot, phase, SLOTS)


@gluon.jit
def _load_weights(emit_weight, weights, loaded):
    for step in range(weights.shape[0]):
        mbarrier.expect(loaded.index(step), _STEP * weights.shape[2] * 2)
        load_tile(emit_weight, [step * _STEP, 0], loaded.index(step), weights.index(step))


@gluon.jit(do_not_specialize=["R", "J", "per_row", "tiles"])
def _norm_out_bwd_hopper_kernel(
    grad_emit, t, emit_weight, grad_t, hat, rows_ptr, norm_weight_ptr, R, J, per_row, tiles,
    C: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """dt and t^ of `tiles` tiles of 64 pairs, all D channels; K = the C columns of de."""
    STEPS: gl.constexpr = C // _STEP
    weights = gl.allocate_shared_memory(gl.bfloat16, [STEPS, _STEP, D], emit_weight.layout)
    rows0 = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, 64, _STEP], LAYOUT)
    rows1 = gl.allocate_shared_memory(gl.bfloat16, [SLOTS, 64, _STEP], LAYOUT)
    hats0 = rows0
    hats1 = rows1
    if hat is not None:
        hats0 = gl.allocate_shared_memory(gl.bfloat16, [2, 64, _STEP], LAYOUT)
        hats1 = gl.allocate_shared_memory(gl.bfloat16, [2, 64, _STEP], LAYOUT)
    loaded = barriers(STEPS, 1)
    full0 = barriers(SLOTS, 1)
    full1 = barriers(SLOTS, 1)
    empty0 = barriers(SLOTS, 1)
    empty1 = barriers(SLOTS, 1)
    fence_async_shared()
    ROWS: gl.constexpr = grad_emit.layout
    pairs = R, J, per_row, tiles
    gl.warp_specialize([
        (_consume, (
            rows0, hats0, full0, empty0, weights, loaded, grad_t, hat, rows_ptr,
            norm_weight_ptr, pairs, ROWS, 0,
        )),
        (_consume, (
            rows1, hats1, full1, empty1, weights, loaded, grad_t, hat, rows_ptr,
            norm_weight_ptr, pairs, ROWS, 1,
        )),
        (_load_weights, (emit_weight, weights, loaded)),
        (_load_rows, (grad_emit, t, rows0, full0, empty0, per_row, tiles, C, D, 0)),
        (_load_rows, (grad_emit, t, rows1, full1, empty1, per_row, tiles, C, D, 1)),
    ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip


def takes(t: Tensor, grad_t: Tensor, weight: Tensor, padded: bool) -> bool:
    """Whether dt of t [D, R, pitch], and with the projection [C, D], can be computed here."""
    return (
        not padded
        and weight.shape[0] in range(STEP, 257, STEP)
        and t.dtype == grad_t.dtype == weight.dtype
        and has_descriptor(t)
        and has_descriptor(grad_t)
    )


def prepare(
    t: Tensor, grad_t: Tensor, length: int, weight: Tensor, with_hat: bool, config: LaunchConfig
) -> PreparedLaunch:
    """The launch of `norm_out_bwd` for tensors like these; see `prepare_norm_out_bwd`."""
    hidden, count, pitch = t.shape
    channels = weight.shape[0]
    one_row = pitch == length and t.stride(1) == pitch == grad_t.stride(1)
    tiles = Tiles.of(1, count, length, one_row)

    def of_rows(width: int):
        shape = [tiles.rows, tiles.columns, width]
        return tma_descriptor(t, shape, [tiles.columns * width, width, 1], [1, 64, STEP])

    def of_planes(planes: Tensor):
        shape = [hidden, tiles.rows, tiles.columns if one_row else pitch]
        return tma_descriptor(planes, shape, planes.stride(), [STEP, 1, 64])

    values = tiles.values(1)
    hat = of_rows(hidden) if with_hat else None
    return PreparedLaunch(
        _norm_out_bwd_hopper_kernel,
        min(values["tiles"], device_target(t.device).multiprocessors),
        tensors={
            **pointers("rows_ptr", "norm_weight_ptr"),
            "grad_emit": of_rows(channels), "t": of_planes(t), "grad_t": of_planes(grad_t),
            "emit_weight": tma_descriptor(weight, weight.shape, weight.stride(), [STEP, hidden]),
            "hat": hat,
        },
        values={name: values[name] for name in ("R", "J", "per_row", "tiles")},
        constants=dict(
            C=channels, D=hidden, SLOTS=config.split, REGISTERS=REGISTERS[2][1],
            LAYOUT=shared_layout([64, STEP]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[2][0]),
        stage="norm_out_bwd",
        variant="hopper",
    )  # fmt: skip


def launch(
    prepared: PreparedLaunch,
    grad_emit: Tensor,
    t: Tensor,
    rows: Tensor,
    weights: Weights,
    grad_t: Tensor,
    hat_t: Tensor | None,
) -> None:
    """Fills grad_t and, where given, hat_t; `prepared` is from `prepare`."""
    prepared.launch(
        grad_emit=grad_emit,
        t=t,
        emit_weight=weights.p_out_weight,
        grad_t=grad_t,
        hat=hat_t,
        rows_ptr=rows,
        norm_weight_ptr=weights.norm_out_weight,
    )
