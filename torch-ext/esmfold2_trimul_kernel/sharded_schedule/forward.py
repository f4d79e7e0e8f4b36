"""The forward on the rows of a rank: see `sharded`."""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._call import Call
from ..carriers import Carrier
from ..carriers.memory import GroupMemory, memory_of
from ..exchange import Exchange, Layout
from ..paths import path_of, say_once
from .division import Division, Kept, next_number
from .ways import Way, agreed, by_copies, carrier_of


def run_forward(division: Division, call: Call, saves: bool = False) -> tuple[Tensor, Kept | None]:
    """The output like x, and what is kept for a backward if the call `saves`.

    Planes and output are allocated, and stage 1 of the first sequence is done, before the ranks
    compare what they are about to do: whatever fails on a rank until then is known to all, and none
    waits for its planes. If a call needs more memory that all ranks have mapped than there is, they
    compare first, and then take it together.
    """
    shared = memory_of(division.group)
    failure, facts, ways = None, {}, [Way(False, (), 0)]
    over, device = call.residual if call.inplace else None, call.x.device
    exchange = Exchange(division.group, division.rank, division.layout(call.hidden, call.x))
    with contextlib.ExitStack() as stack:
        try:
            found = division.facts(call, saves)
            call = division.by_rows(call)
            stages = stack.enter_context(path_of(call).stages(call, division.rows().start))
            ways, facts = ways_of(call, stages, exchange.layout, shared), found
        except Exception as error:
            failure = error

        def prepare(way: Way) -> Buffers:
            buffers = allocate(call, stages, exchange, way, saves)
            if buffers.out.numel():
                project(stages, exchange.layout, buffers, 0, 0)
            return buffers

        try:
            way, buffers = agreed(exchange, shared, device, facts, ways, prepare, failure)
        finally:
            failure = None  # its traceback holds this frame
        if way.lean and not ways[0].lean:
            say_once("runs in lean mode: an allocation of the default mode failed")
        number = next_number(division.group) if saves else None
        keeps_product, moments = saves and call.keeps_product, None
        if division.length:
            made = slot_of_t(stages)
            with carrier_of(exchange, shared, way, buffers.slots, made, call.x) as carrier:
                moments = _run_stages(
                    stages, exchange, carrier, buffers, division.dim == 2, keeps_product
                )
    out, kept = buffers.out, None
    if saves:
        product = buffers.product if keeps_product else None
        kept = Kept(product, moments, buffers.channels, number)
    del buffers  # before the copy
    if division.dim == 2:
        out = out.transpose(1, 2)
        out = out.contiguous() if over is None else over.copy_(out)
    return out, kept


def slot_of_t(stages: Any) -> tuple[int]:
    """One of its own, or that of a."""
    return (2 if stages.slots == 3 else 0,)


def ways_of(
    call: Call, stages: Any, layout: Layout, shared: GroupMemory | None
) -> list[Way]:
    """The ways to run a call, the best first; the same on all ranks.

    In the default mode two groups are under way at once: with messages if their planes fit in the
    output, so that they cost no memory.
    """
    ways = []
    planes = stages.slots, layout.size, layout.length, stages.pitch
    room = 0 if call.inplace else layout.rows(0).stop * math.prod(call.x.shape[2:])
    for lean in {"auto": (False, True), "default": (False,), "lean": (True,)}[call.memory]:
        twice = not lean and layout.groups > 1
        fit = twice and 2 * math.prod(planes) <= room
        ways += by_copies(call, stages, layout, shared, lean, (1 + twice, *planes))
        ways.append(Way(lean, (1 + fit, *planes), 0))
    return ways


class Buffers(NamedTuple):
    """All large memory of a forward but what all ranks map."""

    planes: Tensor  # of a and b of my rows: [2, D, R, pitch], or in lean mode of one group
    product: Tensor  # [B, D, R, pitch] of my rows; sequences share it, unless it is kept
    slots: Tensor | None  # [depth, 2 or 3, G, L, pitch]; None if all ranks map them
    channels: Tensor | None  # operands of my channels [B, 2, Dc, L, pitch], if they are kept
    out: Tensor | None  # [B, R, L, C]; None where stage 3 doesn't follow

    @property
    def lean(self) -> bool:
        return self.planes.shape[1] < self.product.shape[1]


def allocate(
    call: Call, stages: Any, exchange: Exchange, way: Way, saves: bool = False
) -> Buffers:
    """The buffers of a call. By default t is received over a, whose planes have been sent.

    Where they fit, the slots lie in the last sequence of the output, which is written last.
    """
    x, layout = call.x, exchange.layout
    batch, rows = x.shape[:2]
    keeps_product, channels = saves and call.keeps_product, None
    group = layout.group(0)
    at_once = group.stop - group.start if way.lean else call.hidden
    planes = x.new_empty(2, at_once, rows, stages.pitch)
    product = planes[:1]
    if at_once < call.hidden or keeps_product:
        count = batch if keeps_product else 1
        product = x.new_empty(count, call.hidden, rows, stages.pitch)
    if saves and call.keeps_planes:
        mine = layout.channel_count(exchange.rank), layout.length, stages.pitch
        channels = x.new_empty(batch, 2, *mine)
    out, slots = call.residual if call.inplace else x.new_empty(x.shape), None
    if not way.mapped:
        memory, count = out[-1:].view(-1), math.prod(way.slots)
        if call.inplace or memory.numel() < count or memory.data_ptr() % 16:
            memory = x.new_empty(count)
        slots = memory[:count].view(way.slots)
    return Buffers(planes, product.expand(batch, -1, -1, -1), slots, channels, out)


def project(stages: Any, layout: Layout, buffers: Buffers, index: int, group: int) -> None:
    """Stage 1 of all channels before the first group of a sequence, or in lean mode of each."""
    if buffers.lean:
        channels = layout.group(group)
        planes = buffers.planes[:, : channels.stop - channels.start]
        stages.project(index, planes, channels)
    elif group == 0:
        stages.project(index, buffers.planes)


def _run_stages(
    stages: Any,
    exchange: Exchange,
    carrier: Carrier,
    buffers: Buffers,
    by_columns: bool,
    saves: bool,
) -> Tensor | None:
    """All stages but the first `project`; returns the moments, if they are kept."""
    moments = []
    for index in range(len(buffers.out)):
        first = index * exchange.layout.groups
        multiply_by_groups(
            stages, exchange, carrier, buffers, index, by_columns, first, begun=index == 0
        )
        if buffers.out.numel():
            stages.emit(index, buffers.product[index], buffers.out[index])
            if saves and stages.moments is not None:
                moments.append(stages.moments)
    return torch.cat(moments) if moments else None


def multiply_by_groups(
    stages: Any,
    exchange: Exchange,
    carrier: Carrier,
    buffers: Buffers,
    index: int,
    by_columns: bool,
    first: int = 0,
    begun: bool = False,
) -> None:
    """The product of my rows of a sequence, in steps from `first` on.

    `project` may have begun the first group.
    """
    layout, product = exchange.layout, buffers.product[index]

    def send(step: int, group: int) -> None:
        if product.numel() and not (begun and group == 0):
            project(stages, layout, buffers, index, group)
        channels = layout.group(group)
        if buffers.lean:
            channels = slice(channels.stop - channels.start)
        carrier.send(step, group, operands_of(buffers.planes[:, channels], by_columns))

    def multiply(step: int, group: int, own: Tensor) -> None:
        if buffers.channels is not None:
            mine = layout.own_channels(exchange.rank, group)
            buffers.channels[index, :, mine].copy_(own[:2])
        if own.numel():
            stages.multiply(index, *own)
        carrier.give_back(step, group, [product[layout.group(group)]])

    by_groups(exchange, carrier, first, send, multiply)


def by_groups(
    exchange: Exchange,
    carrier: Carrier,
    first: int,
    send: Callable[[int, int], None],
    multiply: Callable[[int, int, Tensor], None],
) -> None:
    """Each group of channels, in steps from `first` on: sent, multiplied in its slots, given back.

    Where two groups may be under way, the next one's planes travel during stage 2 of a group.
    """
    depth, groups = len(carrier.slots), exchange.layout.groups
    for group in range(groups):
        step = first + group
        if group == 0 or depth == 1:
            send(step, group)
        if group + 1 < groups and depth == 2:
            send(step + 1, group + 1)
        carrier.receive(step)
        multiply(step, group, exchange.own(carrier.slots[step % depth], group))
    carrier.finish()


def operands_of(planes: Tensor, by_columns: bool) -> tuple[Tensor, ...]:
    """The left and the right operand of the product, of planes [2, ..] of a and b.

    By columns, t is that of the transposed x: the other direction's product of b and a.
    """
    return planes.unbind()[:: -1 if by_columns else 1]
