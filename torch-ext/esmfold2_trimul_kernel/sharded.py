"""The triangle multiplication of a pair tensor whose rows lie on several ranks.

The product t is D independent products of planes [L, L]. A rank that has whole planes of some
channels multiplies them alone, so rows are exchanged for channels around stage 2:

    stage 1    a, b [D, R, pitch] of my R rows
    exchange   a, b [G, L, pitch] of my channels, a group of G at a time
    stage 2    t    [G, L, pitch]
    exchange   t    [D, R, pitch] of my rows, over a
    stage 3    the output of my rows

Each sum is made in one place, in one process's order and of the same rounded values. A rank sends
3 (N - 1) / N^2 planes of the whole pair tensor, N ranks, for either direction, by one of the
`carriers`. Planes have the axes of x, so what travels are the rows of one channel for one rank:
contiguous at both ends, without a packed copy. Columns are rows of the transposed x, for which t is
the other direction's product of b and a.

Memory beyond the arguments, in a rank's share of one pair tensor where C = D, if a rank has eight
channels or more (with fewer there are fewer groups):

    default   a and b, 2; the planes [G, L, pitch] of two groups, 3/4; the output
    lean      t, 1; a and b of a group, 1/4; the planes [G, L, pitch], 3/8; the output

In the default mode one group travels while another is multiplied. Sequences share all but the
output. Messages fill planes that lie in the output's memory where they fit, unless that is the
residual, for which one group at a time has 3/8. Copies fill planes in memory that all ranks map.
In lean mode stage 1 runs once for each group and reads x each time.
"""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import contextlib
import enum
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._call import Call, Weights
from ._plan import Plan
from .agreement import as_integer, compare, refuse
from .carriers import Carrier
from .carriers.copies import PeerMemory
from .carriers.memory import GroupMemory, known_memory_of, memory_of
from .carriers.messages import Messages
from .exchange import Exchange, Layout
from .paths import execution_path, is_transformed, path_of, say_once
from .validation import (
    DIRECTIONS,
    broadcast_leading,
    broadcast_lengths,
    broadcast_mask,
    check_direction,
    check_division,
    check_eps,
    check_inplace,
    check_memory,
    check_pair_local,
    check_recompute,
    check_residual,
    check_weights,
    resolve_precision,
    view_drop_mask,
)


def sharded_triangle_multiplicative_update_with_residual(
    pair_local: Tensor,
    direction: str,
    residual_local: Tensor | None,
    drop_mask: Tensor | None,
    *,
    group: dist.ProcessGroup | None,
    length: int,
    dim: int = 1,
    norm_in_weight: Tensor | None,
    norm_in_bias: Tensor | None,
    p_in_weight: Tensor,
    g_in_weight: Tensor,
    norm_out_weight: Tensor | None,
    norm_out_bias: Tensor | None,
    p_out_weight: Tensor,
    g_out_weight: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    eps_out: float | None = None,
    precision: str | int | enum.Enum | None = None,
    memory: str = "auto",
    inplace: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """`triangle_multiplicative_update_with_residual` of a pair tensor over the ranks of a group.

    AlphaFold 2, Supplementary Methods 1.6.5, Algorithm 11 (outgoing) and Algorithm 12 (incoming).
    Every rank of the group calls it with its part of one pair tensor [B, L, L, C], and with the
    same parameters, drop mask and lengths, whose values are not compared. Inference only.

    Args:
        pair_local: [B, R, L, C], or [B, L, R, C] with dim=2: this rank's residues along `dim`,
            as torch.chunk divides L among the ranks. R may be 0.
        direction: "outgoing" or "incoming", of the whole pair tensor.
        residual_local: like pair_local, or None.
        drop_mask: [B, 1, L, C], with dim=2 [B, 1, R, C] for this rank's columns; or None.
        group: a process group, or a DeviceMesh of one dimension: the ranks, in their order; None is
            all ranks. GPUs of one host copy into each other's memory, which is kept until
            `free_exchange_memory`; otherwise messages go by the group's own backend.
        length: L.
        dim: the axis of the pair tensor that is divided, 1 or 2.
        mask: this rank's part [B, R, L] (or [B, L, R]) of the pair mask; its first axis may be
            absent or 1.
        memory: as there: "default", or "lean", which takes less and longer. "auto" is "default", or
            "lean" on all ranks if an allocation of the default mode fails on any.
        inplace: write the result over residual_local, as there.

    The other arguments are those of `triangle_multiplicative_update_with_residual`.

    Returns:
        The output like pair_local, contiguous.

    Raises:
        ValueError: an argument that doesn't fit. If the ranks disagree on a shape, dtype or option,
            all of them raise the same error; if one refuses its arguments, the others name it.
        TypeError: an argument that is no tensor, or of a dtype that doesn't fit.
        NotImplementedError: L above 46,336, or a gradient that is needed.
        torch.OutOfMemoryError: too little memory on one rank, which all others name.
    """
    weights = Weights(
        norm_in_weight, norm_in_bias, p_in_weight, None, g_in_weight, None,
        norm_out_weight, norm_out_bias, p_out_weight, None, g_out_weight, None,
    )  # fmt: skip
    return _run(
        group, dim, length, "B", pair_local, direction, residual_local, drop_mask, weights, mask,
        eps, eps if eps_out is None else eps_out, precision, memory, inplace, lengths,
    )  # fmt: skip


def sharded_triangle_multiplicative_update(
    pair_local: Tensor,
    direction: str = "outgoing",
    mask: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None,
    length: int,
    dim: int = 1,
    norm_in_weight: Tensor | None = None,
    norm_in_bias: Tensor | None = None,
    p_in_weight: Tensor,
    p_in_bias: Tensor | None = None,
    g_in_weight: Tensor,
    g_in_bias: Tensor | None = None,
    norm_out_weight: Tensor | None = None,
    norm_out_bias: Tensor | None = None,
    p_out_weight: Tensor,
    p_out_bias: Tensor | None = None,
    g_out_weight: Tensor,
    g_out_bias: Tensor | None = None,
    eps: float = 1e-5,
    precision: str | int | enum.Enum | None = None,
    memory: str = "auto",
    lengths: Tensor | None = None,
) -> Tensor:
    """`triangle_multiplicative_update` of a pair tensor over the ranks of a group.

    AlphaFold 2, Supplementary Methods 1.6.5, Algorithm 11 (outgoing) and Algorithm 12 (incoming).
    The update alone, without a residual, of projections that may have biases.

    Args:
        pair_local: [..., R, L, C], or [..., L, R, C] with dim=2, with any number of leading axes,
            which broadcast with those of mask.
        direction, group, length, dim, memory: as for
            `sharded_triangle_multiplicative_update_with_residual`. No projection may be None.
        mask: [..., R, L], or [..., L, R] with dim=2.

    The other arguments are those of `triangle_multiplicative_update`.

    Returns, Raises:
        As `sharded_triangle_multiplicative_update_with_residual`.
    """
    weights = Weights(
        norm_in_weight, norm_in_bias, p_in_weight, p_in_bias, g_in_weight, g_in_bias,
        norm_out_weight, norm_out_bias, p_out_weight, p_out_bias, g_out_weight, g_out_bias,
    )  # fmt: skip
    return _run(
        group, dim, length, "...", pair_local, direction, None, None, weights, mask, eps, eps,
        precision, memory, False, lengths,
    )  # fmt: skip


class _Division(NamedTuple):
    """How the pair tensors of a model are divided."""

    group: dist.ProcessGroup | None
    dim: int
    length: int


_division: _Division | None = None  # inside `sharded_pairs`


def division() -> _Division | None:
    """How the pair tensors are divided that the public functions get; None if they are whole."""
    return _division


@contextlib.contextmanager
def sharded_pairs(
    group: dist.ProcessGroup | None, *, length: int, dim: int = 1
) -> Iterator[None]:
    """A context in which pair tensors are this rank's part of larger ones, for a whole model.

    Calls of the two public functions, and so those of the layer and of modules that `patch` has
    swapped, take and return the part of [..., L, L, C] that a rank of `group` has: [..., R, L, C],
    or with dim=2 [..., L, R, C]. Everything else is the model's business: what is not local to rows
    must exchange on its own. Inference only, for the whole process.

        with kernel.sharded_pairs(group, length=L):
            rows = stack(rows, pair_attention_mask=mask_rows)

    Args:
        group, length, dim: as for `sharded_triangle_multiplicative_update_with_residual`.
    """
    global _division
    check_division(dim, length)
    previous, _division = _division, _Division(checked_group("group", group), dim, length)
    try:
        yield
    finally:
        _division = previous


# By the name of its pair tensor, the twin of a public function.
_TWINS = {
    "pair": sharded_triangle_multiplicative_update_with_residual,
    "x": sharded_triangle_multiplicative_update,
}


SHARDED = tuple(_TWINS.values())


def run_divided(
    name: str, arguments: dict[str, Any], group: dist.ProcessGroup | None, dim: int, length: int
) -> Tensor:
    """The value of the public function whose pair tensor is called `name`, for a rank's part.

    Args:
        arguments: all of the function's, by name.
    """
    names = {name: "pair_local", "residual": "residual_local"}
    given = {names.get(key, key): value for key, value in arguments.items()}
    try:
        check_recompute(given.pop("recompute"))
    except ValueError as error:
        refuse(group, error)
    return _TWINS[name](group=group, dim=dim, length=length, **given)


def checked_group(name: str, group: Any) -> dist.ProcessGroup | None:
    """The process group of a DeviceMesh of one dimension, or the group itself.

    Raises:
        TypeError: neither, nor None.
        ValueError: a mesh of more dimensions, or one in whose order the ranks of its group are not.
    """
    if not hasattr(group, "get_group"):
        others = group is None or group == dist.GroupMember.NON_GROUP_MEMBER
        if not others and not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"{name} must be a process group, a DeviceMesh of one dimension, or None; "
                f"got {group!r}"
            )
        return group
    if group.ndim != 1:
        raise ValueError(f"{name} must be a DeviceMesh of one dimension; got {group.ndim}")
    check_order(name, group, 0)
    return group.get_group()


def _check_backend(group: dist.ProcessGroup | None, device: str) -> None:
    """gloo would end the process at the first message of a GPU's memory."""
    backends = dist.get_backend_config(group)
    if device != "cpu" and f"{device}:gloo" in backends.split(","):
        raise ValueError(
            f"group must have a backend that sends tensors of {device}, such as that of "
            f'init_process_group("cpu:gloo,cuda:nccl"); got {backends}'
        )


def check_order(name: str, mesh: Any, dim: int) -> None:
    """The ranks of a mesh's dimension must be in the order of its group, which is ascending."""
    at, rank = mesh.get_local_rank(dim), dist.get_rank(mesh.get_group(dim))
    if at != rank:
        raise ValueError(
            f"{name} must be a DeviceMesh with ascending ranks along its dimension {dim}; "
            f"got {mesh}"
        )


@torch._disable_dynamo  # messages are not traced: a compiled caller's graph breaks here
def _run(
    group: dist.ProcessGroup | None, dim: int, length: int, leading: str, *arguments: Any
) -> Tensor:
    """The output of a rank's part [B, R, L, C], or with `leading` "..." [..., R, L, C]."""
    return _Sharded(group, dim, length, leading).run(*arguments)


class _Sharded:
    """A call on this rank's part of a pair tensor, which lies over the ranks of `group`."""

    def __init__(
        self, group: dist.ProcessGroup | None, dim: int, length: int, leading: str
    ) -> None:
        group = checked_group("group", group)
        self._group, self._dim, self._length, self._leading = group, dim, length, leading
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        if self._rank < 0:
            raise ValueError("group must have the rank that calls; got a group without it")

    def run(self, pair: Tensor, *arguments) -> Tensor:
        """The output like `pair`; `arguments` are those of `_checked`.

        Planes and output are allocated, and stage 1 of the first sequence is done, before the ranks
        compare what they are about to do: whatever fails on a rank until then is known to all, and
        none waits for its planes. If a call needs more memory that all ranks have mapped than there
        is, they compare first, and then take it together.
        """
        shared = memory_of(self._group)
        failure, facts, ways = None, {}, [_Way(False, (), 0)]

        def compared(last: bool) -> bool:
            of_way = {}
            if facts and shared is not None:
                of_way = {"exchange_memory": shared.bytes(device), "mapped": way.mapped}
            return compare(self._group, facts | of_way, failure, last)

        with contextlib.ExitStack() as stack:
            try:
                call, shape = self._checked(pair, *arguments)
                found, over = self._facts(call), call.residual if call.inplace else None
                call, device = self._by_rows(call), call.x.device
                layout = Layout(self._ranks, self._length, call.hidden)
                first_row = layout.rows(self._rank).start
                stages = stack.enter_context(path_of(call).stages(call, first_row))
                ways, facts = _ways(call, stages, layout, shared), found
            except Exception as error:
                failure = error
            try:
                for way in ways:
                    if failure is None and way.mapped and shared.bytes(device) < way.mapped:
                        compared(last=True)
                        if not shared.grow(way.mapped, device):
                            continue
                    try:
                        if failure is None:
                            buffers = _allocate(call, stages, layout, way)
                            if buffers.out.numel():
                                _project(stages, layout, buffers, 0, 0)
                    except Exception as error:
                        failure = error
                    if compared(last=way is ways[-1]):
                        break
                    failure = buffers = None
                    if way.mapped:
                        shared.refuse(way.mapped)  # the next way needs the memory elsewhere
            finally:
                failure = None  # its traceback holds this frame, and so the buffers
            if way.lean and not ways[0].lean:
                say_once("runs in lean mode: an allocation of the default mode failed")
            if self._length:
                exchange = Exchange(self._group, self._rank, layout)
                if way.mapped:
                    carrier = stack.enter_context(
                        shared.carrier(exchange, way.slots, call.x.dtype)
                    )
                else:
                    carrier = Messages(exchange, buffers.slots)
                _run_stages(stages, exchange, carrier, buffers, self._dim == 2)
        out = buffers.out
        del buffers  # before the copy
        if self._dim == 2:
            out = out.transpose(1, 2)
            out = out.contiguous() if over is None else over.copy_(out)
        return out if out.shape == shape else out.view(shape)

    def plan(self, call: Call) -> Plan:
        """The buffers of a call on rows, and what the rank sends."""
        layout, rank = Layout(self._ranks, self._length, call.hidden), self._rank
        rows = layout.rows(rank)
        with path_of(call).stages(call, rows.start) as stages:
            pitch = stages.pitch
            way = _ways(call, stages, layout, known_memory_of(self._group))[0]
            x = torch.empty(call.x.shape, dtype=call.x.dtype, device="meta")
            made = _allocate(call._replace(x=x, residual=x), stages, layout, way)
        named = {"a and b": made.planes, "product": made.product, "output": made.out}
        if made.slots is not None:
            named["planes of a group, of all rows"] = made.slots
        known, buffers = {x.untyped_storage()._cdata}, {}
        for name, tensor in named.items():
            memory = tensor.untyped_storage()
            if memory._cdata not in known:
                known.add(memory._cdata)
                buffers[name] = memory.nbytes()
        if stages.moments:
            buffers["moments"] = 8 * (rows.stop - rows.start) * pitch
        if way.mapped:
            buffers["planes that all ranks map, which are kept"] = way.mapped
        messages, sent = layout.sent(rank)
        size = f"{sent * pitch * x.element_size() / 2**20:,.1f} MiB"
        carried = f"copies {size}" if way.mapped else f"sends {messages:,} messages, {size}"
        notes = [
            f"rank {rank} of {self._ranks} has residues {rows.start} to {rows.stop} of "
            f"{self._length} along axis {self._dim}, and multiplies {layout.channel_count(rank)} "
            f"of {call.hidden} channels, in {layout.groups} groups",
            f"for each sequence it {carried}",
        ]
        if way.slots[0] == 2:
            notes.append("a group's planes travel during stage 2 of another")
        if call.memory == "auto":
            notes.append("all ranks go lean where an allocation of this mode fails on one")
        mode = "lean" if way.lean else "default"
        return Plan(mode, None, [], buffers, sum(buffers.values()), 0, notes)

    def _checked(
        self,
        pair: Tensor,
        direction: str,
        residual: Tensor | None,
        drop_mask: Tensor | None,
        weights: Weights,
        mask: Tensor | None,
        eps: float,
        eps_out: float,
        precision: str | int | enum.Enum | None,
        memory: str,
        inplace: bool,
        lengths: Tensor | None,
    ) -> tuple[Call, torch.Size]:
        """The arguments as a call, whose x is the rank's part, and the shape of its result."""
        name = "pair_local"
        check_direction(direction)
        check_division(self._dim, self._length)
        rows = Layout(self._ranks, self._length, 1).rows(self._rank)
        check_pair_local(name, pair, self._leading, self._dim, self._length, rows)
        _check_backend(self._group, pair.device.type)
        check_weights(name, pair, weights)
        check_residual(residual, name, pair)
        check_eps("eps", eps)
        check_eps("eps_out", eps_out)
        check_memory(memory)
        if self._leading == "B":
            mask = broadcast_mask(mask, name, pair)
        else:
            pair, mask = broadcast_leading(mask, name, pair)
        batch = pair.shape[:-3].numel()
        call = Call(
            x=pair.reshape(batch, *pair.shape[-3:]),
            direction=direction,
            mask=None if mask is None else mask.reshape(batch, *mask.shape[-2:]),
            residual=residual,
            drop_mask=view_drop_mask(drop_mask, pair),
            weights=weights,
            eps_in=eps,
            eps_out=eps_out,
            precision=resolve_precision(precision, name, pair),
            memory=memory,
            recompute="all",
            inplace=inplace,
            lengths=broadcast_lengths(lengths, name, pair),
        )
        if inplace is not False:
            others = {"mask": mask, "drop_mask": drop_mask, "lengths": lengths}
            check_inplace(inplace, name, pair, residual, {**others, **weights._asdict()})
        if call.needs_grad:
            raise NotImplementedError(
                "a sharded call has no backward: call it under torch.no_grad() or "
                "torch.inference_mode(); got an argument that requires a gradient"
            )
        if is_transformed():
            raise NotImplementedError(
                "a sharded call has no forward-mode AD and no transforms of torch.func; got one"
            )
        return call, pair.shape

    def _facts(self, call: Call) -> dict[str, int]:
        """What the ranks must agree on, as numbers."""
        path = execution_path(call.x.device, call.x.dtype).name
        facts = {
            "B": call.x.shape[0], "L": self._length, "C": call.x.shape[3], "D": call.hidden,
            "dim": self._dim, "dtype": call.x.dtype, "direction": call.direction,
            "precision": call.precision, "memory": call.memory, "inplace": call.inplace,
            "path": path, "lengths": call.lengths is not None,
            "eps": call.eps_in, "eps_out": call.eps_out,
        }  # fmt: skip
        return {name: as_integer(name, value) for name, value in facts.items()}

    def _by_rows(self, call: Call) -> Call:
        """The call with rows of x: if the pair tensor is divided by columns, its transpose's."""
        if self._dim == 1:
            return call
        return call._replace(
            x=call.x.transpose(1, 2),
            direction=DIRECTIONS[1 - DIRECTIONS.index(call.direction)],
            mask=None if call.mask is None else call.mask.transpose(1, 2),
            residual=None if call.residual is None else call.residual.transpose(1, 2),
            drop_mask=None if call.drop_mask is None else call.drop_mask[:, :, None],
            inplace=False,  # the result is transposed first
        )


def plan_of(arguments: dict[str, Any]) -> tuple[Call, Plan]:
    """A rank's part of a sharded function's call, and its buffers and messages; nothing runs.

    Args:
        arguments: all of the function's, by name.
    """
    given = {**arguments}
    weights = Weights(**{name: given.pop(name, None) for name in Weights._fields})
    leading = "B" if "residual_local" in given else "..."
    of_rank = _Sharded(given["group"], given["dim"], given["length"], leading)
    eps_out = given.get("eps_out")
    call, _ = of_rank._checked(
        given["pair_local"], given["direction"], given.get("residual_local"),
        given.get("drop_mask"), weights, given["mask"], given["eps"],
        given["eps"] if eps_out is None else eps_out, given["precision"], given["memory"],
        given.get("inplace", False), given["lengths"],
    )  # fmt: skip
    return call, of_rank.plan(of_rank._by_rows(call))


class _Way(NamedTuple):
    """A way to run a call."""

    lean: bool
    slots: tuple[int, ...]  # [depth, 2 or 3, G, L, pitch], the planes that stage 2 works on
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
        if shared is not None and stages.slots == 3 and call.x.shape[0] and layout.length:
            slots = 1 + twice, *planes
            mapped = PeerMemory.bytes_for(layout.ranks, slots, call.x.dtype)
            if shared.takes(mapped, call.x.device):
                ways.append(_Way(lean, slots, mapped))
        fit = twice and 2 * math.prod(planes) <= room
        ways.append(_Way(lean, (1 + fit, *planes), 0))
    return ways


class _Buffers(NamedTuple):
    """All large memory of a call but what all ranks map."""

    planes: Tensor  # of a and b of my rows: [2, D, R, pitch], or in lean mode of one group
    product: Tensor  # [D, R, pitch] of my rows
    slots: Tensor | None  # [depth, 2 or 3, G, L, pitch]; None if all ranks map them
    out: Tensor  # [B, R, L, C]

    @property
    def lean(self) -> bool:
        return self.planes.shape[1] < len(self.product)


def _allocate(call: Call, stages: Any, layout: Layout, way: _Way) -> _Buffers:
    """The buffers of a call. By default t is received over a, whose planes have been sent.

    Where they fit, the slots lie in the last sequence of the output, which is written last.
    """
    x = call.x
    group = layout.group(0)
    channels = group.stop - group.start if way.lean else call.hidden
    planes = x.new_empty(2, channels, x.shape[1], stages.pitch)
    product = planes[0]
    if channels < call.hidden:
        product = x.new_empty(call.hidden, x.shape[1], stages.pitch)
    out = call.residual if call.inplace else x.new_empty(x.shape)
    if way.mapped:
        return _Buffers(planes, product, None, out)
    memory, count = out[-1:].view(-1), math.prod(way.slots)
    if call.inplace or memory.numel() < count or memory.data_ptr() % 16:
        memory = x.new_empty(count)
    return _Buffers(planes, product, memory[:count].view(way.slots), out)


def _project(stages: Any, layout: Layout, buffers: _Buffers, index: int, group: int) -> None:
    """Stage 1 of all channels before the first group of a sequence, or in lean mode of each."""
    if buffers.lean:
        channels = layout.group(group)
        planes = buffers.planes[:, : channels.stop - channels.start]
        stages.project(index, planes, channels)
    elif group == 0:
        stages.project(index, buffers.planes)


def _run_stages(
    stages: Any, exchange: Exchange, carrier: Carrier, buffers: _Buffers, by_columns: bool
) -> None:
    """All stages but the first `_project`.

    Where two groups may be under way, the next one's a and b travel during stage 2 of a group.
    """
    layout, (planes, product, _, out) = exchange.layout, buffers
    depth, last = len(carrier.slots), layout.groups - 1

    def send(step: int, index: int, group: int) -> None:
        if step and out.numel():
            _project(stages, layout, buffers, index, group)
        channels = layout.group(group)
        a, b = planes[:, : channels.stop - channels.start] if buffers.lean else planes[:, channels]
        # By columns, t is that of the transposed x: the other direction's product of b and a.
        carrier.send(step, group, *((b, a) if by_columns else (a, b)))

    groups = itertools.product(range(len(out)), range(layout.groups))
    for step, (index, group) in enumerate(groups):
        if group == 0 or depth == 1:
            send(step, index, group)
        if group < last and depth == 2:
            send(step + 1, index, group + 1)
        carrier.receive(step)
        own = exchange.own(carrier.slots[step % depth], group)
        if own.numel():
            stages.multiply(index, *own)
        carrier.give_back(step, group, product[layout.group(group)])
        if group == last:
            carrier.finish()
            if out.numel():
                stages.emit(index, product, out[index])
