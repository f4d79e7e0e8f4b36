"""The adapters and `patch`, held against the peers' own modules."""

import copy
import io
import pickle
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse, room, seeded
from peers import peer, randomized
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS, HIDDEN, LENGTH = 16, 8, 7
DIRECTIONS = ("outgoing", "incoming")


class TriangleMultiplicativeUpdate(nn.Module):
    """OpenFold's parameters, with the biases that it has, and the formula written out."""

    def __init__(self, channels: int, hidden: int, _outgoing: bool = True) -> None:
        super().__init__()
        self._outgoing = _outgoing
        self.layer_norm_in, self.layer_norm_out = nn.LayerNorm(channels), nn.LayerNorm(hidden)
        self.linear_z, self.linear_g = nn.Linear(hidden, channels), nn.Linear(channels, channels)
        self.sigmoid = nn.Sigmoid()
        self.make_projections(channels, hidden)

    def make_projections(self, channels: int, hidden: int) -> None:
        self.linear_a_p, self.linear_a_g = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.linear_b_p, self.linear_b_g = nn.Linear(channels, hidden), nn.Linear(channels, hidden)

    def projections(self, z: Tensor) -> tuple[Tensor, Tensor]:
        a = self.linear_a_p(z) * self.sigmoid(self.linear_a_g(z))
        return a, self.linear_b_p(z) * self.sigmoid(self.linear_b_g(z))

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        inplace_safe: bool = False,
        _add_with_inplace: bool = False,
        _inplace_chunk_size: int | None = 256,
    ) -> Tensor:
        normed = self.layer_norm_in(z)
        a, b = self.projections(normed)
        if mask is not None:
            a, b = a * mask[..., None], b * mask[..., None]
        equation = "...ikd,...jkd->...ijd" if self._outgoing else "...kid,...kjd->...ijd"
        update = self.linear_z(self.layer_norm_out(torch.einsum(equation, a, b)))
        update = update * self.sigmoid(self.linear_g(normed))
        return z.add_(update) if inplace_safe and _add_with_inplace else update


class FusedTriangleMultiplicativeUpdate(TriangleMultiplicativeUpdate):
    def make_projections(self, channels: int, hidden: int) -> None:
        self.linear_ab_p = nn.Linear(channels, 2 * hidden)
        self.linear_ab_g = nn.Linear(channels, 2 * hidden)

    def projections(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return (self.linear_ab_p(z) * self.sigmoid(self.linear_ab_g(z))).chunk(2, dim=-1)

    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        inplace_safe: bool = False,
        _add_with_inplace: bool = False,
        _inplace_chunk_size: int | None = 256,
    ) -> Tensor:
        return super().forward(z, mask, inplace_safe, _add_with_inplace)


class ChaiBlock(nn.Module):
    """Chai-1's parameters, and its formula written out."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layernorm_z_in = nn.LayerNorm(channels)
        self.merged_linear_p = nn.Linear(channels, 4 * hidden, bias=False)
        self.merged_linear_g = nn.Linear(channels, 4 * hidden + channels, bias=False)
        self.linear_z_out = nn.Linear(hidden, channels, bias=False)

    def forward(self, z: Tensor, mask: Tensor) -> Tensor:
        z = self.layernorm_z_in(z)
        gates = self.merged_linear_g(z).sigmoid()
        channels = z.shape[-1]
        both = self.merged_linear_p(z) * gates[..., :-channels]
        outgoing, incoming = both.chunk(2, dim=-1)
        a, b = outgoing.masked_fill(~mask[..., None], 0).chunk(2, dim=-1)
        c, d = incoming.masked_fill(~mask.transpose(1, 2)[..., None], 0).chunk(2, dim=-1)
        products = torch.einsum("bikd,bjkd->bijd", a, b), torch.einsum("bkid,bkjd->bijd", c, d)
        total = sum(F.layer_norm(product, product.shape[-1:]) for product in products)
        return self.linear_z_out(total) * gates[..., -channels:]


def boltz(outgoing: bool) -> nn.Module:
    module = peer("boltz")
    if outgoing:
        return module.TriangleMultiplicationOutgoing(CHANNELS)
    return module.TriangleMultiplicationIncoming(CHANNELS)


def esmfold(outgoing: bool) -> nn.Module:
    modeling = pytest.importorskip("transformers.models.esm.modeling_esmfold")
    config = SimpleNamespace(pairwise_state_dim=CHANNELS)
    return modeling.EsmFoldTriangleMultiplicativeUpdate(config, _outgoing=outgoing)


def esmfold2(outgoing: bool) -> nn.Module:
    modeling = pytest.importorskip("transformers.models.esmfold2.modeling_esmfold2")
    config = SimpleNamespace(pairwise_hidden_size=CHANNELS, chunk_size=None)
    return modeling.EsmFold2TriangleMultiplicativeUpdate(config, outgoing)


def of(package: str, name: str):
    return lambda outgoing: getattr(peer(package), name)(CHANNELS, HIDDEN, _outgoing=outgoing)


# A module of a direction, the adapter, and the family that `patch` takes it for.
MODULES = {
    "boltz": (boltz, "from_boltz", "boltz"),
    "openfold3": (of("openfold3", "TriangleMultiplicativeUpdate"), "from_openfold3", "openfold3"),
    "openfold3 fused": (
        of("openfold3", "FusedTriangleMultiplicativeUpdate"), "from_openfold3", "openfold3",
    ),
    "protenix": (of("protenix", "TriangleMultiplicativeUpdate"), "from_protenix", "protenix"),
    "esmfold": (esmfold, "from_openfold", "openfold"),
    "openfold": (
        lambda outgoing: TriangleMultiplicativeUpdate(CHANNELS, HIDDEN, outgoing),
        "from_openfold", "openfold",
    ),
    "openfold fused": (
        lambda outgoing: FusedTriangleMultiplicativeUpdate(CHANNELS, HIDDEN, outgoing),
        "from_openfold", "openfold",
    ),
    "esmfold2": (esmfold2, "from_esmfold2", "esmfold2"),
}  # fmt: skip
OPENFOLD_NAMES = [name for name in MODULES if name not in ("boltz", "esmfold2")]


def make(name: str, direction: str = "outgoing", seed: int = 0) -> nn.Module:
    return randomized(MODULES[name][0](direction == "outgoing"), seed)


def make_pair(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = seeded(1)
    return (torch.randn(*leading, LENGTH, LENGTH, CHANNELS, generator=generator) * 1.5).to(dtype)


def make_mask(*leading: int) -> Tensor:
    generator = seeded(2)
    return (torch.rand(*leading, LENGTH, LENGTH, generator=generator) > 0.3).float()


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().norm())


def gradients(module: nn.Module, call, pair: Tensor) -> dict[str, Tensor]:
    """The gradients of one call, by the names of the module's parameters and "pair"."""
    module.zero_grad()
    pair = pair.clone().requires_grad_()
    out = call(pair)
    generator = seeded(3)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    found = {name: value.grad for name, value in module.named_parameters()}
    return {"output": out.detach(), "pair": pair.grad, **found}


def assert_near(got: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert distance(got[name], wanted[name]) <= limit, name


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", MODULES)
def test_arguments_and_patch_compute_what_the_module_does(kernel, name, direction, masked):
    module, adapter = make(name, direction), getattr(kernel, MODULES[name][1])
    pair = make_pair(2)
    mask = make_mask(2) if masked else None
    # Boltz needs a mask: its absence is a mask of ones.
    given = torch.ones(pair.shape[:-1]) if mask is None and name == "boltz" else mask
    wanted = gradients(module, lambda x: module(x, given), pair)

    def by_arguments(x: Tensor) -> Tensor:
        return kernel.triangle_multiplicative_update(x, mask=mask, **adapter(module))

    got = gradients(module, by_arguments, pair)
    assert_near(got, wanted, 1e-5)
    with kernel.patch(module) as report:
        assert report.swapped == {"": MODULES[name][2]}
        patched = gradients(module, lambda x: module(x, given), pair)
    assert all(torch.equal(patched[name], got[name]) for name in got)
    again = gradients(module, lambda x: module(x, given), pair)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
def test_under_autocast(kernel, name, dtype):
    """The original's dtypes, and about as near to the float32 result as the original."""
    draws = []
    for seed in range(16):
        module, pair, mask = make(name, seed=seed), make_pair(1), make_mask(1)
        exact = gradients(module, lambda x: module(x, mask), pair)  # noqa: B023

        def call(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return module(x, mask)  # noqa: B023

        original = gradients(module, call, pair)
        with kernel.patch(module):
            got = gradients(module, call, pair)
        assert all(got[key].dtype == original[key].dtype for key in exact)
        draws.append((got, original, {key: value.double() for key, value in exact.items()}))
    assert_no_worse(draws, 1.1)


@pytest.mark.parametrize("name", ["openfold3", "openfold3 fused", "protenix"])
@torch.no_grad()
def test_linear_layers_that_cast_to_bfloat16(kernel, name):
    module, pair = make(name), make_pair(1, dtype=torch.bfloat16)
    wanted = module(pair)
    with kernel.patch(module):
        got = module(pair)
    assert got.dtype == wanted.dtype == torch.bfloat16
    assert distance(got, wanted) <= 1e-2 * room(got.numel())


def test_other_dtypes_must_agree(kernel):
    module = make("openfold")
    with kernel.patch(module), pytest.raises(TypeError) as caught:
        module(make_pair(1, dtype=torch.bfloat16))
    assert str(caught.value) == (
        "p_in_weight must have the dtype of x, torch.bfloat16; got torch.float32"
    )


def test_dtype_casts_the_projections_alone(kernel):
    arguments = kernel.from_openfold(make("openfold"), torch.bfloat16)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    cast = [name for name, value in tensors.items() if value.dtype == torch.bfloat16]
    assert cast == ["p_in_weight", "g_in_weight", "p_out_weight", "g_out_weight"]
    assert len(tensors) == 12


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
        submodule("models.patching"), "triangle_multiplicative_update_with_residual", counting
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
    wanted, mask = pair + module(pair), torch.ones(LENGTH)  # a mask that broadcasts
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


class Adapted(nn.Linear):
    """What an adapter library makes of a linear layer: more parameters in the same class name."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, CHANNELS)
        self.lora_a = nn.Parameter(torch.zeros(1))


Adapted.__name__ = "Linear"


class VariableLinear(nn.Linear):
    """A layer with a forward that is not known."""


def changed(change):
    """A module of OpenFold with something changed in it."""

    def build() -> nn.Module:
        module = make("openfold")
        change(module)
        return module

    return build


class Mean(TriangleMultiplicativeUpdate):
    """Another formula in a method that the known forward calls."""

    def projections(self, z: Tensor) -> tuple[Tensor, Tensor]:
        a, b = super().projections(z)
        return a, b / z.shape[-2]


def scaled(self, z: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """A forward with an argument that is not known."""
    return z * scale


def quantise(module: nn.Module) -> None:
    module.linear_z.weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)


class WrappedTensor(Tensor):
    pass


def wrap(module: nn.Module) -> None:
    module.linear_z.weight = nn.Parameter(module.linear_z.weight.data.as_subclass(WrappedTensor))


LINEAR = "linear_z must be a linear layer of a floating-point weight, maybe a bias, and nothing "
NORM = "layer_norm_in must be a LayerNorm of an eps, maybe a weight and a bias, and nothing besides"
ALONE = "linear_z has a hook or a forward of its own, which would not run"
LEFT = {
    "adapter": (changed(lambda m: setattr(m, "linear_z", Adapted())), LINEAR),
    "other linear": (changed(lambda m: setattr(m, "linear_z", VariableLinear(8, 16))), LINEAR),
    "wrapped": (changed(lambda m: setattr(m, "linear_z", nn.Sequential(m.linear_z))), LINEAR),
    "integers": (changed(quantise), LINEAR),
    "tensor class": (changed(wrap), LINEAR),
    "parametrised": (
        changed(lambda m: nn.utils.parametrizations.weight_norm(m.linear_z)), LINEAR,
    ),
    "precision": (
        changed(lambda m: setattr(m.linear_z, "precision", torch.float32)),
        "linear_z.precision must be None; got torch.float32",
    ),
    "other norm": (changed(lambda m: setattr(m, "layer_norm_in", nn.RMSNorm(CHANNELS))), NORM),
    "two eps": (
        changed(lambda m: setattr(m.layer_norm_out, "eps", 1e-3)),
        "both norms must have the same eps, as triangle_multiplicative_update has one; "
        "got 1e-05 and 0.001",
    ),
    "other sigmoid": (
        changed(lambda m: setattr(m, "sigmoid", nn.Hardsigmoid())),
        "module must have no part but layer_norm_in, layer_norm_out, linear_g, linear_z, "
        "linear_a_p, linear_b_p, linear_a_g, linear_b_g; got test_adapters."
        "TriangleMultiplicativeUpdate with sigmoid",
    ),
    "part more": (changed(lambda m: setattr(m, "extra", nn.Identity())), "module must have no"),
    "parameter more": (
        changed(lambda m: setattr(m, "scale", nn.Parameter(torch.ones(1)))),
        "module must have no part but",
    ),
    "part less": (
        changed(lambda m: delattr(m, "linear_b_g")),
        "module must have layer_norm_in, layer_norm_out, linear_g, linear_z, linear_a_p, "
        "linear_b_p, linear_a_g, linear_b_g; got test_adapters.TriangleMultiplicativeUpdate "
        "without linear_b_g",
    ),
    "halves": (
        changed(lambda m: setattr(m, "linear_b_p", nn.Linear(CHANNELS, 4))),
        "linear_a_p and linear_b_p must be alike; got weights (8, 16) and (4, 16), biases True "
        "and True",
    ),
    "shapes": (
        changed(lambda m: setattr(m, "linear_g", nn.Linear(CHANNELS, 4))),
        "the weights of values, gates and output gate must be [2D, C], [2D, C] and [C, C] with "
        "[C, D] = [16, 8], the shape of the output projection; "
        "got [(16, 16), (16, 16), (4, 16)]",
    ),
    "direction": (
        changed(lambda m: setattr(m, "_outgoing", "yes")),
        "module._outgoing must be a bool; got 'yes'",
    ),
    "hook of a part": (
        changed(lambda m: m.linear_z.register_forward_hook(lambda *_: None)), ALONE,
    ),
    "gradient hook of a part": (
        changed(lambda m: m.linear_z.register_full_backward_hook(lambda *_: None)), ALONE,
    ),
    "forward of a part": (changed(lambda m: setattr(m.linear_z, "forward", abs)), ALONE),
    "forward replaced": (
        changed(lambda m: setattr(m, "forward", m.projections)),
        "its forward has been replaced by another library's",
    ),
    "other arguments": (
        lambda: type(
            "TriangleMultiplicativeUpdate", (TriangleMultiplicativeUpdate,), {"forward": scaled}
        )(CHANNELS, HIDDEN),
        "its forward takes (self, z: torch.Tensor, mask: torch.Tensor | None = None, scale: float "
        "= 1.0) -> torch.Tensor, which no family's does",
    ),
    "chai": (
        lambda: type("TriangleMultiplication", (ChaiBlock,), {})(CHANNELS, HIDDEN),
        "Chai-1's block of both directions, whose ports differ in what their forward returns; "
        "from_chai gives the arguments of its two calls",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_not_understood_is_left(kernel, case):
    build, reason = LEFT[case]
    module = build()
    before = vars(module).get("forward")
    with kernel.patch(module) as report:
        assert report.swapped == {} and report.left[""].startswith(reason)
        assert vars(module).get("forward") is before


@pytest.mark.parametrize("flow", [None, "both"])
def test_a_module_of_esmfold2_without_a_direction_is_left(kernel, flow):
    module = esmfold2(True)
    del module.flow
    if flow is not None:
        module.flow = flow
    report = kernel.patch(module)
    assert report.left == {"": f"module.flow must be 'outgoing' or 'incoming'; got {flow!r}"}


def test_a_subclass_that_changes_a_method_is_left(kernel):
    kind = type("MyTriangleMultiplicativeUpdate", (Mean,), {})
    with kernel.patch(kind(CHANNELS, HIDDEN)) as report:
        assert report.left[""].endswith("MyTriangleMultiplicativeUpdate changes projections")
    kind = type("MyTriangleMultiplicativeUpdate", (TriangleMultiplicativeUpdate,), {})
    with kernel.patch(kind(CHANNELS, HIDDEN)) as report:
        assert report.left == {}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_left(kernel):
    class TriangleMultiplicationScripted(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z

    with kernel.patch(torch.jit.script(TriangleMultiplicationScripted())) as report:
        assert "TriangleMultiplicationScripted is compiled by TorchScript" in report.left[""]


def test_an_adapter_put_in_after_the_patch_is_noticed(kernel):
    module = make("openfold")
    with kernel.patch(module):
        module.linear_z = Adapted()
        with pytest.raises(TypeError, match=LINEAR):
            module(make_pair(1))


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


def test_messages_of_patch(kernel):
    with pytest.raises(TypeError) as caught:
        kernel.patch("model")
    assert str(caught.value) == "model must be a torch.nn.Module; got str"
    with pytest.raises(ValueError) as caught:
        kernel.patch(nn.Identity(), families=["alphafold"])
    with pytest.raises(TypeError, match="families must be names or None; got 3"):
        kernel.patch(nn.Identity(), families=3)
    assert str(caught.value) == (
        "families must be of openfold, openfold3, protenix, boltz, esmfold2; got 'alphafold'"
    )
    with pytest.raises(ValueError, match="memory must be"):
        kernel.patch(nn.Identity(), memory="none")
    with pytest.raises(ValueError, match="recompute must be"):
        kernel.patch(nn.Identity(), recompute="none")


def test_messages_of_the_adapters(kernel):
    with pytest.raises(TypeError) as caught:
        kernel.from_openfold(3)
    assert str(caught.value) == "module must be a torch.nn.Module; got int"
    with pytest.raises(TypeError) as caught:
        kernel.from_boltz(nn.Linear(2, 2))
    assert str(caught.value) == (
        "module must have norm_in, p_in, g_in, norm_out, p_out, g_out; "
        "got torch.nn.modules.linear.Linear without norm_in, p_in, g_in, norm_out, p_out, g_out"
    )
    module = make("boltz")
    lookalike = nn.Module()
    for name, part in module.named_children():
        lookalike.add_module(name, part)
    with pytest.raises(TypeError) as caught:
        kernel.from_boltz(lookalike)
    assert str(caught.value) == (
        "module must be of a class named ...Outgoing or ...Incoming, which is its direction; "
        "got torch.nn.modules.module.Module"
    )


class TestChai:
    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    @pytest.mark.parametrize("source", ["module", "TorchScript", "state dict"])
    @torch.no_grad()
    def test_two_calls_are_the_block(self, kernel, source):
        block, pair, mask = randomized(ChaiBlock(CHANNELS, HIDDEN)), make_pair(2), make_mask(2) > 0
        assert not torch.equal(mask, mask.transpose(1, 2))
        if source == "module":
            outgoing, incoming = kernel.from_chai(block)
        elif source == "TorchScript":
            outgoing, incoming = kernel.from_chai(torch.jit.trace(block, (pair, mask)))
        else:
            model = nn.ModuleDict({"block": block, "other": nn.Linear(2, 2)})
            outgoing, incoming = kernel.from_chai(model.state_dict(), "block.")
        assert (outgoing["direction"], incoming["direction"]) == DIRECTIONS
        got = kernel.triangle_multiplicative_update(pair, mask=mask, **outgoing)
        got += kernel.triangle_multiplicative_update(pair, mask=mask.transpose(1, 2), **incoming)
        assert distance(got, block(pair, mask)) <= 1e-5

    def test_gradients(self, kernel):
        block, pair, mask = randomized(ChaiBlock(CHANNELS, HIDDEN)), make_pair(1), make_mask(1) > 0

        def call(x: Tensor) -> Tensor:
            outgoing, incoming = kernel.from_chai(block)
            first = kernel.triangle_multiplicative_update(x, mask=mask, **outgoing)
            masked = mask.transpose(1, 2)
            return first + kernel.triangle_multiplicative_update(x, mask=masked, **incoming)

        wanted = gradients(block, lambda x: block(x, mask), pair)
        assert_near(gradients(block, call, pair), wanted, 1e-5)

    def test_messages(self, kernel):
        with pytest.raises(TypeError) as caught:
            kernel.from_chai([])
        assert str(caught.value) == (
            "source must be a torch.nn.Module or a mapping of tensors; got list"
        )
        state = ChaiBlock(CHANNELS, HIDDEN).state_dict()
        with pytest.raises(TypeError) as caught:
            kernel.from_chai(state, "blocks.0.")
        assert str(caught.value) == (
            "source must have exactly layernorm_z_in.weight, layernorm_z_in.bias, "
            "merged_linear_p.weight, merged_linear_g.weight, linear_z_out.weight below the prefix "
            "'blocks.0.'; got nothing"
        )
        with pytest.raises(TypeError, match="got .*, lora$"):
            kernel.from_chai({**state, "lora": torch.ones(1)})
        with pytest.raises(TypeError, match=r"got layer0, .*, layer7, and 92 more$"):
            kernel.from_chai({f"layer{index}": torch.ones(1) for index in range(100)})
        with pytest.raises(ValueError) as caught:
            kernel.from_chai({**state, "merged_linear_p.weight": torch.ones(4, CHANNELS)})
        assert str(caught.value) == (
            "merged_linear_p.weight and merged_linear_g.weight must be [4D, C] and [4D + C, C] "
            "with [C, D] = [16, 8], the shape of linear_z_out.weight; got (4, 16) and (48, 16)"
        )
        with pytest.raises(ValueError) as caught:
            kernel.from_chai({**state, "linear_z_out.weight": torch.ones(CHANNELS)})
        assert str(caught.value) == "linear_z_out.weight must be [C, D]; got (16,)"
        with pytest.raises(TypeError) as caught:
            kernel.from_chai({**state, "merged_linear_p.weight": [1.0]})
        assert str(caught.value) == "merged_linear_p.weight must be a torch.Tensor; got list"
