"""Launch settings: data in configs/*.json, chosen by a pure function.

A file holds, for each stage and each element size, a list of settings with the widths and lengths
that they are for; the first one that is wide and long enough is taken. An entry with "triton" is
for that version and later ones, where a newer compiler needs another setting, and stands before the
one that it replaces. Targets that share settings have a file each, so that one of them can be tuned
alone. Nothing is timed at run time, and a length chooses between a few classes only, so the kernels
compiled for one protein serve all.
"""

import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

FORWARD_STAGES = ("fused_dual_gemm", "trimul_einsum", "fused_ln_residual")
STAGES = (*FORWARD_STAGES, "fused_ln_residual_bwd", "norm_out_bwd", "fused_dual_gemm_bwd")
_CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class LaunchConfig:
    """One setting of one stage. M: positions or rows, N: output channels or columns, K: summed."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # tensor descriptors (TMA) instead of pointers, where they are legal
    held: bool = False  # 16-bit rows are normalised in the layout of an accumulator (`hold`)
    maxnreg: int | None = None  # NVIDIA only
    persistent: int = 0  # stage 2: programs a multiprocessor, each for many tiles; 0: one a tile
    split: int = 1  # stages 1 and 3, forward: programs that share the output channels of a tile

    def options(self) -> dict[str, int]:
        """The part that Triton's launcher takes."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        return options


@dataclass(frozen=True)
class Shape:
    """What a setting may depend on."""

    element_bytes: int
    width: int  # the larger of C and D
    length: int  # L, or for stages 1 and 3 that of one sequence with as many pairs as the batch


def shape_of(element_bytes: int, width: int, length: int, batch: int = 1) -> Shape:
    """The shape of a call on `batch` sequences of `length` residues."""
    return Shape(element_bytes, width, math.isqrt(batch * length * length))


@functools.cache
def pick_config(
    stage: str, target: str, device_name: str, shape: Shape, triton: str
) -> LaunchConfig:
    """The setting of `stage` on a device: the one tuned for it by name, else its target's.

    `triton` is Triton's version.

    Raises:
        ValueError: an unknown stage.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}; got {stage!r}")
    for entry in _settings(target, device_name)[stage][str(shape.element_bytes)]:
        widest, longest = entry["max_width"], entry["max_length"]
        if (
            (widest is None or shape.width <= widest)
            and (longest is None or shape.length <= longest)
            and _release(triton) >= _release(entry.get("triton", ""))
        ):
            return LaunchConfig(**entry["config"])
    raise ValueError(f"no setting of {stage} for {shape}")


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (3, 9) of "3.9.0", of "3.9rc1" and of "3.9.0+git1a2b"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def class_lengths(target: str, device_name: str) -> list[int]:
    """One length of each class that a device's settings of the forward tell apart."""
    bounds = {
        entry["max_length"]
        for stage in FORWARD_STAGES
        for entries in _settings(target, device_name)[stage].values()
        for entry in entries
    }
    finite = sorted(bound for bound in bounds if bound is not None)
    return [*finite, finite[-1] + 1 if finite else 1]


def _settings(target: str, device_name: str) -> dict:
    return _table(device_name.replace(" ", "_")) or _table(target) or _table("default")


@functools.cache
def _table(name: str) -> dict | None:
    path = _CONFIGS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None
