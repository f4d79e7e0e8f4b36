"""What carries messages among the GPUs of this machine, or in a test among processes of a CPU.

`measure` starts a process for each, and this module is what they run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .ranks import RanksError, join_ranks, received_rate, run_ranks, slowest_seconds, synchronize

MESSAGE_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}  # from each rank to each other
_SECONDS = 120.0  # of all processes; starting them takes most of it
_CALLS = 10


class Links(NamedTuple):
    """What the processes found."""

    rate: float | None  # bytes a second that a rank receives while it sends as many; None: `fault`
    fault: str  # why no messages came
    symmetric_fault: str  # why there is no symmetric memory; empty if there is


def measure(kind: str, count: int, seconds: float = _SECONDS) -> Links:
    """The links among `count` devices of a kind, "cuda" or "cpu", after `seconds` at most.

    Every rank sends MESSAGE_BYTES to each other at once, by NCCL on GPUs and by gloo on CPUs. With
    symmetric memory a rank writes into another's; that is tried last.
    """
    fault = "no rank reported it"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        path = Path(folder, "found.json")
        try:
            run_ranks(__name__, [kind, str(path)], count, seconds, output)
        except RanksError as error:
            output.seek(0)
            lines = [line.strip() for line in output if line.strip()]
            said = [line for line in lines if "Error: " in line] or lines[-1:]
            fault = f"{error}: {said[0]}" if said else str(error)
        found = json.loads(path.read_text()) if path.exists() else {}
    rate = found.get("rate")
    return Links(rate, fault if rate is None else "", found.get("symmetric_fault", fault))


def _work(kind: str, path: Path) -> None:
    device = join_ranks(kind)

    def median(call: Callable[[], Any]) -> float:
        slowest_seconds(call, device)  # makes the channels
        return statistics.median(slowest_seconds(call, device) for _ in range(_CALLS))

    found: dict[str, Any] = {"rate": received_rate(MESSAGE_BYTES[kind], device, median)}
    _write(found, path)
    found["symmetric_fault"] = _symmetric_fault(device)
    _write(found, path)
    dist.destroy_process_group()


def _write(found: dict[str, Any], path: Path) -> None:
    """In one step: the processes may be ended at any time."""
    if dist.get_rank() == 0:
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(found))
        os.replace(unfinished, path)


def _symmetric_fault(device: torch.device) -> str:
    """Why the ranks can't write into each other's symmetric memory; empty if they can."""
    if device.type != "cuda":
        return "it is for GPUs"
    # A pair tensor's messages go to one rank each, and multicast breaks some machines.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    rank, ranks, fault = dist.get_rank(), dist.get_world_size(), ""
    try:
        from torch.distributed import _symmetric_memory

        own = _symmetric_memory.empty(1024, dtype=torch.int32, device=device)
        handle = _symmetric_memory.rendezvous(own, dist.group.WORLD.group_name)
        following = handle.get_buffer((rank + 1) % ranks, own.shape, own.dtype)
    except Exception as error:  # whatever this version of torch, or the driver, raises
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
    if fault := _first(fault):
        return fault
    following.copy_(torch.full_like(own, rank))
    synchronize(device)
    dist.barrier()
    arrived = own.eq((rank - 1) % ranks).all().item()
    return _first("" if arrived else "what a rank wrote into another's memory did not arrive")


def _first(fault: str) -> str:
    """That of the first rank that has one."""
    faults = [""] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next(filter(None, faults), "")


if __name__ == "__main__":
    _work(sys.argv[1], Path(sys.argv[2]))
