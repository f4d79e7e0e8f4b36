"""The transition beside the triangles: its public function, and its arguments as a `Transition`."""

import enum

import torch
from torch import Tensor

from . import transition_operators
from ._call import Transition, TransitionWeights
from .validation import (
    broadcast_lengths,
    check_eps,
    check_inplace,
    check_residual,
    check_rows,
    check_transition_weights,
    resolve_precision,
)


def swiglu_transition(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    precision: str | int | enum.Enum | None = None,
    inplace: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """`residual + (silu(z Wg^T + bg) * (z Wu^T + bu)) Wd^T + bd` with z = LayerNorm(x).

    The transition of AlphaFold 2 (Supplementary Methods 1.6.7, Algorithm 15) with the gated unit of
    AlphaFold 3 (Supplementary Methods, Algorithm 11) in place of the ReLU, and H = n C hidden
    channels.

    Args:
        x: [..., C] with any number of leading dimensions, bfloat16, float16 or float32; any strides
            (it is copied if its leading dimensions can't be merged into three).
        norm_weight, norm_bias: [C], any of the three dtypes; None means ones and zeros.
        gate_weight, up_weight: [H, C] in the dtype of x. Halves of one matrix are taken as views.
        down_weight: [C, H] in the dtype of x.
        gate_bias, up_bias, down_bias: [H], [H] and [C], any of the three dtypes, or None.
        residual: like x; may be x itself. None gives the update alone.
        eps: added to the variance by the LayerNorm.
        precision: as for `triangle_multiplicative_update_with_residual`. With "fp16x3" transitions
            take 0.3 to 0.4 of the time of "TF32x3"; it has C up to 256 and H up to 2,048, both
            multiples of 16.
        inplace: write the result over residual and return residual, which must be contiguous, and
            be x itself or share no memory with another argument. Not where a gradient is needed.
        lengths: as for `triangle_multiplicative_update`; then x must be [..., L, L, C]. A pair with
            a padded residue has no update: its output is the residual, or 0.

    An enclosing torch.autocast changes nothing: the dtype of x decides. The hidden channels are
    made for some rows at a time. For a backward nothing is kept but the arguments.

    Returns:
        [..., C] in the dtype of x, contiguous.

    Raises:
        ValueError: a shape, device, eps, precision or inplace that doesn't fit.
        TypeError: an argument that is no tensor, or of a dtype that doesn't fit.
        NotImplementedError: lengths with L above 46,336.
    """
    weights = TransitionWeights(
        norm_weight, norm_bias, gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias
    )
    call = transition_call(x, weights, residual, eps, precision, inplace, lengths)
    out = transition_operators.run(call)
    return residual if inplace else out.view(x.shape)


def transition_call(
    x: Tensor,
    weights: TransitionWeights,
    residual: Tensor | None,
    eps: float,
    precision: str | int | enum.Enum | None,
    inplace: bool,
    lengths: Tensor | None,
) -> Transition:
    """The arguments of `swiglu_transition`, checked."""
    check_rows(x, lengths is not None)
    check_transition_weights(x, weights)
    check_residual(residual, "x", x)
    check_eps("eps", eps)
    if inplace is not False:
        others = {"lengths": lengths, **weights._asdict()}
        check_inplace(inplace, "x", x, residual, others)
    rows = _four_axes(x)
    if residual is not None:
        residual = rows if residual is x else _four_axes(residual)
    return Transition(
        x=rows,
        residual=residual,
        weights=weights,
        eps=eps,
        precision=resolve_precision(precision, "x", x),
        inplace=inplace,
        lengths=broadcast_lengths(lengths, "x", x),
    )


def _four_axes(x: Tensor) -> Tensor:
    """x [..., C] as [B, I, J, C]: the leading axes before the last two are merged."""
    if x.ndim == 4:
        return x
    leading = x.shape[:-1]
    shape = (1,) * (3 - len(leading)) + tuple(leading)
    return x.reshape(torch.Size(shape[:-2]).numel(), *shape[-2:], x.shape[-1])
