"""A schedule run without a device: its launches are recorded, and its memory is counted.

The tensors of a rehearsal are meta tensors with the addresses of the real ones, so that each launch
is prepared as in a real call.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .device import DeviceTarget, standing_in
from .launch import Launches, PreparedLaunch

_ADDRESSES = 2**62  # bytes, above any address; none is allocated


class WrittenLaunches(Launches):
    """Launches that are prepared, and given to `_write_down` with their tensors, not launched."""

    def of(
        self, key: tuple, prepare: Callable[..., PreparedLaunch], *arguments: Any
    ) -> PreparedLaunch:
        if key not in self:
            prepared = super().of(key, prepare, *arguments)
            prepared.launch = functools.partial(self._write_down, prepared)
        return self[key]

    def _write_down(self, prepared: PreparedLaunch, **tensors: Tensor | None) -> None:
        raise NotImplementedError


class Rehearsal(WrittenLaunches):
    """Launches that are only prepared, and memory that is only counted.

    Its tensors must be on the meta device; `twin` makes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[PreparedLaunch, dict[str, Tensor | None]]] = []
        self.buffers: dict[str, int] = {}  # bytes by name, the most at once
        self.peak = 0  # bytes
        self._now: dict[str, int] = {}

    def _write_down(self, prepared: PreparedLaunch, **tensors: Tensor | None) -> None:
        if all(prepared is not earlier for earlier, _ in self.launched):
            # Twins, because the tensors themselves would keep counted memory alive.
            twins = {name: None if t is None else twin(t) for name, t in tensors.items()}
            self.launched.append((prepared, twins))

    def empty(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        memory = super().empty(name, shape, dtype, device)
        size = memory.nbytes
        self._now[name] = self._now.get(name, 0) + size
        self.buffers[name] = max(self.buffers.get(name, 0), self._now[name])
        self.peak = max(self.peak, sum(self._now.values()))
        # Views share the storage, not the tensor.
        weakref.finalize(memory.untyped_storage(), self._free, name, size)
        return memory

    def _free(self, name: str, size: int) -> None:
        self._now[name] -= size


@contextlib.contextmanager
def rehearsal(target: DeviceTarget) -> Iterator[Rehearsal]:
    """A rehearsal whose meta tensors stand for tensors on a device of this target."""
    with standing_in(target):
        yield Rehearsal()


def twin(tensor: Tensor) -> Tensor:
    """A meta tensor of the same shape, strides, dtype, address and size of storage.

    Triton compiles for these: on AMD, kernels index less than 2 GiB with 32-bit offsets.
    """
    memory = torch.empty(_ADDRESSES, dtype=torch.uint8, device="meta").view(tensor.dtype)
    start = tensor.data_ptr() // tensor.element_size()
    found = memory.as_strided(tensor.shape, tensor.stride(), start)
    found.untyped_storage().resize_(tensor.untyped_storage().nbytes())
    return found
