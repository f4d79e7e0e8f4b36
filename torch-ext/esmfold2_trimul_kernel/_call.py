"""One checked call of a public function, the argument of all code behind the checks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """The parameters of one triangle multiplication; C pair channels, D hidden channels."""

    norm_in_weight: Tensor | None  # [C]
    norm_in_bias: Tensor | None  # [C]
    p_in_weight: Tensor  # [2D, C], rows [0, D) make a, rows [D, 2D) make b
    p_in_bias: Tensor | None  # [2D]
    g_in_weight: Tensor  # [2D, C]
    g_in_bias: Tensor | None  # [2D]
    norm_out_weight: Tensor | None  # [D]
    norm_out_bias: Tensor | None  # [D]
    p_out_weight: Tensor  # [C, D]
    p_out_bias: Tensor | None  # [C]
    g_out_weight: Tensor  # [C, C]
    g_out_bias: Tensor | None  # [C]


# The arguments with a gradient of their own; the residual's gradient is the output's.
DIFFERENTIABLE = ("x", "mask", "drop_mask", *Weights._fields)


class Call(NamedTuple):
    """The arguments of either public function, checked and in one form."""

    x: Tensor  # [B, L, L, C]
    direction: str
    mask: Tensor | None  # [B, L, L]
    residual: Tensor | None  # like x
    drop_mask: Tensor | None  # [B, L, C]; in `sharded` also [B, R, 1, C]
    weights: Weights
    eps_in: float
    eps_out: float
    precision: str  # one of the kernels' words, or "default" for torch's setting
    memory: str
    recompute: str
    inplace: bool  # the output is written over the residual
    lengths: Tensor | None  # [B] int32, of sequences with padding on the right

    def flat(self) -> tuple[Any, ...]:
        """The fields in the order of the ops' schemas, the parameters one by one."""
        # Field by field: torch.compile of torch 2.11 can't follow slices of a named tuple.
        return (
            self.x, self.direction, self.mask, self.residual, self.drop_mask, *self.weights,
            self.eps_in, self.eps_out, self.precision, self.memory, self.recompute, self.inplace,
            self.lengths,
        )  # fmt: skip

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> "Call":
        """The call whose `flat()` this is."""
        end = _WEIGHTS + len(Weights._fields)
        return cls._make((*flat[:_WEIGHTS], Weights._make(flat[_WEIGHTS:end]), *flat[end:]))

    def of_entry(self, entry: int) -> "Call":
        """The call on one sequence of the batch."""
        return self.of_entries(slice(entry, entry + 1))

    def of_entries(self, entries: slice) -> "Call":
        """The call on some sequences of the batch."""
        names = ("x", "mask", "residual", "drop_mask", "lengths")
        tensors = {name: getattr(self, name) for name in names}
        return self._replace(
            **{
                name: None if tensor is None else tensor[entries]
                for name, tensor in tensors.items()
            }
        )

    def merged(self, count: int) -> "Call":
        """The call with the rows of `count` sequences as those of one.

        x is [B / count, count L, L, C] then. The call has no lengths and no drop mask.
        """
        return self._replace(
            x=merged(self.x, count),
            mask=None if self.mask is None else merged(self.mask, count),
            residual=None if self.residual is None else merged(self.residual, count),
        )

    @property
    def hidden(self) -> int:
        """D."""
        return self.weights.p_out_weight.shape[1]

    @property
    def needs_grad(self) -> bool:
        """Whether autograd must record the call."""
        tensors = (self.x, self.mask, self.residual, self.drop_mask, *self.weights)
        return torch.is_grad_enabled() and any([
            tensor is not None and tensor.requires_grad for tensor in tensors
        ])

    @property
    def keeps_product(self) -> bool:
        """Whether the product is kept for a backward."""
        return self.recompute != "all"

    @property
    def keeps_planes(self) -> bool:
        """Whether a and b are kept for a backward, on the Triton path."""
        return self.recompute == "none"


def merged(tensor: Tensor, count: int) -> Tensor:
    """[B, L, ...] as [B / count, count L, ...], a view."""
    batch, length = tensor.shape[:2]
    return tensor.view(batch // count, count * length, *tensor.shape[2:])


_WEIGHTS = Call._fields.index("weights")
# The names of `flat()`.
FLAT = (*Call._fields[:_WEIGHTS], *Weights._fields, *Call._fields[_WEIGHTS + 1 :])


class TransitionWeights(NamedTuple):
    """The parameters of one transition; C channels, H hidden channels."""

    norm_weight: Tensor | None  # [C]
    norm_bias: Tensor | None  # [C]
    gate_weight: Tensor  # [H, C]
    gate_bias: Tensor | None  # [H]
    up_weight: Tensor  # [H, C]
    up_bias: Tensor | None  # [H]
    down_weight: Tensor  # [C, H]
    down_bias: Tensor | None  # [C]


class Transition(NamedTuple):
    """The arguments of `swiglu_transition`, checked and in one form."""

    x: Tensor  # [B, I, J, C]
    residual: Tensor | None  # like x
    weights: TransitionWeights
    eps: float
    precision: str  # one of the kernels' words, or "default" for torch's setting
    inplace: bool  # the output is written over the residual
    lengths: Tensor | None  # [B] int32, of sequences with padding on the right; then I = J

    def flat(self) -> tuple[Any, ...]:
        """The fields in the order of the ops' schemas, the parameters one by one."""
        return (
            self.x, self.residual, *self.weights, self.eps, self.precision, self.inplace,
            self.lengths,
        )  # fmt: skip

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> "Transition":
        """The call whose `flat()` this is."""
        end = _TRANSITION_WEIGHTS + len(TransitionWeights._fields)
        weights = TransitionWeights._make(flat[_TRANSITION_WEIGHTS:end])
        return cls._make((*flat[:_TRANSITION_WEIGHTS], weights, *flat[end:]))

    @property
    def hidden(self) -> int:
        """H."""
        return self.weights.down_weight.shape[1]

    @property
    def needs_grad(self) -> bool:
        """Whether autograd must record the call."""
        return torch.is_grad_enabled() and any([
            tensor is not None and tensor.requires_grad
            for tensor in (self.x, self.residual, *self.weights)
        ])


# The transition's arguments with a gradient of their own; the residual's is the output's.
TRANSITION_DIFFERENTIABLE = ("x", *TransitionWeights._fields)
_TRANSITION_WEIGHTS = Transition._fields.index("weights")
# The names of `Transition.flat()`.
TRANSITION_FLAT = (
    *Transition._fields[:_TRANSITION_WEIGHTS],
    *TransitionWeights._fields,
    *Transition._fields[_TRANSITION_WEIGHTS + 1 :],
)


def as_made(*kept: Tensor | None) -> list[Tensor | None]:
    """What was kept for a backward, contiguous and aligned as it was made.

    A user's hooks on saved tensors may give it back otherwise.
    """
    return [
        tensor
        if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0)
        else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in kept
    ]
