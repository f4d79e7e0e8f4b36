"""Peak memory of a piece of work, in bytes: of the GPU where there is one, else of the process."""

import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .options import Kernel

if TYPE_CHECKING:
    from transformers import EsmFold2Model

_STATM = Path("/proc/self/statm")
_MEMINFO = Path("/proc/meminfo")
# Bytes of a fold for each value of the pair tensor.
# On a GPU, in bfloat16, for each sample and once more for the rest: from folds of 8 samples on an
# H200, L = 256 to 1024 (benchmarks/results/nvidia_h200_whole.json). Other numbers of samples and
# dtypes by arithmetic.
_GPU_BYTES = {"ours": 10.9, "hub": 22.8, "off": 31.8}
# The kernels run samples of few pairs together, up to so many pairs, each with planes of its own.
_PAIRS_TOGETHER, _PLANES_BYTES = 2**18, 8.2
# On a CPU, of the trunk, and for each sample and byte of the dtype: fitted to folds of small models
# with 1 and 4 samples in bfloat16 and float32 (L = 96 and 160; within 30 %).
_TRUNK_BYTES, _SAMPLE_BYTES = 85, 20
_SAMPLING_INTERVAL = 0.002  # seconds; a fold's pair-sized temporaries live several times as long


@dataclass
class PeakMemory:
    """Filled when the measured block ends.

    peak_bytes: the highest level during the block. added_bytes: how far that is above the level at
    its start. meaning: what was measured, in words.
    """

    peak_bytes: int = 0
    added_bytes: int = 0
    meaning: str = ""


@contextmanager
def measure_peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measure what the block allocates on `device`.

    On an accelerator this is torch's count of allocated bytes. On a CPU it is the resident set of
    the process, sampled every 2 ms by a thread (Linux), or its peak since the process began
    elsewhere.
    """
    result = PeakMemory()
    if device.type == "cpu":
        measured = _sampled_resident_set() if _STATM.exists() else _resident_set_high_water()
    else:
        measured = _accelerator_memory(device)
    with measured as numbers:
        yield result
    result.peak_bytes, start, result.meaning = numbers
    result.added_bytes = max(0, result.peak_bytes - start)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a new tensor on `device` can have; None where the system does not tell."""
    if device.type != "cpu":
        return getattr(torch, device.type).mem_get_info(device)[0]
    if not _MEMINFO.exists():
        return None
    (line,) = (line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvai"))
    return int(line.split()[1]) * 1024


def fold_bytes(model: "EsmFold2Model", length: int, samples: int, kernel: Kernel) -> int:
    """About how much memory a fold takes beside the model: it grows with the square of L."""
    values, itemsize = length**2 * model.config.pairwise_hidden_size, model.dtype.itemsize
    if model.device.type == "cpu":
        return values * (_TRUNK_BYTES + samples * itemsize * _SAMPLE_BYTES)
    together = min(samples, max(1, _PAIRS_TOGETHER // length**2)) if kernel == "ours" else 1
    each = _GPU_BYTES[kernel] * (samples + 1) + _PLANES_BYTES * (together - 1)
    return int(values * each * itemsize / 2)


@contextmanager
def _accelerator_memory(device: torch.device) -> Iterator[list]:
    backend = getattr(torch, device.type)  # torch.cuda or torch.xpu
    numbers: list = []
    backend.synchronize(device)
    backend.reset_peak_memory_stats(device)
    start = backend.memory_allocated(device)
    yield numbers
    backend.synchronize(device)
    numbers += [backend.max_memory_allocated(device), start, f"torch's {device.type} allocations"]


@contextmanager
def _sampled_resident_set() -> Iterator[list]:
    numbers: list = []
    _return_free_memory()
    start = peak = _resident_bytes()
    finished = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not finished.wait(_SAMPLING_INTERVAL):
            peak = max(peak, _resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield numbers
    finally:
        finished.set()
        sampler.join()
    peak = max(peak, _resident_bytes())
    numbers += [peak, start, "resident set of the process, sampled every 2 ms"]


@contextmanager
def _resident_set_high_water() -> Iterator[list]:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, else KiB
    numbers: list = []
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    yield numbers
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    numbers += [peak, start, "highest resident set since the process began"]


def _resident_bytes() -> int:
    resident_pages = int(_STATM.read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def _return_free_memory() -> None:
    """Give freed memory back to the system, so that an earlier fold's does not count here."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
