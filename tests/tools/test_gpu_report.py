"""tools/gpu_report.sh, the one command of a GPU machine, as far as a CPU goes."""

import json
import os
import subprocess
import sys

import pytest
from fresh_process import ROOT

SCRIPT = ROOT / "tools/gpu_report.sh"


def report(*arguments: str, steps: str = "benchmark tuning") -> subprocess.CompletedProcess[str]:
    choices = {"PYTHON": sys.executable, "STEPS": steps, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [str(SCRIPT), *arguments], capture_output=True, text=True, env=os.environ | choices
    )


def test_measures_the_cpu_path_where_there_is_no_gpu(tmp_path):
    folder = tmp_path / "a folder"
    size = ("--widths", "16", "--lengths", "8", "--budget", "0.001")
    ended = report(str(folder), *size)
    assert ended.returncode == 0, ended.stderr
    assert "no GPU: the CPU path is measured, and nothing is tuned" in ended.stdout
    rows = json.loads((folder / "benchmark.json").read_text())["rows"]
    assert [row["rival"] for row in rows if row["device_ms"]["median"] > 0][0] == "ours"
    assert "ours" in (folder / "benchmark.txt").read_text()
    assert not (folder / "tuned.json").exists()


def test_says_which_step_failed_and_goes_on(tmp_path):
    ended = report(str(tmp_path), "--widths", "wide", steps="benchmark")
    assert ended.returncode == 1
    assert "== benchmark failed with status 2" in ended.stdout
    assert f"the report is in {tmp_path}" in ended.stdout


@pytest.mark.parametrize("steps", ["benchmark", ""])
def test_without_a_folder_it_shows_its_usage(steps):
    ended = report(steps=steps)
    assert ended.returncode == 2
    assert "tools/gpu_report.sh FOLDER" in ended.stderr and not ended.stdout
