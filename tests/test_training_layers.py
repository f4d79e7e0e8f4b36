"""The Hub layer with gradients, in the place of the real `EsmFold2TriangleMultiplicativeUpdate`."""

import copy
import types

import pytest
import torch
from esmfold2_trimul_tools.folding.model import random_model, triangle_modules
from folding import tiny_config
from helpers import assert_no_worse, in_tree_module, make_problem, reference
from hub_layer import (
    FLOWS,
    MODES,
    PARAMETERS,
    distance,
    gradients,
    problem_and_module,
    swap_through_kernels,
)
from kernels import Mode
from selection import pairwise, slow
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transitions import PATHS


@pytest.fixture(params=PATHS)
def grad_device(request) -> str:
    """The device whose tensors take the path, with a gradient."""
    return request.getfixturevalue("on_triton") if request.param == "triton" else "cpu"


@pytest.fixture
def bind(kernel):
    """bind(module): our layer's forward, with this module as its `self`."""
    forward = kernel.layers.ESMFold2TriangleMultiplication.forward
    return lambda module: types.MethodType(forward, module)


def checkpoint_without_reentry(function, *arguments, **keywords):
    return checkpoint(function, *arguments, use_reentrant=False, **keywords)


@pytest.mark.parametrize(
    "grad_device, mode",
    [("aten", mode) for mode in MODES]
    + [("triton", "training"), ("triton", "compiled inference")]
    + [slow("triton", "inference"), slow("triton", "compiled training")],
    indirect=["grad_device"],
)
def test_kernelize_takes_the_layer_in_every_mode(bind, grad_device, mode):
    """Without a fallback: a layer that is not fit for the mode would be refused."""
    problem, module = problem_and_module(9, 16, grad_device, mask="bool")
    bound = gradients(bind(module), module, problem)
    swap_through_kernels(module, MODES[mode], use_fallback=False)
    call = module
    if Mode.TORCH_COMPILE in MODES[mode]:
        torch._dynamo.reset()
        call = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = gradients(call, module, problem)
    assert all(torch.equal(got[name], bound[name]) for name in bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_gradients(bind, grad_device, dtype):
    problem, module = problem_and_module(15, 16, grad_device, mask="bool")
    with torch.autocast(grad_device, dtype=dtype):
        stock = module(problem.x, problem.mask)
        got = bind(module)(problem.x, problem.mask)
    assert got.dtype == stock.dtype == dtype
    assert got.requires_grad
    # One rounding more than the in-tree module's: x itself is taken in the autocast dtype.
    assert_no_worse([(got, stock, reference(problem))], 1.15)


@pytest.mark.parametrize("visibility", [None, "bool", "float"])
@pytest.mark.parametrize("flow", FLOWS)
def test_gradients_agree_with_the_in_tree_modules(bind, grad_device, flow, visibility):
    problem, module = problem_and_module(12, 16, grad_device, direction=flow, mask=visibility)
    wanted = gradients(module, module, problem)
    got = gradients(bind(module), module, problem)
    assert set(got) == {"x", *PARAMETERS}
    for name in got:
        assert distance(got[name], wanted[name]) <= 1e-5, name


def test_gradients_of_the_compiled_module(grad_device):
    problem, module = problem_and_module(9, 16, grad_device, mask="bool")
    wanted = gradients(module, module, problem)
    swap_through_kernels(module, MODES["compiled training"])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = gradients(compiled, module, problem)
    for name in got:
        assert distance(got[name], wanted[name]) <= 1e-5, name


@pytest.mark.parametrize(
    "grad_device, dynamic",
    [("aten", True), ("triton", None), slow("aten", None), slow("triton", True)],
    indirect=["grad_device"],
)
def test_the_compiled_module_trains_on_any_length(grad_device, dynamic):
    module = in_tree_module(make_problem(1, 16)).to(grad_device)
    in_tree = copy.deepcopy(module)
    swap_through_kernels(module, MODES["compiled training"])
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (9, 12, 17, 11):
        problem = make_problem(length, 16, mask="bool").to(grad_device)
        wanted = gradients(in_tree, in_tree, problem)
        got = gradients(compiled, module, problem)
        assert all(distance(got[name], wanted[name]) <= 1e-5 for name in got)
    assert len(backend.graphs) <= 2


def draws_of_gradients(ours, stock, module, device: str, dtype: torch.dtype):
    """Gradients of two forwards of the module and of its own in float32, for pair after pair."""
    exact = copy.deepcopy(module).float()
    for seed in range(4):
        problem = make_problem(7, 32, dtype=dtype, mask="bool", seed=seed).to(device)
        got, other = (gradients(forward, module, problem) for forward in (ours, stock))
        assert all(got[name].dtype == other[name].dtype for name in other)
        problem.x = problem.x.float()
        wanted = gradients(exact, exact, problem)
        yield got, other, {name: value.cpu().double() for name, value in wanted.items()}


def test_bf16_gradients_are_as_good_as_the_in_tree_modules(bind, grad_device):
    _, module = problem_and_module(7, 32, grad_device, dtype=torch.bfloat16)
    draws = draws_of_gradients(bind(module), module, module, grad_device, torch.bfloat16)
    assert_no_worse(draws, 1.0)


def under_autocast(forward, device: str, dtype: torch.dtype):
    def run(*arguments):
        with torch.autocast(device, dtype=dtype):
            return forward(*arguments)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast(bind, grad_device, dtype):
    """fp32 parameters get fp32 gradients, as near to the exact ones as the in-tree module's."""
    _, module = problem_and_module(7, 32, grad_device)
    forwards = (under_autocast(of, grad_device, dtype) for of in (bind(module), module))
    draws = draws_of_gradients(*forwards, module, grad_device, torch.float32)
    assert_no_worse(draws, 1.1)


@pytest.mark.parametrize(
    "grad_device, dtype",
    [("aten", torch.bfloat16), ("triton", torch.float16)]
    + [slow("aten", torch.float16), slow("triton", torch.bfloat16)],
    indirect=["grad_device"],
)
def test_compiled_gradients_under_autocast(bind, grad_device, dtype):
    problem, module = problem_and_module(9, 16, grad_device, mask="bool")
    wanted = gradients(under_autocast(bind(module), grad_device, dtype), module, problem)
    swap_through_kernels(module, MODES["compiled training"])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = gradients(under_autocast(compiled, grad_device, dtype), module, problem)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "grad_device, autocast, reentrant",
    pairwise(PATHS, [False, True], [False, True]),
    indirect=["grad_device"],
)
def test_gradients_under_checkpoint(bind, grad_device, autocast, reentrant):
    problem, module = problem_and_module(12, 16, grad_device, mask="float")
    layer = bind(module)

    def call(*arguments):
        with torch.autocast(grad_device, dtype=torch.bfloat16, enabled=autocast):
            return layer(*arguments)

    def checkpointed(*arguments):
        with torch.autocast(grad_device, dtype=torch.bfloat16, enabled=autocast):
            return checkpoint(layer, *arguments, use_reentrant=reentrant)

    wanted = gradients(call, module, problem)
    got = gradients(checkpointed, module, problem)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_functional_call(bind, grad_device):
    """Parameters from a call's arguments, and their gradients there, not at the module's own."""
    problem, module = problem_and_module(9, 16, grad_device, mask="bool")
    wanted = gradients(bind(module), module, problem)
    swap_through_kernels(module, MODES["training"])
    module.zero_grad()
    parameters = {
        name: value.detach().clone().requires_grad_()
        for name, value in module.named_parameters()
    }

    def call(x, mask):
        return torch.func.functional_call(module, parameters, (x, mask))

    got = gradients(call, module, problem)
    assert torch.equal(got["x"], wanted["x"])
    for name, value in parameters.items():
        assert got[name] is None
        assert torch.equal(value.grad, wanted[name])


def test_frozen_parameters_have_no_gradient(bind, grad_device):
    problem, module = problem_and_module(9, 16, grad_device)
    wanted = gradients(bind(module), module, problem)
    module.requires_grad_(False)
    module.norm_mix.weight.requires_grad_()
    got = gradients(bind(module), module, problem)
    assert {name for name, value in got.items() if value is not None} == {"x", "norm_mix.weight"}
    assert torch.equal(got["norm_mix.weight"], wanted["norm_mix.weight"])
    assert torch.equal(got["x"], wanted["x"])


def test_recompute_is_read_from_the_environment(bind, grad_device, monkeypatch):
    problem, module = problem_and_module(12, 16, grad_device, mask="bool")
    layer, variable = bind(module), "ESMFOLD2_TRIMUL_RECOMPUTE"

    def saved_elements() -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            layer(problem.x, problem.mask)
        return sum(saved)

    wanted, kept = gradients(layer, module, problem), saved_elements()
    for word in ("none", "product", "all"):
        monkeypatch.setenv(variable, word)
        elements = saved_elements()
        assert elements <= kept - problem.x.numel() if word == "all" else elements <= kept
        assert elements == kept or word != "none"
        got = gradients(layer, module, problem)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    monkeypatch.setenv(variable, "everything")
    with pytest.raises(ValueError) as caught:
        layer(problem.x)
    assert str(caught.value) == f"{variable} must be 'none', 'product' or 'all'; got 'everything'"


def test_a_training_step_of_a_whole_trunk(submodule, grad_device):
    """Every site of a small model's trunk, checkpointed as transformers does it."""
    model = random_model(torch.device(grad_device), torch.float32, 0, tiny_config())
    trunk = next(m for m in model.modules() if type(m).__name__ == "EsmFold2PairUpdateStack")
    channels = next(iter(triangle_modules(trunk).values())).dim
    problem = make_problem(9, channels, mask="bool").to(grad_device)
    trunk.train()
    for layer in trunk.modules():
        if hasattr(layer, "gradient_checkpointing"):
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = checkpoint_without_reentry
    wanted = gradients(trunk, trunk, problem)
    swap_through_kernels(trunk, MODES["training"])
    got = gradients(trunk, trunk, problem)
    for name, gradient in got.items():
        assert distance(gradient, wanted[name]) <= 1e-4, name
