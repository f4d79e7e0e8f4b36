"""Our triangle multiplication beside its rivals: time, peak memory, error, and the floor.

    esmfold2-trimul bench --device cuda --out results.json --plot plots --markdown

With --transition it is the transition beside its own.

It runs calls on random inputs, and compares each rival with float64 before timing it. `clock` tells
how times are taken, `rivals` how each rival is called, `case.stage_floors` what the floor is, and
`results` what the results hold.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..documents import write_document
from ..environment import check_same, describe_environment
from ..errors import UserError
from ..folding.memory import measure_peak_memory
from ..repository import load_kernel
from .case import Case
from .clock import (
    CpuClock,
    GpuClock,
    busy_loops,
    gemm_milliseconds,
    make_clock,
    measure_ceilings,
)
from .first_call import first_call_seconds
from .problem import (
    Problem,
    Sample,
    make_problem,
    reference,
    reference_gradient,
    relative_error,
    sample,
)
from .results import (
    ROW,
    Results,
    Row,
    compare,
    derive,
    read_results,
    row_case,
)
from .rivals import Absent, Rival, Sources, esm_version, first_line, plain, trained
from .settings import Settings

Progress = Callable[[str, int, int], None]

_SAME_WHEN_RESUMED = (
    "device", "threads", "isa", "cpu_capability", "torch", "triton", "driver", "rivals", "kernel",
    "seed", "busy_loops",
)  # fmt: skip
# Above this a result is wrong, not inexact: several times the in-tree module's own error, for
# float32 with TF32 products.
WILD_ERROR = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 4e-3}


class DeviceLostError(UserError):
    """The device refuses further work in this process, for example after an illegal access."""

    exit_status = 1


def run(
    settings: Settings,
    results: Results,
    progress: Progress | None = None,
    save: Callable[[Results], None] | None = None,
) -> None:
    """Add to `results` the rows that `settings` ask for and that are missing.

    Args:
        results: from `start`.
        progress: called with (what, done, total) before each row and at the end.
        save: called with the results after each shape, also an unfinished one.

    Raises:
        DeviceLostError: a rival broke the device for all later work.
    """
    sources = Sources(load_kernel(settings.root), settings.published, settings.esm)
    clock = make_clock(settings.device)
    done = {(row_case(row), row["rival"]) for row in results["rows"]}
    jobs = [
        (case, [rival for rival in settings.rivals_at(case) if (case, rival.name) not in done])
        for case in settings.cases()
    ]
    total = sum(len(rivals) for _, rivals in jobs)
    count = 0

    def report(what: str) -> None:
        if progress is not None:
            progress(what, count, total)

    def keep(case: Case) -> None:
        compare([row for row in results["rows"] if row_case(row) == case])
        if save is not None:
            save(results)

    for case, rivals in jobs:
        if not rivals:
            continue
        try:
            problem = make_problem(case, settings.device, settings.seed)
            wanted = _answer(problem, settings.check_up_to)
            gemm_ms = None
            on_cpu = settings.device.type == "cpu"
            if case.is_transition or (on_cpu and case.passes == "forward"):
                gemm_ms = gemm_milliseconds(case, clock, settings.budget)
            for rival in rivals:
                report(f"{case}, {rival.name}")
                row = measure(rival, problem, sources, wanted, clock, settings.budget)
                derive(row, case, results["ceilings"], gemm_ms)
                results["rows"].append(row)
                count += 1
                _settle(clock, row)
                first_call = settings.first_call and rival.first_call and case.passes == "forward"
                if first_call and row["status"] == "measured":
                    _add_first_call(row, case, settings, results["rows"])
            del problem, wanted
        finally:
            keep(case)
    report("done")


def _answer(problem: Problem, check_up_to: int) -> torch.Tensor | Sample | None:
    """The float64 answer that an output is compared with; a sample of it for a long sequence.

    In training the answer is the gradient of x, and None for a long sequence. A transition's rows
    are independent of each other, so that none is too long.
    """
    in_full = problem.case.is_transition or problem.case.length <= check_up_to
    if problem.case.passes == "training":
        return reference_gradient(problem) if in_full else None
    return reference(problem) if in_full else sample(problem)


def measure(
    rival: Rival,
    problem: Problem,
    sources: Sources,
    wanted: torch.Tensor | Sample | None,
    clock: CpuClock | GpuClock,
    budget: float,
) -> Row:
    """The row of one rival, compared with the value of `_answer` and then timed."""
    row = problem.case.columns() | dict.fromkeys(ROW) | {"rival": rival.name, "speed_up": {}}
    try:
        training = problem.case.passes == "training"
        variants = plain(problem, sources) if rival.plain else nullcontext()
        with torch.set_grad_enabled(training), variants:
            call = rival.make(problem, sources)
            if training:
                call = trained(call, problem.grad_out)
            row |= check(call(), problem, wanted)
            if row["status"] == "measured":
                row["variants"] = call.variants()
                if not rival.in_capture:
                    row["peak_pairs"] = peak_bytes(call, clock.device) / problem.case.pair_bytes
                row |= clock.time(call, budget)
    except Absent as error:
        row |= {"status": "absent", "note": str(error)}
    except Exception as error:  # whatever somebody's kernel or compiler raises is a finding
        row |= {"status": "failed", "note": first_line(error)}
    return row


def _settle(clock: CpuClock | GpuClock, row: Row) -> None:
    """Free a rival's memory, and check that the device still works."""
    gc.collect()
    try:
        clock.synchronize()
        clock.release()
    except Exception as error:
        where = f"{row['rival']} at {row_case(row)}"
        raise DeviceLostError(f"{where} broke the device: {first_line(error)}") from None


def check(got: torch.Tensor, problem: Problem, wanted: torch.Tensor | Sample | None) -> Row:
    """error, checked, status and note of an output."""
    x = problem.x
    if got.shape != x.shape or got.dtype != x.dtype:
        note = f"gave {got.dtype} {tuple(got.shape)} for {x.dtype} {tuple(x.shape)}"
        return {"status": "wrong", "note": note}
    checked = problem.case.pairs
    if not isinstance(wanted, torch.Tensor):
        if not all(rows.isfinite().all() for rows in got.split(1, dim=1)):
            return {"status": "wrong", "note": "gave numbers that are not finite"}
        if wanted is None:
            return {"status": "measured"}
        got, wanted = wanted.of(got), wanted.wanted
        checked = wanted.shape[:-1].numel()
    error = relative_error(got, wanted)
    if not error <= WILD_ERROR[problem.case.dtype]:
        kept = error if math.isfinite(error) else None
        note = f"relative error {error:.1e}"
        return {"status": "wrong", "note": note, "error": kept, "checked_pairs": checked}
    return {"status": "measured", "error": error, "checked_pairs": checked}


def peak_bytes(call: Callable[[], torch.Tensor], device: torch.device) -> int:
    """Bytes that a call holds at its peak beyond its inputs, the output included."""
    with measure_peak_memory(device) as peak:
        out = call()
    del out
    return peak.added_bytes


def _add_first_call(row: Row, case: Case, settings: Settings, before: list[Row]) -> None:
    """Time the first call, once for each rival, C and dtype."""
    same = ("rival", "C", "dtype")
    if any(other["first_call_s"] and all(other[k] == row[k] for k in same) for other in before):
        return
    try:
        row["first_call_s"] = first_call_seconds(
            row["rival"], case, settings.device, settings.root, settings.published
        )
    except RuntimeError as error:
        row["note"] = f"first call in a fresh process: {error}"


def start(settings: Settings, command: str, commit: str | None = None) -> Results:
    """Results without rows, with the environment and ceilings of now.

    Args:
        command, commit: as for `environment.describe_environment`.
    """
    _use(settings.device)
    sources = Sources(load_kernel(settings.root), settings.published, settings.esm)
    return {
        "environment": _environment(settings, sources, command, commit),
        "ceilings": measure_ceilings(make_clock(settings.device)),
        "rows": [],
    }


def resume(settings: Settings, path: Path, command: str, commit: str | None = None) -> Results:
    """The results in the file at `path`, to be added to; absent rivals are tried again.

    Raises:
        UserError: they can't be read, or come from another machine, build or set of versions.
    """
    _use(settings.device)
    results = read_results(path)
    sources = Sources(load_kernel(settings.root), settings.published, settings.esm)
    here = _environment(settings, sources, command, commit)
    before = results["environment"]
    check_same(before, here, _SAME_WHEN_RESUMED, path)
    results["rows"] = [row for row in results["rows"] if row["status"] != "absent"]
    before["commands"].append(command)
    before["paths"] |= here["paths"]
    before["esm"] = here["esm"] or before.get("esm")
    return results


def _environment(
    settings: Settings, sources: Sources, command: str, commit: str | None
) -> dict[str, Any]:
    described = describe_environment(settings, sources, command, commit)
    return described | {"busy_loops": settings.busy, "esm": esm_version(settings.esm)}


def _use(device: torch.device) -> None:
    """Make it the current device, which Triton and CUDA graphs use."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def bench(
    settings: Settings,
    command: str,
    out: Path | None = None,
    resumed: bool = False,
    commit: str | None = None,
    progress: Progress | None = None,
) -> Results:
    """Start or resume, measure, and keep the results in the file `out`, if any.

    Raises:
        UserError: `out` can't be read or written, or its results can't be added to.
    """
    if resumed and out.exists():
        results = resume(settings, out, command, commit)
    else:
        results = start(settings, command, commit)

    def save(results: Results) -> None:
        if out is not None:
            write_document(results, out)

    save(results)
    with busy_loops(settings.busy):
        run(settings, results, progress, save)
    return results


def draw(results: Results, folder: Path) -> list[Path]:
    """The results' plots, drawn into `folder`.

    Raises:
        UserError: matplotlib is missing, or the folder can't be written to.
    """
    try:
        from .plots import plot
    except ImportError as error:
        raise UserError(f"--plot needs matplotlib ({error})") from error
    try:
        return plot(results, folder)
    except OSError as error:
        raise UserError(f"--plot {folder}: can't be written to ({error.strerror})") from error
