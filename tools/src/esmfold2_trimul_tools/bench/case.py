"""The benchmark's shapes and their floors, without torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DIRECTIONS = ("outgoing", "incoming")
TRANSITION = "transition"  # in place of a direction: not a triangle, but the transition after it
MASKS = ("bool", "float", "none")
# A forward call, or a forward call and the gradients of all its inputs but the mask.
PASSES = ("forward", "training")
EPS = 1e-5
_COLUMNS = ("batch", "dtype", "direction", "mask", "passes")


@dataclass(frozen=True)
class Case:
    """One shape: a pair tensor [B, L, L, C], hidden width D, and how it is called.

    A case of the transition, whose direction is TRANSITION, has no mask, and x for residual.
    """

    channels: int
    length: int
    dtype: str
    direction: str = "outgoing"
    mask: str = "bool"
    batch: int = 1
    passes: str = "forward"

    @property
    def is_transition(self) -> bool:
        return self.direction == TRANSITION

    @property
    def hidden(self) -> int:
        """D, which is C in ESMFold2, and in its transition 4 C."""
        return 4 * self.channels if self.is_transition else self.channels

    @property
    def pairs(self) -> int:
        """n = B * L * L."""
        return self.batch * self.length**2

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    @property
    def pair_bytes(self) -> int:
        """Bytes of one tensor of the pair's size."""
        return self.pairs * self.channels * self.torch_dtype.itemsize

    def columns(self) -> dict[str, Any]:
        """The columns of a row of the results that give its shape."""
        return {
            "C": self.channels,
            "D": self.hidden,
            "L": self.length,
            **{name: value for name, value in asdict(self).items() if name in _COLUMNS},
        }

    def __str__(self) -> str:
        name = f"C={self.channels} L={self.length} {self.dtype} {self.direction}"
        name = name if self.is_transition else f"{name} mask={self.mask}"
        return name if self.passes == "forward" else f"{name} {self.passes}"


def stage_floors(case: Case, copy_rate: float, matrix_rate: float) -> tuple[float, ...]:
    """The least seconds of each stage: the larger of its traffic's and its FLOPs' time.

    Each stage reads its inputs once and writes its outputs once; weights are left out. The
    transition counts as one stage, whose hidden channels never leave the chip.

    Args:
        copy_rate: bytes read and written a second.
        matrix_rate: FLOPs a second of a matrix product.
    """
    n, c, d, e = case.pairs, case.channels, case.hidden, case.torch_dtype.itemsize
    if case.is_transition:
        traffic, flops = (n * 2 * c * e,), (2 * n * 3 * c * d,)
    else:
        mask_bytes = {"bool": 1, "float": 4, "none": 0}[case.mask]
        traffic = (n * (c + 2 * d) * e + n * mask_bytes, n * 3 * d * e, n * (c + d + c) * e)
        flops = (2 * n * c * 4 * d, 2 * case.batch * d * case.length**3, 2 * n * (d * c + c * c))
    return tuple(
        max(moved / copy_rate, done / matrix_rate)
        for moved, done in zip(traffic, flops, strict=True)
    )
