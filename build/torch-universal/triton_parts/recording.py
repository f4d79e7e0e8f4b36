"""A schedule recorded once, and played back for every other call of its kind.

Between its launches a schedule cuts tensors into planes and rows, makes buffers and looks launches
up. All this is the same for each call of a kind, and takes the host longer than the launches do. A
recording has the launches alone, each with the places of its tensors: so many bytes behind the
beginning of an argument, of an output, or of the workspace, which holds all other buffers.

It is made on the meta device, as a rehearsal. A schedule that has torch compute something can't be
recorded; it runs as it is.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .device import device_target, standing_in
from .direct import DirectLaunch, current_stream, is_hooked
from .launch import Launches, Place, PlacedLaunch, PreparedLaunch
from .rehearsal import WrittenLaunches, twin

_ALLOCATE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_ALIGNMENT = 256  # bytes, of each buffer in the workspace
# The sets of addresses, more than a model has layers, of which a recording keeps all launches: some
# 10 to 20 kB each.
_MOST_KEPT = 64

Schedule = Callable[[Launches, Sequence[Any]], list[Tensor]]


def run_recorded(launches: Launches, schedule: Schedule, arguments: Sequence[Any]) -> list[Tensor]:
    """schedule(launches, arguments), whose outputs are tensors that it makes.

    Args:
        launches: of calls of this kind.
        schedule: runs on the meta device too, and does the same for all calls of a kind.
        arguments: tensors, or what is the same for all calls of a kind; the first is a tensor.
    """
    if launches.recording is None:
        launches.recording = record(schedule, arguments)
    if isinstance(launches.recording, Recording):
        return launches.recording.play(arguments)
    return schedule(launches, arguments)


def record(schedule: Schedule, arguments: Sequence[Any]) -> "Recording | str":
    """The recording, or the op that the schedule has torch compute."""
    twins = [twin(value) if isinstance(value, Tensor) else value for value in arguments]
    memories, launches = _Memories(twins), _Recorder()
    launches.memories = memories
    with standing_in(device_target(arguments[0].device)), torch.no_grad():
        try:
            with memories:
                outputs = schedule(launches, twins)
        except _Computes as computes:
            return str(computes)
    made = [memories.number_of(output) for output in outputs]
    found = Recording(launches.steps, memories, made, outputs)
    # What is left of the recording would keep these.
    for prepared in launches.values():
        del prepared.launch
    return found


class Recording:
    """The launches of a schedule."""

    def __init__(
        self,
        steps: list[tuple[PreparedLaunch, dict[str, Place | None]]],
        memories: "_Memories",
        made: list[int],
        outputs: list[Tensor],
    ) -> None:
        self._outputs = [(output.shape, output.dtype) for output in outputs]
        offsets, self._bytes = packed(memories.events, set(made))
        # The memories are the arguments, the outputs, and the workspace.
        first = memories.arguments
        numbers = {number: first + place for place, number in enumerate(made)}
        workspace = first + len(made)

        def place_in(place: Place | None) -> Place | None:
            if place is None or place.memory < first:
                return place
            number, at = numbers.get(place.memory, workspace), offsets.get(place.memory, 0)
            return place._replace(memory=number, offset=place.offset + at)

        self._steps = [
            PlacedLaunch(prepared, {name: place_in(place) for name, place in places.items()})
            for prepared, places in steps
        ]
        # By the addresses of all memories: an allocator gives the same ones again and again.
        self._kept: dict[tuple[int, ...], list[tuple[DirectLaunch, tuple[Any, ...]]]] = {}

    def play(self, arguments: Sequence[Any]) -> list[Tensor]:
        """The outputs, for arguments like those of the recording."""
        device = arguments[0].device
        outputs = [torch.empty(s, dtype=dtype, device=device) for s, dtype in self._outputs]
        memories = [*arguments, *outputs]
        if self._bytes:
            memories.append(torch.empty(self._bytes, dtype=torch.uint8, device=device))
        addresses = tuple([t.data_ptr() if isinstance(t, Tensor) else 0 for t in memories])
        kept = self._kept.get(addresses)
        if kept is None or is_hooked():
            made = [step.launch(memories, addresses) for step in self._steps]
            if None not in made:
                if len(self._kept) >= _MOST_KEPT:
                    self._kept.clear()
                self._kept[addresses] = made
        else:
            stream = current_stream()
            for launch, encoded in kept:
                launch.again(encoded, stream)
        return outputs


def packed(
    events: Sequence[tuple[int, int | None]], without: set[int]
) -> tuple[dict[int, int], int]:
    """Where buffers lie in a workspace, by their numbers, and its size.

    `events` are (number, bytes) of a buffer that is made, and (number, None) of one that is freed,
    in their order. The largest buffer is placed first, each in the first gap that it fits.
    """
    sizes, lives = {}, {}
    for time, (number, size) in enumerate(events):
        if number in without:
            continue
        if size is None:
            lives[number] = lives[number][0], time
        else:
            lives[number] = time, len(events)
            sizes[number] = -(-size // _ALIGNMENT) * _ALIGNMENT
    offsets, total = {}, 0
    for number in sorted(sizes, key=lambda number: -sizes[number]):
        made, freed = lives[number]
        taken = sorted([
            (offset, offset + sizes[other])
            for other, offset in offsets.items()
            if made < lives[other][1] and lives[other][0] < freed
        ])
        start = 0
        for begin, end in taken:
            if begin - start >= sizes[number]:
                break
            start = max(start, end)
        offsets[number], total = start, max(total, start + sizes[number])
    return offsets, total


class _Computes(Exception):
    """An op that is neither a view nor memory."""


class _Memories(TorchDispatchMode):
    """Numbers the storages of arguments, and those that are made in this context, in order."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self.events: list[tuple[int, int | None]] = []
        self.arguments = len(arguments)
        self._arguments = arguments
        self._count = self.arguments
        self._numbers = {
            _identity(value): number
            for number, value in enumerate(arguments)
            if isinstance(value, Tensor)
        }

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if function._schema.is_mutable:
            raise _Computes(name)
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if _identity(tensor) not in self._numbers:
                if name not in _ALLOCATE:
                    raise _Computes(name)
                self._add(tensor)
        return made

    def _add(self, tensor: Tensor) -> None:
        number, identity = self._count, _identity(tensor)
        self._numbers[identity] = number
        self._count += 1
        self.events.append((number, tensor.untyped_storage().nbytes()))
        # Views share the storage, not the tensor.
        weakref.finalize(tensor.untyped_storage(), self._free, number, identity)

    def _free(self, number: int, identity: int) -> None:
        self.events.append((number, None))
        del self._numbers[identity]

    def number_of(self, tensor: Tensor) -> int:
        """The number of a tensor's storage."""
        return self._numbers[_identity(tensor)]

    def place_of(self, tensor: Tensor) -> Place:
        """Where a tensor lies."""
        number = self.number_of(tensor)
        offset = _offset(tensor)
        if number < self.arguments:
            offset -= _offset(self._arguments[number])
        return Place(number, offset, tensor.dtype, tensor.shape, tensor.stride())


def _offset(tensor: Tensor) -> int:
    """In bytes, behind the beginning of its storage."""
    return tensor.storage_offset() * tensor.element_size()


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recorder(WrittenLaunches):
    """Launches that are prepared, and written down in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[PreparedLaunch, dict[str, Place | None]]] = []
        self.memories: _Memories

    def _write_down(self, prepared: PreparedLaunch, **tensors: Tensor | None) -> None:
        place_of = self.memories.place_of
        places = {name: None if t is None else place_of(t) for name, t in tensors.items()}
        self.steps.append((prepared, places))
