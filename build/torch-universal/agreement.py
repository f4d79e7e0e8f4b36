"""What the ranks must agree on before they exchange anything, and how they compare it."""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import struct
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist

from ._call import DIFFERENTIABLE
from .carriers.memory import memory_of
from .exchange import gather
from .validation import (
    COMPUTE_DTYPES,
    DIRECTIONS,
    MEMORY_MODES,
    PARAMETER_GRADS,
    RECOMPUTE_MODES,
)

# What the ranks must agree on, lest they wait for each other or compute nonsense; and the words of
# what is no number.
_FACTS = (
    "pass", "call", "B", "L", "C", "D", "dim", "dtype", "direction", "precision", "memory",
    "inplace", "path", "lengths", "eps", "eps_out", "requires_grad", "recompute",
    "parameter_grads", "gradients", "exchange_memory", "mapped",
    "mask", "residual", "exchanged_gradients",
)  # fmt: skip
_WORDS = {
    "pass": ("forward", "backward"),
    "dtype": COMPUTE_DTYPES,
    "direction": DIRECTIONS,
    "precision": ("default", "fp32", "tf32", "tf32x3", "ieee", "bf16", "fp16x3"),
    "memory": MEMORY_MODES,
    "inplace": (False, True),
    "path": ("aten", "triton"),
    "lengths": (False, True),
    "requires_grad": (False, True),
    "recompute": RECOMPUTE_MODES,
    "parameter_grads": PARAMETER_GRADS,
    # These where blocks of them are exchanged; a mask by its dtype.
    "mask": (
        None, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
    ),
    "residual": (False, True),
    "exchanged_gradients": tuple([
        some for count in range(4) for some in combinations(("pair", "mask", "residual"), count)
    ]),
}


def compare(
    group: dist.ProcessGroup | None,
    facts: dict[str, Any],
    failure: Exception | None,
    last: bool,
) -> bool:
    """Whether all ranks are ready; not `last`, they may be out of memory, which another mode helps.

    Raises:
        Exception: this rank's own `failure`.
        torch.OutOfMemoryError, ValueError: another rank's, or different facts.
    """
    state = 0
    if failure is not None:  # out of memory before there are facts, a rank knows no other mode
        lost = facts and isinstance(failure, torch.OutOfMemoryError)
        state = (3 if last else 2) if lost else 1
    numbers = [_as_integer(name, facts[name]) if name in facts else 0 for name in _FACTS]
    of_all = gather(group, [state, *numbers])
    states, *columns = zip(*of_all, strict=True)
    if failure is not None and (state == 1 or last):
        try:
            raise failure
        finally:
            failure = None  # its traceback holds this frame
    if 1 in states:
        raise ValueError(
            f"every rank's arguments must fit; rank {states.index(1)} of {len(states)} refused its "
            "own, and raises why"
        )
    for state in (3, 2):
        if state in states and (last or state == 3):
            raise torch.OutOfMemoryError(
                f"rank {states.index(state)} of {len(states)} is out of memory"
            )
    for name, values in zip(_FACTS, columns, strict=True):
        if len(set(values)) > 1:
            got = [_from_integer(name, value) for value in values]
            raise ValueError(
                f"all ranks must have the same {name}; got "
                + ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(got))
            )
    return 2 not in states


def refuse(group: dist.ProcessGroup | None, failure: Exception) -> None:
    """Raises `failure`, and on the other ranks, which compare, an error that names this one."""
    memory_of(group)  # the others begin a call with it
    compare(group, {}, failure, last=True)


def _as_integer(name: str, value: Any) -> int:
    """One of the `_FACTS` as the ranks compare it; a float by its bits, names by theirs."""
    if isinstance(value, float):
        return struct.unpack("q", struct.pack("d", value))[0]
    if name == "gradients":
        return sum([1 << at for at, of in enumerate(DIFFERENTIABLE) if of in value])
    return _WORDS[name].index(value) if name in _WORDS else value


def _from_integer(name: str, value: int) -> Any:
    if name in ("eps", "eps_out"):
        return struct.unpack("d", struct.pack("q", value))[0]
    if name == "gradients":
        return [of for at, of in enumerate(DIFFERENTIABLE) if value >> at & 1]
    return _WORDS[name][value] if name in _WORDS else value
