"""Stage 2: the batched triangular product of the planes, and the two products of its backward.

    product[b, d, i, j] = sum_k a[b, d, i, k] * b[b, d, j, k]

a and b are planes [B, D, L, pitch], k contiguous (stage 1 wrote them so for both directions);
product is [B, D, L, pitch] in the same dtype, j contiguous. Sums run in fp32.

In the backward either operand may be transposed, so that its summed axis is the rows of its planes:

    grad_a[i, k] = sum_j grad[i, j] b[j, k]        grad_b[j, k] = sum_i grad[i, j] a[i, k]

or, for "incoming", where stage 1 has exchanged the residue axes of x, their transposes.

In a sequence of length n < L, i, j and k end at n: tiles beyond n are not written. a and b hold
zeros behind n, up to the end of the block of k that n lies in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hopper
from ._call import Call
from .triton_parts.device import device_target
from .triton_parts.launch import (
    Launches,
    PreparedLaunch,
    descriptor_of,
    dot_precision,
    named_strides,
    pointers,
    setting_of,
)
from .triton_parts.settings import LaunchConfig
from .triton_parts.split_operands import PlaneScales, add_dot, product_of_planes
from .triton_parts.tiles import PADDING_MULTIPLE, dot, halves, length_of

_GROUP_M = tl.constexpr(8)


@triton.jit(do_not_specialize=["L", "tiles", "lengths_ptr", "exponents_ptr", "masks_ptr"])
def _trimul_einsum_fwd_kernel(
    a, b, product, lengths_ptr, exponents_ptr, masks_ptr, L, pitch, D, tiles,
    stride_exponents, sequences,
    stride_a_b, stride_a_d, stride_a_row, stride_b_b, stride_b_d, stride_b_row,
    stride_product_b, stride_product_d, stride_product_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TURNED_A: tl.constexpr, TURNED_B: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, PERSISTENT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_M, BLOCK_N] of a @ b^T of the planes; M = i, N = j, K = k, all of extent L.

    A plane of a is [M, K], or [K, M] if TURNED_A; one of b is [N, K], or [K, N] if TURNED_B.
    PERSISTENT programs take every num_programs-th tile: the loads of a tile begin while the
    previous tile is stored. With lengths, programs are not persistent. With PRECISION "fp16x3", a
    row of a plane is its high numbers and then its low ones, pitch each: see `split_operands`. Each
    of their channels has the planes of so many `sequences`.
    """
    # Otherwise ptxas 12.8 (Triton 3.6) waits after every single wgmma of the loop.
    tl.assume(L > 0)
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
            _product_tile(
                tile, a, b, product, lengths_ptr, exponents_ptr, masks_ptr,
                L, pitch, D, stride_exponents, sequences,
                stride_a_b, stride_a_d, stride_a_row, stride_b_b, stride_b_d, stride_b_row,
                stride_product_b, stride_product_d, stride_product_row,
                BLOCK_M, BLOCK_N, BLOCK_K, TURNED_A, TURNED_B, DESCRIPTORS, PRECISION, MASKED,
            )  # fmt: skip
    else:
        _product_tile(
            tl.program_id(0), a, b, product, lengths_ptr, exponents_ptr, masks_ptr, L, pitch, D,
            stride_exponents, sequences, stride_a_b, stride_a_d, stride_a_row,
            stride_b_b, stride_b_d, stride_b_row,
            stride_product_b, stride_product_d, stride_product_row,
            BLOCK_M, BLOCK_N, BLOCK_K, TURNED_A, TURNED_B, DESCRIPTORS, PRECISION, MASKED,
        )  # fmt: skip


@triton.jit
def _product_tile(
    tile, a, b, product, lengths_ptr, exponents_ptr, masks_ptr, L, pitch, D,
    stride_exponents, sequences,
    stride_a_b, stride_a_d, stride_a_row, stride_b_b, stride_b_d, stride_b_row,
    stride_product_b, stride_product_d, stride_product_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    TURNED_A: tl.constexpr, TURNED_B: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of a @ b^T of one plane.

    Tiles are numbered plane by plane, so that a plane's a and b are read from L2 after their first
    use, and within a plane in groups of _GROUP_M rows of tiles.
    """
    tiles_m = tl.cdiv(L, BLOCK_M)
    tiles_n = tl.cdiv(L, BLOCK_N)
    plane = tile // (tiles_m * tiles_n)
    rest = tile % (tiles_m * tiles_n)
    group = rest // (_GROUP_M * tiles_n)
    rows = min(tiles_m - group * _GROUP_M, _GROUP_M)
    in_group = rest % (_GROUP_M * tiles_n)
    start_m = (group * _GROUP_M + in_group % rows) * BLOCK_M
    start_n = (in_group // rows) * BLOCK_N
    batch = plane // D
    channel = plane - batch * D
    length = length_of(lengths_ptr, batch, L)
    if lengths_ptr is not None:
        if start_m >= length or start_n >= length:
            return
        tl.assume(length > 0)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    SPLIT: tl.constexpr = PRECISION == "fp16x3"
    acc_low = acc  # of split numbers
    if masks_ptr is not None:
        masks_ptr += batch * pitch
    if DESCRIPTORS:
        for start_k in range(0, length, BLOCK_K):
            if SPLIT:
                a_tile, a_low = _load_split(
                    a, batch, channel, start_m, start_k, BLOCK_M, BLOCK_K, TURNED_A
                )
                b_tile, b_low = _load_split(
                    b, batch, channel, start_n, start_k, BLOCK_N, BLOCK_K, TURNED_B
                )
                acc_low = tl.dot(a_tile, b_low.T, acc_low)
                acc_low = tl.dot(a_low, b_tile.T, acc_low)
                acc = add_dot(a_tile, b_tile.T, acc)
            else:
                if TURNED_A:
                    a_tile = a.load([batch, channel, start_k, start_m]).reshape(BLOCK_K, BLOCK_M).T
                else:
                    a_tile = a.load([batch, channel, start_m, start_k]).reshape(BLOCK_M, BLOCK_K)
                if TURNED_B:
                    b_tile = b.load([batch, channel, start_k, start_n]).reshape(BLOCK_K, BLOCK_N)
                else:
                    b_tile = b.load([batch, channel, start_n, start_k]).reshape(BLOCK_N, BLOCK_K).T
                acc = dot(a_tile, b_tile, acc, PRECISION)
        if SPLIT:
            acc = product_of_planes(
                acc, acc_low, exponents_ptr, stride_exponents, channel // sequences, masks_ptr,
                offs_m, offs_n, L, MASKED,
            )  # fmt: skip
        # In halves: the store's buffer is half as large, which leaves room for another stage of
        # loads.
        left, right = halves(acc)
        product.store(
            [batch, channel, start_m, start_n],
            left.to(product.dtype).reshape(1, 1, BLOCK_M, BLOCK_N // 2),
        )
        product.store(
            [batch, channel, start_m, start_n + BLOCK_N // 2],
            right.to(product.dtype).reshape(1, 1, BLOCK_M, BLOCK_N // 2),
        )
    else:
        offs_k = tl.arange(0, BLOCK_K)
        plane_a = batch.to(tl.int64) * stride_a_b + channel.to(tl.int64) * stride_a_d
        plane_b = batch.to(tl.int64) * stride_b_b + channel.to(tl.int64) * stride_b_d
        for start_k in range(0, length, BLOCK_K):
            a_tile = _load_operand(
                a + plane_a, offs_m, start_k + offs_k, L, pitch, stride_a_row, TURNED_A
            )
            b_tile = _load_operand(
                b + plane_b, offs_n, start_k + offs_k, L, pitch, stride_b_row, TURNED_B
            )
            if SPLIT:
                a_low = _load_operand(
                    a + plane_a + pitch, offs_m, start_k + offs_k, L, pitch, stride_a_row, TURNED_A
                )
                b_low = _load_operand(
                    b + plane_b + pitch, offs_n, start_k + offs_k, L, pitch, stride_b_row, TURNED_B
                )
                acc_low = tl.dot(a_tile, b_low.T, acc_low)
                acc_low = tl.dot(a_low, b_tile.T, acc_low)
                acc = add_dot(a_tile, b_tile.T, acc)
            else:
                acc = dot(a_tile, b_tile.T, acc, PRECISION)
        if SPLIT:
            acc = product_of_planes(
                acc, acc_low, exponents_ptr, stride_exponents, channel // sequences, masks_ptr,
                offs_m, offs_n, L, MASKED,
            )  # fmt: skip
        base = batch.to(tl.int64) * stride_product_b + channel.to(tl.int64) * stride_product_d
        row_m = offs_m.to(tl.int64) * stride_product_row
        ptrs = product + base + row_m[:, None] + offs_n[None, :]
        valid = (offs_m < L)[:, None] & (offs_n < pitch)[None, :]
        tl.store(ptrs, acc.to(product.dtype.element_ty), mask=valid)


@triton.jit
def _load_split(
    planes, batch, channel, start, start_k,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """The high and the low numbers [BLOCK rows, BLOCK_K summed] of one plane."""
    if TURNED:
        high = planes.load([batch, channel, start_k, 0, start]).reshape(BLOCK_K, BLOCK).T
        low = planes.load([batch, channel, start_k, 1, start]).reshape(BLOCK_K, BLOCK).T
    else:
        high = planes.load([batch, channel, start, 0, start_k]).reshape(BLOCK, BLOCK_K)
        low = planes.load([batch, channel, start, 1, start_k]).reshape(BLOCK, BLOCK_K)
    return high, low


@triton.jit
def _load_operand(plane, offs, offs_k, L, pitch, stride_row, TURNED: tl.constexpr):
    """[rows offs, summed offs_k] of one plane [L, pitch], or of its transpose if TURNED.

    Columns are masked by pitch, not by L: a multiple of 16 keeps the accesses 16 bytes wide.
    Columns [L, pitch) are zeros if they are summed over; if not, no pair i, j < L depends on them.
    """
    if TURNED:
        ptrs = plane + (offs_k.to(tl.int64) * stride_row)[:, None] + offs[None, :]
        return tl.load(ptrs, mask=(offs_k < L)[:, None] & (offs < pitch)[None, :], other=0.0).T
    else:
        # Rows past L read row L - 1, so that no row needs a mask.
        row = tl.minimum(offs, L - 1).to(tl.int64) * stride_row
        ptrs = plane + row[:, None] + offs_k[None, :]
        return tl.load(ptrs, mask=(offs_k < pitch)[None, :], other=0.0)


def trimul_einsum_fwd(
    call: Call,
    launches: Launches,
    a: Tensor,
    b: Tensor,
    product: Tensor,
    key: object = 0,
    turned: tuple[bool, bool] = (False, False),
    config: LaunchConfig | None = None,
    scales: PlaneScales | None = None,
) -> None:
    """Stage 2 of a call: product [B, D, L, pitch] of a and b; its columns [L, pitch) are arbitrary.

    Args:
        a, b, product: unit stride along the last axis, other strides multiples of 16.
        key: identifies this launch among those of this stage in one call.
        turned: for a and for b, whether its planes are transposed. The other operand must then have
            zeros in columns [L, pitch). With lengths, transposed planes must have zeros in the rows
            behind a length.
        config: a setting in place of the shipped one.
        scales: of the planes, if a and b are split numbers.
    """
    if scales is not None:
        a, b = a.view(torch.float16), b.view(torch.float16)
    prepared = launches.of(
        ("trimul_einsum", key),
        prepare_einsum, call, a, b, product, turned, config, scales,
    )  # fmt: skip
    if prepared.variant == "hopper":
        hopper.kernels("plane_products").launch(prepared, a, b, product)
        return
    prepared.launch(
        a=a,
        b=b,
        product=product,
        lengths_ptr=call.lengths,
        exponents_ptr=None if scales is None else scales.exponents,
        masks_ptr=None if scales is None else scales.masks,
    )


def of_sequences(planes: Tensor, length: int) -> Tensor:
    """Planes [..., G, N L, pitch] of N merged sequences as [..., G N, L, pitch], a view."""
    return planes.unflatten(-2, (-1, length)).flatten(-4, -3)


def prepare_einsum(
    call: Call,
    a: Tensor,
    b: Tensor,
    product: Tensor,
    turned: tuple[bool, bool],
    config: LaunchConfig | None,
    scales: PlaneScales | None = None,
) -> PreparedLaunch:
    """The launch of `trimul_einsum_fwd` for calls like this one."""
    batch, hidden, length, pitch = product.shape
    device, split = device_target(a.device), scales is not None
    variants = frozenset()
    if not any(turned):
        variants = hopper.variants("plane_products", "takes", product, False, call.lengths, a, b)
    if config is None:
        width = min(hidden, call.hidden)  # `hidden` counts the planes of several sequences too
        config = setting_of("trimul_einsum", product, width, length, 1, variants, split)
    if hopper.is_variant(config, variants):
        return hopper.kernels("plane_products").prepare(a, b, product, config)
    block_m, block_n = config.block_m, config.block_n
    block_k = min(config.block_k, PADDING_MULTIPLE)
    descriptors = pointers("a", "b", "product")
    if config.descriptors:
        shape = [batch, hidden, length, length]
        tile_a, tile_b = [block_m, block_k], [block_n, block_k]
        if turned[0]:
            tile_a.reverse()
        if turned[1]:
            tile_b.reverse()
        for name, plane, tile in (
            ("a", a, tile_a), ("b", b, tile_b), ("product", product, [block_m, block_n // 2])
        ):  # fmt: skip
            axes, strides_of, box = list(shape), list(plane.stride()), [1, 1, *tile]
            if split and name != "product":  # high and low numbers of a row
                axes.insert(3, 2)
                strides_of.insert(3, pitch)
                box.insert(3, 1)
            descriptors[name] = descriptor_of(plane, axes, strides_of, box)
    tiles = batch * hidden * triton.cdiv(length, block_m) * triton.cdiv(length, block_n)
    programs = tiles
    # If tiles may be skipped, persistent programs would not share the work evenly.
    persistent = config.persistent > 0 and call.lengths is None
    if persistent:
        programs = min(tiles, config.persistent * device.multiprocessors)
    return PreparedLaunch(
        _trimul_einsum_fwd_kernel,
        programs,
        tensors={**descriptors, **pointers("lengths_ptr", "exponents_ptr", "masks_ptr")},
        values=dict(
            L=length, pitch=pitch, D=hidden, tiles=tiles,
            stride_exponents=scales.exponents.stride(0) if split else 0,
            sequences=scales.sequences if split else 1,
            **named_strides("a", ("b", "d", "row"), a.stride()[:3]),
            **named_strides("b", ("b", "d", "row"), b.stride()[:3]),
            **named_strides("product", ("b", "d", "row"), product.stride()[:3]),
        ),
        constants=dict(
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            TURNED_A=turned[0], TURNED_B=turned[1], MASKED=scales.masked if split else "",
            DESCRIPTORS=config.descriptors, PERSISTENT=persistent,
            PRECISION=dot_precision(call.precision, device.fp32_dots),
        ),
        options=config.options(),
    )  # fmt: skip
