"""Autograd of the ops: what a forward keeps for its backward, and whose gradients that gives.

Kept are the tensors that a call was given, except the residual, and with recompute="product" what
would take longest to compute again: the product t [B, D, L, L] in the dtype of x (on the Triton
path with padded rows, and beside it the moments of x, 8 bytes a pair). That is one tensor of the
pair's size beside the inputs, and with recompute="all" none.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import Function

from ._ops import ops
from .validation import Weights

# Every argument that `ops.trimul_bwd` gives a gradient of; the residual's is that of the output.
DIFFERENTIABLE = ("x", "mask", "drop_mask", *Weights._fields)


class TriangleMultiplication(Function):
    """`ops.trimul_fwd_saving`, whose backward is `ops.trimul_bwd`."""

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, product, moments = ops.trimul_fwd_saving(*arguments)
        x, direction, mask, _, drop_mask, *others = arguments
        *weights, eps_in, eps_out, precision, _, recompute, lengths = others
        ctx.mark_non_differentiable(product, moments)
        ctx.set_materialize_grads(False)
        kept = (product, moments) if recompute == "product" else (None, None)
        ctx.save_for_backward(x, mask, drop_mask, *weights, *kept, lengths)
        ctx.settings = direction, eps_in, eps_out, precision
        return out, product, moments

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        of_x, _, of_mask, of_residual, of_drop_mask, *others = ctx.needs_input_grad
        of_weights, of_settings = others[: len(Weights._fields)], others[len(Weights._fields) :]
        needs = [of_x, of_mask, of_drop_mask, *of_weights]
        grads = [None] * len(needs)
        if grad_out is not None and any(needs):
            x, mask, drop_mask, *weights, product, moments, lengths = ctx.saved_tensors
            direction, eps_in, eps_out, precision = ctx.settings
            found = ops.trimul_bwd(
                grad_out, x, direction, mask, drop_mask, *weights, eps_in, eps_out, precision,
                product, moments, needs, lengths,
            )  # fmt: skip
            grads = [
                grad if needed else None for grad, needed in zip(found, needs, strict=True)
            ]
        grad_x, grad_mask, grad_drop_mask, *grad_weights = grads
        grad_residual = grad_out if of_residual else None
        rest = [None] * len(of_settings)
        return grad_x, None, grad_mask, grad_residual, grad_drop_mask, *grad_weights, *rest


class TriangleMultiplicationGradients(Function):
    """`ops.trimul_bwd`, whose own backward refuses."""

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return ops.trimul_bwd(*arguments)

    @staticmethod
    def backward(ctx, *_) -> NoReturn:
        raise NotImplementedError(
            "the gradients of the triangle multiplication can't be differentiated again; the "
            "transforms of torch.func can take higher derivatives, in plain PyTorch"
        )


def autograd_kernel(function: type[Function], op_name: str) -> Callable:
    """The kernel of an op's Autograd key: `function` where gradients may be wanted.

    What torch.library.register_autograd would do, without its search for the schema's defaults at
    each call: of a forward's host time, 280 us, that was 165 (torch 2.13, AMD EPYC, 2026-11-26).
    """

    def kernel(*arguments):
        if torch.is_grad_enabled():
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(ops, op_name)(*arguments)

    return kernel
