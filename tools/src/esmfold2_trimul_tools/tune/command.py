"""The command tune."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..console import ProgressBar, print_json
from ..errors import UserError
from ..options import AsJson, Commit, KernelRoot, checked, writable_file
from ..repository import find_root
from .candidates import STAGES, WIDTHS


def _stages(option: str, chosen: list[str]) -> list[str]:
    for stage in chosen:
        if stage not in STAGES:
            raise UserError(f"stage must be one of {', '.join(STAGES)}; got {stage!r}")
    return chosen


def _widths(option: str, chosen: list[int]) -> list[int]:
    for width in chosen:
        if not 16 <= width <= 512:
            raise UserError(f"width must be from 16 to 512; got {width}")
    return chosen


@checked
def tune(
    out: Annotated[
        Path, typer.Option(help="Write the settings table to this file."), writable_file
    ],
    results: Annotated[
        Path | None, typer.Option(help="Write every timing to this file."), writable_file
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            help=f"Tune this stage alone: {', '.join(STAGES)}; may be repeated.",
        ),
        _stages,
    ] = None,
    widths: Annotated[
        list[int] | None,
        typer.Option(
            "--width", help="Tune this C = D alone; may be repeated. Default: 128 and 256."
        ),
        _widths,
    ] = None,
    split: Annotated[
        bool,
        typer.Option("--split", help="Tune float32's split operands, in place of 16 bits."),
    ] = False,
    kernel_root: KernelRoot = None,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Search launch settings on this machine's GPU and write the fastest as a table.

    Every candidate is checked before it is timed. On a Hopper GPU the candidates
    include those of the stages' variants for it. The shipped table of this
    GPU's architecture is where the new one starts from; it is not changed.
    """
    root = find_root(kernel_root)

    from .search import search
    from .table import text, write

    command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
    with ProgressBar() as report:
        measured = search(
            root, tuple(stages or STAGES), tuple(widths or WIDTHS),
            progress=report, command=command, commit=commit, kind="split" if split else "2",
        )  # fmt: skip
        write(root, measured, out, results)
    if as_json:
        print_json(measured)
    else:
        print(text(measured))
