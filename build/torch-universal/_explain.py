"""A call's path, launches and memory, and the reasons for them, without running the call."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._call import Call, Transition, TransitionWeights, Weights
from .paths import execution_path, module_for
from .sharded import SHARDED, division, plan_of
from .swiglu_transition import swiglu_transition, transition_call
from .trimul_with_residual import (
    call_of_any_rank,
    call_with_residual,
    is_dtensor,
    triangle_multiplicative_update,
    triangle_multiplicative_update_with_residual,
)


@dataclass(frozen=True)
class StageLaunch:
    """One Triton kernel of a call: its grid and its compile-time settings."""

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
    """The result of `explain`; it prints as a page."""

    call: str  # the tensor, in words
    path: str  # "triton", "aten", or "formula", the plain formula that torch.func can follow
    reason: str  # why this path
    memory: str | None  # "default" or "lean", of the Triton path
    precision: str | None  # of the products of float32 operands, on the Triton path
    stages: dict[str, StageLaunch]  # of the Triton path, in the order of the launches
    buffers: dict[str, float]  # what is allocated, in tensors of the size of x
    peak: float | None  # the most of them at once, the result included; None if unknown
    peak_bytes: int | None
    kept: float  # kept for a backward beside the arguments, in tensors of the size of x
    notes: tuple[str, ...]  # why no other way was taken, one sentence each

    def __str__(self) -> str:
        lines = [self.call, f"  path     {self.path}: {self.reason}"]
        if self.memory is not None:
            lines.append(f"  memory   {self.memory}")
        if self.precision is not None:
            lines.append(f"  products {self.precision}")
        for name, stage in self.stages.items():
            lines.append(f"  stage    {name}: {stage}")
        for name, size in self.buffers.items():
            lines.append(f"  buffer   {name}: {size:.2f} such tensors")
        if self.peak is not None:
            lines.append(
                f"  at once  {self.peak:.2f} such tensors, {self.peak_bytes / 2**20:,.1f} MiB, "
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
        function: any of the three public functions, or a sharded one, for which buffers and
            messages of this rank are told, and no launches.
        arguments, named: those of the call; they are checked as the call would check them, which
            copies an x or residual whose leading dimensions can't be merged, and draws absent
            projections.

    Returns:
        The forward's path and its reason, Triton launches with their settings, buffers, peak memory
        beside the arguments, and notes on why it takes no other way. In lean mode the launches are
        those of the first group of channels and the first rows. On the ATen path the buffers of a
        block, which stay within a CPU's caches, are not counted.

    Raises:
        TypeError: another function, or arguments that it doesn't take.
        NotImplementedError: a DTensor, or a call inside `sharded_pairs`.
        ValueError, TypeError, NotImplementedError: as the call would raise them.
    """
    if function in SHARDED:
        given, (call, plan) = [], plan_of(_by_name(function, arguments, named))
    else:
        (given, call), plan = _call_of(function, arguments, named), None
    x, words = call.x, _in_words(call)
    nothing = dict(memory=None, precision=None, stages={}, buffers={}, kept=0.0)
    if x.numel() == 0:
        reason = "the tensor is empty: nothing is computed"
        return Explanation(words, "aten", reason, peak=0.0, peak_bytes=0, notes=(), **nothing)
    transformed = torch._C._are_functorch_transforms_active()
    nothing |= dict(peak=None, peak_bytes=None)
    if forward_ad._current_level >= 0 or (call.needs_grad and transformed):
        reason = "torch.func and forward-mode AD can follow it alone"
        return Explanation(words, "formula", reason, notes=(), **nothing)
    path = execution_path(x.device, x.dtype)
    if transformed:
        note = "vmap runs one call for each entry: explain one of them for its launches and memory"
        return Explanation(words, path.name, path.reason, notes=(note,), **nothing)
    if plan is None:
        plan = module_for(call, path.name).plan(call)
    found = Explanation(
        call=words,
        path=path.name,
        reason=path.reason,
        memory=plan.memory,
        precision=plan.precision,
        stages={
            name: StageLaunch(launch.programs, _settings(launch), launch.options)
            for name, launch in plan.stages.items()
        },
        buffers={name: size / x.nbytes for name, size in plan.buffers.items()},
        peak=plan.peak / x.nbytes,
        peak_bytes=plan.peak,
        kept=plan.kept / x.nbytes,
        notes=tuple(plan.notes),
    )
    return _with_copies(found, given, call)


def _settings(launch: Any) -> dict[str, Any]:
    """The constants of a launch that can be read, and the variant of its stage, if it is one."""
    plain = {k: v for k, v in launch.constants.items() if isinstance(v, int | str)}
    return {"VARIANT": launch.variant, **plain} if launch.variant else plain


def _of_update(values: dict) -> tuple[list[Tensor], Call]:
    weights = _popped(Weights, values)
    _refuse_parts("x", values["x"])
    return [values["x"]], call_of_any_rank(weights=weights, **values)[0]


def _with_residual(values: dict) -> tuple[list[Tensor], Call]:
    weights = _popped(Weights, values)
    _refuse_parts("pair", values["pair"])
    return [values["pair"]], call_with_residual(weights=weights, **values)


def _refuse_parts(name: str, pair: Tensor) -> None:
    if is_dtensor(pair) or division() is not None:
        raise NotImplementedError(
            f"{name} must be a whole pair tensor: explain the sharded function for a rank's part; "
            + ("got a DTensor" if is_dtensor(pair) else "got a call inside sharded_pairs")
        )


def _of_transition(values: dict) -> tuple[list[Tensor | None], Transition]:
    weights = _popped(TransitionWeights, values)
    return [values["x"], values["residual"]], transition_call(weights=weights, **values)


# For each public function, what makes a call of its arguments: x, and a residual of any strides, as
# they are given; and the checked call.
_CALLS = {
    triangle_multiplicative_update: _of_update,
    triangle_multiplicative_update_with_residual: _with_residual,
    swiglu_transition: _of_transition,
}


def _popped(kind: type, values: dict) -> Any:
    """The parameters among a call's arguments."""
    return kind(**{name: values.pop(name, None) for name in kind._fields})


def _call_of(
    function: Callable[..., Tensor], arguments: tuple, named: dict
) -> tuple[list[Tensor | None], Call | Transition]:
    """x, and a residual of any strides, as given, and the checked call."""
    if not callable(function) or function not in _CALLS:
        *names, last = [known.__name__ for known in _CALLS]
        raise TypeError(
            f"function must be {', '.join(names)} or {last}, or a sharded one; got {function!r}"
        )
    return _CALLS[function](_by_name(function, arguments, named))


def _by_name(function: Callable[..., Tensor], arguments: tuple, named: dict) -> dict[str, Any]:
    """All arguments of a call by name, defaults too."""
    bound = inspect.signature(function).bind(*arguments, **named)
    bound.apply_defaults()
    return bound.arguments


def _in_words(call: Call | Transition) -> str:
    shape, dtype = "x".join(map(str, call.x.shape)), str(call.x.dtype).removeprefix("torch.")
    tensor = f"tensor {shape} {dtype} on {call.x.device}"
    if isinstance(call, Transition):
        return f"transition, {tensor}, H = {call.hidden}"
    return f"{call.direction}, pair {tensor}, D = {call.hidden}"


def _with_copies(
    found: Explanation, given: list[Tensor | None], call: Call | Transition
) -> Explanation:
    """`found`, and the copies of x and the residual that the call's checks make."""
    for name, tensor in zip(("x", "residual"), given, strict=False):
        if tensor is None or tensor.data_ptr() == getattr(call, name).data_ptr():
            continue
        found = replace(
            found,
            buffers={**found.buffers, f"copy of {name}": 1.0},
            peak=found.peak + 1.0,
            peak_bytes=found.peak_bytes + call.x.nbytes,
            kept=found.kept + (1.0 if name == "x" and call.needs_grad else 0.0),
            notes=(
                *found.notes,
                f"{name} is copied, as its leading dimensions can't be merged as a view",
            ),
        )
    return found
