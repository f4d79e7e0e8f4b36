"""The gradients of the parameters from the sums over all rows: see `gradients`, `transition`."""

from typing import NamedTuple

from torch import Tensor

from .._call import Weights


class Totals(NamedTuple):
    """Sums over all pairs of the batch, in fp32."""

    emit_products: Tensor  # S [C, D]
    emit_sums: Tensor  # [C]
    in_products: Tensor  # H [4D + C, C]
    in_sums: Tensor  # [4D + C]


def parameter_gradients(
    totals: Totals, weights: Weights, stacked: Tensor, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The parameters' gradients from the sums over all pairs, in the parameters' dtypes."""
    hidden = weights.p_out_weight.shape[1]
    middle, end = 2 * hidden, 4 * hidden
    gradients = gradients_of_projections(
        weights.p_out_weight, totals.emit_products, totals.emit_sums,
        weights.norm_out_weight, weights.norm_out_bias, ("norm_out_weight", "norm_out_bias"),
        (("p_out_weight", "p_out_bias", slice(None)),), needs,
    ) | gradients_of_projections(
        stacked, totals.in_products, totals.in_sums,
        weights.norm_in_weight, weights.norm_in_bias, ("norm_in_weight", "norm_in_bias"),
        (
            ("p_in_weight", "p_in_bias", slice(0, middle)),
            ("g_in_weight", "g_in_bias", slice(middle, end)),
            ("g_out_weight", "g_out_bias", slice(end, None)),
        ), needs,
    )  # fmt: skip
    return in_their_dtypes(gradients, weights)


def gradients_of_projections(
    projection: Tensor,
    products: Tensor,
    sums: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: tuple[str, str],
    parts: tuple[tuple[str, str, slice], ...],
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """The gradients, in fp32, of projections of normalised rows, their biases, and the norm.

    Args:
        projection: [N, K], the projections one above the other.
        products, sums: of the projected rows' gradient [M, N], its product with the normalised rows
            without norm weights [N, K], and its sum over the rows [N]; in fp32.
        scale, shift: the norm's weight and bias [K], or None.
        norm: the names of the norm's weight and bias.
        parts: the name of each projection, of its bias, and its rows in `projection`.
    """
    gradients = {}
    for weight, bias, rows in parts:
        if weight in needs:
            gradient = products[rows] if scale is None else products[rows] * scale
            if shift is not None:
                gradient = gradient.addcmul(sums[rows, None], shift.float())
            gradients[weight] = gradient
        if bias in needs:
            gradients[bias] = sums[rows]
    norm_weight, norm_bias = norm
    if norm_weight in needs:
        gradients[norm_weight] = (products * projection).sum(0)
    if norm_bias in needs:
        gradients[norm_bias] = (sums[:, None] * projection).sum(0)
    return gradients


def in_their_dtypes(gradients: dict[str, Tensor], weights: tuple) -> dict[str, Tensor]:
    """The gradients in the dtypes of the parameters, each with memory of its own."""
    # Copied even if fp32: some are views of the sums.
    return {
        name: gradient.to(getattr(weights, name).dtype, copy=True)
        for name, gradient in gradients.items()
    }
