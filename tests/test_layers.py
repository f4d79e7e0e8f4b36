"""The Hub layer in the place of the real `EsmFold2TriangleMultiplicativeUpdate` of transformers."""

import copy
import types

import pytest
import torch
from esmfold2_trimul_tools.folding.fold import Settings, compare, fold
from esmfold2_trimul_tools.folding.model import random_model, restore_stock, triangle_modules
from esmfold2_trimul_tools.folding.sequences import Record
from folding import TINY_SITES, tiny_config
from helpers import ERROR_BUDGET, assert_no_worse, reference
from hub_layer import FLOWS, PARAMETERS, distance, problem_and_module, swap_through_kernels
from torch import nn

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


@pytest.fixture
def bind(kernel):
    """bind(module): our layer's forward, with this module as its `self`."""
    forward = kernel.layers.ESMFold2TriangleMultiplication.forward
    return lambda module: types.MethodType(forward, module)


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
