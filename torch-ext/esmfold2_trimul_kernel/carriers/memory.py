"""Which groups can exchange by copies, and the memory that they keep for it.

To map memory among the ranks takes milliseconds and all of them, so it is kept from call to call,
as large as the largest call needed it, until `free_exchange_memory`, or until its group is gone.
"""

from __future__ import annotations  # builds of torch without ProcessGroup import this too

import contextlib
import functools
import hashlib
import os
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from ..exchange import Exchange, gather
from ..paths import say_once
from .copies import PeerCopies, PeerMemory
from .driver import Queue, driver

_DEVICES = ("cuda",)
EXCHANGE_VARIABLE = "ESMFOLD2_TRIMUL_EXCHANGE"
_EXCHANGES = ("copies", "messages")
_kept: weakref.WeakKeyDictionary[dist.ProcessGroup, GroupMemory] = weakref.WeakKeyDictionary()


def memory_of(group: dist.ProcessGroup | None) -> GroupMemory | None:
    """What a group keeps; None if its messages are those of CPUs, or if it has one rank.

    The first time, all ranks of a group with GPUs tell each other where they are.
    """
    backends = dist.get_backend_config(group).split(",")
    if "cuda:nccl" not in backends or dist.get_world_size(group) == 1:
        return None
    group = dist.group.WORLD if group is None else group
    if group not in _kept:
        places = [place for (place,) in gather(group, [_place()])]
        possible = 0 not in places and len(set(places)) == 1
        _kept[group] = GroupMemory(group, possible)
    return _kept[group]


def known_memory_of(group: dist.ProcessGroup | None) -> GroupMemory | None:
    """As `memory_of`, if the group has had a call."""
    return _kept.get(dist.group.WORLD if group is None else group)


def free_exchange_memory() -> None:
    """Frees the memory that sharded calls keep on this GPU for their exchange.

    All ranks of a group must call it between the same two sharded calls. The next one takes what it
    needs again, which costs some milliseconds.
    """
    for kept in _kept.values():
        kept.drop()
        kept.refused = None


def _wants_copies() -> bool:
    """Whether to copy where that is possible.

    Raises:
        ValueError: a word in the environment variable that is none of the two.
    """
    word = os.environ.get(EXCHANGE_VARIABLE, _EXCHANGES[0])
    if word not in _EXCHANGES:
        raise ValueError(f"{EXCHANGE_VARIABLE} must be one of {_EXCHANGES}; got {word!r}")
    return word == "copies"


class GroupMemory:
    """The memory of one rank of a group; all its ranks have as much."""

    def __init__(self, group: dist.ProcessGroup, possible: bool) -> None:
        self._group = weakref.ref(group)
        self.possible = possible
        self.refused: int | None = None  # for so many bytes, or more, there was too little memory
        self._memory: PeerMemory | None = None
        self._device: torch.device | None = None
        self._token: torch.Tensor | None = None

    def bytes(self, device: torch.device) -> int:
        """The bytes kept on a device."""
        return 0 if self._memory is None or self._device != device else self._memory.bytes

    def takes(self, size: int, device: torch.device) -> bool:
        """Whether it is worth trying to have so many bytes on a device."""
        if not _wants_copies() or device.type not in _DEVICES:
            return False
        if not self.possible:
            say_once("exchanges planes by NCCL: the ranks can't map each other's memory")
        return self.possible and (self.refused is None or size < self.refused)

    def refuse(self, size: int) -> None:
        """There is too little memory for a call with so many bytes: none tries it again."""
        self.drop()
        self.refused = size if self.refused is None else min(size, self.refused)

    def drop(self) -> None:
        """Other ranks that have it mapped keep it alive until they drop theirs."""
        self._memory = None

    def grow(self, size: int, device: torch.device) -> bool:
        """Takes `size` bytes in place of what there is; all ranks call it, and get one answer."""
        group = self._group()
        self.drop()
        memory = _allocate(size, device)
        if 0 in [there for (there,) in gather(group, [memory is not None])]:
            say_once("exchanges planes by NCCL: a rank lacks memory that others can map")
            self.refuse(size)
            return False
        mapped = None
        try:
            mapped = _map(memory, group)
        except RuntimeError as error:
            say_once(f"exchanges planes by NCCL: memory can't be mapped among the ranks ({error})")
        if 0 in [there for (there,) in gather(group, [mapped is not None])]:
            say_once("exchanges planes by NCCL: memory can't be mapped among the ranks")
            self.possible = False
            return False
        self._memory, self._device = mapped, device
        self.watch()
        return True

    @contextlib.contextmanager
    def carrier(
        self, exchange: Exchange, slots: tuple[int, ...], dtype: torch.dtype, made: tuple[int, ...]
    ) -> Iterator[PeerCopies]:
        """A context for a call on the current stream; the arguments are those of `PeerCopies`."""
        streams = torch.cuda.current_stream(self._device), *_streams(self._device)
        queues = [Queue(stream) for stream in streams]
        try:
            with PeerCopies(exchange, self._memory, slots, dtype, made, *queues) as copies:
                yield copies
        except BaseException:
            self.drop()  # its words may count other steps than those of the other ranks
            raise
        self.watch()

    def watch(self) -> None:
        """Has NCCL end this process if what has been queued isn't done after the group's timeout.

        A stream that waits for the word of a rank that has died would wait for ever.
        """
        with torch.cuda.stream(_streams(self._device)[0]):
            if self._token is None or self._token.device != self._device:
                self._token = torch.zeros(1, device=self._device)
            dist.all_reduce(self._token, group=self._group(), async_op=True)


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For copies among ranks and a rank's own; of high priority, to be none of the stages'."""
    return torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device, priority=-1)


def _place() -> int:
    """A number of this host, or 0 if this process can't map memory."""
    try:
        symmetric = torch._C._distributed_c10d._SymmetricMemory
        driver()
        if torch.version.hip is not None or symmetric.get_backend(torch.device("cuda")) != "CUDA":
            return 0
    except (OSError, AttributeError, RuntimeError):
        return 0
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = ""
    name = f"{socket.gethostname()} {boot}".encode()
    return 1 + int.from_bytes(hashlib.blake2b(name, digest_size=7).digest(), "big")


def _allocate(size: int, device: torch.device) -> torch.Tensor | None:
    """Memory that can be mapped, whose words are 0, or None if there is too little."""
    for attempt in (1, 2):
        try:
            memory = torch._C._distributed_c10d._SymmetricMemory.empty_strided_p2p(
                (size,), (1,), torch.uint8, device
            )
            memory.zero_()
            torch.cuda.synchronize(device)
            return memory
        except RuntimeError:
            if attempt == 1:
                torch.cuda.empty_cache()  # the driver doesn't take what torch has cached
    return None


def _map(memory: torch.Tensor, group: dist.ProcessGroup) -> PeerMemory:
    """The memory of all ranks."""
    from torch.distributed import _symmetric_memory

    handle = _symmetric_memory.rendezvous(memory, group)
    rank, shape = dist.get_rank(group), memory.shape
    peers = [
        memory if of == rank else handle.get_buffer(of, shape, torch.uint8)
        for of in range(dist.get_world_size(group))
    ]
    return PeerMemory(peers, rank, handle)
