"""Autograd of the ops: what a forward keeps for its backward, and whose gradients that gives.

Kept are the tensors that a call was given, except the residual, and with recompute="product" what
the backward would need longest to compute again: the product t [B, D, L, L] in the dtype of x (on
the Triton path with padded rows, and beside it the moments of x, 8 bytes a pair). That is one
tensor of the pair's size beside the inputs, and with recompute="all" none.
"""

from typing import NoReturn

from torch import Tensor

from ._ops import ops
from .validation import Weights

# Every argument that `ops.trimul_bwd` gives a gradient of; the residual's is that of the output.
DIFFERENTIABLE = ("x", "mask", "drop_mask", *Weights._fields)


def save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """`inputs` and `output` are those of `ops.trimul_fwd_saving`."""
    x, direction, mask, _, drop_mask, *weights, eps_in, eps_out, precision, _, recompute = inputs
    product, moments = output[1:]
    ctx.mark_non_differentiable(product, moments)
    ctx.set_materialize_grads(False)
    kept = (product, moments) if recompute == "product" else (None, None)
    ctx.save_for_backward(x, mask, drop_mask, *weights, *kept)
    ctx.settings = direction, eps_in, eps_out, precision


def backward(ctx, grad_out: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs of `ops.trimul_fwd_saving`; None where none was asked for."""
    x_needs, _, mask_needs, residual_needs, drop_mask_needs, *others = ctx.needs_input_grad
    weights_need, settings = others[: len(Weights._fields)], others[len(Weights._fields) :]
    needs = [x_needs, mask_needs, drop_mask_needs, *weights_need]
    grads = [None] * len(needs)
    if grad_out is not None and any(needs):
        x, mask, drop_mask, *weights, product, moments = ctx.saved_tensors
        direction, *numbers = ctx.settings
        found = iter(
            ops.trimul_bwd(
                grad_out, x, direction, mask, drop_mask, *weights, *numbers, product, moments, needs
            )
        )
        grads = [next(found) if needed else None for needed in needs]
    grad_x, grad_mask, grad_drop_mask, *grads_of_weights = grads
    grad_residual = grad_out if residual_needs else None
    return (
        grad_x, None, grad_mask, grad_residual, grad_drop_mask, *grads_of_weights,
        *[None for _ in settings],
    )  # fmt: skip


def refuse_double_backward(ctx, *_) -> NoReturn:
    """What stands for the backward of `ops.trimul_bwd`."""
    raise NotImplementedError(
        "the backward of the triangle multiplication can't be differentiated again; the transforms "
        "of torch.func can take higher derivatives, in plain PyTorch"
    )
