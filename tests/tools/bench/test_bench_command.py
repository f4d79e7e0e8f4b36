"""The command `esmfold2-trimul bench`."""

import json
from pathlib import Path

import pytest
from cli_runner import run
from esmfold2_trimul_tools.bench import run as bench
from esmfold2_trimul_tools.bench.results import read_results
from fresh_process import ROOT, python_output
from matplotlib.image import imread

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


TINY_BENCH = ["bench", "--device", "cpu", "--widths", 16, "--lengths", 8, "--budget", 0.001]


@pytest.fixture
def quick_ceilings(monkeypatch):
    ceilings = {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e12, "copy": "c", "matrix": "m"}
    monkeypatch.setattr(bench, "measure_ceilings", lambda clock: ceilings)


def test_bench_measures_prints_and_keeps(quick_ceilings):
    result = run(*TINY_BENCH, "--masks", "bool,none", "--out", "new/results.json", "--plot", "new")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for text in ("float32, outgoing, bool mask", "float32, outgoing, no mask", "in-tree, chunk 64",
                 "in-tree, unchunked", "p10 to p90", "vs in-tree", "x GEMMs"):  # fmt: skip
        assert text in result.stdout
    kept = json.loads(Path("new/results.json").read_text())
    assert [row["rival"] for row in kept["rows"]] == 2 * [
        "ours", "in-tree, chunk 64", "in-tree, unchunked"
    ]  # fmt: skip
    assert {row["status"] for row in kept["rows"]} == {"measured"}
    assert imread("new/time_2.png").size > 0

    shown = run("bench", "--results", "new/results.json", "--json")
    assert json.loads(shown.stdout) == kept
    tables = run("bench", "--results", "new/results.json", "--markdown").stdout
    assert tables.count("| 16 | 8 |") == 4


def test_bench_json_is_all_there_is_on_stdout(quick_ceilings):
    result = run(*TINY_BENCH, "--json", "--directions", "incoming", "--commit", "abc")
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document.keys() == {"environment", "ceilings", "rows"}
    assert document["environment"]["commit"] == "abc"
    assert {row["direction"] for row in document["rows"]} == {"incoming"}


def test_bench_fails_if_our_own_kernel_is_wrong(quick_ceilings, monkeypatch):
    monkeypatch.setitem(bench.WILD_ERROR, "float32", 0.0)
    result = run(*TINY_BENCH)
    assert result.exit_code == 1
    assert "ours, wrong at every shape: relative error" in result.stdout


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
