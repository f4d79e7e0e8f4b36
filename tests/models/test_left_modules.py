"""The modules that `patch` leaves as they are, and the reasons that it gives."""

import re

import pytest
import torch
from peer_modules import (
    CHANNELS,
    HIDDEN,
    ChaiBlock,
    TriangleMultiplicativeUpdate,
    esmfold2,
    make,
    make_pair,
)
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("one_thread")


class Adapted(nn.Linear):
    """A linear layer changed by an adapter library: more parameters under the same class name."""

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
HOOK, FORWARD = (
    f"linear_z has {what}, which would not run" for what in ("a hook", "a forward of its own")
)
ADAPTED = "linear_z must have a weight, maybe a bias, and nothing besides; got ['lora_a']"
LEFT = {
    "adapter": (changed(lambda m: setattr(m, "linear_z", Adapted())), ADAPTED),
    "other linear": (changed(lambda m: setattr(m, "linear_z", VariableLinear(8, 16))), LINEAR),
    "wrapped": (changed(lambda m: setattr(m, "linear_z", nn.Sequential(m.linear_z))), LINEAR),
    "integers": (
        changed(quantise),
        "linear_z.weight must be a plain floating-point tensor; got Parameter of torch.int8",
    ),
    "tensor class": (
        changed(wrap),
        "linear_z.weight must be a plain floating-point tensor; got WrappedTensor of torch.float32",
    ),
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
        "linear_a_p, linear_b_p, linear_a_g, linear_b_g; got peer_modules."
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
        "linear_b_p, linear_a_g, linear_b_g; got peer_modules.TriangleMultiplicativeUpdate "
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
        changed(lambda m: m.linear_z.register_forward_hook(lambda *_: None)), HOOK,
    ),
    "gradient hook of a part": (
        changed(lambda m: m.linear_z.register_full_backward_hook(lambda *_: None)), HOOK,
    ),
    "forward of a part": (changed(lambda m: setattr(m.linear_z, "forward", abs)), FORWARD),
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
        with pytest.raises(TypeError, match=re.escape(ADAPTED)):
            module(make_pair(1))
