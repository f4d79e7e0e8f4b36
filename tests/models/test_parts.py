"""The Hub layer in a module whose parts are not plain: the module's own result, said once.

Whatever a part does beside multiplying by its weight, our layer's result is the stock module's: by
the module's own forward, or with LoRA merged into the weight.
"""

import copy
import logging
import types
import warnings

import pytest
import torch
from helpers import in_tree_module, make_problem, relative_error, room
from peers import peer
from torch import nn
from torch.nn.utils import parametrizations, prune

LINEARS = ("proj_bundle", "proj_emit", "proj_gate")


@pytest.fixture
def problem():
    return make_problem(9, 16, mask="soft")


@pytest.fixture
def swapped(kernel, submodule, problem, monkeypatch, caplog):
    """swapped(module): its output by our layer; `served` has an entry for each fused call."""
    submodule("paths").say_once.cache_clear()
    caplog.set_level(logging.WARNING)
    layers, served = submodule("layers"), []
    update = layers.triangle_multiplicative_update_with_residual

    def counted(*arguments, **named):
        served.append(1)
        return update(*arguments, **named)

    monkeypatch.setattr(layers, "triangle_multiplicative_update_with_residual", counted)
    forward = kernel.layers.ESMFold2TriangleMultiplication.forward

    def run(module):
        return types.MethodType(forward, module)(problem.x, problem.mask)

    run.served = served
    return run


def own_forward(part: nn.Module) -> None:
    """As accelerate offloads: the weight exists only while the part's own forward runs."""
    weight, forward = part.weight, part.forward
    part.weight = nn.Parameter(weight.to("meta"), requires_grad=False)

    def loaded(x):
        part._parameters["weight"] = weight
        try:
            return forward(x)
        finally:
            part._parameters["weight"] = nn.Parameter(weight.to("meta"), requires_grad=False)

    part.forward = loaded


class Int8Tensor(torch.Tensor):
    pass


class Wrapped(nn.Module):
    """As adapters other than LoRA wrap a layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = nn.Parameter(torch.full((base.out_features,), 1.5))

    def forward(self, x):
        return self.base_layer(x) * self.scale


def on_part(change):
    return lambda module, name: change(getattr(module, name))


# What is done to a part, and what the log says of it.
CHANGES = {
    "forward hook": (
        on_part(lambda part: part.register_forward_hook(lambda _, x, out: out * 2)), "has a hook"
    ),
    "forward hook that only looks": (
        on_part(lambda part: part.register_forward_hook(lambda *_: None)), "has a hook"
    ),
    "forward pre-hook": (
        on_part(lambda part: part.register_forward_pre_hook(lambda _, x: (x[0] + 1,))),
        "has a hook",
    ),
    "backward hook": (
        on_part(lambda part: part.register_full_backward_hook(lambda *_: None)), "has a hook"
    ),
    "old weight norm": (on_part(nn.utils.weight_norm), "has a hook"),
    "pruned": (
        on_part(lambda part: prune.random_unstructured(part, "weight", 0.5)), "has a hook"
    ),
    "weight norm": (on_part(parametrizations.weight_norm), "must be a linear layer"),
    "offloaded": (on_part(own_forward), "has a forward of its own"),
    "tensor class": (
        on_part(lambda part: setattr(part, "weight", nn.Parameter(part.weight.data.as_subclass(
            Int8Tensor
        )))),
        "got Int8Tensor of torch.float32",
    ),
    "wrapped": (
        lambda module, name: setattr(module, name, Wrapped(getattr(module, name))),
        "must be a linear layer",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_part_that_is_not_plain_runs_the_modules_own_forward(
    swapped, problem, caplog, change, name
):
    module = in_tree_module(problem)
    swapped(module)
    assert swapped.served == [1] and caplog.messages == []
    apply, reason = CHANGES[change]
    apply(module, name)
    wanted = module(problem.x, problem.mask)
    for _ in range(2):
        assert torch.equal(swapped(module), wanted)
    assert swapped.served == [1]
    assert len(caplog.messages) == 1 and reason in caplog.messages[0]
    assert caplog.messages[0].startswith(
        f"The triangle multiplication runs the module's own forward: {name}"
    )


@torch.no_grad()
def test_norms_and_hooks_of_all_modules(swapped, problem):
    module = in_tree_module(problem)
    hook = module.norm_mix.register_forward_hook(lambda _, x, out: out + 1)
    assert torch.equal(swapped(module), module(problem.x, problem.mask)) and not swapped.served
    hook.remove()
    plain = swapped(module)
    assert swapped.served == [1]
    hook = nn.modules.module.register_module_forward_hook(
        lambda part, x, out: out * 2 if isinstance(part, nn.Linear) else None
    )
    try:
        got, wanted = swapped(module), module(problem.x, problem.mask)
    finally:
        hook.remove()
    assert torch.equal(got, wanted) and not torch.allclose(got, plain)
    assert swapped.served == [1]


def test_a_module_without_a_forward_of_its_own_refuses_by_name(kernel, problem):
    stock = in_tree_module(problem)
    module = kernel.layers.ESMFold2TriangleMultiplication()
    for name, part in stock.named_children():
        module.add_module(name, part)
    module.dim, module.flow = stock.dim, stock.flow
    assert module(problem.x, problem.mask).shape == problem.x.shape
    module.proj_gate.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="proj_gate has a hook, which would not run"):
        module(problem.x, problem.mask)


def with_lora(problem, dtype=torch.float32, **options):
    """The stock module under peft, with adapters that matter, and peft's own wrapper around it."""
    peft = peer("peft")
    module = in_tree_module(problem).to(dtype)
    module.norm_start.float(), module.norm_mix.float()
    options = {"r": 4, "target_modules": list(LINEARS), "init_lora_weights": False} | options
    torch.manual_seed(3)
    # Test processes hand warnings to one that can't import peft's class of them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(nn.ModuleDict({"tri": module}), peft.LoraConfig(**options))
    return model, model.base_model.model["tri"]


@pytest.mark.parametrize("targets", [LINEARS, ("proj_gate",), ("proj_bundle", "proj_emit")])
def test_lora_is_merged_with_its_gradients(swapped, problem, targets, caplog):
    _, module = with_lora(problem, target_modules=list(targets))
    stock = copy.deepcopy(module)
    wanted, got = stock(problem.x, problem.mask), swapped(module)
    assert swapped.served == [1] and caplog.messages == []
    assert relative_error(got, wanted.detach().double()) <= 1e-5
    for out in (wanted, got):
        out.square().sum().backward()
    trained = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(targets)
    for name, parameter in stock.named_parameters():
        if parameter.requires_grad:
            assert relative_error(trained[name], parameter.grad.double()) <= 1e-5, name
        else:
            assert parameter.grad is None
    frozen = in_tree_module(problem)
    assert relative_error(got, frozen(problem.x, problem.mask).detach().double()) > 1e-2


def test_adapters_that_are_switched(swapped, problem):
    """Off, merged, taken out again, two at once: each time as the stock module."""
    model, module = with_lora(problem)
    peft = peer("peft")
    config = peft.LoraConfig(r=2, target_modules=list(LINEARS), init_lora_weights=False)
    model.add_adapter("other", config)

    def agrees(fused=True):
        swapped.served.clear()
        with torch.no_grad():
            got, wanted = swapped(module), module(problem.x, problem.mask)
        assert relative_error(got, wanted.double()) <= 1e-5
        assert bool(swapped.served) == fused
        return got

    first = agrees()
    with model.disable_adapter():
        assert not torch.allclose(agrees(), first)
    model.set_adapter("other")
    second = agrees()
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(agrees(), second)
    model.merge_adapter()
    agrees()
    model.unmerge_adapter()
    agrees()
    model.merge_adapter()
    with model.disable_adapter():
        agrees(fused=False)  # peft takes the adapters out of the weight when it is called
        agrees()


@pytest.mark.parametrize("options, reason", [
    ({"use_dora": True}, "variant of LoRA"),
    ({"lora_dropout": 0.5}, "dropout"),
    ({"lora_bias": True}, "not a product of two weights"),
])  # fmt: skip
def test_what_is_more_than_lora_runs_the_modules_own_forward(
    swapped, problem, caplog, options, reason
):
    _, module = with_lora(problem, **options)
    module.train()
    torch.manual_seed(5)
    wanted = module(problem.x, problem.mask)
    torch.manual_seed(5)
    assert torch.equal(swapped(module), wanted) and not swapped.served
    assert reason in caplog.messages[0]
    if "lora_dropout" in options:
        module.eval()
        assert relative_error(
            swapped(module), module(problem.x, problem.mask).detach().double()
        ) <= 1e-5
        assert swapped.served == [1]


@torch.no_grad()
def test_lora_in_bfloat16_is_no_further_from_float32(swapped, problem):
    _, module = with_lora(problem, torch.bfloat16)
    for name in LINEARS:
        part = getattr(module, name)
        part.lora_A.float(), part.lora_B.float()
    exact = copy.deepcopy(module).float()
    problem.x = problem.x.bfloat16()
    wanted = exact(problem.x.float(), problem.mask).double()
    stock = module(problem.x, problem.mask)
    got = swapped(module)
    assert swapped.served == [1]
    limit = relative_error(stock, wanted) * room(wanted.numel())
    assert relative_error(got, wanted) <= limit


def test_patch_merges_lora_too(kernel, problem):
    _, module = with_lora(problem)
    wanted = module(problem.x, problem.mask).detach().double()
    with kernel.patch(module) as report:
        assert report.left == {}
        assert relative_error(module(problem.x, problem.mask), wanted) <= 1e-5


@pytest.mark.parametrize("order", ["swap, then offload", "offload, then swap"])
@torch.no_grad()
def test_a_model_that_accelerate_offloads(kernel, problem, order):
    accelerate = peer("accelerate")
    module = in_tree_module(problem)
    wanted = module(problem.x, problem.mask)
    forward = kernel.layers.ESMFold2TriangleMultiplication.forward
    if order.startswith("swap"):
        module.forward = types.MethodType(forward, module)
    accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    if order.startswith("offload"):
        module.forward = types.MethodType(forward, module)
    assert relative_error(module(problem.x, problem.mask), wanted.double()) <= 1e-5
