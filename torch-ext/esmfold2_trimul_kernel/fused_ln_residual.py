"""Stage 3: LayerNorm of the product, projection, output gate, drop mask, residual.

    t   = LayerNorm(product[b, :, i, j]; g2, b2)                   product [B, D, R, pitch]
    z   = LayerNorm(x; g1, b1)                                     x [B, R, L, C], any strides
    out = residual + drop_mask * (t We^T + be) * sigmoid(z Wo^T + bo)              [B, R, L, C]

x has R of a sequence's L rows, usually all. The output gate is computed here from x: writing z or
the gate in stage 1 would cost one more pair tensor. The statistics of x come from stage 1. With
lengths, the update of a pair with a residue beyond the length is zero, and tiles that hold only
such pairs just copy the residual or write zeros.
"""

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hopper
from ._call import Call
from .hopper.folded_norm import Folds
from .triton_parts.device import device_target
from .triton_parts.launch import (
    Launches,
    PreparedLaunch,
    block_of,
    descriptor_of,
    dot_precision,
    has_descriptor,
    is_aligned,
    named_strides,
    pointers,
    sequences_in,
    setting_of,
    shared_by,
    strides,
)
from .triton_parts.layer_norm import load_first, mean_of, normalise, row_variances
from .triton_parts.settings import LaunchConfig
from .triton_parts.split_operands import (
    FP16X3,
    Scales,
    dot_weight,
    exponents_of_rows,
    power_of_two,
    scaled,
)
from .triton_parts.tiles import (
    add_bias,
    any_of,
    identity,
    load_tile,
    positions,
    quarters,
    sigmoid,
    store_tile,
    within_length,
)

_WIDE = "wide_ln_residual"  # the variant above 256 channels
_STEPS = 16  # of an output that overwrites a tensor which is still to be read


@triton.jit(
    do_not_specialize=[
        "R", "L", "first_row", "eps_out", "moments_ptr", "lengths_ptr",
        "stride_x_b", "stride_x_i", "stride_x_j",
        "stride_moments_b", "stride_moments_n", "stride_moments_i", "stride_moments_j",
        "stride_residual_b", "stride_residual_i", "stride_residual_j",
        "stride_drop_b", "stride_drop_ij", "drop_ptr",
    ]
)  # fmt: skip
def _fused_ln_residual_fwd_kernel(
    product_ptr, product, x_ptr, moments_ptr, residual_ptr, drop_ptr, lengths_ptr, out_ptr,
    norm_in_weight_ptr, norm_in_bias_ptr, norm_out_weight_ptr, norm_out_bias_ptr,
    emit_weight, emit_bias_ptr, gate_weight, gate_bias_ptr, scales_ptr,
    R, L, pitch, first_row, eps_out,
    stride_product_b, stride_product_d, stride_product_i,
    stride_x_b, stride_x_i, stride_x_j, stride_x_c,
    stride_moments_b, stride_moments_n, stride_moments_i, stride_moments_j,
    stride_residual_b, stride_residual_i, stride_residual_j, stride_residual_c,
    stride_drop_b, stride_drop_ij, stride_drop_c,
    stride_emit, stride_gate,
    C: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    X_ALIGNMENT: tl.constexpr, RESIDUAL_ALIGNMENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TILES: tl.constexpr, PRECISION: tl.constexpr, FAST_RECIPROCAL: tl.constexpr,
    HELD: tl.constexpr, SPLIT: tl.constexpr, DROP_ROWS: tl.constexpr,
):  # fmt: skip
    """All C channels of BLOCK_M positions m = i * pitch + j of one sequence's output.

    M = R * pitch positions, N = C output channels in blocks, K = D channels of the product and C of
    x, in blocks of BLOCK_K that are normalised as they come. First the gate, then the projection.

    TILES tells how the product is read: "flat", `product` describes contiguous planes
    [B * D, R * pitch]; "rows", it describes rows [B, R, D, pitch], and a tile ends with its row;
    "pointers", there is no descriptor, and strides are free.

    With HELD, 16-bit rows are multiplied by the identity matrix, which gives them in fp32 in an
    accumulator's layout (see `layer_norm.hold`), and a program makes one block of output channels.
    If also C = D, the product's statistics are computed in the gate's loop. SPLIT programs share
    the output channels of a tile. Row i is row first_row + i of its sequence, which matters only
    with lengths. With DROP_ROWS the drop mask has a value for each row i, shared over j. With
    PRECISION "fp16x3" the operands are split: see `split_operands`.
    """
    pid = tl.program_id(0) // SPLIT
    part = tl.program_id(0) - pid * SPLIT
    if TILES == "rows":
        tiles = tl.cdiv(L, BLOCK_M)
        row_of_all = pid // tiles
        pid_b = row_of_all // R
        row = row_of_all - pid_b * R
        start_m = (pid - row_of_all * tiles) * BLOCK_M
        i = tl.full([BLOCK_M], row, tl.int32)
        j = start_m + tl.arange(0, BLOCK_M)
        valid_t = j < pitch
    else:
        tiles = tl.cdiv(R * pitch, BLOCK_M)
        row = 0
        pid_b = pid // tiles
        start_m = (pid - pid_b * tiles) * BLOCK_M
        i, j = positions(start_m, pitch, BLOCK_M)
        # The same as i < R, but here the compiler sees that groups of 16 positions agree.
        valid_t = start_m + tl.arange(0, BLOCK_M) < R * pitch
    valid_m = (i < R) & (j < L)
    batch = pid_b.to(tl.int64)
    dtype = x_ptr.dtype.element_ty
    EVEN_C: tl.constexpr = C % BLOCK_K == 0
    EVEN_D: tl.constexpr = D % BLOCK_K == 0
    SPLIT_OPERANDS: tl.constexpr = PRECISION == "fp16x3"
    TOTAL: tl.constexpr = 4 * D + 2 * C  # rows of all projections
    PER_PROGRAM: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N // SPLIT

    if lengths_ptr is not None:
        within = within_length(lengths_ptr, pid_b, first_row + i, j, L)
        if not any_of(within):
            for step in range(0, PER_PROGRAM):
                offs_n = (part * PER_PROGRAM + step) * BLOCK_N + tl.arange(0, BLOCK_N)
                out = tl.zeros([BLOCK_M, BLOCK_N], dtype)
                if residual_ptr is not None:
                    out = _load_residual(
                        residual_ptr, batch, i, j, offs_n, stride_residual_b, stride_residual_i,
                        stride_residual_j, stride_residual_c, valid_m, C, C % BLOCK_N == 0,
                        RESIDUAL_ALIGNMENT,
                    )  # fmt: skip
                offs_out = ((batch * R + i) * L + j) * C
                store_tile(out_ptr, offs_out, offs_n, out, valid_m, C, C % BLOCK_N == 0)
            return

    offs_x = batch * stride_x_b + i.to(tl.int64) * stride_x_i + j.to(tl.int64) * stride_x_j
    offs_x = tl.multiple_of(offs_x, X_ALIGNMENT)
    mean_ptrs = (
        moments_ptr
        + batch * stride_moments_b
        + i.to(tl.int64) * stride_moments_i
        + j.to(tl.int64) * stride_moments_j
    )
    mean_x = tl.load(mean_ptrs, mask=valid_m, other=0.0)[:, None]
    rstd_x = tl.load(mean_ptrs + stride_moments_n, mask=valid_m, other=0.0)[:, None]
    t_ptr = product_ptr + batch * stride_product_b
    offs_t = i.to(tl.int64) * stride_product_i + j
    # Groups of 16 positions share a row, and every stride of the product is a multiple of 16.
    offs_t = tl.max_contiguous(tl.multiple_of(offs_t, 16), 16)
    first_x = None
    first_t = None
    if dtype == tl.float32:
        first_x = load_first(x_ptr, offs_x, valid_m)
        first_t = load_first(t_ptr, offs_t, valid_t)
    BESIDE: tl.constexpr = HELD and C == D
    if HELD:
        one = identity(BLOCK_K, dtype)
    if BESIDE:
        total = tl.zeros([BLOCK_M, 4], tl.float32)
        squares = tl.zeros([BLOCK_M, 4], tl.float32)
    else:
        mean_t, variance = row_variances(
            t_ptr, offs_t, stride_product_d, first_t, valid_t, D, BLOCK_K
        )
        rstd_t = tl.rsqrt(variance + eps_out)
    if SPLIT_OPERANDS:
        exponents = exponents_of_rows(variance, rstd_t, norm_out_bias_ptr, D)

    for step in range(0, PER_PROGRAM):
        start_n = (part * PER_PROGRAM + step) * BLOCK_N
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start_k in range(0, C, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            x = load_tile(x_ptr, offs_x, offs_k, stride_x_c, valid_m, C, EVEN_C)
            if BESIDE:
                t = _load_product(
                    product, t_ptr, pid_b, row, start_k, start_m, offs_t, stride_product_d, valid_t,
                    D, EVEN_D, BLOCK_M, BLOCK_K, TILES,
                )  # fmt: skip
            if HELD:
                x = tl.dot(x, one)
            z = normalise(
                x.to(tl.float32), offs_k, first_x, mean_x, rstd_x,
                norm_in_weight_ptr, norm_in_bias_ptr, C, EVEN_C,
            ).to(dtype)  # fmt: skip
            if BESIDE:
                t = tl.dot(t, one)
                if not EVEN_D:
                    t = tl.where((offs_k < D)[None, :], t, 0.0)
                # Each thread sums its own elements; a row's four lanes are added after the loop.
                total += _lane_sums(t)
                squares += _lane_sums(t * t)
            gate = dot_weight(
                z, gate_weight, start_n, start_k, stride_gate, gate,
                C, C, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if SPLIT_OPERANDS:
            gate = scaled(gate, scales_ptr, 4 * D + C + offs_n, TOTAL)
        else:
            gate = add_bias(gate, gate_bias_ptr, offs_n, C)
        gate = sigmoid(gate, FAST_RECIPROCAL)
        if dtype != tl.float32:
            gate = _pack(gate, FAST_RECIPROCAL)
        if BESIDE:
            mean_t = mean_of(tl.sum(total, 1, keep_dims=True), D)
            variance = mean_of(tl.sum(squares, 1, keep_dims=True), D) - mean_t * mean_t
            rstd_t = tl.rsqrt(tl.maximum(variance, 0.0) + eps_out)

        delta = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start_k in range(0, D, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            t = _load_product(
                product, t_ptr, pid_b, row, start_k, start_m, offs_t, stride_product_d, valid_t,
                D, EVEN_D, BLOCK_M, BLOCK_K, TILES,
            )  # fmt: skip
            if HELD:
                t = tl.dot(t, one)
            t = normalise(
                t.to(tl.float32), offs_k, first_t, mean_t, rstd_t,
                norm_out_weight_ptr, norm_out_bias_ptr, D, EVEN_D,
            ).to(dtype)  # fmt: skip
            if SPLIT_OPERANDS:
                t *= power_of_two(exponents)
            delta = dot_weight(
                t, emit_weight, start_n, start_k, stride_emit, delta,
                C, D, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
            )  # fmt: skip

        # A quarter of the columns at a time: residual and output have a layout of their own, which
        # for all columns would take as many registers again.
        deltas = quarters(delta)
        gates = quarters(gate)
        for quarter in tl.static_range(len(deltas)):
            offs_n = start_n + quarter * deltas[0].shape[1] + tl.arange(0, deltas[0].shape[1])
            if SPLIT_OPERANDS:
                update = deltas[quarter] * power_of_two(-exponents)
                update = scaled(update, scales_ptr, 4 * D + offs_n, TOTAL)
            else:
                update = add_bias(deltas[quarter], emit_bias_ptr, offs_n, C)
            update *= gates[quarter].to(tl.float32)
            if drop_ptr is not None:
                ij = i if DROP_ROWS else j
                offs_drop = batch * stride_drop_b + ij.to(tl.int64) * stride_drop_ij
                drop = load_tile(drop_ptr, offs_drop, offs_n, stride_drop_c, valid_m, C, False)
                update *= drop.to(tl.float32)
            if lengths_ptr is not None:
                # Beyond the length the operands may be NaN.
                update = tl.where(within[:, None], update, 0.0)
            if residual_ptr is not None:
                residual = _load_residual(
                    residual_ptr, batch, i, j, offs_n, stride_residual_b, stride_residual_i,
                    stride_residual_j, stride_residual_c, valid_m, C, C % BLOCK_N == 0,
                    RESIDUAL_ALIGNMENT,
                )  # fmt: skip
                update += residual.to(tl.float32)
            offs_out = ((batch * R + i) * L + j) * C
            store_tile(
                out_ptr, offs_out, offs_n, update.to(dtype), valid_m, C, C % BLOCK_N == 0
            )


@triton.jit
def _load_residual(
    ptr, batch, i, j, offs_n, stride_b, stride_i, stride_j, stride_c, valid_m,
    C: tl.constexpr, EVEN_N: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """[M, N] tile of the residual at pairs (i, j), channels offs_n."""
    offs = batch * stride_b + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j
    offs = tl.multiple_of(offs, ALIGNMENT)
    return load_tile(ptr, offs, offs_n, stride_c, valid_m, C, EVEN_N)


@triton.jit
def _load_product(
    product, t_ptr, batch, row, start_k, start_m, offs_t, stride_k, valid_t,
    D: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_K] tile of the product, channels from start_k on."""
    if TILES == "flat":
        return product.load([batch * D + start_k, start_m]).T
    elif TILES == "rows":
        return product.load([batch, row, start_k, start_m]).reshape(BLOCK_K, BLOCK_M).T
    else:
        offs_k = start_k + tl.arange(0, BLOCK_K)
        return load_tile(t_ptr, offs_t, offs_k, stride_k, valid_t, D, EVEN_D)


@triton.jit
def _lane_sums(x):
    """[M, 4] of x [M, K] in an accumulator's layout: sums over the columns that a lane holds."""
    x = x.reshape(x.shape[0], x.shape[1] // 8, 4, 2)
    return tl.sum(tl.sum(x, 3), 1)


@triton.jit
def _pack(gate, FAST: tl.constexpr):
    """The gate in fp16, two values a register: a relative error of 2^-11, unless it is nearly 0.

    In PTX, because Triton's own conversion keeps each value in a register of its own.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;",
            "=r,r,r",
            [gate],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        return gate.to(tl.float16)


def fused_ln_residual_fwd(
    call: Call,
    launches: Launches,
    product: Tensor,
    moments: Tensor,
    out: Tensor,
    rows: slice | None = None,
    config: LaunchConfig | None = None,
    first_row: int = 0,
    scales: Scales | None = None,
    folds: Folds | None = None,
    scratch: Tensor | None = None,
) -> None:
    """Stage 3 of a call: all rows of its x, or `rows`, of `out` like x, contiguous.

    `out` may be the memory of the residual. If that is x too, and a program would read rows of x
    after they were overwritten, a few rows at a time are written to scratch memory and copied.

    Args:
        product: [B, D, L, pitch].
        moments: [B, 2, L, L], stage 1's, with the axes of x.
        config: a setting in place of the shipped one.
        first_row: the row of the sequences that x begins with; it matters only with lengths.
        scales: of a call with split weights, see `split_weights`.
        folds: what launches of this call share, by default made for this one.
        scratch: memory of x's size at least, for what `writes_gates`; by default allocated.
    """
    key = ("fused_ln_residual", first_row)
    if rows is not None:
        product, moments, out = product[:, :, rows], moments[:, :, rows], out[:, rows]
        residual = None if call.residual is None else call.residual[:, rows]
        drop_mask = call.drop_mask
        if drop_mask is not None and drop_mask.ndim == 4:
            drop_mask = drop_mask[:, rows]
        call = call._replace(x=call.x[:, rows], residual=residual, drop_mask=drop_mask)
        first_row = 0 if call.lengths is None else first_row + rows.start
        alignments = [t.data_ptr() % 16 for t in (call.x, out, residual) if t is not None]
        # Over x itself the launch may write to memory of its own, of another alignment.
        over_x = call.inplace and residual.data_ptr() == call.x.data_ptr()
        key = ("fused_ln_residual", out.shape[1], first_row, over_x, *alignments)
    prepared = launches.of(key, prepare_ln_residual, call, product, moments, config, first_row)
    made = out
    if call.inplace and not _may_overwrite(call, prepared):
        if rows is None:
            for entry in range(out.shape[0]):
                at = slice(entry, entry + 1)
                with writing(call, entry > 0):
                    fused_ln_residual_by_steps(
                        call.of_entry(entry), launches, product[at], moments[at], out[at],
                        first_row, scales, folds,
                    )  # fmt: skip
            return
        made = launches.empty("output", out.shape, out.dtype, out.device)
    weights = call.weights
    if prepared.variant == "hopper":
        variant = hopper.kernels(_variant_of(call.x))
        folds = folds or Folds(launches, weights)
        variant.launch(call, launches, prepared, product, moments, made, first_row, folds, scratch)
    else:
        prepared.launch(
            product_ptr=product,
            product=product,
            x_ptr=call.x,
            moments_ptr=moments,
            residual_ptr=call.residual,
            drop_ptr=call.drop_mask,
            lengths_ptr=call.lengths,
            out_ptr=made,
            norm_in_weight_ptr=weights.norm_in_weight,
            norm_in_bias_ptr=weights.norm_in_bias,
            norm_out_weight_ptr=weights.norm_out_weight,
            norm_out_bias_ptr=weights.norm_out_bias,
            emit_weight=weights.p_out_weight,
            emit_bias_ptr=weights.p_out_bias,
            gate_weight=weights.g_out_weight,
            gate_bias_ptr=weights.g_out_bias,
            scales_ptr=None if scales is None else scales.projections,
        )
    if made is not out:
        out.copy_(made)


class PartlyWritten(torch.OutOfMemoryError):
    """An inplace call ran out of memory after it had begun to write: it can't begin anew."""


@contextlib.contextmanager
def writing(call: Call, begun: bool) -> Iterator[None]:
    """A context for one part of an inplace call's output after the other, of which some has begun.

    Memory that the parts share in turn may be gone, to another thread.

    Raises:
        PartlyWritten: too little memory where some was written before.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if not (begun and call.inplace):
            raise
        raise PartlyWritten(
            "an allocation failed when part of residual, which inplace writes over, was written"
        ) from error


def fused_ln_residual_by_steps(
    call: Call,
    launches: Launches,
    product: Tensor,
    moments: Tensor,
    out: Tensor,
    first_row: int = 0,
    scales: Scales | None = None,
    folds: Folds | None = None,
) -> None:
    """Stage 3 of a call on one sequence, in steps of `rows_of_step` rows, see `writing`."""
    length = call.x.shape[1]
    folds = folds or Folds(launches, call.weights)
    step = rows_of_step(length)
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        with writing(call, start > 0):
            fused_ln_residual_fwd(
                call, launches, product, moments, out, rows, None, first_row, scales, folds
            )


def rows_of_step(length: int) -> int:
    """The rows of the output that `fused_ln_residual_by_steps` makes at once."""
    return -(-length // _STEPS)


def _may_overwrite(call: Call, prepared: PreparedLaunch) -> bool:
    """Whether stage 3 may write over the residual while it runs.

    Not if the residual is x and a program reads rows of x after it, or another program, has
    overwritten some of their channels.
    """
    if prepared.variant == "hopper":  # reads a tile's x before it writes
        return True
    constants = prepared.constants
    whole_rows = constants["BLOCK_N"] >= constants["C"] and constants["SPLIT"] == 1
    return whole_rows or call.residual.data_ptr() != call.x.data_ptr()


def _variant_of(x: Tensor) -> str:
    """The module of the variant for rows like x."""
    return "ln_residual" if x.shape[-1] <= 256 else _WIDE


def writes_gates(call: Call, product: Tensor) -> bool:
    """Whether stage 3 may write gates to memory of x's size."""
    return bool(hopper.variants(_WIDE, "takes", call.x, call, product))


def prepare_ln_residual(
    call: Call,
    product: Tensor,
    moments: Tensor,
    config: LaunchConfig | None,
    first_row: int,
) -> PreparedLaunch:
    """The launch of `fused_ln_residual_fwd` for calls like this one, from row `first_row` on."""
    x, residual, drop_mask, weights = call.x, call.residual, call.drop_mask, call.weights
    batch, hidden, rows, pitch = product.shape
    length, channels = x.shape[2:]
    device = device_target(x.device)
    variants = hopper.variants(_variant_of(x), "takes", x, call, product)
    if config is None:
        width = max(channels, hidden)
        sequences = batch * sequences_in(rows, length)
        config = setting_of(
            "fused_ln_residual", x, width, length, sequences, variants, call.precision == FP16X3
        )
    if hopper.is_variant(config, variants):
        module = hopper.kernels(_variant_of(x))
        return module.prepare(call, product, moments, first_row, config)
    block_m = config.block_m
    block_n = block_of(config.block_n, channels)
    block_k = block_of(config.block_k, max(channels, hidden))
    blocks = triton.cdiv(channels, block_n)
    split = shared_by(config.split, blocks)
    held = config.held and split == blocks
    if held and x.element_size() != 2:
        raise ValueError(f"a held operand is of 16-bit rows; got {config} for {x.dtype}")
    emit, gate = weights.p_out_weight, weights.g_out_weight
    descriptors = config.descriptors and has_descriptor(emit) and has_descriptor(gate)
    tiling, tiles = "pointers", triton.cdiv(rows * pitch, block_m)
    emit_arg = gate_arg = product_arg = None
    if descriptors:
        emit_arg = descriptor_of(emit, emit.shape, emit.stride(), [block_n, block_k])
        gate_arg = descriptor_of(gate, gate.shape, gate.stride(), [block_n, block_k])
        stride_b, stride_d, stride_i, _ = product.stride()
        # By the strides, as one row of a product in rows is contiguous too.
        if (stride_b, stride_d, stride_i) == (hidden * rows * pitch, rows * pitch, pitch):
            tiling = "flat"
            shape, tile = [batch * hidden, rows * pitch], [block_k, block_m]
            product_arg = descriptor_of(product, shape, [stride_d, 1], tile)
        else:
            tiling, tiles = "rows", rows * triton.cdiv(length, block_m)
            shape, tile = [batch, rows, hidden, pitch], [1, 1, block_k, block_m]
            product_arg = descriptor_of(product, shape, [stride_b, stride_i, stride_d, 1], tile)

    residual_strides = (0, 0, 0, 1) if residual is None else strides(residual)
    drop_strides, drop_rows = (0, 0, 1), drop_mask is not None and drop_mask.ndim == 4
    if drop_mask is not None:
        drop_strides = strides(drop_mask.squeeze(2) if drop_rows else drop_mask)
    elements = 16 // x.element_size()
    return PreparedLaunch(
        _fused_ln_residual_fwd_kernel,
        batch * tiles * split,
        tensors=pointers(
            "product_ptr", "x_ptr", "moments_ptr", "residual_ptr", "drop_ptr", "lengths_ptr",
            "out_ptr", "norm_in_weight_ptr", "norm_in_bias_ptr", "norm_out_weight_ptr",
            "norm_out_bias_ptr", "emit_bias_ptr", "gate_bias_ptr", "scales_ptr",
        ) | {"product": product_arg, "emit_weight": emit_arg, "gate_weight": gate_arg},
        values=dict(
            R=rows, L=length, pitch=pitch, first_row=first_row, eps_out=call.eps_out,
            stride_emit=emit.stride(0), stride_gate=gate.stride(0),
            **named_strides("product", "bdi", product.stride()[:3]),
            **named_strides("x", "bijc", strides(x)),
            **named_strides("moments", "bnij", moments.stride()),
            **named_strides("residual", "bijc", residual_strides),
            **named_strides("drop", ("b", "ij", "c"), drop_strides),
        ),
        constants=dict(
            C=channels, D=hidden,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            X_ALIGNMENT=elements if is_aligned(x) else 1,
            RESIDUAL_ALIGNMENT=elements if residual is not None and is_aligned(residual) else 1,
            DESCRIPTORS=descriptors, TILES=tiling,
            PRECISION=dot_precision(call.precision, device.fp32_dots),
            FAST_RECIPROCAL=device.fast_reciprocal, HELD=held, SPLIT=split, DROP_ROWS=drop_rows,
        ),
        options=config.options(),
    )  # fmt: skip
