"""The output of every command: tables, a progress bar, JSON."""

import codecs
import io
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .heartbeat import heartbeat


def stdout(**options: Any) -> Console:
    # Without markup: names and package extras may be in square brackets.
    return Console(markup=False, highlight=False, **options)


_SPELLED = {"→": "->", "Å": "A"}


def _spell(error: UnicodeError) -> tuple[str, int]:
    """What stands for a character that an encoding lacks, for `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_SPELLED.get(letter, "?") for letter in lacking), error.end


def print_in_any_encoding() -> None:
    """From now on stdout spells what its encoding lacks; stderr has always shown it by number."""
    codecs.register_error("esmfold2_trimul_spell", _spell)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not where another program has put its own
        sys.stdout.reconfigure(errors="esmfold2_trimul_spell")


class ProgressBar:
    """A progress bar on stderr, moved by calling it; a line a minute if stderr is no terminal.

    whole: the name of a second bar above it, which `overall` moves.
    """

    def __init__(self, whole: str | None = None) -> None:
        console = Console(stderr=True)
        self._whole, self._now = "", "Starting"
        self._minutes = nullcontext() if console.is_terminal else heartbeat(self._say)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            # Redirection would send stdout's text to stderr.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        if whole is not None:
            self._whole_task = self._bar.add_task(whole, total=None)
        self._task = self._bar.add_task(self._now, total=None)

    def __enter__(self) -> "ProgressBar":
        self._minutes.__enter__()
        self._bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.stop()
        self._minutes.__exit__(*exception)

    def _say(self, elapsed: str) -> None:
        print(f"{elapsed}: {self._whole}{self._now}", file=sys.stderr, flush=True)

    def __call__(self, label: str, done: int, total: int) -> None:
        self._now = f"{label} ({done} of {total} done)"
        self._bar.update(self._task, description=label, completed=done, total=total)

    def overall(self, done: int, total: int) -> None:
        """Move the bar of the whole work."""
        self._whole = f"{done} of {total} done; "
        self._bar.update(self._whole_task, completed=done, total=total)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Remove the bar from the screen while something is printed."""
        self._bar.stop()
        yield
        self._bar.start()


def print_whole(drawn: Table) -> None:
    """A table in its full width: cut to a narrow terminal it would lose numbers."""
    console = stdout()
    width = Measurement.get(console, console.options.update(width=1000), drawn).maximum
    stdout(width=max(width, console.width)).print(drawn)


def print_json(document: Any) -> None:
    print(json.dumps(_finite(document), indent=2))


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinities, which JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
