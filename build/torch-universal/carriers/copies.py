"""The exchange by copies into, and out of, the memory of other GPUs of the same host.

The planes that stage 2 works on lie in memory that every rank of the group has mapped ("symmetric
memory"). A rank writes its rows of the operands there, and reads its rows of what is made (a and
b, and t; in a backward dt, maybe a and b, and then da and db). Signals are words that only grow, of
each kind one from each rank:

    ready   it has done all copies of earlier calls
    sent    its rows of the operands of a step are here
    made    what it made in a step can be read, and the step's operands are no longer needed
    taken   what was made in a step has been read, and may be overwritten

On the stream of the copies, `side`, the order is: operands of step + 1, and then what step made;
beside them runs stage 2 of step + 1, of planes of its own. Every wait is for what other ranks queue
before they queue their own wait for it, so nothing depends on how streams share a GPU's queues.
What a rank copies of its own has a stream of its own, lest others wait for it.
"""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import math
from collections.abc import Sequence
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
        shape: [depth, S, G, L, pitch] of the slots in `memory`.
        made: the slots in which stage 2 makes something. Other ranks may write to all others while
            these are read, so no operand lies there.
        main, side, own: queues, as `driver.Queue`, of the stages, of the copies among ranks, and of
            this rank's own.
    """

    def __init__(
        self, exchange: Exchange, memory: PeerMemory, shape: tuple[int, ...], dtype: torch.dtype,
        made: tuple[int, ...], main: Any, side: Any, own: Any,
    ) -> None:  # fmt: skip
        ranks = exchange.layout.ranks
        self._of_ranks = [memory.planes(rank, shape, dtype) for rank in range(ranks)]
        self.slots = self._of_ranks[exchange.rank]
        self._exchange, self._depth, self._made = exchange, shape[0], made
        self._rows = exchange.layout.rows(exchange.rank)
        self._memory, self._main, self._side, self._own = memory, main, side, own
        self._begun = memory.steps
        self._sent: dict[int, tuple[Any, Any]] = {}

    def __enter__(self) -> PeerCopies:
        memory = self._memory
        memory.calls += 1
        self._signal("ready", memory.calls)
        self._side.await_words(memory.heard["ready"], _word(memory.calls))
        self._own.follow(self._side.mark())
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Nothing that the call uses is freed, or written by the next one, before it is done."""
        for queue in (self._main, self._own):
            self._side.follow(queue.mark())
        self._main.follow(self._side.mark())

    def send(self, step: int, group: int, operands: Sequence[Tensor]) -> None:
        # Slots of step - depth are free: its `made` was awaited before what it made was read.
        begin, at = self._main.mark(), step % self._depth
        self._side.follow(begin)
        for other in self._memory.others:
            channels = self._channels(other, group)
            count = channels.stop - channels.start
            for to, of in zip(self._of_ranks[other][at], operands, strict=False):
                self._side.copy(to[:count, self._rows], of[channels])
        self._signal("sent", self._count(step))
        self._own.follow(begin)
        mine = self._channels(self._exchange.rank, group)
        for to, of in zip(self._exchange.own(self.slots[at], group), operands, strict=False):
            self._own.copy(to[:, self._rows], of[mine])
        self._sent[step] = self._side.mark(), self._own.mark()

    def receive(self, step: int) -> None:
        for mark in self._sent.pop(step):
            self._main.follow(mark)
        self._main.await_words(self._memory.heard["sent"], self._count(step))
        if step >= self._depth:
            self._main.await_words(self._memory.heard["taken"], self._count(step - self._depth))

    def give_back(self, step: int, group: int, made: Sequence[Tensor]) -> None:
        done, at = self._main.mark(), step % self._depth
        self._side.follow(done)
        self._signal("made", self._count(step))
        self._own.follow(done)
        own = self._exchange.own(self.slots[at], group)
        mine = self._channels(self._exchange.rank, group)
        for slot, to in zip(self._made, made, strict=True):
            self._own.copy(to[mine], own[slot][:, self._rows])
        self._side.await_words(self._memory.heard["made"], self._count(step))
        for other in self._memory.others:
            channels = self._channels(other, group)
            count = channels.stop - channels.start
            for slot, to in zip(self._made, made, strict=True):
                self._side.copy(to[channels], self._of_ranks[other][at, slot, :count, self._rows])
        self._signal("taken", self._count(step))
        self._memory.steps += 1

    def finish(self) -> None:
        for queue in (self._side, self._own):
            self._main.follow(queue.mark())

    def _channels(self, rank: int, group: int) -> slice:
        return self._exchange.layout.channels(rank, group)

    def _count(self, step: int) -> int:
        return _word(self._begun + step + 1)

    def _signal(self, signal: str, value: int) -> None:
        self._side.signal(self._memory.told[signal], _word(value), self._memory.own_word)


def _word(count: int) -> int:
    """The 32 bits of a count; waits compare their difference, so it may wrap around."""
    return count % 2**32
