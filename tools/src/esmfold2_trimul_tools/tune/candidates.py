"""The candidates: which settings of a stage are tried, and at which widths and lengths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from ..repository import submodule

STAGES = (
    "fused_dual_gemm", "trimul_einsum", "fused_ln_residual", "swiglu_hidden", "row_linear",
)  # fmt: skip
SPLIT_STAGES = STAGES[:3]  # of float32 whose operands are split
WIDTHS = (128, 256)
# The upper bound of each class of lengths, and lengths to time for it, ragged ones among them.
CLASSES = ((96, (64, 76)), (160, (128,)), (320, (256, 286)), (None, (384, 511, 512, 769, 1024)))
_SHARED_OF_TWO_BLOCKS = 113 * 1024  # bytes of shared memory if a multiprocessor is to hold two
# By width: block_m, which is 64 for each consumer; block_n; block_k; stages of the ring; split, the
# slots for the output of stage 3.
_HOPPER_GATED = {
    128: ((128, 64, 128, 4, 1), (192, 32, 128, 8, 1), (192, 64, 128, 4, 1)),
    256: ((128, 64, 256, 2, 1), (128, 32, 256, 4, 1), (192, 32, 256, 3, 1)),
}
_HOPPER_RESIDUAL = {
    128: ((128, 64, 128, 2, 3), (128, 64, 128, 3, 2), (192, 32, 128, 4, 3)),
    192: ((128, 32, 192, 3, 3), (128, 32, 192, 4, 2)),
    256: ((128, 32, 256, 2, 3), (128, 32, 256, 2, 2)),
    320: ((128, 32, 320, 3, 2), (128, 32, 320, 2, 3)),
    384: ((128, 32, 384, 2, 3), (128, 32, 384, 3, 1)),
    448: ((128, 32, 448, 2, 3), (128, 32, 448, 2, 2)),
    512: ((128, 32, 512, 2, 1),),
}
# The transition's second stage: `split` are the slots of a consumer's rows.
_HOPPER_ROWS = {
    128: ((128, 128, 64, 8, 6), (128, 128, 64, 6, 8)),
    192: ((128, 64, 64, 8, 8),),
    256: ((128, 256, 64, 4, 6), (128, 256, 64, 3, 8), (128, 128, 64, 6, 8)),
}


@dataclass(frozen=True)
class Job:
    """One setting of one stage for one width; `config` is a LaunchConfig's fields, sorted.

    kind: of the list of settings that it is for, "2" for 16 bits or "split".
    """

    stage: str
    width: int
    config: tuple[tuple[str, object], ...]
    kind: str = "2"

    def launch_config(self, kernel: ModuleType):
        return submodule(kernel, "triton_parts.settings").LaunchConfig(**dict(self.config))

    def __str__(self) -> str:
        setting = " ".join(f"{name}={value}" for name, value in self.config)
        return f"{self.stage} C = {self.width}, {setting}"


def candidates(
    stage: str, width: int, descriptors: bool = True, hopper: bool = False
) -> list[Job]:
    """The settings to try for 16-bit tensors of C = D = width, or of H = 4 C in a transition.

    Pruned by findings on sm_90 (docs/performance.md): operands held in registers, at least two
    blocks a multiprocessor in stages 1 and 3, no more registers than that allows. Without
    `descriptors`, for GPUs without TMA, the same shapes through pointers. With `hopper` also those
    of the stage's variant for Hopper.
    """
    grid = {
        "fused_dual_gemm": _dual_gemm_settings,
        "trimul_einsum": _einsum_settings,
        "fused_ln_residual": _ln_residual_settings,
        "swiglu_hidden": _swiglu_hidden_settings,
        "row_linear": _row_linear_settings,
    }[stage]
    settings = list(grid(width))
    if not descriptors:
        settings = [config | {"descriptors": False} for config in settings]
    if hopper:
        settings += _hopper_settings(stage, width)
    jobs = [Job(stage, width, tuple(sorted(config.items()))) for config in settings]
    return list(dict.fromkeys(jobs))


def split_candidates(stage: str, width: int) -> list[Job]:
    """The settings to try on sm_90 for float32 whose operands are split, of C = D = width."""
    by_shape = {
        "fused_dual_gemm": (
            ((64, 16, 4), (64, 32, 4), (128, 16, 8), (128, 32, 8)), (64, 128), (2, 3),
            (1, 2, 4, 8), (0,),
        ),
        "trimul_einsum": (
            ((64, 64, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)), (32, 64), (3, 4),
            (1,), (0, 1),
        ),
        "fused_ln_residual": (
            ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 128, 8)), (32, 64), (2, 3, 4),
            (1, 2, 4, 8), (0,),
        ),
    }[stage]  # fmt: skip
    return [
        Job(
            stage, width,
            tuple(sorted({
                "block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps,
                "num_stages": stages, "descriptors": True, "split": split, "persistent": persistent,
            }.items())),
            "split",
        )
        for (block_m, block_n, warps), block_k, stages, split, persistent in itertools.product(
            *by_shape
        )
        if split * block_n <= width
    ]  # fmt: skip


def _dual_gemm_settings(width: int) -> Iterator[dict]:
    block_k = 1 << (width - 1).bit_length()
    for (block_m, warps), block_n, stages, maxnreg, split, descriptors in itertools.product(
        ((64, 4), (128, 8)), (16, 32, 64), (3, 4), (None, 128, 168), (1, 2, 4, 8), (True, False)
    ):
        shared = 2 * block_n * block_k * 2 * stages + block_n * block_m * 2
        # Splits and pointers are for short sequences.
        if (
            shared > _SHARED_OF_TWO_BLOCKS
            or (maxnreg == 168 and warps == 8)
            or (split > 1 and maxnreg)
            or (not descriptors and (split == 1 or stages > 3 or warps == 8))
            or (block_m == 128 and maxnreg is None)
        ):
            continue
        yield {
            "block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps,
            "num_stages": stages, "descriptors": descriptors, "held": True, "maxnreg": maxnreg,
            "split": split,
        }  # fmt: skip


def _swiglu_hidden_settings(width: int) -> Iterator[dict]:
    """Those of stage 1, whose inner loop it shares, and blocks of channels for wide rows."""
    yield from _dual_gemm_settings(width)
    for (block_m, warps), block_n, stages in itertools.product(
        ((64, 4), (128, 8)), (64, 128), (2, 3)
    ):
        yield {
            "block_m": block_m, "block_n": block_n, "block_k": 64, "num_warps": warps,
            "num_stages": stages, "descriptors": True, "held": False, "maxnreg": None, "split": 1,
        }  # fmt: skip


def _row_linear_settings(width: int) -> Iterator[dict]:
    for (block_m, block_n, warps), block_k, stages, descriptors in itertools.product(
        ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (64, 256, 4),
         (128, 256, 8), (256, 128, 8)), (32, 64), (3, 4), (True, False),
    ):  # fmt: skip
        shared = (block_m + block_n) * block_k * 2 * stages
        # Pointers are for GPUs without TMA.
        if shared > 2 * _SHARED_OF_TWO_BLOCKS or (not descriptors and (stages > 3 or block_k > 32)):
            continue
        yield {
            "block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps,
            "num_stages": stages, "descriptors": descriptors,
        }  # fmt: skip


def _einsum_settings(width: int) -> Iterator[dict]:
    for block_m, block_n, block_k, warps, stages, descriptors, persistent in (
        (128, 256, 64, 8, 4, True, 1), (128, 256, 64, 8, 3, True, 1), (256, 128, 64, 8, 4, True, 1),
        (128, 128, 64, 8, 4, True, 1), (128, 128, 64, 4, 3, True, 2), (128, 128, 64, 4, 3, True, 0),
        (128, 64, 64, 4, 4, True, 2), (64, 128, 64, 4, 4, True, 2), (64, 64, 64, 4, 4, True, 3),
        (64, 64, 64, 4, 3, True, 0), (64, 64, 64, 4, 3, False, 0), (64, 64, 32, 4, 4, False, 0),
        (64, 128, 64, 4, 3, False, 0), (128, 128, 64, 8, 3, False, 0),
        (64, 256, 64, 4, 3, True, 1), (64, 256, 64, 4, 2, True, 2), (128, 128, 128, 8, 2, True, 1),
        (128, 256, 128, 8, 2, True, 1), (128, 128, 64, 4, 2, True, 2),
    ):  # fmt: skip
        yield {
            "block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps,
            "num_stages": stages, "descriptors": descriptors, "persistent": persistent,
        }  # fmt: skip


def _ln_residual_settings(width: int) -> Iterator[dict]:
    for split, block_k, stages, maxnreg, descriptors in itertools.product(
        (1, 2, 4), (32, 64), (3, 4), (None, 128, 168), (True, False)
    ):
        block_n = max(16, (1 << (width - 1).bit_length()) // split)
        registers = block_n // 2 + block_n // 4  # the accumulators and the packed gate
        if (maxnreg is not None and registers > maxnreg - 32) or (
            not descriptors and (stages > 3 or maxnreg)
        ):
            continue
        yield {
            "block_m": 64, "block_n": block_n, "block_k": block_k, "num_warps": 4,
            "num_stages": stages, "descriptors": descriptors, "held": True, "maxnreg": maxnreg,
            "split": split,
        }  # fmt: skip


def _hopper_settings(stage: str, width: int) -> Iterator[dict]:
    """Few: the shapes that were promising when the variants were written."""
    shapes = {
        "fused_dual_gemm": _HOPPER_GATED,
        "swiglu_hidden": _HOPPER_GATED,
        "fused_ln_residual": _HOPPER_RESIDUAL,
        "row_linear": _HOPPER_ROWS,
    }.get(stage, {})
    for block_m, block_n, block_k, stages, split in shapes.get(width, ()):
        yield {
            "block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": 4,
            "num_stages": stages, "split": split, "kernel": "hopper",
        }  # fmt: skip
