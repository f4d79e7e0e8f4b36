"""Times the first call of a rival: `python -m esmfold2_trimul_tools.bench.first_call JSON`.

Started by the benchmark in a process of its own, with an empty Triton cache. Prints the seconds
from the call to its result; importing torch and Triton, loading the package and drawing the inputs
come before.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ..repository import load_kernel
from .case import Case
from .clock import make_clock
from .problem import make_problem
from .rivals import RIVALS, Sources

_MODULE = "esmfold2_trimul_tools.bench.first_call"
_TIMEOUT = 300  # seconds


def first_call_seconds(
    rival: str, case: Case, device: torch.device, root: Path, published: Path | None
) -> float:
    """Seconds of the first call of the rival called `rival`, in a fresh process.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    asked = {
        "rival": rival,
        "case": vars(case),
        "device": str(device),
        "root": str(root),
        "published": None if published is None else str(published),
    }
    packages = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {
            "TRITON_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join(filter(None, packages)),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", _MODULE, json.dumps(asked)],
                env=environment, capture_output=True, text=True, timeout=_TIMEOUT,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no end after {_TIMEOUT} s") from None
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""]
    if done.returncode != 0:
        raise RuntimeError(lines[-1])
    return float(lines[-1])


@torch.no_grad()
def main() -> None:
    """Do what the argument asks for and print the seconds."""
    asked = json.loads(sys.argv[1])
    device = torch.device(asked["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")
    published = None if asked["published"] is None else Path(asked["published"])
    sources = Sources(load_kernel(Path(asked["root"])), published)
    problem = make_problem(Case(**asked["case"]), device)
    rival = next(rival for rival in RIVALS if rival.name == asked["rival"])
    call = rival.make(problem, sources)
    clock = make_clock(device)
    clock.synchronize()
    start = time.perf_counter()
    call()
    clock.synchronize()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main()
