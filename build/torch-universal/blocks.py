"""Blocks of a pair tensor, one a rank, exchanged for whole rows and back.

A block has some rows and some columns of the pairs. A rank gets the rows that torch.chunk gives it
of L, which `sharded` takes. On a mesh of n x m blocks, L divisible by n m, most of them are its own
block's: it sends (m - 1) / m of the block to the m - 1 ranks that have the same rows, and as much
of the result back. The gradient of either exchange is the other, of what is exchanged.
"""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import itertools
import weakref
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from .exchange import Layout

# By the group of a mesh's first dimension, those of several dimensions, by their ranks.
_made: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]]
_made = weakref.WeakKeyDictionary()


class Block(NamedTuple):
    """The pairs that a rank has."""

    rows: slice
    columns: slice


class Move(NamedTuple):
    """A block on its way to the ranks that get its rows, and this rank's rows."""

    sent: Tensor  # bytes
    received: Tensor
    sizes: tuple[list[int], list[int]]  # of both, by rank
    rows: Tensor  # [.., R, L, C]


class Blocks(NamedTuple):
    """The blocks [.., rows, columns, C] of the ranks of a group, of which this one is `rank`."""

    group: dist.ProcessGroup
    rank: int
    length: int  # L
    blocks: list[Block]  # of each rank

    @property
    def rows(self) -> slice:
        """Those that this rank exchanges its block for."""
        return self._rows(self.rank)

    def prepare(self, block: Tensor) -> Move:
        """The memory that it takes to exchange a block for rows; no message yet."""
        leading, channels = block.shape[:-3], block.shape[-1]
        height = self.rows.stop - self.rows.start
        rows = block.new_empty(*leading, height, self.length, channels)
        each = leading.numel() * channels * block.element_size()  # bytes of a pair
        own, ranks = self.blocks[self.rank], range(len(self.blocks))
        sizes = (
            [each * _area(own, self._rows(rank)) for rank in ranks],
            [each * _area(self.blocks[rank], self.rows) for rank in ranks],
        )
        received = torch.empty(sum(sizes[1]), dtype=torch.uint8, device=block.device)
        # In the order of the ranks that get them: for one sequence that is the block as it is.
        return Move(_as_bytes(block.movedim(-3, 0)), received, sizes, rows)

    def to_rows(self, move: Move) -> Tensor:
        """The rows [.., R, L, C]."""
        rows, leading = move.rows, move.rows.shape[:-3]
        dist.all_to_all_single(move.received, move.sent, *move.sizes[::-1], group=self.group)
        pieces = zip(self.blocks, move.received.split(move.sizes[1]), strict=True)
        for block, piece in pieces:
            common = _common(block.rows, self.rows)
            shape = (-1, *leading, block.columns.stop - block.columns.start, rows.shape[-1])
            if piece.numel():
                target = rows[..., _within(common, self.rows), block.columns, :]
                target.copy_(piece.view(rows.dtype).view(shape).movedim(0, -3))
        return rows

    def to_block(self, rows: Tensor) -> Tensor:
        """This rank's block [.., rows, columns, C] of what `rows` [.., R, L, C] have of all."""
        own, ranks = self.blocks[self.rank], range(len(self.blocks))
        leading, channels = rows.shape[:-3], rows.shape[-1]
        each = leading.numel() * channels * rows.element_size()
        sent = torch.cat([
            _as_bytes(
                rows[..., _within(_common(block.rows, self.rows), self.rows), block.columns, :]
                .movedim(-3, 0)
            )
            for block in self.blocks
        ])  # fmt: skip
        sent_sizes = [each * _area(block, self.rows) for block in self.blocks]
        sizes = [each * _area(own, self._rows(rank)) for rank in ranks]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=rows.device)
        dist.all_to_all_single(received, sent, sizes, sent_sizes, group=self.group)
        del sent
        height, width = (part.stop - part.start for part in own)
        made = received.view(rows.dtype).view(height, *leading, width, channels)
        return made.movedim(0, -3).contiguous()

    def _rows(self, rank: int) -> slice:
        return Layout(len(self.blocks), self.length, 1).rows(rank)


class ToRows(torch.autograd.Function):
    """`Blocks.to_rows` of a block that has been prepared, and its gradient."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, blocks: Blocks, move: Move) -> Tensor:
        ctx.blocks = blocks
        return blocks.to_rows(move)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.blocks.to_block(grad), None, None


class ToBlock(torch.autograd.Function):
    """`Blocks.to_block`, and its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, blocks: Blocks) -> Tensor:
        ctx.blocks = blocks
        return blocks.to_block(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.blocks.to_rows(ctx.blocks.prepare(grad)), None


def blocks_of(mesh: DeviceMesh, axes: dict[int, int], length: int) -> Blocks:
    """The blocks of L x L pairs on the ranks that differ from this one in some mesh dimensions.

    Args:
        axes: 0, rows, or 1, columns, by the dimension of the mesh that divides them. Of two that
            divide the same the first is the outer, as for a DTensor.

    Raises:
        ValueError: a mesh of fewer ranks than there are, if their group must be made first.
    """
    dims = tuple(sorted(axes))
    own = mesh.get_coordinate()
    ranks = mesh.mesh[tuple(slice(None) if at in axes else own[at] for at in range(mesh.ndim))]
    blocks: dict[int, Block] = {}
    for place in itertools.product(*map(range, ranks.shape)):
        parts = [slice(0, length), slice(0, length)]
        for dim, size, at in zip(dims, ranks.shape, place, strict=True):
            whole = parts[axes[dim]]
            part = Layout(size, whole.stop - whole.start, 1).rows(at)
            parts[axes[dim]] = slice(whole.start + part.start, whole.start + part.stop)
        blocks[int(ranks[place])] = Block(*parts)
    own_ranks = tuple(sorted(blocks))
    group = _group_of(mesh, dims, own_ranks)
    return Blocks(group, dist.get_rank(group), length, [blocks[rank] for rank in own_ranks])


def has_all_ranks(mesh: DeviceMesh) -> bool:
    """Whether the groups of several dimensions of a mesh can be made."""
    return mesh.mesh.numel() == dist.get_world_size()


def _group_of(mesh: DeviceMesh, dims: tuple[int, ...], own: tuple[int, ...]) -> dist.ProcessGroup:
    """The group of the ranks `own` along some dimensions of a mesh, in ascending order.

    The first call makes the group, which takes all ranks that there are.
    """
    world = dist.get_world_size()
    if len(own) == world:
        return dist.group.WORLD
    made = _made.setdefault(mesh.get_group(0), {})
    if own not in made:
        if not has_all_ranks(mesh):
            raise ValueError(
                f"the mesh must have all {world} ranks where several of its dimensions divide "
                f"residues; got {mesh}"
            )
        others = [at for at in range(mesh.ndim) if at not in dims]
        groups = mesh.mesh.permute(*others, *dims).reshape(-1, len(own)).sort().values
        made[own], _ = dist.new_subgroups_by_enumeration(groups.tolist())
    return made[own]


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _common(one: slice, other: slice) -> slice:
    """What both have; empty if that is nothing."""
    start, stop = max(one.start, other.start), min(one.stop, other.stop)
    return slice(start, max(start, stop))


def _within(part: slice, of: slice) -> slice:
    return slice(part.start - of.start, part.stop - of.start)


def _area(block: Block, rows: slice) -> int:
    """How many pairs of a block are in these rows."""
    common = _common(block.rows, rows)
    return (common.stop - common.start) * (block.columns.stop - block.columns.start)
