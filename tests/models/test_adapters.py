"""The adapters, held against the peers' own modules."""

import pytest
import torch
from helpers import assert_no_worse, room
from peer_modules import (
    CHANNELS,
    DIRECTIONS,
    HIDDEN,
    MODULES,
    ChaiBlock,
    assert_near,
    distance,
    gradients,
    make,
    make_mask,
    make_pair,
)
from peers import randomized
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


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
