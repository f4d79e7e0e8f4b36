"""ESMFold2's pair layer as a whole, transformers' and biohub's: residuals inside its modules.

    pair = pair + tri_mul_out(pair)         the residual in stage 3; a tensor of the layer's own
    pair = pair + tri_mul_in(pair)          the same, written over it
    pair = pair_transition(pair)            the same

Only triangles whose own forward `patch` has swapped are run so, and only if they have no hooks; a
transition that is not, or has, is called as a module. Where that doesn't hold, or a call doesn't
fit, the layer's own code runs and calls its modules, of which each is swapped by itself. Of the
layer of biohub's esm that is the code without a backend: with one it would call none of them.
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..swiglu_transition import swiglu_transition
from ..trimul_with_residual import triangle_multiplicative_update_with_residual
from .adapters import (
    from_esm,
    from_esmfold2,
    transition_from_esm,
    transition_from_esmfold2,
)
from .calls import compute_dtype, may_overwrite, without_biases
from .families import Family, is_patch, is_wrapper
from .parts import all_modules_have_hook, describe, fault_of_call, has_hook


class _Kind(NamedTuple):
    """The pair layers of a family. The first three parts are the triangles and the transition."""

    layer: str  # the name of the class whose forward it is
    parts: tuple[str, ...]
    triangle: Callable  # a triangle's arguments
    transition: Callable


_KINDS = {
    "esmfold2": _Kind(
        "EsmFold2PairUpdateLayer", ("tri_mul_out", "tri_mul_in", "pair_transition"),
        from_esmfold2, transition_from_esmfold2,
    ),
    "esm": _Kind(
        "PairUpdateBlock", ("tri_mul_out", "tri_mul_in", "pair_transition", "row_drop"),
        from_esm, transition_from_esm,
    ),
}  # fmt: skip


def check_layer(module: nn.Module, family: Family) -> None:
    """Raises if the layer's triangles, which have been swapped by now, can't be run inside it."""
    kind, parts = _KINDS[family.name], module._modules
    wanted = ", ".join(kind.parts)
    missing = [name for name in kind.parts if name not in parts]
    if missing:
        raise TypeError(f"it must have {wanted}; got none named {', '.join(missing)}")
    base = _pair_layer_of(module, kind)
    others = [*(parts.keys() - kind.parts), *module._parameters, *module._buffers]
    if others and type(module).forward is base.forward:
        raise TypeError(f"it must have no part but {wanted}; got {', '.join(others)}")
    for name in kind.parts[:2]:
        triangle = _triangle_in(parts[name])
        if has_hook(parts[name]) or has_hook(triangle):
            raise TypeError(f"{name} has a hook, which would not run")
        if not _runs_ours(parts[name]):
            raise TypeError(f"its {name} is not swapped")
        if not without_biases(kind.triangle(triangle)):
            raise TypeError(f"{name} has biases, which the function with a residual doesn't take")


def pair_layer(
    family: Family,
    settings: dict[str, str],
    module: nn.Module,
    own: Callable,
    pair: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The layer's output; `own` is its class's forward."""
    kind = _KINDS[family.name]
    triangles = [module._modules[name] for name in kind.parts[:2]]
    dtype = compute_dtype(family, module, pair)
    if (
        all_modules_have_hook()
        or not all([_runs_ours(part) and not has_hook(part) for part in triangles])
        or not _adds(module._modules.get("row_drop"))
        or dtype not in (None, pair.dtype)
        or pair.ndim != 4
        or (mask is not None and mask.shape != pair.shape[:-1])
    ):
        return own(module, pair, mask)
    weights = [kind.triangle(_triangle_in(part), dtype) for part in triangles]
    if not all([without_biases(of_one) for of_one in weights]):
        return own(module, pair, mask)
    # The caller may hold its tensor. What the first update makes is the layer's own.
    inplace = False
    for of_one in weights:
        pair = triangle_multiplicative_update_with_residual(
            pair, of_one.pop("direction"), pair, None, mask=mask, inplace=inplace, **of_one,
            **settings,
        )  # fmt: skip
        inplace = may_overwrite()
    part = module._modules[kind.parts[2]]
    if not _is_swapped(part) or has_hook(part):
        return part(pair)
    return swiglu_transition(
        pair, residual=pair, inplace=inplace, **kind.transition(part, dtype)
    )


def passes_over_triangles(module: nn.Module) -> bool:
    """Whether it is a layer of esm's whose own backend runs in place of swapped triangles."""
    return (
        type(module).__name__ == _KINDS["esm"].layer
        and getattr(module, "_kernel_backend", None) in ("fused", "fast")
        and not _is_swapped(module)
        and any(_runs_ours(module._modules[name]) for name in _KINDS["esm"].parts[:2])
    )


def _triangle_in(part: nn.Module) -> nn.Module:
    return part._modules["_engine"] if is_wrapper(part) else part


def _runs_ours(part: nn.Module) -> bool:
    """Whether the part's call does nothing but run a swapped triangle, which may be inside it."""
    triangle = _triangle_in(part)
    return _is_swapped(triangle) and (
        triangle is part or ("forward" not in vars(part) and not has_hook(triangle))
    )


def _adds(dropout: nn.Module | None) -> bool:
    """Whether esm's module that adds an update to its residual does so without dropout."""
    return dropout is None or (
        type(dropout).__name__ == "DropoutResidual"
        and (dropout._r == 0 or not dropout.training)
        and fault_of_call("row_drop", dropout) is None
    )


def _is_swapped(part: nn.Module) -> bool:
    return is_patch(vars(part).get("forward"))


def _pair_layer_of(module: nn.Module, kind: _Kind) -> type[nn.Module]:
    """The class of the layer's order of inheritance whose forward is the pair layer's."""
    for one in type(module).__mro__:
        if one.__name__ == kind.layer and "forward" in vars(one):
            return one
    raise TypeError(f"{describe(module)} does not inherit from {kind.layer}")


def _pair_layer_forward(run: Callable) -> Callable:
    def forward(self, pair_states: Tensor, pair_attention_mask: Tensor | None = None) -> Tensor:
        own = type(self).forward
        if not _checkpoints_in_forward(self):
            return run(self, own, pair_states, pair_attention_mask)
        layer = functools.partial(run, self, inspect.unwrap(own))
        return self._gradient_checkpointing_func(layer, pair_states, pair_attention_mask)

    return forward


def _checkpoints_in_forward(module: nn.Module) -> bool:
    """Whether the forward of the module's class would checkpoint itself, as from transformers 5.23.

    In older versions `__call__` does, which calls the instance's forward.
    """
    return (
        getattr(module, "gradient_checkpointing", False)
        and module.training
        and torch.is_grad_enabled()
        and type(module).__call__ is nn.Module.__call__
    )


def _esm_layer_forward(run: Callable) -> Callable:
    def forward(self, pair: Tensor, pair_attention_mask: Tensor | None = None) -> Tensor:
        return run(self, _esm_layer, pair, pair_attention_mask)

    return forward


def _esm_layer(module: nn.Module, pair: Tensor, mask: Tensor | None) -> Tensor:
    """What the layer of biohub's esm computes without a backend, by its modules."""
    for triangle in (module.tri_mul_out, module.tri_mul_in):
        pair = module.row_drop(pair, triangle(pair, mask=mask))
    return module.pair_transition(pair)


def _msa_layer_forward(run: Callable) -> Callable:
    """The class's own code, whose `super().forward` is our pair layer.

    It runs on a view of the layer: an object with the layer's state, of a class in whose order of
    inheritance ours comes right after the layer's.
    """

    @functools.cache
    def view_class(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
        def forward(self, pair_states: Tensor, pair_attention_mask: Tensor | None = None) -> Tensor:
            return run(self, base.forward, pair_states, pair_attention_mask)

        own = type(base.__name__, (base,), {"forward": forward})
        return type(kind.__name__, (kind, own), {})

    def forward(
        self,
        msa_states: Tensor,
        pair_states: Tensor,
        msa_attention_mask: Tensor,
        pair_attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        view = self
        if not torch.compiler.is_compiling():  # Dynamo can't follow a view
            kind = view_class(type(self), _pair_layer_of(self, _KINDS["esmfold2"]))
            view = object.__new__(kind)
            object.__setattr__(view, "__dict__", vars(self))
        # The view's, not the layer's: from transformers 5.23 on the outermost class checkpoints.
        return type(view).forward(
            view, msa_states, pair_states, msa_attention_mask, pair_attention_mask
        )

    return forward


PAIR_LAYERS = (
    Family("esmfold2", (_KINDS["esmfold2"].layer,), _pair_layer_forward),
    Family("esmfold2", ("EsmFold2MSAEncoderLayer",), _msa_layer_forward),
    Family("esm", (_KINDS["esm"].layer,), _esm_layer_forward),
)
