"""The lean mode: a and b in groups of channels, and the output written over the product.

Over the residual, or for a larger batch, the output is memory of its own, and the sequences share
the memory of one product.

The product is [B, L, D, pitch] here: a row's channels lie together, so that rows of the output can
overwrite rows of the product that have been read.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .._call import Call
from ..fused_dual_gemm import fused_dual_gemm_fwd, with_axes_of_x
from ..fused_ln_residual import fused_ln_residual_by_steps, rows_of_step, writing
from ..hopper.folded_norm import Folds
from ..trimul_einsum_triton import trimul_einsum_fwd
from ..triton_parts.launch import Launches
from ..triton_parts.split_operands import Scales, split_weights
from ..triton_parts.tiles import padded_pitch

_PLANES = 0.375  # scratch memory for planes, in tensors of the pair's size
# The fewest sequences whose output has memory of its own, while one product serves them all: it
# takes 1 + 3/8 beside the output, and a product for each sequence 3/8 + 1/16 a sequence.
_LEAST_APART = 4
_GROUP_MULTIPLE = 8  # channels, half a block of the smallest dot


def run_lean(call: Call, launches: Launches) -> Tensor:
    """The output [B, L, L, C], one sequence at a time."""
    x = call.x
    batch, length = x.shape[:2]
    apart = call.inplace or batch >= _LEAST_APART
    together = 1 if apart else batch  # products in memory at once
    sizes = _sizes_of(call, together, apart)
    name = "product" if apart else "product and output"
    memory = launches.empty(name, (sizes.ahead + sizes.products,), x.dtype, x.device)
    products = memory[sizes.ahead :].view(together, length, -1, padded_pitch(length))
    if call.inplace:
        out = call.residual
    elif apart:
        out = launches.empty("output", x.shape, x.dtype, x.device)
    else:
        out = memory[: x.numel()].view(x.shape)
    call, scales = split_weights(call, launches)
    folds = Folds(launches, call.weights)
    for entry in range(batch):
        of_entry, product = call.of_entry(entry), products[0 if apart else entry][None]
        product = product.transpose(1, 2)  # [1, D, L, pitch]
        part = None if scales is None else scales.of_entries(slice(entry, entry + 1))
        with writing(call, entry > 0):
            moments = _product_by_groups(of_entry, launches, product, sizes.slots, part, folds)
            made = out[entry : entry + 1]
            fused_ln_residual_by_steps(
                of_entry, launches, product, moments, made, scales=scales, folds=folds
            )
        del moments  # freed before the next sequence's are allocated
    return out


class _Sizes(NamedTuple):
    """Sizes of the buffers of a call."""

    ahead: int  # elements ahead of the products, where the output begins
    products: int  # elements of the products that are in memory at once
    slots: int  # planes of scratch memory for a and b


def _sizes_of(call: Call, together: int, apart: bool) -> _Sizes:
    """The sizes for products of `together` sequences; `apart` from the output, or under it."""
    _, length, _, channels = call.x.shape
    hidden = call.hidden
    rows, step = together * length, rows_of_step(length)
    row_out, row_product = length * channels, hidden * padded_pitch(length)
    ahead = 0
    if not apart:
        # The rows that a step writes must end before the first row that it reads. The first step
        # needs most room for this, or the last if a row of the output is longer than the product's.
        ahead = max(step * row_out, rows * row_out - (rows - step) * row_product)
        ahead = -(-ahead // 16) * 16  # the product stays aligned
    slots = min(max(2 * _GROUP_MULTIPLE, int(_PLANES * together * channels)), 2 * hidden)
    return _Sizes(ahead, rows * row_product, slots)


def _product_by_groups(
    call: Call,
    launches: Launches,
    product: Tensor,
    slots: int,
    scales: Scales | None,
    folds: Folds,
) -> Tensor:
    """Fills the product of one sequence; returns the moments [1, 2, i, j] of x.

    `slots` is the number of planes of scratch memory.
    """
    _, hidden, length, pitch = product.shape
    plane = length * pitch
    own = launches.empty("a and b of a group", (slots * plane,), product.dtype, product.device)
    moments = None
    for first, count, apart in groups_of(hidden, slots):
        end = first + count
        if apart:
            a = product[:, end : end + count]
            b = own[: count * plane].view(1, count, length, pitch)
        else:
            a, b = own[: 2 * count * plane].view(1, 2, count, length, pitch).unbind(1)
        moments = fused_dual_gemm_fwd(
            call, launches, (a, b), (first, count), moments, scales=scales, folds=folds
        )
        of_group = None if scales is None else scales.of_planes(hidden, slice(first, end))
        trimul_einsum_fwd(call, launches, a, b, product[:, first:end], first, scales=of_group)
    return with_axes_of_x(moments, call.direction)


def groups_of(hidden: int, slots: int) -> Iterator[tuple[int, int, bool]]:
    """Cuts `hidden` channels into few groups: (first channel, channels, whether a and b are apart).

    `slots` planes of scratch memory are available. They hold a and b of a small group. For a larger
    group they hold only b, and a is written into the part of the product that later groups will
    fill: a and b are apart.
    """
    first = 0
    while first < hidden:
        left = hidden - first
        count = max(min(left, slots // 2), min(slots, left // 2))
        if count < left:
            count = count // _GROUP_MULTIPLE * _GROUP_MULTIPLE
        yield first, count, count > slots // 2
        first += count
