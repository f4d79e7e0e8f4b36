"""A run of the benchmark from its settings to its file: no test here says how fast anything is."""

import json
import os

import pytest
import torch
from bench_fakes import (
    CEILINGS,
    TINY,
    CountingClock,
    absent,
    answer,
    fake_rivals,
    good,
    raises_when_made,
)
from cli_runner import ready
from esmfold2_trimul_tools.bench import clock as bench_clock
from esmfold2_trimul_tools.bench import report as bench_report
from esmfold2_trimul_tools.bench import run as bench
from esmfold2_trimul_tools.bench.results import ours_is_right, read_results
from esmfold2_trimul_tools.bench.rivals import Call, Rival, Sources
from esmfold2_trimul_tools.bench.settings import Settings
from esmfold2_trimul_tools.documents import write_document
from esmfold2_trimul_tools.environment import describe_environment
from esmfold2_trimul_tools.errors import UserError


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "measure_ceilings", lambda clock: dict(CEILINGS))


def test_run_measures_every_rival_at_every_shape(monkeypatch, tmp_path):
    log, saved, seen = [], [], []
    bad = Rival("bad", raises_when_made, on_cpu=True)
    fake_rivals(monkeypatch, good("ours", log), bad, good("in-tree, chunk 64", log))
    settings = ready(Settings, **TINY)
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
    settings = ready(Settings, device="cuda", dtypes="bfloat16,float32")
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
    settings = ready(Settings, **TINY)
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
        bench.bench(ready(Settings, **TINY), "first", out)
    partial = read_results(out)
    assert [(row["rival"], row["L"]) for row in partial["rows"]] == [
        ("ours", 8), ("in-tree, chunk 64", 8), ("ours", 9),
    ]  # fmt: skip
    assert list(out.parent.iterdir()) == [out]

    fake_rivals(monkeypatch, good("ours", log), good("in-tree, chunk 64", log))
    results = bench.bench(ready(Settings, **TINY), "second", out, resumed=True)
    assert log == [("ours", 8), ("ours", 9), ("in-tree, chunk 64", 9)]
    assert results == read_results(out)
    assert results["rows"][:3] == [*partial["rows"][:2], results["rows"][2]]
    assert results["rows"][2]["speed_up"].keys() == {"in-tree, chunk 64"}
    assert results["environment"]["commands"] == ["first", "second"]
    assert results["ceilings"] == partial["ceilings"]


def test_resuming_gives_the_absent_another_chance(monkeypatch, tmp_path):
    out = tmp_path / "results.json"
    fake_rivals(monkeypatch, good("ours"), Rival("late", absent, on_cpu=True))
    bench.bench(ready(Settings, **TINY), "", out)
    fake_rivals(monkeypatch, good("ours"), good("late"))
    results = bench.bench(ready(Settings, **TINY), "", out, resumed=True)
    assert [(row["rival"], row["status"]) for row in results["rows"]] == [
        ("ours", "measured"), ("ours", "measured"), ("late", "measured"), ("late", "measured"),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["device", "torch", "kernel", "seed", "busy_loops"])
def test_results_of_elsewhere_are_not_added_to(monkeypatch, tmp_path, name):
    out = tmp_path / "results.json"
    fake_rivals(monkeypatch, good("ours"))
    results = bench.bench(ready(Settings, **TINY), "", out)
    results["environment"][name] = "another"
    write_document(results, out)
    before = out.read_text()
    with pytest.raises(UserError, match=f"--resume: {name} was 'another' in .* another file"):
        bench.bench(ready(Settings, **TINY), "", out, resumed=True)
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
        ready(Settings, **TINY, busy=2), "", progress=lambda *_: during.append(running())
    )
    assert len(started) == 2 and set(during) == {2} and running() == 0
    assert results["environment"]["busy_loops"] == 2
    assert ", 2 busy loops beside it, " in bench_report.caption(results)


@pytest.mark.parametrize("passes", ["forward", "training"])
def test_a_run_of_transitions(passes):
    """Its GEMMs are timed beside it, and its results are read like a triangle's."""
    settings = ready(Settings, **TINY, transition=True, passes=passes)
    results = bench.start(settings, "the command")
    bench.run(settings, results)
    assert len(results["rows"]) == 2 * 3 and ours_is_right(results)
    for row in results["rows"]:
        assert (row["status"], row["direction"], row["mask"]) == ("measured", "transition", "none")
        assert row["error"] < 1e-5 and row["gemm_ms"] > 0 and row["gemm_times"] > 0
        assert row["speed_up"]["in-tree, unchunked"] > 0 and row["peak_pairs"] > 0
        assert row["D"] == 4 * row["C"]
    shown = bench_report.markdown(results)
    group = "float32, transition" + (", forward and backward" * (passes == "training"))
    assert f"over ours ({group}):" in shown and "ours, x GEMM time" in shown
