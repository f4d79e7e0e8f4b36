"""What a swapped module computes when it is called: its weights are read, and our function runs."""

from typing import Any

import torch
from torch import Tensor, nn

from ..paths import is_transformed
from ..swiglu_transition import swiglu_transition
from ..trimul_with_residual import (
    triangle_multiplicative_update,
    triangle_multiplicative_update_with_residual,
)
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
    dtype = compute_dtype(family, module, x)
    weights = family.read(module, dtype)
    if (
        add
        and dtype in (None, x.dtype)
        and x.ndim >= 3
        and x.is_contiguous()
        and (mask is None or mask.shape == x.shape[:-1])
        and may_overwrite()
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
