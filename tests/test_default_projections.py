"""Projections that are None: drawn as cuEquivariance draws them, once more in each call."""

import math

import pytest
import torch
from helpers import make_problem

PROJECTIONS = ("p_in_weight", "g_in_weight", "p_out_weight", "g_out_weight")


@pytest.fixture
def drawn(submodule):
    """The weights of a call for a pair tensor with these projections given."""
    validation = submodule("validation")

    def draw(pair: torch.Tensor, **given: torch.Tensor):
        none = dict.fromkeys(validation.Weights._fields)
        return validation.default_projections(pair, validation.Weights(**{**none, **given}))

    return draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lecun_normal_cut_off_at_two_deviations(drawn, dtype):
    torch.manual_seed(0)
    channels = 128
    weights = drawn(torch.empty(1, 1, 1, channels, dtype=dtype))
    # The standard deviation of a normal distribution cut off at two of its deviations.
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    left = math.sqrt(1 - 4 * density / math.erf(math.sqrt(2)))
    for name in PROJECTIONS:
        weight = getattr(weights, name)
        assert weight.dtype == dtype
        values = weight.double() * math.sqrt(channels)
        assert values.mean().abs() < 0.03 and values.std() == pytest.approx(1, abs=0.02)
        assert 0.99 * 2 / left < values.abs().max() < 1.01 * 2 / left


def test_the_hidden_width_is_that_of_what_is_given(drawn):
    pair = torch.empty(1, 1, 1, 4)

    def shapes(**given):
        weights = drawn(pair, **given)
        return [tuple(getattr(weights, name).shape) for name in PROJECTIONS]

    assert shapes() == [(8, 4), (8, 4), (4, 4), (4, 4)]
    for given in (
        {"p_in_weight": torch.ones(6, 4)}, {"g_in_weight": torch.ones(6, 4)},
        {"p_out_weight": torch.ones(4, 3)},
    ):  # fmt: skip
        assert shapes(**given) == [(6, 4), (6, 4), (4, 3), (4, 4)]


def test_a_call_without_projections(kernel):
    """manual_seed repeats it, with and without a gradient, compiled into one graph or not."""
    x = make_problem(3, 8).x

    def call(function=kernel.triangle_multiplicative_update, x=x):
        torch.manual_seed(1)
        return function(x)

    wanted = call()
    assert wanted.isfinite().all() and torch.equal(call(), wanted)
    assert not torch.equal(kernel.triangle_multiplicative_update(x), wanted)
    torch.testing.assert_close(call(x=x.clone().requires_grad_()).detach(), wanted)
    compiled = torch.compile(
        kernel.triangle_multiplicative_update, fullgraph=True, backend="eager"
    )
    assert torch.equal(call(compiled), wanted)


def test_under_vmap_each_call_has_its_own(kernel):
    x = make_problem(3, 8).x
    both = torch.stack([x, x])
    updates = torch.vmap(kernel.triangle_multiplicative_update, randomness="different")(both)
    assert updates.isfinite().all() and not torch.equal(updates[0], updates[1])
