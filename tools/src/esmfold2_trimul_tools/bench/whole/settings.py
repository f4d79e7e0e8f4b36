"""The options of whole folds: their checks, and their defaults on this machine."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import UserError
from ...options import at_least
from ...repository import find_root
from ...triton_cache import check_cache
from ..settings import default_check_up_to, words
from .ways import OURS, STOCK, WAYS, Way

if TYPE_CHECKING:
    import torch

    from ...folding.options import Settings as FoldSettings
    from ..options import Options

_LENGTHS = {
    "forward": {"cuda": (256, 512, 1024, 2048), "cpu": (16, 32)},
    "training": {"cuda": (256, 512, 1024), "cpu": (16, 32)},
}
TWICE_BELOW = 5.0  # seconds of a fold that is timed twice
_LONGEST_WAYS = (STOCK, OURS)


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


def plan_of(options: "Options") -> Plan:
    """What is to be measured on this machine.

    Raises:
        UserError: no such device; --longest without a GPU.
    """
    root = find_root(options.kernel_root)  # before torch is imported
    from ...folding.model import resolve_device, resolve_dtype
    from ...folding.options import Settings as FoldSettings

    device = resolve_device(options.device)
    (passes,) = options.passes
    lengths = _LENGTHS[passes]
    if device.type not in lengths:
        raise UserError(f"--device must be cpu or cuda here; got {str(device)!r}")
    if options.longest is not None:
        _check_longest(options.longest, device)
    if device.type != "cpu":
        check_cache()
    named = options.ways or (_LONGEST_WAYS if options.longest is not None else None)
    return Plan(
        device=device,
        dtype=resolve_dtype(options.dtypes and options.dtypes[0], device),
        lengths=options.lengths or lengths[device.type],
        ways=tuple(
            way for way in WAYS if passes in way.passes and (named is None or way.name in named)
        ),
        fold=FoldSettings(options.loops, options.samples, options.steps, options.seed),
        small=options.small,
        longest=options.longest,
        fold_seconds=options.fold_seconds,
        root=root,
        published=options.published,
        esm=options.esm,
        training=passes == "training",
        budget=options.budget,
        check_up_to=default_check_up_to(options.check_up_to, device),
        compile_lengths=options.compile_lengths,
    )
