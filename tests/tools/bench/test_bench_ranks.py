"""`bench --nproc`: two ranks beside one, and what the results say."""

import json
import os
import subprocess
import sys

import pytest
from cli_runner import refusal, run
from esmfold2_trimul_tools.bench.ranks.results import MESSAGE, OF_RANK, ROW, read_results
from fresh_process import HUNG_SECONDS, ROOT


def command(*arguments, **environment):
    """The command in a process of its own, whose command line the ranks have too."""
    path = os.pathsep.join([str(ROOT / "tools" / "src"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "esmfold2_trimul_tools", "bench", "--device", "cpu", *arguments],
        env=os.environ
        | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "TRITON_INTERPRET": "0"}
        | environment,
        capture_output=True, text=True, timeout=HUNG_SECONDS,
    )  # fmt: skip


def test_two_ranks_and_one_alone(tmp_path):
    out = tmp_path / "results.json"
    done = command(
        "--nproc", "2", "--widths", "16", "--lengths", "16,17", "--directions", "incoming",
        "--passes", "forward,training",
        "--alone-up-to", "16", "--messages", "1", "--budget", "0.01", "--out", str(out), "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = read_results(out)
    assert json.loads(done.stdout) == found  # of the first rank alone
    assert found["ranks"] == 2 and found["environment"]["commands"][0].endswith("--json")
    (message,) = found["messages"]
    assert message.keys() == MESSAGE.keys() and message["bytes_per_s"] > 0
    # Of a longer one each rank draws its own rows.
    (beside, rows_alone), of_training = found["rows"][:2], found["rows"][2:]
    share = 16 * 16 * 16 * 4 / 2
    # Three planes' worth of half a share: a and b to the other's channels, t to its rows; in
    # training dt too, and da and db.
    for (row, alone), passes, planes in (
        ((beside, rows_alone), "forward", 3), (of_training, "training", 6)
    ):  # fmt: skip
        assert row.keys() == {"C", "L", "dtype", "direction"} | ROW.keys()
        assert row["passes"] == alone["passes"] == passes
        assert row["ms"] > 0 and row["alone_ms"] > 0 and row["difference"] < 1e-6
        assert row["same_bits"] == (row["difference"] == 0)
        for of in row["of_ranks"]:
            assert of.keys() == OF_RANK.keys()
            assert (of["residues"], of["channels"]) == (8, 8)
            assert of["sent_bytes"] == planes / 2 * share
            assert of["peak_bytes"] <= row["peak_shares"] * share
        assert alone["ms"] > 0 and alone["alone_ms"] is alone["same_bits"] is None
        assert [of["residues"] for of in alone["of_ranks"]] == [9, 8]


def results(**changes):
    of_ranks = [dict.fromkeys(OF_RANK, 5_000_000)] * 2
    row = {
        "C": 128, "L": 2048, "dtype": "bfloat16", "direction": "outgoing", "passes": "training",
        "ms": 2.0, "alone_ms": 3.5, "same_bits": True, "difference": 0.0, "peak_shares": 3.0,
        "of_ranks": of_ranks,
    }  # fmt: skip
    environment = {
        "device": "a GPU", "rivals": {}, "date": "2026-11-29", "commit": None, "torch": "2.13.0",
        "triton": "3.7.1", "cuda": None, "driver": None, "python": "3.11", "commands": ["bench"],
    }  # fmt: skip
    messages = [{"mib": 64, "bytes_per_s": 2.5e11}]
    return {
        "environment": environment, "ranks": 2, "messages": messages, "rows": [row | changes]
    }  # fmt: skip


@pytest.mark.parametrize(("changes", "fault"), [
    ({}, ""),
    ({"alone_ms": None, "same_bits": None, "difference": None}, ""),
    ({"same_bits": False, "difference": 1e-3}, ""),
    ({"same_bits": False, "difference": 0.1}, "bfloat16 outgoing training: off by 1.0e-01"),
    ({"same_bits": False, "difference": None}, "bfloat16 outgoing training: off by NaN or inf"),
])  # fmt: skip
def test_results_are_shown_and_judged(tmp_path, changes, fault):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results(**changes)))
    shown = run("bench", "--nproc", 2, "--results", path)
    assert shown.exit_code == bool(fault), shown.output
    assert fault in shown.stderr and bool(fault) == bool(shown.stderr)
    assert shown.stdout.startswith("2 ranks, each a GPU, torch 2.13.0, ")
    assert "messages of 64 MiB 250 GB/s." in shown.stdout
    alone = changes.get("alone_ms", 3.5)
    assert ("1.75x" in shown.stdout) == (alone is not None)
    drawn = run("bench", "--nproc", 2, "--results", path, "--markdown").stdout
    assert "| training | 128 | 2048 | bfloat16 | outgoing | copies | 2.00 |" in drawn
    assert "```\nbench\n```" in drawn


@pytest.mark.parametrize(("arguments", "message"), [
    (["--nproc", 1], "--nproc must be at least 2; got 1"),
    (["--nproc", 2, "--whole"], "--whole is not for --nproc"),
    (["--nproc", 2, "--masks", "none"], "--masks is not for --nproc"),
    (["--nproc", 2, "--resume"], "--resume is not for --nproc"),
    (["--whole", "--messages", "2"], "--messages is for --nproc"),
    (["--alone-up-to", 64], "--alone-up-to is for --nproc"),
    (["--nproc", 2, "--messages", "0"], "--messages must be whole numbers above 0"),
    (["--nproc", 2, "--device", "cuda:1"], "--device"),
    (["--nproc", 2, "--results", os.devnull], f"{os.devnull}: not JSON"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(arguments, message):
    assert refusal("bench", *arguments).startswith(message)


def test_gpus_are_counted(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    message = refusal("bench", "--nproc", 3)
    assert message == "--nproc must be at most the 2 GPUs here; got 3"
    message = refusal("bench", "--nproc", 2, "--device", "cuda:1")
    assert message == "--device must be cpu or cuda with --nproc; got 'cuda:1'"


def test_torchrun_has_started_as_many(monkeypatch):
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    message = refusal("bench", "--nproc", 2, "--device", "cpu")
    assert message == (
        "--nproc must be the number of processes that torchrun has started here, 4; got 2"
    )


def test_results_of_calls_are_no_results_of_ranks(tmp_path):
    path = tmp_path / "calls.json"
    path.write_text('{"environment": {}, "ceilings": {}, "rows": []}')
    assert refusal("bench", "--nproc", 2, "--results", path) == f"{path}: holds no results of ranks"
