"""The modules of other models that `patch` knows: how each family's are recognised and called.

A family's modules are known by the class that defines their forward, by its arguments, and by
their parts. `bind` makes the forward that takes the place of the module's own, with its arguments,
from the function that computes: `run(module, ...)`.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters import (
    from_boltz,
    from_boltz_distributed,
    from_esm,
    from_esm_distributed,
    from_esmfold2,
    from_openfold,
    from_openfold3,
    from_protenix,
    transition_from_boltz,
    transition_from_esm,
    transition_from_esmfold2,
    transition_from_openfold3,
    transition_from_protenix,
)
from .parts import describe, fault_of_call

MARK = "_is_trimul_patch"  # an attribute of the forwards that `patch` makes


class Family(NamedTuple):
    """Modules that are read and called alike."""

    name: str
    classes: tuple[str, ...]  # names of the classes that define the forward
    bind: Callable  # a forward, from what computes it
    read: Callable | None = None  # the module's keyword arguments of our function
    # A linear layer of the module. Where it has a forward of its own, that casts weights to
    # bfloat16, and to no other dtype, if x is of it.
    casting: str | None = None
    # A part that tells its modules from other families' of the same class name.
    part: str | None = None
    distributed: bool = False  # its pair tensors are DTensors, in blocks on a mesh of ranks


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


def _boltz_distributed_forward(run: Callable) -> Callable:
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return run(self, x, mask, False)

    return forward


def _esm_distributed_forward(run: Callable) -> Callable:
    def forward(self, pair: Tensor, mask: Tensor | None = None) -> Tensor:
        return run(self, pair, mask, False)

    return forward


_OPENFOLD_CLASSES = ("TriangleMultiplicativeUpdate", "FusedTriangleMultiplicativeUpdate")
TRIANGLES = (
    Family(
        "openfold", (*_OPENFOLD_CLASSES, "EsmFoldTriangleMultiplicativeUpdate"), _openfold_forward,
        from_openfold, "linear_z",
    ),
    Family("openfold3", _OPENFOLD_CLASSES, _openfold3_forward, from_openfold3, "linear_z"),
    Family("protenix", _OPENFOLD_CLASSES, _protenix_forward, from_protenix, "linear_z"),
    Family(
        "boltz", ("TriangleMultiplicationOutgoing", "TriangleMultiplicationIncoming"),
        _boltz_forward, from_boltz,
    ),
    Family(
        "esmfold2", ("EsmFold2TriangleMultiplicativeUpdate",), _esmfold2_forward, from_esmfold2
    ),
    Family("esm", ("TriangleMultiplicativeBlock",), _esmfold2_forward, from_esm),
    Family(
        "boltz", ("TriangleMultiplication",), _boltz_distributed_forward, from_boltz_distributed,
        "p_in", distributed=True,
    ),
    Family(
        "esm", ("TriangleMultiplicativeBlockDistributed",), _esm_distributed_forward,
        from_esm_distributed, distributed=True,
    ),
)  # fmt: skip


def _openfold3_transition(run: Callable) -> Callable:
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        chunk_size: int | None = None,
        ckpt_chunk_size: int | None = None,
    ) -> Tensor:
        update = run(self, x, False)
        if ckpt_chunk_size is not None:  # its chunks are put together in the dtype of x
            return (update if mask is None else update * mask.unsqueeze(-1)).to(x.dtype)
        if mask is None:  # a mask of ones in the dtype of x
            return update.to(torch.promote_types(update.dtype, x.dtype))
        return update * mask.unsqueeze(-1)

    return forward


def _protenix_transition(run: Callable) -> Callable:
    def forward(self, x: Tensor) -> Tensor:
        update = run(self, x, False)
        return update if self.training else update.to(x.dtype)

    return forward


def _boltz_transition(run: Callable) -> Callable:
    def forward(self, x: Tensor, chunk_size: int | None = None) -> Tensor:
        return run(self, x, False)

    return forward


def _esmfold2_transition(run: Callable) -> Callable:
    def forward(self, hidden_states: Tensor) -> Tensor:
        return run(self, hidden_states, True)

    return forward


def _esm_transition(run: Callable) -> Callable:
    def forward(self, x: Tensor) -> Tensor:
        return run(self, x, True)

    return forward


def _esm_update(run: Callable) -> Callable:
    def forward(self, x: Tensor) -> Tensor:
        return run(self, x, False)

    return forward


TRANSITIONS = (
    Family("esm", ("Transition",), _esm_transition, transition_from_esm, part="ffn"),
    Family(
        "esm", ("PairTransition", "_TransitionFFN"), _esm_update, transition_from_esm, part="ffn",
    ),
    Family("esm", ("TransitionLayer",), _esm_update, transition_from_esm, part="a_proj"),
    Family(
        "openfold3", ("SwiGLUTransition",), _openfold3_transition, transition_from_openfold3,
        "linear_out",
    ),
    # Ahead of Boltz's, whose forward begins with the same argument.
    Family("protenix", ("Transition",), _protenix_transition, transition_from_protenix),
    Family("boltz", ("Transition",), _boltz_transition, transition_from_boltz),
    Family("esmfold2", ("EsmFold2Transition",), _esmfold2_transition, transition_from_esmfold2),
)  # fmt: skip


def recognise(module: nn.Module, families: tuple[Family, ...], chosen: list[str]) -> Family:
    """The family whose class and forward the module has.

    Raises:
        TypeError, ValueError: the module must be left, for the reason that the error says.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{describe(module)} is compiled by TorchScript and can't be changed")
    if "merged_linear_p" in module._modules:
        raise TypeError(
            "Chai-1's block of both directions, whose ports differ in what their forward returns; "
            "from_chai gives the arguments of its two calls"
        )
    present = vars(module).get("forward")
    if getattr(function_of(present), MARK, False):
        raise TypeError("patched already")
    if present is not None and not is_own(module, present):
        raise TypeError("its forward has been replaced by another library's")
    # OpenFold 3's transitions share a forward, which calls the formula in `_transition`.
    order = type(module).__mro__
    owner = next(kind for kind in order if vars(kind).keys() & {"forward", "_transition"})
    families = tuple(
        family
        for family in families
        if owner.__name__ in family.classes
        and (family.part is None or family.part in module._modules)
    )
    if not families:
        if any(isinstance(part, nn.ReLU) for part in module.modules()):
            raise TypeError("AlphaFold 2's transition, with a ReLU; the kernel's is a SwiGLU")
        raise TypeError(
            f"the class that defines its forward, {owner.__module__}.{owner.__qualname__}, is of "
            "no known family"
        )
    families = tuple(family for family in families if _takes_alike(owner.forward, family))
    if not families:
        raise TypeError(
            f"its forward takes {inspect.signature(owner.forward)}, which no family's does"
        )
    family = families[0]
    if family.name not in chosen:
        raise ValueError(f"families leaves {family.name} out")
    changed = [
        name
        for kind in order[: order.index(owner)]
        for name, value in vars(kind).items()
        if callable(value) and not name.startswith("__")
    ]
    if changed:
        raise TypeError(f"its class {describe(module)} changes {', '.join(changed)}")
    return family


def is_wrapper(module: nn.Module) -> bool:
    """Whether it is a module of esm's that only calls the triangle multiplication inside it."""
    return type(module).__name__ == "TriangleMultiplicativeUpdate" and [*module._modules] == [
        "_engine"
    ]


def check_parts(module: nn.Module, family: Family) -> None:
    """Raises if the module's weights don't say what it computes."""
    for name, part in module.named_modules():
        if part is not module and (fault := fault_of_call(name, part)) is not None:
            raise TypeError(fault)
    family.read(module)


def _takes_alike(forward: Callable, family: Family) -> bool:
    """Whether the family's forward takes these arguments, and maybe more after them."""
    taken, known = (
        [(one.name, one.default) for one in inspect.signature(function).parameters.values()]
        for function in (forward, family.bind(None))
    )
    return taken == known[: len(taken)]


def is_patch(forward: Any) -> bool:
    """Whether `patch` made this forward. A wrapper has its mark too, but tells what it wraps."""
    function = function_of(forward)
    return getattr(function, MARK, False) and not hasattr(function, "__wrapped__")


def is_own(module: nn.Module, forward: Any) -> bool:
    """Whether this forward is that of the module's class, as a pickled patch leaves it."""
    return function_of(forward) is type(module).forward


def function_of(method: Any) -> Any:
    return getattr(method, "__func__", None)
