"""The benchmark's own bookkeeping: no test here says how fast anything is."""

import dataclasses
import importlib.util
import json
import os
import sys
import types
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from esmfold2_trimul_tools.bench import clock as bench_clock
from esmfold2_trimul_tools.bench import plots as bench_plots
from esmfold2_trimul_tools.bench import report as bench_report
from esmfold2_trimul_tools.bench import rivals as bench_rivals
from esmfold2_trimul_tools.bench import run as bench
from esmfold2_trimul_tools.bench.case import Case, stage_floors
from esmfold2_trimul_tools.bench.first_call import first_call_seconds
from esmfold2_trimul_tools.bench.problem import (
    make_problem,
    reference,
    reference_gradient,
    relative_error,
    sample,
)
from esmfold2_trimul_tools.bench.results import (
    ROW,
    compare,
    derive,
    ours_is_right,
    read_results,
    row_case,
)
from esmfold2_trimul_tools.bench.rivals import RIVALS, Absent, Call, Rival, Sources
from esmfold2_trimul_tools.bench.settings import read_settings
from esmfold2_trimul_tools.documents import write_document
from esmfold2_trimul_tools.environment import describe_environment
from esmfold2_trimul_tools.errors import UserError
from fresh_process import ROOT, python_output
from helpers import Problem
from helpers import reference as oracle
from matplotlib.figure import Figure
from matplotlib.image import imread

CPU = torch.device("cpu")
CASE = Case(16, 8, "float32")
CEILINGS = {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e12, "copy": "a copy", "matrix": "mm"}
TINY = {"device": "cpu", "widths": "16", "lengths": "8,9", "budget": 1e-3}


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "measure_ceilings", lambda clock: dict(CEILINGS))


@pytest.fixture
def sources(kernel) -> Sources:
    return Sources(kernel)


# Lengths and widths that are no multiple of what the reference takes at once.
ODD_CASES = [
    Case(24, 70, "float32", "outgoing", "bool"),
    Case(24, 70, "bfloat16", "incoming", "float"),
    Case(16, 9, "float16", "outgoing", "none", batch=2),
    Case(40, 2, "float32", "incoming", "bool"),
]


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_reference_is_the_tests_own(case):
    problem = make_problem(case, CPU)
    x = problem.x.clone()
    wanted = oracle(Problem(problem.x, problem.weights, case.direction, problem.mask))
    assert relative_error(reference(problem), wanted) < 1e-12
    assert torch.equal(problem.x, x)


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_a_sample_is_the_references(case):
    problem = make_problem(case, CPU)
    some = sample(problem)
    residues = min(16, case.length)
    assert some.wanted.shape == (case.batch, residues, residues, case.channels)
    for chosen in (some.i, some.j):
        assert {0, case.length - 1} <= set(chosen.tolist()) and chosen.unique().numel() == residues
    assert relative_error(some.wanted, some.of(reference(problem))) < 1e-12


def test_relative_error_is_over_the_whole_tensor():
    wanted = torch.zeros(1, 70, 70, 2, dtype=torch.float64)
    wanted[0, 0, 0] = torch.tensor([3.0, 4.0])
    got = wanted.float()
    got[0, 69, 69, 1] = 2.0
    assert relative_error(got, wanted) == pytest.approx(2 / 5)
    got[0, 0, 0, 0] = float("nan")
    assert relative_error(got, wanted) != relative_error(got, wanted)


def test_inputs_are_a_trained_trunks():
    problem = make_problem(Case(64, 32, "bfloat16"), CPU, seed=3)
    assert problem.x.dtype == torch.bfloat16
    assert problem.x.float().mean() == pytest.approx(0.3, abs=0.02)
    assert {name: value.dtype for name, value in problem.weights.items()} == {
        name: torch.float32 if name.startswith("norm_") else torch.bfloat16
        for name in problem.weights
    }
    assert problem.weights["norm_in_weight"].std() > 0.1
    shown = torch.arange(32) < 29
    assert torch.equal(problem.mask[0], shown[:, None] & shown)
    assert torch.equal(problem.x, make_problem(Case(64, 32, "bfloat16"), CPU, seed=3).x)
    assert not torch.equal(problem.x, make_problem(Case(64, 32, "bfloat16"), CPU, seed=4).x)
    assert make_problem(Case(16, 2, "float32"), CPU).mask.any()
    assert make_problem(Case(16, 5, "float32", mask="none"), CPU).mask is None


def test_floor_is_the_larger_of_traffic_and_work_of_each_stage():
    case = Case(128, 2, "bfloat16")  # n = 4
    traffic = (4 * (128 + 256) * 2 + 4, 4 * 3 * 128 * 2, 4 * (128 + 128 + 128) * 2)
    work = (2 * 4 * 128 * 512, 2 * 128 * 2**3, 2 * 4 * (128 * 128 + 128 * 128))
    assert stage_floors(case, copy_rate=1, matrix_rate=1e12) == traffic == (3076, 3072, 3072)
    assert stage_floors(case, copy_rate=1e12, matrix_rate=1) == work == (524288, 2048, 262144)
    # Stage 1 is bound by its work, the others by their traffic.
    assert stage_floors(case, copy_rate=1, matrix_rate=160) == (3276.8, 3072, 3072)


@pytest.mark.parametrize(("mask", "bytes_more"), [("bool", 1), ("float", 4), ("none", 0)])
def test_floor_counts_the_mask_the_batch_and_the_dtype(mask, bytes_more):
    case = Case(4, 3, "float32", mask=mask, batch=2)
    first, second, third = stage_floors(case, copy_rate=1, matrix_rate=1e12)
    assert (first, second, third) == (18 * (12 * 4 + bytes_more), 18 * 48, 18 * 48)
    assert stage_floors(case, 1e12, 1)[1] == 2 * 2 * 4 * 27


@pytest.mark.parametrize(
    ("channels", "length", "milliseconds"),
    [(256, 512, (0.176, 0.094, 0.094)), (128, 1024, (0.187, 0.352, 0.187))],
)
def test_floor_agrees_with_the_published_table(channels, length, milliseconds):
    # docs/performance.md, from 4.3 TB/s and 780 TFLOP/s
    floors = stage_floors(Case(channels, length, "bfloat16"), 4.3e12, 780e12)
    assert [1e3 * floor for floor in floors] == pytest.approx(milliseconds, abs=6e-4)


def test_percentiles_lie_between_neighbours():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [bench_clock.percentile(values, p) for p in (0, 10, 50, 90, 100)] == [1, 1.4, 3, 4.6, 5]
    assert bench_clock.percentile([7.0], 10) == 7
    assert bench_clock.spread([4.0, 1.0, 2.0]) == {
        "median": 2.0, "p10": 1.2, "p90": 3.6, "calls": 3,
    }  # fmt: skip


def test_repeats_follow_the_budget():
    assert bench_clock.repeats(1.0, 0.1, least=3) == 10
    assert bench_clock.repeats(1.0, 2.0, least=3) == 3
    assert bench_clock.repeats(1.0, 0.0, least=3) == 200


class SimulatedGpu:
    """A host and a device with one queue, in seconds: what torch.cuda and time are for the clock.

    A call keeps the host for `host`, and the device for `device`, which begins once the call is
    queued and what was queued before is done.
    """

    def __init__(self, monkeypatch, host: float, device: float, flush: float) -> None:
        self.now = self.free = 0.0
        self.host, self.device, self.flush = host, device, flush
        self.flushes = self.calls = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.now, gpu.free)

            def synchronize(self):
                gpu.synchronize()

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Buffer:
            def zero_(self):
                gpu.flushes += 1
                gpu.queue(0.0, flush)

        for name, value in {
            "Event": Event,
            "synchronize": lambda device=None: self.synchronize(),
            "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=50 << 20),
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(bench_clock.torch, "empty", lambda *_, **__: Buffer())
        monkeypatch.setattr(bench_clock.time, "perf_counter", lambda: self.now)

    def queue(self, host: float, device: float) -> None:
        self.now += host
        self.free = max(self.free, self.now) + device

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def __call__(self) -> None:
        self.calls += 1
        # Two launches, so that the device waits for the second if it has no head start.
        for _ in range(2):
            self.queue(self.host / 2, self.device / 2)


@pytest.mark.parametrize(("host", "device"), [(4e-4, 1e-4), (4e-4, 5e-3), (0.0, 1e-3)])
def test_gpu_clock_tells_device_wall_and_host_time_apart(monkeypatch, host, device):
    gpu = SimulatedGpu(monkeypatch, host, device, flush=1e-4)
    times = bench_clock.GpuClock(CPU).time(gpu, budget=0.2)
    assert times["device_ms"]["median"] == pytest.approx(1e3 * device)
    assert times["device_ms"]["p90"] == pytest.approx(1e3 * device)
    assert times["host_ms"] == pytest.approx(1e3 * host)
    # At the end of many calls the device works alone on what is left of the last.
    assert times["wall_ms"] == pytest.approx(1e3 * max(host, device), rel=0.05)
    assert 3 <= times["device_ms"]["calls"] <= 200


def test_gpu_clock_keeps_to_the_budget_and_flushes_before_every_call(monkeypatch):
    gpu = SimulatedGpu(monkeypatch, host=1e-3, device=2e-3, flush=3e-4)
    clock = bench_clock.GpuClock(CPU)
    began, flushes = gpu.now, gpu.flushes
    times = clock.time(gpu, budget=0.5)
    assert 0.2 < gpu.now - began < 0.7
    # Four give the host the time to queue the call, and one is to spare.
    assert gpu.flushes - flushes == 5 * times["device_ms"]["calls"]
    assert gpu.calls > times["device_ms"]["calls"]


def test_cpu_clock_repeats_and_reports_one_time():
    calls = []
    times = bench_clock.CpuClock(CPU).time(lambda: calls.append(0), budget=1e-4)
    assert times["wall_ms"] is times["host_ms"] is None
    assert times["device_ms"]["calls"] == len(calls) - 1 >= 3
    assert 0 < times["device_ms"]["p10"] <= times["device_ms"]["p90"]


def test_ceilings_are_rates_of_what_was_timed():
    asked = []

    class Clock:
        device = CPU

        def time(self, call, budget):
            call()
            asked.append(budget)
            return {"device_ms": {"median": 2.0}}

    ceilings = bench_clock.measure_ceilings(Clock(), budget=0.1)
    assert ceilings["copy_bytes_per_s"] == 2 * (128 << 20) / 2e-3
    assert ceilings["matrix_flops_per_s"] == 2 * 1024**3 / 2e-3
    assert "float32" in ceilings["matrix"] and asked == [0.1, 0.1]


def test_plain_gemms_have_the_calls_flops():
    from torch.utils.flop_counter import FlopCounterMode

    class Clock:
        def time(self, call, budget):
            with FlopCounterMode(display=False) as counter:
                call()
            return {"device_ms": {"median": counter.get_total_flops()}}

    case = Case(24, 10, "float32", batch=2)
    flops = bench_clock.gemm_milliseconds(case, Clock(), 0.1)
    assert flops == sum(stage_floors(case, copy_rate=1e30, matrix_rate=1))


class CountingClock(bench_clock.CpuClock):
    """Times nothing, and counts what it was asked to time."""

    def __init__(self):
        super().__init__(CPU)
        self.timed = 0

    def time(self, call, budget):
        self.timed += 1
        return {"device_ms": bench_clock.spread([2.0, 2.0]), "wall_ms": None, "host_ms": None}


def measure(make, sources, in_full=True, clock=None, case=CASE):
    problem = make_problem(case, CPU)
    wanted = reference(problem) if in_full else sample(problem)
    return bench.measure(Rival("fake", make), problem, sources, wanted, clock, budget=1e-3)


def answer(problem) -> torch.Tensor:
    return reference(problem).to(problem.x.dtype)


def absent(problem, sources):
    raise Absent("not on this machine")


def raises_when_made(problem, sources):
    raise RuntimeError("no such kernel\nand a long story")


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


def row_of(rival, case=CASE, milliseconds=None, **entries):
    row = case.columns() | dict.fromkeys(ROW) | {"rival": rival, "speed_up": {}}
    row |= {"status": "measured" if milliseconds else "failed"} | entries
    if milliseconds:
        row["device_ms"] = {"median": milliseconds, "p10": milliseconds, "p90": milliseconds,
                            "calls": 3}  # fmt: skip
    derive(row, case, CEILINGS, entries.get("gemm_ms"))
    return row


def test_share_of_floor_speed_up_and_gemm_time():
    ours = row_of("ours", milliseconds=4.0, gemm_ms=2.0)
    floor = 1e3 * sum(stage_floors(CASE, 1e9, 1e12))
    assert ours["floor_ms"] == pytest.approx(floor) and floor > 0
    assert ours["floor_share"] == pytest.approx(floor / 4)
    assert ours["gemm_times"] == 2.0
    rows = [
        ours,
        row_of("in-tree, chunk 64", milliseconds=10.0),
        row_of("in-tree, unchunked"),
        row_of("cuequivariance, bf16 norms", milliseconds=5.0),
    ]
    compare(rows)
    assert ours["speed_up"] == {"in-tree, chunk 64": 2.5, "cuequivariance, bf16 norms": 1.25}
    assert rows[1]["speed_up"]["cuequivariance, bf16 norms"] == 0.5
    assert rows[2]["speed_up"] == {}
    assert row_case(ours) == CASE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_own_rivals_are_right(sources, dtype):
    case = Case(16, 9, dtype, "incoming", "float")
    problem = make_problem(case, CPU)
    wanted = reference(problem)
    makes = {
        rival.name: rival.make
        for rival in RIVALS
        if rival.on_cpu and not rival.slow and case.passes in rival.passes
    }
    assert makes.keys() == {"ours", "in-tree, chunk 64", "in-tree, unchunked"}
    with torch.no_grad():
        errors = {
            name: relative_error(make(problem, sources)(), wanted) for name, make in makes.items()
        }
        module = bench_rivals.in_tree(problem, sources, chunk_size=64).function
    assert max(errors.values()) < (1e-2 if dtype == "bfloat16" else 1e-6)
    assert module.chunk_size == 64 and module.norm_mix.weight.dtype == torch.float32


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_reference_gradient_is_that_of_the_tests_own(direction):
    problem = make_problem(Case(16, 9, "float32", direction, passes="training"), CPU)
    weights = {name: value.double() for name, value in problem.weights.items()}
    direction_of_x = torch.randn(problem.x.shape, dtype=torch.float64)

    def loss(step: float) -> torch.Tensor:
        x = problem.x.double() + step * direction_of_x
        return (oracle(Problem(x, weights, direction, problem.mask)) * problem.grad_out).sum()

    wanted = (loss(1e-5) - loss(-1e-5)) / 2e-5
    got = (reference_gradient(problem) * direction_of_x).sum()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-7)


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


def test_training_rows_have_no_floor_and_groups_of_their_own(sources, tmp_path):
    forward = row_of("ours", milliseconds=2.0)
    both = row_of("ours", dataclasses.replace(CASE, passes="training"), milliseconds=6.0)
    assert both["floor_ms"] is both["floor_share"] is None and forward["floor_share"]
    del forward["passes"]  # as results of before have it
    environment = describe_environment(read_settings(**TINY), sources, "the command", "abc")
    results = {"environment": environment, "ceilings": CEILINGS, "rows": [forward, both]}
    names = [name for name, _ in bench_report.groups(results)]
    assert names == ["float32, outgoing, bool mask",
                     "float32, outgoing, bool mask, forward and backward"]  # fmt: skip
    assert bench_report.markdown(results).count("ours, of floor") == 1
    assert {path.stem for path in bench_plots.plot(results, tmp_path)} >= {"time_1", "time_2"}
    assert not (tmp_path / "floor_2.png").exists()


def test_cuequivariance_gets_its_arguments_in_its_own_order(kernel, sources, monkeypatch):
    # Our function of that name has cuequivariance_torch's signature.
    taken = []

    def theirs(*args):
        taken.append(args)
        return kernel.triangle_multiplicative_update(*args)

    module = types.ModuleType("cuequivariance_torch")
    module.triangle_multiplicative_update = theirs
    monkeypatch.setitem(sys.modules, "cuequivariance_torch", module)
    case = Case(16, 9, "bfloat16", "incoming", "bool")
    problem = make_problem(case, CPU)
    for norm_dtype in ("bfloat16", "float32"):
        call = bench_rivals.cuequivariance(problem, sources, norm_dtype)
        assert relative_error(call(), reference(problem)) < 1e-2
        _, _, mask, *norms = taken[-1][:5]
        assert mask.dtype == torch.bfloat16
        assert {norm.dtype for norm in norms} == {getattr(torch, norm_dtype)}
    problem = make_problem(CASE, CPU)
    with pytest.raises(Absent, match="for a bfloat16 pair"):
        bench_rivals.cuequivariance(problem, sources, "bfloat16")


def test_without_its_package_cuequivariance_is_absent(sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuequivariance_torch", None)
    with pytest.raises(Absent, match="cuequivariance_torch"):
        bench_rivals.cuequivariance(make_problem(CASE, CPU), sources, "float32")


PUBLISHED = """
import os, warnings
import torch
os.environ["CUEQ_DEFAULT_CONFIG"] = "1"
os.environ["EXISTING"] = "changed"
warnings.filterwarnings("ignore", category=DeprecationWarning)
calls = []

def triangle_multiplicative_update_with_residual(pair, direction, residual, drop_mask, **rest):
    calls.append((residual, drop_mask, rest))
    return residual
"""


@pytest.fixture
def published(tmp_path, monkeypatch):
    folder = tmp_path / "published" / "esmfold2_trimul"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "trimul_with_residual.py").write_text(PUBLISHED)
    yield folder.parent
    bench_rivals.find_published.cache_clear()
    for name in ("esmfold2_trimul", "esmfold2_trimul.trimul_with_residual"):
        sys.modules.pop(name, None)


def test_published_is_called_as_its_layer_does_and_changes_no_settings(
    kernel, published, monkeypatch
):
    monkeypatch.setenv("EXISTING", "kept")
    monkeypatch.delenv("CUEQ_DEFAULT_CONFIG", raising=False)
    filters = list(warnings.filters)
    sources = Sources(kernel, published)
    problem = make_problem(Case(16, 9, "bfloat16"), CPU)
    call = bench_rivals.published(problem, sources)
    assert torch.equal(call(), torch.zeros_like(problem.x))
    residual, drop_mask, rest = bench_rivals.find_published(published).calls[0]
    assert not residual.any() and drop_mask is None
    assert rest.pop("mask") is problem.mask and rest.pop("eps") == 1e-5
    assert {value.dtype for value in rest.values()} == {torch.bfloat16}
    assert rest.keys() == problem.weights.keys()
    assert os.environ["EXISTING"] == "kept" and "CUEQ_DEFAULT_CONFIG" not in os.environ
    assert warnings.filters == filters
    assert sources.versions(True)["published"].startswith("sha256 ")
    with pytest.raises(Absent, match="bfloat16 alone"):
        bench_rivals.published(make_problem(CASE, CPU), sources)


def test_published_that_cant_be_had_is_absent(kernel, tmp_path):
    sources = Sources(kernel, tmp_path)
    with pytest.raises(Absent, match="No module named 'esmfold2_trimul'"):
        bench_rivals.published(make_problem(Case(16, 9, "bfloat16"), CPU), sources)
    assert sources.versions(True)["published"] is None


def test_our_own_kernel_is_never_taken_for_the_published_one():
    # What README.md asks for in transformers puts ours where the published one is looked for.
    script = """
        import sys
        from pathlib import Path
        from esmfold2_trimul_tools.bench.rivals import Sources, find_published
        from esmfold2_trimul_tools.repository import load_kernel

        root = Path(sys.argv[1])
        kernel = load_kernel(root)
        assert find_published(None).triangle_multiplicative_update_with_residual
        print(Sources(kernel).published_module(), Sources(kernel).versions(True)["published"])
    """
    printed = python_output(
        script, str(ROOT), LOCAL_KERNELS=f"biohub/esmfold2-trimul={ROOT}",
        PYTHONPATH=str(ROOT / "tools" / "src"),
    )  # fmt: skip
    assert printed == "LOCAL_KERNELS puts our own kernel in its place None\n"


def test_compiled_is_the_same_function(sources):
    problem = make_problem(CASE, CPU)
    make = bench_rivals.compiled(bench_rivals.ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        call = make(problem, sources)
        assert relative_error(call(), reference(problem)) < 1e-6
    assert call.function is not bench_rivals.ours(problem, sources).function


def test_captured_warms_up_beside_the_stream_and_then_replays(sources, monkeypatch):
    log = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            log.append(f"on {self.name}")

        def __exit__(self, *_):
            log.append(f"off {self.name}")

    class Graph:
        name = "graph"

        def replay(self):
            log.append("replay")

    for name, value in {
        "Stream": Stream,
        "current_stream": lambda: Stream("current"),
        "stream": lambda stream: stream,
        "CUDAGraph": Graph,
        "graph": lambda graph: Stream(graph.name),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    problem = make_problem(CASE, CPU)

    parameters = []

    def make(problem, sources):
        parameter = torch.ones(1)
        parameters.append(weakref.ref(parameter))
        return Call(lambda one: log.append("call") or answer(problem) * one, (parameter,))

    call = bench_rivals.captured(make)(problem, sources)
    assert log == [
        "side waits for current", "on side", "call", "call", "call", "off side",
        "current waits for side", "on current", "on graph", "call", "off graph", "off current",
    ]  # fmt: skip
    del log[:]
    assert relative_error(call(), reference(problem)) < 1e-6
    assert log == ["replay"]
    # A graph reads where its parameters lay, whether they are still there or not.
    assert parameters[0]() is not None


def test_first_call_is_timed_in_a_process_of_its_own():
    assert 0 < first_call_seconds("ours", CASE, CPU, ROOT, None) < 100


def test_a_first_call_that_fails_says_why(monkeypatch):
    monkeypatch.setenv("ESMFOLD2_TRIMUL_ROOT", "")
    with pytest.raises(RuntimeError, match="UserError: .*no build/torch-universal"):
        first_call_seconds("ours", CASE, CPU, ROOT / "docs", None)


def fake_rivals(monkeypatch, *rivals):
    monkeypatch.setattr("esmfold2_trimul_tools.bench.settings.RIVALS", rivals)
    monkeypatch.setattr(bench, "gemm_milliseconds", lambda *_: 1.0)


def good(name, log=None):
    def make(problem, sources):
        if log is not None:
            log.append((name, problem.case.length))
        return Call(lambda: answer(problem))

    return Rival(name, make, on_cpu=True)


def test_run_measures_every_rival_at_every_shape(monkeypatch, tmp_path):
    log, saved, seen = [], [], []
    bad = Rival("bad", raises_when_made, on_cpu=True)
    fake_rivals(monkeypatch, good("ours", log), bad, good("in-tree, chunk 64", log))
    settings = read_settings(**TINY)
    results = bench.start(settings, "the command")
    bench.run(
        settings, results,
        lambda what, done, total: seen.append((what, done, total)),
        lambda results: saved.append(len(results["rows"])),
    )  # fmt: skip
    assert [(row["rival"], row["L"], row["status"]) for row in results["rows"]] == [
        ("ours", 8, "measured"), ("bad", 8, "failed"), ("in-tree, chunk 64", 8, "measured"),
        ("ours", 9, "measured"), ("bad", 9, "failed"), ("in-tree, chunk 64", 9, "measured"),
    ]  # fmt: skip
    assert log == [("ours", 8), ("in-tree, chunk 64", 8), ("ours", 9), ("in-tree, chunk 64", 9)]
    assert saved == [3, 6]
    assert seen[0] == ("C=16 L=8 float32 outgoing mask=bool, ours", 0, 6)
    assert seen[-1] == ("done", 6, 6)
    for row in results["rows"]:
        if row["status"] == "measured":
            assert row["gemm_times"] > 0 and row["floor_share"] > 0
            assert row["speed_up"]["in-tree, chunk 64"] > 0
    assert ours_is_right(results)
    environment = results["environment"]
    assert environment["commands"] == ["the command"]
    assert environment["paths"] == {"float32": "aten: CPU tensors run the ATen path"}
    assert environment["rivals"]["transformers"] and environment["rivals"]["published"] is None


def test_environment_on_a_gpu(kernel, monkeypatch, tmp_path):
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device: "A GPU",
        "get_device_capability": lambda device: (9, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 580.1\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    settings = read_settings(device="cuda", dtypes="bfloat16,float32")
    environment = describe_environment(settings, Sources(kernel, tmp_path), "the command", "abc")
    assert (environment["device"], environment["driver"]) == ("A GPU", "580.1")
    assert (environment["commands"], environment["commit"]) == (["the command"], "abc")
    assert environment["paths"].keys() == {"bfloat16", "float32"}
    assert environment["paths"]["bfloat16"].startswith("triton: Triton")
    assert environment["rivals"]["published"] is None
    json.dumps(environment)


def test_a_device_that_a_rival_broke_ends_the_run(monkeypatch):
    class Clock(CountingClock):
        def synchronize(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    fake_rivals(monkeypatch, good("ours"))
    monkeypatch.setattr(bench, "make_clock", lambda device: Clock())
    settings = read_settings(**TINY)
    results, saved = bench.start(settings, ""), []
    with pytest.raises(UserError, match="ours at C=16 L=8.* broke the device: .*access was enc"):
        bench.run(settings, results, save=lambda results: saved.append(len(results["rows"])))
    assert saved == [1]


def test_an_interrupted_run_leaves_a_whole_file_and_can_be_resumed(monkeypatch, tmp_path):
    out = tmp_path / "new" / "results.json"
    log = []

    def interrupted(problem, sources):
        if problem.case.length == 9:
            raise KeyboardInterrupt
        return Call(lambda: answer(problem))

    fake_rivals(
        monkeypatch, good("ours", log), Rival("in-tree, chunk 64", interrupted, on_cpu=True)
    )
    with pytest.raises(KeyboardInterrupt):
        bench.bench(read_settings(**TINY), "first", out)
    partial = read_results(out)
    assert [(row["rival"], row["L"]) for row in partial["rows"]] == [
        ("ours", 8), ("in-tree, chunk 64", 8), ("ours", 9),
    ]  # fmt: skip
    assert list(out.parent.iterdir()) == [out]

    fake_rivals(monkeypatch, good("ours", log), good("in-tree, chunk 64", log))
    results = bench.bench(read_settings(**TINY), "second", out, resumed=True)
    assert log == [("ours", 8), ("ours", 9), ("in-tree, chunk 64", 9)]
    assert results == read_results(out)
    assert results["rows"][:3] == [*partial["rows"][:2], results["rows"][2]]
    assert results["rows"][2]["speed_up"].keys() == {"in-tree, chunk 64"}
    assert results["environment"]["commands"] == ["first", "second"]
    assert results["ceilings"] == partial["ceilings"]


def test_resuming_gives_the_absent_another_chance(monkeypatch, tmp_path):
    out = tmp_path / "results.json"
    fake_rivals(monkeypatch, good("ours"), Rival("late", absent, on_cpu=True))
    bench.bench(read_settings(**TINY), "", out)
    fake_rivals(monkeypatch, good("ours"), good("late"))
    results = bench.bench(read_settings(**TINY), "", out, resumed=True)
    assert [(row["rival"], row["status"]) for row in results["rows"]] == [
        ("ours", "measured"), ("ours", "measured"), ("late", "measured"), ("late", "measured"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["device", "torch", "kernel", "seed", "busy_loops"])
def test_results_of_elsewhere_are_not_added_to(monkeypatch, tmp_path, name):
    out = tmp_path / "results.json"
    fake_rivals(monkeypatch, good("ours"))
    results = bench.bench(read_settings(**TINY), "", out)
    results["environment"][name] = "another"
    write_document(results, out)
    before = out.read_text()
    with pytest.raises(UserError, match=f"--resume: {name} was 'another' in .* another file"):
        bench.bench(read_settings(**TINY), "", out, resumed=True)
    assert out.read_text() == before


def test_busy_loops_run_beside_the_measurement_alone(monkeypatch):
    def running() -> int:
        return sum(loop.poll() is None for loop in started)

    started, during = [], []
    popen = bench_clock.subprocess.Popen

    def record(command, **options):
        process = popen(command, **options)
        if bench_clock._BUSY_LOOP in command:
            started.append(process)
        return process

    monkeypatch.setattr(bench_clock.subprocess, "Popen", record)
    fake_rivals(monkeypatch, good("ours"))
    results = bench.bench(
        read_settings(**TINY, busy=2), "", progress=lambda *_: during.append(running())
    )
    assert len(started) == 2 and set(during) == {2} and running() == 0
    assert results["environment"]["busy_loops"] == 2
    assert ", 2 busy loops beside it, " in bench_report.caption(results)


def test_a_write_that_fails_spares_the_file(tmp_path):
    out = tmp_path / "results.json"
    results = {"environment": {}, "ceilings": {}, "rows": [row_of("ours", milliseconds=1.0)]}
    write_document(results, out)
    assert read_results(out) == results
    with pytest.raises(ValueError):
        write_document({**results, "ceilings": {"copy": float("nan")}}, out)
    assert read_results(out) == results
    with pytest.raises(UserError, match="can't be written to"):
        write_document(results, out / "below a file")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "not JSON"), ("[]", "holds no results of this benchmark"),
     ('{"environment": {}, "rows": []}', "holds no results of this benchmark")],
)  # fmt: skip
def test_what_is_no_results_file_is_refused(tmp_path, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_results(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": "8,x"}, "--lengths must be whole numbers above 0, as in 128,256; got '8,x'"),
        ({"widths": "0"}, "--widths must be whole numbers above 0"),
        ({"compile_lengths": ","}, "--compile-lengths must be whole numbers"),
        ({"dtypes": "int8"}, "--dtypes must be of float32, bfloat16, float16; got 'int8'"),
        ({"directions": "up"}, "--directions must be of outgoing, incoming; got 'up'"),
        ({"masks": "soft"}, "--masks must be of bool, float, none; got 'soft'"),
        ({"rivals": ["theirs"]}, "--rival must be one of ours; .*; got 'theirs'"),
        ({"budget": 0.0}, "--budget must be above 0 seconds; got 0.0"),
        ({"seed": -1}, "--seed must be at least 0; got -1"),
        ({"busy": -1}, "--busy must be at least 0; got -1"),
        ({"device": "xpu"}, "--device"),
        ({"published": Path("none")}, "--published none: holds no package esmfold2_trimul"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        read_settings(**options)


def test_dtypes_have_short_names():
    settings = read_settings(**TINY, dtypes="bf16,bfloat16,fp16,fp32")
    assert settings.dtypes == ("bfloat16", "float16", "float32")


def test_options_choose_the_rivals(monkeypatch):
    def names(**options):
        return [rival.name for rival in read_settings(**options).rivals]

    basic = ["ours", "in-tree, chunk 64", "in-tree, unchunked"]
    assert names(device="cpu") == basic
    assert names(device="cpu", graphs=True, max_autotune=True) == basic
    assert names(device="cpu", compile=True) == [*basic, "in-tree, torch.compile"]
    assert names(device="cpu", rivals=["published"]) == ["ours", "published"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert names(device="cuda") == [
        "ours", "ours, torch.compile", "ours, CUDA graph", "ours, lean", *basic[1:], "published",
        "cuequivariance, bf16 norms", "cuequivariance, fp32 norms",
    ]  # fmt: skip
    everything = dict(compile=True, max_autotune=True, graphs=True, passes="training,forward")
    assert len(names(device="cuda", **everything)) == len(RIVALS)
    assert names(device="cuda", passes="training") == [
        "ours", "ours, torch.compile", "ours, recompute all", *basic[1:], "published",
        "cuequivariance, bf16 norms", "cuequivariance, fp32 norms",
    ]  # fmt: skip
    settings = read_settings(device="cuda", compile_lengths="384")
    assert settings.dtypes == ("bfloat16",) and len(settings.cases()) == 30
    at = {length: settings.rivals_at(Case(128, length, "bfloat16")) for length in (384, 512)}
    assert len(at[384]) - len(at[512]) == 1 and "ours, torch.compile" in str(at[384])
    assert read_settings(device="cuda", quick=True).lengths == (76, 256, 512, 1024)


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


def test_markdown_has_ours_beside_each_rival():
    lines = bench_report.markdown(example_results()).splitlines()
    floors = [
        1e3 * sum(stage_floors(case, 1e9, 1e12)) / milliseconds
        for case, milliseconds in (
            (Case(128, 76, "bfloat16"), 0.5),
            (Case(128, 1024, "bfloat16"), 4),
        )
    ]
    assert lines[0].startswith("A GPU, torch 2.0, cuda 12, python 3.10, transformers 5, 2026-01-02")
    assert lines[2:6] == ["```", "one", "two", "```"]
    start = lines.index("| C | L | ours | in-tree, chunk 64 | published | ours, of floor |")
    assert lines[start + 1 : start + 4] == [
        "|---|---|---|---|---|---|",
        f"| 128 | 76 | 0.500 | 22.8 (45.6x) | 1.00 (2.00x) | {floors[0]:.0%} |",
        f"| 128 | 1024 | 4.00 | 182 (45.6x) | failed | {floors[1]:.0%} |",
    ]
    start = lines.index("| C | L | ours | in-tree, chunk 64 |", start)
    assert lines[start + 2] == "| 128 | 76 | 0.600 | 9.00 (15.0x) |"
    assert "| 128 | 76 | 3.00, 4.5e-03 | 12.00, 6.1e-03 |" in lines
    first_calls = lines.index("| C | L | ours |")
    assert lines[first_calls + 2 : first_calls + 4] == ["| 128 | 76 | 2.0 |", ""]
    assert "| C | L | ours | ours, of floor | ours, x GEMM time |" in lines
    assert "| 128 | 76 | 3.00, - |" in lines
    assert "- cuequivariance, fp32 norms, absent at every shape: not installed" in lines
    assert "- published, failed at C=128 L=1024: OutOfMemoryError: no" in lines


def test_tables_have_a_line_for_each_row_that_was_measured():
    results = example_results()
    tables = [bench_report.table(rows) for _, rows in bench_report.groups(results)]
    head = tables[0][0]
    assert head[:3] == ["C", "L", "rival"]
    for title in ("p10 to p90", "wall", "host", "first call, s", "peak, pairs", "vs in-tree"):
        assert title in head
    assert "vs cuEq" not in head and "x GEMMs" not in head
    numbers = [line for _, lines in tables for line in lines]
    assert len(numbers) == sum(row["status"] == "measured" for row in results["rows"])
    assert numbers[0][:4] == ["128", "76", "ours", "0.500"] and "45.6x" in numbers[0]
    results["rows"] = [row for row in results["rows"] if row["status"] == "absent"]
    assert all("absent at every shape" in note for note in bench_report.notes(results))
    assert not bench_report.markdown(results).count("|")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1255.4, "1255"), (125.6, "126"), (99.96, "100"), (63.1, "63.1"), (0.4071, "0.407"),
     (0.5, "0.500"), (0.00012, "0.0001")],
)  # fmt: skip
def test_milliseconds_have_three_digits(value, shown):
    assert bench_report.milliseconds(value) == shown


def test_plots_are_drawn_from_the_file_alone_and_alike_each_time(tmp_path):
    write_document(example_results(), tmp_path / "results.json")
    files = bench_plots.plot(read_results(tmp_path / "results.json"), tmp_path / "one")
    again = bench_plots.plot(read_results(tmp_path / "results.json"), tmp_path / "two")
    names = [file.name for file in files]
    assert names[:4] == ["time_1.png", "floor_1.png", "memory_1.png", "error_1.png"]
    assert names[4:] == ["time_2.png", "floor_2.png", "memory_2.png"]
    for one, other in zip(files, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert imread(files[0]).shape[0] > 600


def test_plots_show_what_they_say(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append((path, figure)))
    results = example_results()
    results["rows"] = [row for row in results["rows"] if row["dtype"] == "bfloat16"]
    other = [row | {"C": 256} for row in results["rows"]]
    results["rows"] += other
    bench_plots.plot(results, tmp_path)
    shown = {path.name: figure for path, figure in figures}
    left, right = shown["time.png"].axes
    assert [axes.get_title() for axes in (left, right)] == ["C = 128", "C = 256"]
    assert (left.get_xscale(), left.get_yscale()) == ("log", "log")
    assert (left.get_xlabel(), left.get_ylabel()) == ("L, residues", "time of a call, ms")
    lines = {line.get_label(): line for line in left.get_lines()}
    assert lines.keys() == {"ours", "in-tree, chunk 64", "published", "three-stage floor"}
    assert lines["ours"].get_xydata().tolist() == [[76, 0.5], [1024, 4.0]]
    assert lines["published"].get_xydata().tolist() == [[76, 1.0]]
    widths = {name: line.get_linewidth() for name, line in lines.items()}
    assert max(widths, key=widths.get) == "ours"
    (legend,) = shown["time.png"].legends
    assert {text.get_text() for text in legend.get_texts()} == lines.keys()
    (floor, _) = shown["floor.png"].axes
    assert floor.get_ylim()[0] == 0 and floor.get_yscale() == "linear"
    assert shown["memory.png"].axes[0].get_ylim()[0] == 0


def test_every_rival_has_a_style_of_its_own():
    styles = [tuple(bench_plots._style(rival.name).items())[1:4] for rival in RIVALS]
    assert len(set(styles)) == len(RIVALS)
    colours = {name: bench_plots._style(name)["color"] for name in ("ours", "published", "else")}
    assert len(set(colours.values())) == 3


def test_lengths_that_would_overlap_share_a_label():
    assert bench_plots._spaced({511, 512, 768, 769, 76, 64}) == [64, 76, 512, 768]


def test_the_command_needs_torch_typer_and_rich_alone(tmp_path):
    script = """
        import runpy
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("kernels", "transformers", "matplotlib", "triton",
                                              "cuequivariance_torch"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Absent())

        def run(*arguments):
            sys.argv[1:] = ["bench", *arguments]
            try:
                runpy.run_module("esmfold2_trimul_tools", run_name="__main__")
            except SystemExit as ended:
                return ended.code
        out = sys.argv[1]
        tiny = ["--device", "cpu", "--widths", "16", "--lengths", "8", "--budget", "0.001"]
        assert run(*tiny, "--out", out, "--rival", "in-tree, chunk 64") == 0
        assert run("--results", out, "--plot", "plots") == 2
        assert run(*tiny, "--out", out, "--resume", "--markdown") == 0
        assert run("--results", out + "none") == 2
    """
    out = tmp_path / "results.json"
    environment = {"PYTHONPATH": str(ROOT / "tools" / "src")}
    printed = python_output(script, str(out), **environment)
    assert "in-tree, chunk 64, absent at every shape: no transformers with ESMFold2" in printed
    assert "| C | L | ours | ours, of floor | ours, x GEMM time |" in printed
    results = read_results(out)
    assert {row["rival"]: row["status"] for row in results["rows"]} == {
        "ours": "measured", "in-tree, chunk 64": "absent", "in-tree, unchunked": "absent",
    }  # fmt: skip
    (first, second) = results["environment"]["commands"]
    assert first.startswith("esmfold2-trimul bench --device cpu --widths 16")


@pytest.fixture(scope="module")
def hub_benchmark():
    path = ROOT / "benchmarks" / "benchmark_trimul.py"
    spec = importlib.util.spec_from_file_location("hub_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_workload(hub_benchmark, direction):
    from functools import partialmethod

    from kernels.benchmark import Benchmark

    workloads = hub_benchmark._Workloads
    members = {
        "channels": 16, "direction": direction, "setup_tiny": partialmethod(workloads._draw, 9),
        "benchmark_tiny": workloads._update, "verify_tiny": workloads._reference,
    }  # fmt: skip
    # The base without its own workloads, which are long.
    shared = {name: value for name, value in vars(workloads).items() if "length" not in name}
    return type("Tiny", (Benchmark,), shared | members)


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_the_hubs_runner_runs_and_verifies_our_benchmark(hub_benchmark, direction):
    from kernels.cli.benchmark import run_benchmark_class

    cls = tiny_workload(hub_benchmark, direction)
    results, _ = run_benchmark_class(cls, 2, 1, str(ROOT), is_local=True, revision="local")
    assert results["tiny"].verified is True and results["tiny"].ref_mean_ms is not None


def test_the_hubs_runner_sees_a_wrong_kernel(hub_benchmark):
    from kernels.cli.benchmark import run_benchmark_class

    cls = tiny_workload(hub_benchmark, "outgoing")
    update = cls.benchmark_tiny

    def wrong(self):
        self.direction = "incoming"
        update(self)
        self.direction = "outgoing"

    cls.benchmark_tiny = wrong
    with pytest.raises(RuntimeError, match="Verification failed"):
        run_benchmark_class(cls, 1, 0, str(ROOT), is_local=True, revision="local")


def test_the_hubs_runner_finds_our_workloads():
    from kernels.cli.benchmark import discover_benchmark_classes, discover_benchmark_scripts

    (script,) = discover_benchmark_scripts("local", ROOT)
    classes = discover_benchmark_classes(script, ROOT)
    assert {cls.__name__ for cls in classes} == {
        "OutgoingOf128Channels", "OutgoingOf256Channels", "IncomingOf256Channels",
    }  # fmt: skip
    for cls in classes:
        workloads = [name for name in dir(cls) if name.startswith("benchmark_")]
        assert len(workloads) == 4
        for name in workloads:
            length = name.removeprefix("benchmark_")
            assert callable(getattr(cls, f"verify_{length}"))
            assert getattr(cls(), f"setup_{length}").args == (int(length.split("_")[1]),)
