"""The result that a call must give, and the error that it may have."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from helpers import ERROR_BUDGET
from torch import Tensor

from .case import Case, TransitionCase, arithmetic, pairs_within
from .rounding import FLOAT32_UNIT, Exact, Rounding, formula, transition

# Relative L2 errors that are always allowed, from docs/numerics.md: those of whole calls, with
# twenty-five per cent more on a CPU whose bf16 GEMMs round before each gate.
NARROW_BUDGET = {"tf32": 2e-3, "bf16": 1e-2}
CPU_BF16 = 1.25
# For gradients, four times those of the output, which in float32 is test_gradients.py's limit.
GRADIENTS = 4.0
# How many times random errors are drawn; by which factor the error may exceed the largest of them;
# and by how much of their spread, where chance decides, as in a result of few numbers.
DRAWS = 5
FACTOR = 1.2
SPREAD_FACTOR = 3.0
# A pair of residues whose product differs from channel to channel by less than ten times its
# rounding has a norm without a digit that could be compared.
ILL_CONDITIONED = 0.1


@dataclass
class Oracle:
    """A case's exact results, and those of the formula with random errors."""

    out: Tensor
    drawn: list[Tensor]  # the same with random errors
    # [..., L, L, 1]: the pairs whose norm of the product has digits to compare; all of a transition
    well: Tensor
    padding: Tensor | None  # [..., L, L, 1]: the pairs with a residue beyond a length
    budget: float  # a relative L2 error that is good enough
    as_rounded: dict[str, Tensor]  # results of norms' parameters rounded to the pair's dtype
    roundings: list[Rounding]
    graphs: list[tuple[Tensor, list[Tensor]]]  # results and leaves: exact, and with random errors

    @property
    def overflows(self) -> bool:
        return any(rounding.overflows for rounding in self.roundings)


def oracle(
    case: Case | TransitionCase, values: dict[str, Tensor], on_triton: bool, on_gpu: bool
) -> Oracle:
    products = arithmetic(case) if on_triton else "fp32"
    if products == "tf32" and not on_gpu:
        products = "fp32"
    budget = NARROW_BUDGET.get(products, ERROR_BUDGET[case.dtype])
    if case.dtype == torch.bfloat16 and not on_triton:
        budget *= CPU_BF16
    own = FLOAT32_UNIT if case.dtype == torch.float32 else torch.finfo(case.dtype).eps / 2
    narrow = {"fp32": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}[products]
    roundings = [Rounding(case.dtype, max(own, narrow), case.seed + n) for n in range(DRAWS)]

    def evaluate(
        rounding: Rounding | Exact, **others: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        given = {name: value.clone() for name, value in (values | others).items()}
        leaves = [given[name].requires_grad_() for name in case.needs_grad]
        weights = Rounding(case.dtype, narrow, case.seed)
        narrowed = narrow and isinstance(rounding, Rounding)
        weights = weights if narrowed else Exact()
        with torch.set_grad_enabled(bool(leaves)):
            if isinstance(case, TransitionCase):
                return transition(case, given, rounding, weights), None, leaves
            out, t = formula(case, given, rounding, weights)
        return out, t.detach(), leaves

    out, t, leaves = evaluate(Exact())
    every = [evaluate(rounding) for rounding in roundings]
    graphs = [(out, leaves), *[(some_out, some_leaves) for some_out, _, some_leaves in every]]
    well = torch.ones(out.shape[:-1], dtype=torch.bool)
    if t is not None:
        eps_out = case.eps if case.eps_out is None else case.eps_out
        products_of = [some_t for _, some_t, _ in every]
        well = _well_conditioned(t, products_of, roundings[0].unit, eps_out)
    as_rounded = {}
    for name in case.norms if _has_errors_that_differ(case) else ():
        rounded = values[name].to(case.dtype).double() if name in values else None
        if rounded is not None and not torch.equal(rounded, values[name]):
            as_rounded[name] = evaluate(Exact(), **{name: rounded})[0].detach()
    padding = None
    if case.lengths is not None:
        lengths = values["lengths"].expand(case.result_leading)
        padding = ~pairs_within(lengths, case.length).unsqueeze(-1)
    drawn = [some_out.detach() for some_out, _ in graphs[1:]]
    return Oracle(
        out.detach(), drawn, well.unsqueeze(-1), padding, budget, as_rounded, roundings, graphs
    )


def _well_conditioned(t: Tensor, drawn: list[Tensor], unit: float, eps: float) -> Tensor:
    """The pairs whose norm of the product t has digits to compare."""
    spread = ((t - t.mean(-1, keepdim=True)).square().mean(-1) + eps).sqrt()
    apart = unit * t.square().mean(-1).sqrt()  # where equal channels are not alike
    well = apart <= ILL_CONDITIONED * spread
    for some_t in drawn:
        off = some_t - t
        off = (off - off.mean(-1, keepdim=True)).square().mean(-1).sqrt()
        well &= off <= ILL_CONDITIONED * spread
    return well


def _has_errors_that_differ(case: Case | TransitionCase) -> bool:
    """Whether the errors of all pairs differ, so that their average means something."""
    shared = "x" in case.layouts and case.layouts["x"].shared is not None
    ordinary = case.rows in ("plain", "large means") and not case.scales
    ordinary = ordinary and case.eps < 1 and case.channels >= 8
    return case.dtype != torch.float32 and ordinary and not shared


def gradients(
    case: Case | TransitionCase, found: Oracle, grad_out: Tensor, dtypes: list[torch.dtype]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Those of the leaves that need one, exact and with random errors; `dtypes` are theirs."""
    wanted, *drawn = (
        torch.autograd.grad(out, leaves, grad_out, allow_unused=True, materialize_grads=True)
        for out, leaves in found.graphs
    )
    drawn = [
        [rounding.to(dtype)(grad) for dtype, grad in zip(dtypes, grads, strict=True)]
        for rounding, grads in zip(found.roundings, drawn, strict=True)
    ]
    return list(wanted), drawn


def ratio(got: Tensor, wanted: Tensor, drawn: list[Tensor], budget: float) -> float:
    """The L2 error in units of what is allowed; not finite if `got` is not."""
    error = float((got.detach().cpu().double() - wanted).norm())
    sizes = [float((some - wanted).norm()) for some in drawn]
    by_rounding = FACTOR * max(sizes) + SPREAD_FACTOR * (max(sizes) - min(sizes))
    allowed = max(budget * float(wanted.norm()), by_rounding)
    return 0.0 if error == 0 else error / allowed if allowed else math.inf


def share_of_rounding(got: Tensor, found: Oracle, name: str) -> float:
    """The part of the step from `out` to `as_rounded` that `got` has: from 0 to 1.

    0 also where random errors alone could look like a good part of it.
    """
    step = torch.where(found.well, found.as_rounded[name] - found.out, 0.0)
    length = float(step.square().sum())
    by_chance = max(abs(float(((some - found.out) * step).sum())) for some in found.drawn)
    if 2 * by_chance >= 0.4 * length:
        return 0.0
    return float(((got - found.out) * step).sum()) / length
