"""ESMFold2's pair layers as a whole, patched: their results, in training and inference."""

import functools

import pytest
import torch
from helpers import DTYPES, assert_no_worse
from pair_layers import INFERENCE, LAYERS, TRAINING, call, make_layer, without_null
from peak_bytes import PeakBytes
from peer_modules import (
    assert_near,
    distance,
    gradients,
    in_dtype,
    in_float64,
    make_mask,
    make_pair,
)
from peers import peer
from selection import slow
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


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


def checkpoints_in_forward(layer: nn.Module) -> None:
    """Makes its class one like those of transformers 5.23, of which not `__call__` checkpoints.

    There each class wraps its forward, and that of the outermost class checkpoints.
    """
    kind = type(layer)
    if kind.__call__ is nn.Module.__call__:
        return

    def wrapped(function):
        @functools.wraps(function)
        def forward(self, *arguments, **named):
            run = functools.partial(function, self, **named)
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                if type(self).forward is forward:
                    return self._gradient_checkpointing_func(run, *arguments)
            return run(*arguments)

        return forward

    def wrap_forward(cls, **_):
        cls.forward = wrapped(cls.forward)

    members = {
        "__call__": nn.Module.__call__, "__init_subclass__": classmethod(wrap_forward),
        "forward": wrapped(kind.forward),
    }  # fmt: skip
    layer.__class__ = type(kind.__name__, (kind,), members)


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_checkpointing(kernel, calls, kind, reentrant, in_forward):
    """As transformers does it in training; the first pass of a reentrant one needs no gradient."""
    layer, pair, mask = make_layer(kind).train(), make_pair(1), make_mask(1)
    if in_forward:
        checkpoints_in_forward(layer)
    with kernel.patch(layer):
        wanted = gradients(layer, lambda x: call(layer, x, mask), pair)
        assert calls == TRAINING
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
        if kind == "pair":  # with reentry an input that needs a gradient must be positional
            got = gradients(layer, lambda x: layer(x, mask), pair)
        else:
            got = gradients(layer, lambda x: call(layer, x, mask), pair)
        first = INFERENCE if reentrant else TRAINING
        assert calls == TRAINING + first + TRAINING
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("in_forward", [False, True])
def test_checkpointing_of_the_layers_own_code(kernel, calls, in_forward):
    """Once, where a hook lets its own code run."""
    layer, pair, seen = make_layer().train(), make_pair(1), []
    if in_forward:
        checkpoints_in_forward(layer)
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    with kernel.patch(layer):
        layer.tri_mul_out.register_forward_hook(lambda *_: seen.append("out"))
        gradients(layer, layer, pair)
    assert seen == ["out"] * 2 and calls == []


@pytest.mark.parametrize("kind", ["pair", "MSA", slow("last MSA")])
def test_compiles_into_one_graph(kernel, kind):
    """An MSA layer's own code runs there, with its modules swapped one by one."""
    layer, pair, mask = make_layer(kind), make_pair(1), make_mask(1)
    original = call(layer, pair, mask)
    with kernel.patch(layer):
        wanted = gradients(layer, lambda x: call(layer, x, mask), pair)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got = gradients(layer, lambda x: call(compiled, x, mask), pair)
        assert_near(without_null(got), without_null(wanted), 1e-6 if kind == "pair" else 1e-5)
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
