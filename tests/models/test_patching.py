"""`patch`: what a patched model computes, and that it is a model like any other."""

import copy
import functools
import io
import pickle
from dataclasses import FrozenInstanceError

import pytest
import torch
from peer_modules import LENGTH, MODULES, distance, gradients, make, make_mask, make_pair
from peers import randomized
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")
OPENFOLD_NAMES = [name for name in MODULES if name not in ("boltz", "esmfold2", "esm")]


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("name", OPENFOLD_NAMES)
@torch.no_grad()
def test_openfold_adds_in_place(kernel, name, leading):
    module, pair, mask = make(name, "incoming"), make_pair(*leading), make_mask(*leading)
    wanted = pair + module(pair, mask)
    z = pair.clone()
    with kernel.patch(module):
        got = module(z, mask, inplace_safe=True, _add_with_inplace=True)
        assert got is z and distance(got, wanted) <= 1e-5
        z = pair.clone()
        update = module(z, mask=mask, inplace_safe=True, _inplace_chunk_size=4)
        assert torch.equal(z, pair) and distance(pair + update, wanted) <= 1e-5


@pytest.mark.parametrize(
    "name, grad, passes",
    [
        ("openfold3", False, 1),
        ("protenix", False, 1),
        ("openfold3", True, 0),
        ("openfold", False, 0),
    ],
)
def test_update_and_sum_are_one_pass_where_they_can_be(
    kernel, submodule, monkeypatch, name, grad, passes
):
    """Not with biases, which the function that adds does not take, and not with a gradient."""
    module, pair, calls = make(name), make_pair(1), []
    function = kernel.triangle_multiplicative_update_with_residual

    def counting(*arguments, **keywords):
        calls.append(keywords["inplace"])
        return function(*arguments, **keywords)

    monkeypatch.setattr(
        submodule("models.calls"), "triangle_multiplicative_update_with_residual", counting
    )
    with kernel.patch(module), torch.set_grad_enabled(grad):
        assert module(pair, None, inplace_safe=True, _add_with_inplace=True) is pair
    assert calls == [True] * passes


@pytest.mark.parametrize("name", ["openfold", "openfold3"])
@torch.no_grad()
def test_adding_in_place_keeps_the_dtype_of_z(kernel, name):
    module, pair = make(name), make_pair(1)
    with kernel.patch(module), torch.autocast("cpu", torch.bfloat16):
        got = module(pair, None, inplace_safe=True, _add_with_inplace=True)
    assert got is pair and got.dtype == torch.float32


@pytest.mark.parametrize("strided", [False, True])
@torch.no_grad()
def test_adding_in_place_to_strided_memory(kernel, strided):
    module, pair = make("protenix"), make_pair(1)
    pair = pair.transpose(1, 2) if strided else pair
    wanted, mask = pair + module(pair), torch.ones(LENGTH, LENGTH)  # a mask that broadcasts
    with kernel.patch(module):
        assert distance(module(pair, mask, True, True), wanted) <= 1e-5


@torch.no_grad()
def test_openfold3_with_cuequivariance_leaves_the_sum_to_the_caller(kernel):
    module, pair = make("openfold3"), make_pair(1)
    wanted, before = module(pair), pair.clone()
    with kernel.patch(module):
        got = module(
            pair, inplace_safe=True, use_cueq_triangle_kernels=True, _add_with_inplace=True
        )
    assert torch.equal(pair, before) and distance(got, wanted) <= 1e-5


@torch.no_grad()
def test_weights_are_read_in_each_call(kernel):
    module, other, pair = make("openfold"), randomized(make("openfold"), seed=9), make_pair(1)
    with kernel.patch(module):
        module(pair)
        for mine, its in zip(module.parameters(), other.parameters(), strict=True):
            mine.data.copy_(its)
        assert distance(module(pair), other(pair)) <= 1e-5


def test_report_of_a_model(kernel):
    model = nn.ModuleDict({
        "first": nn.ModuleList([make("openfold"), make("boltz")]),
        "unknown": type("MyTriangleMultiplication", (nn.Linear,), {})(4, 4),
    })
    report = kernel.patch(model)
    assert report.found == ["first.0", "first.1", "unknown"]
    assert str(report).splitlines() == [
        "triangle multiplications: 3 found, 2 swapped, 1 left",
        "  swapped first.0 (openfold)",
        "  swapped first.1 (boltz)",
        "  left unknown: the class that defines its forward, torch.nn.modules.linear.Linear, is of "
        "no known family",
    ]
    with pytest.raises(FrozenInstanceError):
        report.left = {}
    report.undo()
    report.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    assert str(kernel.patch(make("boltz"))).endswith("swapped the model (boltz)")


def test_patching_twice_does_not_stack(kernel):
    model = nn.Sequential(make("openfold"))
    pair = make_pair(1)
    wanted = model(pair)
    report = kernel.patch(model)
    with kernel.patch(model) as second:
        assert second.swapped == {} and second.left == {"0": "patched already"}
    assert not torch.equal(model(pair), wanted)
    report.undo()
    assert torch.equal(model(pair), wanted)


def test_families_that_are_left_out(kernel):
    model = nn.ModuleList([make("openfold"), make("boltz")])
    with kernel.patch(model, families="boltz") as report:
        assert report.swapped == {"1": "boltz"}
        assert report.left == {"0": "families leaves openfold out"}
    with kernel.patch(model, families=["openfold", "boltz"]) as report:
        assert report.left == {}


@pytest.mark.parametrize("name", ["boltz", "openfold", "openfold3"])
def test_copies_and_pickles(kernel, name):
    model, pair, mask = nn.Sequential(make(name)), make_pair(1), make_mask(1)
    wanted, keys = model[0](pair, mask), list(model.state_dict())
    with kernel.patch(model):
        patched = model[0](pair, mask)
        twin = copy.deepcopy(model)
        stored = io.BytesIO()
        torch.save(model, stored)
        loaded = [
            pickle.loads(pickle.dumps(model)),
            torch.load(io.BytesIO(stored.getvalue()), weights_only=False),
        ]
        assert list(model.state_dict()) == keys
    assert torch.equal(twin[0](pair, mask), patched)
    for value in twin.parameters():
        value.data.zero_()
    assert twin[0](pair, mask).abs().max() == 0  # the copy's own parameters
    for other in loaded:
        assert torch.equal(other[0](pair, mask), wanted)
        with kernel.patch(other) as report:
            assert report.left == {} and torch.equal(other[0](pair, mask), patched)


@pytest.mark.parametrize("name", ["boltz", "openfold", "openfold3 fused"])
def test_compiles_into_one_graph(kernel, name):
    module, pair, mask = make(name), make_pair(1), make_mask(1)
    with kernel.patch(module):
        wanted = gradients(module, lambda x: module(x, mask), pair)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        got = gradients(module, lambda x: compiled(x, mask), pair)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@torch.no_grad()
def test_a_compiled_model_notices_the_patch(kernel):
    module, pair = make("openfold3"), make_pair(1)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    original = compiled(pair)
    with kernel.patch(compiled) as report:
        assert report.swapped == {"_orig_mod": "openfold3"}
        assert torch.equal(compiled(pair), module(pair))
        assert not torch.equal(compiled(pair), original)
        z = pair.clone()
        got = compiled(z, inplace_safe=True, _add_with_inplace=True)
        assert torch.equal(got, z) and distance(z, pair + original) <= 1e-5
    assert torch.equal(compiled(pair), original)


def test_hooks_of_the_module_run(kernel):
    module, pair, seen = make("openfold"), make_pair(1), []
    module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with kernel.patch(module):
        assert module(pair) is seen[0]


def test_settings_reach_the_call(kernel):
    module, pair = make("openfold"), make_pair(1)

    def saved_elements() -> int:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            module(pair.clone().requires_grad_())
        return sum(saved)

    with kernel.patch(module):
        kept = saved_elements()
    with kernel.patch(module, memory="lean", recompute="all"):
        assert saved_elements() < kept


def test_a_block_of_esmfold(kernel):
    """The kernel in the place of both triangle multiplications of a real trunk's block."""
    modeling = pytest.importorskip("transformers.models.esm.modeling_esmfold")
    from transformers.models.esm.configuration_esm import TrunkConfig

    config = TrunkConfig(
        num_blocks=1, sequence_state_dim=32, pairwise_state_dim=16, sequence_head_width=16,
        pairwise_head_width=8,
    )  # fmt: skip
    block = randomized(modeling.EsmFoldTriangularSelfAttentionBlock(config).eval())
    sequence, pair = torch.randn(1, LENGTH, 32), make_pair(1)
    mask = torch.ones(1, LENGTH).index_fill(1, torch.tensor([LENGTH - 1]), 0)
    wanted = block(sequence, pair, mask=mask)
    with kernel.patch(block) as report:
        got = block(sequence, pair, mask=mask)
    assert report.swapped == {"tri_mul_out": "openfold", "tri_mul_in": "openfold"}
    assert report.left == {}
    assert 0 < distance(got[1], wanted[1]) <= 1e-5


def test_undo_leaves_what_another_library_put_there(kernel):
    model = nn.ModuleList([make("openfold"), make("openfold")])
    report = kernel.patch(model)
    model[1].forward = other = model[1].projections
    with pytest.raises(RuntimeError) as caught:
        report.undo()
    assert str(caught.value) == (
        "the forward of a module must be the one that patch put there, for undo; replaced since: 1"
    )
    assert "forward" not in vars(model[0]) and vars(model[1])["forward"] == other


def copies(model):
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    average = torch.optim.swa_utils.AveragedModel(model)
    return {
        "": model,
        "deep": copy.deepcopy(model),
        "deep of deep": copy.deepcopy(copy.deepcopy(model)),
        "shallow": nn.ModuleDict({"trunk": nn.Sequential(copy.copy(model["trunk"][0]))}),
        "average": average.module,
        "loaded": torch.load(stored, weights_only=False),
        "loaded, then deep": copy.deepcopy(pickle.loads(pickle.dumps(model))),
        "deep, then loaded": pickle.loads(pickle.dumps(copy.deepcopy(model))),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["boltz", "openfold"])
def test_unpatch_takes_back_any_copy(kernel, name):
    model = nn.ModuleDict({"trunk": nn.Sequential(make(name)), "other": nn.Linear(2, 2)})
    pair, mask = make_pair(1), make_mask(1)
    wanted = model["trunk"][0](pair, mask)
    report = kernel.patch(model)
    for how, other in copies(model).items():
        module = other["trunk"][0]
        assert kernel.unpatch(other) == ["trunk.0"], how
        assert kernel.unpatch(other) == [], how
        assert not any("forward" in vars(one) for one in other.modules())
        assert torch.equal(module(pair, mask), wanted), how
        with kernel.patch(other) as again:
            assert again.swapped == {"trunk.0": name}, how
            assert not torch.equal(module(pair, mask), wanted), how
    report.undo()  # has nothing left to do


@torch.no_grad()
def test_unpatch_of_a_model_itself_and_of_a_compiled_one(kernel):
    module, pair = make("openfold3"), make_pair(1)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    original = compiled(pair)
    kernel.patch(module)
    assert not torch.equal(compiled(pair), original)
    assert kernel.unpatch(compiled) == ["_orig_mod"]
    assert torch.equal(compiled(pair), original)
    kernel.patch(module)
    assert kernel.unpatch(module) == [""]


def test_unpatch_leaves_what_another_library_put_there(kernel):
    """The error names a wrapper of the patch; what never was one stays without a word."""
    model = nn.ModuleList([make("openfold") for _ in range(4)] + [nn.Linear(2, 2)])
    model.append(torch.jit.script(nn.Linear(2, 2)))
    model[0].forward = before = model[0].projections
    model[4].forward = own = model[4].forward  # as hooks leave it which have been removed
    kernel.patch(model)
    for i, method in (1, False), (2, True):

        @functools.wraps(model[i].forward)
        def wrapper(*arguments, **keywords):
            raise AssertionError

        model[i].forward = wrapper.__get__(model[i]) if method else wrapper
    wrappers = [vars(model[i])["forward"] for i in (1, 2)]
    with pytest.raises(RuntimeError) as caught:
        kernel.unpatch(model)
    assert str(caught.value) == (
        "the forward of a module must be the one that patch put there, for unpatch; "
        "wrapped since: 1, 2"
    )
    assert [vars(model[i])["forward"] for i in (0, 1, 2, 4)] == [before, *wrappers, own]
    assert "forward" not in vars(model[3])


def test_messages_of_patch(kernel):
    with pytest.raises(TypeError) as caught:
        kernel.unpatch("model")
    assert str(caught.value) == "model must be a torch.nn.Module; got str"
    with pytest.raises(TypeError) as caught:
        kernel.patch("model")
    assert str(caught.value) == "model must be a torch.nn.Module; got str"
    with pytest.raises(ValueError) as caught:
        kernel.patch(nn.Identity(), families=["alphafold"])
    with pytest.raises(TypeError, match="families must be names or None; got 3"):
        kernel.patch(nn.Identity(), families=3)
    assert str(caught.value) == (
        "families must be of openfold, openfold3, protenix, boltz, esmfold2, esm; got 'alphafold'"
    )
    with pytest.raises(ValueError, match="memory must be"):
        kernel.patch(nn.Identity(), memory="none")
    with pytest.raises(ValueError, match="recompute must be"):
        kernel.patch(nn.Identity(), recompute="some")
