"""The options of whole folds: their checks, and their defaults on this machine."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UserError
from ...options import at_least, read
from ...repository import find_root
from ...triton_cache import check_cache
from ..settings import Settings, default_check_up_to, words
from .ways import OURS, STOCK, WAYS, Way

if TYPE_CHECKING:
    import torch

    from ...folding.options import Settings as FoldSettings

_LENGTHS = {
    "forward": {"cuda": (256, 512, 1024, 2048), "cpu": (16, 32)},
    "training": {"cuda": (256, 512, 1024), "cpu": (16, 32)},
}
TWICE_BELOW = 5.0  # seconds of a fold that is timed twice
_LONGEST_WAYS = (STOCK, OURS)
# The options of the benchmark of single calls that a benchmark of folds has too.
_SHARED = {
    "device", "lengths", "dtypes", "passes", "published", "esm", "seed", "kernel_root", "commit",
    "out", "resume", "results", "as_markdown", "as_json",
}  # fmt: skip
# Those that training steps of a layer have too, and those of folds that they don't have.
_OF_STEPS = {"budget", "check_up_to", "compile_lengths"}
_OF_FOLDS = {"longest", "loops", "samples", "steps", "fold_seconds", "as_readme"}


def _above_zero(option: str, value: float) -> float:
    if not value > 0:
        raise UserError(f"{option} must be above 0; got {value}")
    return value


def _check_longest(gib: float, device: "torch.device") -> None:
    import torch

    if device.type == "cpu":
        raise UserError("--longest needs a CUDA device: it limits what torch may allocate there")
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    if gib > total:
        raise UserError(f"--longest must be at most the {total:.1f} GiB of {device}; got {gib:g}")


@dataclass(frozen=True)
class WholeOptions:
    """The options that only whole folds have."""

    whole: Annotated[
        bool,
        typer.Option(
            "--whole",
            help="Measure whole folds of the full-size architecture with random weights instead of "
            "single calls. --lengths: 256 to 2048 by default. With --passes training: training "
            "steps of one pair-update layer of the folding trunk; --lengths: 256, 512 and 1024.",
        ),
    ] = False
    ways: Annotated[
        str | None,
        typer.Option(
            help=f"With --whole: of {', '.join(way.name for way in WAYS)}. Default: all that have "
            f"the passes; with --longest {' and '.join(_LONGEST_WAYS)}."
        ),
        words(tuple(way.name for way in WAYS)),
    ] = None
    longest: Annotated[
        float | None,
        typer.Option(
            help="With --whole: find the longest L whose fold fits into this many GiB of a GPU, "
            "and measure nothing else."
        ),
        _above_zero,
    ] = None
    small: Annotated[
        bool,
        typer.Option("--small", help="With --whole: the small architecture of `fold`, for trials."),
    ] = False
    loops: Annotated[
        int | None,
        typer.Option(help="With --whole: refinements. Default: the model's own."),
        at_least(0),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(help="With --whole: structures drawn. Default: the model's own."),
        at_least(1),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(help="With --whole: length of the noise schedule. Default: the model's own."),
        at_least(1),
    ] = None
    fold_seconds: Annotated[
        float,
        typer.Option(
            help="With --whole: a fold that would take longer is timed with fewer loops, and its "
            "row has the time with all of them by extrapolation."
        ),
        _above_zero,
    ] = 15.0
    as_readme: Annotated[
        bool, typer.Option("--readme", help="With --whole: print the table of README.md.")
    ] = False


@dataclass(frozen=True)
class Options(WholeOptions, Settings):
    """The options of the command: of single calls, and of whole folds."""

    def check_together(self) -> None:
        """Raises UserError for an option that the chosen benchmark does not have."""
        default = read(Options)
        only_whole = {one.name for one in fields(WholeOptions)} - {"whole"}
        only_calls = {one.name for one in fields(Settings)} - _SHARED
        if not self.whole:
            refused, why = only_whole, "for --whole"
        elif self._training:
            refused = (only_calls - _OF_STEPS) | _OF_FOLDS
            why = "not for --whole --passes training"
        else:
            refused, why = only_calls, "not for --whole"
        for name in refused:
            if getattr(self, name) != getattr(default, name):
                named = {"rivals": "rival", "as_readme": "readme"}.get(name, name)
                raise UserError(f"--{named.replace('_', '-')} is {why}")
        for name in ("dtypes", "passes") if self.whole else ():
            if len(values := getattr(self, name) or ()) > 1:
                raise UserError(f"--{name} must be one with --whole; got {', '.join(values)}")
        for way in WAYS:
            if way.name in (self.ways or ()) and self.passes[0] not in way.passes:
                raise UserError(f"--ways: {way.name} is not for --passes {self.passes[0]}")

    @property
    def _training(self) -> bool:
        return self.passes == ("training",)

    def plan(self) -> "Plan":
        """What is to be measured on this machine.

        Raises:
            UserError: no such device; --longest without a GPU.
        """
        root = find_root(self.kernel_root)  # before torch is imported
        from ...folding.model import resolve_device, resolve_dtype
        from ...folding.options import Settings as FoldSettings

        device = resolve_device(self.device)
        lengths = _LENGTHS[self.passes[0]]
        if device.type not in lengths:
            raise UserError(f"--device must be cpu or cuda here; got {str(device)!r}")
        if self.longest is not None:
            _check_longest(self.longest, device)
        if device.type != "cpu":
            check_cache()
        named = self.ways or (_LONGEST_WAYS if self.longest is not None else None)
        return Plan(
            device=device,
            dtype=resolve_dtype(self.dtypes and self.dtypes[0], device),
            lengths=self.lengths or lengths[device.type],
            ways=tuple(
                way
                for way in WAYS
                if self.passes[0] in way.passes and (named is None or way.name in named)
            ),
            fold=FoldSettings(self.loops, self.samples, self.steps, self.seed),
            small=self.small,
            longest=self.longest,
            fold_seconds=self.fold_seconds,
            root=root,
            published=self.published,
            esm=self.esm,
            training=self._training,
            budget=self.budget,
            check_up_to=default_check_up_to(self.check_up_to, device),
            compile_lengths=self.compile_lengths,
        )


@dataclass(frozen=True)
class Plan:
    """The options, checked and resolved: the `RunSettings` of the results' environment."""

    device: "torch.device"
    dtype: "torch.dtype"
    lengths: tuple[int, ...]
    ways: tuple[Way, ...]
    fold: "FoldSettings"
    small: bool
    longest: float | None
    fold_seconds: float
    root: Path
    published: Path | None
    esm: Path | None
    training: bool = False
    # Of training steps alone.
    budget: float = 0.5
    check_up_to: int = 0
    compile_lengths: tuple[int, ...] | None = None

    @property
    def dtypes(self) -> tuple[str, ...]:
        return (str(self.dtype).removeprefix("torch."),)

    @property
    def seed(self) -> int:
        return self.fold.seed
