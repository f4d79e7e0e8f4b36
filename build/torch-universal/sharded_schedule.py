"""The forward and the backward of a triangle multiplication whose rows lie on several ranks.

`sharded` tells what the forward does. For each sequence, the backward does

    stage 3's backward      dt [D, R, pitch] of my R rows
    exchange                dt [G, L, pitch] of my channels, a group of G at a time; and a and b of
                            them, which stage 1 makes again, unless the forward has kept them
    the two products        da, db [G, L, pitch]
    exchange                da, db [D, R, pitch] of my rows, da over dt
    stage 1's backward      dx of my rows

A rank sends 5 (N - 1) / N^2 planes of the whole pair tensor, or 3 if a and b were kept. What
recompute="all" did not keep is made again with the forward's 3, and 3 more. Sums over k, i and j
are made in one place, as in the forward. Sums over pairs, which the parameters' gradients are, are
made on each rank and then added in the ranks' order.
"""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._call import DIFFERENTIABLE, FLAT, Call, Weights
from ._plan import Plan, note_on_gradients
from .agreement import compare
from .carriers import Carrier
from .carriers.copies import PeerMemory
from .carriers.memory import GroupMemory, known_memory_of, memory_of
from .carriers.messages import Messages
from .exchange import Exchange, Layout
from .paths import execution_path, path_of, say_once
from .validation import DIRECTIONS

# The calls of a group, in whose order all ranks make them, that have kept something.
_numbers: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


class Division(NamedTuple):
    """How pair tensors are divided among the ranks of a group, and what becomes of gradients."""

    group: dist.ProcessGroup | None
    dim: int
    length: int  # L
    parameter_grads: str = "sum"

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def layout(self, hidden: int, x: Tensor) -> Layout:
        """That of calls with D hidden channels, of which x is this rank's part."""
        return Layout.of(dist.get_world_size(self.group), self.length, hidden, x)

    def rows(self) -> slice:
        """This rank's residues along the axis."""
        return Layout(dist.get_world_size(self.group), self.length, 1).rows(self.rank)

    def by_rows(self, call: Call) -> Call:
        """The call with rows of x: if the pair tensor is divided by columns, its transpose's."""
        if self.dim == 1:
            return call
        return call._replace(
            x=call.x.transpose(1, 2),
            direction=DIRECTIONS[1 - DIRECTIONS.index(call.direction)],
            mask=None if call.mask is None else call.mask.transpose(1, 2),
            residual=None if call.residual is None else call.residual.transpose(1, 2),
            drop_mask=None if call.drop_mask is None else call.drop_mask[:, :, None],
            inplace=False,  # the result is transposed first
        )

    def facts(self, call: Call, saves: bool) -> dict[str, Any]:
        """What the ranks must agree on before a forward."""
        facts = {
            "B": call.x.shape[0], "L": self.length, "C": call.x.shape[3], "D": call.hidden,
            "dim": self.dim, "dtype": call.x.dtype, "direction": call.direction,
            "precision": call.precision, "memory": call.memory, "inplace": call.inplace,
            "path": execution_path(call.x.device, call.x.dtype).name,
            "lengths": call.lengths is not None, "eps": call.eps_in, "eps_out": call.eps_out,
            "requires_grad": saves,
        }  # fmt: skip
        if saves:
            facts |= {"recompute": call.recompute, "parameter_grads": self.parameter_grads}
        return facts


class Kept(NamedTuple):
    """What a forward keeps for its backward, None where it keeps nothing."""

    product: Tensor | None  # [B, D, R, pitch] of my rows
    moments: Tensor | None  # [B, 2, R, pitch] in fp32, on the Triton path
    channels: Tensor | None  # a and b of my channels: [B, 2, Dc, L, pitch]
    number: int  # of the call, among those of its group


def run_forward(division: Division, call: Call, saves: bool = False) -> tuple[Tensor, Kept | None]:
    """The output like x, and what is kept for a backward if the call `saves`.

    Planes and output are allocated, and stage 1 of the first sequence is done, before the ranks
    compare what they are about to do: whatever fails on a rank until then is known to all, and none
    waits for its planes. If a call needs more memory that all ranks have mapped than there is, they
    compare first, and then take it together.
    """
    shared = memory_of(division.group)
    failure, facts, ways = None, {}, [_Way(False, (), 0)]
    over, device = call.residual if call.inplace else None, call.x.device
    exchange = Exchange(division.group, division.rank, division.layout(call.hidden, call.x))
    with contextlib.ExitStack() as stack:
        try:
            found = division.facts(call, saves)
            call = division.by_rows(call)
            stages = stack.enter_context(path_of(call).stages(call, division.rows().start))
            ways, facts = _ways(call, stages, exchange.layout, shared), found
        except Exception as error:
            failure = error

        def prepare(way: _Way) -> _Buffers:
            buffers = _allocate(call, stages, exchange, way, saves)
            if buffers.out.numel():
                _project(stages, exchange.layout, buffers, 0, 0)
            return buffers

        try:
            way, buffers = _agreed(exchange, shared, device, facts, ways, prepare, failure)
        finally:
            failure = None  # its traceback holds this frame
        if way.lean and not ways[0].lean:
            say_once("runs in lean mode: an allocation of the default mode failed")
        number = _next_number(division.group) if saves else None
        keeps_product, moments = saves and call.keeps_product, None
        if division.length:
            with _carrier(exchange, shared, way, buffers, _slot_of_t(stages), call.x) as carrier:
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


def _slot_of_t(stages: Any) -> tuple[int]:
    """One of its own, or that of a."""
    return (2 if stages.slots == 3 else 0,)


def _agreed(
    exchange: Exchange,
    shared: GroupMemory | None,
    device: torch.device,
    facts: dict[str, Any],
    ways: list[_Way],
    prepare: Callable[[_Way], Any],
    failure: Exception | None,
) -> tuple[_Way, Any]:
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
def _carrier(
    exchange: Exchange,
    shared: GroupMemory | None,
    way: _Way,
    buffers: _Buffers | _BackwardBuffers,
    made: tuple[int, ...],
    x: Tensor,
) -> Iterator[Carrier]:
    """What moves the planes of a way, which are like x; messages fill the slots of `buffers`."""
    if way.mapped:
        with shared.carrier(exchange, way.slots, x.dtype, made) as carrier:
            yield carrier
    else:
        yield Messages(exchange, buffers.slots, made)


def _next_number(group: dist.ProcessGroup | None) -> int:
    group = dist.group.WORLD if group is None else group
    _numbers[group] = _numbers.get(group, 0) + 1
    return _numbers[group]


def run_backward(
    division: Division, call: Call, grad_out: Tensor, kept: Kept, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients that `needs` names, out of `DIFFERENTIABLE`, each like its leaf.

    As in the forward, memory is allocated before the ranks compare what they are about to do.

    Args:
        call: the forward's. Residual and inplace don't matter.
        grad_out: like x, any strides.
    """
    failure, facts = None, {"pass": "backward", "call": kept.number, "gradients": needs}
    shared, ways, prepare = memory_of(division.group), [_Way(False, (), 0)], None
    by_columns = division.dim == 2
    exchange = Exchange(division.group, division.rank, division.layout(call.hidden, call.x))
    leaves, call = call, division.by_rows(call)
    grad_out = grad_out.transpose(1, 2) if by_columns else grad_out
    # Those of what all ranks have whole, which are sums over the ranks.
    summed = set() if by_columns else {"drop_mask"} & needs
    if division.parameter_grads == "sum":
        summed |= needs.intersection(Weights._fields)
    with contextlib.ExitStack() as stack:
        try:
            grads = _empty_gradients(call, needs, summed)
            stages = stack.enter_context(
                path_of(call).gradient_stages(call, division.rows().start, needs, grads)
            )
            ways = _backward_ways(call, stages, exchange.layout, kept, shared)
            prepare = functools.partial(_allocate_backward, call, stages, exchange, kept)
        except Exception as error:
            failure = error
        try:
            way, buffers = _agreed(exchange, shared, call.x.device, facts, ways, prepare, failure)
        finally:
            failure = None  # as above
        for index in range(call.x.shape[0] if division.length else 0):
            _run_backward_stages(
                stages, exchange, shared, way, buffers, index, grad_out[index], kept, by_columns
            )
        # On a rank without rows they are zeros.
        grads |= stages.of_parameters()
    del buffers, stages, prepare  # before the copies
    if summed:
        names = [name for name in DIFFERENTIABLE if name in summed]
        sums = _sums_over_ranks(division.group, [grads[name] for name in names])
        grads |= dict(zip(names, sums, strict=True))
    leaves = dict(zip(FLAT, leaves.flat(), strict=True))
    for name in needs:
        grad = grads[name].transpose(1, 2) if by_columns and name in ("x", "mask") else grads[name]
        grads[name] = grad.to(leaves[name].dtype).reshape(leaves[name].shape).contiguous()
    return grads


def _empty_gradients(call: Call, needs: frozenset[str], shared: set[str]) -> dict[str, Tensor]:
    """Memory for those of x, the mask and the drop mask; zeros if this rank adds nothing."""
    found = {}
    for name in needs - set(Weights._fields):
        leaf = getattr(call, name)
        dtype = torch.promote_types(call.x.dtype, torch.float32) if name in shared else leaf.dtype
        make = torch.empty if call.x.numel() else torch.zeros
        found[name] = make(leaf.shape, dtype=dtype, device=leaf.device)
    return found


def _sums_over_ranks(group: dist.ProcessGroup | None, values: list[Tensor]) -> list[Tensor]:
    """Each of the values, all of one dtype, summed in the order of the ranks."""
    flat = torch.cat([value.reshape(-1) for value in values])
    of_all = [torch.empty_like(flat) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_all, flat, group)
    total = of_all[0]
    for other in of_all[1:]:
        total += other
    parts = total.split([value.numel() for value in values])
    # Copies, as outputs of an op share no memory.
    return [part.view(value.shape).clone() for part, value in zip(parts, values, strict=True)]


class _Way(NamedTuple):
    """A way to run a forward or a backward."""

    lean: bool
    slots: tuple[int, ...]  # [depth, S, G, L, pitch], the planes that stage 2 works on
    mapped: int  # bytes that all ranks map, with these planes; 0 if messages fill them


def _ways(
    call: Call, stages: Any, layout: Layout, shared: GroupMemory | None
) -> list[_Way]:
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
        ways += _by_copies(call, stages, layout, shared, lean, (1 + twice, *planes))
        ways.append(_Way(lean, (1 + fit, *planes), 0))
    return ways


def _by_copies(
    call: Call,
    stages: Any,
    layout: Layout,
    shared: GroupMemory | None,
    lean: bool,
    slots: tuple[int, ...],
) -> list[_Way]:
    """The way with these slots in memory that all ranks map, if it is worth a try.

    Where t lies over a, there would be no slots for what is made alone.
    """
    if shared is None or stages.slots != 3 or not call.x.shape[0] or not layout.length:
        return []
    mapped = PeerMemory.bytes_for(layout.ranks, slots, call.x.dtype)
    return [_Way(lean, slots, mapped)] if shared.takes(mapped, call.x.device) else []


class _Buffers(NamedTuple):
    """All large memory of a forward but what all ranks map."""

    planes: Tensor  # of a and b of my rows: [2, D, R, pitch], or in lean mode of one group
    product: Tensor  # [B, D, R, pitch] of my rows; sequences share it, unless it is kept
    slots: Tensor | None  # [depth, 2 or 3, G, L, pitch]; None if all ranks map them
    channels: Tensor | None  # operands of my channels [B, 2, Dc, L, pitch], if they are kept
    out: Tensor | None  # [B, R, L, C]; None where stage 3 doesn't follow

    @property
    def lean(self) -> bool:
        return self.planes.shape[1] < self.product.shape[1]


def _allocate(
    call: Call, stages: Any, exchange: Exchange, way: _Way, saves: bool = False
) -> _Buffers:
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
    return _Buffers(planes, product.expand(batch, -1, -1, -1), slots, channels, out)


def _project(stages: Any, layout: Layout, buffers: _Buffers, index: int, group: int) -> None:
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
    buffers: _Buffers,
    by_columns: bool,
    saves: bool,
) -> Tensor | None:
    """All stages but the first `_project`; returns the moments, if they are kept."""
    moments = []
    for index in range(len(buffers.out)):
        first = index * exchange.layout.groups
        _multiply(stages, exchange, carrier, buffers, index, by_columns, first, begun=index == 0)
        if buffers.out.numel():
            stages.emit(index, buffers.product[index], buffers.out[index])
            if saves and stages.moments is not None:
                moments.append(stages.moments)
    return torch.cat(moments) if moments else None


def _multiply(
    stages: Any,
    exchange: Exchange,
    carrier: Carrier,
    buffers: _Buffers,
    index: int,
    by_columns: bool,
    first: int = 0,
    begun: bool = False,
) -> None:
    """The product of my rows of a sequence, in steps from `first` on.

    `_project` may have begun the first group.
    """
    layout, product = exchange.layout, buffers.product[index]

    def send(step: int, group: int) -> None:
        if product.numel() and not (begun and group == 0):
            _project(stages, layout, buffers, index, group)
        channels = layout.group(group)
        if buffers.lean:
            channels = slice(channels.stop - channels.start)
        carrier.send(step, group, _operands(buffers.planes[:, channels], by_columns))

    def multiply(step: int, group: int, own: Tensor) -> None:
        if buffers.channels is not None:
            mine = layout.own_channels(exchange.rank, group)
            buffers.channels[index, :, mine].copy_(own[:2])
        if own.numel():
            stages.multiply(index, *own)
        carrier.give_back(step, group, [product[layout.group(group)]])

    _by_groups(exchange, carrier, first, send, multiply)


def _by_groups(
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


def _operands(planes: Tensor, by_columns: bool) -> tuple[Tensor, ...]:
    """The left and the right operand of the product, of planes [2, ..] of a and b.

    By columns, t is that of the transposed x: the other direction's product of b and a.
    """
    return planes.unbind()[:: -1 if by_columns else 1]


class _BackwardBuffers(NamedTuple):
    """All large memory of a backward but the gradients, and what all ranks map."""

    planes: Tensor  # [2, D, R, pitch] of my rows: dt, then da and db
    sent: Tensor | None  # a and b of a group of my rows [2, .., R, pitch], if not kept
    slots: Tensor  # [1, 2 to 4, G, L, pitch], which messages fill, and then scratch
    again: _Buffers | None  # of a product that was not kept


def _remade(kept: Kept) -> bool:
    """Whether stage 1 makes a and b of a group again for the products of the backward."""
    return kept.channels is None and kept.product is not None


def _backward_ways(
    call: Call, stages: Any, layout: Layout, kept: Kept, shared: GroupMemory | None
) -> list[_Way]:
    """As `_ways`. Of the slots, those of operands are dt and, if they are made again, a and b."""
    remade, planes = _remade(kept), (layout.size, layout.length, stages.pitch)
    # There is one memory for a and b of a group of my rows.
    twice = layout.groups > 1 and not remade and call.memory != "lean"
    slots = 1 + twice, 3 + 2 * remade, *planes
    return [
        *_by_copies(call, stages, layout, shared, False, slots),
        _Way(False, (1, stages.slots + remade, *planes), 0),
    ]


def _slots_of_gradients(stages: Any, way: _Way, remade: bool) -> tuple[int, int]:
    """Those of da and db. By messages db may lie over b, and da over dt where t may over a."""
    operands = 3 if remade else 1
    return (
        0 if stages.slots == 2 else way.slots[1] - 1,
        operands - 1 if remade and not way.mapped else operands,
    )


def _allocate_backward(
    call: Call, stages: Any, exchange: Exchange, kept: Kept, way: _Way
) -> _BackwardBuffers:
    x, layout = call.x, exchange.layout
    batch, rows = x.shape[:2]
    planes = x.new_empty(2, call.hidden, rows, stages.pitch)
    again, sent, remade = None, None, _remade(kept)
    slots = x.new_empty(1, stages.slots + remade, *way.slots[2:])
    if kept.product is None:
        # a and b of all my channels, or they would be exchanged again beside dt.
        channels = x.new_empty(1, 2, layout.channel_count(exchange.rank), *way.slots[3:])
        product = x.new_empty(1, call.hidden, rows, stages.pitch).expand(batch, -1, -1, -1)
        channels = channels.expand(batch, -1, -1, -1, -1)
        again = _Buffers(planes, product, slots, channels, None)
    if remade:
        group = layout.group(0)
        sent = x.new_empty(2, group.stop - group.start, rows, stages.pitch)
    return _BackwardBuffers(planes, sent, slots, again)


def _run_backward_stages(
    stages: Any,
    exchange: Exchange,
    shared: GroupMemory | None,
    way: _Way,
    buffers: _BackwardBuffers,
    index: int,
    grad_out: Tensor,
    kept: Kept,
    by_columns: bool,
) -> None:
    """The gradients of one sequence, grad_out [R, L, C]."""
    layout, has_rows, remade = exchange.layout, grad_out.numel() > 0, _remade(kept)
    planes, again, moments = buffers.planes, buffers.again, kept.moments
    product, kept_channels = kept.product, kept.channels
    if again is not None:
        with _carrier(exchange, shared, way, again, _slot_of_t(stages), planes) as carrier:
            _multiply(stages, exchange, carrier, again, index, by_columns)
        product, kept_channels = again.product, again.channels
    if has_rows:
        moments = stages.moments if moments is None else moments[index : index + 1]
        stages.begin(index, grad_out, product[index], moments)
        stages.through_emission(planes[0], planes[1])

    def send(step: int, group: int) -> None:
        channels, operands = layout.group(group), ()
        if remade:
            sent = buffers.sent[:, : channels.stop - channels.start]
            if has_rows:
                stages.project(index, sent, channels)
            operands = _operands(sent, by_columns)
        carrier.send(step, group, [planes[0, channels], *operands])

    def multiply(step: int, group: int, own: Tensor) -> None:
        grads = [own[slot] for slot in made]
        mine = layout.own_channels(exchange.rank, group)
        operands = own[1:3] if remade else kept_channels[index, :, mine]
        if own.numel():
            stages.multiply_gradients(index, own[0], *operands, *grads)
        rows = _operands(planes[:, layout.group(group)], by_columns)
        carrier.give_back(step, group, rows)

    if stages.behind_product:
        made = _slots_of_gradients(stages, way, remade)
        with _carrier(exchange, shared, way, buffers, made, planes) as carrier:
            _by_groups(exchange, carrier, 0, send, multiply)
    if has_rows:
        stages.through_inputs(planes, buffers.slots[0])


def plan(division: Division, call: Call) -> Plan:
    """The buffers of a call, and what the rank sends."""
    rows, rank, saves = division.rows(), division.rank, call.needs_grad
    exchange = Exchange(division.group, rank, division.layout(call.hidden, call.x))
    call, layout = division.by_rows(call), exchange.layout
    with path_of(call).stages(call, rows.start) as stages:
        pitch = stages.pitch
        shared = known_memory_of(division.group)
        way = _ways(call, stages, layout, shared)[0]
        x = torch.empty(call.x.shape, dtype=call.x.dtype, device="meta")
        on_meta = call._replace(x=x, residual=x)
        made = _allocate(on_meta, stages, exchange, way, saves)
        kept = Kept(made.product if saves and call.keeps_product else None, None, made.channels, 0)
        backward_way = _backward_ways(call, stages, layout, kept, shared)[0]
        backward = _allocate_backward(on_meta, stages, exchange, kept, backward_way)
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
    if call.precision == "fp16x3":
        notes.append("precision 'fp16x3' is run as TF32x3: ranks exchange no split numbers")
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
            operands = 3 if _remade(kept) else 1
            beside["packed"] = package * _packages(layout, backward_way, operands, 2)
        notes.append(
            "for each sequence the backward "
            f"{_sent(layout, rank, exchanged, pitch, x, backward_way, packed)}; it holds "
            f"{sum(beside.values()) / x.nbytes if x.nbytes else 0:.2f} such tensors beside "
            "the gradients"
        )
    mode = "lean" if way.lean else "default"
    return Plan(mode, None, [], buffers, sum(buffers.values()), bytes_kept, notes)


def _packages(layout: Layout, way: _Way, operands: int, made: int) -> int:
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
    way: _Way,
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
