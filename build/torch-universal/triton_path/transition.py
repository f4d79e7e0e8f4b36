"""The transition on the Triton path: two stages, over chunks of rows.

    swiglu_hidden   h = silu(z Wg^T + bg) * (z Wu^T + bu)   [rows of a chunk, H]
    row_linear      out = residual + h Wd^T + bd

On Hopper GPUs the setting of `swiglu_hidden` may be one kernel for both ("whole"), of all rows.

Peak memory beyond the arguments: the output, unless it is written over the residual, and with two
stages the hidden channels of a chunk, of x's size or less (64 MiB where that is more).

The backward keeps nothing of the forward. In chunks of rows, with G the output's gradient:

    swiglu_hidden       p = z Wg^T + bg, u = z Wu^T + bu, x^, and the moments of x
    swiglu_bwd          h, and dp and du over p and u
    row_products        dWd += G^T h, and P += [dp, du]^T x^, from which the other gradients come
    input_bwd           dz = dp Wg + du Wu, and dx

On Hopper GPUs the setting of `swiglu_bwd` may be one kernel for it and `swiglu_hidden`.

Peak beyond the arguments: dx and a chunk's rows, 2.8 more tensors of x's size (at least 512 MiB, at
most 1 GiB). Sums over rows are in fp32, in a fixed order.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import hopper
from .._call import TRANSITION_DIFFERENTIABLE, Transition, TransitionWeights
from .._plan import Plan
from ..hopper.padding import fill_padding
from ..triton_parts.device import device_target
from ..triton_parts.launch import Launches, has_descriptor, setting_of
from ..triton_parts.recording import run_recorded
from ..triton_parts.rehearsal import rehearsal
from ..triton_parts.settings import LaunchConfig
from ..validation import pairs_within
from .gradients import likeness
from .input_backward import input_bwd, prepare_input_bwd
from .launches import (
    current_device,
    for_kernels,
    launches_of,
    notes_on_precision,
    twin_of,
    with_precision,
)
from .parameter_gradients import Projections, Sums, gradients_of_projections
from .row_linear import prepare_row_linear, row_linear
from .row_products import RowParts, prepare_row_products, row_products
from .split_transition import split_transition
from .swiglu_backward import prepare_swiglu_bwd, swiglu_bwd
from .swiglu_hidden import swiglu_hidden

# The bytes that a chunk makes: a multiple of those of x, within bounds. On an H200 at C = 256 and
# L = 512, forward chunks of 64 MiB took 7 % longer than no chunks, of 128 MiB 3 %. A backward's
# chunks make more, with more launches.
_FORWARD_CHUNK = (1.0, 2**26, 2**28)
_BACKWARD_CHUNK = (2.8, 2**29, 2**30)
# The kernels find a row's pair by a division in fp32, exact up to this many columns.
_MOST_COLUMNS = 2**17
_SETS = {
    "in": Projections(("gate_weight", "up_weight"), "norm"),
    "down": Projections(("down_weight",), None),
}
_WHOLE = ("transition",)  # the key of its launch
# Of the first stage: its own, and one kernel for both.
_FIRST_VARIANTS = frozenset({"hopper", "whole"})
_TILE = 128  # a multiple of every setting's rows


def forward(call: Transition) -> Tensor:
    """The output [B, I, J, C]."""
    merged = for_kernels(_merged(call))
    with current_device(call.x):
        return _run(merged, launches_of(merged, "transition")).view(call.x.shape)


def _run(call: Transition, launches: Launches) -> Tensor:
    x, weights = call.x, call.weights
    out = call.residual
    if not call.inplace:
        out = launches.empty("output", x.shape, x.dtype, x.device)
    if not launches:  # the first of its kind
        _prepare_whole(call, launches)
    if _WHOLE in launches:
        hopper.kernels("transition").launch(call, launches, launches[_WHOLE], out)
        return out
    split = split_transition(call, weights.down_weight, weights.down_bias, launches, False)
    down, scales = weights.down_weight, None
    if split is not None:
        call, down, scales = split
    memory = folded = None
    for entries, rows in _chunks(call, call.hidden, *_FORWARD_CHUNK):
        part = _part(call, entries, rows)
        count = part.x.shape[:3].numel()
        if memory is None:  # the first chunk is the largest
            memory = launches.empty("hidden", (count, call.hidden), x.dtype, x.device)
        hidden, made = memory[:count], _cut(out, entries, rows)
        first_row = 0 if call.lengths is None else rows.start
        folded = swiglu_hidden(part, launches, hidden, first_row, folded=folded, scales=scales)
        alignments = [0 if t is None else t.data_ptr() % 16 for t in (part.residual, made)]
        prepared = launches.of(
            ("row_linear", part.x.shape, first_row, *alignments),
            prepare_row_linear, hidden, down, part.residual, part.x.shape[1:3],
            call.precision, first_row, call.lengths is not None,
        )  # fmt: skip
        row_linear(
            hidden, down, weights.down_bias, part.residual, part.lengths, made, prepared, scales
        )
        if call.lengths is not None and prepared.variant:
            fill_padding(part, launches, prepared, made, first_row)
    return out


def _prepare_whole(call: Transition, launches: Launches) -> None:
    """The launch of the one kernel for a whole call, if that is the setting."""
    x = call.x
    if hopper.variants("transition", "takes", x, call):
        length = math.isqrt(x.shape[:3].numel())
        config = setting_of("swiglu_hidden", x, x.shape[3], length, 1, _FIRST_VARIANTS)
        if config.kernel == "whole":
            launches.of(_WHOLE, hopper.kernels("transition").prepare, call, config)


def _part(call: Transition, entries: slice, rows: slice) -> Transition:
    """The call on a chunk."""
    x = _cut(call.x, entries, rows)
    if x is call.x:
        return call
    residual = call.residual
    if residual is not None:
        residual = x if residual is call.x else _cut(residual, entries, rows)
    lengths = None if call.lengths is None else call.lengths[entries]
    return call._replace(x=x, residual=residual, lengths=lengths)


def _cut(x: Tensor, entries: slice, rows: slice) -> Tensor:
    """A chunk of x [B, I, J, C]; x itself if that is all."""
    batch, count = x.shape[:2]
    if rows.stop - rows.start == count:
        return x if entries.stop - entries.start == batch else x[entries]
    return x[:, rows] if batch == 1 else x[entries, rows]


def _chunks(
    call: Transition, width: int, share: float, least: int, most: int
) -> Iterator[tuple[slice, slice]]:
    """Cuts x [B, I, J, C] into chunks, whole entries or rows of one entry, the largest first.

    A chunk makes rows of `width` channels, of `share` times the bytes of x, within the bounds.
    """
    batch, rows, columns, _ = call.x.shape
    size = int(share * call.x.nbytes)
    wanted = min(max(size, least), most) // (width * call.x.element_size())
    together = wanted // (rows * columns)
    if together:
        for start in range(0, batch, together):
            yield slice(start, min(start + together, batch)), slice(0, rows)
        return
    parts = -(-rows * columns // max(wanted, 1))
    step = -(-rows // parts)
    if columns == 1:  # whole tiles of the kernels
        step = -(-step // _TILE) * _TILE
    for entry in range(batch):
        for start in range(0, rows, step):
            yield slice(entry, entry + 1), slice(start, min(start + step, rows))


@torch.no_grad()
def backward(call: Transition, grad_out: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    """The gradients that `needs` names, each with the dtype and shape of its tensor."""
    shape = call.x.shape
    call = for_kernels(_merged(call._replace(residual=grad_out)))
    call, grad_out = call._replace(residual=None), call.residual
    names = [name for name in TRANSITION_DIFFERENTIABLE if name in needs]

    def schedule(launches: Launches, arguments: Sequence[Any]) -> list[Tensor]:
        *flat, grad_out, down_turned = arguments
        # Autocast would choose dtypes for what torch itself computes.
        with torch.autocast(call.x.device.type, enabled=False):
            found = _run_backward(
                Transition.of(flat), grad_out, down_turned, fused, needs, launches
            )
        return [found[name] for name in names]

    with current_device(call.x):
        launches = launches_of(call, "transition_bwd", needs, likeness(grad_out))
        fused = launches.setting("swiglu_bwd", _fused_setting, call)
        arguments = (*call.flat(), grad_out, _turned(call, fused))
        found = dict(zip(names, run_recorded(launches, schedule, arguments), strict=True))
    if "x" in needs:
        found["x"] = found["x"].view(shape)
    return found


def _turned(call: Transition, fused: LaunchConfig | None) -> Tensor | None:
    """Wd^T, contiguous; None where one kernel runs, which reads Wd as it lies."""
    return call.weights.down_weight.t().contiguous() if fused is None else None


def _fused_setting(call: Transition) -> LaunchConfig | None:
    """The setting of one kernel for the projections and their backward, if that is the setting."""
    x = call.x
    variants = hopper.variants("swiglu_backward", "takes", x, call)
    length = math.isqrt(x.shape[:3].numel())
    config = setting_of("swiglu_bwd", x, x.shape[3], length, 1, variants)
    return config if hopper.is_variant(config, variants) else None


def _run_backward(
    call: Transition,
    grad_out: Tensor,
    down_turned: Tensor | None,
    fused: LaunchConfig | None,
    needs: frozenset[str],
    launches: Launches,
) -> dict[str, Tensor]:
    """`backward` in chunks; of `fused`, see `_fused_setting`, and of `down_turned`, `_turned`."""
    x, weights = call.x, call.weights
    channels, hidden = x.shape[3], call.hidden
    of_parameters = not needs.isdisjoint(TransitionWeights._fields)
    split = None
    if fused is None:
        split = split_transition(call, down_turned, None, launches, True)
    scales = factors = None
    if split is not None:
        call, down_turned, scales = split
        factors = split.factors
    into = call.weights.gate_weight, call.weights.up_weight

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device)

    parts: dict[str, RowParts] = {}

    def add_products(which: str, left: Tensor, right: Tensor, with_sums: bool) -> None:
        earlier = parts.get(which)
        prepared = launches.of(
            ("row_products", which, left.shape[0], left.data_ptr() % 16, earlier is None),
            prepare_row_products, left, right, call.precision, None, with_sums, earlier,
        )  # fmt: skip
        parts[which] = row_products(left, right, prepared, earlier)

    found = {}
    if "x" in needs:
        found["x"] = empty(*x.shape)
    of_down = not needs.isdisjoint(("down_weight", "down_bias"))
    # The rows that a chunk makes: dp and du, h, x^, and a copy of G.
    for entries, rows in _chunks(call, 3 * hidden + 2 * channels, *_BACKWARD_CHUNK):
        part, grad = _part(call, entries, rows), grad_out[entries, rows]
        count = part.x.shape[:3].numel()
        if call.lengths is not None:
            # Without padding's numbers, which may be NaN, its gradients are zeros.
            within = pairs_within(part.lengths, x.shape[2])[:, rows, :, None]
            part = part._replace(x=torch.where(within, part.x, 0), lengths=None)
            grad = torch.where(within, grad, 0)
        grad = grad.reshape(count, channels).contiguous()
        if fused is not None and not has_descriptor(grad):
            grad = grad.clone()
        kind = (part.x.shape, part.x.data_ptr() % 16, grad.data_ptr() % 16)
        # p and u, then dp and du.
        pair = empty(count, 2 * hidden)
        moments = torch.empty(2, count, dtype=torch.float32, device=x.device)
        hat_x = empty(count, channels) if of_parameters else None
        if split is not None and of_parameters:
            hat_x = hat_x.view(torch.float16)
        hidden_rows = empty(count, hidden) if of_down else None
        if fused is not None:
            variant = hopper.kernels("swiglu_backward")
            prepared = launches.of(
                ("swiglu_bwd", *kind), variant.prepare, part, grad, of_down, fused
            )
            variant.launch(part, prepared, grad, pair, moments, hat_x, hidden_rows)
        else:
            swiglu_hidden(part, launches, pair, 0, None, moments, hat_x, scales=scales)
            prepared = launches.of(
                ("swiglu_bwd", count, grad.data_ptr() % 16),
                prepare_swiglu_bwd, grad, down_turned, pair, hidden_rows, call.precision,
            )  # fmt: skip
            swiglu_bwd(grad, down_turned, pair, hidden_rows, prepared, scales)
        if of_parameters:
            add_products("in", pair, hat_x, True)
        if of_down:
            add_products("down", grad, hidden_rows, weights.down_bias is not None)
        if "x" in needs:
            grad_x = found["x"][entries, rows]
            # One sequence [R, J, C] to the kernel: the entries of a chunk are whole where several.
            rows_x, moments = part.x.flatten(0, 1), moments.view(2, -1, x.shape[2])
            prepared = launches.of(
                ("input_bwd", *kind, rows_x.stride(), grad_x.data_ptr() % 16),
                prepare_input_bwd, pair, None, rows_x, moments, into, call.precision,
            )  # fmt: skip
            input_bwd(
                pair, None, rows_x, moments, into, weights.norm_weight, grad_x, prepared, None,
                factors,
            )  # fmt: skip
        del pair, hidden_rows, hat_x  # freed before the next chunk's is allocated
    sums = [Sums(names, parts[which]) for which, names in _SETS.items() if which in parts]
    if sums:
        found |= gradients_of_projections(launches, sums, weights, needs)
    return found


def _merged(call: Transition) -> Transition:
    """The call with the rows of x along one axis [1, M, 1, C] where that is a view."""
    x, residual = call.x, call.residual
    if call.lengths is None and _is_one_axis(x) and (
        residual is None or residual is x or _is_one_axis(residual)
    ):
        rows = _along_one_axis(x)
        if residual is not None:
            residual = rows if residual is x else _along_one_axis(residual)
        return call._replace(x=rows, residual=residual)
    if x.shape[2] <= _MOST_COLUMNS:
        return call
    residual = None if residual is None else residual.contiguous()
    return _merged(call._replace(x=x.contiguous(), residual=residual))


def _is_one_axis(x: Tensor) -> bool:
    """Whether the rows of x [B, I, J, C] lie at equal distances."""
    if x.is_contiguous():
        return True
    axes = [(x.shape[axis], x.stride(axis)) for axis in range(3) if x.shape[axis] != 1]
    return all([
        stride == below[0] * below[1]
        for (_, stride), below in zip(axes[:-1], axes[1:], strict=True)
    ])


def _along_one_axis(x: Tensor) -> Tensor:
    """x [B, I, J, C], of which `_is_one_axis`, as a view [1, M, 1, C]."""
    shape = (1, x.shape[:3].numel(), 1, x.shape[3])
    if x.is_contiguous():
        return x.view(shape)
    steps = [x.stride(axis) for axis in range(3) if x.shape[axis] != 1]
    return x.as_strided(shape, (0, steps[-1] if steps else 0, 0, x.stride(3)))


def plan(call: Transition) -> Plan:
    """The launches and buffers of `forward`."""
    with rehearsal(device_target(call.x.device)) as launches, torch.no_grad():
        kernels_call = for_kernels(_merged(twin_of(call)))
        _run(kernels_call, launches)
        notes = notes_on_precision(call, kernels_call)
    found = Plan(None, None, launches.launched, launches.buffers, launches.peak, 0, notes)
    if call.needs_grad:
        notes.append("nothing is kept for the backward, which makes the hidden channels again")
    if call.lengths is not None:
        notes.append("tiles beyond the lengths are skipped; the programs above are all")
    return with_precision(found, "swiglu_hidden", kernels_call)


def plan_training(call: Transition) -> list:
    """The launches of `plan` and of `backward`, as `Plan.launches`, for all gradients."""
    names = [name for name, value in call.weights._asdict().items() if value is not None]
    with rehearsal(device_target(call.x.device)) as launches, torch.no_grad():
        backward_call = for_kernels(_merged(twin_of(call._replace(residual=None))))
        fused = _fused_setting(backward_call)
        _run_backward(
            backward_call, backward_call.x, _turned(backward_call, fused), fused,
            frozenset({"x", *names}), launches,
        )  # fmt: skip
    return plan(call).launches + launches.launched
