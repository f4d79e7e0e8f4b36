"""Gradients of one call of a public function, for tests on either path."""

import torch
from helpers import Problem, leaves_of, run, seeded, with_leaves
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BF16 = torch.bfloat16
LIMIT = 2e-5  # of the relative error of any float32 gradient
RECOMPUTE = ("product", "all")


def grad_of_output(problem: Problem) -> Tensor:
    generator = seeded(7)
    return torch.randn(problem.x.shape, generator=generator).to(problem.x.dtype)


def fresh_leaves(problem: Problem, device: str) -> dict[str, Tensor]:
    """Copies of the problem's leaves.

    The input projections lie in one piece of memory, values first, as in ESMFold2. The kernels
    begin with the lower address, and the order would show in the last bit in the interpreter, whose
    BLAS rounds a column depending on its place in the tile.
    """
    leaves = {
        name: leaf.detach().clone().to(device) for name, leaf in leaves_of(problem).items()
    }
    bundle = torch.cat([leaves["p_in_weight"], leaves["g_in_weight"]])
    leaves["p_in_weight"], leaves["g_in_weight"] = (half.detach() for half in bundle.chunk(2))
    return leaves


def gradients(
    kernel,
    problem: Problem,
    device: str,
    names: tuple[str, ...] | None = None,
    through=None,
    **others,
) -> dict[str, Tensor]:
    """Gradients of the leaves `names`, or all; `through(call, leaves)` may replace the call."""
    leaves = fresh_leaves(problem, device)
    wanted = {name: leaves[name].requires_grad_() for name in names or leaves}

    def call(*values: Tensor) -> Tensor:
        given = leaves | dict(zip(wanted, values, strict=True))
        return run(kernel, with_leaves(problem.to(device), given), device, **others)

    out = call(*wanted.values()) if through is None else through(call, *wanted.values())
    out.backward(grad_of_output(problem).to(device))
    return {name: leaf.grad for name, leaf in wanted.items()}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(got) == set(wanted)
    for name, gradient in got.items():
        assert torch.equal(gradient, wanted[name]), name


class Asked(TorchDispatchMode):
    """The gradients that the backward op was asked for."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self._names = names
        self.names: list[set[str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.__name__.startswith("trimul_bwd"):
            self.names.append({n for n, need in zip(self._names, args[3], strict=True) if need})
            for name, gradient in zip(self._names, out, strict=True):
                assert name in self.names[-1] or gradient.numel() == 0
        return out
