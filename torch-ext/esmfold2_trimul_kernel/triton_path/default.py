"""The default mode: a, b and the product in memory of their own, one launch a stage."""

from torch import Tensor

from .._call import Call
from ..triton_parts.launch import Launches
from ..triton_parts.tiles import padded_pitch
from .stages import dual_gemm, einsum, ln_residual, with_axes_of_x


def run_default(call: Call, launches: Launches) -> tuple[Tensor, Tensor, Tensor]:
    """The output, with what a backward can take up again: (out, product, moments).

    The product [B, D, L, pitch] in the dtype of x and the moments [B, 2, L, pitch] of x in fp32 are
    as stages 2 and 1 wrote them.
    """
    x = call.x
    product, moments = _product(call, launches)
    out = call.residual if call.inplace else launches.empty("output", x.shape, x.dtype, x.device)
    ln_residual(call, launches, product, with_axes_of_x(moments, call.direction), out)
    return out, product, moments


def _product(call: Call, launches: Launches) -> tuple[Tensor, Tensor]:
    """Stages 1 and 2: the product [B, D, L, pitch], and stage 1's moments.

    a and b are freed on return, before the output is allocated: the peak is a, b and the product.
    """
    x, hidden = call.x, call.hidden
    batch, length = x.shape[:2]
    shape = (batch, hidden, length, padded_pitch(length))
    planes = launches.empty("a and b", (batch, 2, *shape[1:]), x.dtype, x.device)
    a, b = planes.unbind(1)
    moments = dual_gemm(call, launches, (a, b))
    product = launches.empty("product", shape, x.dtype, x.device)
    einsum(call, launches, a, b, product)
    return product, moments
