"""What moves the planes of a sharded call among its ranks: one interface, three carriers.

    copies      among the GPUs of one host: copy engines write to, and read from, other GPUs' memory
    messages    by NCCL, among hosts and where a GPU's memory can't be mapped by all ranks
                by gloo, among CPUs

`sharded_schedule` has one forward and one backward for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Carrier(Protocol):
    """Moves planes for stage 2 in steps: a step is one group of channels of one sequence.

    Stage 2 works on the planes `slots` [depth, S, G, L, pitch] of `step % depth`, of this rank's
    channels: first its operands, which come from all ranks, and then what it makes, which goes back
    to them. A carrier knows which slots that is; by messages it may lie over operands. All ranks
    make the same calls in the same order.
    """

    slots: Tensor

    def send(self, step: int, group: int, operands: Sequence[Tensor]) -> None:
        """Sends planes of this rank's rows [.., R, pitch], all channels of the group."""

    def receive(self, step: int) -> None:
        """The operands of this rank's channels are here; those of its rows may be overwritten."""

    def give_back(self, step: int, group: int, made: Sequence[Tensor]) -> None:
        """Sends what this rank made, and fills `made` [.., R, pitch] with what its rows have."""

    def finish(self) -> None:
        """All that was made of this rank's rows is here."""
