"""The oracle, random problems, and the error budget, for every numerical test."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from esmfold2_trimul_tools.oracle import triangle_multiplication
from torch import Tensor

# Another number changes all random tensors of the tests.
SEED = int(os.environ.get("TRIMUL_TEST_SEED", 0))
Results = Tensor | dict[str, Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Relative L2 error against float64 of three roundings to 16 bits (planes, product, output) and the
# rounded GEMM operands; float32 is the project's promise for "highest" precision.
ERROR_BUDGET = {torch.bfloat16: 4.8e-3, torch.float16: 7e-4, torch.float32: 5e-6}


# The package's exports: a new name is a version decision.
PUBLIC_NAMES = [
    "ESMFold2TriangleMultiplication",
    "explain",
    "free_exchange_memory",
    "from_boltz",
    "from_chai",
    "from_esm",
    "from_esmfold2",
    "from_openfold",
    "from_openfold3",
    "from_protenix",
    "layers",
    "lengths_from_mask",
    "patch",
    "sharded_pairs",
    "sharded_triangle_multiplicative_update",
    "sharded_triangle_multiplicative_update_with_residual",
    "swiglu_transition",
    "transition_from_boltz",
    "transition_from_esm",
    "transition_from_esmfold2",
    "transition_from_openfold3",
    "transition_from_protenix",
    "triangle_multiplicative_update",
    "triangle_multiplicative_update_with_residual",
    "unpatch",
    "warmup",
]


def seeded(seed: int = 0) -> torch.Generator:
    """A generator of a test's random numbers, which depend on TRIMUL_TEST_SEED."""
    return torch.Generator().manual_seed(1000 * SEED + seed)


@dataclass
class Problem:
    """One call: x [B, L, L, C], parameters by their public names, mask, residual, drop mask."""

    x: Tensor
    weights: dict[str, Tensor]
    direction: str = "outgoing"
    mask: Tensor | None = None
    residual: Tensor | None = None
    drop_mask: Tensor | None = None
    eps: float = 1e-5
    biases: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: str) -> Problem:
        def move(value):
            return value.to(device) if isinstance(value, Tensor) else value

        # Field by field: torch 2.11 can't compile a loop over them.
        weights = {name: move(value) for name, value in self.weights.items()}
        biases = {name: move(value) for name, value in self.biases.items()}
        others = (move(self.mask), move(self.residual), move(self.drop_mask))
        return Problem(move(self.x), weights, self.direction, *others, self.eps, biases)

    def formula(self, dtype: torch.dtype) -> Tensor:
        """The oracle's result."""
        return triangle_multiplication(
            self.x, self.direction, self.weights | self.biases, mask=self.mask,
            residual=self.residual, drop_mask=self.drop_mask, eps=self.eps, dtype=dtype,
        )  # fmt: skip

    def run(self, kernel, **others) -> Tensor:
        """The public function that takes these arguments."""
        if self.biases:
            return kernel.triangle_multiplicative_update(
                self.x, self.direction, self.mask, eps=self.eps, **self.weights, **self.biases,
                **others,
            )  # fmt: skip
        return kernel.triangle_multiplicative_update_with_residual(
            self.x, self.direction, self.residual, self.drop_mask, mask=self.mask, eps=self.eps,
            **self.weights, **others,
        )  # fmt: skip


def make_problem(
    length: int,
    channels: int,
    hidden: int | None = None,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    norm_dtype: torch.dtype = torch.float32,
    direction: str = "outgoing",
    mask: str | None = None,
    residual: bool = False,
    drop_mask: bool = False,
    biases: bool = False,
    seed: int = 0,
) -> Problem:
    """Random inputs like a trained trunk's: rows of mean 0.3, uneven norm weights."""
    hidden = channels if hidden is None else hidden
    generator = seeded(seed)

    def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    x = randn(batch, length, length, channels, scale=1.5) + 0.3
    weights = {
        "norm_in_weight": 1 + randn(channels, scale=0.2, dtype=norm_dtype),
        "norm_in_bias": randn(channels, scale=0.2, dtype=norm_dtype),
        "p_in_weight": randn(2 * hidden, channels, scale=channels**-0.5),
        "g_in_weight": randn(2 * hidden, channels, scale=channels**-0.5),
        "norm_out_weight": 1 + randn(hidden, scale=0.2, dtype=norm_dtype),
        "norm_out_bias": randn(hidden, scale=0.2, dtype=norm_dtype),
        "p_out_weight": randn(channels, hidden, scale=hidden**-0.5),
        "g_out_weight": randn(channels, channels, scale=channels**-0.5),
    }
    problem = Problem(x.to(dtype), weights, direction)
    if mask is not None:
        problem.mask = make_mask(mask, batch, length, generator)
    if residual:
        problem.residual = randn(batch, length, length, channels)
    if drop_mask:
        keep = torch.rand(batch, 1, length, channels, generator=generator) > 0.25
        problem.drop_mask = (keep / 0.75).to(dtype)
    if biases:
        problem.biases = {
            "p_in_bias": randn(2 * hidden, scale=0.3),
            "g_in_bias": randn(2 * hidden, scale=0.3),
            "p_out_bias": randn(channels, scale=0.3),
            "g_out_bias": randn(channels, scale=0.3),
        }
    return problem


def make_mask(kind: str, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """ "bool" and "float" padding masks, a "soft" one in [0, 1], an "expanded" stride-0 view."""
    if kind == "soft":
        return torch.rand(batch, length, length, generator=generator)
    if kind == "expanded":
        return (torch.rand(batch, 1, length, generator=generator) > 0.3).expand(-1, length, -1)
    real = torch.arange(length) < max(1, length - 3)
    pairs = (real[:, None] & real[None, :]).expand(batch, -1, -1).contiguous()
    if kind == "bool":
        return pairs
    if kind == "float":
        return pairs.float()
    raise ValueError(f"kind must be 'bool', 'float', 'soft' or 'expanded'; got {kind!r}")


# In what follows a problem may be one of `transitions` too.
def reference(problem: Problem) -> Tensor:
    """The result in float64: see `esmfold2_trimul_tools.oracle`."""
    return formula(problem).detach()


@torch.enable_grad()
def reference_gradients(problem: Problem, grad_out: Tensor) -> dict[str, Tensor]:
    """Float64 autograd's gradients of every leaf of the problem, given the output's gradient."""
    leaves = {
        name: leaf.detach().cpu().double().requires_grad_()
        for name, leaf in leaves_of(problem).items()
    }
    out = formula(with_leaves(problem, leaves))
    grads = torch.autograd.grad(out, list(leaves.values()), grad_out.detach().cpu().double())
    return dict(zip(leaves, grads, strict=True))


def leaves_of(problem: Problem) -> dict[str, Tensor]:
    """The problem's tensors that may have a gradient, by the names of the arguments."""
    named = vars(problem) | problem.weights | problem.biases
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def with_leaves(problem: Problem, leaves: dict[str, Tensor]) -> Problem:
    """The problem with some tensors replaced."""

    def put(group: dict) -> dict:
        return {name: leaves.get(name, value) for name, value in group.items()}

    weights, biases = put(problem.weights), put(problem.biases)
    return type(problem)(**put(vars(problem)) | {"weights": weights, "biases": biases})


def formula(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    """The oracle's result on the CPU: every operation's in `dtype`, norms in float32 at least."""
    return problem.to("cpu").formula(dtype)


@contextlib.contextmanager
def memory_of_no_numbers() -> Iterator[None]:
    """A context in which torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(kernel, problem: Problem, device: str = "cpu", **others) -> Tensor:
    """The public function's value on `device`."""
    return problem.to(device).run(kernel, **others)


def ran(launches, stage: str, variant: str) -> bool:
    """Whether launches of a kind of call, or their recorded schedule, have this one."""
    steps = getattr(launches.recording, "_steps", [])
    prepared = [*launches.values(), *[step._prepared for step in steps]]
    return any(one.stage == stage and one.variant == variant for one in prepared)


def as_call(types, problem: Problem, **others):
    """The problem as the paths take it; `types` is the package's module `_call`."""
    values = {**problem.weights, **problem.biases}
    fields = {
        "x": problem.x,
        "direction": problem.direction,
        "mask": problem.mask,
        "residual": problem.residual,
        "drop_mask": None if problem.drop_mask is None else problem.drop_mask.squeeze(1),
        "weights": types.Weights(**{name: values.get(name) for name in types.Weights._fields}),
        "eps_in": problem.eps,
        "eps_out": problem.eps,
        "precision": "fp32",
        "memory": "default",
        "recompute": "none",
        "inplace": False,
        "lengths": None,
    }
    return types.Call(**fields | others)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted|| in float64; NaN if anything is."""
    got = got.detach().cpu().double()
    return float((got - wanted).norm() / wanted.norm())


def assert_close(got: Tensor, problem: Problem, beside_plain: float = 0.85) -> None:
    """`got` is the problem's answer in shape, dtype and value.

    Its error is within the dtype's budget. As 16 bits are worse for some numbers than for others,
    it may instead be `beside_plain` times that of the formula in plain PyTorch, with room for luck.
    """
    wanted, dtype = reference(problem), problem.x.dtype
    assert got.shape == problem.x.shape and got.dtype == dtype and got.is_contiguous()
    error, limit = relative_error(got, wanted), ERROR_BUDGET[dtype]
    if dtype != torch.float32 and not error <= limit:
        plain = relative_error(formula(problem, dtype).detach(), wanted)
        limit = max(limit, beside_plain * plain) * room(got.numel())
    assert error <= limit, f"relative error {error:.2e}, above {limit:.2e}"


# The fewest values over which errors of two computations are compared: see `room`.
LEAST_VALUES = 500


def room(values: int) -> float:
    """The factor by which the errors of two roundings of n = `values` values may differ by chance.

    If their errors are independent and normal, the logarithm of the ratio of their RMS scatters by
    n^-1/2 from draw to draw. Errors of gradients are not quite so: in the problems of
    tests/aten_path those of parameters scatter by 0.7 to 2 n^-1/2, and those of pairs with few
    channels, which share the error of a norm, by 4 n^-1/2, but there n is large. The logarithm of
    this factor is five times 2 n^-1/2. Below 16 values it would mean nothing; they get that of 16.
    """
    return math.exp(10 * max(values, 16) ** -0.5)


def draws_of(smallest: int) -> range:
    """Seeds of the problems that give LEAST_VALUES values of a result with `smallest` values."""
    return range(-(-LEAST_VALUES // smallest))


def assert_no_worse(draws: Iterable[tuple[Results, Results, Results]], factor: float) -> None:
    """The errors of the first are at most `factor` times the second's, and room for chance.

    Each of the draws is two computations' results and the wanted ones, each a tensor or several by
    name. Errors of a name are taken together over all draws, each as often as it has values. So
    that an ill-conditioned draw counts no more than another, each is divided by the sum of its two
    errors.
    """
    sums: dict[str, tuple[int, float, float]] = {}
    for draw in draws:
        got, other, wanted = ({"": of} if isinstance(of, Tensor) else of for of in draw)
        for name, exact in wanted.items():
            values = (some[name].reshape(exact.shape) for some in (got, other))
            mine, its = (relative_error(value, exact) ** 2 for value in values)
            assert math.isfinite(mine), name
            values, of_mine, of_its = sums.get(name, (0, 0.0, 0.0))
            share = exact.numel() / (mine + its or 1.0)
            sums[name] = values + exact.numel(), of_mine + mine * share, of_its + its * share
    for name, (values, of_mine, of_its) in sums.items():
        limit = factor * room(values)
        errors = [math.sqrt(of / values) for of in (of_mine, of_its)]
        assert of_mine <= limit**2 * of_its, (name, errors)


def in_tree_module(problem: Problem) -> torch.nn.Module:
    """transformers' own module with this problem's parameters: what the layer stands in for."""
    from transformers import EsmFold2Config
    from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2TriangleMultiplicativeUpdate

    config = EsmFold2Config(pairwise_hidden_size=problem.x.shape[-1])
    module = EsmFold2TriangleMultiplicativeUpdate(config, problem.direction == "outgoing")
    w = problem.weights
    values = {
        "norm_start.weight": w["norm_in_weight"],
        "norm_start.bias": w["norm_in_bias"],
        "norm_mix.weight": w["norm_out_weight"],
        "norm_mix.bias": w["norm_out_bias"],
        "proj_bundle.weight": torch.cat([w["p_in_weight"], w["g_in_weight"]]),
        "proj_emit.weight": w["p_out_weight"],
        "proj_gate.weight": w["g_out_weight"],
    }
    # `assign` keeps each value's own dtype: fp32 norms beside 16-bit projections.
    module.load_state_dict({name: value.clone() for name, value in values.items()}, assign=True)
    module.norm_start.eps = module.norm_mix.eps = problem.eps
    return module.to(problem.x.device)


def in_tree_gradients(problem: Problem, grad_out: Tensor) -> dict[str, Tensor]:
    """That module's gradients of x and of the parameters, by the names of our arguments."""
    module = in_tree_module(problem)
    x = problem.x.clone().requires_grad_()
    module(x, problem.mask).backward(grad_out)
    of_values, of_gates = module.proj_bundle.weight.grad.chunk(2)
    return {
        "x": x.grad,
        "norm_in_weight": module.norm_start.weight.grad,
        "norm_in_bias": module.norm_start.bias.grad,
        "p_in_weight": of_values,
        "g_in_weight": of_gates,
        "norm_out_weight": module.norm_mix.weight.grad,
        "norm_out_bias": module.norm_mix.bias.grad,
        "p_out_weight": module.proj_emit.weight.grad,
        "g_out_weight": module.proj_gate.weight.grad,
    }
