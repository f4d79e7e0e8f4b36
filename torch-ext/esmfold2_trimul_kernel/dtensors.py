"""Calls on DTensors: every rank's local tensors in, a DTensor of the same mesh and placements out.

A dimension of the mesh may replicate, or divide leading axes, whose sequences are independent. The
ranks of one that divides the rows or the columns of pairs run `sharded`. If several do, `blocks`
are exchanged for what the outer one divides, whole rows or whole columns, and back. Gradients have
the placements of their tensors: those of parameters, and of what else is whole where x is divided,
are summed over the ranks.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from .agreement import compare, refuse
from .blocks import ToBlock, ToRows, blocks_of
from .sharded import check_order, run_divided
from .sharded_schedule import Division
from .trimul_with_residual import (
    triangle_multiplicative_update,
    triangle_multiplicative_update_with_residual,
)
from .validation import (
    broadcast_mask,
    broadcasts_to,
    check_direction,
    check_pair,
    check_residual,
)

_FUNCTIONS = {
    "pair": triangle_multiplicative_update_with_residual,
    "x": triangle_multiplicative_update,
}


def run_on_dtensors(name: str, arguments: dict[str, Any]) -> DTensor:
    """The value of the public function whose pair tensor is called `name`, a DTensor.

    Args:
        arguments: all of the function's, by name.

    Raises:
        ValueError: placements that don't fit, or inplace.
    """
    x = arguments[name]
    leading = "B" if name == "pair" else "..."
    rows = x.ndim - 3  # the axis; columns are the next
    axes = [placement.dim if type(placement) is Shard else None for placement in x.placements]
    # By the dimension of the mesh that divides them, 0, rows, or 1, columns.
    dividing = {at: axis - rows for at, axis in enumerate(axes) if axis in (rows, rows + 1)}
    others = [of for of, axis in zip(x.placements, axes, strict=True) if axis is None]
    if x.ndim - 1 in axes or any([of != Replicate() for of in others]):
        raise ValueError(
            f"{name} must be a DTensor of placements Replicate() or Shard() of an axis before the "
            f"channels; got {x.placements}"
        )
    if not dividing:
        check_pair(name, x, leading)
        made = _FUNCTIONS[name](**_local_arguments(name, x, arguments))
    elif len(dividing) > 1:
        made = _run_on_blocks(name, x, arguments, dividing, leading)
    else:
        ((at, axis),) = dividing.items()
        check_order(f"the mesh of {name}", x.device_mesh, at)
        group, dim = x.device_mesh.get_group(at), axis + 1
        try:
            check_pair(name, x, leading)
            local = _local_arguments(name, x, arguments)
        except Exception as error:
            refuse(group, error)
        made = run_divided(name, local, Division(group, dim, x.shape[-2]))
    stride = torch.empty(x.shape, device="meta").stride()
    return DTensor.from_local(
        made, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=stride
    )


@torch._disable_dynamo  # a tracer can't see all ranks' blocks
def _run_on_blocks(
    name: str, x: DTensor, arguments: dict[str, Any], dividing: dict[int, int], leading: str
) -> Tensor:
    """This rank's block of the value, where several dimensions of the mesh divide x.

    The memory for the messages is there before the ranks compare, so that a refusal reaches all.
    """
    length, turned = x.shape[-2], dividing[min(dividing)] == 1
    # What the outer dimension divides counts as rows.
    axes = {at: axis ^ turned for at, axis in dividing.items()}
    blocks = blocks_of(x.device_mesh, axes, length)

    def turn(pairs: Tensor) -> Tensor:
        return pairs.transpose(-3, -2) if turned else pairs

    failure, moves = None, {}
    facts = {
        "B": x.to_local().shape[:-3].numel(), "L": length, "C": x.shape[-1], "dtype": x.dtype,
        "dim": 1 + turned,
    }  # fmt: skip
    try:
        check_pair(name, x, leading)
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        facts["requires_grad"] = torch.is_grad_enabled() and any(
            [value.requires_grad for value in tensors]
        )
        local = _local_arguments(name, x, arguments)
        check_residual(arguments.get("residual"), name, x)
        if isinstance(arguments["mask"], Tensor):
            broadcast_mask(arguments["mask"].to("meta"), name, x.to("meta"))
        mask, residual = broadcast_mask(local["mask"], name, local[name]), local.get("residual")
        given = {name: turn(local[name])}
        if mask is not None:
            given["mask"] = turn(mask[..., None])
        if residual is not None and arguments["residual"] is not x:
            given["residual"] = turn(residual)
        facts["exchanged_gradients"] = tuple([
            key if key in ("mask", "residual") else "pair"
            for key, block in given.items()
            if facts["requires_grad"] and block.requires_grad
        ])
        moves = {key: (block, blocks.prepare(block.detach())) for key, block in given.items()}
        facts["mask"] = None if mask is None else mask.dtype
        facts["residual"] = residual is not None
    except Exception as error:
        failure = error
    try:
        compare(blocks.group, facts, failure, last=True)
    finally:
        failure = None  # its traceback holds this frame
    given = None
    for key in [*moves]:
        block, move = moves.pop(key)
        rows = turn(ToRows.apply(block, blocks, move))
        local[key] = rows[..., 0] if key == "mask" else rows
    block = move = rows = None  # the memory of the messages
    if residual is not None and arguments["residual"] is x:
        local["residual"] = local[name]
    if local.get("drop_mask") is not None:  # gathered, which takes all ranks
        of_gradient = Partial() if turned else Replicate()  # of each rank's columns, or summed
        drop_mask = _local("drop_mask", arguments["drop_mask"], name, x, dividing, of_gradient)
        local["drop_mask"] = drop_mask[:, :, blocks.rows] if turned else drop_mask
    made = run_divided(name, local, Division(blocks.group, 1 + turned, length))
    local = mask = residual = None  # before the memory for the way back
    return turn(ToBlock.apply(turn(made), blocks)).contiguous()


def _local_arguments(name: str, x: DTensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """This rank's part of each argument but `inplace`, by name."""
    mask = arguments["mask"]
    check_direction(arguments["direction"])
    if isinstance(mask, Tensor) and not broadcasts_to(mask.shape[:-2], x.shape[:-3]):
        raise ValueError(
            f"mask must broadcast to the leading axes of {name}, {list(x.shape[:-3])}, where that "
            f"is a DTensor; got {tuple(mask.shape)}"
        )
    if arguments.get("inplace", False):
        raise ValueError(f"inplace must be False where {name} is a DTensor; got True")
    for projection in ("p_in_weight", "g_in_weight", "p_out_weight", "g_out_weight"):
        if arguments[projection] is None:  # each rank would draw its own
            raise ValueError(f"{projection} must be a tensor where {name} is a DTensor; got None")
    return {
        key: _local(key, value, name, x)
        for key, value in arguments.items()
        if key != "inplace"
    }


# How many of the last axes of a pair tensor [..., L, L, C] an argument lacks; parameters lack all.
_LACKED = {"mask": 1, "residual": 0, "drop_mask": 0, "lengths": 3}


def _local(
    key: str, value: Any, name: str, x: DTensor, whole: Iterable[int] = (),
    of_whole: Placement | None = None,
) -> Any:  # fmt: skip
    """This rank's part of an argument: the axes that it has in common with x are divided alike.

    A tensor that is no DTensor is the whole one, the same on all ranks. What the dimensions `whole`
    of the mesh divide is gathered, and its gradient has the placement `of_whole` along them.

    Raises:
        ValueError: another mesh, or placements that are neither those of x nor Replicate.
    """
    if value is x or not isinstance(value, Tensor):
        return value.to_local() if value is x else value
    if key == "drop_mask" and value.ndim != 4:
        raise ValueError(
            f"drop_mask must be [B, 1, L, C] where {name} is a DTensor; got {tuple(value.shape)}"
        )
    mesh = x.device_mesh
    wanted, of_gradient = [Replicate()] * mesh.ndim, [Replicate()] * mesh.ndim
    for at, placement in enumerate(x.placements):
        # Ranks with other sequences have other shares of it; over rows or columns `sharded` sums.
        if placement.is_shard() and placement.dim < x.ndim - 3:
            of_gradient[at] = Partial()
        if key in _LACKED and placement.is_shard():
            axis = placement.dim - (x.ndim - _LACKED[key] - value.ndim)
            common = 0 <= axis < value.ndim and value.shape[axis] == x.shape[placement.dim]
            # A drop mask is shared over rows, even if there is one.
            if common and not (key == "drop_mask" and axis == 1):
                wanted[at] = of_gradient[at] = Shard(axis)
    if not isinstance(value, DTensor):
        value = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
    fits = [of in (want, Replicate()) for of, want in zip(value.placements, wanted, strict=False)]
    if value.device_mesh != mesh or not all(fits):
        raise ValueError(
            f"{key} must be a tensor, or a DTensor on the mesh of {name} with placements "
            f"{wanted}, each of which may be Replicate(); got {value.placements} on "
            f"{value.device_mesh}"
        )
    for at in whole:
        wanted[at], of_gradient[at] = Replicate(), of_whole
    return value.redistribute(placements=wanted).to_local(grad_placements=of_gradient)
