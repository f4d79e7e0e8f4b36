"""The exchange by messages of `torch.distributed`."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from ..exchange import Exchange, wait


class Messages:
    """The `Carrier` by NCCL or gloo.

    Messages of step + 1 are posted before stage 2 of step is launched. gloo has threads for them,
    and so has a network adapter; NCCL among the GPUs of one host needs multiprocessors, all of
    which stage 2 has, so there they wait for it.
    """

    def __init__(self, exchange: Exchange, slots: Tensor) -> None:
        self.slots = slots
        self._exchange, self._depth = exchange, len(slots)
        self._in_place = slots.shape[1] == 2  # t lies over a
        self._sent: dict[int, list[dist.Work]] = {}
        self._given: dict[int, list[dist.Work]] = {}

    def send(self, step: int, group: int, a: Tensor, b: Tensor) -> None:
        if self._in_place:
            self._until_given(step - self._depth)
        own = self._own(step, group)
        pairs = [(a, own[0]), (b, own[1])]
        self._sent[step] = self._exchange.begin(group, pairs, to_channels=True)

    def receive(self, step: int) -> None:
        self._until_given(step - self._depth)
        wait(self._sent.pop(step))

    def give_back(self, step: int, group: int, product: Tensor) -> None:
        made = self._own(step, group)[0 if self._in_place else 2]
        self._given[step] = self._exchange.begin(group, [(product, made)], to_channels=False)

    def finish(self) -> None:
        for step in sorted(self._given):
            self._until_given(step)

    def _until_given(self, step: int) -> None:
        wait(self._given.pop(step, []))

    def _own(self, step: int, group: int) -> Tensor:
        return self._exchange.own(self.slots[step % self._depth], group)
