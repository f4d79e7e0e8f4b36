"""What a call would do, without doing it: its path, launches and memory, and why no other way."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import aten
from .trimul_with_residual import (
    Request,
    current_device,
    execution_path,
    request_of_any_rank,
    request_with_residual,
    triangle_multiplicative_update,
    triangle_multiplicative_update_with_residual,
    triton_call,
)
from .validation import Weights


@dataclass(frozen=True)
class StageLaunch:
    """One Triton kernel of a call: its grid, and what it is compiled with."""

    programs: int
    constants: dict[str, Any]  # the kernel's constexprs
    options: dict[str, int]  # warps and stages

    def __str__(self) -> str:
        words = {**self.constants, **self.options}
        settings = " ".join([
            name if value is True else f"{name}={value}"
            for name, value in words.items()
            if value is not False
        ])
        return f"{self.programs:,} programs, {settings}"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found out; prints as a page."""

    call: str  # the tensor, in words
    path: str  # "triton", "aten", or "formula", the plain formula that torch.func can follow
    reason: str  # why this path, and so not another
    memory: str | None  # "default" or "lean", of the Triton path
    precision: str | None  # of the products of float32 operands, on the Triton path
    stages: dict[str, StageLaunch]  # of the Triton path, in the order of the launches
    buffers: dict[str, float]  # what is allocated, in tensors of the pair's size
    peak: float | None  # the most of them at once, the result included; None: not known
    peak_bytes: int | None
    kept: float  # what stays for a backward beside the arguments, in tensors of the pair's size
    notes: tuple[str, ...]  # why not another way, one sentence each

    def __str__(self) -> str:
        lines = [self.call, f"  path     {self.path}: {self.reason}"]
        if self.memory is not None:
            lines.append(f"  memory   {self.memory}")
        if self.precision is not None:
            lines.append(f"  products {self.precision}")
        for name, stage in self.stages.items():
            lines.append(f"  stage    {name}: {stage}")
        for name, size in self.buffers.items():
            lines.append(f"  buffer   {name}: {size:.2f} pair tensors")
        if self.peak is not None:
            lines.append(
                f"  at once  {self.peak:.2f} pair tensors, {self.peak_bytes / 2**20:,.1f} MiB, "
                f"of which {self.kept:.2f} are kept for a backward"
            )
        lines += [f"  note     {note}" for note in self.notes]
        return "\n".join(lines)


def explain(
    function: Callable[..., Tensor], /, *arguments: Any, **named: Any
) -> Explanation:
    """What `function(*arguments, **named)` would do; nothing runs and nothing large is allocated.

        print(explain(triangle_multiplicative_update, pair, mask=mask, **weights))

    Args:
        function: either public function.
        arguments, named: those of the call; they are checked as the call would check them, which
            copies an x whose leading dimensions can't be merged, and draws absent projections.

    Returns:
        The path and why, the Triton launches with their settings, the buffers with the peak of the
        memory beside the arguments, and why the call goes no other way; all of it of the forward.
        In lean mode the launches are those of the first group of channels and the first rows. Of
        the ATen path the buffers of a block, which stay within a CPU's caches, are not counted.

    Raises:
        TypeError: another function, or arguments that it doesn't take.
        ValueError, TypeError, NotImplementedError: what the call would raise.
    """
    given, request = _request(function, arguments, named)
    x, weights = request.x, request.weights
    shape = "x".join(map(str, x.shape))
    call = (
        f"{request.direction}, pair tensor {shape} {str(x.dtype).removeprefix('torch.')} on "
        f"{x.device}, D = {weights.p_out_weight.shape[1]}"
    )
    nothing = dict(memory=None, precision=None, stages={}, buffers={}, kept=0.0)
    if x.numel() == 0:
        reason = "the pair tensor is empty: nothing is computed"
        return Explanation(call, "aten", reason, peak=0.0, peak_bytes=0, notes=(), **nothing)
    transformed = torch._C._are_functorch_transforms_active()
    if forward_ad._current_level >= 0 or (request.needs_grad and transformed):
        reason = "torch.func and forward-mode AD can follow it alone"
        return Explanation(
            call, "formula", reason, peak=None, peak_bytes=None, notes=(), **nothing
        )
    path = execution_path(x.device, x.dtype)
    if transformed:
        note = "vmap runs one call for each entry: explain one of them for its launches and memory"
        return Explanation(
            call, path.name, path.reason, peak=None, peak_bytes=None, notes=(note,), **nothing
        )
    explain_path = _explain_aten if path.name == "aten" else _explain_triton
    found = explain_path(call, path.reason, request)
    return found if x.data_ptr() == given.data_ptr() else _with_copy(found, request)


def _request(
    function: Callable[..., Tensor], arguments: tuple, named: dict
) -> tuple[Tensor, Request]:
    """The call's pair tensor as it was given, and the call, checked."""
    if function not in (
        triangle_multiplicative_update, triangle_multiplicative_update_with_residual
    ):
        raise TypeError(
            "function must be triangle_multiplicative_update or "
            f"triangle_multiplicative_update_with_residual; got {function!r}"
        )
    bound = inspect.signature(function).bind(*arguments, **named)
    bound.apply_defaults()
    values = bound.arguments
    weights = Weights(**{name: values.pop(name, None) for name in Weights._fields})
    if function is triangle_multiplicative_update:
        return values["x"], request_of_any_rank(weights=weights, **values)[0]
    return values["pair"], request_with_residual(weights=weights, **values)


def _in_pairs(request: Request, sizes: dict[str, int]) -> dict[str, float]:
    """Bytes by name as tensors of the pair's size."""
    return {name: size / request.x.nbytes for name, size in sizes.items()}


def _explain_aten(call: str, reason: str, request: Request) -> Explanation:
    x, channels = request.x, request.x.shape[3]
    batch, hidden, length, _ = aten.saved_shape(x, request.weights)
    one = hidden * length * length * x.element_size()
    keeps = request.needs_grad and request.recompute == "product"
    sizes = {"a, then the product": batch * one if keeps else one, "output": x.nbytes}
    if hidden > channels:
        sizes["b"] = one
    notes = ["Triton is not for this call, for the reason above"]
    if hidden <= channels:
        notes.append("b lies in the memory of the output until that is written")
    notes += _notes_on_gradients(request)
    if request.lengths is not None and not keeps:
        sizes["output of one sequence, cut to its length"] = x.nbytes // batch
        notes.append("each sequence is cut to its length, which the host reads")
    elif request.lengths is not None:
        sizes["x without what lies in the padding"] = x.nbytes
        notes.append("lengths act as a mask, as the product is kept")
    buffers = _in_pairs(request, sizes)
    peak = sum(sizes.values())
    return Explanation(
        call, "aten", reason, None, None, {}, buffers, peak / x.nbytes, peak,
        batch * one / x.nbytes if keeps else 0.0, tuple(notes),
    )  # fmt: skip


def _explain_triton(call: str, reason: str, request: Request) -> Explanation:
    from . import triton_path  # imports Triton

    x = request.x
    keeps = request.needs_grad and request.recompute == "product"
    lean = request.memory == "lean" and not keeps
    triton = triton_call(
        x, request.direction, request.mask, request.residual, request.drop_mask, request.weights,
        request.eps_in, request.eps_out, request.precision, request.inplace, request.lengths,
    )  # fmt: skip
    with current_device(x):
        plan = triton_path.plan_of(triton, lean)
    stages = {
        name: StageLaunch(launch.programs, launch.constants, launch.options)
        for name, launch in plan.launches.items()
    }
    notes = []
    if request.memory == "auto" and not keeps:
        notes.append("lean mode would run where an allocation of this one fails")
    elif request.memory == "lean" and keeps:
        notes.append("lean mode would not keep the product: with a gradient, recompute='all' can")
    notes += _notes_on_gradients(request)
    if request.lengths is not None:
        notes.append("tiles beyond the lengths are skipped; the programs above are all")
    precision = None
    if x.dtype == torch.float32:
        precision = plan.launches["fused_dual_gemm"].constants["PRECISION"]
        if triton.precision == "fp32":
            notes.append("products are those of float32, as nothing allowed TF32")
    by_pointers = [
        name for name, launch in stages.items() if not launch.constants["DESCRIPTORS"]
    ]
    if by_pointers:
        notes.append(
            f"no tensor descriptors in {', '.join(by_pointers)}: the settings have none, or rows "
            "are not aligned to 16 bytes"
        )
    kept = (plan.buffers["product"] + plan.buffers["moments"]) / x.nbytes if keeps else 0.0
    return Explanation(
        call, "triton", reason, "lean" if lean else "default", precision, stages,
        _in_pairs(request, plan.buffers), plan.peak / x.nbytes, plan.peak, kept, tuple(notes),
    )  # fmt: skip


def _with_copy(found: Explanation, request: Request) -> Explanation:
    """`found`, and the copy of x that the call's checks make."""
    note = "x is copied, as its leading dimensions can't be merged into one as a view"
    return replace(
        found,
        buffers={**found.buffers, "copy of x": 1.0},
        peak=found.peak + 1.0,
        peak_bytes=found.peak_bytes + request.x.nbytes,
        kept=found.kept + (1.0 if request.needs_grad else 0.0),
        notes=(*found.notes, note),
    )


def _notes_on_gradients(request: Request) -> list[str]:
    if not request.needs_grad:
        return ["no gradient is needed: nothing is kept"]
    if request.recompute == "all":
        return ["recompute='all': the backward computes everything again, nothing is kept"]
    return ["the product is kept for the backward, which computes the rest again"]
