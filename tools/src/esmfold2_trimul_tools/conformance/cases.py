"""The conformance suite's table: every case a row of data.

A case names what is special about a call; all else is the default of `Case`. The features that it
needs follow from its fields, so that an implementation without a feature doesn't count as failing.
The table needs no torch: options are checked against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..bench.case import EPS

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
BIASES = ("p_in_bias", "g_in_bias", "p_out_bias", "g_out_bias")
TRANSITION_BIASES = ("gate_bias", "up_bias", "down_bias")


@dataclass(frozen=True)
class Case:
    """One call of the triangle multiplication, in words.

    leading: the dimensions of x before [L, L, C].
    mask: its values, a key of `problem.MASKS`. mask_axes: its axes, of which "..." stands for
    `leading` or for mask_leading. mask_expanded: it is an expanded view.
    x: its values, a key of `problem.INPUTS`, times `scale`. layout: a key of `problem.LAYOUTS`.
    weights: "trunk"; "wide gates"; or "fine norms", whose decisive digits are lost in bfloat16.
    norms: the dtype of the LayerNorms' parameters, or "absent".
    residual: "none", "own", "pair" (x itself) or "overwritten" (the result is written over it).
    drop_mask: "none", or its shape, in the dtype of x; "bool" has the first shape.
    lengths: the real residues of each sequence, at most L; None for a call without lengths.
    """

    name: str
    dtype: str = "bfloat16"
    direction: str = "outgoing"
    channels: int = 64
    hidden: int = 64
    length: int = 33
    leading: tuple[int, ...] = (1,)
    mask: str = "bool"
    mask_axes: str = "... L L"
    mask_leading: tuple[int, ...] | None = None
    mask_expanded: bool = False
    x: str = "trunk"
    scale: float = 1.0
    layout: str = "contiguous"
    weights: str = "trunk"
    norms: str = "float32"
    biases: tuple[str, ...] = ()
    residual: str = "none"
    drop_mask: str = "none"
    eps: float = EPS
    precision: str | None = None
    lengths: tuple[int, ...] | None = None
    lengths_dtype: str = "int64"
    memory: str = "auto"

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    @property
    def with_residual(self) -> bool:
        """Whether it needs an argument that only the function with a residual has."""
        return self.residual != "none" or self.drop_mask != "none"

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The shape that its mask has in memory."""
        leading = self.leading if self.mask_leading is None else self.mask_leading
        sizes = {"...": leading, "L": (self.length,), "1": (1,)}
        return sum((sizes[axis] for axis in self.mask_axes.split()), ())

    @property
    def out_leading(self) -> tuple[int, ...]:
        """The dimensions of the output before [L, L, C]."""
        import torch

        return tuple(torch.broadcast_shapes(self.leading, self.mask_shape[:-2]))

    @property
    def features(self) -> frozenset[str]:
        """The features that an implementation must have to take part."""
        needed = {
            self.dtype: True,
            "D != C": self.hidden != self.channels,
            "linear biases": bool(self.biases),
            "no leading dimension": not self.leading,
            "several leading dimensions": len(self.leading) > 1,
            "x broadcast to the mask": self.out_leading != self.leading,
            "broadcast mask": self.mask_axes != "... L L",
            "absent norm weights": self.norms == "absent",
            "16-bit norm weights": self.norms in ("bfloat16", "float16"),
            "residual": self.with_residual,
            "result over the residual": self.residual == "overwritten",
            "precision": self.precision is not None,
            "fp16x3": self.precision == "fp16x3",
            "lengths": self.lengths is not None,
            "lean memory": self.memory == "lean",
        }
        return frozenset(feature for feature, wanted in needed.items() if wanted)


@dataclass(frozen=True)
class TransitionCase:
    """One call of the transition, in the words of a `Case`.

    rows: the dimensions of x before its channels; they end in L, L where there are lengths.
    residual: "none", "own", "pair" (x itself) or "overwritten" (the result is written over it).
    """

    name: str
    dtype: str = "bfloat16"
    channels: int = 64
    hidden: int = 160
    rows: tuple[int, ...] = (1, 33, 33)
    x: str = "trunk"
    scale: float = 1.0
    layout: str = "contiguous"
    weights: str = "trunk"
    norms: str = "float32"
    biases: tuple[str, ...] = ()
    residual: str = "pair"
    eps: float = EPS
    precision: str | None = None
    lengths: tuple[int, ...] | None = None
    lengths_dtype: str = "int64"

    mask_expanded = False

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, self.dtype)

    @property
    def leading(self) -> tuple[int, ...]:
        """The dimensions of x before [L, L, C]."""
        return self.rows[:-2]

    @property
    def length(self) -> int:
        """The last dimension but the channels: L, where there are lengths."""
        return self.rows[-1] if self.rows else 1

    @property
    def features(self) -> frozenset[str]:
        """The features that an implementation must have to take part."""
        needed = {
            self.dtype: True,
            "transition": True,
            "linear biases": bool(self.biases),
            "absent norm weights": self.norms == "absent",
            "16-bit norm weights": self.norms in ("bfloat16", "float16"),
            "result over the residual": self.residual == "overwritten",
            "precision": self.precision is not None,
            "lengths": self.lengths is not None,
        }
        return frozenset(feature for feature, wanted in needed.items() if wanted)


def _for_each(dtypes: str, name: str, **words: object) -> Iterator[Case]:
    """A case for each dtype, with both in its name."""
    for dtype in dtypes.split():
        yield Case(f"{name}, {dtype}", dtype, **words)


_ALL = "bfloat16 float16 float32"
_TWO = "bfloat16 float32"
_BFLOAT16 = "bfloat16"
_FLOAT32 = "float32"
_INCOMING = {"direction": "incoming"}

# Each width, dtype, mask dtype and absent argument needs a compilation. So most cases share these;
# a case that differs in one of them differs in little else.
CASES: tuple[Case, ...] = (
    *_for_each(_ALL, "direction: outgoing"),
    *_for_each(_ALL, "direction: incoming", **_INCOMING),
    # Tiny outputs come in large batches: the error of a few numbers is a matter of luck.
    *_for_each(_ALL, "L = 1, 32 sequences", length=1, leading=(32,)),
    *_for_each(_BFLOAT16, "L = 1, one sequence", length=1, channels=128, hidden=128),
    *_for_each(_FLOAT32, "L = 1, one sequence", length=1),
    *_for_each(_ALL, "L = 2", length=2, leading=(16,), mask="random", **_INCOMING),
    *_for_each(_BFLOAT16, "L = 31", length=31),
    *_for_each(_BFLOAT16, "L = 65", length=65, **_INCOMING),
    *_for_each(_FLOAT32, "L = 65", length=65),
    *_for_each(_BFLOAT16, "L = 127", length=127),
    *_for_each(_FLOAT32, "L = 127", length=127, **_INCOMING),
    *_for_each(_BFLOAT16, "C = D = 16, norms absent", channels=16, hidden=16, norms="absent"),
    *_for_each(
        _BFLOAT16, "C = D = 32, norms of the dtype of x", channels=32, hidden=32, norms="bfloat16",
        **_INCOMING,
    ),
    *_for_each(
        _BFLOAT16, "C = D = 48, channels first", channels=48, hidden=48, layout="channels first"
    ),
    *_for_each(_BFLOAT16, "C = D = 128", channels=128, hidden=128),
    *_for_each(_BFLOAT16, "C = D = 250", channels=250, hidden=250, **_INCOMING),
    *_for_each(_FLOAT32, "C = 77, D = 41", channels=77, hidden=41, **_INCOMING),
    *(
        case
        for name in BIASES
        for case in _for_each(_BFLOAT16, f"biases: {name} alone", biases=(name,))
    ),
    *_for_each(_BFLOAT16, "biases: all, C = 64, D = 32", hidden=32, biases=BIASES),
    *_for_each(
        _BFLOAT16, "biases: all, C = 64, D = 32, incoming", hidden=32, biases=BIASES, **_INCOMING
    ),
    *_for_each(_FLOAT32, "biases: all, C = 32, D = 64", channels=32, biases=BIASES),
    *_for_each(_TWO, "mask: none", mask="none"),
    *_for_each(_ALL, "mask: random", mask="random", leading=(2,)),
    *_for_each(_TWO, "mask: soft", mask="soft", leading=(2,)),
    *_for_each(_BFLOAT16, "mask: soft, dtype of x", mask="soft, dtype of x"),
    *_for_each(_BFLOAT16, "mask: integers", mask="integers", **_INCOMING),
    *_for_each(_ALL, "mask: all-masked rows", mask="masked rows"),
    *_for_each(_ALL, "mask: all-masked rows, incoming", mask="masked rows", **_INCOMING),
    *_for_each(_ALL, "mask: all zero", mask="all zero"),
    *_for_each(_BFLOAT16, "mask: all zero, float", mask="all zero, float", **_INCOMING),
    *_for_each(_TWO, "mask: [1, L, L]", mask="random", mask_axes="1 L L", leading=(2,)),
    *_for_each(_TWO, "mask: [L, L]", mask="random", mask_axes="L L", leading=(3,), **_INCOMING),
    *_for_each(
        _TWO, "mask: expanded, strides of 0", mask="random", mask_axes="... 1 L",
        mask_expanded=True, leading=(2,),
    ),
    *_for_each(_TWO, "leading: none", leading=()),
    *_for_each(_TWO, "leading: 2 x 3", leading=(2, 3), length=9, mask="random", **_INCOMING),
    *_for_each(
        _BFLOAT16, "leading: 2 x 1 x 3, mask [1, 1, 3, L, L]", leading=(2, 1, 3), length=9,
        mask="random", mask_axes="1 1 ... L L", mask_leading=(3,),
    ),
    *_for_each(
        _TWO, "leading: x 2 x 1 x 4, mask 3 x 1", leading=(2, 1, 4), length=8, mask="random",
        mask_leading=(3, 1),
    ),
    *(
        case
        for word in ("IEEE", "TF32", "TF32x3", "fp16x3", "bfloat16")
        for case in _for_each(_FLOAT32, f"precision: {word}", precision=word)
    ),
    *_for_each(_BFLOAT16, "precision: bfloat16", precision="bfloat16"),
    *_for_each(_ALL, "scale: 1e-3", scale=1e-3),
    *_for_each(_ALL, "scale: 0.03", scale=0.03, **_INCOMING),
    *_for_each(_ALL, "scale: 30", scale=30.0),
    *_for_each(_ALL, "scale: 1e3", scale=1e3, **_INCOMING),
    *_for_each(_ALL, "heavy tails: Cauchy", x="cauchy"),
    *_for_each(_ALL, "heavy tails: Cauchy, incoming", x="cauchy", **_INCOMING),
    # Where C is a power of two, the mean of equal numbers with few digits is exact anyway.
    *_for_each("float16", "constant rows: up to 3e4", x="constant rows"),
    *_for_each(
        _BFLOAT16, "constant rows: up to 3e4", x="constant rows", channels=250, hidden=250
    ),
    *_for_each(_FLOAT32, "constant rows: up to 3e4", x="constant rows", channels=77, hidden=41),
    *_for_each(_TWO, "constant rows: up to 3e38", x="huge constant rows", **_INCOMING),
    *_for_each(
        _BFLOAT16, "constant rows: up to 3e38, C = D = 128", x="huge constant rows", channels=128,
        hidden=128,
    ),
    *_for_each(
        _FLOAT32, "constant rows: up to 3e38, C = 77, D = 41", x="huge constant rows", channels=77,
        hidden=41,
    ),
    *_for_each(_ALL, "means: 25 deviations", x="means of 25 deviations"),
    *_for_each(_FLOAT32, "means: 1000 deviations", x="means of 1000 deviations", **_INCOMING),
    *_for_each(_TWO, "gates: open and shut", weights="wide gates"),
    *_for_each(_ALL, "norms: digits beyond bfloat16", weights="fine norms"),
    *_for_each(
        _BFLOAT16, "norms: of the dtype of x", norms="bfloat16", channels=32, hidden=32
    ),
    *_for_each(_BFLOAT16, "norms: absent", norms="absent", channels=16, hidden=16, **_INCOMING),
    *_for_each(_TWO, "eps: 0.1", eps=0.1),
    *_for_each(_TWO, "eps: 1e-8, scale 1e-3", eps=1e-8, scale=1e-3, **_INCOMING),
    *_for_each(_BFLOAT16, "residual: alone", residual="own", leading=(2,), **_INCOMING),
    *_for_each(_BFLOAT16, "residual: the pair itself", residual="pair"),
    *_for_each(_BFLOAT16, "residual: overwritten", residual="overwritten"),
    *_for_each(_BFLOAT16, "drop mask: bool, alone", drop_mask="bool", leading=(2,)),
    *_for_each(
        _BFLOAT16, "residual and drop mask", residual="own", drop_mask="[B, 1, L, C]", leading=(2,)
    ),
    *_for_each(
        _BFLOAT16, "residual and drop mask [B*L, C]", residual="own", drop_mask="[B*L, C]",
        leading=(2,), **_INCOMING,
    ),
    *_for_each(
        _BFLOAT16, "strides: channels first", layout="channels first", channels=48, hidden=48,
        leading=(2,),
    ),
    *_for_each(_BFLOAT16, "strides: residues swapped", layout="residues swapped"),
    *_for_each(_BFLOAT16, "strides: sliced channels", layout="sliced channels", **_INCOMING),
    *_for_each(
        _TWO, "strides: every second sequence", layout="every second sequence", leading=(2,)
    ),
    *_for_each(_BFLOAT16, "memory: lean", memory="lean"),
    *_for_each(_BFLOAT16, "memory: lean, residual", memory="lean", residual="own", **_INCOMING),
    *_for_each(
        _TWO, "lengths: 0, 1, some, L", lengths=(0, 1, 20, 33), leading=(4,), mask="none"
    ),
    *_for_each(
        _BFLOAT16, "lengths: past a tile, incoming", lengths=(64, 65), leading=(2,), length=66,
        mask="none", lengths_dtype="int32", **_INCOMING,
    ),
    *_for_each(
        _BFLOAT16, "lengths: with a soft mask", lengths=(33, 5), leading=(2,), mask="soft"
    ),
    *_for_each(
        _BFLOAT16, "lengths: with residual and drop mask", lengths=(17, 0), leading=(2,),
        mask="random", residual="own", drop_mask="[B, 1, L, C]", **_INCOMING,
    ),
    *_for_each(
        _BFLOAT16, "lengths: leading 2 x 3", lengths=(9, 0, 4, 1, 8, 9), leading=(2, 3), length=9,
        mask="none", lengths_dtype="int32",
    ),
    *_for_each(_BFLOAT16, "lengths: none leading", lengths=(20,), leading=(), mask="none"),
)  # fmt: skip


def _transitions(dtypes: str, name: str, **words: object) -> Iterator[TransitionCase]:
    for dtype in dtypes.split():
        yield TransitionCase(f"transition: {name}, {dtype}", dtype, **words)


TRANSITIONS: tuple[TransitionCase, ...] = (
    *_transitions(_ALL, "of pairs"),
    *_transitions(_ALL, "the update alone", residual="none"),
    *_transitions(_TWO, "another residual", residual="own", rows=(2, 33, 33)),
    *_transitions(_TWO, "over the residual", residual="overwritten"),
    *_transitions(_BFLOAT16, "C = 256, H = 1024", channels=256, hidden=1024, rows=(1, 20, 20)),
    *_transitions(_BFLOAT16, "C = 128, H = 512", channels=128, hidden=512),
    *_transitions(_TWO, "C = 77, H = 41", channels=77, hidden=41),
    *_transitions(_BFLOAT16, "C = 250, H = 1000", channels=250, hidden=1000, rows=(9, 31)),
    *_transitions(_FLOAT32, "one row", rows=()),
    *_transitions(_TWO, "2,049 rows", rows=(2049,)),
    *_transitions(_TWO, "leading dimensions 2 x 3", rows=(2, 3, 9, 9)),
    *_transitions(_BFLOAT16, "a rectangle", rows=(1, 65, 17)),
    *(
        case
        for name in TRANSITION_BIASES
        for case in _transitions(_BFLOAT16, f"biases: {name} alone", biases=(name,))
    ),
    *_transitions(_ALL, "biases: all", biases=TRANSITION_BIASES, residual="none"),
    *_transitions(_BFLOAT16, "norms: of the dtype of x", norms="bfloat16"),
    *_transitions(_TWO, "norms: absent", norms="absent"),
    *_transitions(_ALL, "norms: digits beyond bfloat16", weights="fine norms", residual="none"),
    *_transitions(_TWO, "gates: open and shut", weights="wide gates", residual="none"),
    *(
        case
        for word in ("IEEE", "TF32", "TF32x3", "fp16x3", "bfloat16")
        for case in _transitions(_FLOAT32, f"precision: {word}", precision=word, residual="none")
    ),
    *_transitions(_ALL, "scale: 1e-3", scale=1e-3, residual="none"),
    *_transitions(_ALL, "scale: 1e3", scale=1e3, residual="none"),
    *_transitions(_ALL, "heavy tails: Cauchy", x="cauchy", residual="none"),
    *_transitions(_ALL, "constant rows to 3e4", x="constant rows", residual="none"),
    *_transitions(_TWO, "constant rows: up to 3e38", x="huge constant rows", residual="none"),
    *_transitions(_TWO, "means: 25 deviations", x="means of 25 deviations", residual="none"),
    *_transitions(_FLOAT32, "means: 1000 deviations", x="means of 1000 deviations"),
    *_transitions(_TWO, "eps: 0.1", eps=0.1, residual="none"),
    *_transitions(_BFLOAT16, "strides: channels first", layout="channels first"),
    *_transitions(_BFLOAT16, "strides: residues swapped", layout="residues swapped"),
    *_transitions(_TWO, "strides: sliced channels", layout="sliced channels"),
    *_transitions(
        _TWO, "lengths: 0, 1, some, L", lengths=(0, 1, 20, 33), rows=(4, 33, 33), residual="none"
    ),
    *_transitions(
        _BFLOAT16, "lengths: over the residual", lengths=(17, 0), rows=(2, 33, 33),
        residual="overwritten", lengths_dtype="int32",
    ),
)  # fmt: skip
EVERY_CASE = (*CASES, *TRANSITIONS)
