"""Norms folded into the weights behind them: the numbers, and the sum that kernels make of them."""

import math

import pytest
import torch
from helpers import relative_error, seeded

SHAPES = [(40, 24), (64, 128), (16, 256)]
BLOCK = 8  # of channels that share a factor in float16
BF16, HALF = torch.bfloat16, torch.float16


def make(count, width, which, dtype=BF16):
    generator = seeded(which)

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    weight = randn(count, width, scale=width**-0.5).to(dtype)
    return weight, 1 + randn(width, scale=0.2), randn(width, scale=0.2), randn(count, scale=0.3)


@pytest.fixture
def folded(submodule, on_triton):
    """folded(first, second): W', its further channels, and factors, on the CPU, of two `make`s."""

    def fold(*both, group=None):
        module = submodule("hopper.folded_norm")
        weights, norms, norm_biases, biases = (
            [None if t is None else t.to(on_triton) for t in two] for two in zip(*both, strict=True)
        )
        pair = module.Pair(weights, list(zip(norms, norm_biases, strict=True)), biases)
        launches = submodule("triton_parts.launch").Launches()
        found, others = module.fold_norms(launches, "test", pair, BLOCK, group)
        assert others is None
        assert found.constants is None
        return [None if tensor is None else tensor.cpu() for tensor in found[:3]]

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
    weights, further, factors = folded(first, second)
    assert factors is None
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


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_groups_of_both_halves(folded, dtype):
    """A group's channels have the bits that they have among all; its halves come together."""
    both = [make(128, 64, which, dtype) for which in range(2)]
    whole = folded(*both)
    for first, size in ((0, 16), (16, 32), (48, 16), (0, 64)):
        part = folded(*both, group=(first, size))
        for mine, of_all, step in zip(part, whole, (1, 1, BLOCK), strict=True):
            if of_all is not None:
                halves = of_all.unflatten(1, (2, 64 // step))
                wanted = halves[:, :, first // step : (first + size) // step].flatten(1, 2)
                assert torch.equal(mine, wanted)


def test_without_norms_and_biases(folded):
    weight = make(48, 32, 0)[0]
    weights, further, _ = folded((weight, None, None, None), (weight, None, None, None))
    assert torch.equal(weights[0], weight) and torch.equal(weights[1], weight)
    assert not further[:, :, 6:].any()


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6])
def test_factors_of_float16(folded, size):
    """Whatever the norm's weights are, W' has its 11 bits."""
    given = [make(32, 64, which, HALF) for which in range(2)]
    given = [(weight, norm * size, shift, bias) for weight, norm, shift, bias in given]
    for (weight, norm, shift, bias), w, f, factor in zip(given, *folded(*given), strict=True):
        exact = weight.double() * norm.double()
        largest = exact.view(-1, BLOCK, 64).abs().amax((1, 2)) / factor.double()
        assert ((largest > 2**14 - 1) & (largest < 2**15)).all()
        assert torch.equal(torch.frexp(factor)[0], torch.full_like(factor, 0.5))  # powers of two
        factor = factor.repeat_interleave(BLOCK).double()
        assert relative_error(w * factor[:, None], exact) <= 2**-12
        wanted = weight.double() @ shift.double() + bias
        constant = f[:, [6, 9, 11]].double().sum(1) * factor
        torch.testing.assert_close(constant, wanted, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinity less itself
def test_zeros_and_infinity_in_float16(folded):
    """Zeros have a factor, and infinity, which stays, takes nothing from the other channels."""
    weight, norm, *others = make(2 * BLOCK, 64, 0, HALF)
    weight[:BLOCK], weight[-1, 0] = 0.0, 0.0
    infinite = weight.clone()
    infinite[-1, 0] = math.inf
    weights, _, factors = folded((weight, norm, *others), (infinite, norm, *others))
    assert not weights[0, :BLOCK].any() and torch.equal(factors[0], factors[1])
    assert weights[1, -1, 0] == math.inf
    weights[:, -1, 0] = 0.0
    assert torch.equal(*weights)


@pytest.mark.parametrize("dtype, far", [
    (BF16, 0.0), (BF16, 30.0), (BF16, -1000.0), (HALF, 0.0), (HALF, 30.0), (HALF, -1000.0)
])  # fmt: skip
def test_the_sum_is_the_norm_and_the_projection(folded, dtype, far):
    """rstd (x W'^T + further channels), in the order that the kernels' `_pieces` has."""
    weight, norm, norm_bias, bias = make(40, 128, 2, dtype)
    weights, further, factors = folded(*[(weight, norm, norm_bias, bias)] * 2)
    x = (torch.randn(50, 128, generator=seeded(3)) * 1.5 + far).to(dtype).double()
    mean = x.mean(1)
    rstd = (x.var(1, unbiased=False) + 1e-5).rsqrt()
    m, d = pieces(mean.float()), pieces((1 / rstd).float())
    rows = torch.stack([m[0], m[1], m[2], m[0], m[1], m[0], d[0], d[1], d[2], d[0], d[1], d[0]], 1)
    bracket = x @ weights[0].double().T + rows.double() @ further[0, :, :12].double().T
    got = bracket * rstd[:, None]
    scaled = weights[0].double()
    if factors is not None:
        factor = factors[0].repeat_interleave(BLOCK).double()
        got, scaled = got * factor, scaled * factor[:, None]
    # The norm's own weight, which W' rounds to 8 or 11 bits.
    centred = (x - mean[:, None]) * rstd[:, None]
    wanted = centred @ scaled.T + weight.double() @ norm_bias.double() + bias
    limit = 2**-20 * (1 + (mean.abs() * rstd).max())
    assert (got - wanted).norm() / wanted.norm() <= limit


def make_weights(submodule, device, channels, hidden, biases, dtype=BF16):
    """(weights, those of We, Wo, Wp and Wg as `folded` takes them)."""
    emit, gate = make(channels, hidden, 0, dtype), make(channels, channels, 1, dtype)
    pair = [make(2 * hidden, channels, which, dtype) for which in (2, 3)]
    if not biases:
        emit, gate, *pair = [(*one[:2], None, None) for one in (emit, gate, *pair)]
    norm = gate[1:3]
    pair = [(one[0], *norm, one[3]) for one in pair]
    given = dict(
        norm_in_weight=norm[0], norm_in_bias=norm[1], p_in_weight=pair[0][0], p_in_bias=pair[0][3],
        g_in_weight=pair[1][0], g_in_bias=pair[1][3], norm_out_weight=emit[1],
        norm_out_bias=emit[2], p_out_weight=emit[0], p_out_bias=emit[3], g_out_weight=gate[0],
        g_out_bias=gate[3],
    )  # fmt: skip
    weights = submodule("_call").Weights(
        **{name: None if value is None else value.to(device) for name, value in given.items()}
    )
    return weights, (emit, gate, *pair)


@pytest.fixture
def folds(submodule):
    """folds(weights): `Folds` of them, and the launches that they have made."""

    def make_folds(weights):
        launches = submodule("triton_parts.launch").Launches()
        return submodule("hopper.folded_norm").Folds(launches, weights), launches

    return make_folds


def same(mine, its):
    """Of what a forward takes, and a backward too."""
    return all(
        (a is None and b is None) or torch.equal(a.cpu(), b)
        for a, b in zip(mine[:3], its, strict=True)
    )


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype, hidden, count", [(BF16, 40, 1), (HALF, 40, 2), (BF16, 32, 1)])
def test_all_that_a_forward_folds(
    submodule, on_triton, folded, folds, dtype, hidden, count, biases
):
    """The bits of a launch each; in bfloat16 with C = D by one, which later stages don't repeat."""
    weights, (emit, gate, *pair) = make_weights(submodule, on_triton, 40, hidden, biases, dtype)
    made, launches = folds(weights)
    planes = made.planes(BLOCK)
    assert same(planes, folded(*pair))
    group = made.planes(BLOCK, (16, 16))
    assert same(group, folded(*pair, group=(16, 16)))
    if hidden == 40:
        assert same(made.residual(BLOCK), folded(emit, gate))
        assert made.residual(BLOCK) is made.residual(BLOCK)
    assert made.planes(BLOCK) is planes and made.planes(BLOCK, (16, 16)) is group
    assert len(launches) == count + 1


@pytest.mark.parametrize("biases", [False, True])
def test_all_that_a_backward_folds(submodule, on_triton, folded, folds, biases):
    """The bits of a launch each, the means, and what stage 1's norm and biases add."""
    weights, (emit, gate, *pair) = make_weights(submodule, on_triton, 40, 40, biases)
    made, launches = folds(weights)
    means, residual = made.of_backward()
    assert same(residual, folded((*emit[:2], None, None), gate))
    assert same(made.planes(BLOCK), folded(*pair)) and len(launches) == 1
    for one, constants in zip(pair, made.planes(BLOCK).constants, strict=True):
        exact = one[0].double() @ one[2].double() + one[3] if biases else torch.zeros(80)
        torch.testing.assert_close(constants.cpu().double(), exact.double(), rtol=0, atol=1e-6)
    exact = emit[0].double() @ emit[1].double() / 40
    torch.testing.assert_close(means[0].cpu().double(), exact, rtol=0, atol=1e-6)
    if biases:
        exact = emit[0].double() @ emit[2].double()
        torch.testing.assert_close(means[1].cpu().double(), exact, rtol=0, atol=1e-6)
    else:
        assert means[1] is None
