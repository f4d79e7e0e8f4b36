"""A backward neither reads nor changes what belongs to the whole process, nor depends on it."""

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import HAS_GPU
from fresh_process import HUNG_SECONDS, ROOT, python_output
from helpers import as_call, leaves_of, make_problem, seeded
from process_wide import NoProducts, settings_untouched
from transitions import BIASES, as_transition, make_transition

OPS = ("triangle", "transition")


@pytest.fixture(params=OPS)
def backward(request, submodule, on_triton):
    """backward(precision, dtype): a function that computes all gradients of one call."""
    types = submodule("_call")

    def prepare(precision="fp32", dtype=torch.float32):
        if request.param == "triangle":
            problem = make_problem(5, 16, dtype=dtype, mask="soft", drop_mask=True, biases=True)
            call = as_call(types, problem.to(on_triton), precision=precision)
            run = submodule("triton_path").backward
            run = partial(run, product=None, moments=None, planes=None)
        else:
            problem = make_transition((5, 5, 16), 24, dtype=dtype, biases=BIASES)
            call = as_transition(types, problem.to(on_triton), precision=precision)
            run = submodule("triton_path.transition").backward
        grad = torch.randn(call.x.shape, generator=seeded(1)).to(dtype).to(on_triton)
        return partial(run, call, grad, needs=frozenset(leaves_of(problem)))

    return prepare


@pytest.mark.parametrize(
    "dtype, precision",
    [(torch.float16, "fp32"), *((torch.float32, w) for w in ("fp32", "ieee", "tf32", "bf16"))],
)
def test_no_setting_and_no_product_of_torch(backward, monkeypatch, dtype, precision):
    run = backward(precision, dtype)
    wanted = run()
    with settings_untouched(monkeypatch), NoProducts():
        got = run()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_torchs_setting_is_read_where_the_call_follows_it(backward, monkeypatch):
    run = backward("default")
    with settings_untouched(monkeypatch), pytest.raises(AssertionError, match="_get_float32"):
        run()
    with settings_untouched(monkeypatch, reads=("_get_float32_matmul_precision",)), NoProducts():
        run()


def test_what_the_guards_see(monkeypatch):
    """Each of them can fail."""
    matmul = torch.backends.cuda.matmul
    touches = [
        lambda: torch.set_float32_matmul_precision("high"),
        torch.get_float32_matmul_precision,
        lambda: setattr(matmul, "allow_tf32", True),
        lambda: setattr(matmul, "allow_bf16_reduced_precision_reduction", False),
        lambda: torch.use_deterministic_algorithms(True),
    ]
    if hasattr(matmul, "fp32_precision"):
        touches.append(lambda: setattr(matmul, "fp32_precision", "ieee"))
    for touch in touches:
        with settings_untouched(monkeypatch), pytest.raises(AssertionError, match="was called"):
            touch()
    a = torch.ones(4, 4)
    products = [
        lambda: a @ a, lambda: torch.addmm(a, a, a), lambda: a.addmm_(a, a),
        lambda: torch.bmm(a[None], a[None]), lambda: torch.einsum("ij,jk", a, a),
        lambda: torch.nn.functional.linear(a, a), lambda: a @ a[0],
    ]  # fmt: skip
    for multiply in products:
        with NoProducts(), pytest.raises(AssertionError):
            multiply()


def test_two_threads_of_different_precisions(submodule, backward, monkeypatch):
    """Each gets its own call's products, and torch's setting is at all times what the user chose.

    The launches are only recorded, as for a target that knows each word.
    """
    launch = submodule("triton_parts.launch").PreparedLaunch
    device = submodule("triton_parts.device")
    target = device.target_of("interpreter", "cpu")._replace(fp32_dots=("tf32x3", "tf32", "ieee"))
    monkeypatch.setattr(device, "_target_of_real", lambda _: target)
    launches = submodule("triton_path.launches")._launches
    launches.clear()
    given = {"tf32": set(), "ieee": set()}
    meet, failed = threading.Barrier(2, timeout=HUNG_SECONDS), []

    def record(prepared, **tensors):
        given[threading.current_thread().name].add(prepared.constants.get("PRECISION"))
        assert torch.get_float32_matmul_precision() == "high"
        with contextlib.suppress(threading.BrokenBarrierError):
            meet.wait()  # the threads take turns

    monkeypatch.setattr(launch, "launch", record)
    runs = {precision: backward(precision) for precision in given}

    def work(run):
        try:
            for _ in range(3):
                run()
        except BaseException as error:
            failed.append(error)
            meet.abort()

    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        threads = [
            threading.Thread(target=work, args=(run,), name=name) for name, run in runs.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_float32_matmul_precision(previous)
        launches.clear()
    assert not failed
    assert given == {precision: {precision, None} for precision in given}


@pytest.mark.kernels_ci
@pytest.mark.skipif(not HAS_GPU, reason="contexts are a GPU's")
def test_a_thread_that_has_not_called_cuda(kernel, submodule):
    """As PyTorch's of backward passes, where all memory is there: it can encode descriptors."""
    problem = make_problem(256, 128, dtype=torch.bfloat16).to("cuda")
    wanted = problem.run(kernel)
    problem.run(kernel)  # leaves memory for another
    submodule("triton_path.launches")._launches.clear()  # their kernels stay loaded
    with ThreadPoolExecutor(1) as thread:
        got = thread.submit(problem.run, kernel).result()
    assert torch.equal(got, wanted)


@pytest.mark.kernels_ci
@pytest.mark.skipif(not HAS_GPU, reason="TF32 and cuBLAS are a GPU's")
def test_torchs_settings_change_no_bit(backward):
    """Not those for float32, nor for 16 bits."""
    matmul = torch.backends.cuda.matmul
    wanted = {dtype: backward("fp32", dtype)() for dtype in (torch.bfloat16, torch.float32)}
    before = torch.get_float32_matmul_precision(), matmul.allow_bf16_reduced_precision_reduction
    try:
        torch.set_float32_matmul_precision("medium")
        matmul.allow_bf16_reduced_precision_reduction = not before[1]
        for dtype, gradients in wanted.items():
            got = backward("fp32", dtype)()
            assert all(torch.equal(got[name], gradients[name]) for name in gradients)
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.allow_bf16_reduced_precision_reduction = before[1]


@pytest.mark.skipif(not HAS_GPU, reason="only a GPU computes in TF32")
def test_two_threads_on_a_gpu(backward):
    """Beside each other they compute the bits that each computes alone."""
    runs = {word: backward(word) for word in ("tf32", "ieee")}
    wanted = {word: run() for word, run in runs.items()}
    assert any(not torch.equal(wanted["tf32"][n], wanted["ieee"][n]) for n in wanted["ieee"])
    got = {word: [] for word in runs}

    def work(word):
        with torch.cuda.stream(torch.cuda.Stream()):
            got[word] = [runs[word]() for _ in range(20)]
            torch.cuda.synchronize()

    threads = [threading.Thread(target=work, args=(word,)) for word in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for word, results in got.items():
        assert len(results) == 20
        for result in results:
            assert all(torch.equal(result[name], wanted[word][name]) for name in result)


DETERMINISTIC = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel

kernel = get_local_kernel(Path(sys.argv[1]))
torch.use_deterministic_algorithms(True)
for dtype in (torch.bfloat16, torch.float32):
    x = torch.randn(1, 33, 33, 32, dtype=dtype, device=sys.argv[2], requires_grad=True)
    weights = [torch.randn(s, dtype=dtype, device=x.device, requires_grad=True)
               for s in ((64, 32), (64, 32), (32, 64), (64, 32), (64, 32), (32, 32), (32, 32))]
    norm = torch.ones(32, device=x.device, requires_grad=True)
    kernel.swiglu_transition(x, norm, norm, *weights[:3], residual=x).sum().backward()
    p_in, g_in, p_out, g_out = weights[3:]
    kernel.triangle_multiplicative_update(
        x, "outgoing", None, norm_in_weight=norm, norm_in_bias=norm, p_in_weight=p_in,
        g_in_weight=g_in, norm_out_weight=norm, norm_out_bias=norm, p_out_weight=p_out,
        g_out_weight=g_out,
    ).sum().backward()
print("fine")
"""


@pytest.mark.kernels_ci
def test_under_deterministic_algorithms(on_triton):
    """Without CUBLAS_WORKSPACE_CONFIG, for want of which every product of cuBLAS raises."""
    pytest.importorskip("kernels")
    if not HAS_GPU:
        pytest.skip("cuBLAS is a GPU's")
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert python_output(DETERMINISTIC, str(ROOT), on_triton).split() == ["fine"]


NEWER_SETTING = """
import importlib, sys, torch
from pathlib import Path
from kernels import get_local_kernel

kernel = get_local_kernel(Path(sys.argv[1]))
allows_tf32 = importlib.import_module(f"{kernel.__name__}.validation").torch_allows_tf32
for setting, allowed in (("ieee", False), ("tf32", True)):
    torch.backends.cuda.matmul.fp32_precision = setting
    assert allows_tf32() is allowed
print("fine")
"""


def test_torchs_newer_setting_of_precision():
    """In a process of its own: torch wants one of its two settings to be used, not both."""
    pytest.importorskip("kernels")
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 brought it")
    assert python_output(NEWER_SETTING, str(ROOT)).split() == ["fine"]
