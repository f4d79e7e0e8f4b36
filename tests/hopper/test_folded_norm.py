"""Norms folded into the weights behind them: the numbers, and the sum that kernels make of them."""

import pytest
import torch
from helpers import seeded

SHAPES = [(40, 24), (64, 128), (16, 256)]


def make(count, width, which):
    generator = seeded(which)

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    weight = randn(count, width, scale=width**-0.5).bfloat16()
    return weight, 1 + randn(width, scale=0.2), randn(width, scale=0.2), randn(count, scale=0.3)


@pytest.fixture
def folded(submodule, on_triton):
    """folded(first, second): W' and the further channels, on the CPU, of two `make`s."""

    def fold(*both):
        launches = submodule("triton_parts.launch").Launches()
        weights, norms, norm_biases, biases = (
            [None if t is None else t.to(on_triton) for t in group]
            for group in zip(*both, strict=True)
        )
        found = submodule("hopper.folded_norm").fold_norms(
            launches, "test", weights, list(zip(norms, norm_biases, strict=True)), biases
        )
        return [tensor.cpu() for tensor in found]

    return fold


def pieces(value):
    """Three pieces of bfloat16 of fp32 values, and what is left."""
    first = value.bfloat16().float()
    second = (value - first).bfloat16().float()
    third = (value - first - second).bfloat16().float()
    return first, second, third


@pytest.mark.parametrize("count, width", SHAPES)
def test_folded_weights(folded, count, width):
    first, second = make(count, width, 0), make(count, width, 1)
    weights, further = folded(first, second)
    for given, w, f in zip((first, second), weights, further, strict=True):
        weight, norm, norm_bias, bias = given
        wanted = (weight.float() * norm).bfloat16()
        assert torch.equal(w, wanted)
        sums = -wanted.float().sum(1)
        constants = (weight.float() * norm_bias).sum(1) + bias
        for values, columns in ((sums, f[:, :6]), (constants, f[:, 6:12])):
            s1, s2, s3 = columns[:, 0].double(), columns[:, 3].double(), columns[:, 5].double()
            assert torch.equal(columns[:, 1], columns[:, 0])
            assert torch.equal(columns[:, 2], columns[:, 0])
            assert torch.equal(columns[:, 4], columns[:, 3])
            # Sums in fp32 in another order; the pieces themselves lose nothing beyond 24 bits.
            torch.testing.assert_close(s1 + s2 + s3, values.double(), rtol=0, atol=1e-6)
        assert not f[:, 12:].any()


def test_without_norms_and_biases(folded):
    weight = make(48, 32, 0)[0]
    weights, further = folded((weight, None, None, None), (weight, None, None, None))
    assert torch.equal(weights[0], weight) and torch.equal(weights[1], weight)
    assert not further[:, :, 6:].any()


@pytest.mark.parametrize("far", [0.0, 30.0, -1000.0])
def test_the_sum_is_the_norm_and_the_projection(folded, far):
    """rstd (x W'^T + further channels), in the order that the kernels' `_pieces` has."""
    weight, norm, norm_bias, bias = make(40, 128, 2)
    weights, further = folded((weight, norm, norm_bias, bias), (weight, norm, norm_bias, bias))
    x = (torch.randn(50, 128, generator=seeded(3)) * 1.5 + far).bfloat16().double()
    mean = x.mean(1)
    rstd = (x.var(1, unbiased=False) + 1e-5).rsqrt()
    m, d = pieces(mean.float()), pieces((1 / rstd).float())
    rows = torch.stack([m[0], m[1], m[2], m[0], m[1], m[0], d[0], d[1], d[2], d[0], d[1], d[0]], 1)
    bracket = x @ weights[0].double().T + rows.double() @ further[0, :, :12].double().T
    got = bracket * rstd[:, None]
    # The norm's own weight, which W' rounds to 8 bits.
    centred = (x - mean[:, None]) * rstd[:, None]
    wanted = centred @ weights[0].double().T + weight.double() @ norm_bias.double() + bias
    limit = 2**-20 * (1 + (mean.abs() * rstd).max())
    assert (got - wanted).norm() / wanted.norm() <= limit
