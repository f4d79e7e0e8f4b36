"""`patch`: the kernel in the place of every triangle multiplication of a model that it knows."""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..trimul_with_residual import (
    triangle_multiplicative_update,
    triangle_multiplicative_update_with_residual,
)
from ..validation import check_memory, check_recompute
from .adapters import (
    from_boltz,
    from_esmfold2,
    from_openfold,
    from_openfold3,
    from_protenix,
)
from .parts import describe, fault_of_call


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did, by the modules' dotted names. Prints as a list; `undo` takes it back.

    As a context manager it takes the patch back at the end of the block. Copies of the model that
    were made meanwhile stay patched: `unpatch` is for them.
    """

    swapped: dict[str, str]  # name: family
    left: dict[str, str]  # name: the reason
    _forwards: dict[str, tuple[nn.Module, Callable]] = field(repr=False)

    @property
    def found(self) -> list[str]:
        """Every module that is a triangle multiplication by its class's name."""
        return [*self.swapped, *self.left]

    def undo(self) -> None:
        """Gives the swapped modules their own forward back; a second call does nothing.

        Raises:
            RuntimeError: somebody else has replaced a module's forward since. The others have
                theirs back all the same.
        """
        covered = []
        for name, (module, forward) in self._forwards.items():
            present = vars(module).get("forward")
            if _function(present) is forward:
                del module.forward
            elif present is not None and not _is_own(module, present):
                covered.append(name)
        if covered:
            raise RuntimeError(
                "the forward of a module must be the one that patch put there, for undo; "
                f"replaced since: {', '.join(covered)}"
            )

    def __enter__(self) -> "PatchReport":
        return self

    def __exit__(self, *exception) -> None:
        self.undo()

    def __str__(self) -> str:
        head = (
            f"triangle multiplications: {len(self.found)} found, {len(self.swapped)} swapped, "
            f"{len(self.left)} left"
        )
        lines = [f"swapped {name or 'the model'} ({kind})" for name, kind in self.swapped.items()]
        lines += [f"left {name or 'the model'}: {reason}" for name, reason in self.left.items()]
        return "\n  ".join([head, *lines])


def patch(
    model: nn.Module,
    families: Iterable[str] | None = None,
    *,
    memory: str = "auto",
    recompute: str = "product",
) -> PatchReport:
    """Lets every triangle multiplication of the model that is understood run our kernels.

    The modules of OpenFold, OpenFold 3, Protenix, Boltz, and of ESMFold and ESMFold2 in
    transformers are known, by the class that defines their forward, its arguments, and their parts.
    One that only looks like them is left as it is, and the report says why. A fork that changes the
    formula under the same names can't be told apart: compare its results once.

        with patch(model) as report:
            print(report)
            model(...)

    Each swapped module keeps its parameters, state dict, hooks and the arguments of its forward,
    training included. Of these, those that choose an implementation or a chunk size choose nothing
    any more. Where OpenFold adds in place (`inplace_safe` and `_add_with_inplace`), so does ours;
    with `inplace_safe` alone ours leaves z as it is. Hooks of a module's parts no longer run, so a
    module with such hooks is left, and none may be added while it is patched.

    Under torch.autocast the pair tensor and the projections are cast to the autocast dtype, which
    the result has, as the original's. Without it their dtypes must agree, except that OpenFold's
    own linear layers take their weights in bfloat16 where z is bfloat16. In float16 our product of
    a and b is float16 too, and may overflow where OpenFold, Protenix and ESMFold under autocast
    keep it in float32: prefer bfloat16.

    Copies by copy.deepcopy are patched too. A pickled model is the original again when it is
    loaded. Patching twice changes nothing: a module is swapped once. The replicas that
    torch.nn.DataParallel makes would read the first device's weights: not for it.

    Args:
        model: searched with its submodules.
        families: names of those to swap, of "openfold", "openfold3", "protenix", "boltz" and
            "esmfold2"; None swaps all. ESMFold is of "openfold".
        memory, recompute: as for `triangle_multiplicative_update`.

    Raises:
        TypeError: a model that is no torch.nn.Module, or families that are no names.
        ValueError: a family, memory or recompute that is none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    known = [family.name for family in _FAMILIES]
    if not isinstance(families, (Iterable, type(None))):
        raise TypeError(f"families must be names or None; got {families!r}")
    chosen = known if families is None else [families] if isinstance(families, str) else [*families]
    for name in chosen:
        if name not in known:
            raise ValueError(f"families must be of {', '.join(known)}; got {name!r}")
    check_memory(memory)
    check_recompute(recompute)

    report = PatchReport({}, {}, {})
    for name, module in model.named_modules():
        kind = getattr(module, "original_name", type(module).__name__)
        if not ("Triang" in kind and "Multiplic" in kind):
            continue
        try:
            family = _recognise(module, chosen)
        except (TypeError, ValueError) as error:
            report.left[name] = str(error)
            continue
        run = functools.partial(_run, family.read, {"memory": memory, "recompute": recompute})
        forward = family.bind(run)
        forward._is_trimul_patch = True
        module.forward = forward.__get__(module)
        report.swapped[name] = family.name
        report._forwards[name] = (module, forward)
    return report


def unpatch(model: nn.Module) -> list[str]:
    """Gives every swapped module of the model its own forward back, whoever holds the report.

    The model may be a copy of the one that was patched, such as the average of its weights that EMA
    and SWA keep. Modules that were pickled while swapped run their own forward once they are
    loaded, but hold it as an attribute: they lose that, and are named too.

    Returns:
        The dotted names of the modules that were swapped.

    Raises:
        TypeError: a model that is no torch.nn.Module.
        RuntimeError: another library has wrapped the forward of a swapped module, and says so as
            functools.wraps does. The others have theirs back all the same.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    swapped, covered = [], []
    for name, module in model.named_modules():
        present = vars(module).get("forward")
        if _is_patch(present) or _is_loaded_patch(module, present):
            del module.forward
            swapped.append(name)
        elif getattr(present, "_is_trimul_patch", False):
            covered.append(name)
    if covered:
        raise RuntimeError(
            "the forward of a module must be the one that patch put there, for unpatch; "
            f"wrapped since: {', '.join(name or 'the model' for name in covered)}"
        )
    return swapped


def _is_patch(forward: Any) -> bool:
    """Whether `patch` made this forward. A wrapper has its marks too, but tells what it wraps."""
    function = _function(forward)
    return getattr(function, "_is_trimul_patch", False) and not hasattr(function, "__wrapped__")


def _is_loaded_patch(module: nn.Module, forward: Any) -> bool:
    """Whether this forward is what pickling leaves of a patch; other modules may hold their own."""
    known = any(
        kind.__name__ in family.classes for kind in type(module).__mro__ for family in _FAMILIES
    )
    return known and _is_own(module, forward)


def _openfold_forward(run: Callable) -> Callable:
    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        inplace_safe: bool = False,
        _add_with_inplace: bool = False,
        _inplace_chunk_size: int | None = 256,
    ) -> Tensor:
        return run(self, z, mask, inplace_safe and _add_with_inplace)

    return forward


def _openfold3_forward(run: Callable) -> Callable:
    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        inplace_safe: bool = False,
        use_cueq_triangle_kernels: bool = False,
        use_triton_triangle_kernels: bool = False,
        _add_with_inplace: bool = False,
        _inplace_chunk_size: int | None = 256,
    ) -> Tensor:
        # With cuEquivariance's kernels OpenFold 3 leaves the sum to the caller, whatever it asked.
        add = inplace_safe and _add_with_inplace and not use_cueq_triangle_kernels
        return run(self, z, mask, add)

    return forward


def _protenix_forward(run: Callable) -> Callable:
    def forward(
        self,
        z: Tensor,
        mask: Tensor | None = None,
        inplace_safe: bool = False,
        _add_with_inplace: bool = False,
        _inplace_chunk_size: int | None = 256,
        triangle_multiplicative: str = "torch",
    ) -> Tensor:
        return run(self, z, mask, inplace_safe and _add_with_inplace)

    return forward


def _boltz_forward(run: Callable) -> Callable:
    def forward(self, x: Tensor, mask: Tensor, use_kernels: bool = False) -> Tensor:
        return run(self, x, mask, False)

    return forward


def _esmfold2_forward(run: Callable) -> Callable:
    def forward(self, pair_grid: Tensor, visibility: Tensor | None = None) -> Tensor:
        return run(self, pair_grid, visibility, False)

    return forward


class _Family(NamedTuple):
    """Modules that are read and called alike."""

    name: str
    classes: tuple[str, ...]  # names of the classes that define the forward
    read: Callable  # the module's keyword arguments of triangle_multiplicative_update
    bind: Callable  # a forward, from what computes it


_OPENFOLD_CLASSES = ("TriangleMultiplicativeUpdate", "FusedTriangleMultiplicativeUpdate")
_FAMILIES = (
    _Family(
        "openfold",
        (*_OPENFOLD_CLASSES, "EsmFoldTriangleMultiplicativeUpdate"),
        from_openfold,
        _openfold_forward,
    ),
    _Family("openfold3", _OPENFOLD_CLASSES, from_openfold3, _openfold3_forward),
    _Family("protenix", _OPENFOLD_CLASSES, from_protenix, _protenix_forward),
    _Family(
        "boltz",
        ("TriangleMultiplicationOutgoing", "TriangleMultiplicationIncoming"),
        from_boltz,
        _boltz_forward,
    ),
    _Family(
        "esmfold2", ("EsmFold2TriangleMultiplicativeUpdate",), from_esmfold2, _esmfold2_forward
    ),
)
_BIASES = ("p_in_bias", "g_in_bias", "p_out_bias", "g_out_bias")


def _recognise(module: nn.Module, chosen: list[str]) -> _Family:
    """The family that the module is of; the error says why it must be left."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{describe(module)} is compiled by TorchScript and can't be changed")
    if "merged_linear_p" in module._modules:
        raise TypeError(
            "Chai-1's block of both directions, whose ports differ in what their forward returns; "
            "from_chai gives the arguments of its two calls"
        )
    present = vars(module).get("forward")
    if getattr(_function(present), "_is_trimul_patch", False):
        raise TypeError("patched already")
    if present is not None and not _is_own(module, present):
        raise TypeError("its forward has been replaced by another library's")
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    families = [family for family in _FAMILIES if owner.__name__ in family.classes]
    if not families:
        raise TypeError(
            f"the class that defines its forward, {owner.__module__}.{owner.__qualname__}, is of "
            "no known family"
        )
    families = [family for family in families if _takes_alike(owner.forward, family)]
    if not families:
        raise TypeError(
            f"its forward takes {inspect.signature(owner.forward)}, which no family's does"
        )
    family = families[0]
    if family.name not in chosen:
        raise ValueError(f"families leaves {family.name} out")
    changed = [
        name
        for kind in type(module).__mro__[: type(module).__mro__.index(owner)]
        for name, value in vars(kind).items()
        if callable(value) and not name.startswith("__")
    ]
    if changed:
        raise TypeError(f"its class {describe(module)} changes {', '.join(changed)}")
    for name, part in module.named_children():
        if (fault := fault_of_call(name, part)) is not None:
            raise TypeError(fault)
    family.read(module)
    return family


def _takes_alike(forward: Callable, family: _Family) -> bool:
    """Whether the family's forward takes these arguments, and maybe more after them."""
    taken, known = (
        [(one.name, one.default) for one in inspect.signature(function).parameters.values()]
        for function in (forward, family.bind(None))
    )
    return taken == known[: len(taken)]


def _is_own(module: nn.Module, forward: Callable) -> bool:
    """Whether this forward is that of the module's class, as a pickled patch leaves it."""
    return _function(forward) is type(module).forward


def _function(method: Any) -> Any:
    return getattr(method, "__func__", None)


def _run(
    read: Callable,
    settings: dict[str, str],
    module: nn.Module,
    x: Tensor,
    mask: Tensor | None,
    add: bool,
) -> Tensor:
    """The update of x; with `add`, x itself once the update has been added to it."""
    dtype = _compute_dtype(module, x)
    weights = read(module, dtype)
    if add and dtype in (None, x.dtype) and _fits_in_one_pass(x, mask, weights):
        pair = x.view(x.shape[:-3].numel(), *x.shape[-3:])
        for name in _BIASES:
            del weights[name]
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


def _fits_in_one_pass(x: Tensor, mask: Tensor | None, weights: dict[str, Any]) -> bool:
    """Whether the function that adds in place takes this call: no biases, no gradient, eager."""
    return (
        x.ndim >= 3
        and x.is_contiguous()
        and (mask is None or mask.shape == x.shape[:-1])
        and all(weights[name] is None for name in _BIASES)
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _compute_dtype(module: nn.Module, x: Tensor) -> torch.dtype | None:
    """What x and the projections are cast to; None leaves them as they are."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    linear = module._modules.get("linear_z")
    if x.dtype == torch.bfloat16 and linear is not None:
        # OpenFold's linear layers have a forward of their own, which casts to this dtype alone.
        return None if type(linear).forward is nn.Linear.forward else x.dtype
    return None
