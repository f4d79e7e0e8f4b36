"""The ATen path: its two forms against float64, the memory of one, the gradients of the other."""

import dataclasses

import pytest
import torch
from helpers import (
    DTYPES,
    ERROR_BUDGET,
    assert_close,
    in_tree_module,
    make_problem,
    reference,
    relative_error,
    run,
)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BF16 = torch.bfloat16
# length, channels, hidden, and what else the call has
PLAIN = [
    (1, 16, 16, {}),
    (2, 48, 48, {"direction": "incoming", "batch": 3}),
    (24, 48, 48, {"mask": "bool"}),
    (33, 16, 16, {"direction": "incoming", "mask": "expanded"}),
    (20, 128, 128, {"direction": "incoming", "mask": "float", "batch": 2}),
]
FULL = [
    (1, 1, 1, {"biases": True}),
    (9, 7, 11, {"mask": "soft", "drop_mask": True}),
    (17, 24, 40, {"direction": "incoming", "residual": True}),
    (
        15,
        40,
        24,
        {
            "direction": "incoming",
            "batch": 2,
            "mask": "expanded",
            "residual": True,
            "drop_mask": True,
            "biases": True,
        },
    ),
]


@pytest.fixture
def aten(submodule):
    return submodule("aten")


@pytest.fixture
def call(submodule):
    """call(function, problem): either form, with the arguments that the entry point gives it."""
    weights_type = submodule("validation").Weights

    def call(function, p):
        values = p.weights | p.biases
        return function(
            p.x,
            p.direction,
            p.mask,
            p.residual,
            None if p.drop_mask is None else p.drop_mask.squeeze(1),
            weights_type(**{name: values.get(name) for name in weights_type._fields}),
            p.eps,
            p.eps,
        )

    return call


@pytest.fixture(params=[True, False], ids=["native_bf16", "no_native_bf16"])
def native(request, aten, monkeypatch) -> bool:
    """Whether the CPU is taken to multiply bf16."""
    monkeypatch.setattr(aten, "_multiplies_bf16", lambda: request.param)
    return request.param


@torch.no_grad()
def in_tree_error(problem) -> float:
    """The relative error of transformers' module on this problem."""
    return relative_error(in_tree_module(problem)(problem.x, problem.mask), reference(problem))


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
    assert relative_error(got, reference(problem)) <= 0.85 * in_tree_error(problem)


@pytest.mark.parametrize("length, channels, hidden, others", PLAIN + FULL)
def test_bf16_gemms_take_every_argument(aten, call, monkeypatch, length, channels, hidden, others):
    monkeypatch.setattr(aten, "_multiplies_bf16", lambda: True)
    problem = make_problem(length, channels, hidden, dtype=BF16, **others)
    # The first GEMMs' outputs are bf16 too: a rounding more than the budget is for.
    assert_close(call(aten.trimul_inference, problem), problem, factor=1.15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length, channels, hidden, others", PLAIN + FULL)
def test_differentiable(aten, call, length, channels, hidden, others, dtype):
    problem = make_problem(length, channels, hidden, dtype=dtype, **others)
    got = call(aten.trimul_differentiable, problem)
    assert got.shape == problem.x.shape and got.dtype == dtype
    error = relative_error(got, reference(problem))
    # In 16 bits this is plain PyTorch, rounded after every operation.
    assert error <= (1.0 if dtype == torch.float32 else 2.0) * ERROR_BUDGET[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length, channels, hidden, others", PLAIN[2:])
def test_differentiable_is_as_accurate_as_the_in_tree_module(
    aten, call, length, channels, hidden, others, dtype
):
    problem = make_problem(length, channels, hidden, dtype=dtype, **others)
    error = relative_error(call(aten.trimul_differentiable, problem), reference(problem))
    assert error <= 1.05 * in_tree_error(problem)


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
        outputs.append(call(aten.trimul_inference, problem).double())
    assert relative_error(outputs[0], reference(problem)) <= 1.25 * ERROR_BUDGET[dtype]
    for other in outputs[1:]:
        assert relative_error(other, outputs[0]) <= (1e-6 if dtype == torch.float32 else 2e-3)


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


class PeakBytes(TorchDispatchMode):
    """The most bytes that the operations within had allocated at once, `inputs` not counted."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._inputs = {value.untyped_storage()._cdata for value in inputs}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._inputs:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


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


WEIGHTS = [
    "norm_in_weight", "norm_in_bias", "p_in_weight", "g_in_weight",
    "norm_out_weight", "norm_out_bias", "p_out_weight", "g_out_weight",
]  # fmt: skip


def with_input(problem, name: str, value: Tensor):
    """The problem with another value of one input."""
    if name in vars(problem):
        return dataclasses.replace(problem, **{name: value})
    group = "weights" if name in problem.weights else "biases"
    return dataclasses.replace(problem, **{group: getattr(problem, group) | {name: value}})


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize(
    "name, biases",
    [(name, False) for name in ("x", "mask", "residual", "drop_mask", *WEIGHTS)]
    + [(name, True) for name in ("x", "mask", *WEIGHTS)]
    + [(name, True) for name in ("p_in_bias", "g_in_bias", "p_out_bias", "g_out_bias")],
)
def test_gradient_of_each_input_alone(kernel, name, biases, direction):
    """Against central differences of the float64 reference, along the gradient and at random."""
    problem = make_problem(
        6, 5, 4, batch=2, direction=direction, mask="soft",
        residual=not biases, drop_mask=not biases, biases=biases,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    probe = torch.randn(problem.x.shape, generator=generator).double()
    old = (vars(problem) | problem.weights | problem.biases)[name]
    value = old.clone().requires_grad_()
    out = run(kernel, with_input(problem, name, value))
    assert out.requires_grad
    (gradient,) = torch.autograd.grad(out, value, probe.float())
    assert gradient.dtype == value.dtype
    gradient = gradient.double()

    directions = [gradient / gradient.norm()]
    for _ in range(3):
        random = torch.randn(value.shape, generator=generator).double()
        directions.append(random / random.norm())
    step = 1e-4
    for along in directions:
        ahead = reference(with_input(problem, name, old.double() + step * along))
        behind = reference(with_input(problem, name, old.double() - step * along))
        slope = float(((ahead - behind) * probe).sum()) / (2 * step)
        assert float((gradient * along).sum()) == pytest.approx(
            slope, abs=2e-5 * float(gradient.norm())
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_have_the_dtypes_of_their_inputs(kernel, dtype):
    problem = make_problem(6, 8, dtype=dtype, mask="soft", residual=True, drop_mask=True)
    inputs = [problem.x, problem.mask, problem.residual, problem.drop_mask]
    inputs += problem.weights.values()
    for value in inputs:
        value.requires_grad_()
    out = run(kernel, problem)
    for value, gradient in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert gradient.dtype == value.dtype and gradient.isfinite().all()


def test_nothing_is_kept_for_a_backward_that_cannot_come(aten, kernel, monkeypatch):
    """Weights that require a gradient don't cost the inference form where gradients are off."""
    problem = make_problem(5, 8)
    for value in problem.weights.values():
        value.requires_grad_()
    used = []
    for form in ("trimul_inference", "trimul_differentiable"):
        intact = getattr(aten, form)
        monkeypatch.setattr(
            aten, form, lambda *of, form=form, intact=intact: used.append(form) or intact(*of)
        )
    with torch.no_grad():
        assert not run(kernel, problem).requires_grad
    with torch.inference_mode():
        assert not run(kernel, problem).requires_grad
    assert run(kernel, problem).requires_grad
    assert used == ["trimul_inference", "trimul_inference", "trimul_differentiable"]


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
