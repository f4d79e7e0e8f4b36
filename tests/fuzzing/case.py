"""A call as plain values, and the shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cuequivariance_enums import TriMulPrecision
from torch import Tensor

UPDATE = "triangle_multiplicative_update"
WITH_RESIDUAL = "triangle_multiplicative_update_with_residual"
TRANSITION = "swiglu_transition"
NORMS = ("norm_in_weight", "norm_in_bias", "norm_out_weight", "norm_out_bias")
PROJECTIONS = ("p_in_weight", "g_in_weight", "p_out_weight", "g_out_weight")
BIASES = ("p_in_bias", "g_in_bias", "p_out_bias", "g_out_bias")
TRANSITION_NORMS = ("norm_weight", "norm_bias")
TRANSITION_PROJECTIONS = ("gate_weight", "up_weight", "down_weight")
TRANSITION_BIASES = ("gate_bias", "up_bias", "down_bias")
# The public spellings of each arithmetic of float32.
PRECISIONS = {
    "fp32": (
        None, "none", "IEEE", "ieee", "TF32x3", "tf32x3", "fp16x3", "FP16x3",
        TriMulPrecision.IEEE, -1, 2, 3,
    ),
    "tf32": ("TF32", "tf32", "default", TriMulPrecision.TF32, 0, 1),
    "bf16": ("bfloat16", "BF16", TriMulPrecision.BFLOAT16, 5),
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A tensor's layout in memory; memory between its elements is NaN, or 99 or True."""

    order: tuple[int, ...]  # its axes, the outermost in memory first
    gap: int | None = None  # the axis of which every other place is used
    shared: int | None = None  # the axis of stride 0
    offset: int = 0  # elements before the first


@dataclass(frozen=True)
class Mask:
    """A pair mask or a drop mask."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str  # "padding", "random", "zeros", "soft" or "signed"


@dataclass(frozen=True)
class Lengths:
    values: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    poisoned: bool  # x is NaN in the padding


@dataclass(frozen=True)
class Case:
    """A call. Tensors that a mapping does not name are None, or are laid out as they are made."""

    function: str
    dtype: torch.dtype
    leading: tuple[int, ...]  # of x, before [L, L, C]
    length: int
    channels: int
    hidden: int
    direction: str
    rows: str  # of x: "plain", "large means", "some constant" or "constant"
    vectors: dict[str, torch.dtype]  # the norms' parameters and the biases, those that are given
    made: tuple[str, ...]  # projections that are None
    bundled: bool  # the input projections lie in one memory, the gates' first
    scales: dict[str, float]
    mask: Mask | None
    residual: str | None  # "tensor", or "pair" for the pair itself
    drop_mask: Mask | None
    lengths: Lengths | None
    eps: float
    eps_out: float | None
    precision: object
    memory: str
    recompute: str
    inplace: bool
    needs_grad: tuple[str, ...]
    layouts: dict[str, Layout]
    seed: int

    norms = NORMS
    projections = PROJECTIONS
    halves = ("g_in_weight", "p_in_weight")  # in the order of their memory if they are bundled

    @property
    def result_leading(self) -> torch.Size:
        """The leading dimensions of the result: those of x and mask together."""
        if self.function == WITH_RESIDUAL or self.mask is None or len(self.mask.shape) <= 2:
            return torch.Size(self.leading)
        return torch.broadcast_shapes(self.leading, self.mask.shape[:-2])


@dataclass(frozen=True)
class TransitionCase:
    """A call of `swiglu_transition`; the fields are as those of a `Case`."""

    dtype: torch.dtype
    rows_of: tuple[int, ...]  # x but for its channels; it ends in L, L beside lengths
    channels: int
    hidden: int
    rows: str
    vectors: dict[str, torch.dtype]
    bundled: bool  # gate_weight and up_weight lie in one memory
    scales: dict[str, float]
    residual: str | None  # "tensor", or "pair" for x itself
    lengths: Lengths | None
    eps: float
    precision: object
    inplace: bool
    needs_grad: tuple[str, ...]
    layouts: dict[str, Layout]
    seed: int

    function = TRANSITION
    norms = TRANSITION_NORMS
    projections = TRANSITION_PROJECTIONS
    halves = ("gate_weight", "up_weight")
    made = ()
    mask = drop_mask = None

    @property
    def leading(self) -> tuple[int, ...]:
        return self.rows_of[:-2]

    @property
    def result_leading(self) -> torch.Size:
        return torch.Size(self.leading)

    @property
    def length(self) -> int:
        """L of a call with lengths."""
        return self.rows_of[-1]


def arithmetic(case: Case | TransitionCase) -> str:
    """The kernels' arithmetic for float32 operands: "fp32", "tf32" or "bf16"."""
    if case.dtype != torch.float32:
        return "fp32"
    same = [
        word
        for word, spellings in PRECISIONS.items()
        if any(type(case.precision) is type(s) and case.precision == s for s in spellings)
    ]
    return same[0]


def shapes_of(case: Case | TransitionCase) -> dict[str, tuple[int, ...]]:
    """The shapes of the given tensors, by their arguments' names; x is `pair` of one function."""
    if isinstance(case, TransitionCase):
        return _shapes_of_transition(case)
    length, channels, hidden = case.length, case.channels, case.hidden
    pair = (*case.leading, length, length, channels)
    shapes = {"x": pair}
    if case.residual == "tensor":
        shapes["residual"] = pair
    for name in ("mask", "drop_mask", "lengths"):
        if getattr(case, name) is not None:
            shapes[name] = getattr(case, name).shape
    parameters = {
        "norm_in_weight": (channels,),
        "norm_in_bias": (channels,),
        "p_in_weight": (2 * hidden, channels),
        "p_in_bias": (2 * hidden,),
        "g_in_weight": (2 * hidden, channels),
        "g_in_bias": (2 * hidden,),
        "norm_out_weight": (hidden,),
        "norm_out_bias": (hidden,),
        "p_out_weight": (channels, hidden),
        "p_out_bias": (channels,),
        "g_out_weight": (channels, channels),
        "g_out_bias": (channels,),
    }
    given = [name for name in PROJECTIONS if name not in case.made] + list(case.vectors)
    return shapes | {name: shape for name, shape in parameters.items() if name in given}


def _shapes_of_transition(case: TransitionCase) -> dict[str, tuple[int, ...]]:
    channels, hidden = case.channels, case.hidden
    shapes = {"x": (*case.rows_of, channels)}
    if case.residual == "tensor":
        shapes["residual"] = shapes["x"]
    if case.lengths is not None:
        shapes["lengths"] = case.lengths.shape
    parameters = {
        "norm_weight": (channels,),
        "norm_bias": (channels,),
        "gate_weight": (hidden, channels),
        "gate_bias": (hidden,),
        "up_weight": (hidden, channels),
        "up_bias": (hidden,),
        "down_weight": (channels, hidden),
        "down_bias": (channels,),
    }
    given = (*case.projections, *case.vectors)
    return shapes | {name: shape for name, shape in parameters.items() if name in given}


def pairs_within(lengths: Tensor, length: int) -> Tensor:
    """[..., L, L] bool: where both residues of a pair are within the sequence."""
    residues = torch.arange(length) < lengths[..., None]
    return residues[..., :, None] & residues[..., None, :]
