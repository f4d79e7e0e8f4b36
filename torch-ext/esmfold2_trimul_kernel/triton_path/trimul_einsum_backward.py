"""Stage 2's backward: da and db from dt, a and b, by stage 2's kernel, or both in one launch.

    outgoing                             da[i, k] = sum_j dt[i, j] b[j, k]
                                         db[j, k] = sum_i dt[i, j] a[i, k]
    incoming, with the axes of x         da[k, i] = sum_j b[k, j] dt[i, j]
                                         db[k, j] = sum_i a[k, i] dt[i, j]

Where stage 1 has exchanged the residue axes of a and b, incoming's are outgoing's, transposed.
"""

from typing import NamedTuple

from torch import Tensor

from .. import hopper
from .._call import Call
from ..trimul_einsum_triton import trimul_einsum_fwd
from ..triton_parts.launch import Launches, setting_of
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.split_operands import PlaneScales

_OF_TWO = slice(1, 3), slice(0, 2)  # of the exponents of a, dt and b those that give da and db


class _Operands(NamedTuple):
    """How both products take theirs."""

    grad_first: bool  # dt is the left operand, b or a the right one; or the other way round
    turned_a: tuple[bool, bool]  # whether left and right are transposed, for da
    turned_b: tuple[bool, bool]

    @classmethod
    def of(cls, call: Call, with_axes_of_x: bool) -> "_Operands":
        if call.direction == "outgoing":
            return cls(True, (False, True), (True, True))
        if with_axes_of_x:
            return cls(False, (False, False), (False, True))
        return cls(False, (True, False), (True, True))

    def ordered(self, of_grad: object, of_other: object) -> tuple:
        """What is of the left operand, and of the right one."""
        return (of_grad, of_other) if self.grad_first else (of_other, of_grad)


def multiply_gradients(
    call: Call,
    launches: Launches,
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    key: int,
    with_axes_of_x: bool = False,
    scales: PlaneScales | None = None,
) -> None:
    """da and then db from dt, a and b; all are [G, L, pitch].

    grad_b may be b. For "incoming" all but dt have the axes of x, or those that stage 1 gives a and
    b. `key` identifies the launches among those of a call. With `scales`, whose exponents are of a,
    dt and b, these are split numbers.
    """
    operands = _Operands.of(call, with_axes_of_x)
    of_a = of_b = None
    if scales is not None:
        scales = scales._replace(masked="left" if operands.grad_first else "right")
        of_a, of_b = (scales._replace(exponents=scales.exponents[two]) for two in _OF_TWO)
    for other, out, turned, of_both in (
        (b, grad_a, operands.turned_a, of_a), (a, grad_b, operands.turned_b, of_b)
    ):  # fmt: skip
        left, right = operands.ordered(grad[None], other[None])
        out = out[None]
        trimul_einsum_fwd(call, launches, left, right, out, (key, turned), turned, scales=of_both)


def multiply_both(
    call: Call,
    launches: Launches,
    grad: Tensor,
    planes: Tensor,
    grad_planes: Tensor,
    key: int,
    with_axes_of_x: bool,
    scales: PlaneScales | None = None,
) -> None:
    """`multiply_gradients` of planes [2, G, L, pitch], in one launch where a variant has that.

    grad_planes are alike, and their memory is none of the others'.
    """
    config = launches.setting("both products", _setting_of_both, call, grad, planes, grad_planes)
    if config is None:
        a, b, grad_a, grad_b = *planes, *grad_planes
        multiply_gradients(
            call, launches, grad, a, b, grad_a, grad_b, key, with_axes_of_x, scales
        )
        return
    variant, operands = hopper.kernels("plane_products"), _Operands.of(call, with_axes_of_x)
    left, right = operands.ordered(grad[None], planes)
    of = operands.ordered(variant.ONLY, variant.OTHER)
    turned = operands.turned_a + operands.turned_b
    prepared = launches.of(
        ("both products", key), variant.prepare, left, right, grad_planes, config, of, turned
    )
    variant.launch(prepared, left, right, grad_planes)


def _setting_of_both(
    call: Call, grad: Tensor, planes: Tensor, grad_planes: Tensor
) -> LaunchConfig | None:
    """The setting of both products in one launch, if there is one."""
    others = planes, grad_planes
    if not hopper.variants("plane_products", "takes", grad, True, call.lengths, *others):
        return None
    width, length = min(call.hidden, grad.shape[0]), grad.shape[1]
    config = setting_of("trimul_einsum", grad, width, length, variants=frozenset({"both"}))
    return config if config.kernel == "both" else None
