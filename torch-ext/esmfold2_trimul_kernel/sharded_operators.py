"""The registered ops of `sharded`, and their autograd.

    sharded_trimul_fwd, sharded_trimul_fwd_, sharded_trimul_fwd_saving, sharded_trimul_bwd

are those of `operators` for a rank's part of a pair tensor. They take a call's fields and then a
`Division`, with its group's name. For a backward, autograd keeps the call's tensors, except the
residual, and what `sharded_schedule.Kept` tells.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from ._call import DIFFERENTIABLE, FLAT, Call
from ._ops import ops
from .operators import (
    GRADIENTS,
    READ,
    WRITTEN,
    differentiable_once,
    keep,
    kept,
    pass_back,
    register,
)
from .paths import path_of
from .sharded_schedule import Division, Kept, run_backward, run_forward


def run(division: Division, call: Call) -> Tensor:
    """The output like the x of a call, which is this rank's part."""
    group = "" if division.group is None else division.group.group_name
    arguments = (*call.flat(), *division._replace(group=group))
    if call.needs_grad:
        return ops.sharded_trimul_fwd_saving(*arguments)[0]
    if call.inplace:
        ops.sharded_trimul_fwd_(*arguments)
        return call.residual
    return ops.sharded_trimul_fwd(*arguments)


def _of(arguments: tuple) -> tuple[Division, Call]:
    """The division, with its group, and the call of an op's arguments."""
    flat, division = arguments[: len(FLAT)], Division(*arguments[len(FLAT) :])
    group = None
    if division.group:
        group = dist.distributed_c10d._resolve_process_group(division.group)
    return division._replace(group=group), Call.of(flat)


def _forward(*arguments) -> Tensor:
    return run_forward(*_of(arguments))[0]


def _forward_over(*arguments) -> None:
    run_forward(*_of(arguments))


def _forward_saving(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, and what is kept; empty tensors where nothing is."""
    division, call = _of(arguments)
    out, kept = run_forward(division, call, saves=True)
    tensors = [call.x.new_empty(0) if tensor is None else tensor for tensor in kept[:-1]]
    return out, *tensors, torch.tensor(kept.number)


def _backward(
    grad_out: Tensor,
    product: Tensor | None,
    moments: Tensor | None,
    channels: Tensor | None,
    number: Tensor,
    needs: list[bool],
    *arguments,
) -> tuple[Tensor, ...]:
    """A tensor for each name of `DIFFERENTIABLE`, empty if not needed."""
    division, call = _of(arguments)
    named = zip(DIFFERENTIABLE, needs, strict=True)
    names = frozenset([name for name, needed in named if needed])
    kept = Kept(product, moments, channels, int(number))
    grads = run_backward(division, call, grad_out, kept, names)
    return tuple([
        grads[name] if name in names else call.x.new_empty(0) for name in DIFFERENTIABLE
    ])


def _forward_fake(x: Tensor, *_) -> Tensor:
    return x.new_empty(x.shape)


def _forward_over_fake(*_) -> None:
    return None


def _forward_saving_fake(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    division, call = _of(arguments)
    x, rows = call.x, division.by_rows(call)
    product, moments, _ = path_of(rows).saved_shapes(rows) if call.keeps_product else ((0,),) * 3
    channels = (0,)
    if call.keeps_planes:
        mine = division.layout(call.hidden, call.x).channel_count(division.rank)
        channels = x.shape[0], 2, mine, division.length, product[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(product),
        x.new_empty(moments, dtype=x.dtype if moments == (0,) else torch.float32),
        x.new_empty(channels),
        torch.empty((), dtype=torch.int64),
    )


def _backward_fake(grad_out, product, moments, channels, number, needs, *arguments):
    leaves = dict(zip(FLAT, arguments, strict=False))
    return tuple([
        leaves[name].new_empty(leaves[name].shape) if needed else leaves["x"].new_empty(0)
        for name, needed in zip(DIFFERENTIABLE, needs, strict=True)
    ])


class ShardedTriangleMultiplication(Function):
    """`ops.sharded_trimul_fwd_saving`, whose backward is `ops.sharded_trimul_bwd`."""

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            out, *saved = ops.sharded_trimul_fwd_saving(*arguments)
        ctx.mark_non_differentiable(*saved)
        call, ctx.division = Call.of(arguments[: len(FLAT)]), arguments[len(FLAT) :]
        # A rank without rows or channels keeps tensors without elements.
        product, moments, channels, number = saved
        keep(
            ctx,
            call,
            product if call.keeps_product else None,
            moments if moments.numel() else None,
            channels if call.keeps_planes else None,
            number,
        )
        return out, *saved

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        flat, saved = kept(ctx)
        if grad_out is None:  # the other ranks wait for this one all the same
            grad_out = torch.zeros_like(flat[0])

        def gradients(needs: list[bool]) -> tuple[Tensor, ...]:
            return ops.sharded_trimul_bwd(grad_out, *saved, needs, *flat, *ctx.division)

        # Which gradients are needed, maybe none, is what the ranks compare.
        names = (*FLAT, *Division._fields)
        return pass_back(ctx, grad_out, gradients, names, DIFFERENTIABLE, always=True)


_DIVISION = "str group, int dim, int length, str parameter_grads"
_KEPT = (
    "Tensor grad_out, Tensor? product, Tensor? moments, Tensor? channels, Tensor number, "
    "bool[] needs"
)
register(f"sharded_trimul_fwd({READ}, {_DIVISION}) -> Tensor", _forward, _forward_fake)
register(
    f"sharded_trimul_fwd_({WRITTEN}, {_DIVISION}) -> ()", _forward_over, _forward_over_fake
)
register(
    f"sharded_trimul_fwd_saving({READ}, {_DIVISION}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_saving, _forward_saving_fake, ShardedTriangleMultiplication,
)  # fmt: skip
register(
    f"sharded_trimul_bwd({_KEPT}, {READ}, {_DIVISION}) -> {GRADIENTS}",
    _backward, _backward_fake,
    differentiable_once(
        "sharded_trimul_bwd", "sharded triangle multiplication",
        "those of one process can, by the transforms of torch.func",
    ),
)  # fmt: skip
