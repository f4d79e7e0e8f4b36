"""Helpers of the benchmark's tests: tiny cases, fake rivals, a clock that times nothing, rows."""

from types import SimpleNamespace

import torch
from esmfold2_trimul_tools.bench import clock as bench_clock
from esmfold2_trimul_tools.bench import run as bench
from esmfold2_trimul_tools.bench.case import Case
from esmfold2_trimul_tools.bench.problem import reference
from esmfold2_trimul_tools.bench.results import ROW, compare, derive
from esmfold2_trimul_tools.bench.rivals import Absent, Call, Rival
from esmfold2_trimul_tools.repository import submodule

CPU = torch.device("cpu")
CASE = Case(16, 8, "float32")
CEILINGS = {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e12, "copy": "a copy", "matrix": "mm"}
TINY = {"device": "cpu", "widths": "16", "lengths": "8,9", "budget": 1e-3}


class CountingClock(bench_clock.CpuClock):
    """Times nothing, and counts what it was asked to time."""

    def __init__(self):
        super().__init__(CPU)
        self.timed = 0

    def time(self, call, budget):
        self.timed += 1
        return {"device_ms": bench_clock.spread([2.0, 2.0]), "wall_ms": None, "host_ms": None}


def answer(problem) -> torch.Tensor:
    return reference(problem).to(problem.x.dtype)


def absent(problem, sources):
    raise Absent("not on this machine")


def with_variants(monkeypatch, kernel):
    """As if stage 1 of any call of the kernel ran a variant; returns the package of variants."""
    hopper = submodule(kernel, "hopper")

    def explain(function, *args, **kwargs):
        constants = {} if hopper.plain_only() else {"VARIANT": "hopper"}
        stages = {"fused_dual_gemm": constants, "trimul_einsum": {}}
        return SimpleNamespace(
            stages={name: SimpleNamespace(constants=own) for name, own in stages.items()}
        )

    monkeypatch.setattr(kernel, "explain", explain)
    return hopper


def raises_when_made(problem, sources):
    raise RuntimeError("no such kernel\nand a long story")


def row_of(rival, case=CASE, milliseconds=None, **entries):
    row = case.columns() | dict.fromkeys(ROW) | {"rival": rival, "speed_up": {}}
    row |= {"status": "measured" if milliseconds else "failed"} | entries
    if milliseconds:
        row["device_ms"] = {"median": milliseconds, "p10": milliseconds, "p90": milliseconds,
                            "calls": 3}  # fmt: skip
    derive(row, case, CEILINGS, entries.get("gemm_ms"))
    return row


def fake_rivals(monkeypatch, *rivals):
    monkeypatch.setattr("esmfold2_trimul_tools.bench.settings.RIVALS", rivals)
    monkeypatch.setattr(bench, "gemm_milliseconds", lambda *_: 1.0)


def good(name, log=None):
    def make(problem, sources):
        if log is not None:
            log.append((name, problem.case.length))
        return Call(lambda: answer(problem))

    return Rival(name, make, on_cpu=True)


def example_results():
    """Two lengths: at the second a rival failed. In a third group ours alone."""
    rows = []
    for case, milliseconds in ((Case(128, 76, "bfloat16"), 0.5), (Case(128, 1024, "bfloat16"), 4)):
        shape = [
            row_of("ours", case, milliseconds, peak_pairs=3.0, error=4.5e-3, wall_ms=0.6,
                   host_ms=0.3, first_call_s=2.0 if case.length == 76 else None),
            row_of("in-tree, chunk 64", case, 45.6 * milliseconds, peak_pairs=12.0, error=6.1e-3,
                   wall_ms=9.0, host_ms=0.5),
            row_of("published", case, None if case.length > 76 else 1.0, peak_pairs=None,
                   note=None if case.length == 76 else "OutOfMemoryError: no"),
            row_of("cuequivariance, fp32 norms", case, status="absent", note="not installed"),
        ]  # fmt: skip
        compare(shape)
        rows += shape
    rows.append(row_of("ours", Case(128, 76, "float32"), 5.0, peak_pairs=3.0, gemm_ms=4.0))
    environment = {
        "device": "A GPU", "torch": "2.0", "triton": None, "cuda": "12", "driver": None,
        "python": "3.10", "rivals": {"transformers": "5", "kernels": None}, "date": "2026-01-02",
        "commit": "abc", "commands": ["one", "two"],
    }  # fmt: skip
    return {"environment": environment, "ceilings": CEILINGS, "rows": rows}
