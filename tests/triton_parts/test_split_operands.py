"""precision="fp16x3", float32 whose dots take split operands: against float64, beside "IEEE".

On a GPU whose target has no settings for it, all of this is skipped.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    as_call,
    make_problem,
    reference,
    reference_gradients,
    relative_error,
    room,
)
from test_fused_dual_gemm import planes_in_float64, planes_like


@pytest.fixture
def on_split(on_triton, submodule):
    device = submodule("triton_parts.device").device_target(torch.device(on_triton))
    if "split" not in submodule("triton_parts.settings").settings_of(*device[:2])["trimul_einsum"]:
        pytest.skip(f"{device.target} splits no operands")
    return on_triton


@pytest.fixture
def planes_and_product(on_split, submodule):
    """run(problem): a and b [B, 2D, Q, L] and t [B, D, L, L] in float64, of split numbers."""

    def run(problem, configs=(None, None)):
        p = problem.to(on_split)
        split = submodule("triton_parts.split_operands")
        launches = submodule("triton_parts.launch").Launches()
        call = as_call(submodule("_call"), p, precision=split.FP16X3)
        call, scales = split.split_weights(call, launches)
        a, b = planes = planes_like(submodule, p.x, p.direction, call.hidden)
        product = torch.empty_like(a)
        submodule("fused_dual_gemm").fused_dual_gemm_fwd(
            call, launches, planes, config=configs[0], scales=scales
        )
        exponents = split.exponents_of(scales, call.hidden, slice(None))
        submodule("trimul_einsum_triton").trimul_einsum_fwd(
            call, launches, a, b, product, config=configs[1], exponents=exponents
        )
        length, numbers = p.x.shape[1], torch.cat(planes, 1).view(torch.float16).double().cpu()
        high, low = numbers.unflatten(-1, (2, -1)).unbind(-2)
        assert high[..., length:].count_nonzero() == 0 and low[..., length:].count_nonzero() == 0
        assert high.abs().max() < 2**15
        planes = (high + low / 2**11) * 2 ** -exponents.cpu().double().reshape(1, -1, 1, 1)
        return planes[..., :length], product[..., :length].double().cpu()

    return run


def assert_as_exact(got, problem):
    """Both stages are within the budget of one in float32."""
    planes, product = got
    wanted = planes_in_float64(problem)
    a, b = wanted.chunk(2, 1)
    for found, one in ((planes, wanted), (product, a @ b.transpose(-1, -2))):
        error = relative_error(found, one)
        assert error <= 1e-6, f"relative error {error:.2e}"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("below", [0, 10, 14, 18])
def test_planes_far_below_their_bound(planes_and_product, below):
    """Gates of 2^-below; other channels' are open."""
    problem = make_problem(37, 48, 32, mask="bool", biases=True)
    problem.biases["g_in_bias"][::2] -= below * 0.6931
    problem.biases["g_in_bias"][1::2] += below
    planes, product = planes_and_product(problem)
    assert_as_exact((planes, product), problem)
    # Channel by channel too, for the small ones.
    wanted = planes_in_float64(problem)[:, ::2]
    assert relative_error(planes[:, ::2], wanted) <= 1e-6
    a, b = wanted.chunk(2, 1)
    assert relative_error(product[:, ::2], a @ b.transpose(-1, -2)) <= 1e-6


def test_a_plane_at_its_bound(planes_and_product):
    """|x^ W'^T| <= sqrt(C) |W'|, and rows of x that are rows of W come to it, with open gates."""
    problem = make_problem(16, 64, 16)
    w = problem.weights
    w["norm_in_weight"], w["norm_in_bias"] = torch.ones(64), torch.zeros(64)
    rows = w["p_in_weight"] = w["p_in_weight"] - w["p_in_weight"].mean(1, keepdim=True)
    problem.x[0, :, :, :] = rows[:16] * torch.tensor([-1.0, 1.0]).repeat(8)[:, None]
    w["g_in_weight"] = torch.zeros(32, 64)
    problem.biases = {"g_in_bias": torch.full((32,), 90.0)}
    got = planes_and_product(problem)
    assert got[0].abs().amax() > 0.999 * 8 * rows[:16].norm(dim=1).amax()
    assert_as_exact(got, problem)


@pytest.mark.parametrize("exponent", [-100, -40, 40])
def test_weights_of_any_size(planes_and_product, exponent):
    """a is 2^exponent times as large and b 2^-exponent times, up to what float32 holds."""
    problem = make_problem(9, 16, mask="bool", direction="incoming")
    problem.weights["p_in_weight"][:16] *= 2.0**exponent
    problem.weights["p_in_weight"][16:] *= 2.0**-exponent
    planes, product = planes_and_product(problem)
    wanted = planes_in_float64(problem)
    for half in (slice(16), slice(16, 32)):
        assert relative_error(planes[:, half], wanted[:, half]) <= 1e-6
    a, b = wanted.chunk(2, 1)
    assert relative_error(product, a @ b.transpose(-1, -2)) <= 1e-6


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("channels, hidden", [(16, 16), (48, 80), (192, 16)])
def test_settings_and_widths(planes_and_product, submodule, channels, hidden, descriptors):
    config = submodule("triton_parts.settings").LaunchConfig
    first = config(32, 16, 64, 4, 2, descriptors)
    problem = make_problem(7, channels, hidden, mask="bool", batch=2, direction="incoming")
    got = planes_and_product(problem, (first, config(16, 32, 16, 4, 2, descriptors)))
    assert_as_exact(got, problem)


@pytest.mark.kernels_ci
@pytest.mark.parametrize(
    "memory, length, channels, hidden, others",
    [
        ("default", 19, 64, 32, {"mask": "bool", "residual": True, "drop_mask": True}),
        ("lean", 11, 48, 80, {"mask": "expanded", "direction": "incoming", "biases": True}),
        ("default", 9, 256, 16, {"batch": 3, "direction": "incoming"}),
        ("lean", 7, 16, 32, {"mask": "bool", "batch": 4, "biases": True}),
    ],
)
def test_a_call_is_as_exact_as_with_whole_operands(
    kernel, on_split, memory, length, channels, hidden, others
):
    problem = make_problem(length, channels, hidden, **others)
    wanted, p = reference(problem), problem.to(on_split)
    error = relative_error(p.run(kernel, memory=memory, precision="fp16x3"), wanted)
    assert error <= (1e-6 if on_split == "cpu" else 5e-6)
    if on_split != "cpu":  # tensor cores truncate each step of a sum
        return
    beside = relative_error(p.run(kernel, memory=memory, precision="IEEE"), wanted)
    assert error <= 1.5 * beside * room(wanted.numel())


def test_lengths_and_padding(kernel, on_split):
    """Padding doesn't matter, even if it is NaN."""
    problem = make_problem(21, 32, batch=2, residual=True).to(on_split)
    lengths = torch.tensor([21, 13], device=on_split)
    problem.x[1, 13:], problem.x[1, :, 13:] = float("nan"), float("nan")
    out = problem.run(kernel, lengths=lengths, precision="fp16x3")
    alone = make_problem(21, 32, batch=2, residual=True).to(on_split)
    alone.x, alone.residual = alone.x[1:, :13, :13], alone.residual[1:, :13, :13]
    assert relative_error(out[1:, :13, :13], reference(alone.to("cpu"))) <= 5e-6


def test_not_finite_where_plain_pytorch_is_not(kernel, on_split):
    problem = make_problem(12, 32, mask="bool")
    for at, value in (((3, 4, 5), "nan"), ((7, 2, 0), "inf"), ((11, 11, 8), "-inf")):
        problem.x[(0, *at)] = float(value)  # the last one at a masked pair
    got = problem.to(on_split).run(kernel, precision="fp16x3").cpu()
    wanted = problem.formula(torch.float32)
    assert torch.equal(got.isfinite(), wanted.isfinite())
    assert 0 < got.isfinite().sum() < got.numel()


def test_masks_without_a_bound_split_nothing(kernel, on_split):
    """A mask of other dtypes than bool may be above 1: it is as if TF32x3 were asked for."""
    problem = make_problem(18, 32, mask="soft")
    problem.mask *= 1000
    wanted, p = reference(problem), problem.to(on_split)
    assert relative_error(p.run(kernel, precision="fp16x3"), wanted) <= 1e-6


def test_which_calls_split_their_operands(kernel, on_split):
    def explained(precision="fp16x3", channels=16, hidden=None, mask=None, grad=None, **options):
        p = make_problem(5, channels, hidden, mask=mask).to(on_split)
        p.x.requires_grad_(grad is not None)
        if grad is not None:
            options["recompute"] = grad
        return kernel.explain(
            kernel.triangle_multiplicative_update, p.x, mask=p.mask, precision=precision,
            **p.weights, **options,
        )  # fmt: skip

    for split in (
        {}, {"mask": "bool"}, {"mask": "expanded"}, {"channels": 256, "hidden": 48},
        {"memory": "lean"}, {"grad": "product"}, {"grad": "all"},
    ):  # fmt: skip
        found = explained(**split)
        assert found.precision == "fp16x3" and "is run as" not in str(found), split
    for whole, reason in (
        ({"mask": "float"}, "the mask is not bool"), ({"channels": 24}, "multiples of 16"),
        ({"hidden": 8}, "multiples of 16"), ({"channels": 272}, "at most 256"),
        ({"grad": "none"}, "a and b are kept"),
    ):  # fmt: skip
        found = explained(**whole)
        assert found.precision in ("ieee", "tf32x3"), whole
        assert any("'fp16x3' is run as TF32x3" in n and reason in n for n in found.notes), whole
    for word in (None, "IEEE", "TF32x3"):
        assert explained(word).precision in ("ieee", "tf32x3")


def test_16_bits_and_transitions_have_no_use_for_it(kernel, on_split):
    p = make_problem(4, 16, dtype=torch.bfloat16).to(on_split)
    found = kernel.explain(
        kernel.triangle_multiplicative_update, p.x, precision="fp16x3", **p.weights
    )
    assert found.precision is None and "fp16x3" not in str(found)
    x, gate, up, down = (torch.randn(n, 16, device=on_split) for n in (16, 32, 32, 32))
    arguments = x.view(1, 4, 4, 16), None, None, gate, up, down.t().contiguous()
    split, whole = (
        kernel.swiglu_transition(*arguments, precision=word) for word in ("fp16x3", "TF32x3")
    )
    assert relative_error(split, whole.double().cpu()) <= 1e-6


@pytest.mark.parametrize("recompute", ["none", "product", "all"])
def test_gradients(kernel, on_split, recompute):
    """A backward splits nothing; a forward that keeps a and b doesn't either."""
    problem = make_problem(9, 16, mask="bool")
    wanted = reference_gradients(problem, 2 * reference(problem))
    p = problem.to(on_split)
    leaves = {name: p.weights[name].requires_grad_() for name in ("p_in_weight", "g_out_weight")}
    leaves["x"] = p.x.requires_grad_()
    p.run(kernel, precision="fp16x3", recompute=recompute).square().sum().backward()
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, wanted[name]) <= 2e-5, name


def test_split_weights(on_split, submodule):
    """high + low is W diag(g) times a power of two, to 22 bits of each row's largest element."""
    problem = make_problem(2, 48, 32, biases=True).to(on_split)
    split = submodule("triton_parts.split_operands")
    call = as_call(submodule("_call"), problem, precision=split.FP16X3)
    found, scales = split.split_weights(call, submodule("triton_parts.launch").Launches())
    factors, constants, exponents = scales.double().cpu().unbind()
    start, w = 0, {k: v.double().cpu() for k, v in (problem.weights | problem.biases).items()}
    for name, norm in (("p_in", "in"), ("g_in", "in"), ("p_out", "out"), ("g_out", "in")):
        weight = w[f"{name}_weight"]
        rows = slice(start, start := start + len(weight))
        high, low = getattr(found.weights, f"{name}_weight").double().cpu().chunk(2)
        up = 2 ** exponents[rows, None] if name == "p_in" else 1
        wanted = weight * w[f"norm_{norm}_weight"]
        off = ((high + low) * factors[rows, None] * 2**10 / up - wanted).abs()
        assert (off <= 2**-22 * wanted.abs().amax(1, keepdim=True)).all()
        assert ((high.abs().amax(1) >= 2**14) & (high.abs().amax(1) <= 2**15)).all()
        constant = F.linear(w[f"norm_{norm}_bias"], weight, w[f"{name}_bias"])
        got = constants[rows] / torch.as_tensor(up).flatten()
        assert torch.allclose(got, constant, 1e-5, 1e-6)
