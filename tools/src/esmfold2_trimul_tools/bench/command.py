"""The command bench."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from ..console import ProgressBar, print_json, print_whole, stdout
from ..options import AsJson, Commit, KernelRoot, Published


def bench(
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU if there is one.")
    ] = None,
    widths: Annotated[str, typer.Option(help="Channels C of the pair tensor.")] = "128,256",
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Residues L. Default: 15 lengths from 64 to 2048 on a GPU, 3 up to 256 on a CPU."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths.")] = False,
    dtypes: Annotated[
        str | None,
        typer.Option(
            help="Of float32, bfloat16 and float16, or fp32, bf16 and fp16. "
            "Default: bfloat16 on a GPU, float32 on a CPU."
        ),
    ] = None,
    directions: Annotated[str, typer.Option(help="Of outgoing and incoming.")] = "outgoing",
    masks: Annotated[str, typer.Option(help="Of bool, float and none.")] = "bool",
    passes: Annotated[
        str, typer.Option(help="Of forward and training, which is forward and backward.")
    ] = "forward",
    rivals: Annotated[
        list[str] | None,
        typer.Option(
            "--rival", help="Measure this rival, and ours, instead of all; may be repeated."
        ),
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also transformers' module under torch.compile.")
    ] = False,
    max_autotune: Annotated[
        bool,
        typer.Option(
            "--max-autotune",
            help="Also transformers' module under torch.compile with max-autotune. Slow.",
        ),
    ] = False,
    graphs: Annotated[
        bool,
        typer.Option(
            "--graphs",
            help="Also CUDA graphs of the rivals, which show device time without host time.",
        ),
    ] = False,
    compile_lengths: Annotated[
        str | None,
        typer.Option(
            help="The lengths at which anything is compiled by torch.compile. Default: all."
        ),
    ] = None,
    published: Published = None,
    budget: Annotated[float, typer.Option(help="Seconds of timing for each row.")] = 0.5,
    check_up_to: Annotated[
        int | None,
        typer.Option(
            help="The longest L that is held to float64 at all pairs; longer at some. "
            "Default: 1024 on a GPU, 512 on a CPU."
        ),
    ] = None,
    first_call: Annotated[
        bool,
        typer.Option(
            "--first-call",
            help="Also time first calls, in fresh processes with an empty Triton cache.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    busy: Annotated[
        int,
        typer.Option(
            help="So many processes compute beside the benchmark, "
            "as on a machine that people share."
        ),
    ] = 0,
    kernel_root: KernelRoot = None,
    commit: Commit = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the results to this file, after every shape.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Add to the results in --out what they don't hold yet.")
    ] = False,
    results: Annotated[
        Path | None, typer.Option(help="Measure nothing: show the results in this file.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw plots into this folder, as PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the kernel beside its rivals: time, peak memory, error, share of the floor.

    Exit status 1 if the kernel itself fails or gives a wrong result.
    """
    from . import run as module
    from .report import markdown
    from .results import ours_is_right, read_results
    from .settings import read_settings

    if results is not None:
        measured = read_results(results)
    else:
        settings = read_settings(
            device=device,
            widths=widths,
            lengths=lengths,
            quick=quick,
            dtypes=dtypes,
            directions=directions,
            masks=masks,
            passes=passes,
            rivals=rivals,
            compile=compile,
            max_autotune=max_autotune,
            graphs=graphs,
            compile_lengths=compile_lengths,
            published=published,
            budget=budget,
            check_up_to=check_up_to,
            first_call=first_call,
            seed=seed,
            busy=busy,
            kernel_root=kernel_root,
        )
        command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
        with ProgressBar() as report:
            measured = module.bench(settings, command, out, resume, commit, report)
    if plot is not None:
        module.draw(measured, plot)
    if as_json:
        print_json(measured)
    elif as_markdown:
        print(markdown(measured))
    else:
        _print_bench(measured)
    if not ours_is_right(measured):
        raise typer.Exit(1)


def _print_bench(measured: dict[str, Any]) -> None:
    from .report import caption, groups, notes, table

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
