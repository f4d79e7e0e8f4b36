"""Training steps of one pair-update layer, the folding trunk's first: every way at every length.

A step is the layer's forward, and the gradients of the pair tensor and of all its parameters. The
layer is in training mode, but in ESMFold2 it has no dropout, nor has biohub's: every step of a
length computes the same, so that its gradient can be compared with float64.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...folding.full_size import weight_bytes
from ...folding.model import esmfold2_model_class, random_config
from ..case import TRANSITION, Case
from ..clock import CpuClock, GpuClock, make_clock
from ..problem import Problem, make_problem, reference, reference_gradient
from ..rivals import Call, trained
from ..run import check, peak_bytes
from .findings import findings, installing
from .parts import namespace_of
from .results import STEP, Results, Row
from .settings import Plan
from .ways import OURS, TRIANGLES, Bench, Way

if TYPE_CHECKING:
    from transformers import EsmFold2Config, EsmFold2Model


class Step(NamedTuple):
    """The inputs of a length: x, a float mask and grad_out, and the gradient of x in float64."""

    problem: Problem
    wanted: Tensor | None


def layer_config() -> EsmFold2Config:
    """A model whose pair layers are those of the default architecture, and one in each stack."""
    esmfold2_model_class()
    from transformers import EsmFold2Config

    full = EsmFold2Config()
    config = random_config(full.pairwise_hidden_size, trunk_layers=1, side_layers=1, coda_layers=1)
    config.pair_transition_intermediate_size = full.pair_transition_intermediate_size
    config.chunk_size = full.chunk_size
    return config


def layer_of(model: EsmFold2Model) -> nn.Module:
    return model.folding_trunk.layers[0]


def described_layer(model: EsmFold2Model, plan: Plan) -> dict[str, Any]:
    """The results' entry "layer"."""
    layer, config = layer_of(model), model.config
    return {
        "architecture": "small" if plan.small else "transformers' default EsmFold2Config",
        "dtype": plan.dtypes[0],
        "parameters": sum(one.numel() for one in layer.parameters()),
        "bytes": weight_bytes(layer),
        "pair_width": config.pairwise_hidden_size,
        "transition_width": config.pair_transition_intermediate_size,
    }


def step_jobs(
    plan: Plan, bench: Bench, results: Results
) -> Iterator[tuple[str, list[Row], Callable[[], Row]]]:
    """What is missing in the results: a label, the rows to add to, and what makes the row."""
    clock = make_clock(plan.device)

    @functools.lru_cache(maxsize=1)
    def step_at(length: int) -> Step:
        return make_step(length, bench, plan)

    done = {(row["way"], row["L"]) for row in results["steps"]}
    for length in plan.lengths:
        for way in plan.ways:
            left_out = plan.compile_lengths is not None and length not in plan.compile_lengths
            if (way.name, length) in done or (way.compiles and left_out):
                continue
            yield (
                f"L = {length}, {way.name}",
                results["steps"],
                lambda way=way, length=length: measure(
                    way, step_at(length), bench, clock, plan.budget
                ),
            )


def make_step(length: int, bench: Bench, plan: Plan) -> Step:
    """The inputs, and float64's gradient up to plan.check_up_to residues."""
    width = bench.model.config.pairwise_hidden_size
    case = Case(width, length, plan.dtypes[0], mask="float", passes="training")
    problem = make_problem(case, bench.device, plan.seed)
    is_checked = length <= plan.check_up_to
    return Step(problem, layer_gradient(problem, bench) if is_checked else None)


@torch.no_grad()
def layer_gradient(problem: Problem, bench: Bench) -> Tensor:
    """The gradient of x through the layer in float64, part by part: one part's values at a time.

    x1 = x + out(x), x2 = x1 + in(x1), and the transition of x2 with its residual.
    """
    layer, kernel = layer_of(bench.model), bench.sources.kernel
    x, parts = problem.x.double(), []
    for name in TRIANGLES:
        weights = kernel.from_esmfold2(getattr(layer, name))
        case = Case(x.shape[-1], problem.case.length, "float64", weights["direction"])
        parts.append(Problem(case, x, weights, problem.mask))
        x = x + reference(parts[-1]._replace(x=x.clone()))  # which it overwrites
    case = Case(x.shape[-1], problem.case.length, "float64", TRANSITION)
    weights = kernel.transition_from_esmfold2(layer.pair_transition)
    through = Problem(case, x, weights, None, problem.grad_out)
    gradient = reference_gradient(through)
    for part in reversed(parts):
        gradient = gradient + reference_gradient(part._replace(grad_out=gradient))
    return gradient


def measure(way: Way, step: Step, bench: Bench, clock: CpuClock | GpuClock, budget: float) -> Row:
    """The row of one way, compared with float64 and then timed."""
    problem, layer = step.problem, layer_of(bench.model)
    row = dict.fromkeys(STEP) | {
        "L": problem.case.length, "way": way.name, "status": "measured"
    }  # fmt: skip
    with findings(row), _training(layer), installing(way, bench) as installed:
        row["note"] = installed.note
        parameters = installed.blocks.get(layer) or dict(layer.named_parameters())
        if layer in installed.blocks:
            row["note"] += "; gradients of the parameters that its own layers read, some are copies"

        def forward(pair: Tensor, mask: Tensor, **_: Tensor) -> Tensor:
            return layer(pair, mask)

        call = trained(Call(forward, (problem.x, problem.mask), parameters), problem.grad_out)
        ours = _OurOps(bench) if way.name.startswith(OURS) else nullcontext({})
        with torch.enable_grad(), ours as counted:
            gradient = call()
        notes = [row["note"], _in_words(counted)]
        row["note"] = "; ".join(filter(None, notes)) or None
        checked = check(gradient, problem, step.wanted)
        del gradient
        if checked["status"] != "measured":
            checked["note"] = "; ".join(filter(None, [row["note"], checked["note"]]))
        row |= checked
        if row["status"] == "measured":
            with torch.enable_grad():
                row["peak_pairs"] = peak_bytes(call, bench.device) / problem.case.pair_bytes
                row |= clock.time(call, budget)
            row["steps_per_s"] = 1e3 / (row["wall_ms"] or row["device_ms"]["median"])
    return row


@contextmanager
def _training(layer: nn.Module) -> Iterator[None]:
    """The layer in training mode; its parameters need no gradients any more afterwards."""
    layer.train()
    try:
        yield
    finally:
        layer.eval().requires_grad_(False)


class _OurOps(TorchDispatchMode):
    """Counts the calls of our registered ops, those of the backward too."""

    def __init__(self, bench: Bench) -> None:
        super().__init__()
        self._namespace = namespace_of(bench.sources.kernel)
        self._counted: Counter[str] = Counter()

    def __enter__(self) -> Counter[str]:
        super().__enter__()
        return self._counted

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(function, "namespace", None) == self._namespace:
            self._counted[function.name().partition("::")[2]] += 1
        return function(*args, **kwargs or {})


def _in_words(counted: dict[str, int]) -> str:
    ops = ", ".join(f"{number} {name}" for name, number in counted.items())
    return ops and f"our ops in a step: {ops}"
