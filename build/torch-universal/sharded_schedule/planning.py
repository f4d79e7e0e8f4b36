"""What a call on the rows of a rank would allocate and send."""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

from typing import Any

import torch
from torch import Tensor

from .._call import Call
from .._plan import Plan, note_on_gradients
from ..carriers.memory import known_memory_of
from ..exchange import Exchange, Layout
from ..paths import path_of
from .backward import allocate_backward, is_remade, ways_of_backward
from .division import Division, Kept
from .forward import allocate, ways_of
from .ways import Way


def plan(division: Division, call: Call) -> Plan:
    """The buffers of a call, and what the rank sends."""
    rows, rank, saves = division.rows(), division.rank, call.needs_grad
    exchange = Exchange(division.group, rank, division.layout(call.hidden, call.x))
    call, layout = division.by_rows(call), exchange.layout
    with path_of(call).stages(call, rows.start) as stages:
        pitch = stages.pitch
        shared = known_memory_of(division.group)
        way = ways_of(call, stages, layout, shared)[0]
        x = torch.empty(call.x.shape, dtype=call.x.dtype, device="meta")
        on_meta = call._replace(x=x, residual=x)
        made = allocate(on_meta, stages, exchange, way, saves)
        kept = Kept(made.product if saves and call.keeps_product else None, None, made.channels, 0)
        backward_way = ways_of_backward(call, stages, layout, kept, shared)[0]
        backward = allocate_backward(on_meta, stages, exchange, kept, backward_way)
    buffers = _bytes(
        {
            "a and b": made.planes,
            "product": made.product,
            "output": made.out,
            "planes of a group, of all rows": made.slots,
            "a and b of this rank's channels": made.channels,
        },
        x,
    )
    packed = exchange.packs(call.x, pitch)
    if way.mapped:
        mapped = max(way.mapped, backward_way.mapped if saves else 0)
        buffers["planes that all ranks map, which are kept"] = mapped
    elif packed and layout.ranks > 1:
        of_others = division.length - (rows.stop - rows.start)
        package = layout.size * of_others * pitch * x.element_size()
        buffers["packed messages"] = package * _packages(layout, way, 2, 1)
    moments = stages.moment_bytes * (rows.stop - rows.start) * pitch
    if moments:
        buffers["moments"] = moments
    notes = [
        f"rank {rank} of {layout.ranks} has residues {rows.start} to {rows.stop} of "
        f"{division.length} along axis {division.dim}, and multiplies {layout.channel_count(rank)} "
        f"of {call.hidden} channels, in {layout.groups} groups",
        f"for each sequence it {_sent(layout, rank, (2, 1), pitch, x, way, packed)}",
    ]
    if way.slots[0] == 2 and (way.mapped or not call.x.is_cuda):  # NCCL and stage 2 take turns
        notes.append("a group's planes travel during stage 2 of another")
    if stages.would_split or call.precision == "fp16x3":
        notes.append(
            "precision 'fp16x3' is run as TF32x3, and by default as torch's setting says: ranks "
            "exchange no split numbers"
        )
    if call.memory == "auto":
        notes.append("all ranks go lean where an allocation of this mode fails on one")
    bytes_kept = 0
    if saves:
        if call.keeps_product:
            bytes_kept = buffers["product"] + moments * len(x)
            bytes_kept += buffers.get("a and b of this rank's channels", 0)
        notes.append(note_on_gradients(call, call.keeps_planes))
        exchanged = {"none": (1, 2), "product": (3, 2), "all": (3, 3)}[call.recompute]
        again = backward.again or (None,) * 5
        beside = _bytes(dict(enumerate((*backward[:3], again[1], again[3]))), x)
        if "packed messages" in buffers:
            operands = 3 if is_remade(kept) else 1
            beside["packed"] = package * _packages(layout, backward_way, operands, 2)
        notes.append(
            "for each sequence the backward "
            f"{_sent(layout, rank, exchanged, pitch, x, backward_way, packed)}; it holds "
            f"{sum(beside.values()) / x.nbytes if x.nbytes else 0:.2f} such tensors beside "
            "the gradients"
        )
    mode = "lean" if way.lean else "default"
    return Plan(mode, None, [], buffers, sum(buffers.values()), bytes_kept, notes)


def _packages(layout: Layout, way: Way, operands: int, made: int) -> int:
    """The most packed messages at once, each of a group's planes that a rank gets of the others.

    Those of operands, and those that have been sent of what earlier groups made.
    """
    depth = way.slots[0]
    return operands * depth + made * max(0, min(depth, layout.groups - depth))


def _sent(
    layout: Layout,
    rank: int,
    exchanged: tuple[int, int],
    pitch: int,
    like: Tensor,
    way: Way,
    packed: bool,
) -> str:
    messages, rows = layout.sent(rank, *exchanged)
    size = f"{rows * pitch * like.element_size() / 2**20:,.1f} MiB"
    if way.mapped:
        return f"copies {size}"
    return f"sends {size}, packed" if packed else f"sends {messages:,} messages, {size}"


def _bytes(named: dict[Any, Tensor | None], given: Tensor) -> dict[Any, int]:
    """The memory of each tensor that the others before it, and `given`, do not share."""
    known, found = {given.untyped_storage()._cdata}, {}
    for name, tensor in named.items():
        if tensor is not None and tensor.untyped_storage()._cdata not in known:
            known.add(tensor.untyped_storage()._cdata)
            found[name] = tensor.untyped_storage().nbytes()
    return found
