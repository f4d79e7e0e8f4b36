"""A loop over blocks as one parallel region of PyTorch's threads, each with blocks of its own.

PyTorch runs an operation on all threads, which wait for each other at its end. A call over blocks
waits some hundreds of times. Where other programs keep the cores busy, each wait lasts until the
scheduler has let every thread run, and a call takes many times as long as on an idle machine. Here
a whole loop is one OpenMP region of the runtime that PyTorch uses, opened as a compiler opens
`#pragma omp parallel`. Within it every operation stays on the thread that calls it.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from itertools import count
from threading import Condition
from typing import Any, TypeVar

import torch

Block = TypeVar("Block")
_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _gomp_parallel() -> Callable | None:
    """The function that opens a region, by GCC's name, which LLVM and Intel have too."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another runtime, or Windows
        return None
    function.argtypes = (_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    function.restype = None
    return function


def region_threads(device: torch.device) -> int:
    """The threads of a region for work on `device`: 1 if no region can be opened."""
    if device.type != "cpu" or _gomp_parallel() is None:
        return 1
    return torch.get_num_threads()


def for_each(
    blocks: Sequence[Block],
    work: Callable[[Block], Any],
    threads: int,
    collect: Callable[[Any], None] | None = None,
) -> None:
    """Calls work(block) for all blocks, on up to `threads` threads, each block on one of them.

    `collect` gets the results one at a time and in the order of the blocks, so that equal calls
    give equal sums. With one thread or one block, PyTorch runs the operations of `work` as it
    always does. An exception of `work` ends the loop and is raised here.
    """
    threads = min(threads, len(blocks))
    if threads < 2:
        for block in blocks:
            found = work(block)
            if collect is not None:
                collect(found)
        return
    inference, indices, errors = torch.is_inference_mode_enabled(), count(), []
    turn = Condition()
    due = 0  # the block whose result is collected next

    def take_blocks() -> None:
        nonlocal due
        while not errors and (index := next(indices)) < len(blocks):
            found = work(blocks[index])
            if collect is None:
                continue
            with turn:
                turn.wait_for(lambda: errors or due == index)  # noqa: B023
                if not errors:
                    collect(found)
                due = index + 1
                turn.notify_all()

    def body(_: int | None) -> None:
        try:
            # These modes belong to a thread.
            with torch.inference_mode(inference), torch.no_grad():
                take_blocks()
        except BaseException as error:
            with turn:
                errors.append(error)
                turn.notify_all()

    _gomp_parallel()(_BODY(body), None, threads, 0)
    if errors:
        raise errors[0]
