"""`esmfold2-trimul bench --whole`: whole folds, or training steps of a pair layer."""

import shlex
import sys
from typing import Any

import typer
from rich.table import Column, Table

from ...console import ProgressBar, print_json, print_whole, stdout
from ...errors import UserError
from ..options import Options
from .results import ours_is_right, read_results
from .settings import plan_of


def bench_whole(options: Options) -> None:
    """Measure whole folds or training steps, or show the results in a file.

    Raises:
        UserError: --readme, and the file holds no folds.
        typer.Exit: with status 1 if a way of ours fails or gives a wrong result.
    """
    if options.results is not None:
        measured = read_results(options.results)
        if options.as_readme and "rows" not in measured:
            raise UserError(f"--readme: {options.results} holds no whole folds")
    else:
        plan = plan_of(options)
        from .report import estimate
        from .run import run

        if (minutes := estimate(plan)) is not None:
            print(
                f"about {minutes:.0f} minutes on one H200, less where folds do not fit; "
                "--ways and --lengths split it, and --resume adds to --out",
                file=sys.stderr,
            )
        command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
        with ProgressBar() as report:
            measured = run(plan, command, options.out, options.resume, options.commit, report)
    from .report import markdown, readme_table

    if options.as_json:
        print_json(measured)
    elif options.as_readme:
        print(readme_table(measured))
    elif options.as_markdown:
        print(markdown(measured))
    else:
        _print(measured)
    if not ours_is_right(measured):
        raise typer.Exit(1)


def _print(measured: dict[str, Any]) -> None:
    from .report import caption, notes, tables

    console = stdout(soft_wrap=True)
    console.print(caption(measured))
    for title, head, lines in tables(measured):
        columns = [Column(one, justify="left" if one == "way" else "right") for one in head]
        drawn = Table(*columns, title=title, box=None, title_justify="left")
        for line in lines:
            drawn.add_row(*line)
        print_whole(drawn)
    for note in notes(measured):
        console.print(note)
