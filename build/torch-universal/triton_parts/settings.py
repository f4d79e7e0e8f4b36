"""Launch settings: data in configs/*.json, chosen by a pure function.

A table is for a target, or for a device by its name. For each stage and element size, and on some
targets for float32 operands that are split ("split"), it lists settings, one a line. They are tried
in order; the first whose max_width, min_length and max_length fit the call is used. "triton" is the
first Triton version of an entry. "kernel" names a variant of the stage; such an entry is used only
if that variant can run the call. What a table leaves out comes from the table that "like" names.
Nothing is timed at run time. Lengths fall into few classes, so kernels compiled for one protein
serve others.
"""

import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

STAGES = (
    "fused_dual_gemm", "trimul_einsum", "fused_ln_residual", "fused_ln_residual_bwd",
    "norm_out_bwd", "fused_dual_gemm_bwd", "row_products", "input_bwd", "swiglu_hidden",
    "row_linear", "swiglu_projections", "swiglu_bwd", "row_products_and_sums",
)  # fmt: skip
_BOUNDS = ("max_width", "min_length", "max_length", "triton")
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
    # Stage 2: programs a multiprocessor, each for many tiles; 0: one a tile. Sums over pairs: the
    # same, where 0 is one.
    persistent: int = 0
    # Stages 1 and 3, forward: programs that share the output channels of a tile. Hopper's kernels:
    # stages of the ring of outputs (stage 3), of the planes' gradients (stage 1's backward), of a
    # consumer's rows (row_linear). Stage 1's backward, dx: blocks of a row that a program holds at
    # once. What a variant has no use for is as in the stage's own entry.
    split: int = 1
    fp32_dot: str = ""  # the fp32-accurate word for dots, if not the target's first
    kernel: str = ""  # the variant of the stage; "" is the stage's own

    def options(self) -> dict[str, int]:
        """The part that Triton's launcher takes."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        return options


@dataclass(frozen=True)
class Shape:
    """The properties of a call that its settings depend on."""

    element_bytes: int
    width: int  # the larger of C and D
    length: int  # L; for stages 1 and 3 that of one sequence with as many pairs as the batch
    split: bool = False  # float32 operands of dots are split numbers in float16

    @property
    def kind(self) -> str:
        """The name of its list of settings."""
        return "split" if self.split else str(self.element_bytes)


def shape_of(
    element_bytes: int, width: int, length: int, batch: int = 1, split: bool = False
) -> Shape:
    """The shape of a call on `batch` sequences of `length` residues."""
    return Shape(element_bytes, width, math.isqrt(batch * length * length), split)


@functools.cache
def pick_config(
    stage: str,
    target: str,
    device_name: str,
    shape: Shape,
    triton: str,
    variants: frozenset[str] = frozenset(),
) -> LaunchConfig:
    """The setting of `stage` on a device: the one tuned for it by name, else its target's.

    Args:
        triton: Triton's version.
        variants: the stage's variants that can run the call; entries of others are skipped.

    Raises:
        ValueError: an unknown stage, or no setting for the shape.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}; got {stage!r}")
    for entry in settings_of(target, device_name)[stage][shape.kind]:
        if (
            shape.width <= entry.get("max_width", math.inf)
            and entry.get("min_length", 0) <= shape.length <= entry.get("max_length", math.inf)
            and release(triton) >= release(entry.get("triton", ""))
            and entry.get("kernel", "") in variants | {""}
        ):
            setting = {name: value for name, value in entry.items() if name not in _BOUNDS}
            return LaunchConfig(**setting)
    raise ValueError(f"no setting of {stage} for {shape}")


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (3, 9) of "3.9.0", of "3.9rc1" and of "3.9.0+git1a2b"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def class_lengths(target: str, device_name: str) -> list[int]:
    """One length of each class that the settings for a device distinguish."""
    bounds = {
        entry["max_length"]
        for stage in STAGES
        for entries in settings_of(target, device_name)[stage].values()
        for entry in entries
        if "max_length" in entry
    }
    finite = sorted(bounds)
    return [*finite, finite[-1] + 1 if finite else 1]


def targets() -> list[str]:
    """The targets that have a table of their own."""
    names = [path.stem for path in _CONFIGS.glob("*.json")]
    return sorted(name for name in names if "shared_bytes" in _table(name))


def settings_of(target: str, device_name: str = "") -> dict:
    """The whole table of a device: "note", the stages, and properties of its target.

    The properties are shared_bytes, the most shared memory of a block, fp32_dots where they differ
    from the vendor's other targets, and fp32_default, the precision of a call in float32 for
    which no word is given, if it is "fp16x3".
    """
    for name in (device_name.replace(" ", "_"), target, "default"):
        if (table := _table(name)) is not None:
            return table
    raise FileNotFoundError(f"{_CONFIGS} has no default.json")


@functools.cache
def _table(name: str) -> dict | None:
    path = _CONFIGS / f"{name}.json"
    if not path.is_file():
        return None
    own = json.loads(path.read_text())
    if "like" not in own:
        return own
    other = _table(own.pop("like"))
    stages = {stage: {**other[stage], **own.get(stage, {})} for stage in STAGES if stage in other}
    return {**other, **own, **stages}
