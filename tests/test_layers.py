"""The Hub layer in the place of the real `EsmFold2TriangleMultiplicativeUpdate` of transformers."""

import copy
import types

import pytest
import torch
from esmfold2_trimul_tools.folding.fold import Settings, compare, fold
from esmfold2_trimul_tools.folding.model import random_model, restore_stock, triangle_modules
from esmfold2_trimul_tools.folding.sequences import Record
from folding import TINY_SITES, tiny_config
from fresh_process import ROOT
from helpers import (
    ERROR_BUDGET,
    assert_no_worse,
    in_tree_module,
    make_problem,
    reference,
    relative_error,
    seeded,
)
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

FLOWS = ("outgoing", "incoming")
# Channels, length, flow, visibility; the wide ones are few and short for the interpreter's sake.
CASES = [
    *((16, 15, flow, kind) for flow in FLOWS for kind in (None, "bool", "float", "expanded")),
    (48, 16, "outgoing", "bool"),
    (48, 16, "incoming", None),
    (128, 13, "outgoing", "expanded"),
    (128, 16, "incoming", "float"),
]


@pytest.fixture(params=["aten", "triton"])
def path(request) -> str:
    return request.param


@pytest.fixture
def device(request, path) -> str:
    """The device whose tensors take the path."""
    return request.getfixturevalue("on_triton") if path == "triton" else "cpu"


@pytest.fixture(params=["aten", "triton"])
def grad_device(request) -> str:
    """The device whose tensors take the path, with a gradient."""
    return request.getfixturevalue("on_triton") if request.param == "triton" else "cpu"


@pytest.fixture
def bind(kernel):
    """bind(module): our layer's forward, with this module as its `self`."""
    forward = kernel.layers.ESMFold2TriangleMultiplication.forward
    return lambda module: types.MethodType(forward, module)


MODES = {
    "inference": Mode.INFERENCE,
    "compiled inference": Mode.INFERENCE | Mode.TORCH_COMPILE,
    "training": Mode.TRAINING,
    "compiled training": Mode.TRAINING | Mode.TORCH_COMPILE,
}


def swap_through_kernels(
    model: nn.Module, mode: Mode = Mode.INFERENCE, use_fallback: bool = True
) -> None:
    """Our layer at every site, as the kernels library puts it there."""
    device = next(model.parameters()).device.type
    layer = LocalLayerRepository(repo_path=ROOT, layer_name="ESMFold2TriangleMultiplication")
    mapping = {"EsmFold2TriangleMultiplication": {device: {mode: layer}}}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=mode, device=device, use_fallback=use_fallback)


def problem_and_module(length: int, channels: int, device: str = "cpu", **others):
    problem = make_problem(length, channels, **others).to(device)
    return problem, in_tree_module(problem)


def checkpoint_without_reentry(function, *arguments, **keywords):
    return checkpoint(function, *arguments, use_reentrant=False, **keywords)


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return relative_error(got, wanted.detach().cpu().double())


@pytest.mark.kernels_ci
@pytest.mark.parametrize("channels, length, flow, visibility", CASES)
@torch.no_grad()
def test_fp32_agrees_with_the_in_tree_module(bind, device, channels, length, flow, visibility):
    problem, module = problem_and_module(length, channels, device, direction=flow, mask=visibility)
    wanted = module(problem.x, problem.mask)
    got = bind(module)(problem.x, visibility=problem.mask)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    assert distance(got, wanted) <= 1e-5


@pytest.mark.kernels_ci
@pytest.mark.parametrize("width", [16, 48, 128])
@torch.no_grad()
def test_bf16_error_is_well_below_the_in_tree_modules(bind, device, width):
    draws = []
    for seed, (channels, length, flow, visibility) in enumerate(CASES):
        if channels != width:
            continue
        problem, module = problem_and_module(
            length, channels, device, direction=flow, mask=visibility, dtype=torch.bfloat16,
            seed=seed,
        )  # fmt: skip
        assert module.norm_start.weight.dtype == module.norm_mix.bias.dtype == torch.float32
        got, stock = (forward(problem.x, problem.mask) for forward in (bind(module), module))
        assert got.dtype == torch.bfloat16
        draws.append((got, stock, reference(problem)))
    assert_no_worse(draws, 0.85)


@pytest.mark.parametrize("flow", FLOWS)
@torch.no_grad()
def test_through_the_kernels_library(bind, device, flow):
    problem, module = problem_and_module(9, 16, device, direction=flow, mask="bool")
    stock = module(problem.x, problem.mask)
    bound = bind(module)(problem.x, problem.mask)
    swap_through_kernels(module)
    got = module(problem.x, visibility=problem.mask)
    assert torch.equal(got, bound)
    assert not torch.equal(got, stock)
    restore_stock(module)
    assert torch.equal(module(problem.x, problem.mask), stock)


@pytest.mark.parametrize("mode", MODES)
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


@torch.no_grad()
def test_chunk_size_does_not_matter(bind):
    problem, module = problem_and_module(24, 16)
    outputs = []
    for module.chunk_size in (None, 0, 1, 7, 64):
        outputs.append(bind(module)(problem.x))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("eps_start, eps_mix", [(0.5, 3.0), (3.0, 0.5), (1e-12, 1.0)])
@torch.no_grad()
def test_each_norms_own_eps_is_read(bind, device, eps_start, eps_mix):
    problem, module = problem_and_module(9, 16, device)
    module.norm_start.eps, module.norm_mix.eps = eps_start, eps_mix
    wanted = module(problem.x)
    assert distance(bind(module)(problem.x), wanted) <= 1e-5
    # The in-tree module tells these numbers apart, or this would show nothing.
    module.norm_start.eps, module.norm_mix.eps = eps_mix, eps_start
    assert distance(module(problem.x), wanted) > 1e-2


PARAMETERS = [
    f"{part}.{name}"
    for part, names in {
        "norm_start": ("weight", "bias"),
        "norm_mix": ("weight", "bias"),
        "proj_bundle": ("weight",),
        "proj_emit": ("weight",),
        "proj_gate": ("weight",),
    }.items()
    for name in names
]


@pytest.mark.parametrize("replace", [False, True], ids=["in_place", "replaced"])
@pytest.mark.parametrize("name", PARAMETERS)
@torch.no_grad()
def test_parameters_are_read_at_each_call(name, replace):
    problem, module = problem_and_module(9, 16)
    in_tree = copy.deepcopy(module)
    swap_through_kernels(module)
    before = module(problem.x)
    for model in (module, in_tree):
        part, _, leaf = name.rpartition(".")
        owner = model.get_submodule(part)
        changed = getattr(owner, leaf) * torch.linspace(0.5, 1.5, 16)
        if replace:
            setattr(owner, leaf, nn.Parameter(changed))
        else:
            getattr(owner, leaf).copy_(changed)
    wanted = in_tree(problem.x)
    assert distance(before, wanted) > 1e-2
    assert distance(module(problem.x), wanted) <= 1e-5


@pytest.mark.parametrize("flow, dtype", [("outgoing", torch.bfloat16), ("incoming", torch.float32)])
@torch.no_grad()
def test_a_padded_batch_gives_the_single_sequences_rows(bind, path, device, flow, dtype):
    """Bit for bit on a GPU: its sums run along k in order, and the pads add zeros to them.

    On a CPU within rounding, whether by ATen or by the interpreter: a BLAS may split a sum in other
    places where it is longer, or where its row lies elsewhere in the tile.
    """
    lengths, longest = (11, 18), 18
    problem, module = problem_and_module(
        longest, 16, device, batch=len(lengths), direction=flow, dtype=dtype
    )
    position = torch.arange(longest, device=device)
    real = position < torch.tensor(lengths, device=device)[:, None]
    visibility = real[:, :, None] & real[:, None, :]
    layer = bind(module)
    batch = layer(problem.x, visibility)
    for index, length in enumerate(lengths):
        rows = slice(0, length)
        alone = layer(problem.x[index : index + 1, rows, rows])
        got = batch[index : index + 1, rows, rows]
        if device == "cpu":
            assert distance(got, alone) <= ERROR_BUDGET[dtype]
        else:
            assert torch.equal(got, alone)
    # What lies in the pads does not matter.
    problem.x[~visibility] = 77.0
    assert torch.equal(layer(problem.x, visibility)[visibility], batch[visibility])


@pytest.mark.parametrize("visibility", [None, "bool"])
@torch.no_grad()
def test_compiles_without_graph_breaks(device, visibility):
    problem, module = problem_and_module(9, 16, device, mask=visibility)
    swap_through_kernels(module)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(problem.x, problem.mask), module(problem.x, problem.mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_is_the_in_tree_modules(bind, device, dtype):
    problem, module = problem_and_module(15, 16, device, mask="bool")
    with torch.autocast(device, dtype=dtype):
        stock = module(problem.x, problem.mask)
        got = bind(module)(problem.x, problem.mask)
    assert got.dtype == stock.dtype == dtype
    assert_no_worse([(got, stock, reference(problem))], 1.05)


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


def gradients(forward, module, problem) -> dict[str, torch.Tensor]:
    """Of x and every parameter, for a fixed random gradient of the output."""
    module.zero_grad()
    x = problem.x.clone().requires_grad_()
    out = forward(x, problem.mask)
    generator = seeded(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    return {"x": x.grad} | {name: value.grad for name, value in module.named_parameters()}


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


@pytest.mark.parametrize("dynamic", [None, True])
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_gradients_under_autocast(bind, grad_device, dtype):
    problem, module = problem_and_module(9, 16, grad_device, mask="bool")
    wanted = gradients(under_autocast(bind(module), grad_device, dtype), module, problem)
    swap_through_kernels(module, MODES["compiled training"])
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = gradients(under_autocast(compiled, grad_device, dtype), module, problem)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
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
    monkeypatch.setenv(variable, "product")
    assert saved_elements() == kept
    monkeypatch.setenv(variable, "all")
    assert saved_elements() <= kept - problem.x.numel()
    got = gradients(layer, module, problem)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    monkeypatch.setenv(variable, "everything")
    with pytest.raises(ValueError) as caught:
        layer(problem.x)
    assert str(caught.value) == f"{variable} must be 'product' or 'all'; got 'everything'"


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


def test_a_whole_model_folds_as_on_the_stock_path(submodule, monkeypatch, path, device):
    model = random_model(torch.device(device), torch.float32, 0, tiny_config())
    sequence = "MQIFVKTL" if path == "triton" else "MQIFVKTLTGKX"
    record, settings = Record("short", sequence), Settings(loops=1, samples=1, steps=2, seed=3)
    stock = fold(model, record, settings)

    swap_through_kernels(model)
    entry = submodule("paths")
    execution_path, taken = entry.execution_path, []

    def noting(*arguments):
        taken.append(execution_path(*arguments))
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(entry, "execution_path", noting)
        differences = compare(fold(model, record, settings), stock)
    # Six of the ten sites run in each of the two passes; coda and confidence head run once.
    assert len(triangle_modules(model)) == TINY_SITES
    assert [one.name for one in taken] == [path] * (2 * 6 + 4)
    limit = 1e-4 if device == "cpu" else 1e-3  # a GPU's fp32 dots are three of TF32
    assert 0 < differences.distogram_max < limit
    assert max(differences.plddt_max, differences.ptm, differences.plddt_of_means) < limit
    assert differences.coords_rmsd < 1e-2
