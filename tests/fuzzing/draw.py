"""How calls are drawn."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from helpers import DTYPES
from hypothesis import strategies as st

from .case import (
    BIASES,
    NORMS,
    PRECISIONS,
    PROJECTIONS,
    TRANSITION_BIASES,
    TRANSITION_NORMS,
    TRANSITION_PROJECTIONS,
    UPDATE,
    WITH_RESIDUAL,
    Case,
    Layout,
    Lengths,
    Mask,
    TransitionCase,
    shapes_of,
)

REAL_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, *DTYPES, torch.float64,
)  # fmt: skip
# Projections whose results are multiplied by each other.
_MULTIPLIED = ("p_in_weight", "gate_weight", "up_weight")


@dataclass(frozen=True)
class Sizes:
    """The sizes that a path has time for."""

    lengths: tuple[int, ...]
    widths: tuple[tuple[int, int], ...] | None  # (C, D), or any up to `widest`
    widest: tuple[int, int]
    batch: int
    offsets: tuple[int, ...]  # in elements, of a tensor in its memory
    patterns: bool  # any pattern of absent parameters, not just a few: each compiles anew
    gradients: int = 2  # one call in this many has them


ATEN = Sizes((*range(1, 25), *range(1, 25), 33, 40, 50), None, (48, 48), 6, tuple(range(8)), True)
INTERPRETER = Sizes((*range(1, 7), *range(1, 7), 9), None, (40, 6), 2, tuple(range(8)), True, 4)
GPU = Sizes(
    (1, 2, 5, 16, 17, 33, 64, 65, 100, 130), ((16, 16), (7, 3), (32, 48), (128, 128)), (128, 128),
    3, (0, 1), False,
)  # fmt: skip


@st.composite
def sometimes(draw, strategy: st.SearchStrategy, else_: object = None, one_in: int = 2):
    """A value of the strategy once in `one_in` draws, else `else_`."""
    return draw(strategy) if draw(st.integers(1, one_in)) == one_in else else_


def calls(sizes: Sizes, transitions: bool = True) -> st.SearchStrategy[Case | TransitionCase]:
    """Good calls of any function; one in three is a transition."""
    cases = _cases(sizes)
    if transitions:
        cases = st.sampled_from((cases, cases, _transitions(sizes))).flatmap(lambda of: of)
    # Hypothesis makes most of its examples out of earlier ones by copying parts of them to other
    # places, but not within a collection of unique elements; so each call is drawn anew.
    return st.lists(cases, min_size=1, max_size=1, unique_by=repr).map(lambda one: one[0])


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
    given = draw(_given(names, sizes.patterns, (names, NORMS, ())))
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
        shape = (*mask_leading, length, length)
        mask = draw(_masks(shape))
    case = Case(
        function, dtype, leading, length, channels, hidden,
        direction=draw(st.sampled_from(("outgoing", "incoming"))),
        rows=draw(st.sampled_from(("plain", "plain", "large means", "some constant", "constant"))),
        vectors=vectors, made=made,
        bundled=not {"p_in_weight", "g_in_weight"} & set(made) and draw(st.booleans()),
        scales=draw(_scales(dtype, tuple(vectors), PROJECTIONS)),
        mask=mask, residual=residual, drop_mask=drop_mask, lengths=None,
        eps=draw(st.sampled_from((1e-5, 1e-5, 1e-8, 1e-6, 1e-3, 1.0, 1))),
        eps_out=draw(sometimes(st.sampled_from((1e-8, 1e-5, 1e-2, 1.0))))
        if function == WITH_RESIDUAL else None,
        precision=draw(_precisions(dtype)),
        memory=draw(st.sampled_from(("default", "default", "lean", "auto"))),
        recompute=draw(st.sampled_from(("none", "product", "all"))),
        inplace=inplace, needs_grad=(), layouts={}, seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip
    case = dataclasses.replace(case, lengths=draw(sometimes(_lengths(case), None, 3)))
    return draw(_laid_out(case, sizes, needs_grad))


@st.composite
def _transitions(draw, sizes: Sizes) -> TransitionCase:
    dtype, length = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(sizes.lengths))
    channels, hidden = draw(_widths(sizes, length))
    square = draw(st.booleans())
    other = length if square else draw(st.sampled_from(sizes.lengths))
    batch = draw(st.sampled_from(((), (), (1,), (2,), (3,), (1, 2), (2, 2), (0,), (2, 0))))
    if math.prod(batch) > sizes.batch:
        batch = ()
    rows_of = (*batch, length, other)
    if not square:  # fewer axes, too
        rows_of = rows_of[draw(st.integers(0, len(rows_of))) :]
    needs_grad = draw(sometimes(st.just(True), False, sizes.gradients))
    names = TRANSITION_NORMS + TRANSITION_BIASES
    few = (names, TRANSITION_NORMS, ())
    given = draw(_given(names, sizes.patterns, few))
    dtypes = st.sampled_from((torch.float32, torch.float32, torch.float32, dtype, *DTYPES))
    vectors = {name: draw(dtypes) for name in given}
    residual = draw(st.sampled_from((None, "tensor", "pair")))
    case = TransitionCase(
        dtype, rows_of, channels, hidden,
        rows=draw(st.sampled_from(("plain", "plain", "large means", "some constant", "constant"))),
        vectors=vectors, bundled=draw(st.booleans()),
        scales=draw(_scales(dtype, tuple(vectors), TRANSITION_PROJECTIONS)),
        residual=residual, lengths=None,
        eps=draw(st.sampled_from((1e-5, 1e-5, 1e-8, 1e-6, 1e-3, 1.0, 1))),
        precision=draw(_precisions(dtype)),
        inplace=residual is not None and not needs_grad and draw(st.booleans()),
        needs_grad=(), layouts={}, seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip
    if square:
        case = dataclasses.replace(case, lengths=draw(sometimes(_lengths(case))))
    return draw(_laid_out(case, sizes, needs_grad))


@st.composite
def _laid_out(draw, case: Case | TransitionCase, sizes: Sizes, needs_grad: bool):
    """The case with layouts of its tensors, and with the leaves that need a gradient."""
    shapes = shapes_of(case)
    layouts = {}
    for name, shape in shapes.items():
        if case.bundled and name in case.halves:
            continue
        kept = case.inplace and name in ("residual", "x" if case.residual == "pair" else "")
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
    """Leading dimensions of x and of the mask; their product is at most `batch`."""
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
def _given(
    draw, names: tuple[str, ...], patterns: bool, few: tuple[tuple[str, ...], ...]
) -> list[str]:
    """Some of the names, or one of the `few` patterns."""
    if not patterns:
        return list(draw(st.sampled_from(few)))
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
def _scales(
    draw, dtype: torch.dtype, vectors: tuple[str, ...], projections: tuple[str, ...]
) -> dict[str, float]:
    """Scales other than 1, of x, the residual, the projections and the vectors."""
    scales = {}
    if draw(st.booleans()):
        return scales
    for name in ("x", "residual", *projections, *vectors):
        scale = draw(sometimes(st.sampled_from((1e-3, 0.03, 30.0, 1e3)), 1.0, 3))
        if name in vectors or (dtype == torch.float16 and name in _MULTIPLIED):
            scale = min(scale, 3.0)  # in float16 a product of larger ones would overflow
        if scale != 1.0:
            scales[name] = scale
    return scales


def _precisions(dtype: torch.dtype) -> st.SearchStrategy:
    words = [word for word in PRECISIONS if word != "bf16" or dtype != torch.float16]
    return st.sampled_from(words).flatmap(lambda word: st.sampled_from(PRECISIONS[word]))


@st.composite
def _lengths(draw, case: Case | TransitionCase) -> Lengths:
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


def _may_need_grad(case: Case | TransitionCase, name: str) -> bool:
    given = getattr(case, name) if name in ("mask", "drop_mask", "lengths") else None
    return name != "lengths" and (given is None or given.dtype.is_floating_point)
