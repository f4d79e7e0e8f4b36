"""The ATen path's backward: gradients against float64, its blocks, memory and products."""

import pytest
import torch
from aten_cases import FULL, PLAIN
from helpers import (
    DTYPES,
    as_call,
    assert_no_worse,
    draws_of,
    in_tree_module,
    leaves_of,
    make_problem,
    reference_gradients,
    relative_error,
    run,
    seeded,
    with_leaves,
)
from peak_bytes import PeakBytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
