"""The planes of dt as split numbers, in their own memory: see `split_operands`.

A plane has one power of two, of its largest finite number. If the mask is not bool, a's and b's
rows were divided by powers of two, which are multiplied into dt's rows and columns here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_parts.launch import Launches, PreparedLaunch, pointers
from ..triton_parts.split_operands import (
    PlaneScales,
    exponent_for,
    largest_finite,
    power_of_two,
    split_plane,
)

_ELEMENTS = 16_384  # of a tile, which has whole rows: they are read before they are written


@triton.jit(do_not_specialize=["R", "masks_ptr"])
def _split_planes_kernel(
    planes_ptr, split_ptr, of_planes_ptr, masks_ptr, exponents_ptr, R, G, pitch, stride_d,
    stride_planes, sequences, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One of G planes [R, pitch], and its exponents of a, dt and b: rows of [3, G].

    split_ptr is planes_ptr in float16; of_planes_ptr has the exponents of a and b, of a channel's
    planes of all `sequences`.
    """
    plane = tl.program_id(0)
    largest = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, R, BLOCK_R):
        tile = _load_rows(
            planes_ptr, masks_ptr, plane, start, R, pitch, stride_d, BLOCK_R, BLOCK_P
        )
        largest = tl.maximum(largest, largest_finite(tile, 1))
    exponent = exponent_for(tl.max(largest, 0))
    scale = power_of_two(exponent)
    for start in range(0, R, BLOCK_R):
        tile = _load_rows(
            planes_ptr, masks_ptr, plane, start, R, pitch, stride_d, BLOCK_R, BLOCK_P
        )
        high, low = split_plane(tile * scale)
        tl.debug_barrier()  # all threads have read these rows
        i, p = start + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
        offs = plane.to(tl.int64) * stride_d + i.to(tl.int64) * pitch
        ptrs = split_ptr + 2 * offs[:, None] + p[None, :]
        valid = (i < R)[:, None] & (p < pitch)[None, :]
        tl.store(ptrs, high, mask=valid)
        tl.store(ptrs + pitch, low, mask=valid)
    of_planes_ptr += plane // sequences
    tl.store(exponents_ptr + plane, tl.load(of_planes_ptr))
    tl.store(exponents_ptr + G + plane, exponent.to(tl.float32))
    tl.store(exponents_ptr + 2 * G + plane, tl.load(of_planes_ptr + stride_planes))


@triton.jit
def _load_rows(
    planes_ptr, masks_ptr, plane, start, R, pitch, stride_d,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_P] of a plane, rows from `start` on."""
    i, p = start + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P)
    offs = plane.to(tl.int64) * stride_d + i.to(tl.int64) * pitch
    valid = (i < R)[:, None] & (p < pitch)[None, :]
    tile = tl.load(planes_ptr + offs[:, None] + p[None, :], mask=valid, other=0.0)
    if masks_ptr is not None:
        of_rows = tl.load(masks_ptr + i, mask=i < R, other=0)
        of_columns = tl.load(masks_ptr + p, mask=p < R, other=0)
        tile = tile * power_of_two(of_rows)[:, None] * power_of_two(of_columns)[None, :]
    return tile


def split_planes(planes: Tensor, scales: PlaneScales, launches: Launches) -> PlaneScales:
    """Splits planes [G, L, pitch] of dt where they lie.

    Of the scales of a and b it makes those of a, dt and b, of each plane by itself.
    """
    exponents = torch.empty(3, len(planes), dtype=torch.float32, device=planes.device)
    launches.of(("split_planes", len(planes)), _prepare, planes, scales).launch(
        planes_ptr=planes,
        split_ptr=planes.view(torch.float16),
        of_planes_ptr=scales.exponents,
        masks_ptr=scales.masks,
        exponents_ptr=exponents,
    )
    return scales._replace(exponents=exponents, sequences=1)


def _prepare(planes: Tensor, scales: PlaneScales) -> PreparedLaunch:
    """The launch of `split_planes` for planes like these."""
    count, rows, pitch = planes.shape
    block_p = triton.next_power_of_2(pitch)
    return PreparedLaunch(
        _split_planes_kernel,
        count,
        tensors=pointers("planes_ptr", "split_ptr", "of_planes_ptr", "masks_ptr", "exponents_ptr"),
        values=dict(
            R=rows, G=count, pitch=pitch, stride_d=planes.stride(0),
            stride_planes=scales.exponents.stride(0), sequences=scales.sequences,
        ),
        constants=dict(BLOCK_R=max(1, _ELEMENTS // block_p), BLOCK_P=block_p),
        options=dict(num_warps=16, num_stages=2),
    )  # fmt: skip
