"""How the benchmark measures: clocks for GPU and CPU calls, the machine's ceilings, plain GEMMs.

On a GPU a call has three times. Device time is between two events around one call. The L2 cache is
overwritten before each call, repeatedly until the host has had time to queue the whole call, so
that the device never waits for it. Wall time is that of many calls issued back to back, divided by
their number: the slower of host and device decides. Host time is until one call returns, with
nothing queued before it. On a CPU there is one time, that of a call.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from .case import Case

Call = Callable[[], Any]

_MIN_FLUSH_BYTES = 256 << 20
_MAX_FLUSHES = 100
_MOST_CALLS = 200
# Shares of a row's time budget.
_DEVICE_SHARE, _WALL_SHARE, _HOST_SHARE = 0.5, 0.3, 0.2
# A loop that keeps a core busy until its parent process has ended, in whatever way.
_BUSY_LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1 << 20):
        pass
"""


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Simulates other programs on a shared machine: `count` processes that compute constantly."""
    loops = [subprocess.Popen([sys.executable, "-c", _BUSY_LOOP]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the sorted values lie, interpolated between neighbours."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def spread(milliseconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile and number of the times of single calls."""
    return {
        "median": statistics.median(milliseconds),
        "p10": percentile(milliseconds, 10),
        "p90": percentile(milliseconds, 90),
        "calls": len(milliseconds),
    }


def repeats(budget: float, seconds_a_call: float, least: int) -> int:
    """How many calls fit into `budget` seconds: `least` at least, 200 at most."""
    return max(least, min(_MOST_CALLS, int(budget / max(seconds_a_call, 1e-9))))


class CpuClock:
    """Times calls on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        """Does nothing: CPU calls are synchronous."""

    def release(self) -> None:
        """Does nothing: freed memory has gone back to the system."""

    def time(self, call: Call, budget: float) -> dict[str, Any]:
        """device_ms, wall_ms and host_ms of a call, in about `budget` seconds.

        device_ms is a `spread`; the others are None.
        """
        estimate = _seconds(call)
        times = [1e3 * _seconds(call) for _ in range(repeats(budget, estimate, least=3))]
        return {"device_ms": spread(times), "wall_ms": None, "host_ms": None}


class GpuClock:
    """Times calls on a CUDA or ROCm device, which must be the current one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        size = max(_MIN_FLUSH_BYTES, 2 * l2_bytes)
        self._flushed = torch.empty(size, dtype=torch.int8, device=device)
        self._flushed.zero_()
        self._flush_seconds = statistics.median(
            self._between_events(self._flushed.zero_, flushes=0) / 1e3 for _ in range(5)
        )

    def synchronize(self) -> None:
        """Waits for all that was queued; an error of the device surfaces here."""
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Gives freed memory back to the device, so that the next rival can have it."""
        torch.cuda.empty_cache()

    def time(self, call: Call, budget: float) -> dict[str, Any]:
        """device_ms, wall_ms and host_ms of a call, in about `budget` seconds.

        device_ms is a `spread`, the others are numbers. The call is warmed up first.
        """
        call()
        self.synchronize()
        estimate = self._wall_seconds(call, calls=1)
        host = statistics.median(
            self._host_seconds(call)
            for _ in range(repeats(_HOST_SHARE * budget, estimate, least=1))
        )
        flushes = min(_MAX_FLUSHES, 1 + math.ceil(host / self._flush_seconds))
        seconds = estimate + flushes * self._flush_seconds
        device = [
            self._between_events(call, flushes)
            for _ in range(repeats(_DEVICE_SHARE * budget, seconds, least=3))
        ]
        calls = repeats(_WALL_SHARE * budget, estimate, least=2)
        wall = self._wall_seconds(call, calls)
        return {"device_ms": spread(device), "wall_ms": 1e3 * wall, "host_ms": 1e3 * host}

    def _between_events(self, call: Call, flushes: int) -> float:
        """Milliseconds of device time."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            self._flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _wall_seconds(self, call: Call, calls: int) -> float:
        def all_of_them() -> None:
            for _ in range(calls):
                call()
            self.synchronize()

        self.synchronize()
        return _seconds(all_of_them) / calls

    def _host_seconds(self, call: Call) -> float:
        self.synchronize()
        return _seconds(call)


def make_clock(device: torch.device) -> CpuClock | GpuClock:
    """The clock for calls on `device`."""
    return CpuClock(device) if device.type == "cpu" else GpuClock(device)


def measure_ceilings(clock: CpuClock | GpuClock, budget: float = 0.5) -> dict[str, Any]:
    """The machine's rates: copy_bytes_per_s (read plus written), matrix_flops_per_s, what was run.

    On random data: zeros save power, which raises a GPU's clocks and so its rates.
    """
    device = clock.device
    on_gpu = device.type != "cpu"
    megabytes, size = (1024, 8192) if on_gpu else (128, 1024)
    dtype = torch.bfloat16 if on_gpu else torch.float32

    def median_seconds(call: Call) -> float:
        return clock.time(call, budget)["device_ms"]["median"] / 1e3

    source = torch.randint(0, 256, (megabytes << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = median_seconds(partial(target.copy_, source))
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    multiplied = median_seconds(partial(torch.mm, left, right, out=product))
    return {
        "copy_bytes_per_s": 2 * source.numel() / copied,
        "matrix_flops_per_s": 2 * size**3 / multiplied,
        "copy": f"{megabytes} MiB within the device, bytes read plus written",
        "matrix": f"{size} x {size} x {size} {str(dtype).removeprefix('torch.')} on random data",
    }


def gemm_milliseconds(case: Case, clock: CpuClock | GpuClock, budget: float) -> float:
    """The time of plain GEMMs of the call's shapes, and so of its FLOPs.

    A triangle's in float32, on the CPU: [n, C] x [C, 4D], D times [L, L] x [L, L], [n, D] x [D, C]
    and [n, C] x [C, C]. A transition's in its dtype: see `_transition_gemms`. All into memory that
    is already allocated.
    """
    gemms = _transition_gemms(case, clock.device) if case.is_transition else _triangle_gemms(case)
    gemms()
    return clock.time(gemms, budget)["device_ms"]["median"]


def _transition_gemms(case: Case, device: torch.device) -> Call:
    """x [Wg; Wu]^T and h Wd^T; in training also G Wd, G^T h, [dp, du] [Wg; Wu], [dp, du]^T x."""
    n, c, d = case.pairs, case.channels, case.hidden

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=case.torch_dtype, device=device)

    x, pair, hidden, out = randn(n, c), randn(n, 2 * d), randn(n, d), randn(n, c)
    both, down = randn(2 * d, c), randn(c, d)
    grad_both, grad_down = torch.empty_like(both), torch.empty_like(down)

    def gemms() -> None:
        torch.mm(x, both.t(), out=pair)
        torch.mm(hidden, down.t(), out=out)
        if case.passes == "training":
            torch.mm(out.t(), hidden, out=grad_down)
            torch.mm(out, down, out=hidden)
            torch.mm(pair.t(), x, out=grad_both)
            torch.mm(pair, both, out=out)

    return gemms


def _triangle_gemms(case: Case) -> Call:
    n, c, d, length = case.pairs, case.channels, case.hidden, case.length
    x, t = torch.randn(n, c), torch.randn(n, d)
    planes = torch.randn(case.batch * d, length, length)
    bundle, emit, gate = torch.randn(c, 4 * d), torch.randn(d, c), torch.randn(c, c)
    projected, product = torch.empty(n, 4 * d), torch.empty_like(planes)
    emitted, gated = torch.empty(n, c), torch.empty(n, c)

    def gemms() -> None:
        torch.mm(x, bundle, out=projected)
        torch.bmm(planes, planes, out=product)
        torch.mm(t, emit, out=emitted)
        torch.mm(x, gate, out=gated)

    return gemms


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
