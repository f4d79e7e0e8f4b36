"""The backward on the Triton path against float64 autograd: every gradient, alone and together."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import Problem, in_tree_module, make_problem, relative_error
from test_aten import PeakBytes

PARAMETERS = (
    "norm_in_weight", "norm_in_bias", "p_in_weight", "p_in_bias", "g_in_weight", "g_in_bias",
    "norm_out_weight", "norm_out_bias", "p_out_weight", "p_out_bias", "g_out_weight", "g_out_bias",
)  # fmt: skip
FLOAT32_BUDGET = 2e-5


def leaves_of(problem: Problem) -> dict[str, torch.Tensor]:
    """The differentiable tensors of the problem by name; the masks only where they are real."""
    leaves = {"x": problem.x, **problem.weights, **problem.biases}
    for name in ("mask", "drop_mask"):
        value = getattr(problem, name)
        if value is not None and value.is_floating_point():
            leaves[name] = value
    return leaves


def plain_formula(leaves: dict[str, torch.Tensor], problem: Problem) -> torch.Tensor:
    """Algorithms 11 and 12 as they are written, in the dtype of the leaves."""
    x, get = leaves["x"], leaves.get
    mask = get("mask", problem.mask)
    z = F.layer_norm(x, x.shape[-1:], get("norm_in_weight"), get("norm_in_bias"), problem.eps)
    ab = F.linear(z, get("p_in_weight"), get("p_in_bias"))
    ab = ab * torch.sigmoid(F.linear(z, get("g_in_weight"), get("g_in_bias")))
    if mask is not None:
        ab = ab * mask.unsqueeze(-1).to(x.dtype)
    a, b = ab.chunk(2, dim=-1)
    equation = "bikd,bjkd->bijd" if problem.direction == "outgoing" else "bkid,bkjd->bijd"
    t = torch.einsum(equation, a, b)
    t = F.layer_norm(t, t.shape[-1:], get("norm_out_weight"), get("norm_out_bias"), problem.eps)
    delta = F.linear(t, get("p_out_weight"), get("p_out_bias"))
    delta = delta * torch.sigmoid(F.linear(z, get("g_out_weight"), get("g_out_bias")))
    drop_mask = get("drop_mask", problem.drop_mask)
    return delta if drop_mask is None else delta * drop_mask


def grad_out_of(problem: Problem) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(problem.x.shape, generator=generator).to(problem.x.dtype)


def gradients_in_float64(problem: Problem, grad_out: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = {
        name: leaf.detach().cpu().double().requires_grad_()
        for name, leaf in leaves_of(problem).items()
    }
    out = plain_formula(leaves, problem)
    found = torch.autograd.grad(out, list(leaves.values()), grad_out.cpu().double())
    return dict(zip(leaves, found, strict=True))


@pytest.fixture
def call_of(submodule, on_triton):
    """call_of(problem): the problem on the device as the path takes it."""

    def make(problem: Problem, precision: str = "fp32"):
        p = problem.to(on_triton)
        values = {**p.weights, **p.biases}
        return submodule("triton_path").TritonCall(
            p.x, p.direction, p.mask, p.residual,
            None if p.drop_mask is None else p.drop_mask.squeeze(1),
            submodule("validation").Weights(**{name: values.get(name) for name in PARAMETERS}),
            p.eps, p.eps, precision, False,
        )  # fmt: skip

    return make


@pytest.fixture
def backward(submodule, call_of, on_triton):
    """backward(problem, needs=None, recompute=False): the gradients by name."""

    def run(problem: Problem, needs=None, recompute=False, grad_out=None, precision="fp32"):
        call = call_of(problem, precision)
        saved = (None, None)
        if not recompute:
            _, *saved = submodule("triton_path").run_triton_saving(call)
        grad_out = grad_out_of(problem) if grad_out is None else grad_out
        return submodule("triton_backward").run_triton_backward(
            call, grad_out.to(on_triton), *saved, frozenset(needs or leaves_of(problem))
        )

    return run


def assert_gradients(got: dict, problem: Problem, budget: float, grad_out=None) -> None:
    wanted = gradients_in_float64(problem, grad_out_of(problem) if grad_out is None else grad_out)
    leaves = leaves_of(problem)
    errors = {}
    for name, gradient in got.items():
        want = wanted[name].squeeze(1) if name == "drop_mask" else wanted[name]
        assert gradient.shape == want.shape and gradient.dtype == leaves[name].dtype, name
        errors[name] = relative_error(gradient, want)
    assert all(error <= budget for error in errors.values()), errors


@pytest.mark.kernels_ci
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("length", [5, 17, 33])
def test_every_gradient(backward, direction, length, recompute):
    problem = make_problem(
        length, 32, 48, direction=direction, mask="soft", drop_mask=True, biases=True, batch=2
    )
    got = backward(problem, recompute=recompute)
    assert set(got) == {"x", "mask", "drop_mask", *PARAMETERS}
    assert_gradients(got, problem, FLOAT32_BUDGET)


@pytest.mark.parametrize("channels, hidden", [(16, 16), (48, 24), (5, 3), (1, 1), (200, 16)])
def test_widths(backward, channels, hidden):
    problem = make_problem(6, channels, hidden, mask="soft", biases=True)
    assert_gradients(backward(problem), problem, FLOAT32_BUDGET)


@pytest.mark.parametrize("length", [1, 2, 16])
def test_lengths(backward, length):
    problem = make_problem(length, 16, mask="soft", direction="incoming")
    assert_gradients(backward(problem), problem, FLOAT32_BUDGET)
