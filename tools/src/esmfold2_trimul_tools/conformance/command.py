"""The command conformance."""

import shlex
import sys
from typing import Any

import typer
from rich.table import Column, Table

from ..console import ProgressBar, print_json, print_whole, stdout
from ..options import takes
from .report import COLUMNS, caption, markdown, notes, ours_conforms, read_results, summaries
from .settings import Settings


@takes(Settings)
def conformance(options: Settings) -> None:
    """Hold every implementation on this machine to float64, over one table of cases.

    Exit status 1 if a case of ours fails; failures of others are reported.
    """
    if options.results is not None:
        found = read_results(options.results)
    else:
        settings = options.on_this_machine()
        from . import run as module

        command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
        with ProgressBar() as report:
            found = module.conformance(settings, command, report)
    if options.as_json:
        print_json(found)
    elif options.as_markdown:
        print(markdown(found))
    else:
        _print_conformance(found)
    if not ours_conforms(found):
        raise typer.Exit(1)


def _print_conformance(found: dict[str, Any]) -> None:
    console = stdout(soft_wrap=True)
    console.print(caption(found))
    name, *numbers, worst, where = COLUMNS
    drawn = Table(
        name, *[Column(number, justify="right") for number in numbers], worst, where, box=None
    )
    for summary in summaries(found):
        drawn.add_row(*summary.cells())
    print_whole(drawn)
    for note in notes(found):
        console.print(note)
