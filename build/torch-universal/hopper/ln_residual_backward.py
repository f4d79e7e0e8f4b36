"""Stage 3's backward on Hopper GPUs: see `fused_ln_residual_backward`, whose arithmetic it has.

    e = (g2 t^) We^T + We b2 + be, o = sigmoid(z Wo^T + bo)       t [D, R, pitch], x [R, L, C]
    de = dy o,  dq = dy e o (1 - o),  dy = drop_mask * grad_out   bfloat16, C = D

It also gives the moments of t, and of each row of pairs both means over the channels c that dt
needs, sum_c de_c u_c and sum_c de_c e'_c / D, where e' is e without We b2 + be.

Both norms are folded into the weights (see `folded_norm`), that of t without its bias: what e has
beside e' is added after the product, so that where it is much larger e' loses no digits.

A program has two consumers, each for a tile of 64 pairs of one row, and warps of their own for
loads, as in `ln_residual`: blocks of grad_out arrive where the residual does there, and de is
stored from the same memory. The sums of de and dq over the pairs are those of the values before
they are rounded. Each warp adds those of its rows to sums in global memory that no other reads or
writes, in the order of the tiles.
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
from ..triton_parts.launch import (
    PreparedLaunch,
    has_descriptor,
    named_strides,
    pointers,
    strides,
)
from ..triton_parts.settings import LaunchConfig
from .folded_norm import EXTRA, Folded
from .ln_residual import load_residual, load_rows
from .parts import (
    LOG2_E,
    REGISTERS,
    ROWS,
    Tiles,
    barriers,
    halves,
    load_weights,
    lower,
    ready_at_once,
    reciprocal,
    shared_layout,
    statistics,
    store_tile,
    tma_descriptor,
    upper,
    viewed,
    weight_tiles,
)

SUMS = 8  # a program's partial sums: of the four warps of both consumers
_EXTRA = gl.constexpr(EXTRA)


@gluon.jit
def _of_lane(x, LANES: gl.constexpr):
    """The value of the lane whose number differs in the bits LANES."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", "=f,f,r", [x, LANES],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _shared_out(x, ROW: gl.constexpr):
    """Sums of x [32, N, 2] over two rows, whose numbers differ in the bit ROW, in [32, N].

    The row without the bit gets the sums of the first of two columns, the other of the second.
    """
    first, second = x.split()
    row = gl.arange(0, 32, layout=gl.SliceLayout(1, first.type.layout)).expand_dims(1)
    is_first = (row & ROW) == 0
    kept = gl.where(is_first, first, second)
    return kept + _of_lane(gl.where(is_first, second, first), 4 * ROW)


@gluon.jit
def _column_sums(x):
    """Sums of x [64, 16], of an accumulator, over four rows in turn: [32, 4].

    A thread has two of its warp's 16 rows, and seven other lanes have the others. In two steps
    lanes give each other half of their columns. Row 8 w + r, column n is the sum, in column
    8 [r & 2] + 2 n + [r & 1] with 1 for what is true, over those rows of warp w whose third bit is
    that of r.
    """
    x = gl.sum(x.reshape([4, 2, 8, 16]), 1)
    x = x.reshape([4, 8, 2, 4, 2]).permute((0, 1, 3, 2, 4))
    return _shared_out(_shared_out(x.reshape([32, 8, 2]), 1).reshape([32, 4, 2]), 2)


@gluon.jit
def _add_column_sums(ptr, sums, adds, C: gl.constexpr):
    """Adds each warp's share of the sums of N columns at ptr [4, 2, C]; stores it unless `adds`.

    `sums` are N / 16 `_column_sums`. In the last step the lanes with [r & 4] get the second of two.
    """
    LAYOUT: gl.constexpr = sums[0].type.layout
    row = gl.arange(0, 32, layout=gl.SliceLayout(1, LAYOUT)).expand_dims(1)
    n = gl.arange(0, 4, layout=gl.SliceLayout(0, LAYOUT)).expand_dims(0)
    ptrs = ptr + (row // 8 * (2 * C) + (row & 6) * 4 + (row & 1) + n * 2)
    for k in gl.static_range(len(sums) // 2):
        both = _shared_out(gl.join(sums[2 * k], sums[2 * k + 1]), 4)
        both = gl.convert_layout(both, LAYOUT, assert_trivial=True)
        gl.store(ptrs + k * 32, both + gl.load(ptrs + k * 32, mask=adds, other=0.0))


@gluon.jit
def _row_sums(x):
    """Sums of x [64, 16], of an accumulator, over the columns that a thread has: [64, 4]."""
    return gl.sum(gl.sum(x.reshape([64, 2, 4, 2]), 3), 1)


@gluon.jit
def _parts(x):
    """Blocks of 16 columns of x [64, N]: registers are renamed, no data moves."""
    N: gl.constexpr = x.shape[1]
    if N == 16:
        return (x,)
    else:
        HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N // 2, 16])
        left, right = halves(x, HALF)
        return _parts(left) + _parts(right)


@gluon.jit
def _whole(parts):
    """What `_parts` took apart."""
    COUNT: gl.constexpr = len(parts)
    if COUNT == 1:
        return parts[0]
    else:
        LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COUNT * 16, 16])
        left = _whole(parts[: COUNT // 2])
        right = _whole(parts[COUNT // 2 :])
        both = gl.join(left, right).permute((0, 2, 1)).reshape([64, COUNT * 16])
        return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def _table_of_channels(scale_ptr, shift_ptr, bias_ptr, C: gl.constexpr, BIASED: gl.constexpr):
    """u, and if BIASED what e has beside e', 16 channels each: [2 C / 16, 16]."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    table = gl.allocate_shared_memory(gl.float32, [2 * C // 16, 16], LAYOUT)
    channels = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    both = viewed(table, [2 * C // 128, 128], LAYOUT)
    for k in gl.static_range(C // 128):
        offs = k * 128 + channels
        both.index(k).store(gl.load(scale_ptr + offs))
        if BIASED:
            constant = gl.zeros_like(offs).to(gl.float32)
            if shift_ptr is not None:
                constant = constant + gl.load(shift_ptr + offs)
            if bias_ptr is not None:
                constant = constant + gl.load(bias_ptr + offs).to(gl.float32)
            both.index(C // 128 + k).store(constant)
    return table


@gluon.jit
def _consume(
    memory, table, slots, gate_slots, full, empty, loaded, freed, turns, outs, pointers,
    eps_in, eps_out, pairs, moments_strides, drop_strides,
    C: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    BIASED: gl.constexpr, DROPS: gl.constexpr, SUMMED: gl.constexpr, ME: gl.constexpr,
):  # fmt: skip
    """One consumer: all C channels of every other tile of 64 pairs."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16])
    AT_ROWS: gl.constexpr = gl.SliceLayout(1, PART)
    AT_CHANNELS: gl.constexpr = gl.SliceLayout(0, PART)
    x_slots, t_slots, ring, extras = memory
    x_full, t_full, ring_full = loaded
    x_empty, t_empty, ring_empty = freed
    BLOCKS: gl.constexpr = C // BLOCK_N
    moments_ptr, drop_ptr, rows_ptr, sums_ptr = pointers
    B, R, J, per_row, tiles = pairs
    zero = gl.zeros([64, BLOCK_N], gl.float32, ACC)
    made_gate = gate_slots.index(ME)
    FIRST: gl.constexpr = ME * SLOTS
    count = 0  # of blocks: all phases follow from it
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i = (tile * 2 + ME) // per_row
        start = (tile * 2 + ME - i * per_row) * 64
        row = gl.arange(0, 64, layout=gl.SliceLayout(1, A))
        inside = (start + row < J) & (i < R)
        first = i.to(gl.int64) * moments_strides[1] + start.to(gl.int64) * moments_strides[2]
        offs = row * moments_strides[2]
        mean_x = gl.load(moments_ptr + first + offs, mask=inside, other=0.0)
        first += moments_strides[0]
        rstd_x = gl.load(moments_ptr + first + offs, mask=inside, other=1.0)
        # The moments of x arrive while those of t are computed.
        tile_phase = count // BLOCKS & 1
        mbarrier.wait(t_full.index(ME), tile_phase)
        slot = t_slots.index(ME).permute((1, 0))
        mean_t, rstd_t = statistics(t_slots, ME, eps_out, C, True, A)
        pairs_of_plane = R.to(gl.int64) * J
        first = i.to(gl.int64) * J + start
        gl.store(rows_ptr + (first + pairs_of_plane) + row, mean_t, mask=inside)
        gl.store(rows_ptr + (first + 2 * pairs_of_plane) + row, rstd_t, mask=inside)
        # Padding columns of t are uninitialised and may be NaN: these make them zeros.
        mean_t = gl.where(inside, mean_t, 0.0)
        rstd_t = gl.where(inside, rstd_t, 0.0)
        ts, further_t, scale_t = ready_at_once(slot, mean_t, rstd_t, eps_out, A)
        fence_async_shared()
        mbarrier.arrive(t_empty.index(ME), count=1)
        mbarrier.wait(x_full.index(ME), tile_phase)
        xs, further_x, scale_x = ready_at_once(x_slots.index(ME), mean_x, rstd_x, eps_in, A)
        fence_async_shared()
        mbarrier.arrive(x_empty.index(ME), count=1)
        scale_x = gl.convert_layout(scale_x, AT_ROWS) * -LOG2_E
        scale_hat = scale_t * (1.0 / C)
        scale_t = gl.convert_layout(scale_t, AT_ROWS)
        mean_grad = _row_sums(_parts(zero)[0])
        mean_grad_hat = mean_grad
        for step in range(BLOCKS):
            stage = count % STAGES
            mbarrier.wait(ring_full.index(stage), 0 if STAGES == BLOCKS else count // STAGES & 1)
            mbarrier.wait(turns.index(ME), count & 1)
            low = lower(extras.index(stage)).permute((1, 0))
            high = upper(extras.index(stage)).permute((1, 0))
            emit = warpgroup_mma(further_t, low, zero, use_acc=False, is_async=True)
            gate = warpgroup_mma(further_x, high, zero, use_acc=False, is_async=True)
            low = lower(ring.index(stage)).permute((1, 0))
            high = upper(ring.index(stage)).permute((1, 0))
            emit = warpgroup_mma(ts, low, emit, is_async=True)
            gate = warpgroup_mma(xs, high, gate, is_async=True)
            mbarrier.arrive(turns.index(1 - ME), count=1)
            before = FIRST + (count + SLOTS - 1) % SLOTS
            if step > 0:
                _store(outs, slots.index(before), made_gate, i, start, step - 1)
            # Meanwhile the blocks before this one leave their memory.
            tma.store_wait(0)
            mbarrier.arrive(empty.index(before), count=1, pred=count > 0)
            emit, gate = warpgroup_mma_wait(0, deps=(emit, gate))
            if STAGES != BLOCKS:
                mbarrier.arrive(ring_empty.index(stage), count=1)
            place = FIRST + count % SLOTS
            made = slots.index(place)
            mbarrier.wait(full.index(place), (count // SLOTS) & 1)
            grads = _parts(made.load(ACC))
            emits = _parts(emit)
            gates = _parts(gate)
            out_emits = ()
            out_gates = ()
            emit_sums = ()
            gate_sums = ()
            # A few channels at a time, for fewer registers.
            for part in gl.static_range(BLOCK_N // 16):
                # exp2 of the product is exp of the negative argument of the sigmoid.
                gate = reciprocal(1.0 + gl.exp2(gates[part] * scale_x.expand_dims(1)))
                grad = grads[part].to(gl.float32)
                if DROPS:
                    channels = step * BLOCK_N + part * 16 + gl.arange(0, 16, layout=AT_CHANNELS)
                    columns = start + gl.arange(0, 64, layout=AT_ROWS)
                    offs_drop = (columns.to(gl.int64) * drop_strides[0]).expand_dims(1)
                    offs_drop = offs_drop + (channels * drop_strides[1]).expand_dims(0)
                    within = ((columns < J) & (i < R)).expand_dims(1)
                    drop = gl.load(drop_ptr + offs_drop, mask=within, other=0.0)
                    grad = grad * drop.to(gl.float32)
                grad = grad * gate
                rounded = grad.to(gl.bfloat16)
                emit = emits[part] * scale_t.expand_dims(1)
                if BIASED:
                    constant = table.index((BLOCKS + step) * (BLOCK_N // 16) + part)
                    emit = emit + constant.load(AT_CHANNELS).expand_dims(0)
                grad_gate = grad * emit
                grad_gate = grad_gate - grad_gate * gate
                out_emits = out_emits + (rounded,)
                out_gates = out_gates + (grad_gate.to(gl.bfloat16),)
                # The means are of the values that are multiplied next; e' is scaled at the end.
                rounded = rounded.to(gl.float32)
                scale = table.index(step * (BLOCK_N // 16) + part).load(AT_CHANNELS).expand_dims(0)
                mean_grad = mean_grad + _row_sums(rounded * scale)
                mean_grad_hat = mean_grad_hat + _row_sums(rounded * emits[part])
                if SUMMED:
                    emit_sums = emit_sums + (_column_sums(grad),)
                    gate_sums = gate_sums + (_column_sums(grad_gate),)
            made.store(_whole(out_emits))
            made_gate.store(_whole(out_gates))
            if SUMMED:
                sums = sums_ptr + (gl.program_id(0) * 2 + ME) * (8 * C) + step * BLOCK_N
                _add_column_sums(sums, emit_sums, count >= BLOCKS, C)
                _add_column_sums(sums + C, gate_sums, count >= BLOCKS, C)
            count += 1
        before = FIRST + (count + SLOTS - 1) % SLOTS
        _store(outs, slots.index(before), made_gate, i, start, BLOCKS - 1)
        first = i.to(gl.int64) * J + start
        mean_grad = gl.convert_layout(gl.sum(mean_grad, 1), gl.SliceLayout(1, A))
        mean_grad_hat = gl.convert_layout(gl.sum(mean_grad_hat, 1), gl.SliceLayout(1, A))
        gl.store(rows_ptr + (first + 3 * pairs_of_plane) + row, mean_grad, mask=inside)
        mean_grad_hat = mean_grad_hat * scale_hat
        gl.store(rows_ptr + (first + 4 * pairs_of_plane) + row, mean_grad_hat, mask=inside)
    tma.store_wait(0)


@gluon.jit
def _store(outs, emit, gate, i, start, step):
    """Stores the blocks of a step, during the next one's products: see `parts`."""
    BLOCK_N: gl.constexpr = emit.shape[1]
    EMIT_LAYOUT: gl.constexpr = outs[0].layout
    GATE_LAYOUT: gl.constexpr = outs[1].layout
    fence_async_shared()
    at = [0, i, start, step * BLOCK_N]
    store_tile(outs[0], at, viewed(emit, [1, 1, 64, BLOCK_N], EMIT_LAYOUT))
    store_tile(outs[1], at, viewed(gate, [1, 1, 64, BLOCK_N], GATE_LAYOUT))


@gluon.jit(
    do_not_specialize=[
        "moments_ptr", "drop_ptr", "rows_ptr", "bias_ptr", "eps_in", "eps_out", "B", "R", "J",
        "per_row", "tiles", "stride_moments_n", "stride_moments_i", "stride_moments_j",
        "stride_drop_j", "stride_drop_c",
    ]
)  # fmt: skip
def _ln_residual_bwd_hopper_kernel(
    x, t, weights, further, grad_out, grad_emit, grad_gate,
    moments_ptr, drop_ptr, rows_ptr, sums_ptr, scale_ptr, shift_ptr, bias_ptr,
    eps_in, eps_out, B, R, J, per_row, tiles,
    stride_moments_n, stride_moments_i, stride_moments_j, stride_drop_j, stride_drop_c,
    C: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    BIASED: gl.constexpr, DROPS: gl.constexpr, SUMMED: gl.constexpr, REGISTERS: gl.constexpr,
    ROWS_LAYOUT: gl.constexpr, PLANES_LAYOUT: gl.constexpr, OUT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """All C channels of R * per_row tiles of 64 pairs, two at a time."""
    x_slots = gl.allocate_shared_memory(gl.bfloat16, [2, 64, C], ROWS_LAYOUT)
    t_slots = gl.allocate_shared_memory(gl.bfloat16, [2, C, 64], PLANES_LAYOUT)
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * BLOCK_N, C], weights.layout)
    extras = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * BLOCK_N, _EXTRA], further.layout)
    slots = gl.allocate_shared_memory(gl.bfloat16, [2 * SLOTS, 64, BLOCK_N], OUT_LAYOUT)
    gate_slots = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BLOCK_N], OUT_LAYOUT)
    table = _table_of_channels(scale_ptr, shift_ptr, bias_ptr, C, BIASED)
    loaded = barriers(2, 1), barriers(2, 1), barriers(STAGES, 1)
    freed = barriers(2, 1), barriers(2, 1), barriers(STAGES, 2)
    turns = barriers(2, 1)
    full = barriers(2 * SLOTS, 1)
    empty = barriers(2 * SLOTS, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    memory = x_slots, t_slots, ring, extras
    pairs = B, R, J, per_row, tiles
    outs = grad_emit, grad_gate
    pointers = moments_ptr, drop_ptr, rows_ptr, sums_ptr
    moments_strides = stride_moments_n, stride_moments_i, stride_moments_j
    drop_strides = stride_drop_j, stride_drop_c
    gl.warp_specialize([
        (_consume, (
            memory, table, slots, gate_slots, full, empty, loaded, freed, turns, outs, pointers,
            eps_in, eps_out, pairs, moments_strides, drop_strides,
            C, BLOCK_N, STAGES, SLOTS, BIASED, DROPS, SUMMED, 0,
        )),
        (_consume, (
            memory, table, slots, gate_slots, full, empty, loaded, freed, turns, outs, pointers,
            eps_in, eps_out, pairs, moments_strides, drop_strides,
            C, BLOCK_N, STAGES, SLOTS, BIASED, DROPS, SUMMED, 1,
        )),
        (load_weights, (
            weights, further, ring, extras, loaded[2], freed[2], tiles, C, BLOCK_N, STAGES,
        )),
        (load_rows, (
            x, t, x_slots, t_slots, loaded[0], loaded[1], freed[0], freed[1], (None, None), pairs,
            C, 2,
        )),
        (load_residual, (
            grad_out, slots, full, empty, (None, None), pairs, C, BLOCK_N, SLOTS, 2, True,
        )),
    ], [4, 1, 1, 1], [REGISTERS, 24, 24, 24])  # fmt: skip


def takes(rows, outputs: frozenset[str]) -> bool:
    """Whether stage 3's backward of `Rows`, which wants `outputs`, can run here."""
    return (
        rows.lengths is None
        and (rows.drop_mask is None or rows.drop_mask.ndim == 2)
        and rows.x.shape[2] == rows.t.shape[0]
        and has_descriptor(rows.t)
        and has_descriptor(rows.grad_out)
        and outputs | {"sums"} == {"emit", "gate", "rows", "sums"}
    )


def prepare(
    rows, weights: Weights, eps: tuple[float, float], outputs: frozenset[str], config: LaunchConfig
) -> PreparedLaunch:
    """The launch for `Rows` like these; see `prepare_ln_residual_bwd`. eps are of x and of t."""
    t, x, moments, grad_out, drop_mask, _ = rows
    count, length, channels = x.shape
    pitch, (stride_d, stride_i, _) = t.shape[2], t.stride()
    (x_i, x_j, _), (grad_i, grad_j, _) = strides(x), strides(grad_out)
    one_row = (
        drop_mask is None
        and pitch == stride_i == length
        and x_i == length * x_j
        and grad_i == length * grad_j
        and moments.stride(1) == length * moments.stride(2)
    )
    tiles = Tiles.of(1, count, length, one_row)
    block_n, columns = config.block_n, tiles.columns if one_row else pitch
    made = tiles.descriptor(x, [0, length * channels, channels, 1], channels, block_n)
    values = tiles.values(2)
    return PreparedLaunch(
        _ln_residual_bwd_hopper_kernel,
        min(values["tiles"], device_target(x.device).multiprocessors),
        tensors={
            **pointers(
                "moments_ptr", "drop_ptr", "rows_ptr", "sums_ptr", "scale_ptr", "shift_ptr",
                "bias_ptr",
            ), **weight_tiles(x, channels, block_n),
            "x": tiles.descriptor(x, [0, x_i, x_j, 1], channels, channels),
            "t": tma_descriptor(
                t, [1, tiles.rows, channels, columns], [0, stride_i, stride_d, 1],
                [1, 1, channels, ROWS],
            ),
            "grad_out": tiles.descriptor(grad_out, [0, grad_i, grad_j, 1], channels, block_n),
            "grad_emit": made,
            "grad_gate": made,
        },
        values=dict(
            eps_in=eps[0], eps_out=eps[1],
            **values,
            **named_strides("moments", "nij", moments.stride()),
            **named_strides("drop", "jc", (0, 1) if drop_mask is None else strides(drop_mask)),
        ),
        constants=dict(
            C=channels, BLOCK_N=block_n, STAGES=config.num_stages, SLOTS=config.split,
            BIASED=weights.norm_out_bias is not None or weights.p_out_bias is not None,
            DROPS=drop_mask is not None, SUMMED="sums" in outputs, REGISTERS=REGISTERS[2][1],
            ROWS_LAYOUT=shared_layout([ROWS, channels]),
            PLANES_LAYOUT=shared_layout([channels, ROWS]),
            OUT_LAYOUT=shared_layout([ROWS, block_n]),
        ),
        options=dict(num_warps=4, maxnreg=REGISTERS[2][0]),
        stage="fused_ln_residual_bwd",
        variant="hopper",
    )  # fmt: skip


def launch(
    rows,
    weights: Weights,
    emit_means: tuple[Tensor, Tensor | None],
    prepared: PreparedLaunch,
    out,
    folded: Folded,
) -> None:
    """Fills `out`, of `Stage3Gradients`; `prepared` is from `prepare`.

    `emit_means` and `folded` are from `Folds.of_backward`.
    """
    prepared.launch(
        x=rows.x,
        t=rows.t,
        weights=folded.weights,
        further=folded.further,
        grad_out=rows.grad_out,
        grad_emit=out.emit,
        grad_gate=out.gate,
        moments_ptr=rows.moments,
        drop_ptr=rows.drop_mask,
        rows_ptr=out.rows,
        sums_ptr=out.sums,
        scale_ptr=emit_means[0],
        shift_ptr=emit_means[1],
        bias_ptr=weights.p_out_bias,
    )
