"""Cases that run on four processes at once, ranks of gloo groups, and what became of each.

One start of the processes serves all cases of a test file, and they are forks of one that has
imported torch, because imports take longer than the cases.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from fresh_process import HUNG_SECONDS, ROOT, import_package

RANKS = 4
TIMEOUT = timedelta(minutes=5)  # of a message between live processes on busy cores


class Rank(NamedTuple):
    """One of the processes."""

    kernel: ModuleType
    rank: int
    groups: dict[int, dist.ProcessGroup]  # of the first 2, 3 and 4 ranks, where this one is in

    @contextlib.contextmanager
    def on_triton(self):
        """CPU tensors go through the Triton kernels, in the interpreter."""
        import interpreter

        if not hasattr(interpreter.repair, "done"):
            interpreter.repair()
            interpreter.quicken()
            interpreter.repair.done = True
        paths = self.kernel.paths
        paths._INTERPRET = True
        paths.execution_path.cache_clear()
        yield
        paths._INTERPRET = False
        paths.execution_path.cache_clear()


def reports_of(cases: list[Callable], tmp_path_factory) -> dict[str, dict[int, object]]:
    """For each case, by rank, what it returned; a string beginning with "Traceback" if it raised.

    A case is a function of a `Rank` in a module that the processes can import. A rank that raises
    ends, so the other ranks, which wait for it, end too: of later cases there are no reports.
    Test processes that share a file's tests share its reports.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / cases[0].__module__
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "store").exists():
            _run(cases, folder)
    found: dict[str, dict[int, object]] = {case.__name__: {} for case in cases}
    for path in folder.glob("*.json"):
        name, rank = path.stem.rsplit("-", 1)
        found[name][int(rank)] = json.loads(path.read_text())
    return found


def _run(cases: list[Callable], folder: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "torch._dynamo", "pytest"])
    processes = [
        context.Process(target=_work, args=(rank, cases, folder)) for rank in range(RANKS)
    ]
    # For Triton's import, in the process that the others are forks of.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        for process in processes:
            process.start()
    for process in processes:
        process.join(HUNG_SECONDS)
        process.kill()


def report_of(reports, case) -> dict[int, object]:
    """What each rank reported of a case that went well on all that report."""
    of_ranks = reports[case.__name__]
    assert of_ranks, "no rank came to this case"
    raised = {rank: of for rank, of in of_ranks.items() if str(of).startswith("Traceback")}
    assert not raised, "".join(f"rank {rank}: {report}\n" for rank, report in raised.items())
    return of_ranks


def same_values(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """They are of the same computation, whose sums may be in another order.

    Sums of float32 differ by 1e-6. So one in a thousand values may lie on the other side of the
    middle between two 16-bit numbers.
    """
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    bound = 1e-6
    if got.dtype != torch.float32:
        bound = torch.finfo(got.dtype).eps * 1e-3**0.5
    difference, size = (got.double() - wanted.double()).norm(), wanted.double().norm()
    assert difference <= bound * size, f"{difference:.1e} of {size:.1e} in {tuple(got.shape)}"


def _work(rank: int, cases: list[Callable], folder: Path) -> None:
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    kernel = import_package("kernel_of_ranks", ROOT / "build" / "torch-universal")
    kernel.paths._INTERPRET = False
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=RANKS, timeout=TIMEOUT)
    groups = {size: dist.new_group(range(size), timeout=TIMEOUT) for size in range(1, RANKS + 1)}
    mine = Rank(kernel, rank, {size: group for size, group in groups.items() if rank < size})
    for case in cases:
        try:
            with torch.no_grad():
                report = case(mine)
        except Exception:
            report = traceback.format_exc()
        (folder / f"{case.__name__}-{rank}.json").write_text(json.dumps(report))
        if str(report).startswith("Traceback"):
            break
    os._exit(0)  # at once: the others hear of it, and no group waits for a rank that was killed
