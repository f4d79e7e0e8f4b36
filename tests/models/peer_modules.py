"""Other models' modules, small and random, and how two of them are compared."""

import copy
import functools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import seeded
from peers import esm_peer, peer, randomized
from torch import Tensor, nn

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


def esm(outgoing: bool) -> nn.Module:
    flow = "outgoing" if outgoing else "incoming"
    module = esm_peer().TriangleMultiplicativeBlock(CHANNELS, HIDDEN, flow)
    module.set_chunk_size(3)
    return module


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
    "esm": (esm, "from_esm", "esm"),
}  # fmt: skip


def esmfold2_part(name: str, *arguments, **named) -> nn.Module:
    modeling = pytest.importorskip("transformers.models.esmfold2.modeling_esmfold2")
    return getattr(modeling, name)(*arguments, **named)


def esm_transition(module: str, name: str):
    def build() -> nn.Module:
        transition = getattr(esm_peer(module), name)(CHANNELS, 2)
        if hasattr(transition, "set_chunk_size"):
            transition.set_chunk_size(3)
        return transition

    return build


# A transition, and the adapter; the family is the first word of the name.
TRANSITIONS = {
    "boltz": (
        lambda: peer("boltz", "boltz.model.layers.transition").Transition(CHANNELS, 24),
        "transition_from_boltz",
    ),
    "openfold3": (
        lambda: peer("openfold3", "openfold3.core.model.layers.transition").SwiGLUTransition(
            CHANNELS, 2
        ),
        "transition_from_openfold3",
    ),
    "protenix": (
        lambda: peer("protenix", "protenix.model.modules.primitives").Transition(CHANNELS, 3),
        "transition_from_protenix",
    ),
    "esmfold2": (
        lambda: esmfold2_part("EsmFold2Transition", CHANNELS, 24, chunk_size=3),
        "transition_from_esmfold2",
    ),
    "esm": (esm_transition("layers", "Transition"), "transition_from_esm"),
    "esm pair": (esm_transition("model", "PairTransition"), "transition_from_esm"),
    "esm experimental": (
        esm_transition("experimental", "_TransitionFFN"), "transition_from_esm"
    ),
    "esm diffusion": (esm_transition("layers", "TransitionLayer"), "transition_from_esm"),
}  # fmt: skip
ADDING = ("esmfold2", "esm")  # those whose forward adds the residual


def make_transition(name: str, seed: int = 0) -> nn.Module:
    return randomized(TRANSITIONS[name][0](), seed).eval()


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in this dtype, with ESMFold2's norms in float32 as its checkpoints have them."""
    module.to(dtype)
    for part in module.modules():
        if type(part).__name__ == "EsmFold2LayerNorm":
            part.float()
    return module


def in_float64(module: nn.Module) -> nn.Module:
    """A copy that computes in float64, by its own code."""
    module = copy.deepcopy(module).double()
    for part in module.modules():
        if type(part).__name__ == "EsmFold2LayerNorm":  # its forward casts to float32
            part.__class__ = nn.LayerNorm
        if type(part).__name__ == "TriangleMultiplicativeBlock":  # so does this one's
            part.forward = functools.partial(_without_casts, part)
    return module


def _without_casts(module: nn.Module, *arguments, **named) -> Tensor:
    with mock.patch.object(Tensor, "float", Tensor.double):
        return type(module).forward(module, *arguments, **named)


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
