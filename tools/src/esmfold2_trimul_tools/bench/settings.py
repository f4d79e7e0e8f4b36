"""The benchmark's options: what they mean, their defaults, and how their text is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..errors import UserError
from ..folding.model import DTYPES, SHORT_DTYPES, resolve_device, resolve_dtype
from ..repository import find_root
from .problem import DIRECTIONS, MASKS, PASSES, Case
from .rivals import OURS, RIVALS, Rival

_GPU_LENGTHS = (64, 76, 128, 256, 286, 383, 384, 511, 512, 768, 769, 1024, 1111, 1536, 2048)
_CPU_LENGTHS = (64, 128, 256)
_QUICK_LENGTHS = {"cuda": (76, 256, 512, 1024), "cpu": (64,)}
_CHECK_UP_TO = {"cuda": 1024, "cpu": 512}


@dataclass(frozen=True)
class Settings:
    """What is to be measured, with which rivals, for how long."""

    device: torch.device
    root: Path
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    masks: tuple[str, ...]
    passes: tuple[str, ...]
    rivals: tuple[Rival, ...]
    compile_lengths: tuple[int, ...] | None
    published: Path | None
    budget: float  # seconds of timing a row
    check_up_to: int  # the longest L that is held to float64
    first_call: bool
    seed: int
    busy: int = 0  # processes that compute beside it

    def cases(self) -> list[Case]:
        """The shapes, in the order in which they are measured."""
        return [
            Case(channels, length, dtype, direction, mask, passes=passes)
            for passes in self.passes
            for dtype in self.dtypes
            for direction in self.directions
            for mask in self.masks
            for channels in self.widths
            for length in self.lengths
        ]

    def rivals_at(self, case: Case) -> list[Rival]:
        """Who takes part in a shape."""
        lengths = self.compile_lengths
        return [
            rival
            for rival in self.rivals
            if case.passes in rival.passes
            and (not rival.slow or lengths is None or case.length in lengths)
        ]


def read_settings(
    *,
    device: str | None = None,
    widths: str = "128,256",
    lengths: str | None = None,
    quick: bool = False,
    dtypes: str | None = None,
    directions: str = "outgoing",
    masks: str = "bool",
    passes: str = "forward",
    rivals: list[str] | None = None,
    compile: bool = False,
    max_autotune: bool = False,
    graphs: bool = False,
    compile_lengths: str | None = None,
    published: Path | None = None,
    budget: float = 0.5,
    check_up_to: int | None = None,
    first_call: bool = False,
    seed: int = 0,
    busy: int = 0,
    kernel_root: Path | None = None,
) -> Settings:
    """The settings that the options' text stands for; lists are separated by commas.

    Raises:
        UserError: text that can't be read, or what is not to be had here.
    """
    found = resolve_device(device)
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda here; got {device or str(found)!r}")
    if published is not None and not (published / "esmfold2_trimul" / "__init__.py").is_file():
        raise UserError(f"--published {published}: holds no package esmfold2_trimul")
    if not budget > 0:
        raise UserError(f"--budget must be above 0 seconds; got {budget}")
    if seed < 0:
        raise UserError(f"--seed must be at least 0; got {seed}")
    if busy < 0:
        raise UserError(f"--busy must be at least 0; got {busy}")
    if lengths is not None:
        all_lengths = _numbers("--lengths", lengths)
    elif quick:
        all_lengths = _QUICK_LENGTHS[found.type]
    else:
        all_lengths = _CPU_LENGTHS if found.type == "cpu" else _GPU_LENGTHS
    default_dtype = str(resolve_dtype(None, found)).removeprefix("torch.")
    options = {"compile": compile, "max_autotune": max_autotune, "graphs": graphs}
    all_passes = _words("--passes", passes, PASSES)
    return Settings(
        device=found,
        root=find_root(kernel_root),
        widths=_numbers("--widths", widths),
        lengths=all_lengths,
        dtypes=_words("--dtypes", dtypes or default_dtype, DTYPES, SHORT_DTYPES),
        directions=_words("--directions", directions, DIRECTIONS),
        masks=_words("--masks", masks, MASKS),
        passes=all_passes,
        rivals=_choose(rivals, options, found, all_passes),
        compile_lengths=compile_lengths and _numbers("--compile-lengths", compile_lengths),
        published=published,
        budget=budget,
        check_up_to=_CHECK_UP_TO[found.type] if check_up_to is None else check_up_to,
        first_call=first_call,
        seed=seed,
        busy=busy,
    )


def _choose(
    names: list[str] | None,
    options: dict[str, bool],
    device: torch.device,
    passes: tuple[str, ...],
) -> tuple[Rival, ...]:
    """The rivals called `names`, and ours; without names those that the options include here."""
    if not names:
        return tuple(
            rival
            for rival in RIVALS
            if (rival.option is None or options[rival.option])
            and (rival.on_cpu or device.type != "cpu")
            and not set(passes).isdisjoint(rival.passes)
        )
    known = [rival.name for rival in RIVALS]
    for name in names:
        if name not in known:
            raise UserError(f"--rival must be one of {'; '.join(known)}; got {name!r}")
    return tuple(rival for rival in RIVALS if rival.name in (OURS, *names))


def _words(
    option: str, text: str, known: Any, short: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, ...]:
    words = [word.strip() for word in text.split(",")]
    words = tuple(dict.fromkeys(short.get(word, word) for word in words))
    for word in words:
        if word not in known:
            raise UserError(f"{option} must be of {', '.join(known)}; got {word!r}")
    return words


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option} must be whole numbers above 0, as in 128,256; got {text!r}")
    return numbers
