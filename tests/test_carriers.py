"""The carriers of a sharded call's planes, without GPUs."""

import ctypes
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from fresh_process import HUNG_SECONDS
from queues import Thread


class Stages:
    """Stages of whole numbers on a queue; what they no longer need becomes NaN."""

    slots, moments = 3, True

    def __init__(self, main: Thread, x: torch.Tensor) -> None:
        self._main, self._x, self.pitch = main, x, x.shape[2]  # [B, R, L, D]

    def project(self, index, planes, channels=slice(None)) -> None:
        def run():
            a = self._x[index].permute(2, 0, 1)[channels]
            planes[0].copy_(a)
            planes[1].copy_(2 - a)

        self._main.put(run)

    def multiply(self, index, a, b, product) -> None:
        def run():
            product.fill_(torch.nan)
            made = a @ b.transpose(1, 2)
            time.sleep(1e-3)
            product.copy_(made)
            a.fill_(torch.nan)
            b.fill_(torch.nan)

        self._main.put(run)

    def emit(self, index, product, out) -> None:
        def run():
            out.copy_(product.permute(1, 2, 0))
            product.fill_(torch.nan)

        self._main.put(run)


def whole(length, hidden, batch, by_columns):
    """x [B, L, L, D], and what the stages make of it on one process."""
    x = torch.randint(-3, 4, (batch, length, length, hidden), dtype=torch.float64)
    planes = x.permute(0, 3, 1, 2)
    a, b = (2 - planes, planes) if by_columns else (planes, 2 - planes)
    return x, (a @ b.transpose(2, 3)).permute(0, 2, 3, 1)


class Host:
    """A rank's host, which queues calls one after another on the same memory."""

    def __init__(self, submodule, memories, rank, first_count, slow) -> None:
        self._parts = [
            submodule(of) for of in ("carriers.copies", "exchange", "sharded_schedule.forward")
        ]
        self._ranks, self._rank = len(memories), rank
        self._memory = self._parts[0].PeerMemory(memories, rank)
        self._memory.calls = self._memory.steps = first_count
        self._pauses = (1e-3, 8e-3) if slow else (0, 0, 0, 1e-4, 2e-3)
        self.queues = [Thread(rank, self._pauses), Thread(rank + 100, self._pauses)]
        self._kept, self.outs = [], []

    def call(self, x, hidden, lean, by_columns) -> None:
        copies, exchange, schedule = self._parts
        length, (side, own) = x.shape[1], self.queues[:2]
        main = Thread(len(self.queues), self._pauses)  # each call may have another stream
        self.queues.append(main)
        layout = exchange.Layout(self._ranks, length, hidden)
        call = SimpleNamespace(
            x=x[:, layout.rows(self._rank)], residual=None, inplace=False, hidden=hidden,
            memory="lean" if lean else "default",
        )  # fmt: skip
        stages = Stages(main, call.x)
        slots = 1 if lean or layout.groups == 1 else 2, 3, layout.size, length, length
        assert self._memory.bytes >= self._memory.bytes_for(self._ranks, slots, x.dtype)
        of_ranks = exchange.Exchange(None, self._rank, layout)
        buffers = schedule.allocate(call, stages, of_ranks, schedule.Way(lean, slots, 1))
        for tensor in (buffers.planes, buffers.product[0], buffers.out):
            tensor.fill_(torch.nan)
        self._kept.append(buffers)  # the queues are behind
        self.outs.append(buffers.out)
        schedule.project(stages, layout, buffers, 0, 0)
        queues = main, side, own
        with copies.PeerCopies(of_ranks, self._memory, slots, x.dtype, (2,), *queues) as carrier:
            schedule._run_stages(stages, of_ranks, carrier, buffers, by_columns, False)


def run_calls(submodule, ranks, calls, first_count=0) -> None:
    """Calls of (L, D, B, lean, by_columns) on ranks that are threads, against one process."""
    memories = [torch.full((1 << 18,), 255, dtype=torch.uint8) for _ in range(ranks)]
    for memory in memories:
        memory[:1024].view(torch.int32).fill_(ctypes.c_int32(first_count).value)
    problems = [whole(length, hidden, batch, way[-1]) for length, hidden, batch, *way in calls]
    hosts = [
        Host(submodule, memories, rank, first_count, slow=rank == ranks - 1)
        for rank in range(ranks)
    ]
    failures = []

    def work(host):
        try:
            for (_, hidden, _, lean, by_columns), (x, _) in zip(calls, problems, strict=True):
                host.call(x, hidden, lean, by_columns)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(host,)) for host in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queues = [of for host in hosts for of in host.queues]
    assert all(of.mark().wait(HUNG_SECONDS) for of in queues), "a queue waits for ever"
    failures += [of.failure for of in queues if of.failure]
    for of in queues:
        of.put(None)
    assert not failures, failures
    for at, (_, wanted) in enumerate(problems):
        got = torch.cat([host.outs[at] for host in hosts], 1)
        assert torch.equal(got, wanted), f"call {at} of {ranks} ranks"


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_copies_and_signals(submodule, ranks):
    """Queues of any speed, one of them slow; ragged rows and channels, ranks without either."""
    run_calls(submodule, ranks, [
        (8, 32, 1, False, False), (7, 37, 2, False, True), (7, 37, 2, True, False),
        # t of the first lies where the others' rows of a do in the second
        (5, ranks, 1, False, False), (11, 64, 1, True, True), (3, 3, 1, False, False),
    ])  # fmt: skip


def test_counts_wrap_around(submodule):
    run_calls(submodule, 2, [(6, 32, 2, False, False), (6, 32, 1, True, False)], 2**32 - 9)


class Library:
    """In place of libcuda: copies and words of a CPU's memory, in order."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.waited = code, []

        def copy(to, of, count, _):
            ctypes.memmove(to, of, count)
            return self.code

        def copy_planes(reference, _):
            shape = reference._obj
            assert shape.srcMemoryType == shape.dstMemoryType == 2
            for row in range(shape.Height):
                to = shape.dstDevice + row * shape.dstPitch
                ctypes.memmove(to, shape.srcDevice + row * shape.srcPitch, shape.WidthInBytes)
            return self.code

        def write(_, word, value, flags):
            assert flags == 0
            ctypes.c_uint32.from_address(word).value = value
            return self.code

        def wait(_, word, value, flags):
            self.waited.append((ctypes.c_uint32.from_address(word).value, value, flags))
            return self.code

        def words(code, place):
            place._obj.value = b"the driver's words"
            return 0

        self.cuMemcpyDtoDAsync_v2, self.cuMemcpy2DAsync_v2 = copy, copy_planes
        self.cuStreamWriteValue32_v2, self.cuStreamWaitValue32_v2 = write, wait
        self.cuGetErrorString = words


@pytest.fixture
def queue_of(submodule, monkeypatch):
    """A `driver.Queue` on a library."""
    driver = submodule("carriers.driver")

    def make(library):
        monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)
        driver.driver.cache_clear()
        return driver.Queue(SimpleNamespace(cuda_stream=7))

    yield make
    driver.driver.cache_clear()


@pytest.mark.parametrize("most_pitch", [2**31 - 1, 100], ids=["one copy", "plane by plane"])
def test_the_driver_copies_rows_of_planes(queue_of, submodule, monkeypatch, most_pitch):
    """By the structure of cuda.h, or by a copy for each plane where planes are huge."""
    driver = submodule("carriers.driver")
    monkeypatch.setattr(driver, "_MOST_PITCH", most_pitch)
    of_structure = driver._Copy2D
    assert ctypes.sizeof(of_structure) == 128
    assert [getattr(of_structure, name).offset for name in ("srcDevice", "srcPitch")] == [32, 48]
    assert [getattr(of_structure, name).offset for name in ("dstDevice", "dstPitch")] == [88, 104]
    queue = queue_of(Library())
    whole, part = torch.zeros(3, 7, 16), torch.randn(3, 2, 16)
    queue.copy(whole[:, 4:6], part)
    assert torch.equal(whole[:, 4:6], part) and whole.count_nonzero() == part.numel()
    back = torch.empty_like(part)
    queue.copy(back, whole[:, 4:6])
    queue.copy(whole[:0], part[:0])
    queue.copy(whole[:, :0], part[:, :0])
    assert torch.equal(back, part)


def test_the_driver_signals(queue_of):
    library = Library()
    queue, words = queue_of(library), torch.zeros(3, dtype=torch.int32)
    queue.signal([words[1:2], words[2:3]], 2**32 - 1, words[:1])
    assert words.tolist() == [-1, -1, -1]
    queue.await_words([words[1:2]], 5)
    assert library.waited == [(2**32 - 1, 5, 0)]  # 0 is CU_STREAM_WAIT_VALUE_GEQ
    library.code = 1
    with pytest.raises(RuntimeError, match="WaitValue32_v2 failed: error 1, the driver's words"):
        queue.await_words([words[1:2]], 5)
