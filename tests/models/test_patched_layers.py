"""Patched pair layers as modules: hooks, copies, `parts`, and what is left alone."""

import copy
import functools
import io
import pickle

import pytest
import torch
from pair_layers import INFERENCE, LAYERS, TRIANGLES, call, make_layer
from peer_modules import CHANNELS, distance, make_mask, make_pair
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
@pytest.mark.parametrize("name", [*TRIANGLES, "pair_transition"])
@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_of_the_modules_run(kernel, calls, kind, name):
    """Before the patch and after it; the other modules are swapped all the same."""
    layer, pair, mask, seen = make_layer(kind), make_pair(1), make_mask(1), []
    wanted = call(layer, pair, mask)
    hook = getattr(layer, name).register_forward_hook(lambda *_: seen.append(name))
    with kernel.patch(layer) as report:
        assert report.swapped.keys() >= {*TRIANGLES, "pair_transition"}
        left = {"": f"{name} has a hook, which would not run"} if name in TRIANGLES else {}
        assert report.left == left
        assert distance(call(layer, pair, mask), wanted) <= 1e-5 and seen == [name]
        assert calls == ([] if left else INFERENCE[:2])
        hook.remove()
    with kernel.patch(layer):
        calls.clear()
        fused = call(layer, pair, mask)
        assert calls == INFERENCE
        hook = getattr(layer, name).register_forward_hook(lambda *_: seen.append(name))
        got = call(layer, pair, mask)
        hook.remove()
        assert distance(got, wanted) <= 1e-5 and seen == [name, name]
        assert calls == INFERENCE + ([] if left else INFERENCE[:2])
        assert torch.equal(call(layer, pair, mask), fused)
        hook = getattr(layer, name).register_forward_hook(lambda *arguments: arguments[2] * 2)
        assert distance(call(layer, pair, mask), wanted) > 1e-2
        hook.remove()


@torch.no_grad()
def test_hooks_of_all_modules_run(kernel, calls):
    layer, pair, seen = make_layer(), make_pair(1), []
    with kernel.patch(layer):
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: seen.append(module)
        )
        try:
            layer(pair)
        finally:
            hook.remove()
    assert seen == [layer.tri_mul_out, layer.tri_mul_in, layer.pair_transition, layer]
    assert calls == []


@torch.no_grad()
def test_hooks_of_the_layer_run_and_hooks_of_parts_are_refused(kernel, calls):
    layer, pair, seen = make_layer(), make_pair(1), []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with kernel.patch(layer):
        assert layer(pair) is seen[0] and calls == INFERENCE
        for name in ("tri_mul_in.proj_gate", "tri_mul_out.norm_mix", "pair_transition.norm"):
            with (
                layer.get_submodule(name).register_forward_hook(lambda *_: None),
                pytest.raises(TypeError, match="has a hook, which would not run"),
            ):
                layer(pair)


@torch.no_grad()
@pytest.mark.parametrize("name", [*TRIANGLES, "pair_transition"])
def test_a_wrapper_put_around_a_swapped_modules_forward_runs(kernel, calls, name):
    layer, pair = make_layer(), make_pair(1)
    kernel.patch(layer)
    part = getattr(layer, name)
    wanted, inner = layer(pair), part.forward

    @functools.wraps(inner)
    def doubled(self, *arguments, **named):
        return inner(*arguments, **named) * 2

    calls.clear()
    part.forward = doubled.__get__(part)
    assert distance(layer(pair), wanted) > 1e-2
    assert calls == ([] if name in TRIANGLES else INFERENCE[:2])


@torch.no_grad()
def test_a_part_that_is_not_plain_leaves_the_rest_swapped(kernel, calls):
    layer, pair = make_layer(), make_pair(1)
    layer.tri_mul_out.proj_gate.register_forward_hook(lambda module, x, out: out + 1)
    wanted = layer(pair)
    with kernel.patch(layer) as report:
        assert distance(layer(pair), wanted) <= 1e-5 and calls == []
    reason = "proj_gate has a hook, which would not run"
    assert report.left == {"tri_mul_out": reason, "": "its tri_mul_out is not swapped"}
    assert [*report.swapped] == ["tri_mul_in", "pair_transition"]
    layer = make_layer()
    layer.pair_transition.mlp.register_forward_hook(lambda module, x, out: out + 1)
    wanted = layer(pair)
    with kernel.patch(layer) as report:
        assert distance(layer(pair), wanted) <= 1e-5 and calls == INFERENCE[:2]
    assert report.left == {"pair_transition": "mlp has a hook, which would not run"}


def biased(layer: nn.Module) -> None:
    layer.tri_mul_in.proj_emit.bias = nn.Parameter(torch.ones(CHANNELS))


LEFT = {
    "biases": (biased, "tri_mul_in has biases, which the function with a residual doesn't take"),
    "part more": (
        lambda layer: setattr(layer, "extra", nn.Identity()),
        "it must have no part but tri_mul_out, tri_mul_in, pair_transition; got extra",
    ),
    "part less": (
        lambda layer: delattr(layer, "pair_transition"),
        "it must have tri_mul_out, tri_mul_in, pair_transition; got none named pair_transition",
    ),
    "forward replaced": (
        lambda layer: setattr(layer, "forward", layer.tri_mul_out.forward),
        "its forward has been replaced by another library's",
    ),
    "other arguments": (
        lambda layer: setattr(layer, "__class__", type(
            "EsmFold2PairUpdateLayer", (nn.Module,), {"forward": lambda self, x: x}
        )),
        "its forward takes (self, x), which no family's does",
    ),
    "no pair layer": (
        lambda layer: setattr(layer, "__class__", type(
            "EsmFold2MSAEncoderLayer", (nn.Module,),
            {"forward": lambda self, msa_states, pair_states, msa_attention_mask,
             pair_attention_mask: pair_states},
        )),
        "test_patched_layers.EsmFold2MSAEncoderLayer does not inherit from EsmFold2PairUpdateLayer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_not_understood_is_left(kernel, case):
    change, reason = LEFT[case]
    layer = make_layer()
    change(layer)
    before = vars(layer).get("forward")
    report = kernel.patch(layer)
    assert report.left == {"": reason} and vars(layer).get("forward") is before
    assert report.parts[""] == "residual" and {*TRIANGLES} <= report.swapped.keys()


@torch.no_grad()
def test_calls_that_do_not_fit_run_the_layers_own_code(kernel, calls):
    layer, pair = make_layer(), make_pair(1)
    mask = make_mask()[None].expand(2, -1, -1)
    wanted = layer(pair, mask)
    with kernel.patch(layer):
        assert distance(layer(pair, mask), wanted) <= 1e-5
        layer.tri_mul_in.proj_emit.bias = nn.Parameter(torch.zeros(CHANNELS))
        layer(pair)
    assert calls == []


@torch.no_grad()
@pytest.mark.parametrize("kind", LAYERS)
def test_copies_pickles_and_unpatch(kernel, calls, kind):
    model, pair, mask = nn.Sequential(make_layer(kind)), make_pair(1), make_mask(1)
    wanted, keys = call(model[0], pair, mask), list(model.state_dict())
    report = kernel.patch(model)
    patched = call(model[0], pair, mask)
    assert list(model.state_dict()) == keys and not torch.equal(patched, wanted)
    stored = io.BytesIO()
    torch.save(model, stored)
    loaded = [
        pickle.loads(pickle.dumps(copy.deepcopy(model))),
        torch.load(io.BytesIO(stored.getvalue()), weights_only=False),
    ]
    average = torch.optim.swa_utils.AveragedModel(model)
    copied = [copy.deepcopy(copy.deepcopy(model)), average.module]
    calls.clear()
    for other in copied:
        assert torch.equal(call(other[0], pair, mask), patched)
    assert calls == INFERENCE * 2
    for other in loaded:
        assert torch.equal(call(other[0], pair, mask), wanted)
    copied[0][0].tri_mul_in.proj_emit.weight.zero_()  # the copy's own
    assert not torch.equal(call(copied[0][0], pair, mask), patched)
    assert torch.equal(call(model[0], pair, mask), patched)
    names = [name for name, part in model.named_modules() if "forward" in vars(part)]
    assert names[:3] == ["0", "0.tri_mul_out", "0.tri_mul_in"]
    for other in (*copied, *loaded):
        assert kernel.unpatch(other) == names and kernel.unpatch(other) == []
    assert torch.equal(call(copied[1][0], pair, mask), wanted)
    with kernel.patch(copied[1]):
        assert torch.equal(call(copied[1][0], pair, mask), patched)
    assert set(kernel.patch(model).left.values()) == {"patched already"}
    report.undo()
    report.undo()
    assert torch.equal(call(model[0], pair, mask), wanted) and kernel.unpatch(model) == []


@torch.no_grad()
def test_a_layer_whose_triangles_alone_are_given_back(kernel, calls):
    layer, pair = make_layer(), make_pair(1)
    wanted = layer(pair)
    kernel.patch(layer)
    kernel.unpatch(layer.tri_mul_in)
    kernel.unpatch(layer.pair_transition)
    assert distance(layer(pair), wanted) <= 1e-5 and calls == []
    kernel.patch(layer, parts="triangle")
    layer(pair)
    assert calls == INFERENCE[:2]
    kernel.unpatch(layer)
    assert torch.equal(layer(pair), wanted)


@torch.no_grad()
@pytest.mark.parametrize("parts, swapped, inside", [
    ("triangle", TRIANGLES, []),
    ("transition", ["pair_transition"], []),
    (["triangle", "transition"], [*TRIANGLES, "pair_transition"], []),
    (("residual", "triangle"), [*TRIANGLES, ""], INFERENCE[:2]),
    (["transition", "residual", "triangle"], [*TRIANGLES, "pair_transition", ""], INFERENCE),
    (["residual"], [], []),
    ([], [], []),
])  # fmt: skip
def test_parts(kernel, calls, parts, swapped, inside):
    layer, pair = make_layer(), make_pair(1)
    wanted = layer(pair)
    with kernel.patch(layer, parts=parts) as report:
        assert [*report.swapped] == swapped and calls == []
        assert distance(layer(pair), wanted) <= 1e-5 and calls == inside
        alone = {"": "its tri_mul_out is not swapped"}
        assert report.left == (alone if parts == ["residual"] else {})
        assert report.found == [*report.swapped, *report.left]
        # A second call adds the parts that the first one left.
        with kernel.patch(layer):
            calls.clear()
            layer(pair)
            assert calls == INFERENCE
    assert torch.equal(layer(pair), wanted)


@torch.no_grad()
def test_memory_and_recompute_reach_the_triangles(kernel, submodule, monkeypatch):
    module, found = submodule("models.pair_layers"), []
    function = module.triangle_multiplicative_update_with_residual

    def counted(*arguments, **named):
        found.append((named["memory"], named["recompute"]))
        return function(*arguments, **named)

    monkeypatch.setattr(module, "triangle_multiplicative_update_with_residual", counted)
    with kernel.patch(layer := make_layer(), memory="lean", recompute="all"):
        layer(make_pair(1))
    assert found == [("lean", "all")] * 2


def test_messages_of_parts(kernel):
    with pytest.raises(ValueError) as caught:
        kernel.patch(nn.Identity(), parts=["triangle", "attention"])
    assert str(caught.value) == (
        "parts must be of triangle, residual, transition; got 'attention'"
    )
    for wrong in (None, 3):
        with pytest.raises(TypeError) as caught:
            kernel.patch(nn.Identity(), parts=wrong)
        assert str(caught.value) == f"parts must be names; got {wrong}"
    with pytest.raises(ValueError, match="parts must be of .*; got 3"):
        kernel.patch(nn.Identity(), parts=[3])
    assert str(kernel.patch(nn.Identity())) == "nothing found"
