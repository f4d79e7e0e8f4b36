"""Gradients of one call of a public function, for tests on either path."""

import contextlib
from collections.abc import Callable

import torch
from helpers import Problem, leaves_of, run, seeded, with_leaves
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BF16 = torch.bfloat16
LIMIT = 2e-5  # of the relative error of any float32 gradient
RECOMPUTE = ("none", "product", "all")
HALVES = ("gate_weight", "up_weight")  # of one matrix in ESMFold2's transitions


@contextlib.contextmanager
def in_many_parts(submodule, monkeypatch, configs: dict):
    """A context in which stages have these settings, and short sequences chunks and groups."""
    launches, subject = submodule("triton_path.launches"), submodule("triton_path.gradients")
    pick = submodule("triton_parts.launch"), "pick_config"
    monkeypatch.setattr(*pick, lambda stage, *_: configs[stage])
    for name, value in (
        ("_CHUNK_PAIRS", 27), ("SMALL_PLANES", 0), ("_SMALL_PLANES_AGAIN", 0),
        ("_GROUP_ELEMENTS", 1),
    ):  # fmt: skip
        monkeypatch.setattr(subject, name, value)
    launches._launches.clear()
    try:
        yield
    finally:
        launches._launches.clear()


def grad_of_output(problem: Problem) -> Tensor:
    generator = seeded(7)
    return torch.randn(problem.x.shape, generator=generator).to(problem.x.dtype)


def fresh_leaves(problem: Problem, device: str) -> dict[str, Tensor]:
    """Copies of the problem's leaves.

    The input projections lie in one piece of memory, as in ESMFold2: values first, or a
    transition's gates. The triangle's kernels begin with the lower address, and the order would
    show in the last bit in the interpreter, whose BLAS rounds a column depending on its place in
    the tile.
    """
    leaves = {
        name: leaf.detach().clone().to(device) for name, leaf in leaves_of(problem).items()
    }
    both = ("p_in_weight", "g_in_weight") if "p_in_weight" in leaves else HALVES
    bundle = torch.cat([leaves[name] for name in both])
    leaves |= {name: half.detach() for name, half in zip(both, bundle.chunk(2), strict=True)}
    return leaves


def gradients(
    kernel,
    problem: Problem,
    device: str,
    names: tuple[str, ...] | None = None,
    through: Callable[..., Tensor] | None = None,
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
    """The gradients, out of `names`, that a backward op was asked for."""

    def __init__(self, names: tuple[str, ...], op: str = "trimul_bwd") -> None:
        super().__init__()
        self._names, self._op = names, op
        self.names: list[set[str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.__name__.startswith(self._op):
            (needs,) = [value for value in args if isinstance(value, (list, tuple))]
            self.names.append({n for n, need in zip(self._names, needs, strict=True) if need})
            for name, gradient in zip(self._names, out, strict=True):
                assert name in self.names[-1] or gradient.numel() == 0
        return out
