"""The region of threads in which the ATen path works on its blocks."""

import threading

import pytest
import torch
from fresh_process import HUNG_SECONDS
from helpers import (
    leaves_of,
    make_problem,
    reference,
    reference_gradients,
    relative_error,
    run,
    with_leaves,
)

CPU = torch.device("cpu")


@pytest.fixture
def region(submodule):
    return submodule("aten_path.region")


@pytest.fixture
def threads(region) -> int:
    if region._gomp_parallel() is None:
        pytest.skip("this PyTorch's OpenMP runtime has no region to open")
    return 3


def test_each_block_is_worked_on_once_and_by_several_threads(region, threads):
    seen, together = [], threading.Barrier(threads)

    def work(block):
        if block < threads:
            together.wait(timeout=HUNG_SECONDS)  # as many are at work at once
        seen.append((block, threading.get_ident()))

    region.for_each(range(20), work, threads)
    assert sorted(block for block, _ in seen) == list(range(20))
    assert len({thread for _, thread in seen}) == threads


def test_results_are_collected_in_the_order_of_the_blocks(region, threads):
    first_is_last, found = threading.Event(), []

    def work(block):
        if block == 0:
            assert first_is_last.wait(timeout=HUNG_SECONDS)
        elif block == 1:
            first_is_last.set()
        return block

    region.for_each(range(9), work, threads, found.append)
    assert found == list(range(9))
    found.clear()
    region.for_each(range(9), lambda block: block, 1, found.append)
    assert found == list(range(9))


@pytest.mark.parametrize("where", ["work", "collect"])
def test_an_exception_ends_the_loop_and_is_raised(region, threads, where):
    class OwnError(Exception):
        pass

    done = []

    def fail(block):
        done.append(block)
        if block == 2:
            raise OwnError("block 2")

    functions = (fail, lambda _: None) if where == "work" else (lambda block: block, fail)
    with pytest.raises(OwnError, match="block 2"):
        region.for_each(range(1000), functions[0], threads, functions[1])
    assert len(done) < 1000
    region.for_each(range(3), done.append, threads)  # and the next loop runs


@pytest.mark.parametrize("inference", [False, True])
def test_threads_are_in_the_callers_inference_mode_and_record_nothing(region, threads, inference):
    modes = set()

    def work(_):
        modes.add((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    with torch.inference_mode(inference):
        region.for_each(range(9), work, threads)
    assert modes == {(inference, False)}


def test_an_operation_stays_on_the_thread_that_calls_it(region, threads):
    """Inside a region PyTorch opens none: a sum over much is that of one thread, bit for bit."""
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        wanted = values.sum()
        torch.set_num_threads(threads)
        sums = []
        region.for_each(range(6), lambda _: sums.append(values.sum()), threads)
    finally:
        torch.set_num_threads(before)
    assert sums == [wanted] * 6


def test_threads_are_torchs_own_number(region):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert region.region_threads(CPU) in (1, 5)
        assert region.region_threads(torch.device("meta")) == 1
    finally:
        torch.set_num_threads(before)


def test_another_runtime_gives_one_thread(region, monkeypatch):
    def nothing(name):
        raise OSError

    region._gomp_parallel.cache_clear()
    monkeypatch.setattr(region.ctypes, "CDLL", nothing)
    assert region.region_threads(CPU) == 1
    region._gomp_parallel.cache_clear()



@pytest.fixture
def several_threads(submodule, threads, monkeypatch):
    """Small blocks, each worked on by one of several threads."""
    aten = submodule("aten_path.blocks")
    monkeypatch.setattr(aten, "region_threads", lambda _: threads)
    monkeypatch.setattr(aten, "_BLOCK_POSITIONS", 64)
    monkeypatch.setattr(aten, "LEAST_POSITIONS", 16)
    monkeypatch.setattr(aten, "LEAST_POSITIONS_A_THREAD", 1)


@pytest.mark.parametrize("hidden", [24, 40])  # in the output's memory, and beside it
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_threads_do_not_show(kernel, submodule, several_threads, direction, hidden):
    problem = make_problem(
        29, 32, hidden, batch=2, direction=direction, mask="soft", residual=True, drop_mask=True
    )
    blocks = submodule("aten_path.blocks").blocks_of(problem.x)
    assert blocks.threads > 1 and len(blocks.windows) > blocks.threads
    grad_out = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(1))

    def step() -> dict:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves_of(problem).items()}
        out = run(kernel, with_leaves(problem, leaves))
        grads = torch.autograd.grad(out, leaves.values(), grad_out)
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    got = step()
    wanted = {"out": reference(problem), **reference_gradients(problem, grad_out)}
    assert all(relative_error(value, wanted[name]) <= 5e-6 for name, value in got.items())
    for _ in range(3):
        again = step()
        assert all(torch.equal(again[name], value) for name, value in got.items())
    with torch.inference_mode():
        assert torch.equal(run(kernel, problem), got["out"])


def test_many_threads_have_blocks_of_their_own_only_where_those_are_large(submodule, monkeypatch):
    aten = submodule("aten_path.blocks")

    def cut(length: int, threads: int) -> tuple[int, int]:
        monkeypatch.setattr(aten, "region_threads", lambda _: threads)
        blocks = aten.blocks_of(torch.empty(1, length, length, 1))
        return blocks.threads, blocks.positions

    assert cut(160, 1) == (1, 2048)
    assert cut(160, 2) == (2, 1600) and cut(256, 2) == (2, 2048)
    assert cut(160, 8) == (1, 2048) and cut(256, 8) == (8, 1024) and cut(512, 8) == (8, 2048)
    assert cut(256, 16) == (1, 2048) and cut(512, 16) == (16, 2048)
