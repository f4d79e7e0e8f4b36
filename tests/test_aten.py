"""The ATen path: its forms against float64, its memory and its products, forward and backward."""

import dataclasses

import pytest
import torch
from helpers import (
    DTYPES,
    as_call,
    assert_close,
    assert_no_worse,
    draws_of,
    in_tree_module,
    leaves_of,
    make_problem,
    reference,
    reference_gradients,
    relative_error,
    run,
    seeded,
    with_leaves,
)
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Modes that count bytes and products see the thread that they are set on, and no other.
pytestmark = pytest.mark.usefixtures("one_thread")
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
    return submodule("aten_path.blocks")


@pytest.fixture
def call(submodule):
    """call(function, problem): a form, with the call that the entry point gives it."""
    return lambda function, problem: function(as_call(submodule("_call"), problem))


@pytest.fixture
def backward(submodule, call):
    """backward(problem, grad_out, needs, saved): the gradients, by name."""
    function = submodule("aten_path.gradients").trimul_backward

    def backward(p, grad_out, needs=None, saved=None):
        needs = frozenset(leaves_of(p)) - {"residual"} if needs is None else frozenset(needs)
        return call(lambda of: function(of, grad_out, saved, needs), p)

    return backward


def grad_like(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=seeded(5)).to(out.dtype)


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


@pytest.mark.parametrize("length, channels, hidden, others", PLAIN + FULL)
def test_gradients_through_the_formula(aten, call, length, channels, hidden, others):
    problem = make_problem(length, channels, hidden, **others)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(problem).items()}
    out = call(aten.trimul_differentiable, problem)
    grads = torch.autograd.grad(out, leaves.values(), grad_like(out))
    wanted = reference_gradients(problem, grad_like(out))
    for name, gradient in zip(leaves, grads, strict=True):
        error = (gradient.double() - wanted[name]).norm()
        assert error <= 2e-5 * wanted[name].norm() + 1e-7, name


@pytest.mark.parametrize("length, channels, hidden, others", PLAIN[2:] + FULL[1:])
def test_gradients_through_bf16_gemms(
    aten, call, backward, monkeypatch, length, channels, hidden, others
):
    """Through either kind they are nearer to float64's than those of plain PyTorch are."""
    fp32, bf16 = [], []
    for seed in draws_of(min(channels, hidden)):
        problem = make_problem(length, channels, hidden, dtype=BF16, seed=seed, **others)
        grad_out = grad_like(problem.x)
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(problem).items()}
        out = call(aten.trimul_differentiable, problem)
        plain = dict(zip(leaves, torch.autograd.grad(out, leaves.values(), grad_out), strict=True))
        wanted = reference_gradients(problem, grad_out)
        wanted.pop("residual", None)
        for native, draws in ((False, fp32), (True, bf16)):
            monkeypatch.setattr(aten, "_multiplies_bf16", lambda native=native: native)
            with torch.no_grad():
                draws.append((backward(problem, grad_out), plain, wanted))
    assert_no_worse(fp32, 0.6)
    assert_no_worse(bf16, 0.9)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("channels, hidden", [(16, 24), (24, 13)])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@torch.no_grad()
def test_blocks_of_positions_do_not_show_in_gradients(
    aten, backward, native, monkeypatch, direction, channels, hidden, dtype
):
    problem = make_problem(
        13, channels, hidden, batch=2, dtype=dtype, direction=direction, mask="soft",
        drop_mask=True, biases=True,
    )  # fmt: skip
    grad_out = grad_like(problem.x)
    results = []
    for positions in (10**6, 50, 13, 1):
        monkeypatch.setattr(aten, "_BLOCK_POSITIONS", positions)
        results.append(backward(problem, grad_out))
    wanted = reference_gradients(problem, grad_out)
    for name, gradient in results[0].items():
        if dtype == torch.float32:
            assert relative_error(gradient, wanted[name].view(gradient.shape)) <= 2e-5
        for other in results[1:]:
            assert relative_error(other[name], gradient.double()) <= (
                2e-6 if dtype == torch.float32 else 6e-3
            ), name


@pytest.mark.parametrize("saved", [False, True])
@torch.no_grad()
def test_gradients_of_a_sequence_do_not_see_its_batch(aten, call, backward, native, saved):
    problem = make_problem(11, 16, batch=3, mask="soft", drop_mask=True, dtype=BF16)
    grad_out = grad_like(problem.x)
    of_positions = ("x", "mask", "drop_mask")
    product = call(aten.trimul_saving, problem)[1] if saved else None
    batch = backward(problem, grad_out, of_positions, product)
    for index in range(3):
        window = slice(index, index + 1)
        alone = with_leaves(
            problem,
            {name: getattr(problem, name)[window] for name in of_positions},
        )
        got = backward(
            alone, grad_out[window], of_positions, product[window] if saved else None
        )
        for name in of_positions:
            assert torch.equal(got[name], batch[name][window]), name


@pytest.mark.parametrize("recompute", ["product", "all"])
@pytest.mark.parametrize("positions", [10**6, 4])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("channels, hidden", [(3, 2), (2, 3)])
def test_gradcheck(
    kernel, submodule, aten, monkeypatch, direction, channels, hidden, positions, recompute
):
    """In float64, which the functions refuse but the path computes in."""
    for module in ("validation", "paths"):
        monkeypatch.setattr(submodule(module), "COMPUTE_DTYPES", (torch.float64,))
    monkeypatch.setattr(aten, "_BLOCK_POSITIONS", positions)
    for others in ({"biases": True}, {"residual": True, "drop_mask": True}):
        problem = make_problem(4, channels, hidden, direction=direction, mask="soft", **others)
        problem.eps = 0.1
        leaves = leaves_of(problem)
        values = [leaf.double().requires_grad_() for leaf in leaves.values()]

        def call(*values):
            given = dict(zip(leaves, values, strict=True))  # noqa: B023
            return run(kernel, with_leaves(problem, given), recompute=recompute)  # noqa: B023

        assert torch.autograd.gradcheck(call, values, fast_mode=positions == 4)


def peak_of_training(aten, call, backward, problem, recompute: str, batch: int = 1) -> float:
    """The peak of forward and backward in pair tensors, with the output's gradient counted in."""
    with PeakBytes(problem.x, problem.mask, *problem.weights.values()) as memory:
        if recompute == "product":
            out, saved = call(aten.trimul_saving, problem)
        else:
            out, saved = call(aten.trimul_inference, problem), None
        grad_out = torch.ones_like(out)
        del out
        needs = {"x", *problem.weights}
        backward(problem, grad_out, needs, saved)
    return memory.peak / problem.x.nbytes


def in_tree_peak_of_training(problem) -> float:
    module = in_tree_module(problem)
    x = problem.x.clone().requires_grad_()
    with torch.enable_grad(), PeakBytes(x, problem.mask, *module.parameters()) as memory:
        out = module(x, problem.mask)
        grad_out = torch.ones_like(out)
        out.backward(grad_out)
    return memory.peak / problem.x.nbytes


@pytest.mark.parametrize("recompute", ["product", "all"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@torch.no_grad()
def test_peak_memory_of_forward_and_backward(
    aten, call, backward, monkeypatch, direction, dtype, recompute
):
    """t, dt, dx and a quarter of b, and the gradient of the output; blocks are small here."""
    monkeypatch.setattr(aten, "_BLOCK_POSITIONS", 64)
    problem = make_problem(64, 32, dtype=dtype, direction=direction, mask="bool")
    ours = peak_of_training(aten, call, backward, problem, recompute)
    assert 4.25 <= ours <= 5.1
    assert ours < in_tree_peak_of_training(problem) / 3


@torch.no_grad()
def test_peak_memory_of_training_at_the_real_width(aten, call, backward):
    """C = 256, and blocks as they are, which count for more the shorter the sequence."""
    problem = make_problem(96, 256, dtype=BF16, mask="bool")
    ours = peak_of_training(aten, call, backward, problem, "product")
    assert ours < in_tree_peak_of_training(problem) / 3


@torch.no_grad()
def test_peak_memory_of_a_batch(aten, call, backward, monkeypatch):
    """dt, and a quarter of b, are one sequence's: 1.25 / 4 of the batch's pair tensors."""
    monkeypatch.setattr(aten, "_BLOCK_POSITIONS", 64)
    problem = make_problem(32, 32, batch=4, mask="bool")
    kept = peak_of_training(aten, call, backward, problem, "product")
    assert 3 + 1.25 / 4 <= kept <= 3 + 1.25 / 4 + 0.4
    again = peak_of_training(aten, call, backward, problem, "all")
    assert 2 + 2.25 / 4 <= again <= 2 + 2.25 / 4 + 0.4


class Products(TorchDispatchMode):
    """Multiply-adds of the matrix products within, and whether any was a batch of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.batches = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0].rstrip("_")
        if name in ("mm", "addmm", "bmm"):
            left, right = [value for value in args if isinstance(value, Tensor)][-2:]
            self.count += left.numel() * right.shape[-1]
            self.batches += name == "bmm"
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_gradient_that_is_not_asked_for_is_not_computed(aten, call, backward):
    problem = make_problem(9, 8, 6, mask="soft", drop_mask=True, biases=True)
    everything = set(leaves_of(problem))
    grad_out = grad_like(problem.x)
    saved = call(aten.trimul_saving, problem)[1]

    def products(needs) -> Products:
        with Products() as counted:
            got = backward(problem, grad_out, needs, saved)
        assert set(got) == set(needs)
        return counted

    whole = products(everything).count
    pairs = 9 * 9
    of_weights = {"p_in_weight": 12 * 8, "g_in_weight": 12 * 8, "g_out_weight": 8 * 8}
    for name, size in of_weights.items():
        assert whole - products(everything - {name}).count == pairs * size
    both = {"p_out_weight", "norm_out_weight"}
    assert whole - products(everything - both).count == pairs * 8 * 6
    through_norm = everything - {"x", "norm_in_weight", "norm_in_bias"}
    assert whole - products(through_norm).count == pairs * (2 * 12 * 8 + 8 * 8)
    # Up to the second norm nothing goes through the triangular product, nor to a and b.
    outside = {
        "drop_mask", "norm_out_weight", "norm_out_bias", "p_out_weight", "p_out_bias",
        "g_out_weight", "g_out_bias",
    }  # fmt: skip
    assert products(outside).batches == 0
    assert all(products({name}).batches > 0 for name in everything - outside)
    assert products(()).count <= products({"p_out_bias"}).count < whole / 6


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_backward_leaves_its_inputs_as_they_are(aten, call, backward, native, saved, dtype):
    problem = make_problem(9, 16, dtype=dtype, mask="soft", drop_mask=True, biases=True)
    product = call(aten.trimul_saving, problem)[1] if saved else None
    inputs = [*leaves_of(problem).values(), grad_like(problem.x)]
    inputs += [product] if saved else []
    before = [value.clone() for value in inputs]
    got = backward(problem, inputs[15], None, product)
    places = {value.untyped_storage().data_ptr() for value in inputs}
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))
    outputs = {value.untyped_storage().data_ptr() for value in got.values()}
    assert not outputs & places and len(outputs) == len(got)


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
