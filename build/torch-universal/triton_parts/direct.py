"""Launches of what is compiled, without encoding its tensor descriptors again.

Triton's own launch walks over all arguments in Python, encodes each descriptor, makes what a
profiler's hooks would get, and calls the hooks, of which there are none as a rule. With several
descriptors that is most of the host's time. Here a descriptor keeps its encoding.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.runtime import driver

from .settings import release

_KNOWN = ((3, 6), (3, 9))  # the first and the last Triton whose launcher is called here
_ENCODED = "esmfold2_trimul_encoded"  # in a descriptor's __dict__


def direct(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """`compiled[grid]`, of Triton's compiled kernel: a function of all arguments in their order.

    Descriptors must not change once they were launched with. Where the launcher isn't one that is
    known here, and while a hook is set, it is Triton's own function.
    """
    usual, parts = compiled[grid], _parts_of(compiled)
    if parts is None:
        return usual
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    launcher, options = parts.launcher, (run.launch_cooperative_grid, run.launch_pdl)
    as_one = hasattr(run, "kernel_signature")  # all arguments, with their types: from Triton 3.7 on

    def launch(*arguments: Any) -> None:
        if _is_set(knobs.runtime.launch_enter_hook) or _is_set(knobs.runtime.launch_exit_hook):
            usual(*arguments)
            return
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        encoded = _encoded(arguments, parts)
        # The five are what hooks would get, both hooks, and scratch memory, the kernel's and a
        # profiler's.
        if as_one:
            launcher(
                *grid, stream, function, *options, metadata, None, None, None, None, None,
                run.arg_annotations, run.kernel_signature, encoded,
            )  # fmt: skip
        else:
            launcher(
                *grid, stream, function, *options, None, None, metadata, None, None, None, *encoded
            )

    return launch


class _Parts(NamedTuple):
    """What Triton's launch of a kernel is made of."""

    launcher: Callable[..., None]  # takes encoded arguments
    places: list[int]  # of descriptors among the arguments
    metas: Sequence[Any]  # how each is encoded
    encode: Callable[..., list[Any]]


def _parts_of(compiled: Any) -> _Parts | None:
    """None if the launcher isn't one that is known here, or wants memory of its own."""
    run = compiled.run
    if not _KNOWN[0] <= release(triton.__version__) <= _KNOWN[1]:
        return None
    try:
        from triton.backends.nvidia import driver as nvidia
    except ImportError:
        return None
    if not isinstance(run, nvidia.CudaLauncher) or getattr(run, "gsan_enabled", False):
        return None
    types = list(compiled.src.signature.values())
    places = [
        place for place, kind in enumerate(types) if isinstance(kind, str) and "tensordesc" in kind
    ]
    launcher, metas = run.launch, []
    if places:
        if not inspect.isfunction(launcher):
            return None
        inside = inspect.getclosurevars(launcher).nonlocals
        launcher, metas = inside.get("launcher"), inside.get("tensordesc_meta") or []
    if (
        launcher is None
        or len(metas) != len(places)
        or any(meta is None for meta in metas)
        or run.global_scratch_size
        or run.profile_scratch_size
    ):
        return None
    others = len(inspect.signature(nvidia.make_tensordesc_arg).parameters) - 2

    def encode(descriptor: Any, meta: Any) -> list[Any]:
        return nvidia.make_tensordesc_arg(descriptor, meta, *[None] * others)

    return _Parts(launcher, places, metas, encode)


def _is_set(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


def _encoded(arguments: Sequence[Any], parts: _Parts) -> list[Any]:
    """The arguments with descriptors encoded, which they remember."""
    found, after = [], 0
    for place, meta in zip(parts.places, parts.metas, strict=True):
        descriptor = arguments[place].__dict__
        known = descriptor.get(_ENCODED)
        if known is None:
            known = descriptor[_ENCODED] = parts.encode(arguments[place], meta)
        found += arguments[after:place]
        found += known
        after = place + 1
    found += arguments[after:]
    return found
