"""The ATen path's forward: its forms against float64, its blocks and its memory."""

import dataclasses

import pytest
import torch
from aten_cases import FULL, PLAIN
from helpers import (
    DTYPES,
    as_call,
    assert_close,
    assert_no_worse,
    in_tree_module,
    make_problem,
    reference,
    relative_error,
    run,
    with_leaves,
)
from peak_bytes import PeakBytes
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Modes that count bytes and products see the thread that they are set on, and no other.
pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = torch.bfloat16


@pytest.fixture
def aten(submodule):
    return submodule("aten_path.blocks")


@pytest.fixture
def call(submodule):
    """call(function, problem): a form, with the call that the entry point gives it."""
    return lambda function, problem: function(as_call(submodule("_call"), problem))


@pytest.fixture(params=[True, False], ids=["native_bf16", "no_native_bf16"])
def native(request, aten, monkeypatch) -> bool:
    """Whether the CPU is taken to multiply bf16."""
    monkeypatch.setattr(aten, "_multiplies_bf16", lambda: request.param)
    return request.param


@torch.no_grad()
def in_tree_output(problem) -> Tensor:
    return in_tree_module(problem)(problem.x, problem.mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length, channels, hidden, others", PLAIN + FULL)
def test_inference_through_fp32_gemms(
    aten, call, monkeypatch, length, channels, hidden, others, dtype
):
    monkeypatch.setattr(aten, "_multiplies_bf16", lambda: False)
    problem = make_problem(length, channels, hidden, dtype=dtype, **others)
    assert_close(call(aten.trimul_inference, problem), problem)


@pytest.mark.parametrize("length, channels, hidden, others", PLAIN[2:])
def test_inference_through_bf16_gemms(aten, call, monkeypatch, length, channels, hidden, others):
    monkeypatch.setattr(aten, "_multiplies_bf16", lambda: True)
    problem = make_problem(length, channels, hidden, dtype=BF16, **others)
    got = call(aten.trimul_inference, problem)
    assert got.dtype == BF16
    assert_no_worse([(got, in_tree_output(problem), reference(problem))], 0.85)


@pytest.mark.parametrize("length, channels, hidden, others", PLAIN + FULL)
def test_bf16_gemms_take_every_argument(aten, call, monkeypatch, length, channels, hidden, others):
    monkeypatch.setattr(aten, "_multiplies_bf16", lambda: True)
    problem = make_problem(length, channels, hidden, dtype=BF16, **others)
    assert_close(call(aten.trimul_inference, problem), problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length, channels, hidden, others", PLAIN + FULL)
def test_differentiable(aten, call, length, channels, hidden, others, dtype):
    problem = make_problem(length, channels, hidden, dtype=dtype, **others)
    # In 16 bits this is plain PyTorch, rounded after every operation.
    assert_close(call(aten.trimul_differentiable, problem), problem, beside_plain=1.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length, channels, hidden, others", PLAIN[2:])
def test_differentiable_is_as_accurate_as_the_in_tree_module(
    aten, call, length, channels, hidden, others, dtype
):
    problem = make_problem(length, channels, hidden, dtype=dtype, **others)
    got = call(aten.trimul_differentiable, problem)
    assert_no_worse([(got, in_tree_output(problem), reference(problem))], 1.05)


@pytest.mark.parametrize(
    "capabilities, wanted",
    [
        ({}, torch.float32),
        ({"avx512_bf16": False, "avx512_f": True, "amx_int8": True}, torch.float32),
        ({"avx512_bf16": True}, BF16),
        ({"amx_bf16": True}, BF16),
        ({"bf16": True}, BF16),
    ],
)
def test_gemms_are_in_bf16_only_where_the_cpu_multiplies_bf16(
    aten, monkeypatch, capabilities, wanted
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    aten._multiplies_bf16.cache_clear()
    try:
        assert aten.gemm_dtype(BF16) == wanted
        assert aten.gemm_dtype(torch.float16) == aten.gemm_dtype(torch.float32) == torch.float32
    finally:
        aten._multiplies_bf16.cache_clear()


def test_a_torch_that_cannot_tell_computes_all_the_same(aten, monkeypatch):
    """`torch.cpu.get_capabilities` is newer than the oldest torch that brings Triton 3.6."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    aten._multiplies_bf16.cache_clear()
    try:
        assert aten.gemm_dtype(BF16) in (BF16, torch.float32)
    finally:
        aten._multiplies_bf16.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_blocks_of_positions_do_not_show(aten, call, native, monkeypatch, direction, dtype):
    problem = make_problem(
        13, 16, 24, batch=2, dtype=dtype, direction=direction, mask="soft", residual=True,
        drop_mask=True,
    )  # fmt: skip
    outputs = []
    for positions in (10**6, 50, 13, 1):  # one block, a ragged last one, a row each, and less
        monkeypatch.setattr(aten, "_BLOCK_POSITIONS", positions)
        outputs.append(call(aten.trimul_inference, problem))
    assert_close(outputs[0], problem)
    limit = 1e-6 if dtype == torch.float32 else 2e-3
    for other in outputs[1:]:
        assert relative_error(other, outputs[0].double()) <= limit


def test_a_sequence_does_not_see_its_batch(aten, call, native):
    problem = make_problem(11, 16, batch=3, mask="soft", residual=True, drop_mask=True, dtype=BF16)
    batch = call(aten.trimul_inference, problem)
    for index in range(3):
        window = slice(index, index + 1)
        alone = dataclasses.replace(
            problem,
            x=problem.x[window],
            mask=problem.mask[window],
            residual=problem.residual[window],
            drop_mask=problem.drop_mask[window],
        )
        assert torch.equal(call(aten.trimul_inference, alone), batch[window])


CONSTANTS = {
    torch.bfloat16: (1.0, 1000.0, -1e4, 3e38, -3e38, 1e-38),
    torch.float16: (1.0, 1000.0, -1e4, 65504.0, 6e-8),
    torch.float32: (1.0, 1000.0, -1e4, 3e38, -3e38, 1e-38),
}


@pytest.mark.parametrize("form", ["trimul_inference", "trimul_differentiable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_constant_are_rows_of_zeros(aten, call, native, form, dtype):
    """Whatever the constant, the row's normalised value is exactly the norm's bias."""
    problem = make_problem(8, 48, dtype=dtype, mask="soft", biases=True)
    rows = [(1, 2), (0, 7), (3, 3), (5, 0), (6, 4), (7, 7)]
    for i, j in rows:
        problem.x[0, i, j] = 0
    wanted = call(getattr(aten, form), problem)
    for (i, j), constant in zip(rows, CONSTANTS[dtype], strict=False):
        problem.x[0, i, j] = constant
        assert problem.x[0, i, j, 0] != 0
    got = call(getattr(aten, form), problem)
    assert got.isfinite().all()
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("form", ["trimul_inference", "trimul_differentiable"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_stay_as_they_are(aten, call, native, form, dtype):
    problem = make_problem(
        9, 16, dtype=dtype, mask="soft", residual=True, drop_mask=True, biases=True
    )
    inputs = [value for value in tree_leaves(vars(problem)) if isinstance(value, Tensor)]
    assert len(inputs) == 4 + 12
    before = [value.clone() for value in inputs]
    versions = [value._version for value in inputs]
    out = call(getattr(aten, form), problem)
    assert [value._version for value in inputs] == versions
    for value, old in zip(inputs, before, strict=True):
        assert torch.equal(value, old)
        assert value.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()


@torch.no_grad()
def test_peak_bytes_counts_what_is_alive():
    one = torch.ones(1000)
    with PeakBytes(one) as memory:
        two = one + one  # 4,000 bytes
        two = two.view(10, 100) * two.view(10, 100)  # 4,000 more, and the first ones go
        two.mul_(one.view(10, 100))
        one.view(10, 100)
    assert memory.peak == 8000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@torch.no_grad()
def test_peak_memory_is_two_pair_tensors(aten, call, native, monkeypatch, direction, dtype):
    """a and the output, in whose place b lies; all else is a block's. In-tree there are many."""
    problem = make_problem(64, 32, dtype=dtype, direction=direction, mask="bool")
    module = in_tree_module(problem)
    pair_bytes = problem.x.nbytes
    with PeakBytes(problem.x, problem.mask, *module.parameters()) as in_tree:
        module(problem.x, problem.mask)
    monkeypatch.setattr(aten, "_BLOCK_POSITIONS", 128)
    with PeakBytes(problem.x, problem.mask, *problem.weights.values()) as ours:
        call(aten.trimul_inference, problem)
    assert 2 * pair_bytes <= ours.peak <= 3 * pair_bytes
    assert ours.peak < 0.4 * in_tree.peak


@torch.no_grad()
def test_peak_memory_of_a_wider_product(aten, call, native, monkeypatch):
    """b doesn't fit in the output's place: a, b and the output."""
    problem = make_problem(64, 32, 48, dtype=torch.float32)
    monkeypatch.setattr(aten, "_BLOCK_POSITIONS", 128)
    with PeakBytes(problem.x, *problem.weights.values()) as ours:
        call(aten.trimul_inference, problem)
    assert 4 * problem.x.nbytes <= ours.peak <= 4.6 * problem.x.nbytes


def test_which_form_runs(aten, submodule, kernel, monkeypatch):
    """The saving form only where a gradient can come, the formula only under transforms."""
    problem = make_problem(5, 8)
    for value in problem.weights.values():
        value.requires_grad_()
    used, path = [], submodule("aten_path")
    for form in ("trimul_inference", "trimul_saving", "trimul_differentiable"):
        intact = getattr(aten, form)
        monkeypatch.setattr(
            path, form, lambda *of, form=form, intact=intact: used.append(form) or intact(*of)
        )
    with torch.no_grad():
        assert not run(kernel, problem).requires_grad
    with torch.inference_mode():
        assert not run(kernel, problem).requires_grad
    assert run(kernel, problem).requires_grad
    assert run(kernel, problem, recompute="all").requires_grad
    torch.func.grad(lambda x: run(kernel, with_leaves(problem, {"x": x})).sum())(problem.x)
    torch.func.jvp(
        lambda x: run(kernel, with_leaves(problem, {"x": x})), (problem.x,), (problem.x,)
    )
    assert used == [
        "trimul_inference", "trimul_inference", "trimul_saving", "trimul_inference",
        "trimul_differentiable", "trimul_differentiable",
    ]  # fmt: skip


@pytest.mark.parametrize("with_grad", [False, True])
def test_autocast_does_not_reach_inside(kernel, with_grad):
    """It would lower the precision of float32 inputs here, but not in the Triton kernels."""
    problem = make_problem(9, 16, mask="bool")
    problem.x.requires_grad_(with_grad)
    with torch.autocast("cpu", dtype=BF16):
        got = run(kernel, problem)
    assert got.requires_grad == with_grad
    assert_close(got, problem)


@pytest.mark.parametrize("with_grad", [False, True])
def test_output_is_contiguous_whatever_the_strides(kernel, with_grad):
    problem = make_problem(9, 16, batch=2, residual=True, drop_mask=True, mask="soft")
    for name in ("x", "residual"):
        strided = getattr(problem, name).permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
        assert not strided.is_contiguous()
        setattr(problem, name, strided.requires_grad_(with_grad))
    assert_close(run(kernel, problem), problem)
