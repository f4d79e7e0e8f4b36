"""A message once a minute from work that would otherwise be silent for long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def heartbeat(say: Callable[[str], None], seconds: float = 60) -> Iterator[None]:
    """A context in which a thread calls say("3 min") and so on every `seconds`."""
    over = threading.Event()

    def beat() -> None:
        elapsed = 0.0
        while not over.wait(seconds):
            elapsed += seconds
            say(f"{elapsed / 60:.0f} min")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
