"""`esmfold2-trimul bench --nproc`."""

import os
import shlex
import sys
from contextlib import nullcontext
from typing import Any

import typer
from rich.table import Column, Table

from ...console import ProgressBar, print_json, print_whole, stdout
from ..options import Options
from .settings import plan_of


def bench_ranks(options: Options) -> None:
    """Measure ranks, or show the results in a file.

    It starts processes that run the same command, of which the first shows the results. Where
    torchrun has started this process, it is one of them.

    Raises:
        RanksError: a rank failed.
        typer.Exit: with status 1 if a result is wrong.
    """
    if options.results is not None:
        from .results import read_results

        _show(read_results(options.results), options)
        return
    plan = plan_of(options)
    from ...ranks import is_rank, run_ranks

    if not is_rank():
        run_ranks("esmfold2_trimul_tools", sys.argv[1:], plan.ranks)
        return
    from .run import run

    command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
    with ProgressBar() if os.environ["RANK"] == "0" else nullcontext() as report:
        measured = run(plan, command, options.out, options.commit, report)
    if measured is not None:
        _show(measured, options)


def _show(measured: dict[str, Any], options: Options) -> None:
    from .results import caption, markdown, table, wrong

    faults = wrong(measured)
    if options.as_json:
        print_json(measured)
    elif options.as_markdown:
        print(markdown(measured))
    else:
        console = stdout(soft_wrap=True)
        for line in caption(measured):
            console.print(line)
        head, lines = table(measured)
        words = ("pass", "dtype", "direction", "carrier", "same bits")
        columns = [Column(one, justify="left" if one in words else "right") for one in head]
        drawn = Table(*columns, box=None, title_justify="left")
        for line in lines:
            drawn.add_row(*line)
        print_whole(drawn)
    for fault in faults:
        print(f"not the result of one rank: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(1)
