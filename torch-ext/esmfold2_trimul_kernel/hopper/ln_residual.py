"""Stage 3 on Hopper GPUs: see `fused_ln_residual`, whose arithmetic it has.

    out = residual + drop_mask * (t We^T + be) * sigmoid(z Wo^T + bo)             [B, R, J, C]
    t   = LayerNorm(product[b, :, i, j]), z = LayerNorm(x[b, i, j])               16 bits, C = D

Both norms are folded into the weights (see `folded_norm`): the product is multiplied as the planes
that it is, and x as it came. The moments of x are stage 1's, those of the product are computed
here.

A program has two or three consumers, each for a tile of 64 pairs of one row. Warps of their own
load the weights, which stream past once for all, or stay; x and the product's planes; and tiles of
the residual, into the memory from which the output is stored. A consumer keeps x and the product in
registers.
All of a tile's x has been read before any of its output is written, so that the output may be the
memory of x.

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

from .._call import Call
from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    Launches,
    PreparedLaunch,
    has_descriptor,
    named_strides,
    pointers,
    strides,
)
from ..triton_parts.settings import LaunchConfig
from .folded_norm import EXTRA, Folds
from .padding import fill_padding
from .parts import (
    LOG2_E,
    REGISTERS,
    ROWS,
    Tiles,
    barriers,
    count_tiles,
    free_weights,
    load_parts,
    load_tile,
    load_weights,
    lower,
    part_of,
    place_of,
    ready,
    reciprocal,
    shared_layout,
    statistics,
    store_tile,
    tma_descriptor,
    upper,
    viewed,
    weight_tiles,
)

_EXTRA = gl.constexpr(EXTRA)


@gluon.jit
def _consume(
    common, C: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    OUT_SLOTS: gl.constexpr, CONSUMERS: gl.constexpr, RESIDUAL: gl.constexpr, DROPS: gl.constexpr,
    ME: gl.constexpr,
):  # fmt: skip
    """One consumer: all C channels of every CONSUMERS-th tile of 64 pairs."""
    (
        memory, made, loaded, freed, turns, out, moments_ptr, drop_ptr, factors_ptr, lengths,
        eps_in, eps_out, pairs, moments_strides, drop_strides,
    ) = common  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    AT_ROWS: gl.constexpr = gl.SliceLayout(1, ACC)
    x_slots, t_slots, ring, extras = memory
    out_slots, out_full, out_empty = made
    DTYPE: gl.constexpr = out_slots.dtype
    FIRST: gl.constexpr = ME * OUT_SLOTS
    x_full, t_full, ring_full = loaded
    x_empty, t_empty, ring_empty = freed
    B, R, J, per_row, tiles = pairs
    lengths_ptr, first = lengths
    # With lengths too few registers are left; up to 128 channels there is little to gain.
    LATER: gl.constexpr = C > 128 and lengths_ptr is None
    zero = gl.zeros([64, BLOCK_N], gl.float32, ACC)
    stage = 0
    tile_phase = 0
    phase = 0
    turn_phase = 0
    count = 0
    at = 0
    base = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        entry, i, start, base, length = place_of(
            tile * CONSUMERS + ME, at, base, lengths_ptr, first, B, R, J, per_row, 1
        )
        at = entry
        j = start + gl.arange(0, 64, layout=gl.SliceLayout(1, A))
        inside = (j < J) & (entry < B)
        if lengths_ptr is None:
            offs = (
                entry.to(gl.int64) * moments_strides[0]
                + i.to(gl.int64) * moments_strides[2]
                + j.to(gl.int64) * moments_strides[3]
            )
            mean_x = gl.load(moments_ptr + offs, mask=inside, other=0.0)
            rstd_x = gl.load(moments_ptr + moments_strides[1] + offs, mask=inside, other=1.0)
        else:
            mean_x, rstd_x = load_moments(moments_ptr, moments_strides, entry, i, j, inside)
        # The moments of x arrive while those of the product are computed.
        mbarrier.wait(t_full.index(ME), tile_phase)
        mean_t, rstd_t = statistics(t_slots, ME, eps_out, C, True, A)
        ts, further_t, scale_t = ready(t_slots, ME, mean_t, rstd_t, eps_out, C, True, A)
        fence_async_shared()
        mbarrier.arrive(t_empty.index(ME), count=1)
        mbarrier.wait(x_full.index(ME), tile_phase)
        xs, further_x, scale_x = ready(x_slots, ME, mean_x, rstd_x, eps_in, C, False, A)
        fence_async_shared()
        mbarrier.arrive(x_empty.index(ME), count=1)
        tile_phase ^= 1
        scale_x = gl.convert_layout(scale_x, AT_ROWS) * -LOG2_E
        scale_t = gl.convert_layout(scale_t, AT_ROWS)
        for step in range(C // BLOCK_N):
            update_scale, power_scale = scale_t, scale_x
            if factors_ptr is not None:
                update_scale = scale_t * gl.load(factors_ptr + step)
                power_scale = scale_x * gl.load(factors_ptr + C // BLOCK_N + step)
            mbarrier.wait(ring_full.index(stage), phase)
            mbarrier.wait(turns.index(ME), turn_phase)
            turn_phase ^= 1
            low = lower(extras.index(stage)).permute((1, 0))
            high = upper(extras.index(stage)).permute((1, 0))
            delta = warpgroup_mma(further_t, low, zero, use_acc=False, is_async=True)
            gate = warpgroup_mma(further_x, high, zero, use_acc=False, is_async=True)
            PARTS: gl.constexpr = ring.shape[0] // STAGES
            for k in gl.static_range(PARTS):
                low = lower(ring.index(stage * PARTS + k)).permute((1, 0))
                high = upper(ring.index(stage * PARTS + k)).permute((1, 0))
                delta = warpgroup_mma(ts[k], low, delta, is_async=True)
                gate = warpgroup_mma(xs[k], high, gate, is_async=True)
            mbarrier.arrive(turns.index((ME + 1) % CONSUMERS), count=1)
            if LATER and step > 0:
                _store(
                    out, made, entry, i, start, step - 1, count - 1, OUT_SLOTS, RESIDUAL, ME
                )
            delta, gate = warpgroup_mma_wait(0, deps=(delta, gate))
            stage, phase = free_weights(ring_empty, stage, phase, STAGES, C // BLOCK_N)
            # exp2 of this is exp of the negative argument of the sigmoid.
            power = gate * power_scale.expand_dims(1)
            update = delta * update_scale.expand_dims(1) * reciprocal(1.0 + gl.exp2(power))
            if DROPS:
                columns = start + gl.arange(0, 64, layout=AT_ROWS)
                channels = step * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, ACC))
                within = ((columns < J) & (entry < B)).expand_dims(1)
                update = update * load_drop(
                    drop_ptr, drop_strides, entry, columns, channels, within
                )
            if lengths_ptr is not None:
                # Beyond the length the operands may be NaN.
                columns = start + gl.arange(0, 64, layout=AT_ROWS)
                update = gl.where((first[1] + columns < length).expand_dims(1), update, 0.0)
            place = FIRST + count % OUT_SLOTS
            slot = out_slots.index(place)
            if RESIDUAL:
                mbarrier.wait(out_full.index(place), (count // OUT_SLOTS) & 1)
                update = update + slot.load(ACC).to(gl.float32)
            else:
                tma.store_wait(OUT_SLOTS - 1)
            slot.store(update.to(DTYPE))
            if not LATER:
                _store(out, made, entry, i, start, step, count, OUT_SLOTS, RESIDUAL, ME)
            count += 1
        if LATER:
            last = C // BLOCK_N - 1
            _store(out, made, entry, i, start, last, count - 1, OUT_SLOTS, RESIDUAL, ME)
    tma.store_wait(0)


@gluon.jit
def _store(
    out, made, entry, i, start, step, count,
    OUT_SLOTS: gl.constexpr, RESIDUAL: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """Stores the count-th block, of a step, and frees the memory of the block before it."""
    out_slots, _, out_empty = made
    OUT_LAYOUT: gl.constexpr = out.layout
    BLOCK_N: gl.constexpr = out_slots.shape[2]
    FIRST: gl.constexpr = ME * OUT_SLOTS
    slot = viewed(out_slots.index(FIRST + count % OUT_SLOTS), [1, 1, 64, BLOCK_N], OUT_LAYOUT)
    fence_async_shared()
    store_tile(out, [entry, i, start, step * BLOCK_N], slot)
    if RESIDUAL:
        tma.store_wait(1)
        before = FIRST + (count + OUT_SLOTS - 1) % OUT_SLOTS
        mbarrier.arrive(out_empty.index(before), count=1, pred=count > 0)


@gluon.jit
def load_moments(moments_ptr, strides, entry, i, j, inside):
    """Mean and 1 / deviation of pairs.

    Offsets without signs need fewer registers, of which padding and wide rows leave none.
    """
    offs = _wide(entry) * _wide(strides[0])
    offs = offs + _wide(i) * _wide(strides[2])
    offs = offs + _wide(j) * _wide(strides[3])
    mean = gl.load(moments_ptr + offs, mask=inside, other=0.0)
    offs = offs + _wide(strides[1])
    return mean, gl.load(moments_ptr + offs, mask=inside, other=1.0)


@gluon.jit
def load_drop(drop_ptr, strides, entry, columns, channels, within):
    """The drop mask [64, channels] of a row's pairs in fp32."""
    offs = entry.to(gl.int64) * strides[0]
    offs = (offs + columns.to(gl.int64) * strides[1]).expand_dims(1)
    offs = offs + (channels * strides[2]).expand_dims(0)
    return gl.load(drop_ptr + offs, mask=within, other=0.0).to(gl.float32)


@gluon.jit
def _wide(x):
    """A number that is not negative, in 64 bits."""
    return x.to(gl.uint32).to(gl.int64)


@gluon.jit
def load_rows(
    x, product, x_slots, t_slots, x_full, t_full, x_empty, t_empty, lengths, pairs,
    C: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    """All consumers' tiles of x, and of the product's planes."""
    B, R, J, per_row, tiles = pairs
    lengths_ptr, first = lengths
    phase = 1
    at = 0
    base = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        for me in range(CONSUMERS):
            entry, i, start, base, _ = place_of(
                tile * CONSUMERS + me, at, base, lengths_ptr, first, B, R, J, per_row, 1
            )
            at = entry
            mbarrier.wait(x_empty.index(me), phase)
            load_parts(x, x_slots, me, x_full.index(me), entry, i, start, C, False)
            mbarrier.wait(t_empty.index(me), phase)
            load_parts(product, t_slots, me, t_full.index(me), entry, i, start, C, True)
        phase ^= 1


@gluon.jit
def load_residual(
    residual, slots, full, empty, lengths, pairs,
    C: gl.constexpr, BLOCK_N: gl.constexpr, OUT_SLOTS: gl.constexpr, CONSUMERS: gl.constexpr,
    RESIDUAL: gl.constexpr,
):  # fmt: skip
    """All consumers' blocks of the residual, into the memory of the output."""
    if RESIDUAL:
        LAYOUT: gl.constexpr = residual.layout
        B, R, J, per_row, tiles = pairs
        lengths_ptr, first = lengths
        count = 0
        at = 0
        base = 0
        for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
            places = ()
            for me in gl.static_range(CONSUMERS):
                entry, i, start, base, _ = place_of(
                    tile * CONSUMERS + me, at, base, lengths_ptr, first, B, R, J, per_row, 1
                )
                at = entry
                places = places + ((entry, i, start),)
            for step in range(C // BLOCK_N):
                phase = ((count // OUT_SLOTS) & 1) ^ 1
                for me in gl.static_range(CONSUMERS):
                    entry, i, start = places[me]
                    place = me * OUT_SLOTS + count % OUT_SLOTS
                    mbarrier.wait(empty.index(place), phase)
                    mbarrier.expect(full.index(place), 64 * BLOCK_N * 2)
                    made = viewed(slots.index(place), [1, 1, 64, BLOCK_N], LAYOUT)
                    load_tile(residual, [entry, i, start, step * BLOCK_N], full.index(place), made)
                count += 1


@gluon.jit(
    do_not_specialize=[
        "moments_ptr", "drop_ptr", "factors_ptr", "lengths_ptr", "first_i", "eps_in", "eps_out",
        "B", "R", "J", "per_row", "tiles",
        "stride_moments_b", "stride_moments_n", "stride_moments_i", "stride_moments_j",
        "stride_drop_b", "stride_drop_j", "stride_drop_c",
    ]
)  # fmt: skip
def _ln_residual_hopper_kernel(
    x, product, weights, further, residual, out, moments_ptr, drop_ptr, factors_ptr, lengths_ptr,
    first_i, eps_in, eps_out, B, R, J, per_row, tiles,
    stride_moments_b, stride_moments_n, stride_moments_i, stride_moments_j,
    stride_drop_b, stride_drop_j, stride_drop_c,
    C: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, OUT_SLOTS: gl.constexpr,
    CONSUMERS: gl.constexpr, RESIDUAL: gl.constexpr, DROPS: gl.constexpr, REGISTERS: gl.constexpr,
    ROWS_LAYOUT: gl.constexpr, PLANES_LAYOUT: gl.constexpr, OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """All C channels of B * R * per_row tiles of 64 pairs, CONSUMERS at a time.

    With lengths, of those that are not padding alone; row i is row first_i + i of its sequence.
    """
    DTYPE: gl.constexpr = x.dtype
    PART: gl.constexpr = x.block_shape[3]
    PARTS: gl.constexpr = C // PART
    x_slots = gl.allocate_shared_memory(DTYPE, [CONSUMERS * PARTS, 64, PART], ROWS_LAYOUT)
    t_slots = gl.allocate_shared_memory(DTYPE, [CONSUMERS * PARTS, PART, 64], PLANES_LAYOUT)
    ring = gl.allocate_shared_memory(DTYPE, [STAGES * PARTS, 2 * BLOCK_N, PART], weights.layout)
    extras = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * BLOCK_N, _EXTRA], further.layout)
    outs: gl.constexpr = CONSUMERS * OUT_SLOTS
    out_slots = gl.allocate_shared_memory(DTYPE, [outs, 64, BLOCK_N], OUT_LAYOUT)
    made = out_slots, barriers(outs, 1), barriers(outs, 1)
    loaded = barriers(CONSUMERS, 1), barriers(CONSUMERS, 1), barriers(STAGES, 1)
    freed = barriers(CONSUMERS, 1), barriers(CONSUMERS, 1), barriers(STAGES, CONSUMERS)
    turns = barriers(CONSUMERS, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    memory = x_slots, t_slots, ring, extras
    lengths = lengths_ptr, (first_i, 0)
    if lengths_ptr is not None:
        tiles = (count_tiles(lengths_ptr, lengths[1], B, R, J, 1) + CONSUMERS - 1) // CONSUMERS
    pairs = B, R, J, per_row, tiles
    moments_strides = stride_moments_b, stride_moments_n, stride_moments_i, stride_moments_j
    drop_strides = stride_drop_b, stride_drop_j, stride_drop_c
    common = (
        memory, made, loaded, freed, turns, out, moments_ptr, drop_ptr, factors_ptr, lengths,
        eps_in, eps_out, pairs, moments_strides, drop_strides,
    )  # fmt: skip
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (common, C, BLOCK_N, STAGES, OUT_SLOTS, CONSUMERS, RESIDUAL, DROPS, 0)),
            (_consume, (common, C, BLOCK_N, STAGES, OUT_SLOTS, CONSUMERS, RESIDUAL, DROPS, 1)),
            (load_weights, (
                weights, further, ring, extras, loaded[2], freed[2], tiles, C, BLOCK_N, STAGES,
            )),
            (load_rows, (
                x, product, x_slots, t_slots, loaded[0], loaded[1], freed[0], freed[1], lengths,
                pairs, C, CONSUMERS,
            )),
            (load_residual, (
                residual, made[0], made[1], made[2], lengths, pairs,
                C, BLOCK_N, OUT_SLOTS, CONSUMERS, RESIDUAL,
            )),
        ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (common, C, BLOCK_N, STAGES, OUT_SLOTS, CONSUMERS, RESIDUAL, DROPS, 0)),
            (_consume, (common, C, BLOCK_N, STAGES, OUT_SLOTS, CONSUMERS, RESIDUAL, DROPS, 1)),
            (_consume, (common, C, BLOCK_N, STAGES, OUT_SLOTS, CONSUMERS, RESIDUAL, DROPS, 2)),
            (load_weights, (
                weights, further, ring, extras, loaded[2], freed[2], tiles, C, BLOCK_N, STAGES,
            )),
            (load_rows, (
                x, product, x_slots, t_slots, loaded[0], loaded[1], freed[0], freed[1], lengths,
                pairs, C, CONSUMERS,
            )),
            (load_residual, (
                residual, made[0], made[1], made[2], lengths, pairs,
                C, BLOCK_N, OUT_SLOTS, CONSUMERS, RESIDUAL,
            )),
        ], [4, 4, 1, 1, 1], [REGISTERS, REGISTERS, 24, 24, 24])  # fmt: skip


def takes(call: Call, product: Tensor) -> bool:
    """Whether stage 3 of a call can run here, whose x [B, R, L, C] may be rows."""
    return (
        call.x.shape[3] == product.shape[1]
        and has_descriptor(product)
        and (call.residual is None or has_descriptor(call.residual))
        and (call.drop_mask is None or call.drop_mask.ndim == 3)
    )


def tiles_of(call: Call, product: Tensor, moments: Tensor) -> Tiles:
    """The tiles of a call: over whole entries where its tensors allow it, or over rows."""
    batch, rows, length, _ = call.x.shape
    x_strides = strides(call.x)
    residual_strides = x_strides if call.residual is None else strides(call.residual)
    one_row = (
        call.drop_mask is None
        and call.lengths is None
        and product.shape[3] == product.stride(2) == length
        and x_strides[1] == length * x_strides[2]
        and residual_strides[1] == length * residual_strides[2]
        and moments.stride(2) == length * moments.stride(3)
    )
    return Tiles.of(batch, rows, length, one_row)


def planes_of(product: Tensor, tiles: Tiles, part: int) -> TensorDescriptor:
    """Of the product's planes, `part` channels of a tile."""
    batch, channels, rows, pitch = product.shape
    stride_b, stride_d, stride_i, _ = product.stride()
    if tiles.rows != rows:
        pitch = tiles.columns
    return tma_descriptor(
        product, [batch, tiles.rows, channels, pitch], [stride_b, stride_i, stride_d, 1],
        [1, 1, part, ROWS],
    )  # fmt: skip


def prepare(
    call: Call, product: Tensor, moments: Tensor, first_row: int, config: LaunchConfig
) -> PreparedLaunch:
    """The launch of stage 3 for calls like this one; see `fused_ln_residual`.

    Raises:
        ValueError: a setting with one block of the output, which a residual could not replace.
    """
    if config.split < 2:
        raise ValueError(f"the setting must have two blocks of the output or more; got {config}")
    x, residual, drop_mask = call.x, call.residual, call.drop_mask
    rows, length, channels = x.shape[1:]
    made = [rows * length * channels, length * channels, channels, 1]
    tiles, part, block_n = tiles_of(call, product, moments), part_of(channels), config.block_n
    residual_tile = None
    if residual is not None:
        residual_tile = tiles.descriptor(residual, strides(residual), channels, block_n)
    consumers = config.block_m // ROWS
    values = tiles.values(consumers)
    drop_strides = (0, 0, 1) if drop_mask is None else strides(drop_mask)
    return PreparedLaunch(
        _ln_residual_hopper_kernel,
        min(values["tiles"], device_target(x.device).multiprocessors),
        tensors={
            **pointers("moments_ptr", "drop_ptr", "factors_ptr", "lengths_ptr"),
            **weight_tiles(x, channels, block_n),
            "x": tiles.descriptor(x, strides(x), channels, part),
            "product": planes_of(product, tiles, part), "residual": residual_tile,
            "out": tiles.descriptor(x, made, channels, block_n),
        },
        values=dict(
            eps_in=call.eps_in, eps_out=call.eps_out,
            first_i=None if call.lengths is None else first_row,
            **values,
            **named_strides("moments", "bnij", moments.stride()),
            **named_strides("drop", "bjc", drop_strides),
        ),
        constants=dict(
            C=channels, BLOCK_N=block_n, STAGES=config.num_stages, OUT_SLOTS=config.split,
            CONSUMERS=consumers, RESIDUAL=residual is not None, DROPS=drop_mask is not None,
            REGISTERS=REGISTERS[consumers][1],
            ROWS_LAYOUT=shared_layout([ROWS, part]),
            PLANES_LAYOUT=shared_layout([part, ROWS]),
            OUT_LAYOUT=shared_layout([ROWS, block_n]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[consumers][0]),
        stage="fused_ln_residual",
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
    """Fills out; `prepared` is from `prepare`. It has no use for the scratch memory."""
    folded = folds.residual(prepared.constants["BLOCK_N"])
    prepared.launch(
        x=call.x,
        product=product,
        weights=folded.weights,
        further=folded.further,
        residual=call.residual,
        out=out,
        moments_ptr=moments,
        drop_ptr=call.drop_mask,
        factors_ptr=folded.factors,
        lengths_ptr=call.lengths,
    )
    if call.lengths is not None:
        fill_padding(call, launches, prepared, out, first_row)
