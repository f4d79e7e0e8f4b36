"""The Triton path: the three stages of a call, as they come or in little memory. See `paths`.

Peak memory beyond the arguments, in tensors of the pair's size where C = D:

    default   a, b and the product, 3.0; then the product and the output, 2.0
    lean      1 + 3/8 + 1/16: the product, planes of one group of channels (others lie where the
              product is yet to be written), and room ahead of the product into which the output
              moves as the product is read; if it is written over the residual, 1 + 3/8.

Both also keep 8 bytes a pair of residues, the moments of x.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._call import Call, Weights
from .._plan import Plan, note_on_gradients
from ..fused_dual_gemm import empty_planes, fused_dual_gemm_fwd, prepare_dual_gemm
from ..fused_ln_residual import fused_ln_residual_fwd, prepare_ln_residual
from ..paths import say_once
from ..trimul_einsum_triton import prepare_einsum, trimul_einsum_fwd
from ..triton_parts.launch import Launches, PreparedLaunch
from ..triton_parts.tiles import padded_pitch
from ..validation import torch_allows_tf32

_MOST_KINDS = 1024
# Lean: the memory for planes, in tensors of the pair's size, and the steps in which the output is
# made. A step's rows are written where the rows of the step before it were read.
_LEAN_PLANES = 0.375
_LEAN_STEPS = 16
_GROUP_MULTIPLE = 8  # of channels: half a block of the smallest dot


_launches: dict[tuple, Launches] = {}


def forward(call: Call) -> Tensor:
    """[B, L, L, C], in the mode that `call.memory` names."""
    call = for_kernels(call)
    with current_device(call.x):
        if call.memory != "lean":
            try:
                return run_triton(call)[0]
            except torch.OutOfMemoryError:
                # Stage 3 allocates before it writes, so an inplace call has not begun to.
                if call.memory == "default":
                    raise
            say_once("runs in lean mode: an allocation of the default mode failed")
        return run_triton_lean(call)


def forward_saving(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The output in the default mode, the product [B, D, L, pitch], and the moments of x."""
    with current_device(call.x):
        return run_triton(for_kernels(call))


def saved_shapes(call: Call) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of product and moments."""
    batch, length = call.x.shape[:2]
    pitch = padded_pitch(length)
    return (batch, call.hidden, length, pitch), (batch, 2, length, pitch)


def backward(
    call: Call,
    grad_out: Tensor,
    product: Tensor | None,
    moments: Tensor | None,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients that `needs` names."""
    from .gradients import run_triton_backward  # which builds on this module

    # A backward under autocast must not lower the precision of the vendor's products.
    with torch.autocast(call.x.device.type, enabled=False), current_device(call.x):
        return run_triton_backward(for_kernels(call), grad_out, product, moments, needs)


def for_kernels(call: Call) -> Call:
    """The call as the kernels take it: a precision of theirs, and rows of unit stride."""
    weights, precision = call.weights, call.precision
    # The kernels index a parameter's last axis by the channel. A stride there would cost more than
    # a copy, and from tiles that lie the other way ptxas 12.8 (Triton 3.6 to 3.7.1) made sm_90
    # code that read shared memory at the wrong addresses: see docs/fuzzing.md.
    if not all([v is None or v.is_contiguous() for v in weights]):
        values = [v if v is None or v.stride(-1) == 1 else v.contiguous() for v in weights]
        weights = Weights(*values)
    if precision == "default":
        precision = "tf32" if torch_allows_tf32() else "fp32"
    return call._replace(weights=weights, precision=precision)


def current_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Within it x's device is the current one, which Triton launches on."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, x.device.type).device_of(x)


def run_triton(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The default mode, with what a backward can take up again: (out, product, moments).

    The product [B, D, L, pitch] in the dtype of x and the moments [B, 2, L, pitch] of x in fp32 are
    as stages 2 and 1 wrote them.
    """
    launches = launches_of(call, "default")
    product, raw_moments = _product(call, launches)
    moments = with_axes_of_x(raw_moments, call.direction)
    stage = (product, call.x, moments, call.residual, call.drop_mask, call.weights)
    stage += (call.eps_out, call.precision)
    prepared = launches.of(("ln_residual",), prepare_ln_residual, *stage)
    if call.inplace and not _may_overwrite(call, prepared):
        out = _by_steps_into_residual(call, launches, product, moments)
    else:
        out = call.residual if call.inplace else None
        out = fused_ln_residual_fwd(*stage, out=out, prepared=prepared, lengths=call.lengths)
    return out, product, raw_moments


def _product(call: Call, launches: Launches) -> tuple[Tensor, Tensor]:
    """Stages 1 and 2: the product [B, D, L, pitch], and stage 1's moments.

    a and b are freed on return, before the output is allocated: the peak is a, b and the product.
    """
    a, b = empty_planes(call.x, call.weights)
    moments = dual_gemm(call, launches, (a, b))
    product = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    einsum(call, launches, a, b, product)
    return product, moments


def dual_gemm(
    call: Call,
    launches: Launches,
    planes: tuple[Tensor, Tensor],
    group: tuple[int, int] | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """Stage 1 into `planes`; returns the moments."""
    stage = (call.x, call.direction, call.mask, call.weights, call.eps_in, call.precision)
    prepared = launches.of(
        ("dual_gemm", group, moments is None, call.x.data_ptr() % 16),
        prepare_dual_gemm, *stage, planes, None, group, moments is not None,
    )  # fmt: skip
    return fused_dual_gemm_fwd(
        *stage, planes=planes, moments=moments, prepared=prepared, lengths=call.lengths
    )[2]


def einsum(
    call: Call,
    launches: Launches,
    a: Tensor,
    b: Tensor,
    product: Tensor,
    key: object = 0,
    turned: tuple[bool, bool] = (False, False),
) -> None:
    """Stage 2 into `product`; `key` identifies this launch among the stage-2 launches of a call."""
    prepared = launches.of(
        ("einsum", key),
        prepare_einsum, a, b, call.precision, product, None, turned,
        call.lengths is not None,
    )  # fmt: skip
    trimul_einsum_fwd(
        a, b, call.precision, product=product, prepared=prepared, lengths=call.lengths
    )


def launches_of(call: Call, *what: object) -> Launches:
    """The launches for `what` of calls of this kind."""
    kind = (what, *_kind(call))
    found = _launches.get(kind)
    if found is None:
        if len(_launches) >= _MOST_KINDS:
            _launches.clear()
        found = _launches[kind] = Launches()
    return found


def _kind(call: Call) -> tuple:
    """Everything of a call that its launches depend on besides the addresses of its tensors.

    Of the addresses: whether they are multiples of 16, and how far the input projections are apart.
    """
    x, weights = call.x, call.weights
    return (
        x.shape,
        x.device,
        call.direction,
        call.eps_in,
        call.eps_out,
        call.precision,
        call.inplace,
        call.lengths is None,
        weights.p_in_weight.shape[0],
        weights.g_in_weight.data_ptr() - weights.p_in_weight.data_ptr(),
        *[
            None if t is None else (t.dtype, t.stride(), t.data_ptr() % 16)
            for t in (x, call.mask, call.residual, call.drop_mask, *weights)
        ],
    )


def with_axes_of_x(moments: Tensor, direction: str) -> Tensor:
    """Stage 1's moments [B, 2, q, p] as [B, 2, i, j]."""
    return moments.transpose(-1, -2) if direction == "incoming" else moments


def _may_overwrite(call: Call, ln_residual: PreparedLaunch) -> bool:
    """Whether stage 3 may write over the residual while it runs.

    Not if the residual is x and a program reads rows of x again after some of their channels have
    been written, by itself or by another.
    """
    constants = ln_residual.constants
    whole_rows = constants["BLOCK_N"] >= constants["C"] and constants["SPLIT"] == 1
    return whole_rows or call.residual.data_ptr() != call.x.data_ptr()


def run_triton_lean(call: Call) -> Tensor:
    """The same in less memory and more time: see the module's docstring.

    The product is [B, L, D, pitch] here, a row's channels together, so that the rows that have been
    read make room for those of the output.
    """
    x = call.x
    batch, length = x.shape[:2]
    sizes = _lean_sizes(call)
    memory = torch.empty(sizes.ahead + sizes.products, dtype=x.dtype, device=x.device)
    products = memory[sizes.ahead :].view(batch, length, -1, padded_pitch(length))
    out = call.residual if call.inplace else memory[: x.numel()].view(x.shape)
    launches = launches_of(call, "lean")
    for entry in range(batch):
        of_entry = call.of_entry(entry)
        product = products[entry : entry + 1].transpose(1, 2)  # [1, D, L, pitch]
        moments = _product_by_groups(of_entry, launches, product, sizes.slots)
        _by_steps(of_entry, launches, product, moments, out[entry : entry + 1], sizes.step)
        del moments  # the next sequence's take their memory
    return out


class _LeanSizes(NamedTuple):
    """How the lean mode cuts a call."""

    ahead: int  # elements of the output's room ahead of the products
    products: int  # elements of the products of the batch
    slots: int  # planes of a and b that have memory of their own
    step: int  # rows of the output that are made at once


def _lean_sizes(call: Call) -> _LeanSizes:
    batch, length, _, channels = call.x.shape
    hidden = call.weights.p_in_weight.shape[0] // 2
    rows, step = batch * length, _lean_step(length)
    row_out, row_product = length * channels, hidden * padded_pitch(length)
    ahead = 0
    if not call.inplace:
        # The last row that a step writes must end before the first that it reads, at the first step
        # or, where a row of the output is the longer, at the last.
        ahead = max(step * row_out, rows * row_out - (rows - step) * row_product)
        ahead = -(-ahead // 16) * 16  # the product is as aligned as memory of its own would be
    slots = min(max(2 * _GROUP_MULTIPLE, int(_LEAN_PLANES * batch * channels)), 2 * hidden)
    return _LeanSizes(ahead, rows * row_product, slots, step)


def _lean_step(length: int) -> int:
    """The rows of the output that are made at once."""
    return -(-length // _LEAN_STEPS)


def plan(call: Call) -> Plan:
    """What `forward`, or `forward_saving` where a product is to be kept, launches and allocates."""
    keeps = call.needs_grad and call.keeps_product
    lean = call.memory == "lean" and not keeps
    kernels_call = for_kernels(call)
    with current_device(call.x):
        launches, buffers, peak = _launches_and_buffers(kernels_call, lean)
    notes = []
    if call.memory == "auto" and not keeps:
        notes.append("lean mode would run where an allocation of this one fails")
    elif call.memory == "lean" and keeps:
        notes.append("lean mode would not keep the product: with a gradient, recompute='all' can")
    notes.append(note_on_gradients(call))
    if call.lengths is not None:
        notes.append("tiles beyond the lengths are skipped; the programs above are all")
    precision = None
    if call.x.dtype == torch.float32:
        precision = launches["fused_dual_gemm"].constants["PRECISION"]
        if kernels_call.precision == "fp32":
            notes.append("products are those of float32, as nothing allowed TF32")
    by_pointers = [
        name for name, launch in launches.items() if not launch.constants["DESCRIPTORS"]
    ]
    if by_pointers:
        notes.append(
            f"no tensor descriptors in {', '.join(by_pointers)}: the settings have none, or rows "
            "are not aligned to 16 bytes"
        )
    kept = buffers["product"] + buffers["moments"] if keeps else 0
    mode = "lean" if lean else "default"
    return Plan(mode, precision, launches, buffers, peak, kept, notes)


def _launches_and_buffers(
    call: Call, lean: bool
) -> tuple[dict[str, PreparedLaunch], dict[str, int], int]:
    """The launches by stage, in lean mode the first of each; buffers; and the peak, in bytes."""
    x, weights = call.x, call.weights
    batch, length, _, channels = x.shape
    hidden, pitch = weights.p_in_weight.shape[0] // 2, padded_pitch(length)
    plane, element = length * pitch, x.element_size()
    one = call.of_entry(0) if lean else call
    count, rows, group, apart = hidden, length, None, False
    if lean:
        sizes = _lean_sizes(call)
        rows = sizes.step
        _, count, apart = next(groups_of(hidden, sizes.slots))
        group = (0, count)

    def meta(*shape: int, dtype: torch.dtype = x.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sequences = one.x.shape[0]
    planes = meta(sequences, 2, count, length, pitch).unbind(1)
    product = meta(sequences, hidden, length, pitch)
    if lean:
        product = meta(sequences, length, hidden, pitch).transpose(1, 2)
    if apart:
        planes = (product[:, count : 2 * count], planes[1])
    moments = meta(sequences, 2, length, pitch, dtype=torch.float32)
    some = slice(rows)
    launches = {
        "fused_dual_gemm": prepare_dual_gemm(
            one.x, one.direction, one.mask, weights, one.eps_in, one.precision, planes, None, group
        ),
        "trimul_einsum": prepare_einsum(
            *planes, one.precision, product[:, :count],
            with_lengths=one.lengths is not None, device=x.device,
        ),
        "fused_ln_residual": prepare_ln_residual(
            product[:, :, some], one.x[:, some], with_axes_of_x(moments, one.direction)[:, :, some],
            None if one.residual is None else one.residual[:, some], one.drop_mask, weights,
            one.eps_out, one.precision,
        ),
    }  # fmt: skip
    step = 0
    if call.inplace and not _may_overwrite(call, launches["fused_ln_residual"]):
        step = _lean_step(length) * length * channels * element
    buffers = {"moments": 8 * sequences * plane}
    if lean:
        buffers["product and output"] = (sizes.ahead + sizes.products) * element
        buffers["a and b of a group"] = sizes.slots * plane * element
        peak = buffers["product and output"] + buffers["moments"]
        peak += max(buffers["a and b of a group"], step)
    else:
        buffers["a and b"] = 2 * batch * hidden * plane * element
        buffers["product"] = batch * hidden * plane * element
        buffers["output"] = step if call.inplace else x.nbytes
        peak = buffers["moments"] + buffers["product"]
        peak += max(buffers["a and b"], buffers["output"])
    return launches, buffers, peak


def _product_by_groups(
    call: Call, launches: Launches, product: Tensor, slots: int
) -> Tensor:
    """Fills the product of one sequence; returns the moments [1, 2, L, L] of x.

    `slots` planes have memory of their own.
    """
    _, hidden, length, pitch = product.shape
    own = torch.empty(slots * length * pitch, dtype=product.dtype, device=product.device)
    moments = None
    for first, count, apart in groups_of(hidden, slots):
        end = first + count
        if apart:
            a = product[:, end : end + count]
            b = own[: count * length * pitch].view(1, count, length, pitch)
        else:
            some = own[: 2 * count * length * pitch]
            a, b = some.view(1, 2, count, length, pitch).unbind(1)
        moments = dual_gemm(call, launches, (a, b), (first, count), moments)
        einsum(call, launches, a, b, product[:, first:end], first)
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


def _by_steps(
    call: Call, launches: Launches, product: Tensor, moments: Tensor, out: Tensor, step: int
) -> None:
    """Stage 3 of one sequence in steps of `step` rows, one after the other, into `out`.

    `out` may be the memory of the residual, or of x, or lie ahead of the product in its memory.
    """
    length = call.x.shape[1]
    over_x = out.data_ptr() == call.x.data_ptr()
    for start in range(0, length, step):
        some = slice(start, min(start + step, length))
        x, target = call.x[:, some], out[:, some]
        residual = None if call.residual is None else call.residual[:, some]
        stage = (product[:, :, some], x, moments[:, :, some], residual, call.drop_mask)
        stage += (call.weights, call.eps_out, call.precision)
        alignments = [t.data_ptr() % 16 for t in (x, target, residual) if t is not None]
        first_row = 0 if call.lengths is None else start
        prepared = launches.of(
            ("ln_residual", x.shape[1], first_row, *alignments),
            prepare_ln_residual, *stage, None, first_row,
        )  # fmt: skip
        direct = not over_x or _may_overwrite(call, prepared)
        made = fused_ln_residual_fwd(
            *stage, out=target if direct else None, prepared=prepared, lengths=call.lengths
        )
        if not direct:
            target.copy_(made)
        del made  # the next step's takes its memory: after the first step no allocation can fail


def _by_steps_into_residual(
    call: Call, launches: Launches, product: Tensor, moments: Tensor
) -> Tensor:
    """Stage 3 into a residual that is x itself, where `_may_overwrite` says no."""
    step = _lean_step(call.x.shape[1])
    for entry in range(call.x.shape[0]):
        one = slice(entry, entry + 1)
        of_entry = call.of_entry(entry)
        _by_steps(of_entry, launches, product[one], moments[one], of_entry.residual, step)
    return call.residual
