"""The machine, versions and commit with which the benchmark's numbers are taken."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .bench.rivals import Sources
from .errors import UserError
from .repository import is_checkout


class RunSettings(Protocol):
    """The settings of a run that its environment records, for example the benchmark's."""

    device: torch.device
    root: Path
    dtypes: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class ScriptSettings:
    """The `RunSettings` of a script in benchmarks/."""

    device: torch.device
    root: Path
    dtypes: tuple[str, ...]
    seed: int = 0


def describe_environment(
    settings: RunSettings, sources: Sources, command: str, commit: str | None = None
) -> dict[str, Any]:
    """The results' entry "environment".

    Args:
        command: the command line that measures.
        commit: what to record where there is no git checkout to ask.
    """
    device = settings.device
    on_gpu = device.type == "cuda"
    paths = {
        dtype: ": ".join(
            sources.kernel.paths.execution_path(device, getattr(torch, dtype))
        )
        for dtype in settings.dtypes
    }
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "all of the CPU's"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "driver": driver_version() if on_gpu else None,
        "clocks": "left as they were",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "rivals": sources.versions(on_gpu),
        "kernel": sources.kernel.__name__,
        "paths": paths,
        "seed": settings.seed,
        "commit": commit or checkout_commit(settings.root),
        "date": datetime.date.today().isoformat(),
        "commands": [command],
    }


def check_same(
    before: dict[str, Any], here: dict[str, Any], names: tuple[str, ...], path: Path
) -> None:
    """Refuses to add to the results in a file what was measured elsewhere.

    Args:
        before, here: the environment of those results, and that of now.
        names: the entries that must agree.

    Raises:
        UserError: one does not.
    """
    for name in names:
        if before.get(name) != here[name]:
            raise UserError(
                f"--resume: {name} was {before.get(name)!r} in {path} and is {here[name]!r} here: "
                "measure into another file"
            )


def cpu_name() -> str:
    """The processor as Linux names it, or as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _triton_version() -> str | None:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return None


def driver_version() -> str | None:
    """The NVIDIA driver's, of the first GPU."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def checkout_commit(root: Path) -> str | None:
    """The checkout's commit, and whether tracked files differ from it; None of an installation."""
    if not is_checkout(root):  # some other repository's, perhaps, if it lies in one
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changed = commit and _output("git", "-C", str(root), "status", "-s", "--untracked-files=no")
    return f"{commit}, with changes" if changed else commit


def _output(*command: str) -> str | None:
    """The output of a command; None if it is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
