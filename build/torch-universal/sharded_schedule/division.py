"""How pair tensors are divided among ranks, and what a forward keeps for its backward."""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import weakref
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from .._call import Call
from ..exchange import Layout
from ..paths import execution_path
from ..validation import DIRECTIONS

# The calls of a group, in whose order all ranks make them, that have kept something.
_numbers: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


class Division(NamedTuple):
    """How pair tensors are divided among the ranks of a group, and what becomes of gradients."""

    group: dist.ProcessGroup | None
    dim: int
    length: int  # L
    parameter_grads: str = "sum"

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def layout(self, hidden: int, x: Tensor) -> Layout:
        """That of calls with D hidden channels, of which x is this rank's part."""
        return Layout.of(dist.get_world_size(self.group), self.length, hidden, x)

    def rows(self) -> slice:
        """This rank's residues along the axis."""
        return Layout(dist.get_world_size(self.group), self.length, 1).rows(self.rank)

    def by_rows(self, call: Call) -> Call:
        """The call with rows of x: if the pair tensor is divided by columns, its transpose's."""
        if self.dim == 1:
            return call
        return call._replace(
            x=call.x.transpose(1, 2),
            direction=DIRECTIONS[1 - DIRECTIONS.index(call.direction)],
            mask=None if call.mask is None else call.mask.transpose(1, 2),
            residual=None if call.residual is None else call.residual.transpose(1, 2),
            drop_mask=None if call.drop_mask is None else call.drop_mask[:, :, None],
            inplace=False,  # the result is transposed first
        )

    def facts(self, call: Call, saves: bool) -> dict[str, Any]:
        """What the ranks must agree on before a forward."""
        facts = {
            "B": call.x.shape[0], "L": self.length, "C": call.x.shape[3], "D": call.hidden,
            "dim": self.dim, "dtype": call.x.dtype, "direction": call.direction,
            "precision": call.precision, "memory": call.memory, "inplace": call.inplace,
            "path": execution_path(call.x.device, call.x.dtype).name,
            "lengths": call.lengths is not None, "eps": call.eps_in, "eps_out": call.eps_out,
            "requires_grad": saves,
        }  # fmt: skip
        if saves:
            facts |= {"recompute": call.recompute, "parameter_grads": self.parameter_grads}
        return facts


class Kept(NamedTuple):
    """What a forward keeps for its backward, None where it keeps nothing."""

    product: Tensor | None  # [B, D, R, pitch] of my rows
    moments: Tensor | None  # [B, 2, R, pitch] in fp32, on the Triton path
    channels: Tensor | None  # a and b of my channels: [B, 2, Dc, L, pitch]
    number: int  # of the call, among those of its group


def next_number(group: dist.ProcessGroup | None) -> int:
    group = dist.group.WORLD if group is None else group
    _numbers[group] = _numbers.get(group, 0) + 1
    return _numbers[group]
