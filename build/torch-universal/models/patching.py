"""`patch`: our functions in the place of every module of a model that is understood."""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..sharded import checked_group, sharded_pairs
from ..validation import check_memory, check_parameter_grads, check_recompute
from .calls import transition, triangle
from .families import (
    MARK,
    TRANSITIONS,
    TRIANGLES,
    Family,
    check_parts,
    function_of,
    is_own,
    is_patch,
    is_wrapper,
    recognise,
)
from .pair_layers import PAIR_LAYERS, check_layer, pair_layer, passes_over_triangles


class _Part(NamedTuple):
    """A kind of modules, and what computes them."""

    title: str
    is_named: Callable  # whether a class of this name is of the kind
    families: tuple[Family, ...]
    check: Callable  # raises if a module can't be swapped
    run: Callable


# In the order of the work: a layer's triangles and transition are swapped before it is.
_PARTS = {
    "triangle": _Part(
        "triangle multiplications", lambda kind: "Triang" in kind and "Multiplic" in kind,
        TRIANGLES, check_parts, triangle,
    ),
    "transition": _Part(
        "transitions", lambda kind: kind.endswith(("Transition", "TransitionBlock"))
        or any(kind in family.classes for family in TRANSITIONS), TRANSITIONS,
        check_parts, transition,
    ),
    "residual": _Part(
        "pair layers",
        lambda kind: any(kind in family.classes for family in PAIR_LAYERS), PAIR_LAYERS,
        check_layer, pair_layer,
    ),
}  # fmt: skip


_PASSES_OVER = (
    "its backend runs kernels of its own in place of its swapped triangles, on a GPU in bfloat16; "
    "set_kernel_backend(None) lets ours run"
)


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did, by the modules' dotted names. Prints as a list; `undo` takes it back.

    As a context manager it takes the patch back at the end of the block. Copies of the model that
    were made meanwhile stay patched: `unpatch` is for them.
    """

    swapped: dict[str, str]  # name: family
    left: dict[str, str]  # name: the reason
    parts: dict[str, str]  # name: "triangle", "transition" or "residual", of both
    _forwards: dict[str, tuple[nn.Module, Callable]] = field(repr=False)

    @property
    def found(self) -> list[str]:
        """Every module that is of one of the parts by its class's name."""
        return [*self.parts]

    def undo(self) -> None:
        """Gives the swapped modules their own forward back; a second call does nothing.

        Raises:
            RuntimeError: somebody else has replaced a module's forward since. The others have
                theirs back all the same.
        """
        covered = []
        for name, (module, forward) in self._forwards.items():
            present = vars(module).get("forward")
            if function_of(present) is forward:
                del module.forward
            elif present is not None and not is_own(module, present):
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
        lines = []
        for part, (title, *_) in _PARTS.items():
            found = [name for name, of in self.parts.items() if of == part]
            swapped = [name for name in found if name in self.swapped]
            left = [name for name in found if name in self.left]
            if found:
                lines.append(
                    f"{title}: {len(found)} found, {len(swapped)} swapped, {len(left)} left"
                )
            lines += [
                f"  swapped {name or 'the model'} ({self.swapped[name]})" for name in swapped
            ]
            lines += [f"  left {name or 'the model'}: {self.left[name]}" for name in left]
        return "\n".join(lines) or "nothing found"


def patch(
    model: nn.Module,
    families: Iterable[str] | None = None,
    *,
    parts: Iterable[str] = ("triangle", "residual", "transition"),
    memory: str = "auto",
    recompute: str = "none",
    mesh: Any = None,
    parameter_grads: str = "local",
) -> PatchReport:
    """Lets the triangle multiplications and transitions that are understood run our kernels.

    The modules of OpenFold, OpenFold 3, Protenix, Boltz, of ESMFold and ESMFold2 in transformers,
    and of biohub's esm are known, by the class that defines their forward, its arguments, and their
    parts. One that only looks like them is left as it is, and the report says why. A fork that
    changes the formula under the same names can't be told apart: compare its results once.

        with patch(model) as report:
            print(report)
            model(...)

    The parts of a model that can be swapped:

    - "triangle": every triangle multiplication. Where OpenFold adds in place (`inplace_safe` and
      `_add_with_inplace`), so does ours; with `inplace_safe` alone ours leaves z as it is.
    - "transition": every transition with a SwiGLU, of OpenFold 3, Protenix, Boltz, ESMFold2 and
      esm, also of single and MSA representations and of diffusion heads. ESMFold2's adds its
      residual, and so does ours. AlphaFold 2's, with a ReLU, is left.
    - "residual": ESMFold2's `EsmFold2PairUpdateLayer` and esm's `PairUpdateBlock` as a whole, and
      the pair half of `EsmFold2MSAEncoderLayer`: each swapped module's residual is added by its
      last kernel, in float32, and without a gradient all but the first write over their input,
      which is the layer's own tensor. The triangles must be swapped. While one has a hook, the
      layer's own code runs and calls its modules; so does an MSA layer's under torch.compile.
      Layers of the other families keep their own code, which orders dropout, residuals and
      attention.

    A swapped module of esm runs our kernel whatever `set_kernel_backend` chooses, before the patch
    or after it. A `PairUpdateBlock` that is not swapped itself runs esm's kernels in place of its
    swapped triangles with the backend "fused" or "fast"; the report names it if one is chosen.

    The triangle multiplications of Fold-CP's Boltz ("boltz") and of esm's port of it ("esm") hold
    DTensors in blocks, of placements (Shard(0), Shard(1), Shard(2)). Without a gradient ours runs
    on them (see docs/distributed.md); any other call runs the module's own forward, which is logged
    once for each reason.

    Each swapped module keeps its parameters, state dict, hooks and the arguments of its forward,
    training included. Of these, those that choose an implementation or a chunk size choose nothing
    any more, nor does the attribute `chunk_size`: results don't depend on it. Hooks of a module's
    parts no longer run, so a module with such hooks is left, and none may be added while it is
    patched.

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
        families: names of those to swap, of "openfold", "openfold3", "protenix", "boltz",
            "esmfold2" and "esm"; None swaps all. ESMFold is of "openfold".
        parts: names of those to swap, as above. What is not among them is not in the report.
        memory, recompute: of the triangles, as for `triangle_multiplicative_update`.
        mesh: a DeviceMesh of one dimension, or a process group, whose ranks have the rows of the
            pair tensors, as in `sharded_pairs`: every swapped triangle and pair layer runs in that
            context. None for whole pair tensors.
        parameter_grads: with a mesh, as for `sharded_pairs`.

    Raises:
        TypeError: a model that is no torch.nn.Module, families or parts that are no names, or a
            mesh that is none.
        ValueError: a family, part, memory, recompute or parameter_grads that is none; a mesh, and a
            triangle multiplication that is not swapped.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    known = list(dict.fromkeys(family.name for family in TRIANGLES))
    chosen = known if families is None else _names("families", families, known, " or None")
    wanted = _names("parts", parts, ["triangle", "residual", "transition"])
    check_memory(memory)
    check_recompute(recompute)
    check_parameter_grads(parameter_grads)
    if mesh is not None:
        mesh = checked_group("mesh", mesh)
        if "triangle" not in wanted:
            raise ValueError(f"parts must have 'triangle' where there is a mesh; got {wanted}")

    report = PatchReport({}, {}, {}, {})
    settings = {"memory": memory, "recompute": recompute}
    for part_name, part in _PARTS.items():
        if part_name not in wanted:
            continue
        for name, module in model.named_modules():
            kind = getattr(module, "original_name", type(module).__name__)
            if not part.is_named(kind) or is_wrapper(module):
                continue
            report.parts[name] = part_name
            try:
                family = recognise(module, part.families, chosen)
                part.check(module, family)
            except (TypeError, ValueError) as error:
                report.left[name] = str(error)
                continue
            run = functools.partial(part.run, family, settings)
            if mesh is not None and part_name != "transition":  # whose pairs are each alone
                run = functools.partial(_run_on_rows, run, mesh, parameter_grads)
            forward = family.bind(run)
            setattr(forward, MARK, True)
            module.forward = forward.__get__(module)
            report.swapped[name] = family.name
            report._forwards[name] = (module, forward)
    for name, module in model.named_modules():
        if passes_over_triangles(module):
            report.parts[name] = "residual"
            reasons = [report.left.get(name), _PASSES_OVER]
            report.left[name] = "; ".join(filter(None, reasons))
    whole = [name for name, of in report.parts.items() if of == "triangle" and name in report.left]
    if mesh is not None and whole:
        report.undo()
        raise ValueError(
            "with a mesh every triangle multiplication of the model must be swapped, as its own "
            "would take a rank's rows for a whole pair tensor; left: "
            + "; ".join(f"{name} ({report.left[name]})" for name in whole)
        )
    return report


def _run_on_rows(
    run: Callable, mesh: Any, parameter_grads: str, module: nn.Module, *arguments: Any
) -> Tensor:
    """The output of a swapped module whose first tensor is a rank's rows [..., R, L, C]."""
    pair = next(value for value in arguments if isinstance(value, Tensor))
    with sharded_pairs(mesh, length=pair.shape[-2], parameter_grads=parameter_grads):
        return run(module, *arguments)


def _names(what: str, given: Iterable[str], known: list[str], none: str = "") -> list[str]:
    """The names given, which must be known ones; a single one may be given as it is."""
    if not isinstance(given, Iterable):
        raise TypeError(f"{what} must be names{none}; got {given!r}")
    names = [given] if isinstance(given, str) else [*given]
    for name in names:
        if name not in known:
            raise ValueError(f"{what} must be of {', '.join(known)}; got {name!r}")
    return names


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
        if is_patch(present) or _is_loaded_patch(module, present):
            del module.forward
            swapped.append(name)
        elif getattr(present, MARK, False):
            covered.append(name)
    if covered:
        raise RuntimeError(
            "the forward of a module must be the one that patch put there, for unpatch; "
            f"wrapped since: {', '.join(name or 'the model' for name in covered)}"
        )
    return swapped


def _is_loaded_patch(module: nn.Module, forward: Callable | None) -> bool:
    """Whether this forward is what pickling leaves of a patch; other modules may hold their own."""
    known = any(
        kind.__name__ in family.classes
        for kind in type(module).__mro__
        for part in _PARTS.values()
        for family in part.families
    )
    return known and is_own(module, forward)
