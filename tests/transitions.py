"""Random problems of `swiglu_transition`, which the functions of `helpers` take too."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from esmfold2_trimul_tools.oracle import transition
from helpers import seeded
from torch import Tensor

PATHS = ("aten", "triton")
NORMS = ("norm_weight", "norm_bias")
BIASES = ("gate_bias", "up_bias", "down_bias")


@dataclass
class TransitionProblem:
    """One call: x [..., C], parameters by their public names, residual, lengths."""

    x: Tensor
    weights: dict[str, Tensor]
    residual: Tensor | None = None
    lengths: Tensor | None = None
    eps: float = 1e-5
    biases: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: str) -> TransitionProblem:
        def move(value):
            return value.to(device) if isinstance(value, Tensor) else value

        weights = {name: move(value) for name, value in self.weights.items()}
        biases = {name: move(value) for name, value in self.biases.items()}
        moved = move(self.x)
        residual = moved if self.residual is self.x else move(self.residual)
        return TransitionProblem(moved, weights, residual, move(self.lengths), self.eps, biases)

    def formula(self, dtype: torch.dtype) -> Tensor:
        """The oracle's result."""
        return transition(
            self.x, self.weights | self.biases, residual=self.residual, lengths=self.lengths,
            eps=self.eps, dtype=dtype,
        )  # fmt: skip

    def run(self, kernel, **others) -> Tensor:
        """The function's value."""
        given = {"residual": self.residual, "lengths": self.lengths, "eps": self.eps}
        return kernel.swiglu_transition(self.x, **self.weights, **self.biases, **given | others)


def make_transition(
    shape: Iterable[int],
    hidden: int,
    *,
    dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype = torch.float32,
    residual: str | None = None,
    lengths: Iterable[int] | None = None,
    biases: Iterable[str] = (),
    bias_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TransitionProblem:
    """Random inputs like a trained trunk's. `residual` is "own", or "x" for x itself."""
    *leading, channels = shape
    generator = seeded(seed)

    def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    gate_and_up = randn(2 * hidden, channels, scale=channels**-0.5)
    weights = {
        "norm_weight": 1 + randn(channels, scale=0.2, dtype=norm_dtype),
        "norm_bias": randn(channels, scale=0.2, dtype=norm_dtype),
        "gate_weight": gate_and_up[:hidden],  # halves of one matrix, as in ESMFold2
        "up_weight": gate_and_up[hidden:],
        "down_weight": randn(channels, hidden, scale=hidden**-0.5),
    }
    x = (torch.randn(*leading, channels, generator=generator) * 1.5 + 0.3).to(dtype)
    problem = TransitionProblem(x, weights)
    widths = {"gate_bias": hidden, "up_bias": hidden, "down_bias": channels}
    problem.biases = {name: randn(widths[name], scale=0.3, dtype=bias_dtype) for name in biases}
    if residual is not None:
        problem.residual = x if residual == "x" else randn(*leading, channels)
    if lengths is not None:
        problem.lengths = torch.tensor(lengths).view(leading[:-2])
    return problem


def poisoned(problem: TransitionProblem) -> TransitionProblem:
    """The problem with NaN in the padding of x."""
    residues = torch.arange(problem.x.shape[-2]) < problem.lengths[..., None]
    within = residues[..., :, None] & residues[..., None, :]
    return replace(problem, x=torch.where(within[..., None], problem.x, math.nan))


def as_transition(types, problem: TransitionProblem, **others):
    """The problem as the paths take it; `types` is the package's module `_call`."""
    values = problem.weights | problem.biases
    names = types.TransitionWeights._fields
    channels, lengths = problem.x.shape[-1], problem.lengths
    leading = (1, 1, 1, *problem.x.shape[:-1])[-3:]
    shape = (problem.x.shape[:-3].numel(), *leading[1:], channels)
    fields = {
        "x": problem.x.reshape(shape),
        "residual": None if problem.residual is None else problem.residual.reshape(shape),
        "weights": types.TransitionWeights(**{name: values.get(name) for name in names}),
        "eps": problem.eps,
        "precision": "fp32",
        "inplace": False,
        "lengths": None if lengths is None else lengths.to(torch.int32).reshape(-1),
    }
    return types.Transition(**fields | others)


def in_tree_transition(problem: TransitionProblem, chunk: int | None = None) -> torch.nn.Module:
    """transformers' own module with this problem's parameters; its residual is x."""
    from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2Transition

    w = problem.weights
    module = EsmFold2Transition(problem.x.shape[-1], w["gate_weight"].shape[0], chunk)
    values = {
        "norm.weight": w["norm_weight"],
        "norm.bias": w["norm_bias"],
        "mlp.gate_up_proj.weight": torch.cat([w["gate_weight"], w["up_weight"]]),
        "mlp.down_proj.weight": w["down_weight"],
    }
    # `assign` keeps each value's own dtype: fp32 norms beside 16-bit projections.
    module.load_state_dict({name: value.clone() for name, value in values.items()}, assign=True)
    module.norm.eps = problem.eps
    return module.to(problem.x.device)


def in_tree_transition_gradients(
    problem: TransitionProblem, grad_out: Tensor
) -> dict[str, Tensor]:
    """That module's gradients, by the names of our arguments; x's with the residual's."""
    module = in_tree_transition(problem)
    x = problem.x.clone().requires_grad_()
    module(x).backward(grad_out)
    of_gates, of_ups = module.mlp.gate_up_proj.weight.grad.chunk(2)
    return {
        "x": x.grad,
        "norm_weight": module.norm.weight.grad,
        "norm_bias": module.norm.bias.grad,
        "gate_weight": of_gates,
        "up_weight": of_ups,
        "down_weight": module.mlp.down_proj.weight.grad,
    }


def turned(value: Tensor) -> Tensor:
    return value.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)


def sliced(value: Tensor) -> Tensor:
    wide = torch.full((*value.shape[:-1], value.shape[-1] + 5), 99.0, dtype=value.dtype)
    wide[..., 5:] = value.cpu()
    return wide.to(value.device)[..., 5:]


def between(value: Tensor) -> Tensor:
    return torch.stack([value, torch.full_like(value, 99.0)], dim=-1)[..., 0]


def shifted(value: Tensor) -> Tensor:
    memory = torch.zeros(value.numel() + 1, dtype=value.dtype, device=value.device)
    return memory[1:].view(value.shape).copy_(value)


# Of rows [B, I, J, C].
LAYOUTS = {
    "residues swapped": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2),
    "batch and channels turned": turned,
    "sliced channels": sliced,
    "every other channel": between,
    "an odd offset": shifted,
    "every other row": lambda v: v.repeat_interleave(2, dim=1)[:, ::2],
}
