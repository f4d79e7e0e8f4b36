"""The parts of another library's module, read in place of being called.

That is right for a plain part alone: one whose weights are plain tensors, and whose call does
nothing besides. A part with a hook, a forward of its own, a quantised weight or an adapter would
compute something else. Of adapters, LoRA on a plain linear layer is one more linear layer,
(W + s B A) x, whose weight is merged here: values and gradients are those of the adapter.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

# Classes that compute x @ weight.T + bias, and LayerNorms: by name, as nothing is imported.
_LINEAR_CLASSES = ("Linear", "OpenfoldLinear", "EsmFoldLinear")
_NORM_CLASSES = (
    "LayerNorm",
    "FusedLayerNorm",
    "OpenFoldLayerNorm",
    "EsmFoldLayerNorm",
    "EsmFold2LayerNorm",
)
_LORA = ("peft.tuners.lora.layer", "Linear")
# Of Fold-CP and of esm's port of it: their parameters are DTensors that every rank has whole.
_REPLICATED_LINEAR, _REPLICATED_NORM = "LinearParamsReplicated", "LayerNormParamsReplicated"
_LOCAL_COPIES = ("_w_local", "_b_local")  # of both parameters, which esm's keep once they have run
_TENSOR_CLASSES = (nn.Parameter, Tensor)


class Linear(NamedTuple):
    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]


class Norm(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def fault_of_linear(name: str, part: nn.Module) -> str | None:
    """Why the part's weights would not say what its call computes; None if they do."""
    if isinstance(part, nn.Linear) and type(part).__name__ in _LINEAR_CLASSES:
        fault = _fault(name, part)
        if fault is None and getattr(part, "precision", None) is not None:
            return f"{name}.precision must be None; got {part.precision}"
        return fault
    if (type(part).__module__, type(part).__name__) == _LORA:
        return _fault_of_lora(name, part)
    return (
        f"{name} must be a linear layer of a floating-point weight, maybe a bias, and nothing "
        f"besides; got {describe(part)}"
    )


def fault_of_norm(name: str, part: nn.Module) -> str | None:
    """As `fault_of_linear`, of a LayerNorm."""
    if isinstance(getattr(part, "eps", None), float) and type(part).__name__ in _NORM_CLASSES:
        return _fault(name, part)
    return (
        f"{name} must be a LayerNorm of an eps, maybe a weight and a bias, and nothing besides; "
        f"got {describe(part)}"
    )


def fault_of_replicated_linear(name: str, part: nn.Module) -> str | None:
    """As `fault_of_linear`, of a layer whose parameters every rank has."""
    return _fault_of_replicated(name, part, _REPLICATED_LINEAR)


def fault_of_replicated_norm(name: str, part: nn.Module) -> str | None:
    """As `fault_of_replicated_linear`, of a LayerNorm over channels."""
    fault = _fault_of_replicated(name, part, _REPLICATED_NORM)
    shape, eps = getattr(part, "normalized_shape", ()), getattr(part, "eps", None)
    if fault is None and (len(shape) != 1 or not isinstance(eps, float)):
        return f"{name} must be a LayerNorm over the channels, of an eps; got {shape} and {eps}"
    return fault


def replicated_linear_of(part: nn.Module) -> Linear:
    """The layer, of which `fault_of_replicated_linear` is None, as this rank has it."""
    return Linear(_local(part.weight), _local(part.bias))


def replicated_norm_of(part: nn.Module) -> Norm:
    return Norm(_local(part.weight), _local(part.bias), part.eps)


def _local(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to_local()


def _fault_of_replicated(name: str, part: nn.Module, kind: str) -> str | None:
    if type(part).__name__ != kind:
        return f"{name} must be of a class named {kind}; got {describe(part)}"
    fault = fault_of_call(name, part)
    if fault is not None:
        return fault
    known = {"weight", "bias", *_LOCAL_COPIES}
    others = [*part._modules, *part._buffers, *part._parameters.keys() - known]
    if others:
        return f"{name} must have a weight, maybe a bias, and nothing besides; got {others}"
    for key in ("weight", "bias"):  # which esm's has as a plain attribute where it is None
        tensor = getattr(part, key, None)
        if tensor is None and (key == "bias" or kind == _REPLICATED_NORM):
            continue
        placements = getattr(tensor, "placements", None)
        if not (
            placements
            and all([of.is_replicate() for of in placements])
            and tensor.is_floating_point()
        ):
            return (
                f"{name}.{key} must be a floating-point DTensor that every rank has whole; got "
                f"{type(tensor).__name__} of placements {placements}"
            )
    return None


def linear_of(part: nn.Module) -> Linear:
    """The layer, of which `fault_of_linear` is None; of LoRA with the adapters in its weight."""
    parameters = part._parameters
    if "weight" in parameters:
        return Linear(parameters["weight"], parameters["bias"])
    base = part.base_layer
    weight = base.weight
    # In the adapter's dtype, float32 as a rule: the sum is rounded to the layer's once.
    with torch.autocast(weight.device.type, enabled=False):
        for adapter in _adapters_to_merge(part):
            down, up = part.lora_A[adapter].weight, part.lora_B[adapter].weight
            dtype = torch.promote_types(weight.dtype, up.dtype)
            weight = torch.addmm(
                weight.to(dtype), up.to(dtype), down.to(dtype), alpha=part.scaling[adapter]
            )
    return Linear(weight.to(base.weight.dtype), base.bias)


def norm_of(part: nn.Module) -> Norm:
    """The norm, of which `fault_of_norm` is None."""
    return Norm(part.weight, part.bias, part.eps)


def _adapters_to_merge(part: nn.Module) -> list[str]:
    """The active LoRA adapters that are not in the weight yet."""
    if part.disable_adapters or part.merged:
        return []
    return [adapter for adapter in part.active_adapters if adapter in part.lora_A]


def _fault_of_lora(name: str, part: nn.Module) -> str | None:
    fault = fault_of_call(name, part)
    if fault is not None:
        return fault
    if part.disable_adapters and part.merged:
        return f"{name} holds adapters that its next call takes out of its weight"
    if part.fan_in_fan_out:
        return f"{name} has adapters of a transposed weight"
    for adapter in _adapters_to_merge(part):
        if adapter in getattr(part, "lora_variant", ()) or getattr(part, "use_dora", {}).get(
            adapter
        ):
            return f"{name}'s adapter {adapter!r} is a variant of LoRA, more than a product"
        dropout = part.lora_dropout[adapter]
        if part.training and not isinstance(dropout, nn.Identity) and dropout.p > 0:
            return f"{name}'s adapter {adapter!r} has dropout, which a merged weight can't have"
        for side in (part.lora_A[adapter], part.lora_B[adapter]):
            fault = _fault(f"{name}'s adapter {adapter!r}", side)
            if fault is not None:
                return fault
            if type(side) is not nn.Linear or side.bias is not None:
                return f"{name}'s adapter {adapter!r} is not a product of two weights"
    return fault_of_linear(f"{name}.base_layer", part.base_layer)


def _fault(name: str, part: nn.Module) -> str | None:
    """Why the part's weight and bias are not all that its call uses."""
    fault = fault_of_call(name, part)
    if fault is not None:
        return fault
    if part._modules or part._buffers or not part._parameters.keys() <= {"weight", "bias"}:
        others = [*part._modules, *part._buffers, *part._parameters.keys() - {"weight", "bias"}]
        return f"{name} must have a weight, maybe a bias, and nothing besides; got {others}"
    for key, tensor in part._parameters.items():
        # Of torch's own are fake and sharded tensors too; Dynamo knows the first two.
        if tensor is not None and not (
            (type(tensor) in _TENSOR_CLASSES or type(tensor).__module__.startswith("torch."))
            and tensor.is_floating_point()
        ):
            return (
                f"{name}.{key} must be a plain floating-point tensor; got "
                f"{type(tensor).__name__} of {tensor.dtype}"
            )
    if "weight" not in part._parameters or "bias" not in part._parameters:
        return f"{name} must have a weight and a bias or None; got {[*part._parameters]}"
    return None


def fault_of_call(name: str, part: nn.Module) -> str | None:
    """What the part's call does besides its class's forward; None if nothing."""
    if has_hook(part):
        return f"{name} has a hook, which would not run"
    if "forward" in part.__dict__:
        return f"{name} has a forward of its own, which would not run"
    return None


def has_hook(part: nn.Module) -> bool:
    return bool(
        part._forward_hooks
        or part._forward_pre_hooks
        or part._backward_hooks
        or part._backward_pre_hooks
    )


def all_modules_have_hook() -> bool:
    """Whether a hook is registered that the call of any module runs."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def fault_of_parts(
    module: nn.Module, linears: tuple[str, ...], norms: tuple[str, ...]
) -> str | None:
    """Why the module's parts can't be read in place of being called; None if they can."""
    if all_modules_have_hook():
        return "a hook of all modules is registered, which would not run for its parts"
    parts = module._modules
    if not torch.compiler.is_compiling() and _are_plain(parts, (*linears, *norms)):
        return None
    for names, fault_of in ((linears, fault_of_linear), (norms, fault_of_norm)):
        for name in names:
            fault = fault_of(name, parts[name])
            if fault is not None:
                return fault
    return None


def _are_plain(parts: dict[str, nn.Module], names: tuple[str, ...]) -> bool:
    """Whether `fault_of_linear` or `fault_of_norm` surely finds nothing, in 3 us for five parts.

    By dictionaries, which torch.compile can't follow.
    """
    for name in names:
        part = parts[name]
        state = part.__dict__
        parameters = state["_parameters"]
        if (
            not _is_plain_class(type(part))
            or "forward" in state
            or state["_forward_hooks"]
            or state["_forward_pre_hooks"]
            or state["_backward_hooks"]
            or state["_backward_pre_hooks"]
            or state["_modules"]
            or state["_buffers"]
            or len(parameters) != 2
        ):
            return False
        for key in ("weight", "bias"):
            tensor = parameters.get(key)
            if tensor is not None and (
                type(tensor) is not nn.Parameter or not tensor.is_floating_point()
            ):
                return False
    return True


@functools.cache
def _is_plain_class(kind: type[nn.Module]) -> bool:
    if issubclass(kind, nn.Linear):
        return kind.forward is nn.Linear.forward and kind.__name__ in _LINEAR_CLASSES
    return kind.__name__ in _NORM_CLASSES


def describe(module: nn.Module) -> str:
    """The module's class, and for one of TorchScript the class that it was made from."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    original = getattr(module, "original_name", None)
    return name if original is None else f"{name} of {original}"
