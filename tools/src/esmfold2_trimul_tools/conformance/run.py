"""The conformance suite: a table of cases, every available implementation, and one criterion.

    esmfold2-trimul conformance --out results.json

The options are in `settings`, the cases are data in `cases`; the other parts are `criterion`,
`implementations` and `report`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..bench.rivals import Absent, Sources, first_line
from ..documents import write_document
from ..environment import describe_environment
from ..repository import load_kernel
from .cases import Case, TransitionCase
from .criterion import Answer, answer, errors, fault
from .implementations import Implementation
from .problem import Problem, make_problem
from .report import ROW, Results, Row
from .settings import Settings

Progress = Callable[[str, int, int], None]


class Posed(NamedTuple):
    """A case's problem and float64 answer, and a second problem that must give the same bits.

    The second problem has zeros where the rows of the first are constant: LayerNorm gives the bias
    for both. None if there are no such rows.
    """

    problem: Problem
    answer: Answer
    same_bits: Problem | None


def pose(case: Case | TransitionCase, seed: int = 0) -> Posed:
    """The case, ready to be given to any implementation."""
    problem = make_problem(case, seed)
    return Posed(problem, answer(problem), problem.without_constant_rows())


@torch.no_grad()
def check(
    implementation: Implementation, posed: Posed, sources: Sources, device: torch.device
) -> Row:
    """One case of one implementation, on the device asked for."""
    case, held_to = posed.problem.case, posed.answer
    row = dict.fromkeys(ROW) | {
        "implementation": implementation.name,
        "case": case.name,
        "limit": held_to.limits.relative,
        "largest_limit": held_to.limits.largest,
        "plain_error": _finite(held_to.plain.relative),
    }
    for feature, reason in implementation.lacks.items():
        if feature in case.features:
            return row | {"status": "not supported", "note": reason}
    try:
        note, got = _run(implementation, posed, sources, implementation.device(device))
    except Absent as absent:
        return row | {"status": "not supported", "note": str(absent)}
    except Exception as error:  # whatever somebody's kernel raises is a finding
        return row | {"status": "failed", "note": f"raised {first_line(error)}"}
    if got.shape == held_to.wanted.shape:
        found = errors(got, held_to.wanted, case.torch_dtype)
        row |= {"error": _finite(found.relative), "largest": _finite(found.largest)}
    note = fault(got, held_to, case.torch_dtype) or note
    return row | {"status": "passed" if note is None else "failed", "note": note}


def _run(
    implementation: Implementation, posed: Posed, sources: Sources, device: torch.device
) -> tuple[str | None, Tensor]:
    """A fault of the call other than its errors, or None, and its output."""
    problem = posed.problem.laid_out_on(device)
    got = implementation.run(problem, sources).cpu()
    if not torch.equal(problem.x.cpu(), posed.problem.x):
        return "changed its input x", got
    if posed.same_bits is not None:
        wanted = implementation.run(posed.same_bits.laid_out_on(device), sources).cpu()
        differing = int((got != wanted).sum())
        if differing:
            number = f"{differing} of {got.numel()} numbers"
            return f"{number} are other ones where constant rows are made zeros", got
    return None, got


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def run(settings: Settings, results: Results, progress: Progress | None = None) -> None:
    """Run the settings' cases on the settings' implementations; add the rows to `results`."""
    sources = Sources(load_kernel(settings.root), settings.published)
    report = progress or (lambda what, done, total: None)
    present = []
    for one in settings.implementations:
        missing = one.missing(one.device(settings.device), sources)
        if missing is None:
            present.append(one)
        else:
            results["absent"][one.name] = missing
    total = len(settings.cases) * (1 + len(present))
    posed = []
    for number, case in enumerate(settings.cases):
        report(f"float64, {case.name}", number, total)
        posed.append(pose(case, settings.seed))
    # One implementation after the other, ours first: one that breaks the device can't spoil ours.
    lost = None
    for one in present:
        on_cpu = one.device(settings.device).type == "cpu"
        if lost is not None and not on_cpu:
            results["absent"][one.name] = lost
            continue
        for this in posed:
            name = this.problem.case.name
            report(f"{one.name}, {name}", len(posed) + len(results["rows"]), total)
            results["rows"].append(check(one, this, sources, settings.device))
            if not on_cpu and (loss := _loss(settings.device)):
                lost = f"{one.name} broke the device at {name}: {loss}"
                results["rows"][-1] |= {"status": "failed", "note": lost}
                break
    report("done", total, total)


def _loss(device: torch.device) -> str | None:
    """Why the device refuses further work in this process, for example after an illegal access."""
    try:
        getattr(torch, device.type).synchronize(device)
    except Exception as error:
        return first_line(error)
    return None


def conformance(settings: Settings, command: str, progress: Progress | None = None) -> Results:
    """Run the suite; the results are written to the settings' file, if any.

    Args:
        command: the command line.

    Raises:
        UserError: the file can't be written to.
    """
    sources = Sources(load_kernel(settings.root), settings.published)
    results = {
        "environment": describe_environment(settings, sources, command, settings.commit),
        "absent": {},
        "rows": [],
    }
    if settings.out is not None:
        write_document(results, settings.out)  # fail now rather than after all the work
    run(settings, results, progress)
    if settings.out is not None:
        write_document(results, settings.out)
    return results
