"""The benchmark's clocks, before a simulated GPU, and what they measure of a device."""

import types

import pytest
import torch
from bench_fakes import CPU
from esmfold2_trimul_tools.bench import clock as bench_clock
from esmfold2_trimul_tools.bench.case import Case, stage_floors


def test_percentiles_lie_between_neighbours():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [bench_clock.percentile(values, p) for p in (0, 10, 50, 90, 100)] == [1, 1.4, 3, 4.6, 5]
    assert bench_clock.percentile([7.0], 10) == 7
    assert bench_clock.spread([4.0, 1.0, 2.0]) == {
        "median": 2.0, "p10": 1.2, "p90": 3.6, "calls": 3,
    }  # fmt: skip


def test_repeats_follow_the_budget():
    assert bench_clock.repeats(1.0, 0.1, least=3) == 10
    assert bench_clock.repeats(1.0, 2.0, least=3) == 3
    assert bench_clock.repeats(1.0, 0.0, least=3) == 200


class SimulatedGpu:
    """A host and a device with one queue, in seconds: what torch.cuda and time are for the clock.

    A call keeps the host for `host`, and the device for `device`, which begins once the call is
    queued and what was queued before is done.
    """

    def __init__(self, monkeypatch, host: float, device: float, flush: float) -> None:
        self.now = self.free = 0.0
        self.host, self.device, self.flush = host, device, flush
        self.flushes = self.calls = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.now, gpu.free)

            def synchronize(self):
                gpu.synchronize()

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Buffer:
            def zero_(self):
                gpu.flushes += 1
                gpu.queue(0.0, flush)

        for name, value in {
            "Event": Event,
            "synchronize": lambda device=None: self.synchronize(),
            "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=50 << 20),
            "empty_cache": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(bench_clock.torch, "empty", lambda *_, **__: Buffer())
        monkeypatch.setattr(bench_clock.time, "perf_counter", lambda: self.now)

    def queue(self, host: float, device: float) -> None:
        self.now += host
        self.free = max(self.free, self.now) + device

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def __call__(self) -> None:
        self.calls += 1
        # Two launches, so that the device waits for the second if it has no head start.
        for _ in range(2):
            self.queue(self.host / 2, self.device / 2)


@pytest.mark.parametrize(("host", "device"), [(4e-4, 1e-4), (4e-4, 5e-3), (0.0, 1e-3)])
def test_gpu_clock_tells_device_wall_and_host_time_apart(monkeypatch, host, device):
    gpu = SimulatedGpu(monkeypatch, host, device, flush=1e-4)
    times = bench_clock.GpuClock(CPU).time(gpu, budget=0.2)
    assert times["device_ms"]["median"] == pytest.approx(1e3 * device)
    assert times["device_ms"]["p90"] == pytest.approx(1e3 * device)
    assert times["host_ms"] == pytest.approx(1e3 * host)
    # At the end of many calls the device works alone on what is left of the last.
    assert times["wall_ms"] == pytest.approx(1e3 * max(host, device), rel=0.05)
    assert 3 <= times["device_ms"]["calls"] <= 200


def test_gpu_clock_keeps_to_the_budget_and_flushes_before_every_call(monkeypatch):
    gpu = SimulatedGpu(monkeypatch, host=1e-3, device=2e-3, flush=3e-4)
    clock = bench_clock.GpuClock(CPU)
    began, flushes = gpu.now, gpu.flushes
    times = clock.time(gpu, budget=0.5)
    assert 0.2 < gpu.now - began < 0.7
    # Four give the host the time to queue the call, and one is to spare.
    assert gpu.flushes - flushes == 5 * times["device_ms"]["calls"]
    assert gpu.calls > times["device_ms"]["calls"]


def test_cpu_clock_repeats_and_reports_one_time():
    calls = []
    times = bench_clock.CpuClock(CPU).time(lambda: calls.append(0), budget=1e-4)
    assert times["wall_ms"] is times["host_ms"] is None
    assert times["device_ms"]["calls"] == len(calls) - 1 >= 3
    assert 0 < times["device_ms"]["p10"] <= times["device_ms"]["p90"]


def test_ceilings_are_rates_of_what_was_timed():
    asked = []

    class Clock:
        device = CPU

        def time(self, call, budget):
            call()
            asked.append(budget)
            return {"device_ms": {"median": 2.0}}

    ceilings = bench_clock.measure_ceilings(Clock(), budget=0.1)
    assert ceilings["copy_bytes_per_s"] == 2 * (128 << 20) / 2e-3
    assert ceilings["matrix_flops_per_s"] == 2 * 1024**3 / 2e-3
    assert "float32" in ceilings["matrix"] and asked == [0.1, 0.1]


def test_plain_gemms_have_the_calls_flops():
    from torch.utils.flop_counter import FlopCounterMode

    class Clock:
        def time(self, call, budget):
            with FlopCounterMode(display=False) as counter:
                call()
            return {"device_ms": {"median": counter.get_total_flops()}}

    case = Case(24, 10, "float32", batch=2)
    flops = bench_clock.gemm_milliseconds(case, Clock(), 0.1)
    assert flops == sum(stage_floors(case, copy_rate=1e30, matrix_rate=1))
