"""A linear layer over rows, with a residual: the second stage of the transition.

    out = residual + rows W^T + bias                   rows [M, K], W [N, K], out [M, N]

rows and out are contiguous, W has unit stride along k, all in one dtype; sums in fp32. The residual
and the lengths belong to rows m = (b * R + i) * J + j of [B, R, J, N]. With lengths, a row of a
padded pair is its residual, or 0.

No setting of torch's applies to it: the call's precision alone decides how float32 operands are
multiplied, and equal calls give equal bits.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .. import hopper
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
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.split_operands import FP16X3, scaled
from ..triton_parts.split_rows import multiply_rows
from ..triton_parts.tiles import (
    add_bias,
    any_of,
    load_tile,
    pairs_of_rows,
    quarters,
    store_tile,
    within_lengths,
)


@triton.jit(
    do_not_specialize=[
        "M", "R", "J", "first_row", "lengths_ptr",
        "stride_residual_b", "stride_residual_i", "stride_residual_j",
    ]
)  # fmt: skip
def _row_linear_kernel(
    rows_ptr, rows, weight, bias_ptr, scales_ptr, residual_ptr, lengths_ptr, out_ptr,
    M, R, J, first_row, stride_weight,
    stride_residual_b, stride_residual_i, stride_residual_j, stride_residual_c,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RESIDUAL_ALIGNMENT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of residual + rows W^T + bias. K is summed in blocks.

    The tiles of the same rows have adjacent ids, so that the rows are read from memory once. With
    PRECISION "fp16x3" W is split, and its rows' scales, among them the biases, are the last N of
    2K + N.
    """
    TILES_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile_m = tl.program_id(0) // TILES_N
    start_n = (tl.program_id(0) - tile_m * TILES_N) * BLOCK_N
    start_m = tile_m * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    valid_m = offs_m < M
    within = valid_m
    if lengths_ptr is not None:
        b, i, j = pairs_of_rows(start_m, R, J, BLOCK_M)
        within = valid_m & within_lengths(lengths_ptr, b, first_row + i, j, valid_m, J)

    end_k = K
    if lengths_ptr is not None:
        end_k = tl.where(any_of(within), K, 0)
    acc = multiply_rows(
        rows_ptr, rows, weight, stride_weight, start_m, start_n, valid_m, end_k,
        N, K, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
    )  # fmt: skip

    # A quarter of the columns at a time: see stage 3.
    parts = quarters(acc)
    WIDTH: tl.constexpr = parts[0].shape[1]
    for quarter in tl.static_range(len(parts)):
        offs_n = start_n + quarter * WIDTH + tl.arange(0, WIDTH)
        if PRECISION == "fp16x3":
            tile = scaled(parts[quarter], scales_ptr, 2 * K + offs_n, 2 * K + N)
        else:
            tile = add_bias(parts[quarter], bias_ptr, offs_n, N)
        if lengths_ptr is not None:
            # Beyond the length the operands may be NaN.
            tile = tl.where(within[:, None], tile, 0.0)
        if residual_ptr is not None:
            b, i, j = pairs_of_rows(start_m, R, J, BLOCK_M)
            offs_residual = (
                b.to(tl.int64) * stride_residual_b
                + i.to(tl.int64) * stride_residual_i
                + j.to(tl.int64) * stride_residual_j
            )
            offs_residual = tl.multiple_of(offs_residual, RESIDUAL_ALIGNMENT)
            residual = load_tile(
                residual_ptr, offs_residual, offs_n, stride_residual_c, valid_m, N,
                N % BLOCK_N == 0,
            )  # fmt: skip
            tile += residual.to(tl.float32)
        store_tile(
            out_ptr, offs_m.to(tl.int64) * N, offs_n, tile.to(out_ptr.dtype.element_ty), valid_m,
            N, N % BLOCK_N == 0,
        )  # fmt: skip


def row_linear(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    prepared: PreparedLaunch,
    scales: Tensor | None = None,
) -> None:
    """Fills out [M, N]; `prepared` is from `prepare_row_linear` for tensors like these.

    `scales` [4, 2K + N] end with those of a split weight's rows; the bias is among them.
    """
    if prepared.variant == "hopper":
        prepared.launch(
            rows=rows,
            weight=weight,
            residual=residual,
            out=out,
            bias_ptr=bias,
            lengths_ptr=lengths,
        )
        return
    prepared.launch(
        rows_ptr=rows,
        rows=rows,
        weight=weight,
        bias_ptr=bias,
        scales_ptr=scales,
        residual_ptr=residual,
        lengths_ptr=lengths,
        out_ptr=out,
    )


def prepare_row_linear(
    rows: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    pairs: tuple[int, int],
    precision: str,
    first_row: int = 0,
    padded: bool = False,
    config: LaunchConfig | None = None,
) -> PreparedLaunch:
    """The launch of `row_linear` for rows [M, K] and weight [N, K], split [2N, K] with "fp16x3".

    A launch of the variant for Hopper GPUs leaves out tiles of padding alone.

    Args:
        residual: [B, R, J, N], any strides; it may be the memory of the output.
        pairs: (R, J), which matter only with a residual or lengths.
        precision: a word of the kernels, for float32.
        first_row: row i is row first_row + i of its sequence, which matters only with lengths.
        padded: whether there are lengths.
        config: a setting in place of the shipped one.
    """
    (count, width), split = rows.shape, precision == FP16X3
    channels = weight.shape[0] // 2 if split else weight.shape[0]
    device = device_target(rows.device)
    variants = hopper.variants("row_linear", "takes", rows, rows, weight, residual)
    if config is None:
        config = setting_of("row_linear", rows, channels, math.isqrt(count), 1, variants, split)
    if hopper.is_variant(config, variants):
        rectangle = count // (pairs[0] * pairs[1]), *pairs
        return hopper.kernels("row_linear").prepare(
            rows, weight, residual, rectangle, first_row if padded else None, config
        )
    block_n = block_of(config.block_n, channels)
    block_k = block_of(config.block_k, width)
    descriptors = config.descriptors and has_descriptor(weight) and has_descriptor(rows)
    rows_arg = weight_arg = None
    if descriptors:
        rows_arg = descriptor_of(rows, rows.shape, rows.stride(), [config.block_m, block_k])
        weight_arg = descriptor_of(weight, weight.shape, weight.stride(), [block_n, block_k])
    residual_strides = (0, 0, 0, 1) if residual is None else strides(residual)
    elements = 16 // rows.element_size()
    return PreparedLaunch(
        _row_linear_kernel,
        triton.cdiv(count, config.block_m) * triton.cdiv(channels, block_n),
        tensors=pointers(
            "rows_ptr", "bias_ptr", "scales_ptr", "residual_ptr", "lengths_ptr", "out_ptr"
        ) | {"rows": rows_arg, "weight": weight_arg},
        values=dict(
            M=count, R=pairs[0], J=pairs[1], first_row=first_row, stride_weight=weight.stride(0),
            **named_strides("residual", "bijc", residual_strides),
        ),
        constants=dict(
            N=channels, K=width,
            BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            RESIDUAL_ALIGNMENT=elements if residual is not None and is_aligned(residual) else 1,
            DESCRIPTORS=descriptors,
            PRECISION=dot_precision(precision, device.fp32_dots, config.fp32_dot),
        ),
        options=config.options(),
    )  # fmt: skip
