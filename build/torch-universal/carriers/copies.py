"""The exchange by copies into, and out of, the memory of other GPUs of the same host.

The planes that stage 2 works on lie in memory that every rank of the group has mapped ("symmetric
memory"). A rank writes its rows of a and b there, and reads its rows of t. Signals are words that
only grow, of each kind one from each rank:

    ready   it has done all copies of earlier calls
    sent    its rows of a and b of a step are here
    made    its t of a step can be read, and a and b of that step are no longer needed
    taken   t of a step has been read, and may be overwritten

On the stream of the copies, `side`, the order is: a and b of step + 1, and then t of step; beside
them runs stage 2 of step + 1, of planes of its own. Every wait is for what other ranks queue before
they queue their own wait for it, so nothing depends on how streams share a GPU's queues.
"""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import math
from typing import Any

import torch
from torch import Tensor

from ..exchange import Exchange

SIGNALS = ("ready", "sent", "made", "taken")
_WORD_BYTES = 4
_ALIGNMENT = 256  # bytes; of TMA it is 128


class PeerMemory:
    """Memory of the same size on every rank, that all have mapped; its words count the steps."""

    def __init__(self, peers: list[Tensor], rank: int, mapping: object = None) -> None:
        """
        Args:
            peers: each rank's memory, uint8 [bytes], in which the words are 0.
            mapping: what keeps that of the others mapped.
        """
        self._peers, self._mapping = peers, mapping
        self.calls = self.steps = 0  # that have been queued so far
        # Each rank's own neighbour first, so that not all write to one.
        self.others = [(rank + distance) % len(peers) for distance in range(1, len(peers))]
        # The words that the other ranks set here, and those that this one sets on them.
        self.heard = {name: [self._word(rank, name, of) for of in self.others] for name in SIGNALS}
        self.told = {name: [self._word(of, name, rank) for of in self.others] for name in SIGNALS}
        self.own_word = self._word(rank, SIGNALS[0], rank)  # that no other rank knows

    @property
    def bytes(self) -> int:
        return len(self._peers[0])

    @staticmethod
    def bytes_for(ranks: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """The bytes that planes of a shape need beside the words."""
        return _first_byte(ranks) + math.prod(shape) * dtype.itemsize

    def planes(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The planes of a rank."""
        first = _first_byte(len(self._peers))
        size = math.prod(shape) * dtype.itemsize
        return self._peers[rank][first : first + size].view(dtype).view(shape)

    def _word(self, of: int, signal: str, by: int) -> Tensor:
        first = _WORD_BYTES * (SIGNALS.index(signal) * len(self._peers) + by)
        return self._peers[of][first : first + _WORD_BYTES].view(torch.int32)


def _first_byte(ranks: int) -> int:
    words = _WORD_BYTES * len(SIGNALS) * ranks
    return -(-words // _ALIGNMENT) * _ALIGNMENT


class PeerCopies:
    """The `Carrier` by copies.

    Args:
        shape: [depth, 3, G, L, pitch] of the slots in `memory`.
        main, side: queues, as `driver.Queue`, of the stages and of the copies.
    """

    def __init__(
        self, exchange: Exchange, memory: PeerMemory, shape: tuple[int, ...], dtype: torch.dtype,
        main: Any, side: Any,
    ) -> None:  # fmt: skip
        ranks = exchange.layout.ranks
        self._of_ranks = [memory.planes(rank, shape, dtype) for rank in range(ranks)]
        self.slots = self._of_ranks[exchange.rank]
        self._exchange, self._depth = exchange, shape[0]
        self._rows = exchange.layout.rows(exchange.rank)
        self._memory, self._main, self._side = memory, main, side
        self._begun = memory.steps
        self._sent: dict[int, tuple[Any, list[tuple[Tensor, Tensor]]]] = {}

    def __enter__(self) -> PeerCopies:
        memory = self._memory
        memory.calls += 1
        self._signal("ready", memory.calls)
        self._side.await_words(memory.heard["ready"], _word(memory.calls))
        self._free = self._side.mark()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Nothing that the call uses is freed, or written by the next one, before it is done."""
        self._side.follow(self._main.mark())
        self._main.follow(self._side.mark())

    def send(self, step: int, group: int, a: Tensor, b: Tensor) -> None:
        # Slots of step - depth are free: its `made` was awaited before its t was read.
        self._side.follow(self._main.mark())
        own = self._exchange.own(self.slots[step % self._depth], group)
        mine = self._channels(self._exchange.rank, group)
        parts = [(to[:, self._rows], of[mine]) for to, of in ((own[0], a), (own[1], b))]
        for other in self._memory.others:
            channels = self._channels(other, group)
            for to, of in zip(self._of_ranks[other][step % self._depth], (a, b), strict=False):
                count = channels.stop - channels.start
                self._side.copy(to[:count, self._rows], of[channels])
        self._signal("sent", self._count(step))
        self._sent[step] = self._side.mark(), parts

    def receive(self, step: int) -> None:
        mark, parts = self._sent.pop(step)
        if step == 0:  # in another call's sizes, t may still have been read where a and b will lie
            self._main.follow(self._free)
        for to, of in parts:
            self._main.copy_own(to, of)
        self._main.follow(mark)
        self._main.await_words(self._memory.heard["sent"], self._count(step))
        if step >= self._depth:
            self._main.await_words(self._memory.heard["taken"], self._count(step - self._depth))

    def give_back(self, step: int, group: int, product: Tensor) -> None:
        self._side.follow(self._main.mark())
        self._signal("made", self._count(step))
        own = self._exchange.own(self.slots[step % self._depth], group)
        mine = self._channels(self._exchange.rank, group)
        self._main.copy_own(product[mine], own[2][:, self._rows])
        self._side.await_words(self._memory.heard["made"], self._count(step))
        for other in self._memory.others:
            channels = self._channels(other, group)
            of = self._of_ranks[other][step % self._depth, 2]
            self._side.copy(product[channels], of[: channels.stop - channels.start, self._rows])
        self._signal("taken", self._count(step))
        self._memory.steps += 1

    def finish(self) -> None:
        self._main.follow(self._side.mark())

    def _channels(self, rank: int, group: int) -> slice:
        return self._exchange.layout.channels(rank, group)

    def _count(self, step: int) -> int:
        return _word(self._begun + step + 1)

    def _signal(self, signal: str, value: int) -> None:
        self._side.signal(self._memory.told[signal], _word(value), self._memory.own_word)


def _word(count: int) -> int:
    """The 32 bits of a count; waits compare their difference, so it may wrap around."""
    return count % 2**32
