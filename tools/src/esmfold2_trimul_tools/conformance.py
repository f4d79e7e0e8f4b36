"""The conformance suite: a table of cases, every implementation that is here, and one criterion.

    esmfold2-trimul conformance --out results.json

The cases are data in `conformance_cases`, what they are held to is in `conformance_criterion`, who
takes part in `conformance_implementations`, and what the results hold in `conformance_report`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .bench_environment import describe_environment
from .bench_rivals import Absent, Sources, first_line
from .conformance_cases import CASES, DTYPES, Case, Problem, make_problem
from .conformance_criterion import Answer, answer, errors, fault
from .conformance_implementations import IMPLEMENTATIONS, Implementation
from .conformance_report import ROW, Results, Row
from .documents import write_document
from .errors import UserError
from .model import resolve_device
from .repository import find_root, load_kernel

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """Which cases, for which implementations, on which device."""

    device: torch.device
    root: Path
    implementations: tuple[Implementation, ...]
    cases: tuple[Case, ...]
    published: Path | None
    seed: int

    @property
    def dtypes(self) -> tuple[str, ...]:
        return DTYPES


def read_settings(
    *,
    device: str | None = None,
    implementations: list[str] | None = None,
    cases: list[str] | None = None,
    published: Path | None = None,
    seed: int = 0,
    kernel_root: Path | None = None,
) -> Settings:
    """The settings that the options stand for.

    Raises:
        UserError: an option that names what isn't there.
    """
    names = [implementation.name for implementation in IMPLEMENTATIONS]
    for name in implementations or ():
        if name not in names:
            raise UserError(f"--implementation must be one of {'; '.join(names)}; got {name!r}")
    for part in cases or ():
        if not any(part in case.name for case in CASES):
            raise UserError(f"--case must be a part of a case's name; got {part!r}, in none")
    if published is not None and not (published / "esmfold2_trimul" / "__init__.py").is_file():
        raise UserError(f"--published {published}: holds no package esmfold2_trimul")
    if seed < 0:
        raise UserError(f"--seed must be at least 0; got {seed}")
    return Settings(
        resolve_device(device),
        find_root(kernel_root),
        tuple(one for one in IMPLEMENTATIONS if not implementations or one.name in implementations),
        tuple(case for case in CASES if not cases or any(part in case.name for part in cases)),
        published,
        seed,
    )


class Posed(NamedTuple):
    """A case's problem, what its output is held to, and the problem that must give its bits.

    The second problem has zeros where the rows of the first are constant: LayerNorm gives the bias
    for both. None if there are no such rows.
    """

    problem: Problem
    answer: Answer
    same_bits: Problem | None


def pose(case: Case, seed: int = 0) -> Posed:
    """The case, ready to be held against any implementation."""
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
    """What is wrong with the call apart from its errors, if anything is, and its output."""
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
    """Hold the settings' cases against the settings' implementations, into `results`."""
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
    # One implementation after the other, ours first: what breaks the device breaks no other's.
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
    """Why the device takes no more work in this process, after an illegal access for instance."""
    try:
        getattr(torch, device.type).synchronize(device)
    except Exception as error:
        return first_line(error)
    return None


def conformance(
    settings: Settings,
    command: str,
    commit: str | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> Results:
    """The whole of it; the results are written to the file `out`, if any.

    Args:
        command, commit: as for `bench_environment.describe_environment`.

    Raises:
        UserError: `out` can't be written to.
    """
    sources = Sources(load_kernel(settings.root), settings.published)
    results = {
        "environment": describe_environment(settings, sources, command, commit),
        "absent": {},
        "rows": [],
    }
    if out is not None:
        write_document(results, out)  # rather now than after all the work
    run(settings, results, progress)
    if out is not None:
        write_document(results, out)
    return results


def ours_conforms(results: Results) -> bool:
    """Whether no case of ours failed."""
    ours = {one.name for one in IMPLEMENTATIONS if one.ours}
    failed = {row["implementation"] for row in results["rows"] if row["status"] == "failed"}
    return ours.isdisjoint(failed)
