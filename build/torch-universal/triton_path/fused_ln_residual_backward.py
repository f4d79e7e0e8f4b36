"""Stage 3's backward, for some rows of one sequence: de and dq, and the means that dt needs.

    e = (g2 t^) We^T + We b2 + be,  t^ = (t - mean) rstd               t [D, R, pitch], planes
    z = LayerNorm(x; g1, b1), o = sigmoid(z Wo^T + bo)                 x [R, L, C], any strides
    dy = drop_mask * grad_out, out = residual + drop_mask * e * o      grad_out [R, L, C]

    de = dy o                        [R*L, C]      the gradient of e
    dq = dy e o (1 - o)              [R*L, C]      the gradient of the gate before its sigmoid
    dt = rstd (g2 dn - mean(g2 dn) - t^ mean(g2 dn t^)),  dn = de We

This kernel recomputes e and o and writes de and dq; `norm_backward` computes dt. Both means over
the D channels of a row of dn are sums over the C channels of de. They are taken here, so that no
program of `norm_backward` needs a whole row of dn:

    mean(g2 dn)    = sum_c de_c u_c,                u = We g2 / D
    mean(g2 dn t^) = sum_c de_c (We (g2 t^))_c / D,             which is e without We b2 + be

So b2 takes no part in the GEMM: where b2 is much larger than g2 t^, rounding their sum would lose
digits of g2 t^.

The parameters' gradients follow from de^T t^, dq^T x^ and the sums of de and dq (see `gradients`).

For a sequence shorter than L, every output is zero at pairs with a residue beyond its length, where
t and the moments may be NaN. Tiles that hold only such pairs write zeros and return.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import hopper
from .._call import Weights
from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    PreparedLaunch,
    block_of,
    descriptor_of,
    dot_precision,
    has_descriptor,
    is_aligned,
    named_strides,
    pointers,
    setting_of,
    strides,
)
from ..triton_parts.layer_norm import (
    load_first,
    normalise,
    row_variances,
    store_means_of_projection,
)
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.split_operands import (
    Split,
    dot_weight,
    exponents_of_rows,
    multiplied,
    power_of_two,
    scaled,
)
from ..triton_parts.tiles import (
    add_bias,
    any_of,
    as_multiplied,
    load_channels,
    load_tile,
    positions,
    quarters,
    sigmoid,
    store_tile,
    store_zeros,
    within_length,
)


@triton.jit(
    do_not_specialize=[
        "R", "L", "first_row", "eps_out", "moments_ptr", "drop_ptr", "lengths_ptr",
        "stride_x_i", "stride_x_j",
        "stride_moments_n", "stride_moments_i", "stride_moments_j",
        "stride_grad_i", "stride_grad_j", "stride_drop_ij",
    ]
)  # fmt: skip
def _fused_ln_residual_bwd_kernel(
    t_ptr, t_planes, x_ptr, moments_ptr, grad_ptr, drop_ptr, lengths_ptr,
    grad_emit_ptr, grad_gate_ptr, rows_ptr, grad_drop_ptr, sums_ptr,
    norm_in_weight_ptr, norm_in_bias_ptr, norm_out_weight_ptr,
    emit_weight, emit_bias_ptr, gate_weight, gate_bias_ptr, emit_scale_ptr, emit_shift_ptr,
    scales_ptr, R, L, pitch, first_row, eps_out,
    stride_t_d, stride_t_i,
    stride_x_i, stride_x_j, stride_x_c,
    stride_moments_n, stride_moments_i, stride_moments_j,
    stride_grad_i, stride_grad_j, stride_grad_c,
    stride_drop_ij, stride_drop_c,
    stride_emit, stride_gate,
    C: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    X_ALIGNMENT: tl.constexpr, GRAD_ALIGNMENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, FAST_RECIPROCAL: tl.constexpr, DROP_ROWS: tl.constexpr,
):  # fmt: skip
    """de, dq and the outputs below, of all C channels at BLOCK_M positions m = i * pitch + j.

    M = R * pitch positions, N = C channels in blocks, K = C channels of x and D of t. Every output
    is optional: `rows` [5, R*L] (of t: the shift, mean and 1 / std of each row, and both means of
    the formula), `grad_drop` [R*L, C] = grad_out e o, whose sum over the rows is the gradient of
    drop_mask, and `sums` [programs, 2, C] of de and dq over the tile. With DESCRIPTORS the
    projections are descriptors, and `t_planes` describes t as [D, R * pitch]. Row i is row
    first_row + i of its sequence, which matters only with lengths. With DROP_ROWS the drop mask has
    a value for each row i, shared over j; then that sum is over j. With PRECISION "fp16x3" the
    operands are split numbers.
    """
    start_m = tl.program_id(0) * BLOCK_M
    i, j = positions(start_m, pitch, BLOCK_M)
    # The same as i < R, but here the compiler sees that groups of 16 positions agree.
    valid_t = start_m + tl.arange(0, BLOCK_M) < R * pitch
    valid_m = (i < R) & (j < L)
    dtype = x_ptr.dtype.element_ty
    EVEN_C: tl.constexpr = C % BLOCK_K == 0
    EVEN_D: tl.constexpr = D % BLOCK_K == 0
    SPLIT: tl.constexpr = PRECISION == "fp16x3"
    TOTAL: tl.constexpr = 4 * D + 2 * C  # rows of all projections
    if lengths_ptr is not None:
        within = valid_m & within_length(lengths_ptr, 0, first_row + i, j, L)
        beyond = valid_m & ~within
        offs_beyond = (i.to(tl.int64) * L + j) * C
        if grad_emit_ptr is not None:
            store_zeros(grad_emit_ptr, offs_beyond, beyond, C, BLOCK_N)
        if grad_gate_ptr is not None:
            store_zeros(grad_gate_ptr, offs_beyond, beyond, C, BLOCK_N)
        if grad_drop_ptr is not None:
            store_zeros(grad_drop_ptr, offs_beyond, beyond, C, BLOCK_N)
        valid_m = within
        if not any_of(valid_m):
            if sums_ptr is not None:
                both = tl.program_id(0).to(tl.int64) * 2 + tl.arange(0, 2)
                store_zeros(sums_ptr, both * C, both >= 0, C, BLOCK_N)
            return

    offs_x = i.to(tl.int64) * stride_x_i + j.to(tl.int64) * stride_x_j
    offs_x = tl.multiple_of(offs_x, X_ALIGNMENT)
    offs_grad = i.to(tl.int64) * stride_grad_i + j.to(tl.int64) * stride_grad_j
    offs_grad = tl.multiple_of(offs_grad, GRAD_ALIGNMENT)
    mean_ptrs = moments_ptr + i.to(tl.int64) * stride_moments_i + j.to(tl.int64) * stride_moments_j
    mean_x = tl.load(mean_ptrs, mask=valid_m, other=0.0)[:, None]
    rstd_x = tl.load(mean_ptrs + stride_moments_n, mask=valid_m, other=0.0)[:, None]
    offs_t = i.to(tl.int64) * stride_t_i + j
    # Groups of 16 positions share a row, and every stride of t is a multiple of 16.
    offs_t = tl.max_contiguous(tl.multiple_of(offs_t, 16), 16)
    row = i.to(tl.int64) * L + j
    first_x = None
    first_t = None
    if dtype == tl.float32:
        first_x = load_first(x_ptr, offs_x, valid_m)
        first_t = load_first(t_ptr, offs_t, valid_t)
    mean_t, variance = row_variances(t_ptr, offs_t, stride_t_d, first_t, valid_t, D, BLOCK_K)
    rstd_t = tl.rsqrt(variance + eps_out)
    grown = rstd_t  # of split numbers times the powers of two of small rows
    if SPLIT:
        exponents = exponents_of_rows(variance, rstd_t, None, D)
        grown *= power_of_two(exponents)

    mean_grad = tl.zeros([BLOCK_M], tl.float32)
    mean_grad_hat = tl.zeros([BLOCK_M], tl.float32)
    for start_n in range(0, C, BLOCK_N):
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start_k in range(0, C, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            x = load_tile(x_ptr, offs_x, offs_k, stride_x_c, valid_m, C, EVEN_C)
            z = normalise(
                x.to(tl.float32), offs_k, first_x, mean_x, rstd_x,
                norm_in_weight_ptr, norm_in_bias_ptr, C, EVEN_C,
            ).to(dtype)  # fmt: skip
            gate = dot_weight(
                z, gate_weight, start_n, start_k, stride_gate, gate,
                C, C, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        offs_c = start_n + tl.arange(0, BLOCK_N)
        if SPLIT:
            gate = scaled(gate, scales_ptr, 4 * D + C + offs_c, TOTAL)
        else:
            gate = add_bias(gate, gate_bias_ptr, offs_c, C)
        gate = sigmoid(gate, FAST_RECIPROCAL)

        emit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if not SPLIT:
            emit = add_bias(emit, emit_shift_ptr, offs_c, C)
        for start_k in range(0, D, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            if DESCRIPTORS:
                t = t_planes.load([start_k, start_m]).T
            else:
                t = load_tile(t_ptr, offs_t, offs_k, stride_t_d, valid_t, D, EVEN_D)
            rows = normalise(
                t.to(tl.float32), offs_k, first_t, mean_t, grown,
                norm_out_weight_ptr, None, D, EVEN_D,
            ).to(dtype)  # fmt: skip
            emit = dot_weight(
                rows, emit_weight, start_n, start_k, stride_emit, emit,
                C, D, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
            )  # fmt: skip
        if SPLIT:
            factors = tl.load(scales_ptr + 4 * D + offs_c, mask=offs_c < C, other=0.0)
            emit = emit * power_of_two(-exponents) * factors[None, :]
            emit = add_bias(emit, emit_shift_ptr, offs_c, C)
        # The padding columns of t are uninitialised and may be NaN.
        emit = tl.where(valid_m[:, None], emit, 0.0)
        if SPLIT and C % BLOCK_N != 0:
            # A tile of high numbers may reach into the low ones, which hold what is infinite.
            gate = tl.where((offs_c < C)[None, :], gate, 0.0)
            emit = tl.where((offs_c < C)[None, :], emit, 0.0)

        # A quarter of the columns at a time: loads and stores have layouts of their own, which for
        # all columns would take as many registers again.
        EVEN_N: tl.constexpr = C % BLOCK_N == 0
        emits = quarters(emit)
        gates = quarters(gate)
        for quarter in tl.static_range(len(emits)):
            emit, gate = emits[quarter], gates[quarter]
            offs_n = start_n + quarter * emit.shape[1] + tl.arange(0, emit.shape[1])
            grad = load_tile(grad_ptr, offs_grad, offs_n, stride_grad_c, valid_m, C, EVEN_N)
            grad = grad.to(tl.float32)
            biased = add_bias(emit, emit_bias_ptr, offs_n, C)
            if grad_drop_ptr is not None:
                grad_drop = (grad * biased * gate).to(dtype)
                store_tile(grad_drop_ptr, row * C, offs_n, grad_drop, valid_m, C, EVEN_N)
            if drop_ptr is not None:
                ij = i if DROP_ROWS else j
                offs_drop = ij.to(tl.int64) * stride_drop_ij
                drop = load_tile(drop_ptr, offs_drop, offs_n, stride_drop_c, valid_m, C, False)
                grad *= drop.to(tl.float32)
            grad_emit = grad * gate
            grad_gate = grad_emit * biased * (1.0 - gate)
            if sums_ptr is not None:
                sums_ptrs = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * C + offs_n
                tl.store(sums_ptrs, tl.sum(grad_emit, 0), mask=offs_n < C)
                tl.store(sums_ptrs + C, tl.sum(grad_gate, 0), mask=offs_n < C)
            if grad_gate_ptr is not None:
                grad_gate = grad_gate.to(dtype)
                store_tile(grad_gate_ptr, row * C, offs_n, grad_gate, valid_m, C, EVEN_N)
            if grad_emit_ptr is not None:
                rounded = grad_emit.to(dtype)
                store_tile(grad_emit_ptr, row * C, offs_n, rounded, valid_m, C, EVEN_N)
                # The means are of the values that `norm_out_bwd` multiplies.
                grad_emit = as_multiplied(rounded, PRECISION)
            if rows_ptr is not None:
                scale = load_channels(emit_scale_ptr, offs_n, 0.0, C, EVEN_N)
                mean_grad += tl.sum(grad_emit * scale, 1)
                shift = load_channels(emit_shift_ptr, offs_n, 0.0, C, EVEN_N)
                mean_grad_hat += tl.sum(grad_emit * (emit - shift), 1)

    if rows_ptr is not None:
        count = R.to(tl.int64) * L
        if first_t is not None:
            tl.store(rows_ptr + row, tl.sum(first_t, 1), mask=valid_m)
        tl.store(rows_ptr + count + row, tl.sum(mean_t, 1), mask=valid_m)
        tl.store(rows_ptr + 2 * count + row, tl.sum(rstd_t, 1), mask=valid_m)
        tl.store(rows_ptr + 3 * count + row, mean_grad, mask=valid_m)
        tl.store(rows_ptr + 4 * count + row, mean_grad_hat * (1.0 / D), mask=valid_m)


@triton.jit
def _emit_means_kernel(
    emit_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, shift_ptr, stride_emit,
    C: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """We g2 / D and We b2 of BLOCK_N channels in fp32; We is rounded as in its products."""
    store_means_of_projection(
        emit_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, shift_ptr,
        tl.program_id(0) * BLOCK_N, stride_emit, C, D, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip


def emit_means(weights: Weights, prepared: PreparedLaunch) -> tuple[torch.Tensor, ...]:
    """We g2 / D and We b2, [C] each in fp32, for `fused_ln_residual_bwd`; None without b2.

    `prepared` is from `prepare_emit_means`.
    """
    emit = weights.p_out_weight
    scale, shift = torch.empty(2, emit.shape[0], dtype=torch.float32, device=emit.device).unbind()
    if weights.norm_out_bias is None:
        shift = None
    prepared.launch(
        emit_ptr=emit,
        norm_weight_ptr=weights.norm_out_weight,
        norm_bias_ptr=weights.norm_out_bias,
        scale_ptr=scale,
        shift_ptr=shift,
    )
    return scale, shift


def prepare_emit_means(weights: Weights, precision: str) -> PreparedLaunch:
    """The launch of `emit_means`."""
    channels, hidden = weights.p_out_weight.shape
    return PreparedLaunch(
        _emit_means_kernel,
        triton.cdiv(channels, 16),
        tensors=pointers("emit_ptr", "norm_weight_ptr", "norm_bias_ptr", "scale_ptr", "shift_ptr"),
        values=dict(stride_emit=weights.p_out_weight.stride(0)),
        constants=dict(C=channels, D=hidden, BLOCK_N=16, BLOCK_K=64, PRECISION=precision),
        options=dict(num_warps=4, num_stages=2),
    )


class Rows(NamedTuple):
    """Some rows of one sequence: stage 3's inputs, and the gradient of its output."""

    t: torch.Tensor  # [D, R, pitch], whole rows of planes, their strides multiples of 16
    x: torch.Tensor  # [R, L, C]
    moments: torch.Tensor  # [2, R, L], stage 1's, with the axes of x
    grad_out: torch.Tensor  # [R, L, C]
    drop_mask: torch.Tensor | None  # [L, C], or [R, 1, C]
    lengths: torch.Tensor | None = None  # [1] int32, of a padded sequence


class Stage3Gradients(NamedTuple):
    """The outputs of `fused_ln_residual_bwd`: contiguous, or None where not wanted."""

    emit: torch.Tensor | None  # de [R*L, C] in the dtype of x
    gate: torch.Tensor | None  # dq [R*L, C] in the dtype of x
    rows: torch.Tensor | None  # [5, R*L] in fp32, for `norm_out_bwd`
    drop_mask: torch.Tensor | None  # [R*L, C] in the dtype of x
    sums: torch.Tensor | None  # [partial_sums, 2, C] in fp32, of de and dq


def fused_ln_residual_bwd(
    rows: Rows,
    weights: Weights,
    emit_means: tuple[torch.Tensor, torch.Tensor | None],
    prepared: PreparedLaunch,
    out: Stage3Gradients,
    folded: tuple[torch.Tensor | None, ...] | None = None,
    split: Split | None = None,
) -> None:
    """Fills `out`.

    `emit_means` are We g2 / D and We b2, [C] each in fp32 (None where there is no b2). `prepared`
    is from `prepare_ln_residual_bwd` for tensors like these. `folded` is what a variant needs of
    these weights, `split` is of a call of split numbers.
    """
    if prepared.variant == "hopper":
        variant = hopper.kernels("ln_residual_backward")
        variant.launch(rows, weights, emit_means, prepared, out, folded)
        return
    emit_scale, emit_shift = emit_means
    of_products = multiplied(weights, split)
    prepared.launch(
        t_ptr=rows.t,
        t_planes=rows.t,
        x_ptr=rows.x,
        moments_ptr=rows.moments,
        grad_ptr=rows.grad_out,
        drop_ptr=rows.drop_mask,
        lengths_ptr=rows.lengths,
        grad_emit_ptr=out.emit,
        grad_gate_ptr=out.gate,
        rows_ptr=out.rows,
        grad_drop_ptr=out.drop_mask,
        sums_ptr=out.sums,
        norm_in_weight_ptr=of_products.norm_in_weight,
        norm_in_bias_ptr=of_products.norm_in_bias,
        norm_out_weight_ptr=of_products.norm_out_weight,
        emit_weight=of_products.p_out_weight,
        emit_bias_ptr=weights.p_out_bias,
        gate_weight=of_products.g_out_weight,
        gate_bias_ptr=of_products.g_out_bias,
        emit_scale_ptr=emit_scale,
        emit_shift_ptr=emit_shift,
        scales_ptr=None if split is None else split.scales.projections,
    )


def partial_sums(prepared: PreparedLaunch) -> int:
    """The first extent of the sums that `fused_ln_residual_bwd` writes."""
    if prepared.variant == "hopper":
        return prepared.programs * hopper.kernels("ln_residual_backward").SUMS
    return prepared.programs


def prepare_ln_residual_bwd(
    rows: Rows,
    weights: Weights,
    eps: tuple[float, float],
    precision: str,
    outputs: frozenset[str],
    config: LaunchConfig | None = None,
    first_row: int = 0,
    split: Split | None = None,
) -> PreparedLaunch:
    """The launch of `fused_ln_residual_bwd`.

    Args:
        eps: of the norms of x and of t.
        outputs: the names of `Stage3Gradients` that will be wanted.
        first_row: the row of its sequence that the rows begin with.
        split: of a call of split numbers.
    """
    t, x, moments, grad_out, drop_mask, _ = rows
    hidden, count, pitch = t.shape
    length, channels = x.shape[1:]
    device = device_target(x.device)
    variants = hopper.variants("ln_residual_backward", "takes", x, rows, outputs)
    if config is None:
        width = max(channels, hidden)
        splits = split is not None
        config = setting_of("fused_ln_residual_bwd", x, width, length, 1, variants, splits)
    if hopper.is_variant(config, variants):
        variant = hopper.kernels("ln_residual_backward")
        return variant.prepare(rows, weights, eps, outputs, config)
    block_m = config.block_m
    block_n = block_of(config.block_n, channels)
    block_k = block_of(config.block_k, max(channels, hidden))
    drop_strides, drop_rows = (0, 1), drop_mask is not None and drop_mask.ndim == 3
    if drop_mask is not None:
        drop_strides = strides(drop_mask.squeeze(1) if drop_rows else drop_mask)
    elements = 16 // x.element_size()
    of_products = multiplied(weights, split)
    emit, gate = of_products.p_out_weight, of_products.g_out_weight
    descriptors = config.descriptors and has_descriptor(emit) and has_descriptor(gate)
    t_planes = emit_arg = gate_arg = None
    if descriptors:
        t_planes = descriptor_of(
            t, [hidden, count * pitch], [t.stride(0), 1], [block_k, block_m]
        )
        emit_arg = descriptor_of(emit, emit.shape, emit.stride(), [block_n, block_k])
        gate_arg = descriptor_of(gate, gate.shape, gate.stride(), [block_n, block_k])
    return PreparedLaunch(
        _fused_ln_residual_bwd_kernel,
        triton.cdiv(count * pitch, block_m),
        tensors=pointers(
            "t_ptr", "x_ptr", "moments_ptr", "grad_ptr", "drop_ptr", "lengths_ptr",
            "grad_emit_ptr", "grad_gate_ptr", "rows_ptr", "grad_drop_ptr", "sums_ptr",
            "norm_in_weight_ptr", "norm_in_bias_ptr", "norm_out_weight_ptr",
            "emit_bias_ptr", "gate_bias_ptr", "emit_scale_ptr", "emit_shift_ptr", "scales_ptr",
        ) | {"t_planes": t_planes, "emit_weight": emit_arg, "gate_weight": gate_arg},
        values=dict(
            R=count, L=length, pitch=pitch, first_row=first_row, eps_out=eps[1],
            stride_emit=emit.stride(0), stride_gate=gate.stride(0),
            **named_strides("t", "di", t.stride()[:2]),
            **named_strides("x", "ijc", strides(x)),
            **named_strides("moments", "nij", moments.stride()),
            **named_strides("grad", "ijc", strides(grad_out)),
            **named_strides("drop", ("ij", "c"), drop_strides),
        ),
        constants=dict(
            C=channels, D=hidden, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            X_ALIGNMENT=elements if is_aligned(x) else 1,
            GRAD_ALIGNMENT=elements if is_aligned(grad_out) else 1, DESCRIPTORS=descriptors,
            PRECISION=dot_precision(precision, device.fp32_dots),
            FAST_RECIPROCAL=device.fast_reciprocal, DROP_ROWS=drop_rows,
        ),
        options=config.options(),
    )  # fmt: skip
