"""What a swapped module computes when it is called: its weights are read, and our function runs."""

from typing import Any

import torch
from torch import Tensor, nn

from ..paths import is_transformed, say_own
from ..sharded import division
from ..swiglu_transition import swiglu_transition
from ..trimul_with_residual import (
    triangle_multiplicative_update,
    triangle_multiplicative_update_with_residual,
)
from ..validation import COMPUTE_DTYPES, MAX_LENGTH
from .families import Family

_BIASES = ("p_in_bias", "g_in_bias", "p_out_bias", "g_out_bias")


def triangle(
    family: Family,
    settings: dict[str, str],
    module: nn.Module,
    x: Tensor,
    mask: Tensor | None,
    add: bool,
) -> Tensor:
    """The update of x; with `add`, x itself once the update has been added to it."""
    if family.distributed and (reason := _reason_to_leave(family, module, x, mask)):
        say_own(reason)
        return type(module).forward(module, x, mask)
    dtype = compute_dtype(family, module, x)
    weights = family.read(module, dtype)
    if (
        add
        and dtype in (None, x.dtype)
        and x.ndim >= 3
        and x.is_contiguous()
        and (mask is None or mask.shape == x.shape[:-1])
        and may_overwrite()
        and division() is None  # ranks could differ in what is contiguous
        and without_biases(weights)
    ):
        pair = x.view(x.shape[:-3].numel(), *x.shape[-3:])
        triangle_multiplicative_update_with_residual(
            pair,
            weights.pop("direction"),
            pair,
            None,
            mask=None if mask is None else mask.reshape(pair.shape[:-1]),
            inplace=True,
            **weights,
            **settings,
        )
        return x
    update = triangle_multiplicative_update(
        x if dtype is None else x.to(dtype), mask=mask, **weights, **settings
    )
    return x.add_(update) if add else update


@torch._disable_dynamo
def _reason_to_leave(
    family: Family, module: nn.Module, x: Tensor, mask: Tensor | None
) -> str | None:
    """Why a module over a mesh of ranks runs its own forward; the same on all ranks.

    What it refuses is refused by it, and what makes its result another dtype than x is left to it.
    """
    from torch.distributed.tensor import DTensor, Shard  # takes long, and torch may not have it

    from ..blocks import has_all_ranks

    blocks = (Shard(0), Shard(1), Shard(2))
    given = [value for value in (x, mask) if value is not None]
    if not all([isinstance(value, DTensor) and value.placements == blocks for value in given]):
        return f"ours takes a pair tensor and a mask of placements {blocks}"
    if x.ndim != 4 or x.shape[1] != x.shape[2] or x.shape[1] > MAX_LENGTH:
        return f"ours takes [B, L, L, C] with L of at most {MAX_LENGTH}; got {tuple(x.shape)}"
    if mask is not None and mask.shape != x.shape[:3]:
        return f"ours takes a mask of {list(x.shape[:3])}; got {tuple(mask.shape)}"
    if not has_all_ranks(x.device_mesh):
        return "ours takes a mesh of all ranks that there are"
    needs = any([value.requires_grad for value in (*given, *module.parameters())])
    if is_transformed() or (torch.is_grad_enabled() and needs):
        return "a gradient or a transform is needed, which the module computes itself"
    dtype = compute_dtype(family, module, x)
    if (dtype or x.dtype) not in COMPUTE_DTYPES:
        return f"ours takes bfloat16, float16 and float32; got {x.dtype}"
    weights = [
        part.weight for part in module._modules.values()
        if getattr(part, "weight", None) is not None
    ]  # fmt: skip
    if dtype is None and any([of.dtype != x.dtype for of in weights if of.ndim == 2]):
        return "ours takes projections in the dtype of the pair tensor"
    wider = mask is not None and torch.promote_types(x.dtype, mask.dtype) != x.dtype
    if wider and not torch.is_autocast_enabled(x.device.type):
        return f"a mask of {mask.dtype} makes the result of {x.dtype} another dtype"
    return None


def transition(
    family: Family, settings: dict[str, str], module: nn.Module, x: Tensor, add: bool
) -> Tensor:
    """The update of x; with `add`, the sum of both."""
    dtype = compute_dtype(family, module, x)
    weights = family.read(module, dtype)
    if dtype in (None, x.dtype):
        return swiglu_transition(x, residual=x if add else None, **weights)
    update = swiglu_transition(x.to(dtype), **weights)
    return x + update if add else update


def without_biases(weights: dict[str, Any]) -> bool:
    """Whether the weights have no biases, which the function with a residual doesn't take.

    Takes their names out of `weights` then.
    """
    if any([weights[name] is not None for name in _BIASES]):
        return False
    for name in _BIASES:
        del weights[name]
    return True


def may_overwrite() -> bool:
    """Whether a result may be written over a tensor: eager, with no gradient or transform."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or is_transformed()
    )


def compute_dtype(family: Family, module: nn.Module, x: Tensor) -> torch.dtype | None:
    """What x and the projections are cast to; None leaves them as they are."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype == torch.bfloat16 and family.casting is not None:
        linear = module._modules[family.casting]
        return None if type(linear).forward is nn.Linear.forward else x.dtype
    return None
