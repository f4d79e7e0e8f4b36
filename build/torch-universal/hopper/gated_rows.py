"""Stage 1, and the first stage of the transition: see `fused_dual_gemm` and `swiglu_hidden`.

    v, u = LayerNorm(x) Wv^T + bv, LayerNorm(x) Wg^T + bg           x [B, R, J, C], 16 bits
    planes:  out[b, n, q, p] = v sigmoid(u) mask at the pair (q, p) of the entry b
    rows:    out[(b, i, j), n] = v u sigmoid(u)

With lengths, tiles of padding alone are left out, as there.

The same arithmetic as in the plain kernels, but for the norm, which is folded into the weights (see
`folded_norm`), so that the rows are multiplied as they came.

A program has two or three consumers, each for a tile of 64 pairs of one row, and two warps that
load: one the rows of x, one the weights, which stream past once for all consumers' tiles, or stay.
A consumer keeps its rows in registers and frees their memory at once for its next tile's, or, where
there is not room for all consumers' rows, for the next consumer's.
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

from .._call import Call, Transition
from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    Launches,
    PreparedLaunch,
    has_descriptor,
    named_strides,
    pointers,
    strides,
)
from ..triton_parts.settings import LaunchConfig, settings_of
from ..triton_parts.tiles import PADDING_MULTIPLE
from .folded_norm import EXTRA, Folded, Folds, Pair, fold_norms
from .parts import (
    LOG2_E,
    REGISTERS,
    ROWS,
    Tiles,
    barriers,
    count_tiles,
    free_weights,
    halves,
    load_parts,
    load_weights,
    part_of,
    place_of,
    ready,
    reciprocal,
    shared_layout,
    statistics,
    statistics_of_wide,
    store_tile,
    tma_descriptor,
    viewed,
    weight_tiles,
)

_EXTRA = gl.constexpr(EXTRA)
_BARRIERS = 1024  # bytes, and more than they need
_PADDING = gl.constexpr(PADDING_MULTIPLE)
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _consume(
    common, C: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, SLOTS: gl.constexpr, PLANES: gl.constexpr, MASKED: gl.constexpr,
    ME: gl.constexpr,
):  # fmt: skip
    """One consumer: N channels of every CONSUMERS-th tile of 64 pairs."""
    (
        memory, out_slots, loaded, freed, turns, out, mask_ptr, moments_ptr, factors_ptr,
        lengths, eps, pairs, mask_strides,
    ) = common  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    AT_ROWS: gl.constexpr = gl.SliceLayout(1, HALF)
    DTYPE: gl.constexpr = out_slots.dtype
    PLACE: gl.constexpr = ME % SLOTS
    x_slots, ring, extras = memory
    x_full, ring_full = loaded
    x_empty, ring_empty = freed
    B, R, J, pitch, per_row, tiles = pairs
    lengths_ptr, first = lengths
    slot = out_slots.index(ME)
    # With lengths too few registers are left; up to 128 channels there is little to gain.
    LATER: gl.constexpr = C > 128 and lengths_ptr is None
    zero = gl.zeros([64, 2 * BLOCK_N], gl.float32, ACC)
    stage = 0
    phase = 0
    tile_phase = 0
    turn_phase = 0
    at = 0
    base = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        entry, i, start, base, length = place_of(
            tile * CONSUMERS + ME, at, base, lengths_ptr, first, B, R,
            pitch if PLANES else J, per_row, _PADDING if PLANES else 1,
        )  # fmt: skip
        at = entry
        # The mask arrives while the statistics are computed.
        j = start + gl.arange(0, 64, layout=AT_ROWS)
        if PLANES:
            mask = (j < J) & (entry < B)
            if lengths_ptr is not None:
                mask = mask & (first[0] + i < length) & (first[1] + j < length)
            within = mask
            if MASKED:
                offs_mask = entry.to(gl.int64) * mask_strides[0] + i.to(gl.int64) * mask_strides[1]
                offs_mask = offs_mask + j.to(gl.int64) * mask_strides[2]
                mask = gl.load(mask_ptr + offs_mask, mask=mask, other=0)
        mbarrier.wait(x_full.index(ME), tile_phase)
        tile_phase ^= 1
        if C > 256:
            mean, rstd = statistics_of_wide(x_slots, PLACE, eps, C, False, A)
        else:
            mean, rstd = statistics(x_slots, PLACE, eps, C, False, A)
        rows, further, scale = ready(x_slots, PLACE, mean, rstd, eps, C, False, A)
        fence_async_shared()
        mbarrier.arrive(x_empty.index(PLACE), count=1)
        scale = gl.convert_layout(scale, AT_ROWS)
        gate_scale = scale * -LOG2_E
        if PLANES:
            scale = scale * mask.to(gl.float32)
            offs = (entry.to(gl.int64) * 2 * R + i) * pitch + j
            inside = (j < pitch) & (entry < B)
            mean = gl.convert_layout(mean, AT_ROWS)
            rstd = gl.convert_layout(rstd, AT_ROWS)
            if lengths_ptr is not None:
                # Padding may be NaN.
                mean = gl.where(within, mean, 0.0)
                rstd = gl.where(within, rstd, gl.rsqrt(eps))
            gl.store(moments_ptr + offs, mean, mask=inside)
            gl.store(moments_ptr + offs + R.to(gl.int64) * pitch, rstd, mask=inside)
        for step in range(N // BLOCK_N):
            value_scale, power_scale = scale, gate_scale
            if factors_ptr is not None:
                value_scale = scale * gl.load(factors_ptr + step)
                power_scale = gate_scale * gl.load(factors_ptr + N // BLOCK_N + step)
            mbarrier.wait(ring_full.index(stage), phase)
            mbarrier.wait(turns.index(ME), turn_phase)
            turn_phase ^= 1
            extra = extras.index(stage).permute((1, 0))
            acc = warpgroup_mma(further, extra, zero, use_acc=False, is_async=True)
            PARTS: gl.constexpr = ring.shape[0] // STAGES
            for k in gl.static_range(PARTS):
                weight = ring.index(stage * PARTS + k).permute((1, 0))
                acc = warpgroup_mma(rows[k], weight, acc, is_async=True)
            mbarrier.arrive(turns.index((ME + 1) % CONSUMERS), count=1)
            if LATER and step > 0:
                _store(out, slot, entry, i, start, step - 1, R, N, BLOCK_N, PLANES)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            stage, phase = free_weights(ring_empty, stage, phase, STAGES, N // BLOCK_N)
            value, gate = halves(acc, HALF)
            # exp2 of this is exp of the negative argument of the sigmoid.
            power = gate * power_scale.expand_dims(1)
            gated = value * value_scale.expand_dims(1) * reciprocal(1.0 + gl.exp2(power))
            if not PLANES:
                gated = gated * (power * -_LN_2)
            elif lengths_ptr is not None:
                gated = gl.where(within.expand_dims(1), gated, 0.0)
            tma.store_wait(0)  # the block before has left the slot
            if PLANES:
                slot.permute((1, 0)).store(gated.to(DTYPE))
            else:
                slot.store(gated.to(DTYPE))
            if not LATER:
                _store(out, slot, entry, i, start, step, R, N, BLOCK_N, PLANES)
        if LATER:
            _store(out, slot, entry, i, start, N // BLOCK_N - 1, R, N, BLOCK_N, PLANES)
    tma.store_wait(0)


@gluon.jit
def _store(
    out, slot, entry, i, start, step, R,
    N: gl.constexpr, BLOCK_N: gl.constexpr, PLANES: gl.constexpr,
):  # fmt: skip
    """Stores the block of a step."""
    OUT_LAYOUT: gl.constexpr = out.layout
    fence_async_shared()
    if PLANES:
        made = viewed(slot, [BLOCK_N, 1, 64], OUT_LAYOUT)
        store_tile(out, [entry * N + step * BLOCK_N, i, start], made)
    else:
        made = viewed(slot, [1, 64, BLOCK_N], OUT_LAYOUT)
        store_tile(out, [entry * R + i, start, step * BLOCK_N], made)


@gluon.jit
def load_rows(
    x, x_slots, x_full, x_empty, lengths, pairs,
    C: gl.constexpr, CONSUMERS: gl.constexpr, SLOTS: gl.constexpr, PLANES: gl.constexpr,
):  # fmt: skip
    B, R, J, pitch, per_row, tiles = pairs
    lengths_ptr, first = lengths
    phase = 1
    at = 0
    base = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for me in range(CONSUMERS):
            entry, i, start, base, _ = place_of(
                tile * CONSUMERS + me, at, base, lengths_ptr, first, B, R,
                pitch if PLANES else J, per_row, _PADDING if PLANES else 1,
            )  # fmt: skip
            at = entry
            place = me if SLOTS == CONSUMERS else 0
            mbarrier.wait(x_empty.index(place), phase)
            load_parts(x, x_slots, place, x_full.index(me), entry, i, start, C, False)
            if SLOTS != CONSUMERS:
                phase ^= 1
        if SLOTS == CONSUMERS:
            phase ^= 1


@gluon.jit(
    do_not_specialize=[
        "mask_ptr", "factors_ptr", "lengths_ptr", "first_i", "first_j", "eps",
        "B", "R", "J", "per_row", "tiles",
        "stride_mask_b", "stride_mask_i", "stride_mask_j",
    ]
)  # fmt: skip
def _gated_rows_hopper_kernel(
    x, weights, further, out, mask_ptr, moments_ptr, factors_ptr, lengths_ptr,
    first_i, first_j, eps, B, R, J, pitch, per_row, tiles,
    stride_mask_b, stride_mask_i, stride_mask_j,
    C: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, SLOTS: gl.constexpr, PLANES: gl.constexpr, MASKED: gl.constexpr,
    REGISTERS: gl.constexpr,
    X_LAYOUT: gl.constexpr, OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """All N channels of B * R * per_row tiles of 64 pairs, CONSUMERS of them at a time.

    With lengths, of those that are not padding alone; (i, j) are pairs (first_i + i, first_j + j).
    """
    DTYPE: gl.constexpr = x.dtype
    PART: gl.constexpr = x.block_shape[3]
    PARTS: gl.constexpr = C // PART
    x_slots = gl.allocate_shared_memory(DTYPE, [SLOTS * PARTS, 64, PART], X_LAYOUT)
    ring = gl.allocate_shared_memory(DTYPE, [STAGES * PARTS, 2 * BLOCK_N, PART], weights.layout)
    extras = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * BLOCK_N, _EXTRA], further.layout)
    out_shape: gl.constexpr = [CONSUMERS, BLOCK_N, 64] if PLANES else [CONSUMERS, 64, BLOCK_N]
    out_slots = gl.allocate_shared_memory(DTYPE, out_shape, OUT_LAYOUT)
    loaded = barriers(CONSUMERS, 1), barriers(STAGES, 1)
    freed = barriers(SLOTS, 1), barriers(STAGES, CONSUMERS)
    turns = barriers(CONSUMERS, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    memory = x_slots, ring, extras
    lengths = lengths_ptr, (first_i, first_j)
    if lengths_ptr is not None:
        columns = pitch if PLANES else J
        tiles = count_tiles(lengths_ptr, lengths[1], B, R, columns, _PADDING if PLANES else 1)
        tiles = (tiles + CONSUMERS - 1) // CONSUMERS
    pairs = B, R, J, pitch, per_row, tiles
    strides = stride_mask_b, stride_mask_i, stride_mask_j
    common = (
        memory, out_slots, loaded, freed, turns, out, mask_ptr, moments_ptr, factors_ptr,
        lengths, eps, pairs, strides,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (common, C, N, BLOCK_N, STAGES, CONSUMERS, SLOTS, PLANES, MASKED, 0)),
            (_consume, (common, C, N, BLOCK_N, STAGES, CONSUMERS, SLOTS, PLANES, MASKED, 1)),
            (load_weights, (
                weights, further, ring, extras, loaded[1], freed[1], tiles, N, BLOCK_N, STAGES,
            )),
            (load_rows, (
                x, x_slots, loaded[0], freed[0], lengths, pairs, C, CONSUMERS, SLOTS, PLANES,
            )),
        ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (common, C, N, BLOCK_N, STAGES, CONSUMERS, SLOTS, PLANES, MASKED, 0)),
            (_consume, (common, C, N, BLOCK_N, STAGES, CONSUMERS, SLOTS, PLANES, MASKED, 1)),
            (_consume, (common, C, N, BLOCK_N, STAGES, CONSUMERS, SLOTS, PLANES, MASKED, 2)),
            (load_weights, (
                weights, further, ring, extras, loaded[1], freed[1], tiles, N, BLOCK_N, STAGES,
            )),
            (load_rows, (
                x, x_slots, loaded[0], freed[0], lengths, pairs, C, CONSUMERS, SLOTS, PLANES,
            )),
        ], [4, 4, 1, 1], [REGISTERS, REGISTERS, 24, 24])  # fmt: skip


def takes_planes(call: Call, planes: tuple[Tensor, Tensor]) -> bool:
    """Whether stage 1 of a call, or of a group of its channels, can run here."""
    a, b = planes
    batch, hidden, rows, pitch = a.shape
    size = hidden * rows * pitch
    return (
        hidden % ROWS == 0
        and a.stride() == b.stride() == (2 * size, rows * pitch, pitch, 1)
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.storage_offset() - a.storage_offset() == size
    )


def prepare_planes(
    call: Call, planes: tuple[Tensor, Tensor], first_row: int, config: LaunchConfig
) -> PreparedLaunch:
    """The launch of stage 1 for calls like this one; see `fused_dual_gemm.prepare_dual_gemm`."""
    a = planes[0]
    batch, hidden, rows, pitch = a.shape
    x_strides, mask_strides, first = list(strides(call.x)), (0, 0, 0), (first_row, 0)
    columns, stride_b, stride_q, stride_p = call.x.shape[2], *x_strides[:3]
    if call.mask is not None:
        mask_strides = strides(call.mask)
    if call.direction == "incoming":
        columns, stride_q, stride_p = call.x.shape[1], stride_p, stride_q
        mask_strides, first = (mask_strides[0], mask_strides[2], mask_strides[1]), (0, first_row)
    one_row = (
        call.lengths is None
        and pitch == columns
        and stride_q == columns * stride_p
        and mask_strides[1] == columns * mask_strides[2]
    )
    tiles = Tiles.of(batch, rows, columns, one_row)
    if one_row:
        pitch *= rows
    tiles = tiles._replace(per_row=-(-pitch // ROWS))
    x_tile = tiles.descriptor(
        call.x, [stride_b, stride_q, stride_p, 1], call.x.shape[3], part_of(call.x.shape[3])
    )
    out = tma_descriptor(
        a, [batch * 2 * hidden, tiles.rows, pitch], [tiles.rows * pitch, pitch, 1],
        [config.block_n, 1, ROWS],
    )  # fmt: skip
    return _prepare(
        "fused_dual_gemm", call.x, 2 * hidden, config, tiles, x_tile, out,
        planes=True, masked=call.mask is not None, first=None if call.lengths is None else first,
        values=dict(eps=call.eps_in, pitch=pitch, **named_strides("mask", "bij", mask_strides)),
    )  # fmt: skip


def launch_planes(
    call: Call,
    prepared: PreparedLaunch,
    planes: tuple[Tensor, Tensor],
    moments: Tensor,
    group: tuple[int, int] | None,
    folds: Folds,
) -> None:
    """Fills a, b and the moments, which a group makes anew; `prepared` is from `prepare_planes`."""
    folded = folds.planes(prepared.constants["BLOCK_N"], group)
    prepared.launch(
        x=call.x,
        weights=folded.weights,
        further=folded.further,
        out=planes[0],
        mask_ptr=call.mask,
        moments_ptr=moments,
        lengths_ptr=call.lengths,
        factors_ptr=folded.factors,
    )


def takes_hidden(call: Transition, hidden: Tensor) -> bool:
    """Whether the first stage of a transition can run here."""
    return call.hidden % ROWS == 0 and has_descriptor(hidden)


def prepare_hidden(
    call: Transition, hidden: Tensor, first_row: int, config: LaunchConfig
) -> PreparedLaunch:
    """The launch of `swiglu_hidden` for calls like this one."""
    batch, rows, columns, channels = call.x.shape
    x_strides = strides(call.x)
    tiles = Tiles.over(batch, rows, columns, [x_strides], call.lengths is not None)
    x_tile = tiles.descriptor(call.x, x_strides, channels, part_of(channels))
    width, columns = call.hidden, tiles.columns
    out = tma_descriptor(
        hidden, [batch * tiles.rows, columns, width], [columns * width, width, 1],
        [1, ROWS, config.block_n],
    )  # fmt: skip
    return _prepare(
        "swiglu_hidden", call.x, width, config, tiles, x_tile, out, planes=False, masked=False,
        first=None if call.lengths is None else (first_row, 0),
        values=dict(eps=call.eps, pitch=0, **named_strides("mask", "bij", (0, 0, 0))),
    )  # fmt: skip


def launch_hidden(
    call: Transition,
    launches: Launches,
    prepared: PreparedLaunch,
    hidden: Tensor,
    folded: Folded | None,
) -> Folded:
    """Fills hidden; `prepared` is from `prepare_hidden`, `folded` what an earlier chunk got."""
    weights = call.weights
    if folded is None:
        norm = weights.norm_weight, weights.norm_bias
        pair = Pair(
            (weights.up_weight, weights.gate_weight), (norm, norm),
            (weights.up_bias, weights.gate_bias),
        )  # fmt: skip
        folded, _ = fold_norms(launches, "hidden", pair, prepared.constants["BLOCK_N"])
    prepared.launch(
        x=call.x,
        weights=folded.weights,
        further=folded.further,
        out=hidden,
        mask_ptr=None,
        moments_ptr=None,
        lengths_ptr=call.lengths,
        factors_ptr=folded.factors,
    )
    return folded


def _prepare(
    stage: str, x: Tensor, count: int, config: LaunchConfig, tiles: Tiles, x_tile, out, *,
    planes: bool, masked: bool, first: tuple[int, int] | None, values: dict,
) -> PreparedLaunch:  # fmt: skip
    channels, block_n = x.shape[3], config.block_n
    consumers = config.block_m // ROWS
    first_i, first_j = (None, None) if first is None else first
    rows = tiles.values(consumers)
    # One for all consumers if there is no room for one each.
    others = config.num_stages * 2 * block_n * (channels + EXTRA) + consumers * ROWS * block_n
    room = settings_of(device_target(x.device).target)["shared_bytes"] - _BARRIERS
    slots = consumers if 2 * (consumers * ROWS * channels + others) <= room else 1
    return PreparedLaunch(
        _gated_rows_hopper_kernel,
        min(rows["tiles"], device_target(x.device).multiprocessors),
        tensors={
            **pointers("mask_ptr", "moments_ptr", "factors_ptr", "lengths_ptr"),
            **weight_tiles(x, count, block_n), "x": x_tile, "out": out,
        },
        values=values | rows | dict(first_i=first_i, first_j=first_j),
        constants=dict(
            C=channels, N=count, BLOCK_N=block_n, STAGES=config.num_stages,
            CONSUMERS=consumers, SLOTS=slots, PLANES=planes, MASKED=masked,
            REGISTERS=REGISTERS[consumers][1],
            X_LAYOUT=shared_layout([ROWS, part_of(channels)]),
            OUT_LAYOUT=shared_layout([block_n, ROWS] if planes else [ROWS, block_n]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[consumers][0]),
        stage=stage,
        variant="hopper",
    )  # fmt: skip
