"""benchmarks/sharded_pairs.py, under torchrun."""

import json
import os
import subprocess
import sys

import pytest
from fresh_process import HUNG_SECONDS, ROOT


@pytest.mark.slow
def test_it_measures_what_two_ranks_do_and_one_alone(tmp_path):
    out = tmp_path / "results.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "benchmarks/sharded_pairs.py", "--device", "cpu", "--widths", "16", "--lengths", "16", "17",
        "--directions", "incoming", "--whole-up-to", "16", "--messages", "1", "--budget", "0.01",
        "--out", str(out),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT / "tools" / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=HUNG_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| incoming |") == 2  # of one rank's words
    found = json.loads(out.read_text())
    assert found["ranks"] == 2 and found["rates"]["1"] > 0
    beside, rows_alone = found["rows"]
    assert beside["ms"] > 0 and beside["alone_ms"] > 0
    assert beside["carrier"] == "messages" and beside["messages_ms"] is None
    assert beside["difference"] < 1e-6
    # Of a longer one each rank draws its own rows.
    assert rows_alone["ms"] > 0 and rows_alone["alone_ms"] is rows_alone["same_bits"] is None
