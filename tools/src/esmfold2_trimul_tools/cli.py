"""The command `esmfold2-trimul`: its subcommands, and their errors in one line each.

Text for people goes to stdout; with --json, one JSON document and nothing else. Progress bars and
errors go to stderr. Exit status: 0 done, 1 a check failed, 2 bad input, 130 interrupted.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .bench.command import bench
from .commands import build, doctor, resources
from .conformance.command import conformance
from .console import print_in_any_encoding
from .errors import UserError
from .folding.command import fold, validate
from .libraries import OPTIONAL, not_installed
from .repository import built, find_root
from .tune.command import tune


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns errors that the user can mend into one line on stderr and an exit status."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except Exception as error:
        if isinstance(error, UserError):
            message, status = str(error), error.exit_status
        elif hasattr(error, "format_message"):  # the parser's own errors
            message, status = error.format_message(), 2
        elif isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
            message, status = not_installed(error.name), 2
        else:
            raise
        print(f"error: {message}", file=sys.stderr)
        raise typer.Exit(status) from None


class _Commands(TyperGroup):
    """A command group whose errors are one line each."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        if not args:  # the help page, which the parser raises as an error too
            return super().make_context(info_name, args, parent, **extra)
        with _one_line_errors():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: typer.Context) -> Any:
        with _one_line_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fold with the ESMFold2 triangle multiplication kernel, check it, and build it.",
)
for command in (fold, validate, doctor, resources, bench, conformance, tune, build):
    app.command()(command)


def _show_version(asked: bool) -> None:
    if asked:
        found = built(find_root())
        print(f"{found['name']}, version {found['version']}, build {found['id']}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="The kernel's, and its build."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """The command's entry point."""
    print_in_any_encoding()
    app(prog_name="esmfold2-trimul")
