"""The stages on some rows of each sequence, and their backward, for `sharded`."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .._call import Call
from .gradients import (
    Norms,
    Sequence,
    Wanted,
    gradients_of_parameters,
    likeness,
    memory_of_grad_q,
    setting_to_grad_x,
)
from .launches import current_device, launches_of
from .rows import Rows
from .trimul_einsum_backward import multiply_gradients


@contextlib.contextmanager
def gradient_stages(
    call: Call, first_row: int, needs: frozenset[str], grads: dict[str, Tensor]
) -> Iterator["RowGradients"]:
    """The stages and their backward, of a call whose x [B, R, L, C] begins at row `first_row`.

    `grads` are those of "x", "mask" and "drop_mask" that `needs` names, to be written; the last may
    be of a wider dtype.
    """
    # Autocast would choose dtypes for what torch itself computes.
    with torch.autocast(call.x.device.type, enabled=False), current_device(call.x):
        yield RowGradients(call, first_row, needs, grads)


class RowGradients(Rows):
    """The stages of some rows, and their backward, on one sequence after the other."""

    def __init__(
        self, call: Call, first_row: int, needs: frozenset[str], grads: dict[str, Tensor]
    ) -> None:
        super().__init__(call, first_row)
        self._needs, self._grads, self._wanted = needs, grads, Wanted.of(needs)
        self._grad_q = memory_of_grad_q(self._call, self._wanted, grads)
        self._parts, self._norms = {}, None
        self.behind_product = self._wanted.through_product

    def begin(self, index: int, grad_out: Tensor, product: Tensor, moments: Tensor) -> None:
        """The sequence of what follows.

        grad_out is [R, L, C], product [D, R, pitch], moments [1, 2, R, pitch].
        """
        call = self._call
        launches = launches_of(call, "row gradients", self._wanted, likeness(grad_out))
        if self._norms is None:
            self._norms = Norms(launches, call.weights, call.precision)
        self.moments = moments
        self._by_rows = moments[0, :, :, : call.x.shape[2]]
        self._launches, self._grad_out, self._product = launches, grad_out, product
        self._sequence = Sequence(
            call.of_entry(index),
            launches,
            self._wanted,
            self._parts,
            {name: grad[index] for name, grad in self._grads.items()},
            None if self._grad_q is None else self._grad_q[index],
            self._norms,
            setting_to_grad_x(call, self._wanted, launches),
            self._first_row,
        )

    def through_emission(self, grad_t: Tensor, scratch: Tensor) -> None:
        """Stage 3's backward: dt [D, R, pitch]."""
        self._sequence.stage_3(self._product, self._by_rows, self._grad_out, grad_t, scratch)

    def multiply_gradients(
        self, index: int, grad: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor
    ) -> None:
        """da and then db of dt, a and b, whole planes [G, L, pitch]; db may be b."""
        call = self._call.of_entry(index)
        launches = launches_of(self._call, "products of row gradients")
        multiply_gradients(
            call, launches, grad, a, b, grad_a, grad_b, grad.shape[0], with_axes_of_x=True
        )

    def through_inputs(self, planes: Tensor, scratch: Tensor) -> None:
        """Stage 1's backward, from planes [2, D, R, pitch] of da and db."""
        if self.behind_product:
            hidden = planes.shape[1]
            self._sequence.stage_1(planes.flatten(0, 1), self._by_rows, hidden, scratch)

    def of_parameters(self) -> dict[str, Tensor]:
        """The gradients of the parameters of all sequences, in float32."""
        weights = self._call.weights
        if self._parts:
            return gradients_of_parameters(
                self._launches, weights, self._parts, self._needs, torch.float32
            )
        return {
            name: torch.zeros(value.shape, dtype=torch.float32, device=value.device)
            for name, value in weights._asdict().items()
            if name in self._needs
        }
