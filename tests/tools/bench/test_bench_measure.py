"""One rival at one shape: it is checked, then timed, and gets a row that says what came of it."""

import json
from dataclasses import replace

import pytest
import torch
from bench_fakes import (
    CASE,
    CEILINGS,
    CPU,
    CountingClock,
    absent,
    answer,
    raises_when_made,
    with_variants,
)
from esmfold2_trimul_tools.bench import run as bench
from esmfold2_trimul_tools.bench.case import Case
from esmfold2_trimul_tools.bench.problem import make_problem, reference, reference_gradient, sample
from esmfold2_trimul_tools.bench.results import ROW, derive
from esmfold2_trimul_tools.bench.rivals import RIVALS, Call, Rival, Sources


@pytest.fixture
def sources(kernel) -> Sources:
    return Sources(kernel)


def measure(make, sources, in_full=True, clock=None, case=CASE):
    problem = make_problem(case, CPU)
    wanted = reference(problem) if in_full else sample(problem)
    return bench.measure(Rival("fake", make), problem, sources, wanted, clock, budget=1e-3)


def raises_when_called(problem, sources):
    return Call(lambda: torch.ones(2) @ torch.ones(3))


BAD = {
    "absent": (absent, "absent", "not on this machine"),
    "raises when made": (raises_when_made, "failed", "RuntimeError: no such kernel"),
    "raises when called": (raises_when_called, "failed", "RuntimeError: inconsistent tensor size"),
    "wrong": (lambda p, _: Call(lambda: 1.1 * answer(p)), "wrong", "relative error 1.0e-01"),
    "nan": (lambda p, _: Call(lambda: answer(p) * float("nan")), "wrong", "relative error nan"),
    "dtype": (lambda p, _: Call(lambda: answer(p).half()), "wrong", "gave torch.float16 (1, 8, "),
    "shape": (lambda p, _: Call(lambda: answer(p)[0]), "wrong", "gave torch.float32 (8, 8, 16) fo"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_rival_gets_a_row_that_says_so_and_is_not_timed(sources, name):
    make, status, note = BAD[name]
    clock = CountingClock()
    row = measure(make, sources, clock=clock)
    derive(row, CASE, CEILINGS, None)
    assert (row["rival"], row["status"]) == ("fake", status)
    assert row["note"].startswith(note) and "\n" not in row["note"]
    assert clock.timed == 0
    assert row["device_ms"] is row["peak_pairs"] is row["floor_share"] is None
    assert row["error"] == (pytest.approx(0.1) if name == "wrong" else None)
    json.dumps(row, allow_nan=False)


def test_a_good_rival_is_checked_and_timed(sources):
    clock = CountingClock()
    row = measure(lambda problem, _: Call(lambda: answer(problem)), sources, clock=clock)
    assert (row["status"], row["note"], clock.timed) == ("measured", None, 1)
    assert 0 < row["error"] < 1e-7
    assert row["device_ms"]["median"] == 2.0 and row["peak_pairs"] >= 0
    assert row.keys() == ROW.keys() | CASE.columns().keys()


@pytest.mark.parametrize("passes", ["forward", "training"])
def test_ours_without_variants_is_made_checked_and_timed_without_them(
    kernel, sources, monkeypatch, passes
):
    case = Case(16, 8, "float32", passes=passes)
    problem = make_problem(case, CPU)
    wanted = reference(problem) if passes == "forward" else reference_gradient(problem)
    by_name = {rival.name: rival for rival in RIVALS}
    plainly = []

    class Clock(CountingClock):
        def time(self, call, budget):
            plainly.append(hopper.plain_only())
            return super().time(call, budget)

    def measured(name):
        def make(problem, sources):
            call = by_name[name].make(problem, sources)
            plainly.append(hopper.plain_only())

            def noted(*args, **kwargs):
                plainly.append(hopper.plain_only())
                return call.function(*args, **kwargs)

            return replace(call, function=noted)

        plainly.clear()
        rival = replace(by_name[name], make=make)
        return bench.measure(rival, problem, sources, wanted, clock, budget=1e-3)

    clock, hopper = Clock(), with_variants(monkeypatch, kernel)
    for name, plain in (("ours", False), ("ours, plain", True)):
        row = measured(name)
        assert (row["status"], row["note"]) == ("measured", None)
        # Made, checked, its memory, timed.
        assert plainly == [plain] * 4 and not hopper.plain_only()
        assert row["variants"] == ({} if plain else {"fused_dual_gemm": "hopper"})
    monkeypatch.undo()
    row = measured("ours, plain")
    assert (row["status"], row["note"]) == ("absent", "no variant of a stage runs here")
    assert clock.timed == 2 and plainly == [] and row["variants"] is None
    assert measured("ours")["variants"] == {}


def test_a_rival_that_fails_while_it_is_timed_has_no_time(sources):
    class Clock(CountingClock):
        def time(self, call, budget):
            raise torch.OutOfMemoryError("out of memory")

    row = measure(lambda problem, _: Call(lambda: answer(problem)), sources, clock=Clock())
    assert (row["status"], row["note"]) == ("failed", "OutOfMemoryError: out of memory")
    assert row["device_ms"] is None


def test_a_long_output_is_checked_at_some_pairs_and_must_be_finite(sources):
    case = Case(16, 40, "float32")

    def answers(change):
        def make(problem, _):
            out = answer(problem)
            change(out)
            return Call(lambda: out)

        return measure(make, sources, in_full=False, clock=CountingClock(), case=case)

    row = answers(lambda out: None)
    assert (row["status"], row["checked_pairs"]) == ("measured", 16 * 16)
    assert 0 < row["error"] < 1e-7
    row = answers(lambda out: out.mul_(1.1))
    assert (row["status"], row["note"]) == ("wrong", "relative error 1.0e-01")
    row = answers(lambda out: out[0, 17, 23].fill_(float("inf")))
    assert (row["status"], row["note"]) == ("wrong", "gave numbers that are not finite")


def test_peak_memory_is_counted_in_pair_tensors(sources):
    case = Case(64, 256, "float32")  # 16 MiB a pair tensor

    def make(problem, _):
        out = answer(problem)

        def call():
            held = torch.ones(5, *problem.x.shape)
            return out + 0 * held[0, 0, 0, 0, 0]

        return Call(call)

    row = measure(make, sources, in_full=False, clock=CountingClock(), case=case)
    assert row["peak_pairs"] == pytest.approx(6, abs=0.5)


@pytest.mark.parametrize("rival", [rival for rival in RIVALS if rival.on_cpu and not rival.slow],
                         ids=lambda rival: rival.name)  # fmt: skip
def test_training_gives_the_gradients_of_all_that_a_rival_takes(sources, rival, monkeypatch):
    asked = []
    grad = torch.autograd.grad

    def counting(out, leaves, grad_out):
        gradients = grad(out, leaves, grad_out)
        asked.append([gradient.shape for gradient in gradients])
        return gradients

    monkeypatch.setattr(torch.autograd, "grad", counting)
    case = Case(16, 9, "float32", "incoming", passes="training")
    problem = make_problem(case, CPU)
    wanted = reference_gradient(problem)
    asked.clear()
    row = bench.measure(rival, problem, sources, wanted, CountingClock(), budget=1e-3)
    assert (row["status"], row["note"], row["passes"]) == ("measured", None, "training")
    assert 0 < row["error"] < 1e-5
    # x, four vectors of the norms, and the projections, of which the in-tree module joins two.
    assert {len(shapes) for shapes in asked} == {8 if rival.name.startswith("in-tree") else 9}
