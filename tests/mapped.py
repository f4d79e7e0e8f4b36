"""Memory of several processes, and threads, in place of GPUs' for `carriers.memory`.

The ranks' own streams are their hosts, which wait where a GPU's stream would: so the copies also
show that nothing depends on more than one thing at a time being done.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
from queues import AtOnce, Thread
from ranks import Rank


def exchange_by(word: str):
    """A context in which this rank wants planes to be carried by "messages" or "copies"."""
    return mock.patch.dict(os.environ, {"ESMFOLD2_TRIMUL_EXCHANGE": word})


def packed(on: Rank):
    """A context in which messages are packed, as NCCL's are where they are short."""
    return mock.patch.object(on.kernel.exchange.Exchange, "packs", lambda *_: True)


@contextlib.contextmanager
def mapped(on: Rank):
    """A context in which groups exchange by copies; it counts what happens."""
    memory, gather = on.kernel.carriers.memory, on.kernel.exchange.gather
    seen = SimpleNamespace(taken=[], mapped=0, watched=0, short=(), lost=())
    streams = Thread(on.rank), Thread(on.rank + 100)
    base = Path(tempfile.gettempdir(), f"mapped-{os.getppid()}")

    def allocate(size, device):
        seen.taken.append(size)
        if on.rank in seen.short:
            return None
        return torch.from_file(f"{base}-{on.rank}", shared=True, size=size, dtype=torch.uint8)

    def map_all(own, group):
        ranks = range(dist.get_world_size(group))
        gather(group, [0])  # every file is there
        peers = [
            own if rank == on.rank else torch.from_file(
                f"{base}-{rank}", shared=True, size=len(own), dtype=torch.uint8
            )
            for rank in ranks
        ]
        gather(group, [0])  # and open
        Path(f"{base}-{on.rank}").unlink()
        if on.rank in seen.lost:
            raise RuntimeError("no access to a peer")
        seen.mapped += 1
        return memory.PeerMemory(peers, on.rank)

    def watch(self):
        seen.watched += 1

    replaced = [
        (memory, "_allocate", allocate),
        (memory, "_map", map_all),
        (memory, "_place", lambda: 1),
        (memory, "_DEVICES", ("cpu",)),
        (memory, "_streams", lambda device: streams),
        (memory, "Queue", lambda stream: stream),
        (memory.GroupMemory, "watch", watch),
        (dist, "get_backend_config", lambda group: "cpu:gloo,cuda:nccl"),
        (torch.cuda, "current_stream", lambda device: AtOnce()),
    ]
    before = [(of, name, getattr(of, name)) for of, name, _ in replaced]
    for of, name, value in replaced:
        setattr(of, name, value)
    try:
        with exchange_by("copies"):
            yield seen
    finally:
        for of, name, value in before:
            setattr(of, name, value)
        memory._kept.clear()
        for stream in streams:
            stream.put(None)
            assert stream.failure is None, stream.failure
