"""The output in tiles of padding alone, which Hopper kernels of stage 3 and of transitions omit."""

import triton
import triton.language as tl
from torch import Tensor

from .._call import Call, Transition
from ..triton_parts.launch import Launches, PreparedLaunch, named_strides, pointers, strides
from ..triton_parts.tiles import length_of, load_tile, store_tile, store_zeros

_TILE = 64  # pairs of one row: the Hopper kernels' `ROWS`, whose module needs Gluon
_BLOCK_N = 64


@triton.jit(
    do_not_specialize=[
        "lengths_ptr", "R", "L", "per_row", "first_row",
        "stride_residual_b", "stride_residual_i", "stride_residual_j",
    ]
)  # fmt: skip
def _padding_kernel(
    residual_ptr, lengths_ptr, out_ptr, R, L, per_row, first_row,
    stride_residual_b, stride_residual_i, stride_residual_j,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The residual, or zeros, at BLOCK_M pairs of a row, if all of them are padding.

    Rows of 16-bit channels begin at multiples of 16 bytes.
    """
    row = tl.program_id(0) // per_row
    start = (tl.program_id(0) - row * per_row) * BLOCK_M
    batch = row // R
    i = row - batch * R
    length = length_of(lengths_ptr, batch, L)
    if first_row + i < length and start < length:
        return
    j = start + tl.arange(0, BLOCK_M)
    offs_out = (row.to(tl.int64) * L + j) * C
    if residual_ptr is None:
        store_zeros(out_ptr, offs_out, j < L, C, BLOCK_N)
    else:
        offs = batch.to(tl.int64) * stride_residual_b + i.to(tl.int64) * stride_residual_i
        offs = tl.multiple_of(offs + j.to(tl.int64) * stride_residual_j, 8)
        for start_n in range(0, C, BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            tile = load_tile(residual_ptr, offs, offs_n, 1, j < L, C, C % BLOCK_N == 0)
            store_tile(out_ptr, offs_out, offs_n, tile, j < L, C, C % BLOCK_N == 0)


def fill_padding(
    call: Call | Transition,
    launches: Launches,
    stage: PreparedLaunch,
    out: Tensor,
    first_row: int,
) -> None:
    """Fills out [B, R, L, C] where the launch `stage` leaves out tiles of padding."""
    if call.inplace:  # the residual is there
        return
    prepared = launches.of(("padding", stage), _prepare, call, first_row)
    prepared.launch(residual_ptr=call.residual, lengths_ptr=call.lengths, out_ptr=out)


def _prepare(call: Call | Transition, first_row: int) -> PreparedLaunch:
    batch, rows, length, channels = call.x.shape
    per_row = triton.cdiv(length, _TILE)
    residual = call.residual
    residual_strides = (0, 0, 0, 1) if residual is None else strides(residual)
    return PreparedLaunch(
        _padding_kernel,
        batch * rows * per_row,
        tensors=pointers("residual_ptr", "lengths_ptr", "out_ptr"),
        values=dict(
            R=rows, L=length, per_row=per_row, first_row=first_row,
            **named_strides("residual", "bij", residual_strides[:3]),
        ),
        constants=dict(C=channels, BLOCK_M=_TILE, BLOCK_N=_BLOCK_N),
        options=dict(num_warps=4, num_stages=2),
    )  # fmt: skip
