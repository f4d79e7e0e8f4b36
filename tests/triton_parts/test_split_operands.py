"""precision="fp16x3", float32 whose dots take split operands: against float64, beside "IEEE".

On a GPU whose target has no settings for it, all of this is skipped.
"""

import pytest
import torch
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
        of_planes = scales.of_planes(call.hidden)
        submodule("trimul_einsum_triton").trimul_einsum_fwd(
            call, launches, a, b, product,
            config=configs[1], scales=of_planes,
        )  # fmt: skip
        length, numbers = p.x.shape[1], torch.cat(planes, 1).view(torch.float16).double().cpu()
        high, low = numbers.unflatten(-1, (2, -1)).unbind(-2)
        assert high[..., length:].count_nonzero() == 0 and low[..., length:].count_nonzero() == 0
        assert high.abs().max() < 2**15
        exponents = of_planes.exponents.cpu().double().reshape(1, -1, 1, 1)
        planes = (high + low / 2**11) * 2**-exponents
        if scales.masks is not None:
            planes *= 2 ** scales.masks[:, None, :length, None].cpu().double()
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
    problem = make_problem(7, channels, hidden, mask="bool", batch=2, direction="incoming")
    for block_k in (64, 128):
        first = config(32, 16, block_k, 4, 2, descriptors)
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
    assert error <= 1e-6
    beside = relative_error(p.run(kernel, memory=memory, precision="IEEE"), wanted)
    assert error <= 1.5 * beside * room(wanted.numel())


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("below", [12, 16, 20, 24])
def test_shut_gates(kernel, on_split, below, biased, memory):
    """Rows of t whose deviations are far below sqrt(eps), and nothing beside them in the product.

    With biases of the norm 2^-20 of its weights, rows have as much room.
    """
    problem = make_problem(9, 32, biases=True)
    problem.biases["g_in_bias"] -= below * 0.6931
    problem.biases["p_out_bias"] *= 0
    problem.weights["norm_out_bias"] *= 2.0**-20 if biased else 0
    wanted, p = reference(problem), problem.to(on_split)
    error = relative_error(p.run(kernel, memory=memory, precision="fp16x3"), wanted)
    beside = relative_error(p.run(kernel, memory=memory, precision="IEEE"), wanted)
    assert error <= 2e-6 and error <= 2 * beside * room(wanted.numel())


@pytest.mark.parametrize("mask", [None, "soft"])
def test_lengths_and_padding(kernel, on_split, mask):
    """Padding doesn't matter, even if it is NaN, or infinite in the mask."""
    problem = make_problem(21, 32, mask=mask, batch=2, residual=True).to(on_split)
    if mask is not None:
        problem.mask[1, 13:], problem.mask[1, :, 13:] = 1e30, float("inf")
    lengths = torch.tensor([21, 13], device=on_split)
    problem.x[1, 13:], problem.x[1, :, 13:] = float("nan"), float("nan")
    out = problem.run(kernel, lengths=lengths, precision="fp16x3")
    alone = make_problem(21, 32, mask=mask, batch=2, residual=True).to(on_split)
    alone.x, alone.residual = alone.x[1:, :13, :13], alone.residual[1:, :13, :13]
    alone.mask = None if mask is None else alone.mask[1:, :13, :13]
    assert relative_error(out[1:, :13, :13], reference(alone.to("cpu"))) <= 1e-6


def test_not_finite_where_plain_pytorch_is_not(kernel, on_split):
    problem = make_problem(12, 32, mask="bool")
    for at, value in (((3, 4, 5), "nan"), ((7, 2, 0), "inf"), ((11, 11, 8), "-inf")):
        problem.x[(0, *at)] = float(value)  # the last one at a masked pair
    got = problem.to(on_split).run(kernel, precision="fp16x3").cpu()
    wanted = problem.formula(torch.float32)
    assert torch.equal(got.isfinite(), wanted.isfinite())
    assert 0 < got.isfinite().sum() < got.numel()


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_masks_of_any_size(planes_and_product, direction, dtype):
    """Rows of a mask have powers of two of their own."""
    problem = make_problem(19, 32, mask="soft", direction=direction)
    rows = 4.0 ** torch.arange(-9, 10)
    problem.mask = (problem.mask * 8 * rows[:, None] * rows).to(dtype)
    problem.mask[0, 3], problem.mask[0, :, 4] = 0, 0
    planes, product = planes_and_product(problem)
    assert_as_exact((planes, product), problem)
    wanted = planes_in_float64(problem)
    a, b = wanted.chunk(2, 1)
    for got, one in ((planes, wanted), (product, a @ b.transpose(-1, -2))):
        for row in range(19):
            found, expected = got[:, :, row], one[:, :, row]
            assert relative_error(found, expected) <= 1e-6 or not expected.any(), row


@pytest.mark.kernels_ci
@pytest.mark.parametrize("memory", ["default", "lean"])
def test_masks_that_are_not_bool(kernel, on_split, memory):
    problem = make_problem(18, 32, mask="soft", batch=3)
    problem.mask *= 10.0 ** torch.tensor([-3, 0, 9])[:, None, None]
    problem.mask[1, 3, 5] = 1e9  # one pair's
    wanted, p = reference(problem), problem.to(on_split)
    assert relative_error(p.run(kernel, precision="fp16x3", memory=memory), wanted) <= 1e-6


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
        {}, {"mask": "float"}, {"mask": "expanded"}, {"channels": 256, "hidden": 48},
        {"memory": "lean"}, {"grad": "none"}, {"grad": "product"}, {"grad": "all"},
    ):  # fmt: skip
        found = explained(**split)
        assert found.precision == "fp16x3" and "is run as" not in str(found), split
    for whole, reason in (
        ({"channels": 24}, "multiples of 16"),
        ({"hidden": 8}, "multiples of 16"), ({"channels": 272}, "at most 256"),
    ):  # fmt: skip
        found = explained(**whole)
        assert found.precision in ("ieee", "tf32x3"), whole
        assert any("'fp16x3' is run as TF32x3" in n and reason in n for n in found.notes), whole
    for word in ("IEEE", "TF32x3"):
        assert explained(word).precision in ("ieee", "tf32x3")


@pytest.fixture
def default_of_sm_90(submodule, monkeypatch):
    """What is done where nothing is asked for is that of sm_90."""
    settings = submodule("triton_parts.settings")
    tables = settings.settings_of
    of_sm_90 = {"fp32_default": tables("sm_90")["fp32_default"]}
    for name in ("triton_parts.split_operands", "triton_parts.device"):
        monkeypatch.setattr(
            submodule(name), "settings_of", lambda *names: {**tables(*names), **of_sm_90}
        )


def test_which_calls_split_by_default(kernel, on_split, default_of_sm_90):
    def explained(**options):
        p = make_problem(5, 16).to(on_split)
        p.x.requires_grad_("recompute" in options)
        update = kernel.triangle_multiplicative_update
        return kernel.explain(update, p.x, **p.weights, **options)

    for options in (
        {}, {"memory": "lean"}, {"precision": "none"}, {"recompute": "none"},
        {"recompute": "product"},
    ):  # fmt: skip
        found = explained(**options)
        assert found.precision == "fp16x3", options
        assert any("float32, in three of float16" in n for n in found.notes), options
    for word in ("IEEE", "TF32x3", "TF32", "bfloat16"):
        assert explained(precision=word).precision != "fp16x3", word
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert explained().precision == "fp16x3"  # TF32 is allowed, but slower
        assert explained(precision="TF32").precision in ("ieee", "tf32")
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_default_has_the_bits_of_the_word(kernel, on_split, default_of_sm_90):
    p = make_problem(11, 32, mask="soft", batch=2).to(on_split)
    assert torch.equal(p.run(kernel), p.run(kernel, precision="fp16x3"))
    assert on_split != "cpu" or not torch.equal(p.run(kernel), p.run(kernel, precision="IEEE"))


def test_gradients_by_default(kernel, on_split, default_of_sm_90):
    problem = make_problem(9, 16, mask="float")
    wanted = reference_gradients(problem, 2 * reference(problem))
    for recompute in ("none", "product", "all"):
        p = problem.to(on_split)
        x = p.x.clone().requires_grad_()
        p.x = x
        p.run(kernel, recompute=recompute).square().sum().backward()
        assert relative_error(x.grad, wanted["x"]) <= 2e-5, recompute


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
    """The forward has the bits that it has without a backward."""
    problem = make_problem(9, 16, mask="bool")
    wanted = reference_gradients(problem, 2 * reference(problem))
    p = problem.to(on_split)
    alone = p.run(kernel, precision="fp16x3")
    leaves = {name: p.weights[name].requires_grad_() for name in ("p_in_weight", "g_out_weight")}
    leaves["x"] = p.x.requires_grad_()
    out = p.run(kernel, precision="fp16x3", recompute=recompute)
    assert torch.equal(out, alone)
    out.square().sum().backward()
    for name, leaf in leaves.items():
        assert relative_error(leaf.grad, wanted[name]) <= 2e-5, name


def test_kept_tensors_have_the_shapes_of_whole_numbers(submodule, on_split):
    """An op's fake outputs do too."""
    path, problem = submodule("triton_path"), make_problem(9, 16).to(on_split)
    for precision in ("fp16x3", "tf32x3"):
        call = as_call(submodule("_call"), problem, precision=precision, recompute="none")
        _, product, moments, planes = path.forward_saving(call)
        shapes = product.shape, moments.shape, planes.shape
        assert path.saved_shapes(call) == shapes


INFINITE = {
    "gate": ("g_in_weight", [(3, 7, "inf")]),
    "last gate": ("g_in_weight", [(-1, 0, "-inf")]),
    "output gate": ("g_out_weight", [(5, 1, "inf")]),
    "two of a row": ("g_out_weight", [(5, 1, "inf"), (5, 9, "-inf")]),
    "projection": ("p_out_weight", [(2, 3, "inf")]),
    "value": ("p_in_weight", [(2, 3, "inf")]),
    "not a number": ("g_out_weight", [(2, 3, "nan")]),
}


@pytest.mark.kernels_ci
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("case", INFINITE)
def test_infinite_weights(kernel, on_split, case, biases):
    """Gates that are 0 or 1, as in plain PyTorch, and the same outputs that are not finite."""
    problem = make_problem(9, 32, mask="bool", biases=biases)
    name, values = INFINITE[case]
    for row, column, value in values:
        problem.weights[name][row, column] = float(value)
    if not biases:  # a normalised row of zeros would meet an infinite weight
        problem.weights["norm_in_bias"] = problem.weights["norm_in_bias"] * 0
    got = problem.to(on_split).run(kernel, precision="fp16x3").cpu()
    wanted = problem.formula(torch.float32)
    finite = wanted.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert not finite.any() or relative_error(got[finite], wanted[finite].double()) <= 2e-6


@pytest.mark.parametrize("norm", [1.0, 2.0**-60, 2.0**40])
def test_split_weights(on_split, submodule, norm):
    """high + low is W times a power of two, to 22 bits of each row's largest element."""
    problem = make_problem(2, 48, 32, biases=True).to(on_split)
    for name in ("norm_in_weight", "norm_in_bias", "norm_out_weight", "norm_out_bias"):
        problem.weights[name] *= norm
    split = submodule("triton_parts.split_operands")
    call = as_call(submodule("_call"), problem, precision=split.FP16X3)
    found, scales = split.split_weights(call, submodule("triton_parts.launch").Launches())
    factors, constants, exponents, alone = scales.projections.double().cpu().unbind()
    start, w = 0, {k: v.double().cpu() for k, v in (problem.weights | problem.biases).items()}
    for name, norm_name in (("p_in", "in"), ("g_in", "in"), ("p_out", "out"), ("g_out", "in")):
        weight = w[f"{name}_weight"]
        rows = slice(start, start := start + len(weight))
        high, low = getattr(found.weights, f"{name}_weight").double().cpu().chunk(2)
        up = 2 ** exponents[rows, None] if name == "p_in" else 1
        scaled = getattr(found.weights, f"norm_{norm_name}_weight").double().cpu()
        unit = scaled / w[f"norm_{norm_name}_weight"]
        assert (unit == unit[0]).all()
        bias = getattr(found.weights, f"norm_{norm_name}_bias").double().cpu()
        assert torch.equal(bias, w[f"norm_{norm_name}_bias"] * unit)
        bound = scaled.abs().max() * weight.shape[1] ** 0.5 + bias.abs().max()
        assert 2**14 <= bound <= 2**15
        off = ((high + low) * factors[rows, None] * unit / up - weight).abs()
        assert (off <= 2**-22 * weight.abs().amax(1, keepdim=True)).all()
        off = ((high + low) * alone[rows, None] - weight).abs()
        assert (off <= 2**-22 * weight.abs().amax(1, keepdim=True)).all()
        assert ((high.abs().amax(1) >= 2**14) & (high.abs().amax(1) <= 2**15)).all()
        got = constants[rows] / torch.as_tensor(up).flatten()
        assert torch.equal(got, w[f"{name}_bias"])
