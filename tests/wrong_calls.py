"""Calls with one or two wrong arguments: every argument of the public functions, in every way.

A wrong argument is known by its name in a function's table, such as "p_in_weight: one more in axis
0": see `table_of`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cuequivariance_enums import Mxfp8
from fuzzing import (
    BIASES,
    NORMS,
    PROJECTIONS,
    TRANSITION,
    TRANSITION_BIASES,
    TRANSITION_NORMS,
    TRANSITION_PROJECTIONS,
    UPDATE,
    WITH_RESIDUAL,
)
from helpers import DTYPES
from hypothesis import strategies as st
from torch import Tensor

B, L, C, D, H = 2, 3, 4, 5, 6
TOO_LONG = 46_337
Arguments = dict[str, Any]
PAIR = (B, L, L, C)
SHAPES = {
    "norm_in_weight": (C,),
    "norm_in_bias": (C,),
    "p_in_weight": (2 * D, C),
    "p_in_bias": (2 * D,),
    "g_in_weight": (2 * D, C),
    "g_in_bias": (2 * D,),
    "norm_out_weight": (D,),
    "norm_out_bias": (D,),
    "p_out_weight": (C, D),
    "p_out_bias": (C,),
    "g_out_weight": (C, C),
    "g_out_bias": (C,),
    "residual": PAIR,
    "drop_mask": (B, 1, L, C),
    "mask": (B, L, L),
    "lengths": (B,),
}
TRANSITION_SHAPES = {
    "norm_weight": (C,),
    "norm_bias": (C,),
    "gate_weight": (H, C),
    "gate_bias": (H,),
    "up_weight": (H, C),
    "up_bias": (H,),
    "down_weight": (C, H),
    "down_bias": (C,),
    "residual": PAIR,
    "lengths": (B,),
}
OF_RESIDUAL = ("residual", "drop_mask", "eps_out", "inplace")


@dataclass(frozen=True)
class Wrong:
    """The value that replaces a good argument."""

    names: tuple[str, ...]  # of the arguments that the message may name
    value: Callable[[Arguments], Any]  # of the good arguments
    function: str | None = None  # for this function alone
    others: Callable[[Arguments], Arguments] = lambda arguments: {}  # that it needs beside it


@dataclass(frozen=True)
class WrongCall:
    function: str
    dtype: torch.dtype
    given: tuple[str, ...]  # of the arguments that may be absent
    with_grad: bool
    wrong: tuple[str, ...]  # keys of the function's table


def _ones(*shape: int, dtype: torch.dtype | None = None) -> Callable[[Arguments], Tensor]:
    """In the pair's dtype unless another is given; the pair is x of a transition."""
    return lambda arguments: torch.ones(shape, dtype=dtype or arguments["pair"].dtype)


def _with_p_in_weight(arguments: Arguments) -> Arguments:
    return {"p_in_weight": good("p_in_weight", arguments["pair"].dtype)}


def _constant(value: object) -> Callable[[Arguments], object]:
    return lambda arguments: value


def _to(name: str, target: object) -> Callable[[Arguments], Tensor]:
    """A good value in another dtype or on another device."""
    return lambda arguments: good(name, arguments["pair"].dtype).to(target)


def _wrong_shapes(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {"an axis more at the end": (*shape, 2), "an axis of 0": (0, *shape[1:])}
    for axis, extent in enumerate(shape):
        # One row more of p_in_weight is half a channel; two would make the others wrong.
        shapes[f"one more in axis {axis}"] = (*shape[:axis], extent + 1, *shape[axis + 1 :])
    if name not in ("mask", "lengths"):
        shapes |= {"an axis more": (1, *shape), "an axis less": shape[1:], "no axis": ()}
    if len(set(shape)) > 1 and name != "mask":
        shapes["turned"] = shape[::-1]
    return shapes


_NO_EPS = (
    0, 0.0, -1e-9, -1, math.nan, math.inf, -math.inf, True, "1e-5", 1e-5j, 10**400, 1e-60,
    torch.tensor(1e-5), np.ones(2), [1e-5],
)  # fmt: skip


def _shown(number: object) -> str:
    return "10**400" if isinstance(number, int) and number > 1 else repr(number)


def _add_tensors(
    add: Callable, shapes: dict[str, tuple[int, ...]], others: dict[str, Callable]
) -> None:
    """Wrong shapes, types, devices and dtypes; `others` are what a wrong shape needs beside it."""
    for name, shape in shapes.items():
        options = {"others": others[name]} if name in others else {}
        dtype = torch.int32 if name == "lengths" else None
        for how, wrong in _wrong_shapes(name, shape).items():
            add(name, how, _ones(*wrong, dtype=dtype), **options)
    for name in ("pair", *shapes):
        add(name, "a list", _constant([1.0]))
        add(name, "a number", _constant(0.5))
        add(name, "an array", _constant(np.ones(shapes.get(name, PAIR), np.float32)))
        add(name, "a word", _constant("ones"))
        if name != "pair":  # else it is the others that are elsewhere
            add(name, "on another device", _to(name, "meta"))
        add(name, "complex", _to(name, torch.complex64))
        if name not in ("mask", "drop_mask", "lengths"):
            for dtype in (torch.float64, torch.int32, torch.bool):
                add(name, str(dtype), _to(name, dtype))
    for dtype in (torch.float32, torch.bool, torch.int16):
        add("lengths", str(dtype), _to("lengths", dtype))


def _add_settings(add: Callable, projections: tuple[str, ...], leaf: str) -> Callable:
    """Wrong precision, eps and inplace, and a function that adds more of inplace.

    A gradient is needed for `leaf`.
    """
    for word in ("highest", "", True, 4, 6, 1.0, b"IEEE", torch.float32, [3], Mxfp8.MXFP8):
        add("precision", repr(word), _constant(word))
    add(
        "precision", "bfloat16 of float16", _constant("bfloat16"),
        others=lambda a: {
            name: value.half() for name, value in a.items()
            if isinstance(value, Tensor) and name in ("pair", "residual", *projections)
        },
    )  # fmt: skip
    for number in (*_NO_EPS, None):
        add("eps", _shown(number), _constant(number))
    for value in (1, 0, None, "yes", torch.tensor(True)):
        add("inplace", repr(value), _constant(value))
    add(
        "inplace", "without a residual", _constant(True), names=("inplace", "residual"),
        others=lambda a: {"residual": None},
    )  # fmt: skip
    add(
        "inplace", "with a gradient", _constant(True),
        others=lambda a: {
            "residual": torch.ones(PAIR, dtype=a["pair"].dtype),
            leaf: good(leaf, a["pair"].dtype).requires_grad_(),
        },
    )  # fmt: skip

    def into(name: str, residual: Callable, value: Callable | None = None) -> None:
        """Inplace, into this residual, with an argument made of it."""

        def others(arguments: Arguments) -> Arguments:
            target = residual(arguments)
            return {"residual": target} | ({} if value is None else {name: value(target)})

        add("inplace", f"into {name}", _constant(True), names=("residual",), others=others)

    return into


def _all_wrong() -> dict[str, Wrong]:
    found: dict[str, Wrong] = {}

    def add(name: str, how: str, value: Callable, **options) -> None:
        function = WITH_RESIDUAL if name in OF_RESIDUAL else None
        function = UPDATE if name in BIASES else options.pop("function", function)
        names = options.pop("names", (name,))
        found[f"{name}: {how}"] = Wrong(names, value, function, **options)

    # D is that of the first projection that is given: p_out_weight is wrong beside another.
    _add_tensors(add, SHAPES, {"p_out_weight": _with_p_in_weight})
    for name in PROJECTIONS:
        add(name, "None", _constant(None), function=WITH_RESIDUAL)
        add(name, "another of the dtypes", lambda a, name=name: good(name, _other(a)))
    for shape in ((L, C), (B, L, L + 1, C), (B, L + 1, L, C), (B, L, L, 0), (C,), ()):
        add("pair", f"{shape}", _ones(*shape))
    for shape in ((L, L, C), (1, B, L, L, C)):
        add("pair", f"{shape} beside a residual", _ones(*shape), function=WITH_RESIDUAL)
    add(
        "pair", "too long",
        lambda a: torch.empty(1, TOO_LONG, TOO_LONG, 1, dtype=a["pair"].dtype, device="meta"),
    )  # fmt: skip
    ranks = ((), (L,), (1, L), (B, L), (B, 1, L), (1, 1, L), (B, L, 1), (1, L, 1), (B, 1, L, 1))
    for shape in (*ranks, (3, 1, 1), (2, 3, L, L), (L + 1,), (0,), (1, 1, 1)):
        add("mask", f"{shape}", _ones(*shape))
    add("mask", "more axes beside a residual", _ones(1, B, L, L), function=WITH_RESIDUAL)
    for shape in ((B, L, C), (1, 1, L, C), (L, C), (B * L, 1), (B * L,)):
        add("drop_mask", f"{shape}", _ones(*shape))

    words = ("Outgoing", "", None, 0, b"outgoing", ["outgoing"], np.array(["incoming"] * 2))
    for word in (*words, torch.ones(2)):
        add("direction", repr(word), _constant(word))
    for name in ("memory", "recompute"):
        for word in ("", "Lean", None, True, ["lean"], np.array(["all", "lean"]), torch.ones(2)):
            add(name, repr(word), _constant(word))
    for number in _NO_EPS:
        add("eps_out", _shown(number), _constant(number))
    into = _add_settings(add, PROJECTIONS, "p_in_weight")

    into("turned memory", lambda a: _ones(*PAIR)(a).transpose(1, 2).contiguous().transpose(1, 2))
    into("shared memory", lambda a: _ones(1, L, L, C)(a).expand(PAIR))
    into("mask", _ones(*PAIR), lambda residual: residual[..., 0])
    into("drop_mask", _ones(*PAIR), lambda residual: residual[:, :1])
    into("p_out_bias", _ones(*PAIR), lambda residual: residual[0, 0, 0])
    into("norm_in_weight", _ones(*PAIR), lambda residual: residual[0, 0, 0])
    into("g_out_weight", _ones(*PAIR), lambda residual: residual.view(-1, C)[:C])
    into("pair", _ones(*PAIR), lambda residual: residual.transpose(1, 2))
    del found["inplace: into p_out_bias"]  # it is the other function that has biases
    return found


def _all_wrong_of_transitions() -> dict[str, Wrong]:
    found: dict[str, Wrong] = {}

    def add(name: str, how: str, value: Callable, **options) -> None:
        found[f"{name}: {how}"] = Wrong(options.pop("names", (name,)), value, None, **options)

    _add_tensors(add, TRANSITION_SHAPES, {})
    del found["gate_weight: one more in axis 0"]  # it says what H is: then the others are wrong
    for name in TRANSITION_PROJECTIONS:
        add(name, "None", _constant(None))
        add(name, "another of the dtypes", lambda a, name=name: good(name, _other(a)))
    for shape in ((), (0,), (B, L, L, 0)):
        add("pair", f"{shape}", _ones(*shape))
    for shape in ((L, C), (B, L, L + 1, C), (C,)):
        beside = {"others": lambda a: {"lengths": good("lengths", a["pair"].dtype)}}
        add("pair", f"{shape} beside lengths", _ones(*shape), **beside)
    into = _add_settings(add, TRANSITION_PROJECTIONS, "gate_weight")
    into("turned memory", lambda a: _ones(*PAIR)(a).transpose(1, 2).contiguous().transpose(1, 2))
    into("shared memory", lambda a: _ones(1, L, L, C)(a).expand(PAIR))
    into("norm_weight", _ones(*PAIR), lambda residual: residual[0, 0, 0])
    into("up_bias", _ones(*PAIR), lambda residual: residual.view(-1)[:H])
    into("gate_weight", _ones(*PAIR), lambda residual: residual.view(-1, C)[:H])
    into("pair", _ones(*PAIR), lambda residual: residual.transpose(1, 2))
    return found


def _other(arguments: Arguments) -> torch.dtype:
    return torch.float16 if arguments["pair"].dtype != torch.float16 else torch.float32


def good(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "lengths":
        return torch.tensor([3, 2])
    shape = (SHAPES | TRANSITION_SHAPES).get(name, PAIR)
    value = torch.rand(shape, generator=generator)
    return value.to(dtype)


WRONG = _all_wrong()
WRONG_OF_TRANSITIONS = _all_wrong_of_transitions()


def table_of(function: str) -> dict[str, Wrong]:
    """The wrong arguments of a function."""
    if function == TRANSITION:
        return WRONG_OF_TRANSITIONS
    return {key: wrong for key, wrong in WRONG.items() if wrong.function in (None, function)}


def optional_of(function: str) -> tuple[str, ...]:
    """The tensors that a good call of a function may lack."""
    if function == TRANSITION:
        return (*TRANSITION_NORMS, *TRANSITION_BIASES, "residual", "lengths")
    optional = (*NORMS, "mask", "lengths")
    if function == WITH_RESIDUAL:
        return (*optional, "residual", "drop_mask")
    # Where no projection says what D is, it is C; so one always does.
    return (*optional, *BIASES, *(name for name in PROJECTIONS if name != "p_out_weight"))


@st.composite
def wrong_calls(draw) -> WrongCall:
    function = draw(st.sampled_from((UPDATE, WITH_RESIDUAL, TRANSITION)))
    keys = list(table_of(function))
    # By argument first, so that each is drawn as often as the others.
    names = sorted({key.split(":")[0] for key in keys})
    some = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    wrong = [draw(st.sampled_from([k for k in keys if k.split(":")[0] == n])) for n in some]
    optional = optional_of(function)
    absent = draw(st.sets(st.sampled_from(optional)))
    given = tuple([name for name in optional if name not in absent])
    dtype, with_grad = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    return WrongCall(function, dtype, given, with_grad, tuple(wrong))


def arguments_of(call: WrongCall) -> tuple[Arguments, set[str]]:
    """The arguments, and those that an error message may name."""
    required = {
        UPDATE: ("p_out_weight",), WITH_RESIDUAL: PROJECTIONS, TRANSITION: TRANSITION_PROJECTIONS
    }[call.function]  # fmt: skip
    names = ("pair", *required, *call.given)
    arguments: Arguments = {name: good(name, call.dtype) for name in names}
    if call.function == TRANSITION:
        arguments = dict.fromkeys(TRANSITION_NORMS) | arguments
    else:
        arguments["direction"] = "outgoing"
    if call.function == WITH_RESIDUAL:
        arguments = dict.fromkeys((*NORMS, "residual", "drop_mask")) | arguments
    may_be_named = set()
    given = dict(arguments)
    table = table_of(call.function)
    for key in call.wrong:
        given |= table[key].others(arguments)
    for key in call.wrong:
        given[key.split(":")[0]] = table[key].value(arguments)
        may_be_named |= set(table[key].names)
    if call.with_grad and not any(key.startswith("inplace: into") for key in call.wrong):
        for value in given.values():
            if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
                value.requires_grad_()
    if call.function != WITH_RESIDUAL:
        given["x"] = given.pop("pair")
        may_be_named = {"x" if name == "pair" else name for name in may_be_named}
    return given, may_be_named
