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
`carriers`. Planes have the axes of x, so what travels are the rows of one channel for one rank,
contiguous at both ends. Columns are rows of the transposed x, for which t is
the other direction's product of b and a.

Memory beyond the arguments, in a rank's share of one pair tensor where C = D, if there are eight
groups (fewer of few channels, and on GPUs of small planes):

    default   a and b, 2; the planes [G, L, pitch] of two groups, 3/4; the output
    lean      t, 1; a and b of a group, 1/4; the planes [G, L, pitch], 3/8; the output

In the default mode one group travels while another is multiplied. Sequences share all but the
output. Messages fill planes that lie in the output's memory where they fit, unless that is the
residual, for which one group at a time has 3/8. Copies fill planes in memory that all ranks map.
In lean mode stage 1 runs once for each group and reads x each time. `sharded_schedule` tells what
a backward does.
"""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import contextlib
import enum
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._call import Call, Weights
from ._plan import Plan
from .agreement import refuse
from .paths import is_transformed
from .sharded_operators import run
from .sharded_schedule import Division, plan
from .validation import (
    broadcast_leading,
    broadcast_lengths,
    broadcast_mask,
    check_direction,
    check_division,
    check_eps,
    check_inplace,
    check_memory,
    check_pair_local,
    check_parameter_grads,
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
    recompute: str = "none",
    parameter_grads: str = "sum",
    inplace: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """`triangle_multiplicative_update_with_residual` of a pair tensor over the ranks of a group.

    AlphaFold 2, Supplementary Methods 1.6.5, Algorithm 11 (outgoing) and Algorithm 12 (incoming).
    Every rank of the group calls it with its part of one pair tensor [B, L, L, C], and with the
    same parameters, drop mask and lengths, whose values are not compared. Where a gradient is
    needed, every rank's backward must run, in the order in which autograd runs it elsewhere.

    Args:
        pair_local: [B, R, L, C], or [B, L, R, C] with dim=2: this rank's residues along `dim`,
            as torch.chunk divides L among the ranks. R may be 0.
        direction: "outgoing" or "incoming", of the whole pair tensor.
        residual_local: like pair_local, or None.
        drop_mask: [B, 1, L, C], with dim=2 [B, 1, R, C] for this rank's columns; or None.
        group: a process group, or a DeviceMesh of one dimension: the ranks, in their order; None is
            all ranks. Messages go by its own backend. GPUs of one host copy into each other's
            memory instead, which is kept until `free_exchange_memory`, unless all ranks have
            ESMFOLD2_TRIMUL_EXCHANGE=messages in their environment.
        length: L.
        dim: the axis of the pair tensor that is divided, 1 or 2.
        mask: this rank's part [B, R, L] (or [B, L, R]) of the pair mask; its first axis may be
            absent or 1.
        memory: as there: "default", or "lean", which takes less and longer. "auto" is "default", or
            "lean" on all ranks if an allocation of the default mode fails on any.
        recompute: what a backward makes again, as there: "none" keeps a and b of this rank's
            channels and the product of its rows, three tensors of the size of pair_local, and
            "product" the product. Both run the mode that `memory` says.
        parameter_grads: "sum" gives the parameters' gradients of the whole pair tensor, on every
            rank. "local" gives this rank's share, for DDP or FSDP to reduce.
        inplace: write the result over residual_local, as there.

    The other arguments are those of `triangle_multiplicative_update_with_residual`.

    Returns:
        The output like pair_local, contiguous.

    Raises:
        ValueError: an argument that doesn't fit. If the ranks disagree on a shape, dtype or option,
            all of them raise the same error; if one refuses its arguments, the others name it.
        TypeError: an argument that is no tensor, or of a dtype that doesn't fit.
        NotImplementedError: L above 46,336; torch.func and forward-mode AD; a second derivative.
        torch.OutOfMemoryError: too little memory on one rank, which all others name.
    """
    weights = Weights(
        norm_in_weight, norm_in_bias, p_in_weight, None, g_in_weight, None,
        norm_out_weight, norm_out_bias, p_out_weight, None, g_out_weight, None,
    )  # fmt: skip
    return _run(
        Division(group, dim, length, parameter_grads), "B", pair_local, direction, residual_local,
        drop_mask, weights, mask, eps, eps if eps_out is None else eps_out, precision, memory,
        recompute, inplace, lengths,
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
    recompute: str = "none",
    parameter_grads: str = "sum",
    lengths: Tensor | None = None,
) -> Tensor:
    """`triangle_multiplicative_update` of a pair tensor over the ranks of a group.

    AlphaFold 2, Supplementary Methods 1.6.5, Algorithm 11 (outgoing) and Algorithm 12 (incoming).
    The update alone, without a residual, of projections that may have biases.

    Args:
        pair_local: [..., R, L, C], or [..., L, R, C] with dim=2, with any number of leading axes,
            which broadcast with those of mask.
        direction, group, length, dim, memory, recompute, parameter_grads: as for
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
        Division(group, dim, length, parameter_grads), "...", pair_local, direction, None, None,
        weights, mask, eps, eps, precision, memory, recompute, False, lengths,
    )  # fmt: skip


_division: Division | None = None  # inside `sharded_pairs`


def division() -> Division | None:
    """How the pair tensors are divided that the public functions get; None if they are whole."""
    return _division


@contextlib.contextmanager
def sharded_pairs(
    group: dist.ProcessGroup | None,
    *,
    length: int,
    dim: int = 1,
    parameter_grads: str = "local",
) -> Iterator[None]:
    """A context in which pair tensors are this rank's part of larger ones, for a whole model.

    Calls of the two public functions, and so those of the layer and of modules that `patch` has
    swapped, take and return the part of [..., L, L, C] that a rank of `group` has: [..., R, L, C],
    or with dim=2 [..., L, R, C]. Everything else is the model's business: what is not local to rows
    must exchange on its own. It holds for the whole process, and must also surround a backward that
    runs the forward again (checkpointing).

        with kernel.sharded_pairs(group, length=L):
            rows = stack(rows, pair_attention_mask=mask_rows)

    Args:
        group, length, dim: as for `sharded_triangle_multiplicative_update_with_residual`.
        parameter_grads: as there, but "local" by default, like the gradients of the model's other
            modules on a rank's rows.
    """
    global _division
    check_division(dim, length)
    check_parameter_grads(parameter_grads)
    made = Division(checked_group("group", group), dim, length, parameter_grads)
    previous, _division = _division, made
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


def run_divided(name: str, arguments: dict[str, Any], division: Division) -> Tensor:
    """The value of the public function whose pair tensor is called `name`, for a rank's part.

    Args:
        arguments: all of the function's, by name.
    """
    names = {name: "pair_local", "residual": "residual_local"}
    given = {names.get(key, key): value for key, value in arguments.items()}
    return _TWINS[name](**division._asdict(), **given)


def checked_group(name: str, group: Any) -> dist.ProcessGroup | None:
    """The process group of a DeviceMesh of one dimension, or the group itself.

    Raises:
        TypeError: neither, nor None.
        ValueError: a mesh of more dimensions, or one in whose order the ranks of its group are not.
    """
    if group is None or isinstance(group, dist.ProcessGroup):
        return group
    if not hasattr(group, "get_group"):
        if group != dist.GroupMember.NON_GROUP_MEMBER:
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
    if device == "cpu" or torch.compiler.is_compiling():  # tracers can't ask for it
        return
    backends = dist.get_backend_config(group)
    if f"{device}:gloo" in backends.split(","):
        raise ValueError(
            f"group must have a backend that sends tensors of {device}, such as that of "
            f'init_process_group("cpu:gloo,cuda:nccl"); got {backends}'
        )


def check_order(name: str, mesh: Any, dim: int) -> None:
    """The ranks of a mesh's dimension must be in the order of its group, which is ascending.

    A tracer sees this rank's place alone; in another order some ranks have another one's.
    """
    own = mesh.get_coordinate()
    if torch.compiler.is_compiling():
        place, of_group = own[dim], dist.get_rank(mesh.get_group(dim))
        if place != of_group:
            raise ValueError(
                f"{name} must be a DeviceMesh with ascending ranks along its dimension {dim}; got "
                f"the rank {of_group} of its group at {place}"
            )
        return
    others = [slice(None) if at == dim else place for at, place in enumerate(own)]
    ranks = mesh.mesh[tuple(others)].tolist()
    if ranks != sorted(ranks):
        raise ValueError(
            f"{name} must be a DeviceMesh with ascending ranks along its dimension {dim}; "
            f"got {mesh}"
        )


def _run(division: Division, leading: str, *arguments: Any) -> Tensor:
    """The output of a rank's part [B, R, L, C], or with `leading` "..." [..., R, L, C].

    `arguments` are those of `_checked`.
    """
    group = checked_group("group", division.group)
    if dist.get_rank(group) < 0:
        raise ValueError("group must have the rank that calls; got a group without it")
    division = division._replace(group=group)
    try:
        call, shape = _checked(division, leading, *arguments)
    except Exception as error:
        refuse(group, error)
    out = run(division, call)
    return out if out.shape == shape else out.view(shape)


def _checked(
    division: Division,
    leading: str,
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
    recompute: str,
    inplace: bool,
    lengths: Tensor | None,
) -> tuple[Call, torch.Size]:
    """The arguments as a call, whose x is the rank's part, and the shape of its result."""
    name = "pair_local"
    check_direction(direction)
    check_division(division.dim, division.length)
    rows = division.rows()
    check_pair_local(name, pair, leading, division.dim, division.length, rows)
    _check_backend(division.group, pair.device.type)
    check_weights(name, pair, weights)
    check_residual(residual, name, pair)
    check_eps("eps", eps)
    check_eps("eps_out", eps_out)
    check_memory(memory)
    check_recompute(recompute)
    check_parameter_grads(division.parameter_grads)
    if leading == "B":
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
        recompute=recompute,
        inplace=inplace,
        lengths=broadcast_lengths(lengths, name, pair),
    )
    if inplace is not False:
        others = {"mask": mask, "drop_mask": drop_mask, "lengths": lengths}
        check_inplace(inplace, name, pair, residual, {**others, **weights._asdict()})
    if call.needs_grad and inplace:
        raise ValueError("inplace must be False where a gradient is needed; got True")
    if is_transformed():
        raise NotImplementedError(
            "a sharded call has no forward-mode AD and no transforms of torch.func; got one"
        )
    return call, pair.shape

def plan_of(arguments: dict[str, Any]) -> tuple[Call, Plan]:
    """A rank's part of a sharded function's call, and its buffers and messages; nothing runs.

    Args:
        arguments: all of the function's, by name.
    """
    given = {**arguments}
    weights = Weights(**{name: given.pop(name, None) for name in Weights._fields})
    leading = "B" if "residual_local" in given else "..."
    division = Division(*[given[name] for name in Division._fields])
    division = division._replace(group=checked_group("group", division.group))
    eps_out = given.get("eps_out")
    call, _ = _checked(
        division, leading, given["pair_local"], given["direction"], given.get("residual_local"),
        given.get("drop_mask"), weights, given["mask"], given["eps"],
        given["eps"] if eps_out is None else eps_out, given["precision"], given["memory"],
        given["recompute"], given.get("inplace", False), given["lengths"],
    )  # fmt: skip
    return call, plan(division, call)
