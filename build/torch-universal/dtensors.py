"""Calls on DTensors: every rank's local tensors in, a DTensor of the same mesh and placements out.

A dimension of the mesh may replicate, or divide leading axes, whose sequences are independent. One
of them may divide the rows or the columns of pairs: its ranks run `sharded`. Gradients have the
placements of their tensors: those of parameters, and of what else is whole where x is divided, are
summed over the ranks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .agreement import refuse
from .sharded import check_order, run_divided
from .sharded_schedule import Division
from .trimul_with_residual import (
    triangle_multiplicative_update,
    triangle_multiplicative_update_with_residual,
)
from .validation import broadcasts_to, check_direction, check_pair

_FUNCTIONS = {
    "pair": triangle_multiplicative_update_with_residual,
    "x": triangle_multiplicative_update,
}


@torch._disable_dynamo  # as `sharded`
def run_on_dtensors(name: str, arguments: dict[str, Any]) -> DTensor:
    """The value of the public function whose pair tensor is called `name`, a DTensor.

    Args:
        arguments: all of the function's, by name.

    Raises:
        ValueError: placements that don't fit, or inplace.
    """
    x = arguments[name]
    check_pair(name, x, leading="B" if name == "pair" else "...")
    rows = x.ndim - 3  # the axis; columns are the next
    axes = [placement.dim if type(placement) is Shard else None for placement in x.placements]
    dividing = [at for at, axis in enumerate(axes) if axis in (rows, rows + 1)]
    others = [of for of, axis in zip(x.placements, axes, strict=True) if axis is None]
    if len(dividing) > 1 or x.ndim - 1 in axes or any([of != Replicate() for of in others]):
        raise ValueError(
            f"{name} must be a DTensor of placements Replicate() or Shard() of an axis before the "
            f"channels, at most one of them of a residue axis; got {x.placements}"
        )
    if not dividing:
        made = _FUNCTIONS[name](**_local_arguments(name, x, arguments))
    else:
        (at,) = dividing
        check_order(f"the mesh of {name}", x.device_mesh, at)
        group, dim = x.device_mesh.get_group(at), axes[at] - rows + 1
        try:
            local = _local_arguments(name, x, arguments)
        except Exception as error:
            refuse(group, error)
        made = run_divided(name, local, Division(group, dim, x.shape[-2]))
    stride = torch.empty(x.shape, device="meta").stride()
    return DTensor.from_local(
        made, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=stride
    )


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
        key: _local(key, value, name, x) for key, value in arguments.items() if key != "inplace"
    }


# How many of the last axes of a pair tensor [..., L, L, C] an argument lacks; parameters lack all.
_LACKED = {"mask": 1, "residual": 0, "drop_mask": 0, "lengths": 3}


def _local(key: str, value: Any, name: str, x: DTensor) -> Any:
    """This rank's part of an argument: the axes that it has in common with x are divided alike.

    A tensor that is no DTensor is the whole one, the same on all ranks.

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
    return value.redistribute(placements=wanted).to_local(grad_placements=of_gradient)
