"""The gradients of projections and norms, from products with rows that a norm may have scaled."""

from typing import NamedTuple

import pytest
import torch
from helpers import relative_error, seeded
from torch import Tensor


class Weights(NamedTuple):
    p_in_weight: Tensor
    p_in_bias: Tensor | None
    g_in_weight: Tensor
    g_in_bias: Tensor | None
    g_out_weight: Tensor
    g_out_bias: Tensor | None
    norm_in_weight: Tensor | None
    norm_in_bias: Tensor | None


@pytest.mark.parametrize("norm", [True, False])
def test_scaled_rows_give_what_others_do(submodule, on_triton, norm):
    """Down to weights that are 0, and below what counts as 0."""
    subject, launch = submodule("triton_path.parameter_gradients"), submodule("triton_parts.launch")
    least = submodule("triton_parts.layer_norm").LEAST_SCALE
    generator, width, count = seeded(0), 40, 300

    def rows(*shape):
        return torch.randn(shape, generator=generator)

    scale, shift = (rows(width), rows(width)) if norm else (None, None)
    away = torch.ones(width)
    if norm:
        scale[::5], scale[1::5], scale[2::5] = 0.0, -1e-30, 1e-12
        away = torch.where(scale.abs() < least, torch.tensor(least), scale)
    weights = Weights(
        rows(32, width), rows(32), rows(32, width), None, rows(24, width), rows(24), scale, shift
    )
    hats, grads = rows(count, width).double(), rows(count, 88).double()
    made, names = [], ("p_in_weight", "g_in_weight", "g_out_weight")
    needs = frozenset(name for name, value in weights._asdict().items() if value is not None)
    of_device = weights._make(None if of is None else of.to(on_triton) for of in weights)
    for scaled in (False, True):
        products = grads.t() @ (hats * away.double() if scaled else hats)
        parts = submodule("triton_path.row_products").RowParts(
            products.float()[None].to(on_triton), grads.sum(0).float()[None].to(on_triton), scaled
        )
        sums = subject.Sums(subject.Projections(names, "norm_in"), parts)
        found = subject.gradients_of_projections(launch.Launches(), [sums], of_device, needs)
        made.append({name: value.cpu() for name, value in found.items()})
    assert set(made[0]) == set(made[1]) == needs

    exact = [None if of is None else of.double().requires_grad_() for of in weights]
    exact = weights._make(exact)
    z = hats if scale is None else hats * exact.norm_in_weight + exact.norm_in_bias
    projected = torch.cat([z @ getattr(exact, name).t() for name in names], 1)
    biases = torch.cat([exact.p_in_bias, torch.zeros(32), exact.g_out_bias])
    ((projected + biases) * grads).sum().backward()
    for found in made:
        for name, value in found.items():
            assert relative_error(value, getattr(exact, name).grad) <= 1e-6, name
