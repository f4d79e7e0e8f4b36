"""The command bench."""

import shlex
import sys
from typing import Any

import typer
from rich.table import Column, Table

from ..console import ProgressBar, print_json, print_whole, stdout
from ..errors import UserError
from ..options import takes
from .options import Options
from .ranks.command import bench_ranks
from .report import caption, groups, markdown, notes, table
from .results import ours_is_right, read_results
from .whole.command import bench_whole


@takes(Options)
def bench(options: Options) -> None:
    """Measure the kernel beside its rivals: time, peak memory, error, share of the floor.

    With --whole: whole folds, by part, in the full-size architecture with random weights; with
    --whole --passes training: training steps of one of its pair layers. With --transition: the
    transition that follows the triangles. With --nproc: a pair tensor over many GPUs, beside one.
    "ours, plain" is the kernel without the variants of its stages for this GPU, where it runs any.
    "ours, TF32x3" is float32 in three TF32 products.
    Exit status 1 if the kernel itself fails or gives a wrong result.
    """
    options.check_together()
    if options.nproc is not None:
        bench_ranks(options)
        return
    if options.resume and options.out is None:
        raise UserError("--resume needs --out, the file to add to")
    if options.whole:
        bench_whole(options)
        return
    if options.results is not None:
        measured = read_results(options.results)
    else:
        settings = options.on_this_machine()
        from .run import bench as measure

        command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
        with ProgressBar() as report:
            measured = measure(
                settings, command, settings.out, settings.resume, settings.commit, report
            )
    if options.plot is not None:
        from .run import draw

        draw(measured, options.plot)
    if options.as_json:
        print_json(measured)
    elif options.as_markdown:
        print(markdown(measured))
    else:
        _print_bench(measured)
    if not ours_is_right(measured):
        raise typer.Exit(1)


def _print_bench(measured: dict[str, Any]) -> None:
    console = stdout(soft_wrap=True)
    console.print(caption(measured))
    for name, rows in groups(measured):
        head, lines = table(rows)
        columns = [Column(title, justify="left" if title == "rival" else "right") for title in head]
        drawn = Table(
            *columns, title=f"{name}; times in ms, medians", box=None, title_justify="left"
        )
        for line in lines:
            drawn.add_row(*line)
        print_whole(drawn)
    for note in notes(measured):
        console.print(note)
