"""Launch settings: data in configs/*.json, chosen by a pure function.

A file holds, for each stage and each element size, a list of settings in the order of the widths
that they are for; the first one wide enough is taken. Targets that share settings have a file each,
so that one of them can be tuned alone. Nothing is timed at run time, and a length chooses between
classes only ("small" or not), so the kernels compiled for one protein serve all.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

STAGES = ("fused_dual_gemm", "trimul_einsum", "fused_ln_residual")
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
    held: bool = False  # the first normalised operand stays in registers (`hold_as_operand`)
    maxnreg: int | None = None  # NVIDIA only

    def options(self) -> dict[str, int]:
        """The part that Triton's launcher takes."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        return options


@dataclass(frozen=True)
class ShapeClass:
    """What a setting may depend on: element bytes, the larger of C and D, small L or not."""

    element_bytes: int
    width: int
    small: bool


def shape_class(element_bytes: int, width: int, length: int) -> ShapeClass:
    """The class of a call. Up to L = 128 the launches, not the work, take the time: "small"."""
    return ShapeClass(element_bytes, width, length <= 128)


def pick_config(stage: str, target: str, device_name: str, shape: ShapeClass) -> LaunchConfig:
    """The setting of `stage` on a device: the one tuned for it by name, else its target's.

    Raises:
        ValueError: an unknown stage.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}; got {stage!r}")
    return _pick(stage, target, device_name, shape)


@functools.cache
def _pick(stage: str, target: str, device_name: str, shape: ShapeClass) -> LaunchConfig:
    table = _table(device_name.replace(" ", "_")) or _table(target) or _table("default")
    for entry in table[stage][str(shape.element_bytes)]:
        wide_enough = entry["max_width"] is None or shape.width <= entry["max_width"]
        if wide_enough and (shape.small or not entry.get("small")):
            return LaunchConfig(**entry["config"])
    raise ValueError(f"no setting of {stage} for {shape}")


@functools.cache
def _table(name: str) -> dict | None:
    path = _CONFIGS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None
