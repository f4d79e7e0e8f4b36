"""The backward on the rows of a rank. For each sequence it does

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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .._call import DIFFERENTIABLE, FLAT, Call, Weights, as_made
from ..carriers.memory import GroupMemory, memory_of
from ..exchange import Exchange, Layout
from ..paths import path_of
from .division import Division, Kept
from .forward import Buffers, by_groups, multiply_by_groups, operands_of, slot_of_t
from .ways import Way, agreed, by_copies, carrier_of


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
    shared, ways, prepare = memory_of(division.group), [Way(False, (), 0)], None
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
            kept = Kept(*as_made(*kept[:-1]), kept.number)
            grads = _empty_gradients(call, needs, summed)
            stages = stack.enter_context(
                path_of(call).gradient_stages(call, division.rows().start, needs, grads)
            )
            ways = ways_of_backward(call, stages, exchange.layout, kept, shared)
            prepare = functools.partial(allocate_backward, call, stages, exchange, kept)
        except Exception as error:
            failure = error
        try:
            way, buffers = agreed(exchange, shared, call.x.device, facts, ways, prepare, failure)
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


class BackwardBuffers(NamedTuple):
    """All large memory of a backward but the gradients, and what all ranks map."""

    planes: Tensor  # [2, D, R, pitch] of my rows: dt, then da and db
    sent: Tensor | None  # a and b of a group of my rows [2, .., R, pitch], if not kept
    slots: Tensor  # [1, 2 to 4, G, L, pitch], which messages fill, and then scratch
    again: Buffers | None  # of a product that was not kept


def is_remade(kept: Kept) -> bool:
    """Whether stage 1 makes a and b of a group again for the products of the backward."""
    return kept.channels is None and kept.product is not None


def ways_of_backward(
    call: Call, stages: Any, layout: Layout, kept: Kept, shared: GroupMemory | None
) -> list[Way]:
    """As `ways_of`. Of the slots, those of operands are dt and, if they are made again, a and b."""
    remade, planes = is_remade(kept), (layout.size, layout.length, stages.pitch)
    # There is one memory for a and b of a group of my rows.
    twice = layout.groups > 1 and not remade and call.memory != "lean"
    slots = 1 + twice, 3 + 2 * remade, *planes
    return [
        *by_copies(call, stages, layout, shared, False, slots),
        Way(False, (1, stages.slots + remade, *planes), 0),
    ]


def _slots_of_gradients(stages: Any, way: Way, remade: bool) -> tuple[int, int]:
    """Those of da and db. By messages db may lie over b, and da over dt where t may over a."""
    operands = 3 if remade else 1
    return (
        0 if stages.slots == 2 else way.slots[1] - 1,
        operands - 1 if remade and not way.mapped else operands,
    )


def allocate_backward(
    call: Call, stages: Any, exchange: Exchange, kept: Kept, way: Way
) -> BackwardBuffers:
    x, layout = call.x, exchange.layout
    batch, rows = x.shape[:2]
    planes = x.new_empty(2, call.hidden, rows, stages.pitch)
    again, sent, remade = None, None, is_remade(kept)
    slots = x.new_empty(1, stages.slots + remade, *way.slots[2:])
    if kept.product is None:
        # a and b of all my channels, or they would be exchanged again beside dt.
        channels = x.new_empty(1, 2, layout.channel_count(exchange.rank), *way.slots[3:])
        product = x.new_empty(1, call.hidden, rows, stages.pitch).expand(batch, -1, -1, -1)
        channels = channels.expand(batch, -1, -1, -1, -1)
        again = Buffers(planes, product, slots, channels, None)
    if remade:
        group = layout.group(0)
        sent = x.new_empty(2, group.stop - group.start, rows, stages.pitch)
    return BackwardBuffers(planes, sent, slots, again)


def _run_backward_stages(
    stages: Any,
    exchange: Exchange,
    shared: GroupMemory | None,
    way: Way,
    buffers: BackwardBuffers,
    index: int,
    grad_out: Tensor,
    kept: Kept,
    by_columns: bool,
) -> None:
    """The gradients of one sequence, grad_out [R, L, C]."""
    layout, has_rows, remade = exchange.layout, grad_out.numel() > 0, is_remade(kept)
    planes, again, moments = buffers.planes, buffers.again, kept.moments
    product, kept_channels = kept.product, kept.channels
    if again is not None:
        with carrier_of(exchange, shared, way, again.slots, slot_of_t(stages), planes) as carrier:
            multiply_by_groups(stages, exchange, carrier, again, index, by_columns)
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
            operands = operands_of(sent, by_columns)
        carrier.send(step, group, [planes[0, channels], *operands])

    def multiply(step: int, group: int, own: Tensor) -> None:
        grads = [own[slot] for slot in made]
        mine = layout.own_channels(exchange.rank, group)
        operands = own[1:3] if remade else kept_channels[index, :, mine]
        if own.numel():
            stages.multiply_gradients(index, own[0], *operands, *grads)
        rows = operands_of(planes[:, layout.group(group)], by_columns)
        carrier.give_back(step, group, rows)

    if stages.behind_product:
        made = _slots_of_gradients(stages, way, remade)
        with carrier_of(exchange, shared, way, buffers.slots, made, planes) as carrier:
            by_groups(exchange, carrier, 0, send, multiply)
    if has_rows:
        stages.through_inputs(planes, buffers.slots[0])
