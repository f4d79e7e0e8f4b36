"""The transition's registered ops and their autograd; `operators` chooses among them.

    swiglu_fwd          a call that needs no gradient
    swiglu_fwd_         the same, written over the residual
    swiglu_fwd_saving   a call that needs one; autograd keeps the call's tensors, not the residual
    swiglu_bwd          the gradients

All take a call's fields in the order of `Transition.flat`.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from ._call import TRANSITION_DIFFERENTIABLE, TRANSITION_FLAT, Transition
from ._ops import ops
from .aten_path.transition import formula
from .operators import (
    differentiable_once,
    empty_gradients,
    gradients_by,
    keep,
    kept,
    pass_back,
    register,
    run_by,
)
from .paths import path_of

_NAMES = (TRANSITION_FLAT, TRANSITION_DIFFERENTIABLE)


def run(call: Transition) -> Tensor:
    """The result [B, I, J, C] of a call; see `operators.run_by`."""
    return run_by(call, ops.swiglu_fwd, ops.swiglu_fwd_, ops.swiglu_fwd_saving, formula)


def _swiglu_fwd(*flat) -> Tensor:
    call = Transition.of(flat)
    return path_of(call).forward(call) if call.x.numel() else call.x.new_empty(call.x.shape)


def _swiglu_fwd_(*flat) -> None:
    _swiglu_fwd(*flat)


def _swiglu_bwd(grad_out: Tensor, needs: list[bool], *flat) -> tuple[Tensor, ...]:
    """A tensor for each name of `TRANSITION_DIFFERENTIABLE`, empty if not needed."""
    call = Transition.of(flat)
    return gradients_by(
        lambda names: path_of(call).backward(call, grad_out, names), call, needs, *_NAMES
    )


def _swiglu_fwd_fake(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


def _swiglu_fwd__fake(*_) -> None:
    return None


def _swiglu_bwd_fake(grad_out: Tensor, needs: list[bool], *flat) -> tuple[Tensor, ...]:
    return empty_gradients(Transition.of(flat), needs, *_NAMES)


class SwiGLUTransition(Function):
    """`ops.swiglu_fwd_saving`, whose backward is `ops.swiglu_bwd`."""

    @staticmethod
    def forward(ctx, *flat) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out = ops.swiglu_fwd_saving(*flat)
        keep(ctx, Transition.of(flat))
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        def gradients(needs: list[bool]) -> tuple[Tensor, ...]:
            return ops.swiglu_bwd(grad_out, needs, *kept(ctx)[0])

        return pass_back(ctx, grad_out, gradients, *_NAMES)


_CALL = (
    "Tensor x, {residual} residual, Tensor? norm_weight, Tensor? norm_bias, Tensor gate_weight, "
    "Tensor? gate_bias, Tensor up_weight, Tensor? up_bias, Tensor down_weight, Tensor? down_bias, "
    "float eps, str precision, bool inplace, Tensor? lengths"
)
_READ, _WRITTEN = (_CALL.format(residual=type_) for type_ in ("Tensor?", "Tensor(a!)"))
_GRADIENTS = f"({', '.join(['Tensor'] * len(TRANSITION_DIFFERENTIABLE))})"
register(f"swiglu_fwd({_READ}) -> Tensor", _swiglu_fwd, _swiglu_fwd_fake)
register(f"swiglu_fwd_({_WRITTEN}) -> ()", _swiglu_fwd_, _swiglu_fwd__fake)
register(f"swiglu_fwd_saving({_READ}) -> Tensor", _swiglu_fwd, _swiglu_fwd_fake, SwiGLUTransition)
register(
    f"swiglu_bwd(Tensor grad_out, bool[] needs, {_READ}) -> {_GRADIENTS}",
    _swiglu_bwd, _swiglu_bwd_fake, differentiable_once("swiglu_bwd", "transition"),
)  # fmt: skip
