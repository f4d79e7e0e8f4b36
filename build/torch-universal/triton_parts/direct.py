"""Launches of what is compiled, without encoding its tensor descriptors again.

Triton's own launch walks over all arguments in Python, encodes each descriptor, makes what a
profiler's hooks would get, and calls the hooks, of which there are none as a rule. With several
descriptors that is most of the host's time. Here a descriptor keeps its encoding.
"""

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver

from .settings import release

_KNOWN = ((3, 6), (3, 9))  # the first and the last Triton whose launcher is called here
_ENCODED = "esmfold2_trimul_encoded"  # in a descriptor's __dict__


class _Bound(threading.local):
    """The devices whose context a thread has had."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_bound = _Bound()


def direct(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """`compiled[grid]`, of Triton's compiled kernel: a function of all arguments in their order.

    Descriptors must not change once they were launched with. Where the launcher isn't one that is
    known here it is Triton's own function, elsewhere a `DirectLaunch`.
    """
    parts = _parts_of(compiled)
    return compiled[grid] if parts is None else DirectLaunch(compiled, grid, parts)


class DirectLaunch:
    """Launches a compiled kernel with all arguments in their order; with a hook set, Triton does.

    What it makes of arguments can be kept, to launch with them again.
    """

    def __init__(self, compiled: Any, grid: tuple[int, int, int], parts: "_Parts") -> None:
        self._usual, self._grid, self._parts = compiled[grid], grid, parts
        run, metadata = compiled.run, compiled.packed_metadata
        options = run.launch_cooperative_grid, run.launch_pdl
        # All arguments as one, with their types: from Triton 3.7 on.
        self._as_one = hasattr(run, "kernel_signature")
        # The five None are what hooks would get, both hooks, and scratch memory, the kernel's and a
        # profiler's.
        if self._as_one:
            others = metadata, None, None, None, None, None, run.arg_annotations
            self._others = compiled.function, *options, *others, run.kernel_signature
        else:
            others = None, None, metadata, None, None, None
            self._others = compiled.function, *options, *others

    def __call__(self, *arguments: Any) -> None:
        if is_hooked():
            self._usual(*arguments)
        else:
            self.again(self.encoded(arguments), current_stream())

    def encoded(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """What the launcher takes behind the stream."""
        found = _encoded(arguments, self._parts)
        return (*self._others, found) if self._as_one else (*self._others, *found)

    def again(self, encoded: tuple[Any, ...], stream: int) -> None:
        """Launches with encoded arguments, on a stream."""
        self._parts.launcher(*self._grid, stream, *encoded)


def current_stream() -> int:
    """Of the current device, by the driver that Triton launches with."""
    active = driver.active
    return active.get_current_stream(active.get_current_device())


def bind_context() -> None:
    """Gives this thread the current device's context, without which no descriptor is encoded.

    PyTorch's thread of backward passes has none on the first device before it calls CUDA, which it
    needn't do if memory is there (pytorch#195256). Triton's own launch binds it once it has
    encoded.
    """
    if not torch.cuda.is_initialized():
        return
    device = torch.cuda.current_device()
    if device not in _bound.devices:
        torch.cuda.Event().record()
        _bound.devices.add(device)


def is_hooked() -> bool:
    """Whether Triton has a hook, which only its own launch calls."""
    return _is_set(knobs.runtime.launch_enter_hook) or _is_set(knobs.runtime.launch_exit_hook)


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
