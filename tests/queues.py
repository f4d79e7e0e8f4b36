"""Queues in place of a GPU's streams, for `carriers.copies`."""

import ctypes
import queue
import random
import threading
import time

import torch
from fresh_process import HUNG_SECONDS


def reached(word: torch.Tensor, value: int) -> bool:
    """As the driver compares: the difference has 32 bits with a sign."""
    return ctypes.c_int32(word.item() - value).value >= 0


class Tasks:
    """What both kinds have; a subclass's `put` does a task."""

    def mark(self) -> threading.Event:
        mark = threading.Event()
        self.put(mark.set)
        return mark

    def follow(self, mark: threading.Event) -> None:
        self.put(mark.wait)

    def copy(self, to: torch.Tensor, of: torch.Tensor) -> None:
        assert to[0].is_contiguous() and of[0].is_contiguous() if len(to) else True
        self.put(lambda: to.copy_(of))

    def signal(self, words, value, own) -> None:
        assert 0 <= value < 2**32 and own.dtype == torch.int32
        for word in words:
            self.put(lambda word=word: word.fill_(ctypes.c_int32(value).value))

    def await_words(self, words, value) -> None:
        def until(word):
            start = time.monotonic()
            while not reached(word, value):
                time.sleep(1e-5)
                if time.monotonic() > start + HUNG_SECONDS:
                    raise RuntimeError("a queue waits for ever")

        for word in words:
            self.put(lambda word=word: until(word))


class Thread(Tasks):
    """Does what is queued in order, in a thread, after pauses of random length."""

    def __init__(self, seed: int, pauses: tuple[float, ...] = (0, 0, 0, 1e-4, 2e-3)) -> None:
        self._tasks, self._random, self._pauses = queue.SimpleQueue(), random.Random(seed), pauses
        self.failure = None
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            time.sleep(self._random.choice(self._pauses))
            try:
                task()
            except Exception as error:
                self.failure = error

    def put(self, task) -> None:
        """None ends it."""
        self._tasks.put(task)


class AtOnce(Tasks):
    """Does everything in the caller's thread, as a CPU does its stages."""

    def put(self, task) -> None:
        task()
