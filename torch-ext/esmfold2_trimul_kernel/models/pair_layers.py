"""ESMFold2's pair layer as a whole: triangles and transition with their residuals inside.

    pair = pair + tri_mul_out(pair)         the residual in stage 3; a tensor of the layer's own
    pair = pair + tri_mul_in(pair)          the same, written over it
    pair = pair_transition(pair)            the same

Only triangles whose own forward `patch` has swapped are run so, and only if they have no hooks; a
transition that is not, or has, is called as a module. Where that doesn't hold, or a call doesn't
fit, the layer's own code runs and calls its modules, of which each is swapped by itself.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..swiglu_transition import swiglu_transition
from ..trimul_with_residual import triangle_multiplicative_update_with_residual
from .adapters import from_esmfold2, transition_from_esmfold2
from .calls import compute_dtype, may_overwrite, without_biases
from .families import Family, is_patch
from .parts import all_modules_have_hook, describe, has_hook

_PARTS = ("tri_mul_out", "tri_mul_in", "pair_transition")
_LAYER = "EsmFold2PairUpdateLayer"


def check_layer(module: nn.Module, family: Family) -> None:
    """Raises if the layer's triangles, which have been swapped by now, can't be run inside it."""
    parts = module._modules
    missing = [name for name in _PARTS if name not in parts]
    if missing:
        raise TypeError(f"it must have {', '.join(_PARTS)}; got none named {', '.join(missing)}")
    base = _pair_layer_of(module)
    others = [*(parts.keys() - _PARTS), *module._parameters, *module._buffers]
    if others and type(module).forward is base.forward:
        raise TypeError(f"it must have no part but {', '.join(_PARTS)}; got {', '.join(others)}")
    for name in _PARTS[:2]:
        if has_hook(parts[name]):
            raise TypeError(f"{name} has a hook, which would not run")
        if not _is_swapped(parts[name]):
            raise TypeError(f"its {name} is not swapped")
        if not without_biases(from_esmfold2(parts[name])):
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
    triangles = [module._modules[name] for name in _PARTS[:2]]
    dtype = compute_dtype(family, module, pair)
    if (
        all_modules_have_hook()
        or not all([_is_swapped(part) and not has_hook(part) for part in triangles])
        or dtype not in (None, pair.dtype)
        or pair.ndim != 4
        or (mask is not None and mask.shape != pair.shape[:-1])
    ):
        return own(module, pair, mask)
    weights = [from_esmfold2(part, dtype) for part in triangles]
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
    part = module._modules[_PARTS[2]]
    if not _is_swapped(part) or has_hook(part):
        return part(pair)
    return swiglu_transition(
        pair, residual=pair, inplace=inplace, **transition_from_esmfold2(part, dtype)
    )


def _is_swapped(part: nn.Module) -> bool:
    return is_patch(vars(part).get("forward"))


def _pair_layer_of(module: nn.Module) -> type[nn.Module]:
    """The class of the layer's order of inheritance whose forward is the pair layer's."""
    for kind in type(module).__mro__:
        if kind.__name__ == _LAYER and "forward" in vars(kind):
            return kind
    raise TypeError(f"{describe(module)} does not inherit from {_LAYER}")


def _pair_layer_forward(run: Callable) -> Callable:
    def forward(self, pair_states: Tensor, pair_attention_mask: Tensor | None = None) -> Tensor:
        return run(self, type(self).forward, pair_states, pair_attention_mask)

    return forward


def _msa_layer_forward(run: Callable) -> Callable:
    """The class's own code, whose `super().forward` is our pair layer.

    It runs on a view of the layer: an object with the layer's state, of a class in whose order of
    inheritance ours comes right after the layer's.
    """

    @functools.cache
    def view_class(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
        def forward(self, pair_states: Tensor, pair_attention_mask: Tensor | None = None) -> Tensor:
            return run(self, base.forward, pair_states, pair_attention_mask)

        return type(kind.__name__, (kind, type(_LAYER, (base,), {"forward": forward})), {})

    def forward(
        self,
        msa_states: Tensor,
        pair_states: Tensor,
        msa_attention_mask: Tensor,
        pair_attention_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        view = self
        if not torch.compiler.is_compiling():  # Dynamo can't follow a view
            kind = view_class(type(self), _pair_layer_of(self))
            view = object.__new__(kind)
            object.__setattr__(view, "__dict__", vars(self))
        return type(self).forward(
            view, msa_states, pair_states, msa_attention_mask, pair_attention_mask
        )

    return forward


PAIR_LAYERS = (
    Family("esmfold2", (_LAYER,), _pair_layer_forward),
    Family("esmfold2", ("EsmFold2MSAEncoderLayer",), _msa_layer_forward),
)
