"""Processes that work together by torch.distributed, a rank each: on this machine, their start.

A rank finds the others by its environment, as one that torchrun has started. So a program that
`run_ranks` starts on one machine can be started by torchrun on several.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from .errors import UserError

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0  # after a rank has failed, in which the others may say why they do


class RanksError(UserError):
    """A rank failed, or they were not done in time. None of them runs any more."""

    exit_status = 1


def run_ranks(
    module: str,
    arguments: list[str],
    count: int,
    seconds: float | None = None,
    output: IO | None = None,
) -> None:
    """Runs `python -m module arguments` in `count` processes, until all have ended well.

    They import these tools. Each has a share of the cores, unless OMP_NUM_THREADS says otherwise.

    Args:
        seconds: the time that they have; None for any.
        output: where their stdout and stderr go; None leaves them as they are.

    Raises:
        RanksError: with the rank that failed first and its exit status; or out of time.
    """
    # The ranks are clients of this store, as of torchrun's agent.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))} | os.environ | {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }  # fmt: skip
    folder = Path(__file__).resolve().parents[1]
    if not folder.name.endswith("-packages"):  # where the processes find them anyway
        path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, "-m", module, *arguments]
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(count):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=own, stdout=output, stderr=output))
        _wait(processes, seconds)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def _wait(processes: list[subprocess.Popen], seconds: float | None) -> None:
    end = float("inf") if seconds is None else time.monotonic() + seconds
    failed = None
    while True:
        states = [process.poll() for process in processes]
        if failed is None and any(states):
            failed = next((rank, state) for rank, state in enumerate(states) if state)
            end = min(end, time.monotonic() + _GRACE_SECONDS)
        if None not in states or time.monotonic() > end:
            break
        time.sleep(_POLL_SECONDS)
    if failed is not None:
        raise RanksError(f"rank {failed[0]} ended with status {failed[1]}")
    if None in states:
        raise RanksError(f"not done after {seconds:g} s")


def is_rank() -> bool:
    """Whether `run_ranks` or torchrun has started this process."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def join_ranks(kind: str) -> torch.device:
    """Makes this process a rank: by gloo, and with `kind` "cuda" by NCCL on a GPU of its own.

    Returns:
        The rank's device.
    """
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    return device


def slowest_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The time of a call that every rank makes, of the slowest rank; all begin together."""
    synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    call()
    synchronize(device)
    slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def received_rate(
    size: int, device: torch.device, seconds_of: Callable[[Callable[[], Any]], float]
) -> float:
    """Bytes a second that a rank receives, while every rank sends `size` bytes to each other.

    Args:
        seconds_of: measures the time of a call that every rank makes.
    """
    ranks = dist.get_world_size()
    sent = torch.randint(0, 256, (ranks, size), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    return (ranks - 1) * size / seconds_of(lambda: dist.all_to_all_single(received, sent))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
