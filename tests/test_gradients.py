"""Gradients of the two public functions against float64, whatever the arguments and strides."""

import pytest
import torch
from conftest import HAS_GPU
from gradients_of_calls import (
    BF16,
    LIMIT,
    RECOMPUTE,
    Asked,
    assert_equal,
    grad_of_output,
    gradients,
)
from helpers import (
    assert_close,
    assert_no_worse,
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
    mask = torch.rand(6, 6)
    problem.mask = mask.expand(2, 6, 6)
    wanted = reference_gradients(problem, grad_of_output(problem))["mask"]
    problem.mask = mask
    got = gradients(kernel, problem, device)["mask"]
    assert relative_error(got, wanted.sum(0)) <= LIMIT
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
    """On GPUs tiles of two projections with different layouts once were multiplied wrongly."""
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
    """All choices give the same bits: what is recomputed equals what was saved.

    Float32 as TF32x3: on sm_90 the default's product, if it is kept, is of other products.
    """
    for dtype, precision in ((BF16, None), (torch.float32, "TF32x3")):
        problem = make_problem(11, 16, dtype=dtype, mask="soft", drop_mask=True)
        saved, *others = (
            gradients(kernel, problem, device, recompute=word, precision=precision)
            for word in RECOMPUTE
        )
        for again in others:
            assert_equal(again, saved)


def test_reference_gradients_are_those_of_central_differences():
    """Checks this file's oracle, autograd of the formula, against the formula itself."""
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
