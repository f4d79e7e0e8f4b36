"""The benchmark's options: their checks, and their defaults on this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UserError
from ..options import (
    DTYPES,
    SHORT_DTYPES,
    AsJson,
    Check,
    Commit,
    KernelRoot,
    Published,
    at_least,
    device_name,
    writable_file,
    writable_folder,
)
from ..repository import find_root
from ..triton_cache import check_cache
from .case import DIRECTIONS, MASKS, PASSES, TRANSITION, Case
from .rivals import OURS, RIVALS, TRANSITION_RIVALS, Rival

if TYPE_CHECKING:
    import torch

_LENGTHS = {
    "cuda": (64, 76, 128, 256, 286, 383, 384, 511, 512, 768, 769, 1024, 1111, 1536, 2048),
    "cpu": (64, 128, 256),
}
_QUICK_LENGTHS = {"cuda": (76, 256, 512, 1024), "cpu": (64,)}
_TRANSITION_LENGTHS = {"cuda": (256, 512, 1024), "cpu": (64, 128)}
# The options that a transition does not have.
_OF_TRIANGLES = {
    "directions": "outgoing", "masks": "bool", "quick": False, "max_autotune": False,
    "published": None, "esm": None, "first_call": False,
}  # fmt: skip
_CHECK_UP_TO = {"cuda": 1024, "cpu": 512}


def _device_name(option: str, name: str) -> str:
    if device_name(option, name).startswith("xpu"):
        raise UserError(f"{option} must be cpu or cuda here; got {name!r}")
    return name


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The numbers of a list separated by commas."""
    try:
        numbers = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UserError(f"{option} must be whole numbers above 0, as in 128,256; got {text!r}")
    return numbers


def words(known: tuple[str, ...], short: Mapping[str, str] = MappingProxyType({})) -> Check:
    """The check of a list of words, separated by commas."""

    def check(option: str, text: str) -> tuple[str, ...]:
        words = [word.strip() for word in text.split(",")]
        words = tuple(dict.fromkeys(short.get(word, word) for word in words))
        for word in words:
            if word not in known:
                raise UserError(f"{option} must be of {', '.join(known)}; got {word!r}")
        return words

    return check


def _esm(option: str, folder: Path) -> Path:
    if not (folder / "esm" / "models" / "esmfold2" / "layers.py").is_file():
        raise UserError(f"{option} {folder}: holds no package esm with models/esmfold2/layers.py")
    return folder


def _seconds(option: str, seconds: float) -> float:
    if not seconds > 0:
        raise UserError(f"{option} must be above 0 seconds; got {seconds}")
    return seconds


def default_check_up_to(asked: int | None, device: "torch.device") -> int:
    """The longest L that is held to float64: as asked, or the device's default."""
    return _CHECK_UP_TO[device.type] if asked is None else asked


@dataclass(frozen=True)
class Settings:
    """What is to be measured, with which rivals, for how long, and what becomes of the results.

    The annotations are those of the options' text, which checks convert, for example to tuples.
    Fields that depend on the device are None until `on_this_machine`.
    """

    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one."),
        _device_name,
    ] = None
    widths: Annotated[
        str, typer.Option(help="Channels C of the pair tensor."), numbers
    ] = "128,256"
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Residues L. Default: 15 lengths from 64 to 2048 on a GPU, 3 up to 256 on a CPU."
        ),
        numbers,
    ] = None
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths.")] = False
    dtypes: Annotated[
        str | None,
        typer.Option(
            help="Of float32, bfloat16 and float16, or fp32, bf16 and fp16. "
            "Default: bfloat16 on a GPU, float32 on a CPU."
        ),
        words(DTYPES, SHORT_DTYPES),
    ] = None
    directions: Annotated[
        str, typer.Option(help="Of outgoing and incoming."), words(DIRECTIONS)
    ] = "outgoing"
    masks: Annotated[str, typer.Option(help="Of bool, float and none."), words(MASKS)] = "bool"
    passes: Annotated[
        str,
        typer.Option(help="Of forward and training, which is forward and backward."),
        words(PASSES),
    ] = "forward"
    rivals: Annotated[
        list[str] | None,
        typer.Option(
            "--rival", help="Measure this rival, and ours, instead of all; may be repeated."
        ),
    ] = None
    transition: Annotated[
        bool,
        typer.Option(
            "--transition",
            help="Measure the transition, swiglu_transition, beside transformers' module and its "
            "own GEMMs instead of the triangle. --lengths: 256, 512 and 1024 by default.",
        ),
    ] = False
    compile: Annotated[
        bool, typer.Option("--compile", help="Also transformers' module under torch.compile.")
    ] = False
    max_autotune: Annotated[
        bool,
        typer.Option(
            "--max-autotune",
            help="Also transformers' module under torch.compile with max-autotune. Slow.",
        ),
    ] = False
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="Also CUDA graphs of the rivals, which show device time without host time.",
        ),
    ] = False
    compile_lengths: Annotated[
        str | None,
        typer.Option(
            help="The lengths at which anything is compiled by torch.compile. Default: all."
        ),
        numbers,
    ] = None
    published: Published = None
    esm: Annotated[
        Path | None,
        typer.Option(
            "--esm",
            help="The folder that holds biohub's package, esm (3.4.1). Without --whole: also "
            "measure its fused kernel.",
        ),
        _esm,
    ] = None
    budget: Annotated[float, typer.Option(help="Seconds of timing for each row."), _seconds] = 0.5
    check_up_to: Annotated[
        int | None,
        typer.Option(
            help="The longest L that is held to float64 at all pairs; longer at some. "
            "Default: 1024 on a GPU, 512 on a CPU."
        ),
    ] = None
    first_call: Annotated[
        bool,
        typer.Option(
            "--first-call",
            help="Also time first calls, in fresh processes with an empty Triton cache.",
        ),
    ] = False
    seed: Annotated[int, typer.Option(help="Of the random inputs."), at_least(0)] = 0
    busy: Annotated[
        int,
        typer.Option(
            help="So many processes compute beside the benchmark, "
            "as on a machine that people share."
        ),
        at_least(0),
    ] = 0
    kernel_root: KernelRoot = None
    commit: Commit = None
    out: Annotated[
        Path | None,
        typer.Option(help="Write the results to this file, after every shape."),
        writable_file,
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Add to the results in --out what they don't hold yet.")
    ] = False
    results: Annotated[
        Path | None, typer.Option(help="Measure nothing: show the results in this file.")
    ] = None
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False
    plot: Annotated[
        Path | None, typer.Option(help="Draw plots into this folder, as PNG."), writable_folder
    ] = None
    as_json: AsJson = False

    @property
    def root(self) -> Path:
        return find_root(self.kernel_root)

    def on_this_machine(self) -> "Settings":
        """The settings with torch's device, and its defaults for options that were left out."""
        find_root(self.kernel_root)  # before torch is imported
        rivals = self._named_rivals()
        from ..folding.model import resolve_device, resolve_dtype

        device = resolve_device(self.device)
        if device.type not in _LENGTHS:
            raise UserError(f"--device must be cpu or cuda here; got {str(device)!r}")
        if device.type != "cpu":
            check_cache()
        lengths = _QUICK_LENGTHS if self.quick else _LENGTHS
        lengths = _TRANSITION_LENGTHS if self.transition else lengths
        dtype = str(resolve_dtype(None, device)).removeprefix("torch.")
        return replace(
            self,
            device=device,
            lengths=self.lengths or lengths[device.type],
            dtypes=self.dtypes or (dtype,),
            rivals=rivals or self._rivals_on(device.type),
            check_up_to=default_check_up_to(self.check_up_to, device),
        )

    @property
    def _known(self) -> tuple[Rival, ...]:
        return TRANSITION_RIVALS if self.transition else RIVALS

    def _named_rivals(self) -> tuple[Rival, ...]:
        """The rivals that --rival names, and ours; none without names.

        Raises:
            UserError: no such rival, or an option that a transition does not have.
        """
        for name, default in _OF_TRIANGLES.items() if self.transition else ():
            value = getattr(self, name)
            if value not in (default, (default,)):
                raise UserError(f"--{name.replace('_', '-')} is not for --transition")
        names = self.rivals or ()
        known = [rival.name for rival in self._known]
        for name in names:
            if name not in known:
                raise UserError(f"--rival must be one of {'; '.join(known)}; got {name!r}")
        return tuple(r for r in self._known if r.name in (OURS, *names)) if names else ()

    def _rivals_on(self, device: str) -> tuple[Rival, ...]:
        """The rivals that the options include, on such a device."""
        return tuple(
            rival
            for rival in self._known
            if (rival.option is None or getattr(self, rival.option))
            and (rival.on_cpu or device != "cpu")
            and not set(self.passes).isdisjoint(rival.passes)
        )

    def cases(self) -> list[Case]:
        """The shapes, in the order in which they are measured."""
        directions, masks = self.directions, self.masks
        if self.transition:
            directions, masks = (TRANSITION,), ("none",)
        return [
            Case(channels, length, dtype, direction, mask, passes=passes)
            for passes in self.passes
            for dtype in self.dtypes
            for direction in directions
            for mask in masks
            for channels in self.widths
            for length in self.lengths
        ]

    def rivals_at(self, case: Case) -> list[Rival]:
        """The rivals that are measured at a shape."""
        lengths = self.compile_lengths
        return [
            rival
            for rival in self.rivals
            if case.passes in rival.passes
            and (not rival.slow or lengths is None or case.length in lengths)
        ]
