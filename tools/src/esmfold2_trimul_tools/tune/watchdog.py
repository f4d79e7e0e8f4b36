"""Ends a process that hangs: a kernel that waits for ever can't be interrupted, only left."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HUNG_SECONDS = 300


@contextmanager
def watched(what: str, seconds: float = HUNG_SECONDS) -> Iterator[None]:
    """A context that, if it takes longer, is named on stderr and ends the process with status 1."""

    def end() -> None:
        print(f"error: {what} hangs: no end after {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
