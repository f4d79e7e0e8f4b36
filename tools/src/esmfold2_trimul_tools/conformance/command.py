"""The command conformance."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..console import ProgressBar, print_json, print_whole, stdout
from ..options import AsJson, Commit, KernelRoot, Published


def conformance(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:N or xpu. Default: a GPU if there is one.")
    ] = None,
    implementations: Annotated[
        list[str] | None,
        typer.Option(
            "--implementation", help="Hold this one to the cases instead of all; may be repeated."
        ),
    ] = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--case", help="Cases whose name has this in it, instead of all; may be repeated."
        ),
    ] = None,
    published: Published = None,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    kernel_root: KernelRoot = None,
    commit: Commit = None,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Run nothing: show the results in this file.")
    ] = None,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the report of docs/conformance.md.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Hold every implementation on this machine to float64, over one table of cases.

    Exit status 1 if a case of ours fails; failures of others are reported.
    """
    from . import run as module
    from .report import markdown, read_results

    if results is not None:
        found = read_results(results)
    else:
        settings = module.read_settings(
            device=device,
            implementations=implementations,
            cases=cases,
            published=published,
            seed=seed,
            kernel_root=kernel_root,
        )
        command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
        with ProgressBar() as report:
            found = module.conformance(settings, command, commit, out, report)
    if as_json:
        print_json(found)
    elif as_markdown:
        print(markdown(found))
    else:
        _print_conformance(found)
    if not module.ours_conforms(found):
        raise typer.Exit(1)


def _print_conformance(found: dict[str, Any]) -> None:
    from .report import COLUMNS, caption, notes, summaries

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
