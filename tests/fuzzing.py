"""Random calls of the two public functions: how they are drawn, made, computed and judged.

A `Case` is a call as plain values, and its repr is Python that makes it again. What its call must
give is the formula in float64; how far from that it may be is measured on the same numbers, with
the formula once more in float64 and a random error wherever plain PyTorch would round (`Rounding`).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from helpers import DTYPES, ERROR_BUDGET
from hypothesis import strategies as st
from test_validation import TriMulPrecision
from torch import Tensor

UPDATE = "triangle_multiplicative_update"
WITH_RESIDUAL = "triangle_multiplicative_update_with_residual"
NORMS = ("norm_in_weight", "norm_in_bias", "norm_out_weight", "norm_out_bias")
PROJECTIONS = ("p_in_weight", "g_in_weight", "p_out_weight", "g_out_weight")
BIASES = ("p_in_bias", "g_in_bias", "p_out_bias", "g_out_bias")
REAL_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, *DTYPES, torch.float64,
)  # fmt: skip
# The public spellings of each arithmetic of float32.
PRECISIONS = {
    "fp32": (
        None, "none", "IEEE", "ieee", "TF32x3", "tf32x3", TriMulPrecision.IEEE, -1, 2, 3,
    ),
    "tf32": ("TF32", "tf32", "default", TriMulPrecision.TF32, 0, 1),
    "bf16": ("bfloat16", "BF16", TriMulPrecision.BFLOAT16, 5),
}  # fmt: skip
# Relative L2 errors that are let pass without a look at the numbers, by docs/numerics.md: those of
# whole calls, twenty-five per cent more on a CPU whose bf16 GEMMs round before each gate.
NARROW_BUDGET = {"tf32": 2e-3, "bf16": 1e-2}
CPU_BF16 = 1.25
# Of gradients: four times those of the output, which in float32 is test_gradients.py's limit.
GRADIENTS = 4.0
# Random errors are drawn so many times. The error may be so much larger than the largest of them,
# and where chance decides it, as in a result of few numbers, by so much of their spread.
DRAWS = 5
FACTOR = 1.2
SPREAD_FACTOR = 3.0
# A pair of residues whose product differs from channel to channel by less than ten times its
# rounding has a norm without a digit that could be compared.
ILL_CONDITIONED = 0.1
# Beyond it float16 overflows, a little early as the values are not the kernels' own.
HALF_RANGE = 6e4
HALF_LEAST = 2.0**-25  # half of the least number of float16
FLOAT32_UNIT = 2.0**-21  # relative error of a float32 sum: eight roundings


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in memory; what no element of it lies in is NaN, or 99 or True."""

    order: tuple[int, ...]  # its axes, the outermost in memory first
    gap: int | None = None  # of this axis every other place is used
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
    """A call. What is not named in a mapping is None, or lies in memory as it is made."""

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

    @property
    def result_leading(self) -> torch.Size:
        """The leading dimensions of the result: those of x and mask together."""
        if self.function == WITH_RESIDUAL or self.mask is None or len(self.mask.shape) <= 2:
            return torch.Size(self.leading)
        return torch.broadcast_shapes(self.leading, self.mask.shape[:-2])

    @property
    def arithmetic(self) -> str:
        """What the kernels take float32 operands for: "fp32", "tf32" or "bf16"."""
        if self.dtype != torch.float32:
            return "fp32"
        same = [
            word
            for word, spellings in PRECISIONS.items()
            if any(type(self.precision) is type(s) and self.precision == s for s in spellings)
        ]
        return same[0]


@dataclass(frozen=True)
class Sizes:
    """What a path has time for."""

    lengths: tuple[int, ...]
    widths: tuple[tuple[int, int], ...] | None  # (C, D), or any up to `widest`
    widest: tuple[int, int]
    batch: int
    offsets: tuple[int, ...]  # in elements, of a tensor in its memory
    patterns: bool  # any pattern of absent parameters, rather than a few: each compiles anew
    gradients: int = 2  # one call in so many has them


ATEN = Sizes((*range(1, 25), *range(1, 25), 33, 40, 50), None, (48, 48), 6, tuple(range(8)), True)
INTERPRETER = Sizes((*range(1, 7), *range(1, 7), 9), None, (40, 6), 2, tuple(range(8)), True, 4)
GPU = Sizes(
    (1, 2, 5, 16, 17, 33, 64, 65, 100, 130), ((16, 16), (7, 3), (32, 48), (128, 128)), (128, 128),
    3, (0, 1), False,
)  # fmt: skip


@st.composite
def sometimes(draw, strategy: st.SearchStrategy, else_: object = None, one_in: int = 2):
    """A value of the strategy one time in so many."""
    return draw(strategy) if draw(st.integers(1, one_in)) == one_in else else_


def calls(sizes: Sizes) -> st.SearchStrategy[Case]:
    """Good calls of either function."""
    # Hypothesis makes most of its examples out of earlier ones by copying parts of them to other
    # places, but not within a collection of unique elements; so each call is drawn anew.
    return st.lists(_cases(sizes), min_size=1, max_size=1, unique_by=repr).map(lambda one: one[0])


@st.composite
def _cases(draw, sizes: Sizes) -> Case:
    function = draw(st.sampled_from((UPDATE, WITH_RESIDUAL)))
    dtype = draw(st.sampled_from(DTYPES))
    length = draw(st.sampled_from(sizes.lengths))
    channels, hidden = draw(_widths(sizes, length))
    mask_leading: tuple[int, ...] = ()
    if function == UPDATE:
        leading, mask_leading = draw(_broadcasting_leading(sizes.batch))
    else:
        leading = (draw(st.sampled_from((1, 1, 1, 1, 2, 2, 3, 0))),)
        if leading[0] > sizes.batch:
            leading = (1,)
        mask_leading = draw(_broadcastable(leading))
    needs_grad = draw(sometimes(st.just(True), False, sizes.gradients))
    names = NORMS + (BIASES if function == UPDATE else ())
    given = draw(_given(names, sizes.patterns))
    dtypes = st.sampled_from((torch.float32, torch.float32, torch.float32, dtype, *DTYPES))
    vectors = {name: draw(dtypes) for name in given}
    made: tuple[str, ...] = ()
    if function == UPDATE:
        made = draw(sometimes(st.sets(st.sampled_from(PROJECTIONS)).map(_in_order), (), 5))
    if {"p_in_weight", "g_in_weight", "p_out_weight"} <= set(made):
        hidden = channels
    inplace, residual, drop_mask = False, None, None
    if function == WITH_RESIDUAL:
        residual = draw(st.sampled_from((None, "tensor", "pair")))
        inplace = residual is not None and not needs_grad and draw(st.booleans())
        shape = draw(
            st.sampled_from(((*leading, 1, length, channels), (leading[0] * length, channels)))
        )
        drop_mask = draw(sometimes(_masks(shape)))
    mask = None
    if (function == UPDATE and mask_leading) or draw(st.booleans()):
        axes = (draw(st.sampled_from((length, length, 1))) for _ in range(2))
        shape = (*mask_leading, *axes)
        if not mask_leading:
            shape = shape[draw(st.sampled_from((0, 0, 1, 2))) :]
        mask = draw(_masks(shape))
    case = Case(
        function, dtype, leading, length, channels, hidden,
        direction=draw(st.sampled_from(("outgoing", "incoming"))),
        rows=draw(st.sampled_from(("plain", "plain", "large means", "some constant", "constant"))),
        vectors=vectors, made=made,
        bundled=not {"p_in_weight", "g_in_weight"} & set(made) and draw(st.booleans()),
        scales=draw(_scales(dtype, tuple(vectors))),
        mask=mask, residual=residual, drop_mask=drop_mask, lengths=None,
        eps=draw(st.sampled_from((1e-5, 1e-5, 1e-8, 1e-6, 1e-3, 1.0, 1))),
        eps_out=draw(sometimes(st.sampled_from((1e-8, 1e-5, 1e-2, 1.0))))
        if function == WITH_RESIDUAL else None,
        precision=draw(_precisions(dtype)),
        memory=draw(st.sampled_from(("default", "default", "lean", "auto"))),
        recompute=draw(st.sampled_from(("product", "all"))),
        inplace=inplace, needs_grad=(), layouts={}, seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip
    case = dataclasses.replace(case, lengths=draw(sometimes(_lengths(case), None, 3)))
    shapes = shapes_of(case)
    layouts = {}
    for name, shape in shapes.items():
        if case.bundled and name in ("p_in_weight", "g_in_weight"):
            continue
        kept = case.inplace and name in ("residual", "x" if residual == "pair" else "")
        layout = draw(sometimes(_layouts(len(shape), sizes.offsets, kept)))
        if layout is not None:
            layouts[name] = layout
    if case.lengths is not None and case.lengths.poisoned and "x" in layouts:
        layouts["x"] = dataclasses.replace(layouts["x"], shared=None)
    case = dataclasses.replace(case, layouts=layouts)
    if needs_grad:
        leaves = [name for name in shapes if _may_need_grad(case, name)]
        some = draw(st.sets(st.sampled_from(leaves), min_size=1))
        every = draw(sometimes(st.just(True), False))
        case = dataclasses.replace(case, needs_grad=tuple(leaves) if every else _in_order(some))
    return case


def _in_order(names: set[str]) -> tuple[str, ...]:
    return tuple(sorted(names))


@st.composite
def _widths(draw, sizes: Sizes, length: int) -> tuple[int, int]:
    if sizes.widths is not None:
        return draw(st.sampled_from(sizes.widths))
    of_c, of_d = (min(8, most) if length > 24 else most for most in sizes.widest)
    channels = draw(st.integers(1, of_c) | st.integers(min(5, of_c), of_c))
    if draw(st.booleans()):
        return min(channels, of_d), min(channels, of_d)
    return channels, draw(st.integers(1, of_d) | st.integers(min(5, of_d), of_d))


@st.composite
def _broadcasting_leading(draw, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of x and of the mask: their product is `batch` at most."""
    whole = draw(
        st.sampled_from(((), (), (1,), (2,), (3,), (1, 2), (2, 2), (2, 1, 3), (3, 2), (0,), (2, 0)))
    )
    if math.prod(whole) > batch:
        whole = ()
    return draw(_broadcastable(whole)), draw(_broadcastable(whole))


@st.composite
def _broadcastable(draw, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to this one; most often itself."""
    if draw(st.booleans()):
        return shape
    kept = shape[draw(st.integers(0, len(shape))) :]
    return tuple([draw(st.sampled_from((extent, 1))) for extent in kept])


@st.composite
def _given(draw, names: tuple[str, ...], patterns: bool) -> list[str]:
    if not patterns:
        return list(draw(st.sampled_from((names, NORMS, ()))))
    absent = draw(st.sets(st.sampled_from(names)))
    return [name for name in names if name not in absent]


@st.composite
def _masks(draw, shape: tuple[int, ...]) -> Mask:
    dtype = draw(st.sampled_from(REAL_DTYPES))
    kinds = ("padding", "random", "random", "zeros")
    if dtype.is_floating_point:
        kinds += ("soft", "soft", "signed")
    return Mask(shape, dtype, draw(st.sampled_from(kinds)))


@st.composite
def _scales(draw, dtype: torch.dtype, vectors: tuple[str, ...]) -> dict[str, float]:
    """Of x, the residual, the projections and the vectors, where it is not 1."""
    scales = {}
    if draw(st.booleans()):
        return scales
    for name in ("x", "residual", *PROJECTIONS, *vectors):
        scale = draw(sometimes(st.sampled_from((1e-3, 0.03, 30.0, 1e3)), 1.0, 3))
        if name in vectors or (dtype == torch.float16 and name == "p_in_weight"):
            scale = min(scale, 3.0)  # in float16 a product of larger ones would overflow
        if scale != 1.0:
            scales[name] = scale
    return scales


def _precisions(dtype: torch.dtype) -> st.SearchStrategy:
    words = [word for word in PRECISIONS if word != "bf16" or dtype != torch.float16]
    return st.sampled_from(words).flatmap(lambda word: st.sampled_from(PRECISIONS[word]))


@st.composite
def _lengths(draw, case: Case) -> Lengths:
    leading = tuple(case.result_leading)
    shape = draw(_broadcastable(leading))
    longest = case.length
    value = st.integers(0, longest) | st.sampled_from((0, longest, longest + 3, -1, 2**31 - 1))
    values = tuple([draw(value) for _ in range(math.prod(shape))])
    # In the padding the result is the residual, and a shared pair has no padding of its own.
    may_be_poisoned = case.leading == leading and case.residual != "pair"
    poisoned = may_be_poisoned and draw(st.booleans())
    return Lengths(values, shape, draw(st.sampled_from((torch.int32, torch.int64))), poisoned)


@st.composite
def _layouts(draw, ndim: int, offsets: tuple[int, ...], contiguous: bool) -> Layout:
    order, axes = tuple(range(ndim)), st.none()
    if ndim and not contiguous:
        axes = sometimes(st.integers(0, ndim - 1))
        order = draw(st.just(order) | st.permutations(order).map(tuple))
    return Layout(order, draw(axes), draw(axes), draw(st.sampled_from(offsets)))


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    """The tensors that are given, by the names of their arguments; x is `pair` of a function."""
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


def _may_need_grad(case: Case, name: str) -> bool:
    given = getattr(case, name) if name in ("mask", "drop_mask", "lengths") else None
    return name != "lengths" and (given is None or given.dtype.is_floating_point)


@dataclass
class Call:
    """A case with its tensors."""

    function: str
    arguments: dict[str, object]  # by the names of the function's arguments
    tensors: dict[str, Tensor]  # those given, by the names of `shapes_of`
    values: dict[str, Tensor]  # the same and the made projections on the CPU in float64
    buffers: dict[str, Tensor]  # the memory that each lies in


def make(case: Case, device: str, projection: Callable[..., Tensor]) -> Call:
    """The call on `device`; `projection(shape, dtype)` draws one of those that are None."""
    generator = torch.Generator().manual_seed(case.seed)
    shapes = shapes_of(case)
    values = {name: _values(case, name, shape, generator) for name, shape in shapes.items()}
    for name, layout in case.layouts.items():
        if layout.shared is not None:
            first = values[name][(slice(None),) * layout.shared + (slice(1),)]
            values[name] = first.expand(values[name].shape)
    if case.lengths is not None and case.lengths.poisoned:
        within = pairs_within(values["lengths"].expand(case.result_leading), case.length)
        values["x"] = torch.where(within[..., None], values["x"], torch.nan)
    tensors, buffers = {}, {}
    for name, value in values.items():
        tensors[name], buffers[name] = place(value, case.layouts.get(name), device)
    if case.bundled:
        both = torch.cat([values["g_in_weight"], values["p_in_weight"]]).to(device)
        tensors["g_in_weight"], tensors["p_in_weight"] = both.chunk(2)
        buffers["g_in_weight"] = buffers["p_in_weight"] = both
    arguments = dict.fromkeys((*NORMS, *PROJECTIONS)) | tensors
    arguments |= {
        "direction": case.direction, "eps": case.eps, "precision": case.precision,
        "memory": case.memory, "recompute": case.recompute,
    }  # fmt: skip
    if case.function == WITH_RESIDUAL:
        residual = tensors["x"] if case.residual == "pair" else tensors.get("residual")
        arguments["pair"] = arguments.pop("x")
        arguments |= {"residual": residual, "drop_mask": tensors.get("drop_mask")}
        arguments |= {"eps_out": case.eps_out, "inplace": case.inplace}
    if case.made:
        torch.manual_seed(case.seed)
        wanted = dict(zip(PROJECTIONS, _projection_shapes(case), strict=True))
        made = (name for name in PROJECTIONS if name in case.made)
        values |= {name: projection(wanted[name], case.dtype, device) for name in made}
        torch.manual_seed(case.seed)
    wide = {name: value.detach().cpu().double() for name, value in values.items()}
    wide["x"] = wide["x"].nan_to_num(0.0)
    return Call(case.function, arguments, tensors, wide, buffers)


def _projection_shapes(case: Case) -> tuple[tuple[int, int], ...]:
    inner = (2 * case.hidden, case.channels)
    return inner, inner, (case.channels, case.hidden), (case.channels, case.channels)


def lecun(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    """A projection as docs/cuequivariance.md says that one is made: see `make`."""
    within = math.erf(2**0.5)  # the share of a normal distribution within two deviations
    drawn = torch.rand(shape, dtype=torch.float32, device=device)
    normal = torch.erfinv((2 * drawn - 1) * within) * 2**0.5
    return (normal * (shape[1] ** -0.5 / 0.87962566103423978)).to(dtype)


def _values(
    case: Case, name: str, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "lengths":
        return torch.tensor(case.lengths.values, dtype=case.lengths.dtype).reshape(shape)
    if name in ("mask", "drop_mask"):
        return _mask_values(getattr(case, name), generator)
    scale = case.scales.get(name, 1.0)
    if name in NORMS or name in BIASES:
        value = 1 + 0.2 * randn(*shape) if name.endswith("weight") else 0.3 * randn(*shape)
        return _between(value * scale, case.dtype).to(case.vectors[name])
    if name in PROJECTIONS:
        return (randn(*shape) * (scale * shape[1] ** -0.5)).to(case.dtype)
    value = (1.5 * randn(*shape) + 0.3) * scale
    if name == "x":
        means = 100 * scale * randn(*shape[:-1], 1)
        if case.rows == "large means":
            value = value + means
        elif case.rows == "some constant":
            value = torch.where(randn(*shape[:-1], 1) > 0.5, means, value)
        elif case.rows == "constant":
            value = means.expand(shape)
    if case.dtype == torch.float16:
        value = value.clamp(-3e4, 3e4)
    return value.to(case.dtype)


def _between(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers like these that rounding to 16 bits would change most, and all towards zero."""
    if dtype == torch.float32:
        return value
    unit = torch.finfo(dtype).eps * torch.exp2(torch.frexp(value).exponent - 1)
    return value.to(dtype) + 0.45 * unit * value.sign()


def _mask_values(mask: Mask, generator: torch.Generator) -> Tensor:
    if mask.kind == "soft":
        value = torch.rand(mask.shape, generator=generator)
    elif mask.kind == "signed":
        value = 3 * torch.rand(mask.shape, generator=generator) - 1
    elif mask.kind == "zeros":
        value = torch.zeros(mask.shape)
    elif mask.kind == "random":
        most = 2 if mask.dtype == torch.bool else 3
        value = torch.randint(most, mask.shape, generator=generator)
    else:
        value = torch.ones(mask.shape)
        for axis in range(-min(2, len(mask.shape)), 0):
            extent = mask.shape[axis]
            value.narrow(axis, extent - extent // 3, extent // 3).zero_()
    return value.to(mask.dtype)


def place(value: Tensor, layout: Layout | None, device: str) -> tuple[Tensor, Tensor]:
    """The value where the layout says, and the memory around it."""
    if layout is None:
        layout = Layout(tuple(range(value.ndim)))
    shape = list(value.shape)
    if layout.shared is not None:
        shape[layout.shared] = min(1, shape[layout.shared])
    steps = [2 if axis == layout.gap else 1 for axis in range(value.ndim)]
    extents = [shape[axis] * steps[axis] for axis in layout.order]
    filler = math.nan if value.is_floating_point() else 99
    size = math.prod(extents)
    buffer = torch.full((layout.offset + size + 8,), filler).to(device, value.dtype)
    whole = buffer[layout.offset : layout.offset + size].view(extents)
    inverse = sorted(range(value.ndim), key=layout.order.__getitem__)
    view = whole.permute(inverse)[tuple([slice(None, None, step) for step in steps])]
    view.copy_(value[tuple([slice(extent) for extent in shape])])
    return view.expand(value.shape), buffer


def pairs_within(lengths: Tensor, length: int) -> Tensor:
    """[..., L, L] bool: where both residues of a pair are within the sequence."""
    residues = torch.arange(length) < lengths[..., None]
    return residues[..., :, None] & residues[..., None, :]


class Rounding:
    """Random errors such as plain PyTorch makes in a dtype, in values and in their gradients.

    Stored values, and their gradients, have relative errors up to `unit`; where that is less than
    the dtype can hold (a subnormal that may be flushed, or in float16 half of the least one), up to
    that. Norms and sigmoids are in float32, whose errors stand out where terms cancel.
    """

    def __init__(self, dtype: torch.dtype, unit: float, seed: int) -> None:
        self.dtype, self.unit = dtype, unit
        self.least = HALF_LEAST if dtype == torch.float16 else torch.finfo(dtype).tiny
        self.gates_least = HALF_LEAST if dtype.itemsize == 2 else self.least
        self.float32 = FLOAT32_UNIT
        self._largest = 0.0
        self._others: dict[torch.dtype, Rounding] = {}
        self._seed, self._random = seed, random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, value: Tensor) -> Tensor:
        return _Rounded.apply(value, self, self.least)

    def sums(self, value: Tensor) -> Tensor:
        """Results of float32 sums as they are stored.

        Equal ones may have been summed in different orders, and then are not alike.
        """
        noise = 2 * torch.rand(value.shape, generator=self._generator, dtype=value.dtype) - 1
        return self(value) + self.float32 * value.detach().abs() * noise

    def gate(self, value: Tensor) -> Tensor:
        """The output's gate, which the kernels hold as float16 where the dtype has 16 bits."""
        return _Rounded.apply(value, self, self.gates_least)

    def of(self, value: Tensor, least: float) -> Tensor:
        """The value with an error."""
        self._see(value)
        size = (self.unit * value.abs()).clamp_min(least)
        return value + self.error(value, torch.where(value == 0, 0.0, size))

    def _see(self, value: Tensor) -> None:
        if value.numel():
            self._largest = max(self._largest, float(value.abs().max()))

    def to(self, dtype: torch.dtype) -> Rounding | Exact:
        """Random errors of one rounding to nearest in a leaf's own dtype."""
        if not dtype.is_floating_point:
            return Exact()
        if dtype not in self._others:
            self._others[dtype] = Rounding(dtype, torch.finfo(dtype).eps / 2, self._seed)
        return self._others[dtype]

    @property
    def overflows(self) -> bool:
        """Whether a value was beyond the range of float16, if that is the dtype."""
        own = self.dtype == torch.float16 and self._largest > HALF_RANGE
        return own or any(other.overflows for other in self._others.values())

    def error(self, value: Tensor, size: Tensor) -> Tensor:
        """Errors of up to these sizes; where values are alike they are alike, as roundings are."""
        spread = 1e6 * (1 + self._random.random())
        return size * (2 * (torch.frexp(value).mantissa * spread).frac().abs() - 1)


class Exact:
    """No errors, in any dtype."""

    unit = float32 = 0.0

    def __call__(self, value: Tensor) -> Tensor:
        return value

    gate = sums = __call__

    def to(self, dtype: torch.dtype) -> Exact:
        return self

    def error(self, value: Tensor, size: Tensor) -> Tensor:
        return torch.zeros_like(size)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, rounding: Rounding, least: float) -> Tensor:
        ctx.rounding = rounding
        return rounding.of(value, least)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rounding.of(grad, ctx.rounding.least), None, None


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, rounding: Rounding | Exact) -> Tensor:
        ctx.rounding = rounding
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rounding(grad), None


class _Normalised(torch.autograd.Function):
    """LayerNorm without parameters; the means have errors of a float32 sum."""

    @staticmethod
    def forward(
        ctx, value: Tensor, eps: float, rounding: Rounding | Exact, rounds_behind: bool
    ) -> Tensor:
        def mean(terms: Tensor) -> Tensor:
            mean = terms.mean(-1, keepdim=True)
            size = rounding.float32 * terms.abs().mean(-1, keepdim=True)
            return mean + rounding.error(mean, size)

        # A norm does not see a shift, and nothing is left of a constant row that could be rounded.
        centred = value - value[..., :1]
        centred = centred - mean(centred)
        rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        out = centred * rstd
        # The mean behind it may be one of the values as they were rounded for the next product.
        ctx.save_for_backward(out, rounding(out) if rounds_behind else out, rstd)
        ctx.mean = mean
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out, rounded, rstd = ctx.saved_tensors
        return rstd * (grad - ctx.mean(grad) - out * ctx.mean(grad * rounded)), None, None, None


class _Sigmoid(torch.autograd.Function):
    """The derivative s (1 - s) is that of a rounded s."""

    @staticmethod
    def forward(ctx, value: Tensor, rounding: Rounding | Exact) -> Tensor:
        out = torch.sigmoid(value)
        out = out + rounding.error(out, rounding.float32 * out)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return grad * out * (1 - out), None


def formula(
    case: Case, values: dict[str, Tensor], rounding: Rounding | Exact, weights: Rounding | Exact
) -> tuple[Tensor, Tensor]:
    """The result and t [..., L, L, D] in the values' dtype; `weights` rounds the matrices."""
    x, v, within = values["x"], values.get, None
    projections = {name: weights(values[name]) for name in PROJECTIONS}

    def linear(value: Tensor, kind: str) -> Tensor:
        return rounding.sums(F.linear(value, projections[f"{kind}_weight"], v(f"{kind}_bias")))

    def layer_norm(value: Tensor, kind: str, eps: float) -> Tensor:
        value = _Normalised.apply(value, eps, rounding, kind == "norm_out")
        weight, bias = v(f"{kind}_weight"), v(f"{kind}_bias")
        value = value if weight is None else value * weight
        return rounding(value if bias is None else value + bias)

    z = layer_norm(x, "norm_in", case.eps)
    ab = linear(z, "p_in") * _Sigmoid.apply(linear(z, "g_in"), rounding)
    if "mask" in values:
        # Autograd sums a shared mask's gradient over pairs that each have theirs in its dtype.
        mask = v("mask").expand(*case.result_leading, *x.shape[-3:-1])
        ab = ab * _RoundedGradient.apply(mask, rounding.to(case.mask.dtype)).unsqueeze(-1)
    if case.lengths is not None:
        lengths = v("lengths").expand(case.result_leading)
        within = pairs_within(lengths, case.length).unsqueeze(-1)
        ab = ab * within
    a, b = rounding(ab).chunk(2, dim=-1)
    if case.direction == "outgoing":
        t = torch.einsum("...ikd,...jkd->...ijd", a, b)
    else:
        t = torch.einsum("...kid,...kjd->...ijd", a, b)
    t = rounding.sums(t)
    mixed = layer_norm(t, "norm_out", case.eps if case.eps_out is None else case.eps_out)
    gate = rounding.gate(_Sigmoid.apply(linear(z, "g_out"), rounding))
    delta = linear(mixed, "p_out") * gate
    if "drop_mask" in values:
        delta = delta * v("drop_mask").reshape(-1 if x.numel() else 0, 1, *x.shape[-2:])
    if within is not None:
        delta = torch.where(within, delta, 0.0)
    if case.residual is not None:
        delta = (x if case.residual == "pair" else values["residual"]) + delta
    return rounding(delta), t


@dataclass
class Oracle:
    """What a case must give, and how far off the formula with random errors is."""

    out: Tensor
    drawn: list[Tensor]  # the same with random errors
    well: Tensor  # [..., L, L, 1]: the pairs whose norm of the product has digits to compare
    padding: Tensor | None  # [..., L, L, 1]: the pairs with a residue beyond a length
    budget: float  # a relative L2 error that is good enough
    as_rounded: dict[str, Tensor]  # results of norms' parameters rounded to the pair's dtype
    roundings: list[Rounding]
    graphs: list[tuple[Tensor, list[Tensor]]]  # results and leaves: exact, and with random errors

    @property
    def overflows(self) -> bool:
        return any(rounding.overflows for rounding in self.roundings)


def oracle(case: Case, values: dict[str, Tensor], on_triton: bool, on_gpu: bool) -> Oracle:
    arithmetic = case.arithmetic if on_triton else "fp32"
    if arithmetic == "tf32" and not on_gpu:
        arithmetic = "fp32"
    budget = NARROW_BUDGET.get(arithmetic, ERROR_BUDGET[case.dtype])
    if case.dtype == torch.bfloat16 and not on_triton:
        budget *= CPU_BF16
    own = FLOAT32_UNIT if case.dtype == torch.float32 else torch.finfo(case.dtype).eps / 2
    narrow = {"fp32": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}[arithmetic]
    roundings = [Rounding(case.dtype, max(own, narrow), case.seed + n) for n in range(DRAWS)]

    def evaluate(rounding: Rounding | Exact, **others: Tensor) -> tuple[Tensor, Tensor, list]:
        given = {name: value.clone() for name, value in (values | others).items()}
        leaves = [given[name].requires_grad_() for name in case.needs_grad]
        weights = Rounding(case.dtype, narrow, case.seed)
        narrowed = narrow and isinstance(rounding, Rounding)
        with torch.set_grad_enabled(bool(leaves)):
            out, t = formula(case, given, rounding, weights if narrowed else Exact())
        return out, t.detach(), leaves

    out, t, leaves = evaluate(Exact())
    graphs = [(out, leaves)]
    eps_out = case.eps if case.eps_out is None else case.eps_out
    spread = ((t - t.mean(-1, keepdim=True)).square().mean(-1) + eps_out).sqrt()
    apart = roundings[0].unit * t.square().mean(-1).sqrt()  # where equal channels are not alike
    well = apart <= ILL_CONDITIONED * spread
    for rounding in roundings:
        some_out, some_t, some_leaves = evaluate(rounding)
        off = some_t - t
        off = (off - off.mean(-1, keepdim=True)).square().mean(-1).sqrt()
        well &= off <= ILL_CONDITIONED * spread
        graphs.append((some_out, some_leaves))
    as_rounded = {}
    for name in NORMS if _has_errors_that_differ(case) else ():
        rounded = values[name].to(case.dtype).double() if name in values else None
        if rounded is not None and not torch.equal(rounded, values[name]):
            as_rounded[name] = evaluate(Exact(), **{name: rounded})[0].detach()
    padding = None
    if case.lengths is not None:
        lengths = values["lengths"].expand(case.result_leading)
        padding = ~pairs_within(lengths, case.length).unsqueeze(-1)
    drawn = [some_out.detach() for some_out, _ in graphs[1:]]
    return Oracle(
        out.detach(), drawn, well.unsqueeze(-1), padding, budget, as_rounded, roundings, graphs
    )


def _has_errors_that_differ(case: Case) -> bool:
    """Whether the errors of all pairs are different ones, so that their average says something."""
    shared = "x" in case.layouts and case.layouts["x"].shared is not None
    ordinary = case.rows in ("plain", "large means") and not case.scales
    ordinary = ordinary and case.eps < 1 and case.channels >= 8
    return case.dtype != torch.float32 and ordinary and not shared


def gradients(
    case: Case, found: Oracle, grad_out: Tensor, dtypes: list[torch.dtype]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Those of the leaves that need one, exact and with random errors; `dtypes` are theirs."""
    wanted, *drawn = (
        torch.autograd.grad(out, leaves, grad_out, allow_unused=True, materialize_grads=True)
        for out, leaves in found.graphs
    )
    drawn = [
        [rounding.to(dtype)(grad) for dtype, grad in zip(dtypes, grads, strict=True)]
        for rounding, grads in zip(found.roundings, drawn, strict=True)
    ]
    return list(wanted), drawn


def ratio(got: Tensor, wanted: Tensor, drawn: list[Tensor], budget: float) -> float:
    """The L2 error in units of what is allowed; not finite if `got` is not."""
    error = float((got.detach().cpu().double() - wanted).norm())
    sizes = [float((some - wanted).norm()) for some in drawn]
    by_rounding = FACTOR * max(sizes) + SPREAD_FACTOR * (max(sizes) - min(sizes))
    allowed = max(budget * float(wanted.norm()), by_rounding)
    return 0.0 if error == 0 else error / allowed if allowed else math.inf


def share_of_rounding(got: Tensor, found: Oracle, name: str) -> float:
    """How much of the step from `out` to `as_rounded` is in `got`: 0 none, 1 all of it.

    0 as well where random errors alone could look like a good part of it.
    """
    step = torch.where(found.well, found.as_rounded[name] - found.out, 0.0)
    length = float(step.square().sum())
    by_chance = max(abs(float(((some - found.out) * step).sum())) for some in found.drawn)
    if 2 * by_chance >= 0.4 * length:
        return 0.0
    return float(((got - found.out) * step).sum()) / length
