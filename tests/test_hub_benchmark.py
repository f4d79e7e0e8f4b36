"""The benchmark of benchmarks/, run by the Hub's own runner."""

import importlib.util
import json

import pytest
from conftest import HAS_GPU
from fresh_process import ROOT, python_output


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


def test_kernels_benchmark():
    """The command, with fewer calls."""
    pytest.importorskip("tabulate")
    command = """
        import os, sys
        from kernels.cli import main

        os.chdir(sys.argv[1])
        sys.argv[1:] = ["benchmark", ".", "--iterations", "2", "--warmup", "1", "--json"]
        main()
        """
    document = json.loads(python_output(command, str(ROOT)))
    workloads = {result["workload"]: result["verified"] for result in document["results"]}
    assert workloads["OutgoingOf256Channels.length_76"] is True
    assert len(workloads) == (12 if HAS_GPU else 3) and all(workloads.values())


def test_the_hubs_runner_finds_our_workloads():
    from kernels.cli.benchmark import discover_benchmark_classes, discover_benchmark_scripts

    (script,) = discover_benchmark_scripts("local", ROOT)
    classes = discover_benchmark_classes(script, ROOT)
    assert {cls.__name__ for cls in classes} == {
        "OutgoingOf128Channels", "OutgoingOf256Channels", "IncomingOf256Channels",
    }  # fmt: skip
    for cls in classes:
        workloads = [name for name in dir(cls) if name.startswith("benchmark_")]
        assert len(workloads) == (4 if HAS_GPU else 1)
        for name in workloads:
            length = name.removeprefix("benchmark_")
            assert callable(getattr(cls, f"verify_{length}"))
            assert getattr(cls(), f"setup_{length}").args == (int(length.split("_")[1]),)
