"""Which rows and channels the ranks have, and messages that exchange one for the other."""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_GROUPS = 8  # of a rank's channels: the fewest, if it has as many channels, and planes aren't small
# Of the planes of a rank's channels in a group, on a GPU. To queue a group takes its host longer
# than smaller ones take the GPU.
_LEAST_BYTES = 128 << 20
# NCCL has hung with more than 256 messages at once (pytorch/pytorch#174288).
_MOST_MESSAGES = 256
# Of the rows of one plane. Among GPUs shorter messages are packed: to post one takes the host
# longer than to copy it takes a GPU.
_LEAST_MESSAGE = 16 << 20


class Layout(NamedTuple):
    """Which rows and which channels the ranks have."""

    ranks: int
    length: int  # L
    hidden: int  # D
    least: int = 1  # channels of a rank in a group, if it has as many

    @classmethod
    def of(cls, ranks: int, length: int, hidden: int, x: Tensor) -> Layout:
        """That of a pair tensor of which a rank has x."""
        plane = length * length * x.element_size()
        least = -(-_LEAST_BYTES // plane) if x.is_cuda and plane else 1
        return cls(ranks, length, hidden, least)

    def rows(self, rank: int) -> slice:
        """The rows of a rank, as torch.chunk divides them."""
        size = -(-self.length // self.ranks)
        return slice(min(rank * size, self.length), min((rank + 1) * size, self.length))

    def group(self, index: int) -> slice:
        """The channels that are exchanged at once, all ranks' together."""
        width = self.ranks * self.size
        return slice(index * width, min((index + 1) * width, self.hidden))

    def channels(self, rank: int, group: int) -> slice:
        """Those of a group that a rank multiplies, counted from the group's first; maybe none."""
        channels = self.group(group)
        count = channels.stop - channels.start
        return slice(rank * count // self.ranks, (rank + 1) * count // self.ranks)

    def own_channels(self, rank: int, group: int) -> slice:
        """The same, counted among all channels that the rank multiplies."""
        of_group = self.channels(rank, group)  # all groups but the last have `size` of each rank
        return slice(group * self.size, group * self.size + of_group.stop - of_group.start)

    @property
    def size(self) -> int:
        """The most channels of a rank in a group."""
        most = -(-self.hidden // self.ranks)
        # a and b of them are sent to, and received from, at least one rank at once.
        return min(max(-(-most // _GROUPS), min(self.least, most)), _MOST_MESSAGES // 4)

    @property
    def groups(self) -> int:
        return -(-self.hidden // (self.ranks * self.size))

    def channel_count(self, rank: int) -> int:
        """All channels that a rank multiplies."""
        of_groups = [self.channels(rank, group) for group in range(self.groups)]
        return sum([channels.stop - channels.start for channels in of_groups])

    def sent(self, rank: int, to_channels: int = 2, to_rows: int = 1) -> tuple[int, int]:
        """What a rank sends for a sequence: messages, and the rows of planes in them.

        `to_channels` and `to_rows` are how many pair tensors are exchanged, those of a forward.
        """
        own_rows, own_channels = self.rows(rank), self.channel_count(rank)
        messages = rows = 0
        for peer in range(self.ranks):
            if peer != rank:
                of_peer = self.rows(peer)
                for planes, part in (
                    (to_channels * self.channel_count(peer), own_rows),
                    (to_rows * own_channels, of_peer),
                ):  # fmt: skip
                    messages += planes * (part.stop > part.start)
                    rows += planes * (part.stop - part.start)
        return messages, rows


class Exchange(NamedTuple):
    """Messages among the ranks of `group`, of which this one is `rank`.

    Each pair of planes is of one group: all its channels for my rows [.., R, pitch], and my own for
    all rows [.., L, pitch].
    """

    group: dist.ProcessGroup | None
    rank: int
    layout: Layout

    def own(self, slots: Tensor, group: int) -> Tensor:
        """Those planes [.., G, L, pitch] that this rank's channels of a group have."""
        mine = self.layout.channels(self.rank, group)
        return slots[..., : mine.stop - mine.start, :, :]

    def begin(
        self, group: int, pairs: list[tuple[Tensor, Tensor]], to_channels: bool
    ) -> list[dist.Work | Package]:
        """Posts the messages that fill the planes of my channels, or of my rows.

        A message is the rows of one plane, or packed those of all channels.
        """
        layout, packed = self.layout, self.packs(pairs[0][0], pairs[0][0].shape[-1])

        def messages(peer: int, by_rows: bool) -> list[Tensor]:
            """What my rows have of the peer's channels, or my channels of its rows."""
            found = []
            for of_rows, of_channels in pairs:
                part = of_channels[:, layout.rows(peer)]
                if by_rows:
                    part = of_rows[layout.channels(peer, group)]
                found += [part] if packed else part
            return [message for message in found if message.numel()]

        own = messages(self.rank, to_channels), messages(self.rank, not to_channels)
        for sent, received in zip(*own, strict=True):
            received.copy_(sent)
        # Each distance between ranks is in one batch on all of them, so that no two batches wait
        # for each other.
        works, packages = [], []
        of_a_pair = 1 if packed else layout.size
        at_once = max(1, _MOST_MESSAGES // (2 * len(pairs) * of_a_pair))
        for first in range(1, layout.ranks, at_once):
            operations = []
            for distance in range(first, min(first + at_once, layout.ranks)):
                to, of = [(self.rank + step) % layout.ranks for step in (distance, -distance)]
                for message in messages(to, to_channels):
                    package = Package(message.contiguous(), None)
                    packages.append(package)
                    operations.append(self._operation(dist.isend, package.message, to))
                for message in messages(of, not to_channels):
                    if not message.is_contiguous():
                        package = Package(message.new_empty(message.shape), message)
                        packages.append(package)
                        message = package.message
                    operations.append(self._operation(dist.irecv, message, of))
            works += dist.batch_isend_irecv(operations) if operations else []
        return works + packages

    def packs(self, like: Tensor, pitch: int) -> bool:
        """Whether messages of planes [.., pitch] are packed, whose dtype and device `like` has."""
        rows = self.layout.rows(0).stop
        return like.is_cuda and rows * pitch * like.element_size() < _LEAST_MESSAGE

    def _operation(self, kind: Callable[..., Any], message: Tensor, peer: int) -> dist.P2POp:
        to = peer if self.group is None else dist.get_global_rank(self.group, peer)
        return dist.P2POp(kind, message, to, self.group)


class Package(NamedTuple):
    """The memory of a message, and the planes that it fills, if it was received packed."""

    message: Tensor
    to: Tensor | None

    def wait(self) -> None:
        if self.to is not None:
            self.to.copy_(self.message)


def wait(works: list[dist.Work | Package]) -> None:
    """Until the messages have gone and come; a GPU's stream waits, not the host."""
    for work in works:
        work.wait()


def gather(group: dist.ProcessGroup | None, values: list[int]) -> list[list[int]]:
    """Every rank's values."""
    # NCCL takes no tensors of a CPU; where a group has it alone, the host waits for the GPU here.
    kinds = [of.split(":")[0] for of in dist.get_backend_config(group).split(",")]
    device = torch.device("cpu" if "cpu" in kinds else kinds[0])
    mine = torch.tensor(values, device=device)
    of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_all, mine, group)
    return [of_rank.tolist() for of_rank in of_all]
