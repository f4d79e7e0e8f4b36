"""The transition's registered ops, their autograd, and the only place that chooses among them.

    swiglu_fwd          a call that needs no gradient
    swiglu_fwd_         the same, written over the residual
    swiglu_fwd_saving   a call that needs one; autograd keeps the call's tensors, not the residual
    swiglu_bwd          the gradients

All take a call's fields in the order of `Transition.flat`.
"""

from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from ._call import TRANSITION_DIFFERENTIABLE, TRANSITION_FLAT, Transition
from ._ops import ops
from .operators import register
from .paths import path_of, say_plain


def run(call: Transition) -> Tensor:
    """The result [B, I, J, C] of a call.

    Raises:
        ValueError: inplace where a gradient is needed.
    """
    by_formula = forward_ad._current_level >= 0
    if by_formula or call.needs_grad:
        if call.inplace:
            raise ValueError("inplace must be False where a gradient is needed; got True")
        if not (by_formula or torch._C._are_functorch_transforms_active()):
            return ops.swiglu_fwd_saving(*call.flat())
        if call.x.device.type != "cpu":
            say_plain("torch.func or forward-mode AD goes through it, which takes the formula")
        from .aten_path import transition

        return transition.formula(call)
    if call.inplace:
        ops.swiglu_fwd_(*call.flat())
        return call.residual
    return ops.swiglu_fwd(*call.flat())


def _swiglu_fwd(*flat) -> Tensor:
    call = Transition.of(flat)
    if call.x.numel() == 0:
        return call.x.new_empty(call.x.shape)
    return path_of(call).forward(call)


def _swiglu_fwd_(*flat) -> None:
    _swiglu_fwd(*flat)


def _swiglu_bwd(grad_out: Tensor, needs: list[bool], *flat) -> tuple[Tensor, ...]:
    """A tensor for each name of `TRANSITION_DIFFERENTIABLE`, empty if not needed."""
    call = Transition.of(flat)
    if call.x.numel() == 0:
        return tuple([grad.zero_() for grad in _empty_gradients(call, needs)])
    named = zip(TRANSITION_DIFFERENTIABLE, needs, strict=True)
    names = frozenset([name for name, needed in named if needed])
    found = path_of(call).backward(call, grad_out, names)
    return tuple([
        found[name] if name in names else call.x.new_empty(0) for name in TRANSITION_DIFFERENTIABLE
    ])


def _empty_gradients(call: Transition, needs: list[bool]) -> tuple[Tensor, ...]:
    """The outputs of `swiglu_bwd`, uninitialised."""
    leaves = dict(zip(TRANSITION_FLAT, call.flat(), strict=True))
    return tuple([
        leaves[name].new_empty(leaves[name].shape) if needed else call.x.new_empty(0)
        for name, needed in zip(TRANSITION_DIFFERENTIABLE, needs, strict=True)
    ])


def _swiglu_fwd_fake(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


def _swiglu_fwd__fake(*_) -> None:
    return None


def _swiglu_bwd_fake(grad_out: Tensor, needs: list[bool], *flat) -> tuple[Tensor, ...]:
    return _empty_gradients(Transition.of(flat), needs)


class SwiGLUTransition(Function):
    """`ops.swiglu_fwd_saving`, whose backward is `ops.swiglu_bwd`."""

    @staticmethod
    def forward(ctx, *flat) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out = ops.swiglu_fwd_saving(*flat)
        ctx.set_materialize_grads(False)
        flat = Transition.of(flat)._replace(residual=None).flat()
        ctx.others = [None if isinstance(value, Tensor) else value for value in flat]
        tensors = [value if isinstance(value, Tensor) else None for value in flat]
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        asked = dict(zip(TRANSITION_FLAT, ctx.needs_input_grad, strict=True))
        needs = [asked[name] for name in TRANSITION_DIFFERENTIABLE]
        grads = {}
        if grad_out is not None and any(needs):
            flat = [
                other if tensor is None else tensor
                for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)
            ]
            found = ops.swiglu_bwd(grad_out, needs, *flat)
            grads = dict(zip(TRANSITION_DIFFERENTIABLE, found, strict=True))
        grads["residual"] = grad_out
        return tuple([grads.get(name) if asked[name] else None for name in TRANSITION_FLAT])


class SwiGLUTransitionGradients(Function):
    """`ops.swiglu_bwd`, whose own backward refuses."""

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return ops.swiglu_bwd(*arguments)

    @staticmethod
    def backward(ctx, *_) -> NoReturn:
        raise NotImplementedError(
            "the gradients of the transition can't be differentiated again; the transforms of "
            "torch.func can take higher derivatives, in plain PyTorch"
        )


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
    _swiglu_bwd, _swiglu_bwd_fake, SwiGLUTransitionGradients,
)  # fmt: skip
