"""The gradients of the parameters from the sums over all pairs: see `gradients`."""

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
    gradients = {}
    for projection, products, sums, norm_weight, norm_bias, parts in (
        (
            weights.p_out_weight, totals.emit_products, totals.emit_sums,
            "norm_out_weight", "norm_out_bias",
            (("p_out_weight", "p_out_bias", slice(None)),),
        ),
        (
            stacked, totals.in_products, totals.in_sums,
            "norm_in_weight", "norm_in_bias",
            (
                ("p_in_weight", "p_in_bias", slice(0, middle)),
                ("g_in_weight", "g_in_bias", slice(middle, end)),
                ("g_out_weight", "g_out_bias", slice(end, None)),
            ),
        ),
    ):  # fmt: skip
        scale, shift = getattr(weights, norm_weight), getattr(weights, norm_bias)
        for weight, bias, rows in parts:
            if weight in needs:
                gradient = products[rows] if scale is None else products[rows] * scale
                if shift is not None:
                    gradient = gradient.addcmul(sums[rows, None], shift.float())
                gradients[weight] = gradient
            if bias in needs:
                gradients[bias] = sums[rows]
        if norm_weight in needs:
            gradients[norm_weight] = (products * projection).sum(0)
        if norm_bias in needs:
            gradients[norm_bias] = (sums[:, None] * projection).sum(0)
    # Copied even if fp32: some are views of the sums.
    return {
        name: gradient.to(getattr(weights, name).dtype, copy=True)
        for name, gradient in gradients.items()
    }
