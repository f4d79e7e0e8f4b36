"""Stage 1: LayerNorm of the pair tensor, both halves of the gated dual GEMM, mask, as planes.

    z = LayerNorm(x; g1, b1)                                       x [B, L, L, C], any strides
    planes[b, n, q, p] = ((z Wp^T + bp) * sigmoid(z Wg^T + bg) * mask)[b, q, p, n]   "outgoing"
                       = ( ...                                       )[b, p, q, n]   "incoming"

Planes are [B, 2D, L, pitch] in the dtype of x: planes [0, D) are a, [D, 2D) are b, and the axis
that stage 2 sums over (k of a[i, k], or of a[k, i]) is the contiguous one in both directions.
"incoming" is nothing but x and mask with their two residue strides exchanged. Columns [L, pitch)
are zeros.
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
    load_weight_pair,
    normalise,
    normalise_block,
    padded_pitch,
    row_moments,
    sigmoid,
    strides,
)
from .launch_config import LaunchConfig, pick_config, shape_class
from .validation import Weights

_MAX_DESCRIPTOR_STRIDE = 2**40  # bytes


@triton.jit(
    do_not_specialize=[
        "L", "stride_x_b", "stride_x_q", "stride_x_p",
        "stride_mask_b", "stride_mask_q", "stride_mask_p", "eps", "mask_ptr",
        # A specialised pointer into a small tensor gets 32-bit offsets on AMD; the gap may be more.
        "weight_pair", "weight_gap",
    ]
)  # fmt: skip
def _fused_dual_gemm_fwd_kernel(
    x_ptr, mask_ptr, norm_weight_ptr, norm_bias_ptr,
    weight_pair, weight_gap, value_bias_ptr, gate_bias_ptr, planes,
    L, pitch, eps,
    stride_x_b, stride_x_q, stride_x_p, stride_x_c,
    stride_mask_b, stride_mask_q, stride_mask_p,
    stride_first_n, stride_first_k, stride_second_n, stride_second_k,
    C: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    X_ALIGNMENT: tl.constexpr, WEIGHT_ALIGNMENT: tl.constexpr, GATE_FIRST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, FAST_RECIPROCAL: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """All N = 2D channels of BLOCK_M positions m = q * pitch + p of one sequence's planes.

    M = L * pitch positions, N = output channels in blocks, K = C input channels. With BLOCK_K >= C
    the normalised rows stay in registers while the weights stream past; otherwise the rows are read
    and normalised again for each block of channels.
    """
    tiles = tl.cdiv(L * pitch, BLOCK_M)
    pid = tl.program_id(0)
    pid_b = pid // tiles
    start_m = (pid % tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q = offs_m // pitch
    p = offs_m - q * pitch
    valid_m = (q < L) & (p < L)

    offs_x = (
        pid_b.to(tl.int64) * stride_x_b + q.to(tl.int64) * stride_x_q + p.to(tl.int64) * stride_x_p
    )
    offs_x = tl.multiple_of(offs_x, X_ALIGNMENT)
    pair_mask = valid_m.to(tl.float32)
    if mask_ptr is not None:
        offs_mask = (
            pid_b.to(tl.int64) * stride_mask_b
            + q.to(tl.int64) * stride_mask_q
            + p.to(tl.int64) * stride_mask_p
        )
        pair_mask = tl.load(mask_ptr + offs_mask, mask=valid_m, other=0).to(tl.float32)

    dtype = x_ptr.dtype.element_ty
    first = None
    if dtype == tl.float32:
        first = load_first(x_ptr, offs_x, valid_m)
    if BLOCK_K >= C:
        x = load_rows(x_ptr, offs_x, tl.arange(0, BLOCK_K), stride_x_c, valid_m, C)
        z = normalise(x, first, norm_weight_ptr, norm_bias_ptr, eps, C)
        z = hold_as_operand(z.to(dtype), HELD)
    else:
        mean, rstd = row_moments(x_ptr, offs_x, stride_x_c, first, valid_m, eps, C, BLOCK_K)

    for start_n in range(0, N, BLOCK_N):
        acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
        if BLOCK_K >= C:
            weights = load_weight_pair(
                weight_pair, start_n, 0, weight_gap,
                stride_first_n, stride_first_k, stride_second_n, stride_second_k,
                N, C, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, DESCRIPTORS,
            )  # fmt: skip
            acc = dot(z, weights.T, acc, PRECISION)
        else:
            for start_k in range(0, C, BLOCK_K):
                offs_k = start_k + tl.arange(0, BLOCK_K)
                x = load_rows(x_ptr, offs_x, offs_k, stride_x_c, valid_m, C)
                z = normalise_block(
                    x, offs_k, first, mean, rstd, norm_weight_ptr, norm_bias_ptr, C
                ).to(dtype)
                weights = load_weight_pair(
                    weight_pair, start_n, start_k, weight_gap,
                    stride_first_n, stride_first_k, stride_second_n, stride_second_k,
                    N, C, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, DESCRIPTORS,
                )  # fmt: skip
                acc = dot(z, weights.T, acc, PRECISION)
        # Each thread holds both halves of what it gates: this moves no data.
        value, gate = acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
        if GATE_FIRST:
            value, gate = gate, value

        offs_n = start_n + tl.arange(0, BLOCK_N)
        value = add_bias(value, value_bias_ptr, offs_n, N)
        gate = add_bias(gate, gate_bias_ptr, offs_n, N)
        gated = value * sigmoid(gate, FAST_RECIPROCAL) * pair_mask[:, None]
        gated = gated.to(dtype).T  # [BLOCK_N, BLOCK_M]
        if DESCRIPTORS:
            planes.store([pid_b * N + start_n, start_m], gated)
        else:
            plane_size = L * pitch
            offs_plane = (pid_b * N + offs_n).to(tl.int64) * plane_size
            valid = (offs_m < plane_size)[None, :]
            if N % BLOCK_N != 0:
                valid = valid & (offs_n < N)[:, None]
            tl.store(planes + offs_plane[:, None] + offs_m[None, :], gated, mask=valid)


def fused_dual_gemm_fwd(
    x: torch.Tensor,
    direction: str,
    mask: torch.Tensor | None,
    weights: Weights,
    eps: float,
    precision: str,
    config: LaunchConfig | None = None,
) -> torch.Tensor:
    """planes [B, 2D, L, pitch] of x [B, L, L, C] and mask [B, L, L]: see the module's docstring.

    `precision` is about float32 inputs: "fp32", "ieee", "tf32x3", "tf32" or "bf16".
    """
    batch, length, _, channels = x.shape
    n = weights.p_in_weight.shape[0]
    pitch = padded_pitch(length)
    planes = torch.empty(batch, n, length, pitch, dtype=x.dtype, device=x.device)
    device = device_target(x.device)
    if config is None:
        shape = shape_class(x.element_size(), max(channels, n // 2), length)
        config = pick_config("fused_dual_gemm", device.target, device.name, shape)
    block_n = min(config.block_n, max(16, triton.next_power_of_2(n)))
    block_k = min(config.block_k, max(16, triton.next_power_of_2(channels)))
    # The two projections as one operand, from the one that lies lower in memory.
    gate_first = weights.g_in_weight.data_ptr() < weights.p_in_weight.data_ptr()
    first, second = weights.p_in_weight, weights.g_in_weight
    if gate_first:
        first, second = second, first
    gap_bytes = second.data_ptr() - first.data_ptr()
    aligned = is_aligned(first) and is_aligned(second) and gap_bytes % 16 == 0
    descriptors = (
        config.descriptors
        and aligned
        and n % block_n == 0
        and first.stride() == second.stride()
        and gap_bytes < _MAX_DESCRIPTOR_STRIDE
    )
    gap = gap_bytes // x.element_size()
    weight_pair, planes_arg = first, planes
    if descriptors:
        weight_pair = TensorDescriptor(
            first, [2, n, channels], [gap, *first.stride()], [2, block_n, block_k]
        )
        plane_size = length * pitch
        planes_arg = TensorDescriptor(
            planes, [batch * n, plane_size], [plane_size, 1], [block_n, config.block_m]
        )

    stride_x_b, stride_x_q, stride_x_p, stride_x_c = strides(x)
    mask_strides = (0, 0, 0) if mask is None else strides(mask)
    stride_mask_b, stride_mask_q, stride_mask_p = mask_strides
    if direction == "incoming":
        stride_x_q, stride_x_p = stride_x_p, stride_x_q
        stride_mask_q, stride_mask_p = stride_mask_p, stride_mask_q
    _fused_dual_gemm_fwd_kernel[(batch * triton.cdiv(length * pitch, config.block_m),)](
        x, mask, weights.norm_in_weight, weights.norm_in_bias,
        weight_pair, gap, weights.p_in_bias, weights.g_in_bias, planes_arg,
        length, pitch, eps,
        stride_x_b, stride_x_q, stride_x_p, stride_x_c,
        stride_mask_b, stride_mask_q, stride_mask_p,
        *first.stride(), *second.stride(),
        C=channels, N=n,
        BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        X_ALIGNMENT=16 // x.element_size() if is_aligned(x) else 1,
        WEIGHT_ALIGNMENT=16 // x.element_size() if aligned else 1, GATE_FIRST=gate_first,
        DESCRIPTORS=descriptors, PRECISION=dot_precision(precision, device.fp32_dots),
        FAST_RECIPROCAL=device.fast_reciprocal, HELD=config.held,
        **config.options(),
    )  # fmt: skip
    return planes
