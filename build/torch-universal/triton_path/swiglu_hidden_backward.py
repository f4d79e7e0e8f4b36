"""The backward of the transition's first stage, through its second: from the output's gradient.

    z = LayerNorm(x; g, b)                                         x [B, R, J, C], any strides
    p = z Wg^T + bg, u = z Wu^T + bu, s = sigmoid(p)
    h = p s u                                                      [M, H], M = B * R * J

    dh = G Wd                               of h, from the output's gradient G [M, C]
    dp = dh u s (1 + p (1 - s))             of the gate before silu
    du = dh p s                             of the up projection

The kernel recomputes p, u and s. It writes dp and du side by side, so that dz is one product with
the projections; h, for the gradient of Wd; x^ = (x - mean) rstd; and the moments of x.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._call import Transition
from ..fused_dual_gemm import lowest, project_pair, projection_pair
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
from ..triton_parts.layer_norm import load_first, normalise
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.tiles import (
    dot,
    load_tile,
    load_weight,
    pairs_of_rows,
    sigmoid,
    store_tile,
)
from .swiglu_hidden import normalised_rows


@triton.jit(
    do_not_specialize=[
        "M", "R", "J", "eps", "stride_x_b", "stride_x_i", "stride_x_j",
        "weight_pair", "weight_gap",
    ]
)  # fmt: skip
def _swiglu_hidden_bwd_kernel(
    x_ptr, grad_ptr, norm_weight_ptr, norm_bias_ptr,
    weight_pair, weight_gap, up_bias_ptr, gate_bias_ptr, down_turned,
    grads_ptr, hidden_ptr, hat_ptr, moments_ptr, sums_ptr,
    M, R, J, eps,
    stride_x_b, stride_x_i, stride_x_j, stride_x_c, stride_first, stride_second,
    C: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    X_ALIGNMENT: tl.constexpr, WEIGHT_ALIGNMENT: tl.constexpr, GATE_FIRST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, FAST_RECIPROCAL: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """dp, du and h of all H channels of BLOCK_M rows m = (b * R + i) * J + j.

    M rows, N = H hidden channels in blocks, K = C channels, of z and of G. `down_turned` is Wd^T
    [H, C]. grads [M, 2, H] are dp and du; `sums` [programs, 2, H] are their sums over the tile.
    Outputs but `grads` and `moments` [2, M] may be None.
    """
    start_m = tl.program_id(0) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    valid_m = offs_m < M
    row = offs_m.to(tl.int64)
    b, i, j = pairs_of_rows(start_m, R, J, BLOCK_M)
    offs_x = (
        b.to(tl.int64) * stride_x_b + i.to(tl.int64) * stride_x_i + j.to(tl.int64) * stride_x_j
    )
    offs_x = tl.multiple_of(offs_x, X_ALIGNMENT)
    dtype = x_ptr.dtype.element_ty
    EVEN_C: tl.constexpr = C % BLOCK_K == 0
    EVEN_H: tl.constexpr = H % BLOCK_N == 0
    first = None
    if dtype == tl.float32:
        first = load_first(x_ptr, offs_x, valid_m)
    z, mean, rstd = normalised_rows(
        x_ptr, offs_x, stride_x_c, first, valid_m, eps, norm_weight_ptr, norm_bias_ptr,
        C, BLOCK_K, HELD,
    )  # fmt: skip
    tl.store(moments_ptr + row, tl.sum(mean, 1), mask=valid_m)
    tl.store(moments_ptr + M + row, tl.sum(rstd, 1), mask=valid_m)
    if hat_ptr is not None:
        for start_k in range(0, C, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)
            x = load_tile(x_ptr, offs_x, offs_k, stride_x_c, valid_m, C, EVEN_C).to(tl.float32)
            hat = normalise(x, offs_k, first, mean, rstd, None, None, C, EVEN_C)
            store_tile(hat_ptr, row * C, offs_k, hat.to(dtype), valid_m, C, EVEN_C)

    if BLOCK_K >= C:
        grad_out = load_tile(grad_ptr, row * C, tl.arange(0, BLOCK_K), 1, valid_m, C, EVEN_C)
    for start_n in range(0, H, BLOCK_N):
        up, gate = project_pair(
            z, x_ptr, offs_x, stride_x_c, valid_m, first, mean, rstd,
            norm_weight_ptr, norm_bias_ptr, up_bias_ptr, gate_bias_ptr,
            weight_pair, weight_gap, stride_first, stride_second, 0, start_n, H,
            C, H, BLOCK_M, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, GATE_FIRST, DESCRIPTORS, PRECISION,
        )  # fmt: skip
        grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start_k in range(0, C, BLOCK_K):
            if BLOCK_K >= C:
                left = grad_out
            else:
                offs_k = start_k + tl.arange(0, BLOCK_K)
                left = load_tile(grad_ptr, row * C, offs_k, 1, valid_m, C, EVEN_C)
            right = load_weight(
                down_turned, start_n, start_k, C, H, C, BLOCK_N, BLOCK_K, DESCRIPTORS
            )
            grad = dot(left, right.T, grad, PRECISION)
        share = sigmoid(gate, FAST_RECIPROCAL)
        silu = gate * share
        grad_gate = grad * up * share * (1.0 + gate * (1.0 - share))
        grad_up = grad * silu
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if sums_ptr is not None:
            sums_ptrs = sums_ptr + tl.program_id(0).to(tl.int64) * 2 * H + offs_n
            tl.store(sums_ptrs, tl.sum(grad_gate, 0), mask=offs_n < H)
            tl.store(sums_ptrs + H, tl.sum(grad_up, 0), mask=offs_n < H)
        if hidden_ptr is not None:
            store_tile(hidden_ptr, row * H, offs_n, (silu * up).to(dtype), valid_m, H, EVEN_H)
        store_tile(grads_ptr, row * 2 * H, offs_n, grad_gate.to(dtype), valid_m, H, EVEN_H)
        store_tile(grads_ptr + H, row * 2 * H, offs_n, grad_up.to(dtype), valid_m, H, EVEN_H)


class HiddenGradients(NamedTuple):
    """The outputs of `swiglu_hidden_bwd`."""

    grads: Tensor  # dp and du [M, 2H] in the dtype of x
    moments: Tensor  # [2, M] in fp32
    hidden: Tensor | None  # h [M, H] in the dtype of x
    hat_x: Tensor | None  # x^ [M, C] in the dtype of x
    sums: Tensor | None  # [programs, 2H] in fp32, partial sums of dp and du


def swiglu_hidden_bwd(
    call: Transition,
    grad_out: Tensor,
    down_turned: Tensor,
    prepared: PreparedLaunch,
    out: HiddenGradients,
) -> None:
    """Fills `out` for the rows x [B, R, J, C] of a call.

    Args:
        grad_out: [M, C], contiguous, in the dtype of x.
        down_turned: Wd^T [H, C], contiguous.
        prepared: from `prepare_swiglu_hidden_bwd` for tensors like these.
    """
    weights = call.weights
    prepared.launch(
        x_ptr=call.x,
        grad_ptr=grad_out,
        norm_weight_ptr=weights.norm_weight,
        norm_bias_ptr=weights.norm_bias,
        weight_pair=lowest(weights.up_weight, weights.gate_weight),
        up_bias_ptr=weights.up_bias,
        gate_bias_ptr=weights.gate_bias,
        down_turned=down_turned,
        grads_ptr=out.grads,
        hidden_ptr=out.hidden,
        hat_ptr=out.hat_x,
        moments_ptr=out.moments,
        sums_ptr=out.sums,
    )


def prepare_swiglu_hidden_bwd(
    call: Transition, down_turned: Tensor, config: LaunchConfig | None = None
) -> PreparedLaunch:
    """The launch of `swiglu_hidden_bwd` for calls like this one."""
    x, weights, hidden = call.x, call.weights, call.hidden
    batch, row_count, columns, channels = x.shape
    rows = batch * row_count * columns
    device = device_target(x.device)
    if config is None:
        config = setting_of("swiglu_hidden_bwd", x, channels, math.isqrt(rows))
    block_n = block_of(config.block_n, hidden)
    block_k = block_of(config.block_k, channels)
    descriptors = config.descriptors and has_descriptor(down_turned)
    pair = projection_pair(weights.up_weight, weights.gate_weight, 1, block_n, block_k, descriptors)
    descriptors = pair.descriptor is not None
    turned = None
    if descriptors:
        turned = descriptor_of(down_turned, [hidden, channels], [channels, 1], [block_n, block_k])
    return PreparedLaunch(
        _swiglu_hidden_bwd_kernel,
        triton.cdiv(rows, config.block_m),
        tensors=pointers(
            "x_ptr", "grad_ptr", "norm_weight_ptr", "norm_bias_ptr", "up_bias_ptr",
            "gate_bias_ptr", "grads_ptr", "hidden_ptr", "hat_ptr", "moments_ptr", "sums_ptr",
        ) | {"weight_pair": pair.descriptor, "down_turned": turned},
        values=dict(
            M=rows, R=row_count, J=columns, eps=call.eps,
            weight_gap=pair.gap, stride_first=pair.strides[0], stride_second=pair.strides[1],
            **named_strides("x", "bijc", strides(x)),
        ),
        constants=dict(
            C=channels, H=hidden,
            BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            X_ALIGNMENT=16 // x.element_size() if is_aligned(x) else 1,
            WEIGHT_ALIGNMENT=pair.alignment, GATE_FIRST=pair.gate_first, DESCRIPTORS=descriptors,
            PRECISION=dot_precision(call.precision, device.fp32_dots),
            FAST_RECIPROCAL=device.fast_reciprocal,
            HELD=config.held and block_k >= channels and x.element_size() == 2,
        ),
        options=config.options(),
    )  # fmt: skip
