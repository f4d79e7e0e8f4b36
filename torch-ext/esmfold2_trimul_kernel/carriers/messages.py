"""The exchange by messages of `torch.distributed`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from ..exchange import Exchange, Package, wait


class Messages:
    """The `Carrier` by NCCL or gloo.

    What stage 2 makes lies in the slots `made`, of which some may be those of operands.

    Messages of step + 1 are posted before stage 2 of step is launched. gloo has threads for them,
    and so has a network adapter; NCCL among the GPUs of one host needs multiprocessors, all of
    which stage 2 has, so there they wait for it.
    """

    def __init__(self, exchange: Exchange, slots: Tensor, made: tuple[int, ...]) -> None:
        self.slots = slots
        self._exchange, self._depth, self._made = exchange, len(slots), made
        self._sent: dict[int, list[dist.Work | Package]] = {}
        self._given: dict[int, list[dist.Work | Package]] = {}

    def send(self, step: int, group: int, operands: Sequence[Tensor]) -> None:
        if min(self._made) < len(operands):
            self._until_given(step - self._depth)
        pairs = [*zip(operands, self._own(step, group), strict=False)]
        self._sent[step] = []
        for some in (pairs[:2], pairs[2:]):  # as many at once as the groups are made for
            if some:
                self._sent[step] += self._exchange.begin(group, some, to_channels=True)

    def receive(self, step: int) -> None:
        self._until_given(step - self._depth)
        wait(self._sent.pop(step))

    def give_back(self, step: int, group: int, made: Sequence[Tensor]) -> None:
        own = self._own(step, group)
        pairs = [(to, own[slot]) for slot, to in zip(self._made, made, strict=True)]
        self._given[step] = self._exchange.begin(group, pairs, to_channels=False)

    def finish(self) -> None:
        for step in sorted(self._given):
            self._until_given(step)

    def _until_given(self, step: int) -> None:
        wait(self._given.pop(step, []))

    def _own(self, step: int, group: int) -> Tensor:
        return self._exchange.own(self.slots[step % self._depth], group)
