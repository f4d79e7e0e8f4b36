"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

KernelRoot = Annotated[
    Path | None,
    typer.Option("--kernel-root", help="The kernel repository. Default: the tools' own checkout."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Commit = Annotated[
    str | None,
    typer.Option("--commit", help="What to record as the commit. Default: git's answer."),
]
Published = Annotated[
    Path | None,
    typer.Option(
        "--published",
        help="The folder that holds the published package, esmfold2_trimul. Default: the Hub.",
    ),
]
