"""Stage 3: LayerNorm of the product over channels, projection, output gate, drop mask, residual.

    t   = LayerNorm(product[b, :, i, j]; g2, b2)                   product [B, D, L, pitch]
    z   = LayerNorm(x; g1, b1)                                     x [B, L, L, C], any strides
    out = residual + drop_mask * (t We^T + be) * sigmoid(z Wo^T + bo)              [B, L, L, C]

The output gate is computed here from x: writing z or the gate in stage 1 would cost one more pair
tensor. The update alone is never written where there is a residual.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._device import device_target
from ._tiles import (
    add_bias,
    dot,
    dot_precision,
    hold_as_operand,
    is_aligned,
    load_first,
    load_rows,
    load_weight,
    normalise,
    normalise_block,
    row_moments,
    sigmoid,
    strides,
)
from .launch_config import LaunchConfig, pick_config, shape_class
from .validation import Weights


@triton.jit(
    do_not_specialize=[
        "L", "stride_x_b", "stride_x_i", "stride_x_j",
        "stride_residual_b", "stride_residual_i", "stride_residual_j",
        "stride_drop_b", "stride_drop_j", "drop_ptr", "eps_in", "eps_out",
    ]
)  # fmt: skip
def _fused_ln_residual_fwd_kernel(
    product_ptr, x_ptr, residual_ptr, drop_ptr, out_ptr,
    norm_in_weight_ptr, norm_in_bias_ptr, norm_out_weight_ptr, norm_out_bias_ptr,
    emit_weight, emit_bias_ptr, gate_weight, gate_bias_ptr,
    L, pitch, eps_in, eps_out,
    stride_x_b, stride_x_i, stride_x_j, stride_x_c,
    stride_residual_b, stride_residual_i, stride_residual_j, stride_residual_c,
    stride_drop_b, stride_drop_j, stride_drop_c,
    stride_emit_n, stride_emit_k, stride_gate_n, stride_gate_k,
    C: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
    X_ALIGNMENT: tl.constexpr, RESIDUAL_ALIGNMENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, FAST_RECIPROCAL: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """All C channels of BLOCK_M positions m = i * pitch + j of one sequence's output.

    M = L * pitch positions, N = C output channels in blocks, K = D channels of the product and C
    of x. Each operand stays in registers if its block (BLOCK_D, BLOCK_C) holds all its channels, as
    in stage 1.
    """
    plane_size = L * pitch
    tiles = tl.cdiv(plane_size, BLOCK_M)
    pid = tl.program_id(0)
    pid_b = pid // tiles
    start_m = (pid % tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    i = offs_m // pitch
    j = offs_m - i * pitch
    valid_m = (i < L) & (j < L)
    batch = pid_b.to(tl.int64)
    dtype = x_ptr.dtype.element_ty

    # The product first, to the end, and x only then: both at once would double the registers.
    valid_t = offs_m < plane_size
    stride_t = plane_size.to(tl.int64)
    t_ptr = product_ptr + batch * D * stride_t
    first_t = None
    if dtype == tl.float32:
        first_t = load_first(t_ptr, offs_m, valid_t)
    if BLOCK_D >= D:
        t = load_rows(t_ptr, offs_m, tl.arange(0, BLOCK_D), stride_t, valid_t, D)
        t = normalise(t, first_t, norm_out_weight_ptr, norm_out_bias_ptr, eps_out, D)
        t = hold_as_operand(t.to(dtype), HELD)
    else:
        mean_t, rstd_t = row_moments(t_ptr, offs_m, stride_t, first_t, valid_t, eps_out, D, BLOCK_D)

    offs_x = batch * stride_x_b + i.to(tl.int64) * stride_x_i + j.to(tl.int64) * stride_x_j
    offs_x = tl.multiple_of(offs_x, X_ALIGNMENT)
    first_x = None
    if dtype == tl.float32:
        first_x = load_first(x_ptr, offs_x, valid_m)
    if BLOCK_C >= C:
        z = load_rows(x_ptr, offs_x, tl.arange(0, BLOCK_C), stride_x_c, valid_m, C)
        z = normalise(z, first_x, norm_in_weight_ptr, norm_in_bias_ptr, eps_in, C).to(dtype)
    else:
        mean_x, rstd_x = row_moments(
            x_ptr, offs_x, stride_x_c, first_x, valid_m, eps_in, C, BLOCK_C
        )

    offs_residual = (
        batch * stride_residual_b
        + i.to(tl.int64) * stride_residual_i
        + j.to(tl.int64) * stride_residual_j
    )
    offs_residual = tl.multiple_of(offs_residual, RESIDUAL_ALIGNMENT)
    offs_drop = batch * stride_drop_b + j.to(tl.int64) * stride_drop_j
    offs_out = ((batch * L + i) * L + j) * C

    for start_n in range(0, C, BLOCK_N):
        delta = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if BLOCK_D >= D:
            emit_tile = load_weight(
                emit_weight, start_n, 0, stride_emit_n, stride_emit_k,
                C, D, BLOCK_N, BLOCK_D, DESCRIPTORS,
            )  # fmt: skip
            delta = dot(t, emit_tile.T, delta, PRECISION)
        else:
            for start_k in range(0, D, BLOCK_D):
                offs_k = start_k + tl.arange(0, BLOCK_D)
                t = load_rows(t_ptr, offs_m, offs_k, stride_t, valid_t, D)
                t = normalise_block(
                    t, offs_k, first_t, mean_t, rstd_t, norm_out_weight_ptr, norm_out_bias_ptr, D
                ).to(dtype)
                emit_tile = load_weight(
                    emit_weight, start_n, start_k, stride_emit_n, stride_emit_k,
                    C, D, BLOCK_N, BLOCK_D, DESCRIPTORS,
                )  # fmt: skip
                delta = dot(t, emit_tile.T, delta, PRECISION)
        if BLOCK_C >= C:
            gate_tile = load_weight(
                gate_weight, start_n, 0, stride_gate_n, stride_gate_k,
                C, C, BLOCK_N, BLOCK_C, DESCRIPTORS,
            )  # fmt: skip
            gate = dot(z, gate_tile.T, gate, PRECISION)
        else:
            for start_k in range(0, C, BLOCK_C):
                offs_k = start_k + tl.arange(0, BLOCK_C)
                z = load_rows(x_ptr, offs_x, offs_k, stride_x_c, valid_m, C)
                z = normalise_block(
                    z, offs_k, first_x, mean_x, rstd_x, norm_in_weight_ptr, norm_in_bias_ptr, C
                ).to(dtype)
                gate_tile = load_weight(
                    gate_weight, start_n, start_k, stride_gate_n, stride_gate_k,
                    C, C, BLOCK_N, BLOCK_C, DESCRIPTORS,
                )  # fmt: skip
                gate = dot(z, gate_tile.T, gate, PRECISION)

        offs_n = start_n + tl.arange(0, BLOCK_N)
        delta = add_bias(delta, emit_bias_ptr, offs_n, C)
        gate = add_bias(gate, gate_bias_ptr, offs_n, C)
        delta *= sigmoid(gate, FAST_RECIPROCAL)
        if drop_ptr is not None:
            delta *= load_rows(drop_ptr, offs_drop, offs_n, stride_drop_c, valid_m, C)
        if residual_ptr is not None:
            delta += load_rows(residual_ptr, offs_residual, offs_n, stride_residual_c, valid_m, C)
        valid = valid_m[:, None] & (offs_n < C)[None, :]
        tl.store(out_ptr + offs_out[:, None] + offs_n[None, :], delta.to(dtype), mask=valid)


def fused_ln_residual_fwd(
    product: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    drop_mask: torch.Tensor | None,
    weights: Weights,
    eps_in: float,
    eps_out: float,
    precision: str,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """out [B, L, L, C] of product [B, D, L, pitch], x, residual and drop_mask [B, L, C]."""
    batch, hidden, length, pitch = product.shape
    channels = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    device = device_target(x.device)
    if config is None:
        shape = shape_class(x.element_size(), max(channels, hidden), length)
        config = pick_config("fused_ln_residual", device.target, device.name, shape)
    block_n = min(config.block_n, max(16, triton.next_power_of_2(channels)))
    block_c = min(config.block_k, max(16, triton.next_power_of_2(channels)))
    block_d = min(config.block_k, max(16, triton.next_power_of_2(hidden)))
    emit, gate = weights.p_out_weight, weights.g_out_weight
    if config.descriptors and config.held:
        raise ValueError(
            "stage 3 takes descriptors or a held operand, not both: together they gave wrong sums "
            f"on an H200 with Triton 3.6.0; got {config}"
        )
    descriptors = config.descriptors and is_aligned(emit) and is_aligned(gate)
    emit_arg, gate_arg = emit, gate
    if descriptors:
        emit_arg = TensorDescriptor(emit, emit.shape, emit.stride(), [block_n, block_d])
        gate_arg = TensorDescriptor(gate, gate.shape, gate.stride(), [block_n, block_c])

    residual_strides = (0, 0, 0, 1) if residual is None else strides(residual)
    drop_strides = (0, 0, 1) if drop_mask is None else strides(drop_mask)
    elements = 16 // x.element_size()
    _fused_ln_residual_fwd_kernel[(batch * triton.cdiv(length * pitch, config.block_m),)](
        product, x, residual, drop_mask, out,
        weights.norm_in_weight, weights.norm_in_bias,
        weights.norm_out_weight, weights.norm_out_bias,
        emit_arg, weights.p_out_bias, gate_arg, weights.g_out_bias,
        length, pitch, eps_in, eps_out,
        *strides(x),
        *residual_strides,
        *drop_strides,
        *emit.stride(), *gate.stride(),
        C=channels, D=hidden,
        BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_D=block_d,
        X_ALIGNMENT=elements if is_aligned(x) else 1,
        RESIDUAL_ALIGNMENT=elements if residual is not None and is_aligned(residual) else 1,
        DESCRIPTORS=descriptors, PRECISION=dot_precision(precision, device.fp32_dots),
        FAST_RECIPROCAL=device.fast_reciprocal, HELD=config.held,
        **config.options(),
    )  # fmt: skip
    return out
