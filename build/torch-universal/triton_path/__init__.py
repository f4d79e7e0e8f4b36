"""The Triton path: the five functions of a path (see `paths`), and the plan of a training step.

Peak memory beyond the arguments, in tensors of the pair's size where C = D:

    default   a, b and the product, 3.0; then the product and the output, 2.0, and the gates of
              stage 3 where it `writes_gates`, 1.0. Of a batch, 3.0 for each of the sequences that
              are run at once, and the output. With a and b kept for a backward, 4.0 and the gates.
    lean      1 + 3/8 + 1/16: the product; planes of one group of channels (others lie in the part
              of the product that is not yet written); and room ahead of the product, so that the
              output can overwrite the rows already read. Over the residual: 1 + 3/8. Of a batch
              that is written over the residual, 1 + 3/8 of a sequence; of four or more sequences
              the same, and the output.

Both also hold the moments of x, 8 bytes for each pair of residues.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._call import DIFFERENTIABLE, Call
from .._plan import Plan, note_on_gradients
from ..fused_dual_gemm import fused_dual_gemm_fwd, with_axes_of_x
from ..fused_ln_residual import PartlyWritten, fused_ln_residual_fwd, writing
from ..hopper.folded_norm import Folds
from ..paths import say_once
from ..trimul_einsum_triton import of_sequences, trimul_einsum_fwd
from ..triton_parts.device import device_target
from ..triton_parts.launch import Launches
from ..triton_parts.recording import run_recorded
from ..triton_parts.rehearsal import rehearsal
from ..triton_parts.split_operands import Scales, split_weights
from ..triton_parts.tiles import padded_pitch
from ..validation import DIRECTIONS
from . import transition as transition
from .gradients import group_size as group_size
from .gradients import likeness, run_backward
from .launches import current_device as current_device
from .launches import (
    for_kernels,
    launches_of,
    mergeable,
    notes_on_precision,
    rows_alike,
    sequences_at_once,
    sequences_merged,
    twin_of,
    with_precision,
)
from .lean import run_lean
from .row_gradients import gradient_stages as gradient_stages
from .rows import stages as stages


def forward(call: Call) -> Tensor:
    """The output [B, L, L, C], in the mode `call.memory`."""
    call = for_kernels(call)
    with current_device(call.x):
        if call.memory != "lean":
            try:
                together = _sequences_together(call)
                return _run_default(call, launches_of(call, "default", together), together)
            except torch.OutOfMemoryError as error:
                if call.memory == "default" or isinstance(error, PartlyWritten):
                    raise
            say_once("runs in lean mode: an allocation of the default mode failed")
        return run_lean(call, launches_of(call, "lean"))


def forward_saving(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, product, moments, planes) of the default mode, see `_run_saving`."""
    keeps = call.keeps_planes
    call = mergeable(for_kernels(call))
    launches = launches_of(call, "saving", keeps)

    def schedule(launches: Launches, flat: Sequence[Any]) -> list[Tensor]:
        return list(_run_saving(Call.of(flat), launches, True))

    with current_device(call.x):
        if keeps:
            return tuple(run_recorded(launches, schedule, call.flat()))
        # Not recorded: its output is made where a and b were.
        return _run_saving(call, launches, False)


def _run_default(call: Call, launches: Launches, size: int) -> Tensor:
    """The output, in groups of `size` sequences that share the memory of a, b and the product."""
    x, hidden = call.x, call.hidden
    batch, length = x.shape[:2]
    if size == batch:
        return _run_saving(call, launches, False)[0]
    # All large memory before a write, so that the residual is intact if there is too little: see
    # `writing`.
    out = call.residual if call.inplace else launches.empty("output", x.shape, x.dtype, x.device)
    shape = (size, hidden, length, padded_pitch(length))
    planes = launches.empty("a and b", (size, 2, *shape[1:]), x.dtype, x.device)
    product = launches.empty("product", shape, x.dtype, x.device)
    call, scales = split_weights(call, launches)
    folds = Folds(launches, call.weights)
    for first in range(0, batch, size):
        entries = slice(first, first + size)
        part = call.of_entries(entries)
        of_part = None if scales is None else scales.of_entries(entries)
        with writing(call, first > 0):
            moments = _multiply(part, launches, planes, product, of_part, folds)
            by_rows = with_axes_of_x(moments, call.direction)
            fused_ln_residual_fwd(
                part, launches, product, by_rows, out[entries], scales=scales, folds=folds,
                scratch=planes,
            )  # fmt: skip
        del moments, by_rows  # freed before the next group's are allocated
    return out


def _sequences_together(call: Call) -> int:
    """How many sequences to run at once."""
    batch = call.x.shape[0]
    if batch == 1:
        return 1
    # One launch serves all groups, whose tensors must be aligned alike.
    for tensor in (call.x, call.residual, call.drop_mask):
        if tensor is not None and tensor.stride(0) * tensor.element_size() % 16:
            return batch
    return sequences_at_once(call)


def _run_saving(
    call: Call, launches: Launches, keeps: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(output, product, moments, planes).

    Stage 2 wrote the product [B, D, L, pitch] in the dtype of x, and stage 1 the moments
    [B, 2, L, pitch] of x in fp32. The planes are a and b [B, 2, D, L, pitch], if they are kept.
    Otherwise they are freed before the output is allocated: the peak is a, b and the product.

    Where sequences are merged the product has this shape, but is [B / N, D, N, L, pitch] of N
    sequences in its memory. Planes and moments are alike, with the axes of x in both directions.
    """
    x, hidden = call.x, call.hidden
    merged = sequences_merged(call) if keeps else 1
    call, scales = split_weights(call, launches)
    # Stage 1 can't exchange the residue axes of merged rows: stage 2 reads a and b transposed.
    rows = call if merged == 1 else call.merged(merged)._replace(direction="outgoing")
    batch, height, length = rows.x.shape[:3]
    shape = (batch, hidden, height, padded_pitch(length))
    planes = launches.empty("a and b", (batch, 2, *shape[1:]), x.dtype, x.device)
    product = launches.empty("product", shape, x.dtype, x.device)
    folds = Folds(launches, call.weights)
    transposed = call.direction != rows.direction
    moments = _multiply(rows, launches, planes, product, scales, folds, transposed)
    if not keeps:
        planes = None
    out = call.residual if call.inplace else launches.empty("output", x.shape, x.dtype, x.device)
    by_rows, made = with_axes_of_x(moments, rows.direction), out.view(rows.x.shape)
    fused_ln_residual_fwd(rows, launches, product, by_rows, made, scales=scales, folds=folds)
    if merged > 1:
        kept = zip((product, moments, planes), saved_shapes(call), strict=True)
        product, moments, planes = [tensor.view(shape) for tensor, shape in kept]
    return out, product, moments, planes


def _multiply(
    call: Call,
    launches: Launches,
    planes: Tensor,
    product: Tensor,
    scales: Scales | None,
    folds: Folds,
    transposed: bool = False,
) -> Tensor:
    """Stages 1 and 2: fills planes and product; returns the moments.

    Stage 2 reads a and b `transposed`. Rows may be those of several sequences.
    """
    a, b = planes.unbind(1)
    moments = fused_dual_gemm_fwd(call, launches, (a, b), scales=scales, folds=folds)
    length = call.x.shape[2]
    sequences = call.x.shape[1] // length
    of_planes = None if scales is None else scales.of_planes(call.hidden, sequences=sequences)
    if sequences > 1:
        a, b, product = (of_sequences(tensor, length) for tensor in (a, b, product))
    turned = transposed, transposed
    trimul_einsum_fwd(call, launches, a, b, product, turned=turned, scales=of_planes)
    return moments


def saved_shapes(call: Call) -> tuple[tuple[int, ...], ...]:
    """The shapes of product, moments and planes."""
    batch, length = call.x.shape[:2]
    size = length, padded_pitch(length)
    planes = (batch, 2, call.hidden, *size) if call.keeps_planes else (0,)
    return (batch, call.hidden, *size), (batch, 2, *size), planes


def backward(
    call: Call,
    grad_out: Tensor,
    product: Tensor | None,
    moments: Tensor | None,
    planes: Tensor | None,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients that `needs` names."""
    call = for_kernels(call)
    if planes is not None and sequences_merged(call) > 1:
        call, grad_out = mergeable(call), rows_alike(grad_out)
    kept = product is not None, planes is not None
    launches = launches_of(call, "backward", needs, kept, likeness(grad_out))
    names = [name for name in DIFFERENTIABLE if name in needs]

    def schedule(launches: Launches, arguments: Sequence[Any]) -> list[Tensor]:
        *flat, of_out, product, moments, planes = arguments
        # Autocast would choose dtypes for what torch itself computes.
        with torch.autocast(call.x.device.type, enabled=False):
            found = run_backward(Call.of(flat), of_out, product, moments, planes, needs, launches)
        return [found[name] for name in names]

    with current_device(call.x):
        arguments = (*call.flat(), grad_out, product, moments, planes)
        made = run_recorded(launches, schedule, arguments)
    return dict(zip(names, made, strict=True))


def plan(call: Call) -> Plan:
    """The launches and buffers of `forward`, or of `forward_saving` if the product is kept.

    Meta tensors stand for tensors on the device that `device.standing_in` names.
    """
    keeps = call.needs_grad and call.keeps_product
    lean = call.memory == "lean" and not keeps
    with rehearsal(device_target(call.x.device)) as launches, torch.no_grad():
        kernels_call = for_kernels(twin_of(call))
        planes = keeps and call.keeps_planes
        if planes:
            kernels_call = mergeable(kernels_call)
        if keeps:
            _run_saving(kernels_call, launches, planes)
        elif lean:
            run_lean(kernels_call, launches)
        else:
            _run_default(kernels_call, launches, _sequences_together(kernels_call))
        of_precision = notes_on_precision(call, kernels_call)
    buffers, notes = launches.buffers, []
    kept = buffers["product"] + buffers["moments"] if keeps else 0
    kept += buffers["a and b"] if planes else 0
    mode = "lean" if lean else "default"
    found = Plan(mode, None, launches.launched, buffers, launches.peak, kept, notes)
    if call.memory == "auto" and not keeps:
        notes.append("lean mode would run where an allocation of this one fails")
    elif call.memory == "lean" and keeps:
        notes.append("lean mode would not keep the product: with a gradient, recompute='all' can")
    notes.append(note_on_gradients(call, planes))
    notes += of_precision
    if call.lengths is not None:
        notes.append("tiles beyond the lengths are skipped; the programs above are all")
    found = with_precision(found, "fused_dual_gemm", kernels_call)
    by_pointers = [
        name
        for name, launch in found.stages.items()
        if not launch.constants.get("DESCRIPTORS", True)
    ]
    if by_pointers:
        notes.append(
            f"no tensor descriptors in {', '.join(by_pointers)}: the settings have none, or rows "
            "are not aligned to 16 bytes"
        )
    return found


def plan_training(call: Call) -> list:
    """The launches of `plan`, and of `backward` in both directions, as `Plan.launches`.

    The backward gives the gradients of x and of all parameters, with a and b kept or made again.
    """
    launches = plan(call).launches
    for recompute in ("none", "product"):
        for direction in DIRECTIONS:
            launches += _plan_backward(call._replace(direction=direction, recompute=recompute))
    return launches


def _plan_backward(call: Call) -> list:
    """The launches of `backward` after `forward_saving`."""
    shapes, keeps = saved_shapes(call), call.keeps_planes
    call = mergeable(for_kernels(twin_of(call)))
    needs = {name for name, value in call.weights._asdict().items() if value is not None}
    x = call.x
    with rehearsal(device_target(x.device)) as launches:
        product, moments, planes = (
            torch.empty(shape, dtype=dtype, device="meta")
            for shape, dtype in zip(shapes, (x.dtype, torch.float32, x.dtype), strict=True)
        )
        planes = planes if keeps else None
        run_backward(call, x, product, moments, planes, frozenset({"x", *needs}), launches)
    return launches.launched
