"""Gradients of the two public functions against float64, and all that autograd may ask of them."""

import contextlib

import pytest
import torch
from conftest import HAS_GPU
from helpers import (
    Problem,
    as_call,
    assert_close,
    assert_no_worse,
    formula,
    in_tree_gradients,
    leaves_of,
    make_problem,
    reference,
    reference_gradients,
    relative_error,
    room,
    run,
    seeded,
    with_leaves,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

BF16 = torch.bfloat16
LIMIT = 2e-5  # of the relative error of any float32 gradient
RECOMPUTE = ("product", "all")
# length, channels, hidden, and what else the call has
CASES = [
    (1, 8, 8, {"batch": 2}),
    (2, 16, 16, {"direction": "incoming", "mask": "float", "biases": True}),
    (9, 16, 16, {"mask": "bool", "residual": True}),
    (17, 24, 24, {"direction": "incoming", "mask": "expanded", "drop_mask": True, "batch": 2}),
    (13, 7, 11, {"mask": "soft", "biases": True, "batch": 2}),
    (15, 40, 24, {"direction": "incoming", "mask": "soft", "residual": True, "drop_mask": True}),
    (11, 24, 40, {"mask": "soft", "residual": True, "drop_mask": True, "batch": 2}),
]
NAMES = (
    "x", "mask", "residual", "drop_mask", "norm_in_weight", "norm_in_bias", "p_in_weight",
    "g_in_weight", "norm_out_weight", "norm_out_bias", "p_out_weight", "g_out_weight",
)  # fmt: skip
BIASES = ("p_in_bias", "g_in_bias", "p_out_bias", "g_out_bias")


@pytest.fixture(params=["aten", "triton"])
def device(request) -> str:
    """The device whose tensors take the path: every test here is for each path."""
    return request.getfixturevalue("on_triton") if request.param == "triton" else "cpu"


def grad_of_output(problem: Problem) -> Tensor:
    generator = seeded(7)
    return torch.randn(problem.x.shape, generator=generator).to(problem.x.dtype)


def fresh_leaves(problem: Problem, device: str) -> dict[str, Tensor]:
    """Copies of the problem's leaves.

    The input projections lie in one piece of memory, values first, as in ESMFold2. The kernels take
    the one that lies lower for the first, and in the interpreter, whose BLAS rounds a column as it
    lies in the tile, that would show in the last bit.
    """
    leaves = {
        name: leaf.detach().clone().to(device) for name, leaf in leaves_of(problem).items()
    }
    bundle = torch.cat([leaves["p_in_weight"], leaves["g_in_weight"]])
    leaves["p_in_weight"], leaves["g_in_weight"] = (half.detach() for half in bundle.chunk(2))
    return leaves


def gradients(
    kernel,
    problem: Problem,
    device: str,
    names: tuple[str, ...] | None = None,
    through=None,
    **others,
) -> dict[str, Tensor]:
    """Of the leaves `names`, or all; `through(call, leaves)` may make the call in its own way."""
    leaves = fresh_leaves(problem, device)
    wanted = {name: leaves[name].requires_grad_() for name in names or leaves}

    def call(*values: Tensor) -> Tensor:
        given = leaves | dict(zip(wanted, values, strict=True))
        return run(kernel, with_leaves(problem.to(device), given), device, **others)

    out = call(*wanted.values()) if through is None else through(call, *wanted.values())
    out.backward(grad_of_output(problem).to(device))
    return {name: leaf.grad for name, leaf in wanted.items()}


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(got) == set(wanted)
    for name, gradient in got.items():
        assert torch.equal(gradient, wanted[name]), name


@pytest.mark.kernels_ci
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("length, channels, hidden, others", CASES)
def test_all_together(kernel, device, length, channels, hidden, others, recompute):
    problem = make_problem(length, channels, hidden, **others)
    wanted = reference_gradients(problem, grad_of_output(problem))
    got = gradients(kernel, problem, device, recompute=recompute)
    assert set(got) == set(wanted)
    for name, leaf in leaves_of(problem).items():
        assert got[name].shape == leaf.shape and got[name].dtype == leaf.dtype, name
        assert relative_error(got[name], wanted[name]) <= LIMIT, name


class Asked(TorchDispatchMode):
    """The gradients that the backward op was asked for."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self._names = names
        self.names: list[set[str]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.__name__.startswith("trimul_bwd"):
            self.names.append({n for n, need in zip(self._names, args[3], strict=True) if need})
            for name, gradient in zip(self._names, out, strict=True):
                assert name in self.names[-1] or gradient.numel() == 0
        return out


@pytest.mark.parametrize(
    "name, biases",
    [(name, False) for name in NAMES]
    + [(name, True) for name in NAMES if name not in ("residual", "drop_mask")]
    + [(name, True) for name in BIASES],
)
def test_each_alone_and_no_other(kernel, device, submodule, name, biases):
    problem = make_problem(
        7, 8, 6, direction="incoming" if biases else "outgoing", mask="soft",
        residual=not biases, drop_mask=not biases, biases=biases,
    )  # fmt: skip
    wanted = reference_gradients(problem, grad_of_output(problem))[name]
    with Asked(submodule("_call").DIFFERENTIABLE) as asked:
        got = gradients(kernel, problem, device, (name,))[name]
    assert asked.names == ([] if name == "residual" else [{name}])
    assert relative_error(got, wanted) <= LIMIT


@pytest.mark.parametrize("flow, dtype", [("outgoing", BF16), ("incoming", torch.float16)])
def test_16_bit_errors_beside_the_in_tree_modules(kernel, device, flow, dtype):
    draws = []
    for seed in range(4):
        problem = make_problem(9, 32, dtype=dtype, direction=flow, mask="bool", seed=seed)
        grad_out = grad_of_output(problem)
        got, in_tree = gradients(kernel, problem, device), in_tree_gradients(problem, grad_out)
        assert all(got[name].dtype == in_tree[name].dtype for name in got | in_tree)
        draws.append((got, in_tree, reference_gradients(problem, grad_out)))
    assert_no_worse(draws, 1.0)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
def test_dtypes_are_the_leaves_own(kernel, device, dtype):
    problem = make_problem(
        6, 8, dtype=dtype, norm_dtype=torch.float32, mask="soft", residual=True, drop_mask=True
    )
    problem.mask = problem.mask.to(torch.float16)
    problem.drop_mask = problem.drop_mask.float()
    problem.weights["norm_in_bias"] = problem.weights["norm_in_bias"].to(BF16)
    leaves = leaves_of(problem)
    got = gradients(kernel, problem, device)
    wanted = reference_gradients(problem, grad_of_output(problem))
    for name, gradient in got.items():
        assert gradient.dtype == leaves[name].dtype
        assert relative_error(gradient, wanted[name]) <= 8e-3 * room(gradient.numel()), name


def test_residual_that_is_the_pair(kernel, device):
    problem = make_problem(9, 16, mask="bool")
    wanted = reference_gradients(problem, grad_of_output(problem))["x"]
    p = problem.to(device)
    p.x = p.residual = p.x.clone().requires_grad_()
    run(kernel, p, device).backward(grad_of_output(problem).to(device))
    assert relative_error(p.x.grad, wanted + grad_of_output(problem).double()) <= LIMIT


def test_drop_mask_in_both_shapes(kernel, device):
    problem = make_problem(8, 16, batch=2, drop_mask=True)
    four = gradients(kernel, problem, device)
    problem.drop_mask = problem.drop_mask.reshape(2 * 8, 16)
    two = gradients(kernel, problem, device)
    assert two["drop_mask"].shape == (16, 16) and four["drop_mask"].shape == (2, 1, 8, 16)
    two["drop_mask"] = two["drop_mask"].view(2, 1, 8, 16)
    assert_equal(two, four)


def test_masks_of_fewer_dimensions(kernel, device):
    """The gradient of a broadcast mask is summed to its shape; a bool or int mask has none."""
    problem = make_problem(6, 8, batch=2)
    mask = torch.rand(6)
    problem.mask = mask.expand(2, 6, 6)
    wanted = reference_gradients(problem, grad_of_output(problem))["mask"]
    problem.mask = mask
    got = gradients(kernel, problem, device)["mask"]
    assert relative_error(got, wanted.sum((0, 1))) <= LIMIT
    for dtype in (torch.bool, torch.int32):
        problem.mask = (mask > 0.3).expand(2, 6, 6).to(dtype)
        got = gradients(kernel, problem, device)
        assert "mask" not in got
        wanted = reference_gradients(problem, grad_of_output(problem))
        assert all(relative_error(got[name], wanted[name]) <= LIMIT for name in got)


def test_absent_norm_parameters(kernel, device):
    """Any of the four may be absent, and the others still have their gradients."""
    full = make_problem(7, 8)
    norms = ["norm_in_weight", "norm_in_bias", "norm_out_weight", "norm_out_bias"]
    for absent in (norms, *([name] for name in norms)):
        problem = make_problem(7, 8)
        for name in absent:
            full.weights[name] = torch.full((8,), float(name.endswith("weight")))
        problem.weights |= {n: v for n, v in full.weights.items() if n not in absent}
        wanted = reference_gradients(
            with_leaves(problem, {n: full.weights[n] for n in absent}), grad_of_output(problem)
        )
        problem.weights |= dict.fromkeys(absent)
        got = gradients(kernel, problem, device)
        assert set(wanted) - set(got) == set(absent)
        assert all(relative_error(got[name], wanted[name]) <= LIMIT for name in got)


def test_rows_of_one_constant(kernel, device):
    problem = make_problem(6, 16, mask="soft")
    problem.x[0, 2] = 1000.0
    problem.x[0, :, 4] = -3.0
    wanted = reference_gradients(problem, grad_of_output(problem))
    got = gradients(kernel, problem, device)
    for name in got:
        assert relative_error(got[name], wanted[name]) <= LIMIT, name


def test_all_pairs_masked(kernel, device):
    problem = make_problem(6, 16, residual=True)
    problem.mask = torch.zeros(1, 6, 6)
    wanted = reference_gradients(problem, grad_of_output(problem))
    for name, gradient in gradients(kernel, problem, device).items():
        error = gradient.cpu().double() - wanted[name]
        assert error.norm() <= LIMIT * max(1.0, float(wanted[name].norm())), name


@pytest.mark.parametrize("kind", ["expanded", "strided"])
def test_gradients_of_the_output_of_any_strides(kernel, device, kind):
    problem = make_problem(7, 8, batch=2, mask="bool", drop_mask=True).to(device)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(problem).items()}
    grad = grad_of_output(problem).to(device)
    if kind == "expanded":
        grad = grad[:1, :1, :1, :1].expand(problem.x.shape)
    else:
        grad = grad.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    wanted = reference_gradients(problem, grad)
    out = run(kernel, problem, device)
    for name, got in zip(leaves, torch.autograd.grad(out, leaves.values(), grad), strict=True):
        assert relative_error(got, wanted[name]) <= LIMIT, name


def test_strided_leaves(kernel, device):
    """Gradients arrive in the leaves' places, whatever their strides."""
    problem = make_problem(6, 8, mask="soft", residual=True)
    wanted = reference_gradients(problem, grad_of_output(problem))
    for name in ("x", "residual"):
        value = getattr(problem, name)
        setattr(problem, name, value.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1))
    weights = problem.weights
    weights["p_in_weight"] = weights["p_in_weight"].t().contiguous().t()
    bundle = torch.cat([weights["norm_in_weight"], weights["norm_in_bias"]]).view(2, 8).t()
    weights["norm_in_weight"], weights["norm_in_bias"] = bundle.contiguous().unbind(1)
    leaves = {n: leaf.to(device).requires_grad_() for n, leaf in leaves_of(problem).items()}
    out = run(kernel, with_leaves(problem.to(device), leaves), device)
    grads = torch.autograd.grad(out, leaves.values(), grad_of_output(problem).to(device))
    for name, got in zip(leaves, grads, strict=True):
        assert relative_error(got, wanted[name]) <= LIMIT, name


LAYOUTS = {
    "columns first": lambda w: w.t().contiguous().t(),
    "every other column": lambda w: torch.stack([w, w + 1], dim=-1)[..., 0],
    "unaligned rows": lambda w: torch.nn.functional.pad(w, (1, 2))[:, 1:-2],
    "one row for all": lambda w: w[:1].expand(w.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels, hidden", [(32, 48), (32, 64)] if HAS_GPU else [(32, 48)])
def test_projections_of_any_strides(kernel, device, channels, hidden, layout):
    """On GPUs tiles of projections that lie in two ways once were multiplied wrongly."""
    problem = make_problem(5, channels, hidden, dtype=BF16, mask="soft")
    for name in ("p_in_weight", "g_in_weight", "p_out_weight", "g_out_weight"):
        if name != "p_in_weight" or layout != "one row for all":  # else the product is constant
            problem.weights[name] = LAYOUTS[layout](problem.weights[name])
            assert not problem.weights[name].is_contiguous()
    grad = grad_of_output(problem).to(device)
    found = []
    for weights in (problem.weights, {n: w.contiguous() for n, w in problem.weights.items()}):
        leaves = {name: weight.to(device).requires_grad_() for name, weight in weights.items()}
        leaves["x"] = problem.x.to(device).requires_grad_()
        out = run(kernel, with_leaves(problem.to(device), leaves), device)
        assert_close(out.detach(), problem)
        found.append(torch.autograd.grad(out, leaves.values(), grad))
    for name, strided, contiguous in zip(leaves, *found, strict=True):
        error = relative_error(strided, contiguous.cpu().double())
        assert error <= 1e-2, name


@pytest.mark.parametrize("shape", [(0, 5, 5, 16), (2, 0, 0, 16)])
def test_empty(kernel, device, shape):
    problem = make_problem(4, 16, residual=True)
    problem.x, problem.residual = torch.zeros(shape), torch.zeros(shape)
    problem.mask = torch.ones(shape[:3])
    got = gradients(kernel, problem, device)
    for name, leaf in leaves_of(problem).items():
        assert torch.equal(got[name], torch.zeros_like(leaf, device=device)), name


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_output_is_that_without_a_gradient(kernel, device, dtype):
    problem = make_problem(12, 16, dtype=dtype, mask="soft", residual=True, drop_mask=True)
    wanted = run(kernel, problem, device)
    for recompute in RECOMPUTE:
        problem.x.requires_grad_()
        got = run(kernel, problem, device, recompute=recompute)
        assert got.requires_grad and got.is_contiguous()
        assert torch.equal(got, wanted)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_equal_bits_from_equal_calls(kernel, device, recompute):
    problem = make_problem(
        20 if HAS_GPU else 9, 16, batch=2, dtype=BF16, mask="soft", residual=True, drop_mask=True
    )
    first = gradients(kernel, problem, device, recompute=recompute)
    for _ in range(3 if HAS_GPU else 1):
        assert_equal(gradients(kernel, problem, device, recompute=recompute), first)


def test_recomputed_is_saved(kernel, device):
    """Both choices give the same bits: the product that is computed again is the one saved."""
    for dtype in (BF16, torch.float32):
        problem = make_problem(11, 16, dtype=dtype, mask="soft", drop_mask=True)
        saved = gradients(kernel, problem, device, recompute="product")
        assert_equal(gradients(kernel, problem, device, recompute="all"), saved)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_second_backward_of_a_kept_graph(kernel, device, recompute):
    problem = make_problem(9, 16, mask="soft", residual=True, drop_mask=True).to(device)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
    out = run(kernel, problem, device, recompute=recompute)
    grad = grad_of_output(problem).to(device)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, leaves, grad)


def test_an_input_changed_before_the_backward_is_noticed(kernel, device):
    problem = make_problem(5, 8).to(device)
    leaf = problem.x.clone().requires_grad_()
    problem.x = leaf * 1.0
    out = run(kernel, problem, device)
    problem.x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("recompute, pair_sized", [("product", 1), ("all", 0)])
@pytest.mark.parametrize("channels, hidden", [(16, 16), (8, 24)])
def test_what_is_saved(kernel, device, recompute, pair_sized, channels, hidden):
    """The inputs but for the residual, and at most the product beside them."""
    problem = make_problem(
        16, channels, hidden, batch=2, mask="soft", residual=True, drop_mask=True
    ).to(device)
    for leaf in leaves_of(problem).values():
        leaf.requires_grad_()
    inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves_of(problem).values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(kernel, problem, device, recompute=recompute)
    storages = {t.untyped_storage().data_ptr() for t in saved}
    assert problem.residual.untyped_storage().data_ptr() not in storages
    beside = [t for t in saved if t.untyped_storage().data_ptr() not in inputs and t.numel()]
    pairs = 2 * 16 * 16
    assert sum(t.numel() > 2 * pairs for t in beside) == pair_sized
    moments = 2 * pairs
    assert sum(t.numel() for t in beside) <= pair_sized * (pairs * hidden + moments)


def test_nothing_is_saved_without_a_gradient(kernel, device, submodule, monkeypatch):
    problem = make_problem(5, 8).to(device)
    for value in problem.weights.values():
        value.requires_grad_()
    function = submodule("operators").TriangleMultiplication
    monkeypatch.setattr(function, "apply", None)
    with torch.no_grad():
        assert not run(kernel, problem, device).requires_grad
    with torch.inference_mode():
        out = run(kernel, problem, device)
        assert not out.requires_grad and out.is_inference()


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_double_backward_is_refused(kernel, device, recompute):
    problem = make_problem(5, 8, mask="soft").to(device)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
    out = run(kernel, problem, device, recompute=recompute)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    assert all(grad.requires_grad for grad in grads)
    with pytest.raises(
        NotImplementedError,
        match="the gradients of the triangle multiplication can't be differentiated again; the "
        "transforms of torch.func can take higher derivatives, in plain PyTorch",
    ):
        sum(grad.square().sum() for grad in grads).backward()


def test_a_graph_of_the_gradients_alone_changes_nothing(kernel, device):
    problem = make_problem(5, 8, mask="soft").to(device)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
    grad = grad_of_output(problem).to(device)
    plain = torch.autograd.grad(run(kernel, problem, device), leaves, grad)
    graphed = torch.autograd.grad(run(kernel, problem, device), leaves, grad, create_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(plain, graphed, strict=True))


def test_inplace_needs_no_gradient(kernel, device):
    problem = make_problem(5, 8, residual=True).to(device)
    problem.weights["p_in_weight"].requires_grad_()
    message = "inplace must be False where a gradient is needed; got True"
    with pytest.raises(ValueError, match=message):
        run(kernel, problem, device, inplace=True)


@pytest.mark.parametrize("biases", [False, True])
def test_recompute_is_checked(kernel, device, biases):
    problem = make_problem(5, 8, biases=biases)
    for recompute in ("none", "", None, True):
        with pytest.raises(ValueError) as caught:
            run(kernel, problem, device, recompute=recompute)
        assert str(caught.value) == f"recompute must be 'product' or 'all'; got {recompute!r}"


class TestTransforms:
    """torch.func and forward-mode AD follow the formula, to any order."""

    def test_grad(self, kernel, device):
        problem = make_problem(6, 8, direction="incoming", mask="soft")
        wanted = reference_gradients(problem, grad_of_output(problem))["x"]
        p, grad = problem.to(device), grad_of_output(problem).to(device)

        def loss(x: Tensor) -> Tensor:
            return (run(kernel, with_leaves(p, {"x": x}), device) * grad).sum()

        assert relative_error(torch.func.grad(loss)(p.x), wanted) <= LIMIT
        batch = torch.func.vmap(torch.func.grad(loss))(torch.stack([p.x, 2 * p.x]))
        assert relative_error(batch[0], wanted) <= LIMIT

    def test_second_derivatives(self, kernel, device):
        problem = make_problem(4, 5).to(device)
        weight = problem.weights["norm_in_weight"]

        def loss(weight: Tensor) -> Tensor:
            return run(kernel, with_leaves(problem, {"norm_in_weight": weight}), device).sum()

        def exact(weight: Tensor) -> Tensor:
            return formula(with_leaves(problem, {"norm_in_weight": weight})).sum()

        wanted = torch.func.hessian(exact)(weight.cpu().double())
        assert relative_error(torch.func.hessian(loss)(weight), wanted) <= 1e-4

    def test_batched_gradients(self, kernel, device):
        problem = make_problem(6, 8, mask="soft").to(device)
        leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
        grads = torch.randn(3, *problem.x.shape, device=device)
        out = run(kernel, problem, device)
        batched = torch.autograd.grad(
            out, leaves, grads, is_grads_batched=True, retain_graph=True
        )
        for index, grad in enumerate(grads):
            alone = torch.autograd.grad(out, leaves, grad, retain_graph=True)
            assert all(torch.equal(b[index], a) for b, a in zip(batched, alone, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_under_checkpoint(kernel, device, reentrant, recompute):
    problem = make_problem(9, 16, dtype=BF16, mask="soft", residual=True, drop_mask=True)
    wanted = gradients(kernel, problem, device)
    got = gradients(
        kernel, problem, device, recompute=recompute,
        through=lambda call, *leaves: checkpoint(call, *leaves, use_reentrant=reentrant),
    )  # fmt: skip
    assert_equal(got, wanted)


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_autocast_does_not_reach_inside(kernel, device, dtype, backward_inside):
    """The dtype of the pair tensor decides, in the backward too."""
    problem = make_problem(9, 16, dtype=dtype, mask="soft", drop_mask=True)
    wanted = gradients(kernel, problem, device)
    leaves = {n: leaf.requires_grad_() for n, leaf in fresh_leaves(problem, device).items()}
    moved = with_leaves(problem.to(device), leaves)
    autocast = torch.autocast(device, dtype=BF16)
    with autocast:
        out = run(kernel, moved, device)
    with autocast if backward_inside else contextlib.nullcontext():
        out.backward(grad_of_output(problem).to(device))
    assert_equal({name: leaf.grad for name, leaf in leaves.items()}, wanted)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_ops_are_registered_as_torch_wants_them(kernel, device, submodule, recompute):
    problem = make_problem(
        5, 16, direction="incoming", mask="soft", residual=True, drop_mask=True
    ).to(device)
    for leaf in leaves_of(problem).values():
        leaf.requires_grad_()
    call = as_call(submodule("_call"), problem, precision="default", recompute=recompute)
    call = call._replace(drop_mask=call.drop_mask.detach().requires_grad_())
    ops = submodule("_ops").ops
    results = torch.library.opcheck(ops.trimul_fwd_saving.default, call.flat())
    assert set(results.values()) == {"SUCCESS"}

    with torch.no_grad():
        _, product, moments = ops.trimul_fwd_saving(*call.flat())
    kept = (product, moments) if recompute == "product" else (None, None)
    grad = grad_of_output(problem).to(device)
    flat = call._replace(residual=None).flat()
    detached = [value.detach() if isinstance(value, Tensor) else value for value in flat]
    given = dict(zip(submodule("_call").FLAT, detached, strict=True))
    names = submodule("_call").DIFFERENTIABLE
    for needs in ([given[name] is not None for name in names], [True] + [False] * 14):
        backward = (grad, *kept, needs, *detached)
        results = torch.library.opcheck(ops.trimul_bwd.default, backward)
        assert set(results.values()) == {"SUCCESS"}


class TestCompiled:
    @staticmethod
    def gradients_of(block, problem: Problem, device: str) -> dict[str, Tensor]:
        """Of all leaves of `block`(x, residual, mask, drop_mask, weights)."""
        leaves = {n: v.requires_grad_() for n, v in fresh_leaves(problem, device).items()}
        p = with_leaves(problem.to(device), leaves)
        out = block(p.x, p.residual, p.mask, p.drop_mask, p.weights)
        out.backward(grad_of_output(problem).to(device))
        return {name: leaf.grad for name, leaf in leaves.items()}

    @staticmethod
    def block(kernel, recompute: str = "product", **options):
        """The function, compiled into one graph."""
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, **{"backend": "aot_eager", **options})
        def block(x, residual, mask, drop_mask, weights):
            return kernel.triangle_multiplicative_update_with_residual(
                x, "outgoing", residual, drop_mask, mask=mask, recompute=recompute, **weights
            )

        return block

    @pytest.mark.parametrize("recompute", RECOMPUTE)
    def test_into_one_graph(self, kernel, device, recompute):
        problem = make_problem(9, 16, mask="soft", residual=True, drop_mask=True)
        wanted = gradients(kernel, problem, device, recompute=recompute)
        block = self.block(kernel, recompute)
        assert_equal(self.gradients_of(block, problem, device), wanted)

    @pytest.mark.parametrize("dynamic", [None, True])
    def test_compiles_once_more_at_most_when_lengths_vary(self, kernel, device, dynamic):
        backend = CompileCounterWithBackend("aot_eager")
        block = self.block(kernel, backend=backend, dynamic=dynamic)
        graphs = []
        for length in (5, 6, 8, 7, 9):
            problem = make_problem(length, 16, mask="soft", residual=True, drop_mask=True)
            wanted = gradients(kernel, problem, device)
            assert_equal(self.gradients_of(block, problem, device), wanted)
            graphs.append(len(backend.graphs))
        assert graphs[-1] <= 2 and graphs[1:] == [graphs[-1]] * 4

    def test_only_what_needs_a_gradient_has_one(self, kernel, device, submodule):
        problem = make_problem(6, 8, mask="soft").to(device)
        block = self.block(kernel)
        problem.x.requires_grad_()
        problem.weights["p_in_weight"].requires_grad_()
        out = block(problem.x, None, problem.mask, None, problem.weights)
        with Asked(submodule("_call").DIFFERENTIABLE) as asked:
            out.backward(grad_of_output(problem).to(device))
        assert asked.names == [{"x", "p_in_weight"}]


@pytest.mark.kernels_ci
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_captured_in_a_cuda_graph(kernel, recompute):
    first, second = (
        make_problem(33, 32, dtype=BF16, mask="soft", residual=True, seed=seed) for seed in (0, 1)
    )
    grad_out = grad_of_output(first).cuda()
    leaves = {name: leaf.requires_grad_() for name, leaf in fresh_leaves(first, "cuda").items()}
    problem = with_leaves(first.to("cuda"), leaves)

    def step() -> tuple[Tensor, ...]:
        out = run(kernel, problem, "cuda", recompute=recompute)
        return torch.autograd.grad(out, list(leaves.values()), grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, leaf in leaves_of(second).items():
            leaves[name].copy_(leaf)
    graph.replay()
    got = [gradient.clone() for gradient in captured]
    for name, mine, eager in zip(leaves, got, step(), strict=True):
        assert torch.equal(mine, eager), name


def test_reference_gradients_are_those_of_central_differences():
    """The oracle of this file is autograd's of the formula; the formula itself is its judge."""
    problem = make_problem(4, 5, 3, mask="soft", residual=True, drop_mask=True)
    probe = grad_of_output(problem).double()
    step = 1e-5
    for name, gradient in reference_gradients(problem, grad_of_output(problem)).items():
        leaf = leaves_of(problem)[name].double()
        along = torch.randn(leaf.shape, generator=seeded(2)).double()
        ahead = reference(with_leaves(problem, {name: leaf + step * along}))
        behind = reference(with_leaves(problem, {name: leaf - step * along}))
        slope = float(((ahead - behind) * probe).sum()) / (2 * step)
        assert float((gradient * along).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-6)
