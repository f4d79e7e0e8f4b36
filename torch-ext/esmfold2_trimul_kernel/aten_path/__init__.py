"""The ATen path (see `paths`): calls in plain PyTorch operations.

Autocast is off in it: it would lower the precision of float32 operands, forward and backward.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .._call import Call
from .._plan import Plan, note_on_gradients
from ..validation import pairs_within
from . import transition as transition
from .blocks import Stages, saved_shape, trimul_differentiable, trimul_inference, trimul_saving
from .gradients import Steps, multiply_gradients, through_emission, through_inputs, trimul_backward


def forward(call: Call) -> Tensor:
    """The output [B, L, L, C]. Each sequence is cut to its length, for which the host waits."""
    with _no_autocast(call):
        out = trimul_inference(call) if call.lengths is None else _by_sequence(call)
    return call.residual.copy_(out) if call.inplace else out


def forward_saving(call: Call) -> tuple[Tensor, Tensor, None, None]:
    """The output, the product [B, D, L, L], and nothing else. Lengths act as a mask."""
    masked, within = _masked(call)
    with _no_autocast(call):
        out, product = trimul_saving(masked)
    return _padding_left(call, out, within), product, None, None


def saved_shapes(call: Call) -> tuple[tuple[int, ...], ...]:
    """The shapes of product, moments and planes."""
    return saved_shape(call.x, call.weights), (0,), (0,)


def backward(
    call: Call,
    grad_out: Tensor,
    product: Tensor | None,
    moments: Tensor | None,
    planes: Tensor | None,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients that `needs` names; a product that is None is computed again."""
    call, within = _masked(call)
    if within is not None:
        grad_out = grad_out.masked_fill(~within[..., None], 0)
    with _no_autocast(call):
        return trimul_backward(call, grad_out, product, needs)


def formula(call: Call) -> Tensor:
    """The output, on any device, in operations that torch.func and forward-mode AD can follow."""
    masked, within = _masked(call)
    with _no_autocast(call):
        return _padding_left(call, trimul_differentiable(masked), within)


@contextlib.contextmanager
def stages(call: Call, first_row: int) -> Iterator["Rows"]:
    """The stages for `sharded`, of a call whose x [B, R, L, C] begins at row `first_row`."""
    with _no_autocast(call):
        yield Rows(call, first_row)


@contextlib.contextmanager
def gradient_stages(
    call: Call, first_row: int, needs: frozenset[str], grads: dict[str, Tensor]
) -> Iterator["RowGradients"]:
    """The stages and their backward, for `sharded`; `grads` as for `gradients.Steps`."""
    with _no_autocast(call):
        yield RowGradients(call, first_row, needs, grads)


class Rows(Stages):
    """The stages of some rows. Lengths act as a mask."""

    slots = 2  # planes that stage 2 works on: the left operand, which the product overwrites, and b
    moments, moment_bytes = None, 0  # of a pair of x; none are kept
    would_split = False

    def __init__(self, call: Call, first_row: int) -> None:
        masked, self._within = _masked(call, first_row)
        super().__init__(masked)
        self.pitch = call.x.shape[2]

    def emit(self, index: int, product: Tensor, out: Tensor) -> None:
        if self._within is None:
            return super().emit(index, product, out)
        made = torch.empty_like(out)  # as `out` may be the residual, which is left in the padding
        super().emit(index, product, made)
        within = self._within[index : index + 1]
        out.copy_(_padding_left(self._call.of_entry(index), made[None], within)[0])


class RowGradients(Rows):
    """The stages of some rows, and their backward, on one sequence after the other."""

    def __init__(
        self, call: Call, first_row: int, needs: frozenset[str], grads: dict[str, Tensor]
    ) -> None:
        super().__init__(call, first_row)
        self._steps = Steps(self._call, needs, grads)
        self.behind_product = self._steps.behind_product

    def begin(self, index: int, grad_out: Tensor, product: Tensor, moments: None) -> None:
        """The sequence of what follows, with its grad_out [R, L, C] and product [D, R, L]."""
        if self._within is not None:
            grad_out = grad_out.masked_fill(~self._within[index, ..., None], 0)
        self._sequence = self._steps.of_entry(index, grad_out, product)

    def through_emission(self, grad_t: Tensor, scratch: Tensor) -> None:
        """Stage 3's backward: dt [D, R, L], if something behind the product is needed."""
        through_emission(self._steps, self._sequence, grad_t if self.behind_product else None)

    def multiply_gradients(
        self, index: int, grad: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor
    ) -> None:
        """da and db of dt, a and b, whole planes [G, L, L]; da may be dt, and db a or b."""
        multiply_gradients(self._steps, grad, a, b, grad_a, grad_b)

    def through_inputs(self, planes: Tensor, scratch: Tensor) -> None:
        """Stage 1's backward, from planes [2, D, R, L] of da and db."""
        if self.behind_product:
            through_inputs(self._steps, self._sequence, *planes)
        elif self._steps.behind_gate:
            through_inputs(self._steps, self._sequence, None, None)

    def of_parameters(self) -> dict[str, Tensor]:
        """The gradients of the parameters of all sequences, in the dtype of sums."""
        return self._steps.of_parameters()


def plan(call: Call) -> Plan:
    """The buffers of `forward`, or of `forward_saving` if the product is kept.

    Those of a block, which stay within a CPU's caches, are not counted.
    """
    x, channels = call.x, call.x.shape[3]
    batch, hidden, length, _ = saved_shape(x, call.weights)
    planes = hidden * length * length * x.element_size()  # bytes of one sequence
    keeps = call.needs_grad and call.keeps_product
    buffers = {"a, then the product": batch * planes if keeps else planes, "output": x.nbytes}
    notes = ["Triton is not for this call, for the reason above"]
    if hidden > channels:
        buffers["b"] = planes
    else:
        notes.append("b lies in the memory of the output until that is written")
    notes.append(note_on_gradients(call))
    if call.lengths is not None and not keeps:
        buffers["output of one sequence, cut to its length"] = x.nbytes // batch
        notes.append("each sequence is cut to its length, which the host reads")
    elif call.lengths is not None:
        buffers["x without what lies in the padding"] = x.nbytes
        notes.append("lengths act as a mask, as the product is kept")
    kept = batch * planes if keeps else 0
    return Plan(None, None, [], buffers, sum(buffers.values()), kept, notes)


def _no_autocast(call: Call) -> torch.autocast:
    return torch.autocast(call.x.device.type, enabled=False)


def _by_sequence(call: Call) -> Tensor:
    """The output, with each sequence cut to its length; the update of padding is zero."""
    out = torch.zeros(call.x.shape, dtype=call.x.dtype, device=call.x.device)
    if call.residual is not None:
        out.copy_(call.residual)
    for index, length in enumerate(call.lengths.clamp(0, call.x.shape[1]).tolist()):
        if length == 0:
            continue
        seq = call.of_entry(index)
        cut = {
            name: None if value is None else value[:, :length, :length]
            for name, value in (("x", seq.x), ("mask", seq.mask), ("residual", seq.residual))
        }
        drop_mask = None if seq.drop_mask is None else seq.drop_mask[:, :length]
        out[index, :length, :length] = trimul_inference(seq._replace(**cut, drop_mask=drop_mask))[0]
    return out


def _masked(call: Call, first_row: int = 0) -> tuple[Call, Tensor | None]:
    """The call with its lengths as a mask and zeros in its padding, and the pairs within."""
    if call.lengths is None:
        return call, None
    _, rows, length, _ = call.x.shape
    within = pairs_within(call.lengths, length)[:, first_row : first_row + rows]
    # Filled, not multiplied: the padding may hold NaN.
    mask = within if call.mask is None else call.mask.masked_fill(~within, 0)
    return call._replace(x=torch.where(within[..., None], call.x, 0), mask=mask), within


def _padding_left(call: Call, out: Tensor, within: Tensor | None) -> Tensor:
    """`out` with the residual, or 0, in the padding."""
    if within is None:
        return out
    return torch.where(within[..., None], out, 0 if call.residual is None else call.residual)
