"""The triangle's registered ops, their autograd, and the only place that chooses among ops.

    trimul_fwd          a call that needs no gradient
    trimul_fwd_         the same, written over the residual
    trimul_fwd_saving   a call that needs one: the output, and what is kept for the backward
    trimul_bwd          the gradients

All take a call's fields in the order of `Call.flat`. For a backward, autograd keeps the call's
tensors, except the residual. Unless recompute="all" it also keeps the product t [B, D, L, L] in the
dtype of x: one tensor of the pair's size. On the Triton path its rows are padded, the moments of x
are kept too, 8 bytes a pair, and with recompute="none" a and b, two more such tensors.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import aten_path
from ._call import DIFFERENTIABLE, FLAT, Call, Transition, as_made
from ._ops import add_op_namespace_prefix, ops
from .paths import path_of, say_plain


def run(call: Call) -> Tensor:
    """The result [B, L, L, C] of a call; see `run_by`."""
    return run_by(call, ops.trimul_fwd, ops.trimul_fwd_, ops.trimul_fwd_saving, aten_path.formula)


def run_by(
    call: Call | Transition,
    forward: Callable,
    forward_over: Callable,
    forward_saving: Callable,
    formula: Callable,
) -> Tensor:
    """The result of a call, by the one of three ops, or the formula, that is for it.

    Args:
        forward_over: writes over the residual.
        forward_saving: returns the result alone, or ahead of what is kept for the backward.

    Raises:
        ValueError: inplace where a gradient is needed.
    """
    by_formula = forward_ad._current_level >= 0
    if by_formula or call.needs_grad:
        if call.inplace:
            raise ValueError("inplace must be False where a gradient is needed; got True")
        if not (by_formula or torch._C._are_functorch_transforms_active()):
            made = forward_saving(*call.flat())
            return made if isinstance(made, Tensor) else made[0]
        if call.x.device.type != "cpu":
            say_plain("torch.func or forward-mode AD goes through it, which takes the formula")
        return formula(call)
    if call.inplace:
        forward_over(*call.flat())
        return call.residual
    return forward(*call.flat())


def _trimul_fwd(*flat) -> Tensor:
    call = Call.of(flat)
    return path_of(call).forward(call) if call.x.numel() else call.x.new_empty(call.x.shape)


def _trimul_fwd_(*flat) -> None:
    _trimul_fwd(*flat)


def _trimul_fwd_saving(*flat) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and the product, moments and planes, empty where they are not kept."""
    call = Call.of(flat)
    if call.x.numel() and call.keeps_product:
        made = path_of(call).forward_saving(call)
        return tuple([call.x.new_empty(0) if tensor is None else tensor for tensor in made])
    return (_trimul_fwd(*flat), *_empty_saved(call))


def _trimul_bwd(
    grad_out: Tensor,
    product: Tensor | None,
    moments: Tensor | None,
    planes: Tensor | None,
    needs: list[bool],
    *flat,
) -> tuple[Tensor, ...]:
    """A tensor for each name of `DIFFERENTIABLE`, empty if not needed.

    A fixed number of tensors rather than a list, because vmap can loop over such an op.
    """
    call, kept = Call.of(flat), as_made(product, moments, planes)
    return gradients_by(
        lambda names: path_of(call).backward(call, grad_out, *kept, names),
        call, needs, FLAT, DIFFERENTIABLE,
    )  # fmt: skip


def gradients_by(
    backward: Callable,
    call: Call | Transition,
    needs: list[bool],
    flat_names: tuple[str, ...],
    differentiable: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """The outputs of a backward's op: what `backward(names)` gives for the names needed.

    A tensor for each name of `differentiable`, empty if not needed.
    """
    if call.x.numel() == 0:
        return tuple([
            grad.zero_() for grad in empty_gradients(call, needs, flat_names, differentiable)
        ])
    named = zip(differentiable, needs, strict=True)
    names = frozenset([name for name, needed in named if needed])
    found = backward(names)
    # Each absent gradient is an empty tensor of its own: outputs of an op share no memory.
    return tuple([
        found[name] if name in names else call.x.new_empty(0) for name in differentiable
    ])


def _empty_saved(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `trimul_fwd_saving` but the first, uninitialised."""
    shapes = path_of(call).saved_shapes(call) if call.keeps_product else ((0,), (0,), (0,))
    product, moments, planes = shapes
    x = call.x
    moments = x.new_empty(moments, dtype=x.dtype if moments == (0,) else torch.float32)
    return x.new_empty(product), moments, x.new_empty(planes)


def empty_gradients(
    call: Call | Transition,
    needs: list[bool],
    flat_names: tuple[str, ...],
    differentiable: tuple[str, ...],
) -> tuple[Tensor, ...]:
    """The outputs of a backward's op, uninitialised."""
    leaves = dict(zip(flat_names, call.flat(), strict=True))
    return tuple([
        leaves[name].new_empty(leaves[name].shape) if needed else call.x.new_empty(0)
        for name, needed in zip(differentiable, needs, strict=True)
    ])


def _trimul_fwd_fake(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


def _trimul_fwd__fake(*_) -> None:
    return None


def _trimul_fwd_saving_fake(*flat) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call.of(flat)
    return (call.x.new_empty(call.x.shape), *_empty_saved(call))


def _trimul_bwd_fake(grad_out, product, moments, planes, needs, *flat) -> tuple[Tensor, ...]:
    return empty_gradients(Call.of(flat), needs, FLAT, DIFFERENTIABLE)


class TriangleMultiplication(Function):
    """`ops.trimul_fwd_saving`, whose backward is `ops.trimul_bwd`."""

    @staticmethod
    def forward(ctx, *flat) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, *saved = ops.trimul_fwd_saving(*flat)
        ctx.mark_non_differentiable(*saved)
        call = Call.of(flat)
        # What is not kept is of shape (0,).
        keep(ctx, call, *[tensor if tensor.dim() > 1 else None for tensor in saved])
        return out, *saved

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        def gradients(needs: list[bool]) -> tuple[Tensor, ...]:
            flat, saved = kept(ctx)
            return ops.trimul_bwd(grad_out, *saved, needs, *flat)

        return pass_back(ctx, grad_out, gradients, FLAT, DIFFERENTIABLE)


def keep(ctx, call: Call | Transition, *others: Tensor | None) -> None:
    """Keeps a call but its residual, and others, for the backward of its op."""
    ctx.set_materialize_grads(False)
    flat = call._replace(residual=None).flat()
    ctx.others = [None if isinstance(value, Tensor) else value for value in flat]
    tensors = [value if isinstance(value, Tensor) else None for value in flat]
    ctx.save_for_backward(*tensors, *others)


def kept(ctx) -> tuple[list[Any], tuple[Tensor | None, ...]]:
    """What `keep` kept: the flat call and the others."""
    tensors, count = ctx.saved_tensors, len(ctx.others)
    *flat, lengths = [
        other if tensor is None else tensor
        for tensor, other in zip(tensors[:count], ctx.others, strict=True)
    ]
    if lengths is not None:  # to which a hook may have given a stride, that the kernels don't take
        lengths = lengths.contiguous()
    return [*flat, lengths], tensors[count:]


def pass_back(
    ctx,
    grad_out: Tensor | None,
    gradients: Callable,
    flat_names: tuple[str, ...],
    differentiable: tuple[str, ...],
    always: bool = False,
) -> tuple[Tensor | None, ...]:
    """The gradients of a flat call, those of `differentiable` by `gradients(needs)`.

    `always` calls it even if none of them is needed.
    """
    asked = dict(zip(flat_names, ctx.needs_input_grad, strict=True))
    needs = [asked[name] for name in differentiable]
    grads = {}
    if grad_out is not None and (always or any(needs)):
        grads = dict(zip(differentiable, gradients(needs), strict=True))
    grads["residual"] = grad_out
    return tuple([grads.get(name) if asked[name] else None for name in flat_names])


def differentiable_once(
    op_name: str,
    what: str,
    otherwise: str = "the transforms of torch.func can take higher derivatives, in plain PyTorch",
) -> type[Function]:
    """A backward's op, whose own backward refuses."""

    class Gradients(Function):
        @staticmethod
        def forward(ctx, *arguments) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                return getattr(ops, op_name)(*arguments)

        @staticmethod
        def backward(ctx, *_) -> NoReturn:
            raise NotImplementedError(
                f"the gradients of the {what} can't be differentiated again; {otherwise}"
            )

    return Gradients


def _autograd_kernel(function: type[Function], op_name: str) -> Callable:
    """The kernel of an op's Autograd key: `function` if gradients are enabled.

    Like torch.library.register_autograd, but without its search for the schema's defaults at each
    call, which took 165 of a forward's 280 us on the host (torch 2.13, AMD EPYC, 2026-11-26).
    """

    def kernel(*arguments):
        if torch.is_grad_enabled():
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(ops, op_name)(*arguments)

    return kernel


_CALL = (
    "Tensor x, str direction, Tensor? mask, {residual} residual, Tensor? drop_mask, "
    "Tensor? norm_in_weight, Tensor? norm_in_bias, Tensor p_in_weight, Tensor? p_in_bias, "
    "Tensor g_in_weight, Tensor? g_in_bias, Tensor? norm_out_weight, Tensor? norm_out_bias, "
    "Tensor p_out_weight, Tensor? p_out_bias, Tensor g_out_weight, Tensor? g_out_bias, "
    "float eps_in, float eps_out, str precision, str memory, str recompute, bool inplace, "
    "Tensor? lengths"
)
_KEPT = "Tensor grad_out, Tensor? product, Tensor? moments, Tensor? planes, bool[] needs"
READ, WRITTEN = (_CALL.format(residual=type_) for type_ in ("Tensor?", "Tensor(a!)"))
GRADIENTS = f"({', '.join(['Tensor'] * len(DIFFERENTIABLE))})"
# Library.define rather than custom_op, whose calls take ten times the Python time. Calls without a
# gradient have ops of their own, without an Autograd kernel.
_library = torch.library.Library(add_op_namespace_prefix("trimul_fwd").split("::")[0], "FRAGMENT")


def register(
    schema: str, function: Callable, fake: Callable, autograd: type[Function] | None = None
) -> None:
    """Registers an op by its schema, with the fake kernel that tracers run.

    Another copy of this build, such as an installed one beside a clone's, may have registered it.
    """
    name = schema.split("(")[0]
    if hasattr(ops, name):
        return
    _library.define(schema)
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)
    if autograd is not None:
        _library.impl(name, _autograd_kernel(autograd, name), "Autograd")


register(f"trimul_fwd({READ}) -> Tensor", _trimul_fwd, _trimul_fwd_fake)
register(f"trimul_fwd_({WRITTEN}) -> ()", _trimul_fwd_, _trimul_fwd__fake)
register(
    f"trimul_fwd_saving({READ}) -> (Tensor, Tensor, Tensor, Tensor)",
    _trimul_fwd_saving, _trimul_fwd_saving_fake, TriangleMultiplication,
)  # fmt: skip
register(
    f"trimul_bwd({_KEPT}, {READ}) -> {GRADIENTS}",
    _trimul_bwd, _trimul_bwd_fake,
    differentiable_once("trimul_bwd", "triangle multiplication"),
)  # fmt: skip
