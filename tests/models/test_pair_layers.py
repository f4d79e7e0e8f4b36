"""ESMFold2's pair layers as a whole, patched: results, what runs inside, and what is left alone."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from helpers import DTYPES, assert_no_worse, seeded
from peak_bytes import PeakBytes
from peer_modules import (
    CHANNELS,
    LENGTH,
    assert_near,
    distance,
    esmfold2_part,
    gradients,
    in_dtype,
    in_float64,
    make_mask,
    make_pair,
)
from peers import peer, randomized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = ("pair", "MSA", "last MSA")
TRIANGLES = ["tri_mul_out", "tri_mul_in"]
ROWS = 3  # of an MSA


def make_layer(kind: str = "pair", seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.EsmFold2Config(
        pairwise_hidden_size=CHANNELS, pair_transition_intermediate_size=24, chunk_size=3
    )
    config.msa_encoder.hidden_size, config.msa_encoder.intermediate_size = 8, 12
    if kind == "pair":
        layer = esmfold2_part("EsmFold2PairUpdateLayer", config)
    else:
        layer = esmfold2_part("EsmFold2MSAEncoderLayer", config, updates_msa=kind == "MSA")
    return randomized(layer, seed).eval()


def call(layer: nn.Module, pair: Tensor, mask: Tensor | None = None) -> Tensor:
    """The new pair tensor; an MSA layer's new MSA is added to it, so that it counts too."""
    if not hasattr(layer, "outer_product_mean"):
        return layer(pair, pair_attention_mask=mask)
    generator = seeded(6)
    msa = torch.randn(len(pair), LENGTH, ROWS, 8, generator=generator).to(pair.dtype)
    real = torch.rand(len(pair), LENGTH, ROWS, generator=generator) > 0.2
    mask = torch.ones(pair.shape[:-1], dtype=torch.bool) if mask is None else mask.bool()
    msa, pair = layer(msa, pair, real, mask)
    return pair + msa.mean(2)[..., :1, None]


@pytest.fixture
def calls(kernel, submodule, monkeypatch):
    """What runs inside a pair layer: ("triangle" or "transition", whether in place)."""
    module, found = submodule("models.pair_layers"), []

    def counted(name, function):
        def run(*arguments, **named):
            found.append((name, named["inplace"]))
            return function(*arguments, **named)

        return run

    for name, function in (
        ("triangle", "triangle_multiplicative_update_with_residual"),
        ("transition", "swiglu_transition"),
    ):
        monkeypatch.setattr(module, function, counted(name, getattr(module, function)))
    return found


def without_null(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the gradient of what is added to all terms of a softmax, which is 0 and rounding."""
    return {name: value for name, value in results.items() if not name.endswith("bias_norm.bias")}


INFERENCE = [("triangle", False), ("triangle", True), ("transition", True)]
TRAINING = [("triangle", False), ("triangle", False), ("transition", False)]


@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("kind", LAYERS)
def test_result_and_gradients(kernel, calls, kind, masked):
    layer, pair = make_layer(kind), make_pair(2)
    mask = None if masked is None else make_mask(2).to(masked)
    wanted = gradients(layer, lambda x: call(layer, x, mask), pair)
    with kernel.patch(layer) as report:
        assert report.left == {} and report.swapped[""] == "esmfold2"
        got = gradients(layer, lambda x: call(layer, x, mask), pair)
        assert calls == TRAINING
        calls.clear()
        with torch.no_grad():
            inference = call(layer, pair, mask)
        assert calls == INFERENCE
    assert_near(without_null(got), without_null(wanted), 1e-5)
    assert distance(inference, wanted["output"]) <= 1e-5
    again = gradients(layer, lambda x: call(layer, x, mask), pair)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYERS)
def test_errors_beside_the_layers_own(kernel, kind, dtype):
    """Against float64: sums are rounded once where the layer's own code rounds the update too."""
    draws = []
    for seed in range(8):
        layer, pair, mask = in_dtype(make_layer(kind, seed), dtype), make_pair(1), make_mask(1)
        exact, pair = in_float64(layer), pair.to(dtype)
        wanted = gradients(exact, lambda x: call(exact, x, mask), pair.double())  # noqa: B023
        original = gradients(layer, lambda x: call(layer, x, mask), pair)  # noqa: B023
        with kernel.patch(layer):
            got = gradients(layer, lambda x: call(layer, x, mask), pair)  # noqa: B023
            with torch.no_grad():
                inference = call(layer, pair, mask)
        assert all(got[name].dtype == original[name].dtype for name in wanted)
        got["inference"], original["inference"] = inference, original["output"]
        draws.append((got, original, without_null({**wanted, "inference": wanted["output"]})))
    assert_no_worse(draws, 1.1)


@torch.no_grad()
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_callers_tensors_stay_as_they_are(kernel, calls, kind, strided):
    layer, pair, mask = make_layer(kind), make_pair(1), make_mask(1)
    pair = pair.transpose(1, 2) if strided else pair
    before = pair.clone()
    with kernel.patch(layer):
        first, second = call(layer, pair, mask), call(layer, pair, mask)
        result = layer(pair, mask) if kind == "pair" else first
    assert calls[:3] == INFERENCE
    assert torch.equal(pair, before) and torch.equal(first, second)
    assert result.untyped_storage().data_ptr() != pair.untyped_storage().data_ptr()


@torch.no_grad()
def test_memory_is_the_first_updates_result(kernel):
    """Beyond what the functions need inside: the layer's own code holds more."""
    layer, pair = make_layer(), make_pair(1)

    def peak() -> float:
        with PeakBytes(pair, *layer.parameters()) as counted:
            layer(pair)
        return counted.peak / pair.nbytes

    with kernel.patch(layer):
        assert peak() == 1
        with layer.tri_mul_in.register_forward_hook(lambda *_: None):
            assert peak() >= 3
    assert peak() > 4


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
        "test_pair_layers.EsmFold2MSAEncoderLayer does not inherit from EsmFold2PairUpdateLayer",
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LAYERS)
def test_under_autocast(kernel, calls, kind, dtype):
    """The pair stays in float32, as in the layer's own code; in autocast's dtype the layer runs."""
    draws = []
    for seed in range(8):
        layer, pair, mask = make_layer(kind, seed), make_pair(1), make_mask(1)
        exact = in_float64(layer)
        wanted = gradients(exact, lambda x: call(exact, x, mask), pair.double())  # noqa: B023

        def autocast(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return call(layer, x, mask)  # noqa: B023

        original = gradients(layer, autocast, pair)
        with kernel.patch(layer):
            got = gradients(layer, autocast, pair)
        assert all(got[name].dtype == original[name].dtype for name in wanted)
        draws.append((got, original, without_null(wanted)))
    assert_no_worse(draws, 1.1)
    assert calls == []
    if kind == "pair":
        with kernel.patch(layer), torch.no_grad():
            assert autocast(pair.to(dtype)).dtype == dtype
        assert calls == INFERENCE


@pytest.mark.parametrize("targets", [
    ["proj_bundle", "proj_emit", "proj_gate", "gate_up_proj", "down_proj"], ["proj_gate"]
])  # fmt: skip
@pytest.mark.parametrize("kind", LAYERS)
def test_lora_is_merged_with_its_gradients(kernel, calls, kind, targets):
    """Put in before the patch or after it."""
    peft = peer("peft")
    layer, pair, mask = make_layer(kind), make_pair(1), make_mask(1)
    generator = torch.Generator().manual_seed(3)
    early = kernel.patch(layer)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=targets), layer)
    for name, value in layer.named_parameters():
        if "lora" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.3
    after = gradients(layer, lambda x: call(layer, x, mask), pair)
    early.undo()
    wanted = gradients(layer, lambda x: call(layer, x, mask), pair)
    assert calls == TRAINING
    with kernel.patch(layer) as report:
        assert report.left == {}
        got = gradients(layer, lambda x: call(layer, x, mask), pair)
    assert calls == TRAINING * 2
    trained = [name for name, value in wanted.items() if value is not None]
    assert [name for name in trained if "lora" in name]
    for results in (got, after):
        assert [name for name in results if results[name] is not None] == trained
        for name in trained:
            assert distance(results[name], wanted[name]) <= 1e-5, name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_checkpointing(kernel, calls, kind, reentrant):
    """As transformers does it in training; the first pass of a reentrant one needs no gradient."""
    layer, pair, mask = make_layer(kind).train(), make_pair(1), make_mask(1)
    with kernel.patch(layer):
        wanted = gradients(layer, lambda x: call(layer, x, mask), pair)
        assert calls == TRAINING
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
        if kind == "pair":  # with reentry an input that needs a gradient must be positional
            got = gradients(layer, lambda x: layer(x, mask), pair)
        else:
            got = gradients(layer, lambda x: call(layer, x, mask), pair)
        first = INFERENCE if reentrant else TRAINING
        assert calls == TRAINING + first + TRAINING
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


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


@pytest.mark.parametrize("kind", LAYERS)
def test_compiles_into_one_graph(kernel, kind):
    """An MSA layer's own code runs there, with its modules swapped one by one."""
    layer, pair, mask = make_layer(kind), make_pair(1), make_mask(1)
    original = call(layer, pair, mask)
    with kernel.patch(layer):
        wanted = gradients(layer, lambda x: call(layer, x, mask), pair)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got = gradients(layer, lambda x: call(compiled, x, mask), pair)
        assert_near(without_null(got), without_null(wanted), 0 if kind == "pair" else 1e-5)
        with torch.no_grad():
            inference = call(compiled, pair, mask)
        assert distance(inference, original) <= 1e-5
    assert distance(call(compiled, pair, mask), original) <= 1e-6


def test_transforms_of_torch_func(kernel):
    layer, pair = make_layer(), make_pair(1)
    tangent = make_pair(1).flip(1)
    wanted = torch.func.jvp(layer, (pair,), (tangent,))
    slopes = torch.func.grad(lambda x: layer(x).square().sum())(pair)
    with kernel.patch(layer):
        got = torch.func.jvp(layer, (pair,), (tangent,))
        assert distance(torch.func.grad(lambda x: layer(x).square().sum())(pair), slopes) <= 1e-5
        with torch.no_grad():
            without = torch.func.jvp(layer, (pair,), (tangent,))
    for results in (got, without[:1]):
        for mine, its in zip(results, wanted, strict=False):
            assert distance(mine, its) <= 1e-5


def test_a_fold_of_a_whole_model(kernel, calls):
    pytest.importorskip("transformers")
    from esmfold2_trimul_tools.folding.fold import fold
    from esmfold2_trimul_tools.folding.options import Settings
    from folding import SHORT, tiny_model

    model, settings = tiny_model(), Settings(loops=1, samples=1, steps=2)
    stock = fold(model, SHORT, settings)
    report = kernel.patch(model)
    counts = {part: [*report.parts.values()].count(part) for part in {*report.parts.values()}}
    assert report.left == {} and counts == {"triangle": 10, "residual": 5, "transition": 9}
    heads = [line for line in str(report).splitlines() if not line.startswith(" ")]
    assert heads == [
        "triangle multiplications: 10 found, 10 swapped, 0 left",
        "transitions: 9 found, 9 swapped, 0 left",
        "pair layers: 5 found, 5 swapped, 0 left",
    ]
    patched = fold(model, SHORT, settings)
    report.undo()
    assert len(calls) % 3 == 0 < len(calls) and set(calls) == set(INFERENCE)
    assert 0 < distance(patched.distogram, stock.distogram) <= 1e-4
    assert distance(patched.plddt, stock.plddt) <= 1e-3
    assert torch.equal(fold(model, SHORT, settings).distogram, stock.distogram)


@torch.no_grad()
@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_triton_path(kernel, calls, on_triton, dtype, memory):
    """The kernels write over the layer's own tensor."""
    layer, mask = in_dtype(make_layer(), dtype).to(on_triton), make_mask(2).to(on_triton)
    pair = make_pair(2, dtype=dtype).to(on_triton)
    exact, original = in_float64(layer)(pair.double(), mask), layer(pair, mask)
    before = pair.clone()
    with kernel.patch(layer, memory=memory):
        got = layer(pair, mask)
        assert torch.equal(layer(pair, mask), got)
    assert calls == INFERENCE * 2 and torch.equal(pair, before)
    assert_no_worse([(got.cpu(), original.cpu(), exact.cpu())], 1.1)


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
