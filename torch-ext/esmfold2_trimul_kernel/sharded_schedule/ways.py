"""Ways to run a forward or a backward, of which all ranks take the first that fits all memories."""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._call import Call
from ..agreement import compare
from ..carriers import Carrier
from ..carriers.copies import PeerMemory
from ..carriers.memory import GroupMemory
from ..carriers.messages import Messages
from ..exchange import Exchange, Layout


class Way(NamedTuple):
    """A way to run a forward or a backward."""

    lean: bool
    slots: tuple[int, ...]  # [depth, S, G, L, pitch], the planes that stage 2 works on
    mapped: int  # bytes that all ranks map, with these planes; 0 if messages fill them


def by_copies(
    call: Call,
    stages: Any,
    layout: Layout,
    shared: GroupMemory | None,
    lean: bool,
    slots: tuple[int, ...],
) -> list[Way]:
    """The way with these slots in memory that all ranks map, if it is worth a try.

    Where t lies over a, there would be no slots for what is made alone.
    """
    if shared is None or stages.slots != 3 or not call.x.shape[0] or not layout.length:
        return []
    mapped = PeerMemory.bytes_for(layout.ranks, slots, call.x.dtype)
    return [Way(lean, slots, mapped)] if shared.takes(mapped, call.x.device) else []


def agreed(
    exchange: Exchange,
    shared: GroupMemory | None,
    device: torch.device,
    facts: dict[str, Any],
    ways: list[Way],
    prepare: Callable[[Way], Any],
    failure: Exception | None,
) -> tuple[Way, Any]:
    """The first way for which all ranks have the memory, and what `prepare` made for it.

    Raises:
        Exception: `failure`, or what another rank told.
    """

    def compared(last: bool) -> bool:
        of_way = {}
        if facts and shared is not None:
            of_way = {"exchange_memory": shared.bytes(device), "mapped": way.mapped}
        return compare(exchange.group, facts | of_way, failure, last)

    made = None
    try:
        for way in ways:
            if failure is None and way.mapped and shared.bytes(device) < way.mapped:
                compared(last=True)
                if not shared.grow(way.mapped, device):
                    continue
            try:
                if failure is None:
                    made = prepare(way)
            except Exception as error:
                failure = error
            if compared(last=way is ways[-1]):
                break
            failure = made = None
            if way.mapped:
                shared.refuse(way.mapped)  # the next way needs the memory elsewhere
    finally:
        failure = None  # its traceback holds this frame, and so what was made
    return way, made


@contextlib.contextmanager
def carrier_of(
    exchange: Exchange,
    shared: GroupMemory | None,
    way: Way,
    slots: Tensor | None,
    made: tuple[int, ...],
    x: Tensor,
) -> Iterator[Carrier]:
    """What moves the planes of a way, which are like x; messages fill `slots`."""
    if way.mapped:
        with shared.carrier(exchange, way.slots, x.dtype, made) as carrier:
            yield carrier
    else:
        yield Messages(exchange, slots, made)
