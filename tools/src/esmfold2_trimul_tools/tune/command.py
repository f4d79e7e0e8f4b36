"""The command tune."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..console import ProgressBar, print_json
from ..options import AsJson, Commit, KernelRoot


def tune(
    out: Annotated[Path, typer.Option(help="Write the settings table to this file.")],
    results: Annotated[Path | None, typer.Option(help="Write every timing to this file.")] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            help="Tune this stage alone: fused_dual_gemm, trimul_einsum, fused_ln_residual; "
            "may be repeated.",
        ),
    ] = None,
    widths: Annotated[
        list[int] | None,
        typer.Option(
            "--width", help="Tune this C = D alone; may be repeated. Default: 128 and 256."
        ),
    ] = None,
    kernel_root: KernelRoot = None,
    commit: Commit = None,
    as_json: AsJson = False,
) -> None:
    """Search launch settings on this machine's GPU and write the fastest as a table.

    Every candidate is checked before it is timed. The shipped table of this
    GPU's architecture is where the new one starts from; it is not changed.
    """
    from . import search as module

    command = shlex.join(["esmfold2-trimul", *sys.argv[1:]])
    with ProgressBar() as report:
        measured = module.run(
            out, results, stages, widths, kernel_root, commit, command, progress=report
        )
    if as_json:
        print_json(measured)
    else:
        print(module.text(measured))
