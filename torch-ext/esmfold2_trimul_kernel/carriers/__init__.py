"""What moves the planes of a sharded call among its ranks: one interface, three carriers.

    copies      among the GPUs of one host: copy engines write to, and read from, other GPUs' memory
    messages    by NCCL, among hosts and where a GPU's memory can't be mapped by all ranks
                by gloo, among CPUs

`sharded_schedule` has one forward for all of them; its backward goes by messages.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Carrier(Protocol):
    """Moves the planes of one call, in steps: a step is one group of channels of one sequence.

    Stage 2 works on the planes `slots` [depth, 2 or 3, G, L, pitch] of `step % depth`: a and b of
    this rank's channels, and t, which has planes of its own or lies over a. All ranks make the same
    calls in the same order.
    """

    slots: Tensor

    def send(self, step: int, group: int, a: Tensor, b: Tensor) -> None:
        """Sends the planes of this rank's rows [.., R, pitch], all channels of the group."""

    def receive(self, step: int) -> None:
        """a and b of this rank's channels are here; those of its rows may be overwritten."""

    def give_back(self, step: int, group: int, product: Tensor) -> None:
        """Sends t of this rank's channels, and fills `product` [.., R, pitch], t of its rows."""

    def finish(self) -> None:
        """t of this rank's rows is here."""
