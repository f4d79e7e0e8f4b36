"""Stage 1: LayerNorm of the pair tensor, both halves of the gated dual GEMM, mask, as planes.

    z = LayerNorm(x; g1, b1)                                       x [B, R, L, C], any strides
    h = (z Wp^T + bp) * sigmoid(z Wg^T + bg) * mask                [B, R, L, 2D]
    a[b, d, q, p] = h[b, q, p, d], b[b, d, q, p] = h[b, q, p, D + d]   "outgoing", Q = R, P = L
                  = h[b, p, q, d]                = h[b, p, q, D + d]   "incoming", Q = L, P = R

x has R of a sequence's L rows, usually all; for "outgoing" also those of several sequences. a and b
are planes [B, D, Q, pitch] in the dtype of x. The axis that stage 2 sums over (k of a[i, k], or of
a[k, i]) is contiguous in both directions: for "incoming" the two residue strides of x and mask are
exchanged. Columns [P, pitch) are zeros. A call may make only a group of G of the D channels: a and
b [B, G, Q, pitch]. With lengths, the planes are written as far as stage 2 reads them: zeros behind
the last residue, up to a multiple of 128.

The moments [B, 2, Q, pitch] in fp32 have the same (q, p): the mean of each row of x (of an fp32
row, the mean of its difference from its first channel) and 1 / sqrt(var + eps).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
from .triton_parts.layer_norm import (
    chunk_moments,
    chunk_statistics,
    hold,
    hold_split,
    load_chunks,
    load_first,
    normalise,
    row_moments,
    row_statistics,
)
from .triton_parts.settings import LaunchConfig
from .triton_parts.split_operands import (
    FP16X3,
    Scales,
    dot_split,
    scale_mask,
    scaled,
    split_plane,
    split_tile,
)
from .triton_parts.tiles import (
    add_bias,
    any_of,
    dot,
    end_of_zeros,
    halves,
    length_of,
    load_tile,
    load_weight_pair,
    positions,
    sigmoid,
)

_MAX_DESCRIPTOR_STRIDE = 2**40  # bytes


@triton.jit(
    do_not_specialize=[
        "Q", "P", "first_q", "first_p", "eps", "first_channel",
        "stride_x_b", "stride_x_q", "stride_x_p",
        "stride_mask_b", "stride_mask_q", "stride_mask_p", "mask_ptr", "lengths_ptr", "masks_ptr",
        # A specialised pointer into a small tensor gets 32-bit offsets on AMD; the gap may be more.
        "weight_pair", "weight_gap",
    ]
)  # fmt: skip
def _fused_dual_gemm_fwd_kernel(
    x_ptr, mask_ptr, lengths_ptr, norm_weight_ptr, norm_bias_ptr,
    weight_pair, weight_gap, value_bias_ptr, gate_bias_ptr, a, b, moments_ptr,
    scales_ptr, masks_ptr, Q, P, pitch, first_q, first_p, eps, first_channel,
    stride_x_b, stride_x_q, stride_x_p, stride_x_c,
    stride_mask_b, stride_mask_q, stride_mask_p,
    stride_first, stride_second,
    stride_a_b, stride_a_d, stride_a_q, stride_b_b, stride_b_d, stride_b_q,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    X_ALIGNMENT: tl.constexpr, WEIGHT_ALIGNMENT: tl.constexpr, GATE_FIRST: tl.constexpr,
    DESCRIPTORS: tl.constexpr, FLAT_PLANES: tl.constexpr,
    PRECISION: tl.constexpr, FAST_RECIPROCAL: tl.constexpr,
    HELD: tl.constexpr, READ_MOMENTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Channels first_channel + [0, G) of a and b at BLOCK_M positions of one sequence.

    M = Q * pitch positions m = q * pitch + p, N = the 2G output channels in blocks, K = C input
    channels. With BLOCK_K >= C the normalised rows stay on the chip while the weights stream past;
    otherwise the rows are read and normalised again for each block of channels. SPLIT programs
    share the output channels of a tile. With FLAT_PLANES, `a` describes the planes of a and b as
    [B * 2 * G, Q * pitch]. q and p count from residues first_q and first_p, which matters only with
    lengths. With PRECISION "fp16x3" the operands are split numbers, and rows of planes have
    2 * pitch elements: see `split_operands`.
    """
    plane_size = Q * pitch
    tiles = tl.cdiv(plane_size, BLOCK_M)
    pid = tl.program_id(0) // SPLIT
    part = tl.program_id(0) - pid * SPLIT
    pid_b = pid // tiles
    start_m = (pid - pid_b * tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q, p = positions(start_m, pitch, BLOCK_M)
    valid_m = (q < Q) & (p < P)
    if lengths_ptr is not None:
        length = length_of(lengths_ptr, pid_b, tl.maximum(Q, P))
        valid_m = valid_m & (first_q + q < length) & (first_p + p < length)
        end = end_of_zeros(length)
        if not any_of((first_q + q < end) & (first_p + p < end)):
            return
    batch = pid_b.to(tl.int64)

    offs_x = batch * stride_x_b + q.to(tl.int64) * stride_x_q + p.to(tl.int64) * stride_x_p
    offs_x = tl.multiple_of(offs_x, X_ALIGNMENT)
    dtype = x_ptr.dtype.element_ty
    EVEN_C: tl.constexpr = C == BLOCK_K
    SPLIT_OPERANDS: tl.constexpr = PRECISION == "fp16x3"
    first = None
    if dtype == tl.float32 or HELD:
        first = load_first(x_ptr, offs_x, valid_m)
    if SPLIT_OPERANDS:
        WHOLE: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K * BLOCK_K
        chunks = load_chunks(x_ptr, offs_x, stride_x_c, valid_m, C, WHOLE, BLOCK_K)
    elif HELD:
        chunks = load_chunks(x_ptr, offs_x, stride_x_c, valid_m, C, BLOCK_K)
    elif BLOCK_K >= C:
        offs_c = tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, offs_x, offs_c, stride_x_c, valid_m, C, EVEN_C).to(tl.float32)

    pair_mask = valid_m.to(tl.float32)
    if mask_ptr is not None:
        offs_mask = (
            batch * stride_mask_b + q.to(tl.int64) * stride_mask_q + p.to(tl.int64) * stride_mask_p
        )
        pair_mask = tl.load(mask_ptr + offs_mask, mask=valid_m, other=0).to(tl.float32)
        pair_mask = scale_mask(pair_mask, masks_ptr, pid_b * pitch + q, valid_m)

    # The same as q < Q, but here the compiler sees that groups of 16 positions agree.
    valid_plane = offs_m < plane_size
    mean_ptrs = moments_ptr + batch * 2 * plane_size + offs_m
    if READ_MOMENTS:
        mean = tl.load(mean_ptrs, mask=valid_plane, other=0.0)[:, None]
        rstd = tl.load(mean_ptrs + plane_size, mask=valid_plane, other=0.0)[:, None]
    else:
        if SPLIT_OPERANDS:
            mean, rstd = chunk_moments(chunks, first, eps, C)
        elif HELD:
            mean, rstd = chunk_statistics(chunks, first, eps, C, BLOCK_K)
        elif BLOCK_K >= C:
            mean, rstd = row_statistics(x, first, eps, C)
        else:
            mean, rstd = row_moments(x_ptr, offs_x, stride_x_c, first, valid_m, eps, C, BLOCK_K)
        # Programs that share a tile store the same values.
        tl.store(mean_ptrs, tl.sum(mean, 1), mask=valid_plane)
        tl.store(mean_ptrs + plane_size, tl.sum(rstd, 1), mask=valid_plane)

    z = None
    if SPLIT_OPERANDS:
        highs, lows = hold_split(
            chunks, first, mean, rstd, norm_weight_ptr, norm_bias_ptr, C
        )
    elif HELD:
        z = hold(chunks, mean, rstd, norm_weight_ptr, norm_bias_ptr, C, BLOCK_K)
    elif BLOCK_K >= C:
        z = normalise(
            x, offs_c, first, mean, rstd, norm_weight_ptr, norm_bias_ptr, C, EVEN_C
        ).to(dtype)  # fmt: skip

    BLOCKS: tl.constexpr = (G + BLOCK_N - 1) // BLOCK_N
    PER_PROGRAM: tl.constexpr = 2 * BLOCKS // SPLIT
    for step in range(0, PER_PROGRAM):
        block = part * PER_PROGRAM + step
        half = block // BLOCKS
        start_n = (block - half * BLOCKS) * BLOCK_N
        if SPLIT_OPERANDS:
            value, gate = project_split(
                highs, lows, scales_ptr, weight_pair, weight_gap, stride_first, stride_second,
                half, first_channel + start_n, half * D + first_channel + start_n,
                C, D, 2, 2 * D, 4 * D + 2 * C, BLOCK_M, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT,
                DESCRIPTORS,
            )  # fmt: skip
        else:
            value, gate = project_pair(
                z, x_ptr, offs_x, stride_x_c, valid_m, first, mean, rstd,
                norm_weight_ptr, norm_bias_ptr, value_bias_ptr, gate_bias_ptr, scales_ptr,
                weight_pair, weight_gap, stride_first, stride_second,
                half, first_channel + start_n, half * D + first_channel + G,
                C, D, BLOCK_M, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, GATE_FIRST, DESCRIPTORS,
                PRECISION,
            )  # fmt: skip

        offs_n = start_n + tl.arange(0, BLOCK_N)
        gated = value * sigmoid(gate, FAST_RECIPROCAL) * pair_mask[:, None]
        if FLAT_PLANES:
            a.store([(pid_b * 2 + half) * G + start_n, start_m], gated.to(dtype).T)
        else:
            ptr = tl.where(half == 0, a, b)
            stride_b = tl.where(half == 0, stride_a_b, stride_b_b)
            stride_d = tl.where(half == 0, stride_a_d, stride_b_d)
            stride_q = tl.where(half == 0, stride_a_q, stride_b_q)
            offs_plane = batch * stride_b + offs_n.to(tl.int64) * stride_d
            offs_pair = q.to(tl.int64) * stride_q + p
            # As for the product in stage 3: groups of 16 positions share a row.
            offs_pair = tl.max_contiguous(tl.multiple_of(offs_pair, 16), 16)
            ptrs = ptr + offs_plane[:, None] + offs_pair[None, :]
            valid = valid_plane[None, :]
            if G % BLOCK_N != 0:
                valid = valid & (offs_n < G)[:, None]
            if SPLIT_OPERANDS:
                # At the padding an infinite weight may have made NaN.
                high, low = split_plane(tl.where(valid_m[:, None], gated, 0.0))
                tl.store(ptrs, high.T, mask=valid)
                tl.store(ptrs + pitch, low.T, mask=valid)
            else:
                tl.store(ptrs, gated.to(dtype).T, mask=valid)


@triton.jit
def project_split(
    highs, lows, scales_ptr, weight_pair, weight_gap, stride_first, stride_second, half, start_d,
    row, C: tl.constexpr, D: tl.constexpr,
    PARTS: tl.constexpr, TO_GATE: tl.constexpr, TOTAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHT_ALIGNMENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """As `project_pair`, of split numbers in tiles of BLOCK_K; a plane's value in its scale.

    The projections are [PARTS * D, C]. Of the TOTAL rows that have scales these are BLOCK_N from
    `row` on, and of the gate those that are TO_GATE behind them.
    """
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for k in tl.static_range(len(highs)):
        high, low = _load_split_pair(
            weight_pair, half, start_d, k * BLOCK_K, weight_gap, stride_first, stride_second,
            D, C, PARTS, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, DESCRIPTORS,
        )  # fmt: skip
        acc = dot_split(highs[k], lows[k], high, low, acc)
    return _scaled_pair(acc, scales_ptr, row, TO_GATE, TOTAL)


@triton.jit
def _load_split_pair(
    weight_pair, half, start_d, start_k, weight_gap, stride_first, stride_second,
    D: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHT_ALIGNMENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The tiles of `load_weight_pair` of split weights, of their high and of their low numbers.

    The low numbers lie PARTS * D rows below the high ones.
    """
    high = load_weight_pair(
        weight_pair, half, start_d, start_k, weight_gap, stride_first, stride_second,
        D, C, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, DESCRIPTORS,
    )  # fmt: skip
    low = load_weight_pair(
        weight_pair, half + PARTS, start_d, start_k, weight_gap, stride_first, stride_second,
        D, C, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, DESCRIPTORS,
    )  # fmt: skip
    return high, low


@triton.jit
def _scaled_pair(acc, scales_ptr, row, TO_GATE: tl.constexpr, TOTAL: tl.constexpr):
    """Value and gate [M, N] of acc [M, 2N], of split numbers."""
    value, gate = halves(acc)
    rows = row + tl.arange(0, value.shape[1])
    value = scaled(value, scales_ptr, rows, TOTAL)
    gate = scaled(gate, scales_ptr, TO_GATE + rows, TOTAL)
    return value, gate


@triton.jit
def project_pair(
    z, x_ptr, offs_x, stride_x_c, valid_m, first, mean, rstd,
    norm_weight_ptr, norm_bias_ptr, value_bias_ptr, gate_bias_ptr, scales_ptr,
    weight_pair, weight_gap, stride_first, stride_second, half, start_d, end_bias,
    C: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHT_ALIGNMENT: tl.constexpr, GATE_FIRST: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """z Wp^T + bp and z Wg^T + bg, [BLOCK_M, BLOCK_N] each in fp32, of channels from start_d on.

    `half` selects the channels of a or of b. z holds the normalised rows if BLOCK_K >= C; otherwise
    they are made here block by block. Biases end at `end_bias`. With PRECISION "fp16x3" the weights
    are split numbers, the rows are split here, and the value is in its planes' scale.
    """
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    for start_k in range(0, C, BLOCK_K):
        if BLOCK_K >= C:
            rows = z
        else:
            offs_k = start_k + tl.arange(0, BLOCK_K)
            x = load_tile(x_ptr, offs_x, offs_k, stride_x_c, valid_m, C, C % BLOCK_K == 0)
            rows = normalise(
                x.to(tl.float32), offs_k, first, mean, rstd, norm_weight_ptr, norm_bias_ptr,
                C, C % BLOCK_K == 0,
            ).to(x_ptr.dtype.element_ty)  # fmt: skip
        if PRECISION == "fp16x3":
            high, low = _load_split_pair(
                weight_pair, half, start_d, start_k, weight_gap, stride_first, stride_second,
                D, C, 2, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, DESCRIPTORS,
            )  # fmt: skip
            rows_high, rows_low = split_tile(rows)
            acc = dot_split(rows_high, rows_low, high, low, acc)
        else:
            weights = load_weight_pair(
                weight_pair, half, start_d, start_k, weight_gap, stride_first, stride_second,
                D, C, BLOCK_N, BLOCK_K, WEIGHT_ALIGNMENT, DESCRIPTORS,
            )  # fmt: skip
            acc = dot(rows, weights.T, acc, PRECISION)
    if PRECISION == "fp16x3":
        return _scaled_pair(acc, scales_ptr, half * D + start_d, 2 * D, 4 * D + 2 * C)
    # Each thread holds both the values and their gates: this moves no data.
    value, gate = halves(acc)
    if GATE_FIRST:
        value, gate = gate, value
    offs_bias = half * D + start_d + tl.arange(0, BLOCK_N)
    value = add_bias(value, value_bias_ptr, offs_bias, end_bias)
    gate = add_bias(gate, gate_bias_ptr, offs_bias, end_bias)
    return value, gate


def fused_dual_gemm_fwd(
    call: Call,
    launches: Launches,
    planes: tuple[Tensor, Tensor],
    group: tuple[int, int] | None = None,
    moments: Tensor | None = None,
    config: LaunchConfig | None = None,
    first_row: int = 0,
    scales: Scales | None = None,
    folds: Folds | None = None,
) -> Tensor:
    """Stage 1 of a call, whose x is [B, R, L, C]; returns the moments [B, 2, Q, pitch].

    Args:
        planes: a and b [B, G, Q, pitch], to be written; unit stride along p, other strides
            multiples of 16.
        group: (first channel, G), by default all D channels.
        moments: those of an earlier launch on the same x, which are then read, or made anew.
        config: a setting in place of the shipped one.
        first_row: the row of the sequences that x begins with.
        scales: of a call with split weights, see `split_weights`. A row of the planes then holds
            its high numbers [pitch], and behind them its low ones, in float16.
        folds: what launches of this call share, by default made for this one.
    """
    read = moments is not None
    prepared = launches.of(
        ("fused_dual_gemm", group, read, call.x.data_ptr() % 16, first_row),
        prepare_dual_gemm, call, planes, group, read, config, first_row,
    )  # fmt: skip
    if not read:
        batch, _, rows, pitch = planes[0].shape
        moments = launches.empty("moments", (batch, 2, rows, pitch), torch.float32, call.x.device)
    if prepared.variant == "hopper":
        variant = hopper.kernels("gated_rows")
        folds = folds or Folds(launches, call.weights)
        variant.launch_planes(call, prepared, planes, moments, group, folds)
        return moments
    weights, (a, b) = call.weights, planes
    if scales is not None:
        a, b = a.view(torch.float16), b.view(torch.float16)
    prepared.launch(
        x_ptr=call.x,
        mask_ptr=call.mask,
        lengths_ptr=call.lengths,
        norm_weight_ptr=weights.norm_in_weight,
        norm_bias_ptr=weights.norm_in_bias,
        weight_pair=lowest(weights.p_in_weight, weights.g_in_weight),
        value_bias_ptr=weights.p_in_bias,
        gate_bias_ptr=weights.g_in_bias,
        a=a,
        b=b,
        moments_ptr=moments,
        scales_ptr=None if scales is None else scales.projections,
        masks_ptr=None if scales is None else scales.masks,
    )
    return moments


def with_axes_of_x(moments: Tensor, direction: str) -> Tensor:
    """Stage 1's moments [B, 2, q, p] as [B, 2, i, j]."""
    return moments.transpose(-1, -2) if direction == "incoming" else moments


class ProjectionPair(NamedTuple):
    """A projection and its gate's, [parts * D, C] each, as one operand of a kernel."""

    gate_first: bool  # whether the gate's projection has the lower address
    gap: int  # elements from the first to the second
    strides: tuple[int, int]  # from row to row of the first and of the second
    alignment: int  # elements in 16 bytes if both are aligned to 16 bytes, else 1
    descriptor: TensorDescriptor | None  # of [2, parts, D, C], if one is legal


def projection_pair(
    value: Tensor, gate: Tensor, parts: int, block_n: int, block_k: int, descriptors: bool
) -> ProjectionPair:
    """The projections [parts * D, C], for tiles [2, 1, block_n, block_k].

    With a descriptor if wanted and legal.
    """
    gate_first = gate.data_ptr() < value.data_ptr()
    first, second = (gate, value) if gate_first else (value, gate)
    elements = 16 // first.element_size()
    gap_bytes = second.data_ptr() - first.data_ptr()
    gap = gap_bytes // first.element_size()
    aligned = is_aligned(first) and is_aligned(second) and gap_bytes % 16 == 0
    descriptor = None
    if (
        descriptors
        and aligned
        and has_descriptor(first)
        and first.stride() == second.stride()
        and 0 < gap_bytes < _MAX_DESCRIPTOR_STRIDE
    ):
        hidden, channels = first.shape[0] // parts, first.shape[1]
        stride_n = first.stride(0)
        descriptor = descriptor_of(
            first,
            [2, parts, hidden, channels],
            [gap, hidden * stride_n, stride_n, 1],
            [2, 1, block_n, block_k],
        )
    return ProjectionPair(
        gate_first,
        gap,
        (first.stride(0), second.stride(0)),
        elements if aligned else 1,
        descriptor,
    )


def lowest(value: Tensor, gate: Tensor) -> Tensor:
    """The projection with the lower address, which a kernel is given for both."""
    return gate if gate.data_ptr() < value.data_ptr() else value


def prepare_dual_gemm(
    call: Call,
    planes: tuple[Tensor, Tensor],
    group: tuple[int, int] | None,
    read_moments: bool,
    config: LaunchConfig | None,
    first_row: int,
) -> PreparedLaunch:
    """The launch of `fused_dual_gemm_fwd` for calls like this one."""
    x, mask, weights = call.x, call.mask, call.weights
    length, channels = x.shape[2:]
    a, b = planes
    batch, size, rows, pitch = a.shape
    split = call.precision == FP16X3
    if split:
        a, b = a.view(torch.float16), b.view(torch.float16)
    hidden = call.hidden
    first_channel = 0 if group is None else group[0]
    device = device_target(x.device)
    variants = hopper.variants("gated_rows", "takes_planes", x, call, planes)
    if config is None:
        width = max(channels, hidden)
        sequences = batch * sequences_in(x.shape[1], length)
        config = setting_of("fused_dual_gemm", x, width, length, sequences, variants, split)
    if hopper.is_variant(config, variants):
        return hopper.kernels("gated_rows").prepare_planes(call, planes, first_row, config)
    block_n = block_of(config.block_n, size)
    if size % 16 == 0:  # whole blocks, even if smaller
        block_n = math.gcd(size, block_n)
    block_k = block_of(config.block_k, channels)
    held = config.held and block_k >= channels
    if held and x.element_size() != 2:
        raise ValueError(f"a held operand is of 16-bit rows; got {config} for {x.dtype}")
    parts = 4 if split else 2  # halves of a, of b; and of high and of low numbers
    pair = projection_pair(
        weights.p_in_weight, weights.g_in_weight, parts, block_n, block_k, config.descriptors
    )
    programs = shared_by(config.split, 2 * triton.cdiv(size, block_n))
    descriptors = pair.descriptor is not None
    plane_size = rows * pitch
    flat_planes = (
        descriptors
        and not split
        and size % block_n == 0
        and a.stride() == b.stride() == (2 * size * plane_size, plane_size, pitch, 1)
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.storage_offset() - a.storage_offset() == size * plane_size
    )
    flat = None
    if flat_planes:
        flat = descriptor_of(
            a, [2 * batch * size, plane_size], [plane_size, 1], [block_n, config.block_m]
        )

    # "incoming" exchanges the residue axes.
    x_axes, mask_axes, columns, first = ("bqpc", "bqp", length, (first_row, 0))
    if call.direction == "incoming":
        x_axes, mask_axes, columns, first = ("bpqc", "bpq", x.shape[1], (0, first_row))
    return PreparedLaunch(
        _fused_dual_gemm_fwd_kernel,
        batch * triton.cdiv(plane_size, config.block_m) * programs,
        tensors=pointers(
            "x_ptr", "mask_ptr", "lengths_ptr", "norm_weight_ptr", "norm_bias_ptr",
            "value_bias_ptr", "gate_bias_ptr", "b", "moments_ptr", "scales_ptr", "masks_ptr",
        ) | {"weight_pair": pair.descriptor, "a": flat},
        values=dict(
            Q=rows, P=columns, pitch=pitch, first_q=first[0], first_p=first[1], eps=call.eps_in,
            first_channel=first_channel, weight_gap=pair.gap,
            stride_first=pair.strides[0], stride_second=pair.strides[1],
            **named_strides("x", x_axes, strides(x)),
            **named_strides("mask", mask_axes, (0, 0, 0) if mask is None else strides(mask)),
            **named_strides("a", "bdq", a.stride()[:3]),
            **named_strides("b", "bdq", b.stride()[:3]),
        ),
        constants=dict(
            C=channels, D=hidden, G=size,
            BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            X_ALIGNMENT=16 // x.element_size() if is_aligned(x) else 1,
            WEIGHT_ALIGNMENT=pair.alignment, GATE_FIRST=pair.gate_first,
            DESCRIPTORS=descriptors, FLAT_PLANES=flat_planes,
            PRECISION=dot_precision(call.precision, device.fp32_dots),
            FAST_RECIPROCAL=device.fast_reciprocal, HELD=held,
            READ_MOMENTS=read_moments, SPLIT=programs,
        ),
        options=config.options(),
    )  # fmt: skip
