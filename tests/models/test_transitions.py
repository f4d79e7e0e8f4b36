"""Transitions of other models: their arguments, and `patch` of them, against their own modules."""

import copy
import pickle
import re

import pytest
import torch
from helpers import DTYPES, assert_no_worse, seeded
from peer_modules import (
    ADDING,
    CHANNELS,
    TRANSITIONS,
    assert_near,
    distance,
    esmfold2_part,
    gradients,
    in_dtype,
    in_float64,
    make_mask,
    make_pair,
    make_transition,
)
from peers import peer, randomized
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")
# The linear layers of a module: gate, up and down; ESMFold2 has the first two in one.
LINEARS = {
    "boltz": ("fc1", "fc2", "fc3"),
    "openfold3": ("swiglu.linear_a", "swiglu.linear_b", "linear_out"),
    "protenix": ("linear_no_bias_a", "linear_no_bias_b", "linear_no_bias"),
    "esmfold2": ("mlp.gate_up_proj", "mlp.down_proj"),
    "esm": ("ffn.w12", "ffn.w3"),
    "esm pair": ("ffn.w12", "ffn.w3"),
    "esm experimental": ("ffn.w12", "ffn.w3"),
    "esm diffusion": ("a_proj", "b_proj", "out_proj"),
}


def by_arguments(kernel, name: str, module: nn.Module, x: Tensor) -> Tensor:
    arguments = getattr(kernel, TRANSITIONS[name][1])(module)
    return kernel.swiglu_transition(x, residual=x if name in ADDING else None, **arguments)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_arguments_and_patch_compute_what_the_module_does(kernel, name, training):
    module, pair = make_transition(name).train(training), make_pair(2)
    wanted = gradients(module, module, pair)
    got = gradients(module, lambda x: by_arguments(kernel, name, module, x), pair)
    assert_near(got, wanted, 1e-5)
    with kernel.patch(module) as report:
        assert report.swapped == {"": name.split()[0]} and report.parts == {"": "transition"}
        patched = gradients(module, module, pair)
    assert all(torch.equal(patched[key], got[key]) for key in got)
    again = gradients(module, module, pair)
    assert all(torch.equal(again[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TRANSITIONS)
def test_errors_beside_the_modules_own(kernel, name, dtype):
    """Against float64, outputs and gradients together, in training and in inference."""
    draws = []
    for seed in range(8):
        module = in_dtype(make_transition(name, seed), dtype).train(seed % 2 == 0)
        exact, pair = in_float64(module), make_pair(1, dtype=dtype)
        wanted = gradients(exact, exact, pair.double())
        original = gradients(module, module, pair)
        with kernel.patch(module):
            got = gradients(module, module, pair)
        assert all(got[key].dtype == original[key].dtype for key in wanted)
        draws.append((got, original, wanted))
    assert_no_worse(draws, 1.1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_under_autocast(kernel, name, dtype, training):
    draws = []
    for seed in range(16):
        module, pair = make_transition(name, seed).train(training), make_pair(1)
        exact = in_float64(module)
        wanted = gradients(exact, exact, pair.double())

        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return module(x)  # noqa: B023

        original = gradients(module, call, pair)
        with kernel.patch(module):
            got = gradients(module, call, pair)
        assert all(got[key].dtype == original[key].dtype for key in wanted)
        draws.append((got, original, wanted))
    assert_no_worse(draws, 1.1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"ckpt_chunk_size": 3}])
@pytest.mark.parametrize("masked", [None, torch.float32, torch.bfloat16])
def test_openfold3_masks_its_update(kernel, masked, options, autocast):
    module, pair = make_transition("openfold3"), make_pair(2)
    mask = None if masked is None else make_mask(2).to(masked)

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(x, mask, **options)

    wanted = gradients(module, call, pair)
    with kernel.patch(module):
        got = gradients(module, call, pair)
    assert got["output"].dtype == wanted["output"].dtype
    assert_near(got, wanted, 2e-2 if autocast else 1e-5)
    if mask is not None:
        assert got["output"][mask == 0].abs().max() == 0 < got["output"].abs().max()


@torch.no_grad()
def test_openfold3s_linear_layers_cast_to_bfloat16(kernel):
    module, pair = make_transition("openfold3"), make_pair(1, dtype=torch.bfloat16)
    wanted = module(pair)
    with kernel.patch(module):
        got = module(pair)
    assert got.dtype == wanted.dtype == torch.bfloat16 and distance(got, wanted) <= 2e-2


@torch.no_grad()
def test_chunk_size_chooses_nothing(kernel):
    of_esmfold2, of_boltz = make_transition("esmfold2"), make_transition("boltz")
    pair = make_pair(1)
    with kernel.patch(nn.ModuleList([of_esmfold2, of_boltz])):
        results = []
        for size in (None, 1, 3, 100):
            of_esmfold2.chunk_size = size
            results.append((of_esmfold2(pair), of_boltz(pair, chunk_size=size)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@torch.no_grad()
def test_any_leading_dimensions(kernel):
    generator = seeded(4)
    for name in TRANSITIONS:
        module = make_transition(name)
        # Some cut the second axis into chunks, so two axes are too few for their own forward.
        for shape in ((5, CHANNELS), (2, 5, CHANNELS), (1, 2, 2, 3, 4, CHANNELS)):
            if name in ("esmfold2", "esm", "esm pair") and len(shape) == 2:
                continue
            x = torch.randn(shape, generator=generator)
            wanted = module(x)
            with kernel.patch(module):
                got = module(x)
            assert got.shape == wanted.shape and distance(got, wanted) <= 1e-5


@torch.no_grad()
def test_esmfold2s_residual_is_added_inside(kernel, submodule, monkeypatch):
    module, pair, added = make_transition("esmfold2"), make_pair(1), []
    function = kernel.swiglu_transition

    def counting(x, **named):
        added.append(named["residual"] is x)
        return function(x, **named)

    monkeypatch.setattr(submodule("models.calls"), "swiglu_transition", counting)
    before = pair.clone()
    with kernel.patch(module):
        got = module(pair)
    assert added == [True] and torch.equal(pair, before)
    assert got.untyped_storage().data_ptr() != pair.untyped_storage().data_ptr()


def with_hook(path: str):
    return lambda module: module.get_submodule(path).register_forward_hook(lambda *_: None)


def out_of_other_width() -> nn.Module:
    module = peer("boltz", "boltz.model.layers.transition")
    return module.Transition(CHANNELS, 24, out_dim=8)


def of_openfold3(name: str, *arguments):
    return lambda: getattr(peer("openfold3", "openfold3.core.model.layers.transition"), name)(
        *arguments
    )


def changed(name: str, change):
    def build() -> nn.Module:
        module = make_transition(name)
        change(module)
        return module

    return build


class PairTransition(nn.Module):
    """OpenFold's parts of AlphaFold 2's transition."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm, self.relu = nn.LayerNorm(CHANNELS), nn.ReLU()
        self.linear_1, self.linear_2 = nn.Linear(CHANNELS, 24), nn.Linear(24, CHANNELS)

    def forward(self, z: Tensor, mask: Tensor | None = None, chunk_size: int | None = None):
        return self.linear_2(self.relu(self.linear_1(self.layer_norm(z))))


RELU = "AlphaFold 2's transition, with a ReLU; the kernel's is a SwiGLU"
LEFT = {
    "openfold": (PairTransition, RELU),
    "openfold3's of AlphaFold 2": (of_openfold3("ReLUTransition", CHANNELS, 2), RELU),
    "conditioned": (
        of_openfold3("ConditionedTransitionBlock", CHANNELS, CHANNELS, 2),
        "the class that defines its forward, openfold3.core.model.layers.transition."
        "ConditionedTransitionBlock, is of no known family",
    ),
    "other width": (
        out_of_other_width,
        "the weights of the gate and of what it multiplies must be [H, C] with [C, H] = [8, 24], "
        "the shape of the output projection; got [(24, 16), (24, 16)]",
    ),
    "hook of a part": (changed("boltz", with_hook("fc2")), "fc2 has a hook, which would not run"),
    "hook of a block": (changed("esmfold2", with_hook("mlp")), "mlp has a hook"),
    "hook in a block": (
        changed("openfold3", with_hook("swiglu.linear_a")), "swiglu.linear_a has a hook"
    ),
    "hook of an activation": (
        changed("esmfold2", with_hook("mlp.activation_fn")), "mlp.activation_fn has a hook"
    ),
    "other activation": (
        changed("boltz", lambda module: setattr(module, "silu", nn.GELU())),
        "module must have no part but norm, fc1, fc2, fc3; got boltz.model.layers.transition."
        "Transition with silu",
    ),
    "other block": (
        changed("esmfold2", lambda module: setattr(module, "mlp", nn.Linear(CHANNELS, CHANNELS))),
        "mlp must be of a class named EsmFold2SwiGLU; got torch.nn.modules.linear.Linear",
    ),
    "integers": (
        changed("protenix", lambda module: setattr(module.linear_no_bias, "weight", nn.Parameter(
            torch.zeros(CHANNELS, 48, dtype=torch.int8), requires_grad=False
        ))),
        "linear_no_bias.weight must be a plain floating-point tensor; got Parameter of torch.int8",
    ),
    "forward replaced": (
        changed("boltz", lambda module: setattr(module, "forward", module.norm.forward)),
        "its forward has been replaced by another library's",
    ),
    "other arguments": (
        lambda: type("Transition", (nn.Linear,), {"forward": lambda self, pair: pair})(2, 2),
        "its forward takes (self, pair), which no family's does",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_not_understood_is_left(kernel, case):
    build, reason = LEFT[case]
    module = build()
    before = vars(module).get("forward")
    report = kernel.patch(module)
    assert report.swapped == {} and report.left[""].startswith(reason)
    assert report.parts[""] == "transition" and vars(module).get("forward") is before


def test_a_subclass_that_changes_a_method_is_left(kernel):
    original = type(make_transition("openfold3"))
    for changes in ({"_transition": lambda self, x, mask: x}, {"_chunk": lambda self, x: x}):
        module = make_transition("openfold3")
        module.__class__ = type("MyTransition", (original,), changes)
        assert list(kernel.patch(module).left) == [""]
    module.__class__ = type("MyTransition", (original,), {})
    assert kernel.patch(module).swapped == {"": "openfold3"}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@torch.no_grad()
def test_torchscript_is_left(kernel):
    module = torch.jit.trace(make_transition("boltz"), (make_pair(1),))
    assert "Transition is compiled by TorchScript" in kernel.patch(module).left[""]


@pytest.mark.parametrize("name", TRANSITIONS)
def test_hooks_and_adapters_put_in_after_the_patch(kernel, name):
    """Hooks of the module run; a part that is not plain any more is refused by its name."""
    module, pair, seen = make_transition(name), make_pair(1), []
    with kernel.patch(module):
        hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
        assert module(pair) is seen[0]
        hook.remove()
        for path in LINEARS[name]:
            part = path.rpartition(".")[2]
            hook = with_hook(path)(module)
            with pytest.raises(TypeError, match=re.escape(f"{part} has a hook")):
                module(pair)
            hook.remove()
        module(pair)


@pytest.mark.parametrize("name", TRANSITIONS)
def test_lora_is_merged_with_its_gradients(kernel, name):
    peft = peer("peft")
    generator, pair = torch.Generator().manual_seed(3), make_pair(1)
    module = make_transition(name)
    config = peft.LoraConfig(r=4, target_modules=list(LINEARS[name]))
    peft.inject_adapter_in_model(config, module)
    for key, value in module.named_parameters():
        if "lora" in key:
            value.data = torch.randn(value.shape, generator=generator) * 0.3
    wanted = gradients(module, module, pair)
    with kernel.patch(module) as report:
        assert report.left == {}
        got = gradients(module, module, pair)
    trained = [key for key in wanted if wanted[key] is not None]
    assert len([key for key in trained if "lora" in key]) == 2 * len(LINEARS[name])
    assert [key for key in got if got[key] is not None] == trained
    for key in trained:
        assert distance(got[key], wanted[key]) <= 1e-5, key


@torch.no_grad()
@pytest.mark.parametrize("name", TRANSITIONS)
def test_copies_pickles_and_unpatch(kernel, name):
    model, pair = nn.Sequential(make_transition(name)), make_pair(1)
    wanted = model(pair)
    report = kernel.patch(model)
    patched = model(pair)
    assert not torch.equal(patched, wanted)
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(pair), patched) and torch.equal(loaded(pair), wanted)
    for value in twin.parameters():
        value.data.zero_()
    assert torch.equal(twin(pair), pair if name in ADDING else torch.zeros_like(pair))
    assert kernel.unpatch(twin) == kernel.unpatch(loaded) == ["0"]
    assert kernel.patch(model).left == {"0": "patched already"}
    report.undo()
    assert torch.equal(model(pair), wanted) and kernel.unpatch(model) == []


@pytest.mark.parametrize("name", TRANSITIONS)
def test_compiles_into_one_graph(kernel, name):
    module, pair = make_transition(name), make_pair(1)
    with kernel.patch(module):
        wanted = gradients(module, module, pair)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        got = gradients(module, compiled, pair)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@torch.no_grad()
def test_a_pair_block_of_openfold3_keeps_its_order(kernel):
    """Its triangles add in place where it asks for it, as before; its transition is swapped too."""
    blocks = peer("openfold3", "openfold3.core.model.latent.base_blocks")
    block = blocks.PairBlock(
        c_z=CHANNELS, c_hidden_mul=8, c_hidden_pair_att=8, no_heads_pair=2, transition_n=2,
        transition_type="swiglu", pair_dropout=0.25, fuse_projection_weights=False, inf=1e9,
    )  # fmt: skip
    block, pair, mask = randomized(block).eval(), make_pair(1), make_mask(1)
    for inplace in (False, True):
        wanted = block(pair.clone(), mask, inplace_safe=inplace)
        with kernel.patch(block) as report:
            got = block(pair.clone(), mask, inplace_safe=inplace)
        assert report.swapped == dict.fromkeys(
            ["tri_mul_out", "tri_mul_in", "pair_transition"], "openfold3"
        )
        assert 0 < distance(got, wanted) <= 1e-5


def test_diffusion_conditioning_of_esmfold2(kernel):
    """Its transitions of pairs and of single representations, which the sampler runs again."""
    transformers = pytest.importorskip("transformers")
    config = transformers.EsmFold2Config(pairwise_hidden_size=CHANNELS)
    module = esmfold2_part("EsmFold2DiffusionConditioning", config).eval()
    generator = seeded(5)
    width = config.structure_head.diffusion_module.hidden_size
    noise = torch.rand(2, generator=generator) + 1
    states = torch.randn(2, 5, width, generator=generator)
    pairs = make_pair(1)
    with torch.no_grad():
        wanted = module(noise, states), module.compute_pair_repr(pairs, pairs)
        with kernel.patch(module) as report:
            got = module(noise, states), module.compute_pair_repr(pairs, pairs)
    names = [f"{of}_transition_{i}" for of in ("pair", "single") for i in (0, 1)]
    assert report.swapped == dict.fromkeys(names, "esmfold2")
    for mine, its in zip(got, wanted, strict=True):
        assert 0 < distance(mine, its) <= 1e-5


def test_messages_of_the_adapters(kernel):
    with pytest.raises(TypeError) as caught:
        kernel.transition_from_boltz(3)
    assert str(caught.value) == "module must be a torch.nn.Module; got int"
    with pytest.raises(TypeError) as caught:
        kernel.transition_from_protenix(nn.Linear(2, 2))
    assert str(caught.value) == (
        "module must have layernorm1, linear_no_bias_a, linear_no_bias_b, linear_no_bias; got "
        "torch.nn.modules.linear.Linear without layernorm1, linear_no_bias_a, linear_no_bias_b, "
        "linear_no_bias"
    )
    arguments = kernel.transition_from_esmfold2(make_transition("esmfold2"), torch.bfloat16)
    cast = [key for key, value in arguments.items() if getattr(value, "dtype", 0) == torch.bfloat16]
    assert cast == ["gate_weight", "up_weight", "down_weight"]
