"""The backward of precision="fp16x3" against float64 autograd, beside the one of whole operands.

On a GPU whose target has no settings for it, all of this is skipped.
"""

import pytest
import torch
from gradients_of_calls import RECOMPUTE, in_many_parts
from helpers import (
    as_call,
    leaves_of,
    make_problem,
    reference_gradients,
    relative_error,
    room,
    seeded,
)

# Rounding to 22 bits and sums in float32; the formula in plain PyTorch has as much.
BUDGET = 2e-6


@pytest.fixture
def gradients(submodule, on_split):
    """gradients(problem, grad_out, recompute, precision): all of them by name, on the CPU."""
    path = submodule("triton_path")

    def run(
        problem, grad_out=None, recompute="none", precision="fp16x3", lengths=None, needs=None
    ):  # fmt: skip
        call = as_call(submodule("_call"), problem.to(on_split), precision=precision)
        if lengths is not None:
            lengths = torch.tensor(lengths, dtype=torch.int32, device=on_split)
        call = call._replace(recompute=recompute, lengths=lengths)
        saved = (None, None, None)
        if call.keeps_product:
            _, *saved = path.forward_saving(call)
        grad_out = grad_out_of(problem) if grad_out is None else grad_out
        needs = frozenset(needs or leaves_of(problem))
        found = path.backward(call, grad_out.to(on_split), *saved, needs)
        return {name: value.cpu() for name, value in found.items()}

    return run


def grad_out_of(problem):
    return torch.randn(problem.x.shape, generator=seeded(5))


def errors_of(got, wanted):
    drop = {name: value.squeeze(1) for name, value in wanted.items() if name == "drop_mask"}
    return {name: relative_error(value, (wanted | drop)[name]) for name, value in got.items()}


def assert_exact(got, problem, grad_out=None):
    wanted = reference_gradients(problem, grad_out_of(problem) if grad_out is None else grad_out)
    errors = errors_of(got, wanted)
    assert all(error <= BUDGET for error in errors.values()), errors


@pytest.mark.kernels_ci
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_every_gradient(gradients, direction):
    """As exact as with whole operands, with the same bits whatever is computed again."""
    problem = make_problem(
        7, 32, 16, direction=direction, mask="soft", drop_mask=True, biases=True, batch=2
    )
    wanted = reference_gradients(problem, grad_out_of(problem))
    got = gradients(problem)
    assert len(got) == 15
    whole = errors_of(gradients(problem, precision="fp32"), wanted)
    for name, error in errors_of(got, wanted).items():
        assert error <= BUDGET, name
        assert error <= 2 * whole[name] * room(wanted[name].numel()) + 1e-7, name
    for recompute in ("product", "all"):
        again = gradients(problem, recompute=recompute)
        assert all(torch.equal(again[name], got[name]) for name in got), recompute


@pytest.mark.parametrize(
    "channels, hidden, mask",
    [(16, 16, None), (48, 80, "float"), (192, 32, "bool"), (256, 16, "expanded")],
)
def test_widths_and_masks(gradients, channels, hidden, mask):
    problem = make_problem(5, channels, hidden, mask=mask, direction="incoming")
    assert_exact(gradients(problem), problem)


@pytest.mark.parametrize("length", [1, 16, 35])
def test_lengths_of_sequences(gradients, length):
    # Of one residue the mask scales t, which the LayerNorm undoes: its gradient is but rounding.
    problem = make_problem(length, 16, 32, mask="bool" if length == 1 else "soft")
    assert_exact(gradients(problem), problem)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_padded_sequences(gradients, recompute):
    """Padding doesn't matter, even if it is NaN, and has gradients of zero."""
    problem = make_problem(21, 32, mask="soft", batch=2, direction="incoming")
    grad_out = grad_out_of(problem)
    whole = torch.ones(2, 21, 21, dtype=torch.bool)
    whole[1, 13:], whole[1, :, 13:] = False, False
    clean = make_problem(21, 32, mask="soft", batch=2, direction="incoming")
    clean.mask = clean.mask * whole
    clean.x[~whole] = 0.0
    wanted = reference_gradients(clean, grad_out * whole[..., None])
    problem.x[~whole], grad_out[~whole] = float("nan"), float("nan")
    got = gradients(problem, grad_out, recompute, lengths=[21, 13])
    assert got["x"][~whole].count_nonzero() == 0
    for name in got.keys() - {"mask"}:
        assert relative_error(got[name], wanted[name]) <= BUDGET, name
    assert relative_error(got["mask"] * whole, wanted["mask"] * whole) <= BUDGET


@pytest.mark.parametrize("exponent", [-60, -40, 40, 80])
def test_output_gradients_of_any_size(gradients, exponent):
    """No bound of a gradient is known beforehand; a power of two changes no bit but its own."""
    problem = make_problem(6, 16, mask="bool")
    grad_out = grad_out_of(problem)
    plain, scaled = gradients(problem), gradients(problem, grad_out * 2.0**exponent)
    for name, value in plain.items():
        assert torch.equal(scaled[name], value * 2.0**exponent), name


def test_pairs_with_small_gradients_beside_large_ones(gradients):
    """dx of each row of pairs, whose output's gradients are 2^0 to 2^-24 of the largest."""
    problem = make_problem(25, 16, 16, mask="bool", biases=True)
    grad_out = grad_out_of(problem) * 2.0 ** -torch.arange(25.0)[:, None, None]
    # Closed gates leave nothing but each pair's own gradient, through z and the gate of the output.
    problem.biases["g_in_bias"] -= 30
    got, wanted = gradients(problem, grad_out)["x"], reference_gradients(problem, grad_out)["x"]
    for row in range(25):
        assert relative_error(got[:, row], wanted[:, row]) <= BUDGET, row


def test_channels_with_small_gradients(gradients):
    """Columns of dp and dg, and planes of a, b and their gradients, of very different sizes."""
    problem = make_problem(8, 16, 32, mask="bool")
    sizes = 2.0 ** torch.linspace(-40, 40, 32)
    rows = torch.cat([sizes, 1 / sizes])[:, None]  # the product stays as it is
    problem.weights["p_in_weight"] = problem.weights["p_in_weight"] * rows
    got, wanted = gradients(problem), reference_gradients(problem, grad_out_of(problem))
    for name in ("x", "g_in_weight", "p_out_weight"):
        assert relative_error(got[name], wanted[name]) <= BUDGET, name
    for found, one in zip(got["p_in_weight"], wanted["p_in_weight"], strict=True):
        assert relative_error(found, one) <= BUDGET


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("below", [14, 18, 20])
def test_shut_gates(gradients, below, biased):
    """Rows of t whose deviations are far below sqrt(eps): t^ is small, and so are its sums."""
    problem = make_problem(9, 32, biases=True)
    problem.biases["g_in_bias"] -= below * 0.6931
    if not biased:
        problem.weights["norm_out_bias"] = problem.weights["norm_out_bias"] * 0
    assert_exact(gradients(problem), problem)


def test_pairs_of_a_plane_with_small_gradients(gradients):
    """Rows of dt that are 2^0 to 2^-20 of the largest."""
    problem = make_problem(21, 16, mask="bool")
    grad_out = grad_out_of(problem) * 2.0 ** -torch.arange(21.0)[:, None, None]
    got, wanted = gradients(problem, grad_out), reference_gradients(problem, grad_out)
    for name in ("x", "p_in_weight", "g_in_weight"):
        assert relative_error(got[name], wanted[name]) <= BUDGET, name


NEEDS = [("x",), ("mask",), ("drop_mask",), ("p_in_bias",), ("x", "p_out_weight")]


def test_alone_as_together(gradients):
    """What else is asked for changes no bit."""
    problem = make_problem(5, 32, 16, mask="soft", drop_mask=True, biases=True)
    together = gradients(problem)
    for needs in NEEDS:
        got = gradients(problem, needs=needs)
        assert set(got) == set(needs)
        assert all(torch.equal(got[name], together[name]) for name in needs), needs


@pytest.mark.parametrize("descriptors", [False, True])
def test_an_infinite_weight_of_the_gate(gradients, submodule, monkeypatch, descriptors):
    """Tiles that reach beyond the C rows of high numbers meet it among the low ones."""
    launch = submodule("triton_parts.launch")
    pick, config = launch.pick_config, submodule("triton_parts.settings").LaunchConfig

    def picked(stage, *others):
        if stage == "fused_ln_residual_bwd":
            return config(32, 64, 16, 4, 2, descriptors)
        return pick(stage, *others)

    monkeypatch.setattr(launch, "pick_config", picked)
    problem = make_problem(5, 48, 32, mask="soft")
    problem.weights["norm_in_bias"] = problem.weights["norm_in_bias"] * 0
    problem.weights["g_out_weight"][0, 5] = float("inf")
    launches = submodule("triton_path.launches")._launches
    launches.clear()
    try:
        got = gradients(problem)
    finally:
        launches.clear()
    whole = gradients(problem, precision="fp32")
    for name, found in got.items():
        assert torch.equal(found.isfinite(), whole[name].isfinite()), name
    assert got["g_in_weight"].isfinite().all()


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_masks_of_any_size(gradients, direction):
    """Rows of a and b are divided by powers of two, and those of dt multiplied by them."""
    problem = make_problem(12, 32, mask="soft", direction=direction)
    rows = 4.0 ** torch.arange(-6, 6)
    problem.mask = problem.mask * rows[:, None] * rows
    problem.mask[0, 3], problem.mask[0, :, 4] = 0, 0
    assert_exact(gradients(problem), problem)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_not_finite_where_whole_operands_are_not(gradients, value):
    problem = make_problem(9, 32, mask="bool")
    grad_out = grad_out_of(problem)
    grad_out[0, 3, 5, 7] = float(value)
    got = gradients(problem, grad_out)
    whole = gradients(problem, grad_out, precision="fp32")
    for name, found in got.items():
        assert torch.equal(found.isfinite(), whole[name].isfinite()), name
    assert 0 < got["x"].isfinite().sum() < got["x"].numel()


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("parts, block_n", [(1, 16), (2, 32), (1, 64)])
def test_settings(gradients, submodule, monkeypatch, descriptors, parts, block_n):
    """Blocks that divide no width; whole rows of dz in one block or two, or computed twice."""
    config = submodule("triton_parts.settings").LaunchConfig
    configs = {
        "fused_dual_gemm": config(32, 16, 32, 4, 2, descriptors),
        "trimul_einsum": config(16, 32, 16, 4, 2, descriptors, persistent=2),
        "fused_ln_residual": config(32, 64, 32, 4, 2, descriptors),
        "fused_ln_residual_bwd": config(32, 32, 16, 4, 2, descriptors),
        "norm_out_bwd": config(64, 16, 32, 4, 2),
        "input_bwd": config(16, block_n, 16, 4, 1, descriptors, split=parts),
        "fused_dual_gemm_bwd": config(64, 16, 32, 4, 2, descriptors),
        "row_products": config(32, 32, 32, 4, 2, persistent=2),
    }
    problem = make_problem(9, 48, 32, mask="soft", drop_mask=True)
    with in_many_parts(submodule, monkeypatch, configs):
        for recompute in ("none", "all") if parts == 2 else ("none",):
            assert_exact(gradients(problem, recompute=recompute), problem)


def test_planes_of_dt_in_their_memory(gradients, submodule, on_triton):
    """High numbers of a row and then low ones, whatever the rows' pitch and the tiles."""
    subject = submodule("triton_path.split_gradients")
    split = submodule("triton_parts.split_operands")
    for length in (5, 40, 300):
        pitch = submodule("triton_parts.tiles").padded_pitch(length)
        dt = torch.randn(3, length, pitch, generator=seeded(length)) * 10.0 ** torch.tensor(
            [-30.0, 0.0, 25.0]
        ).view(3, 1, 1)
        dt[1, 2, 3] = float("inf")
        memory = dt.clone().to(on_triton)
        of_planes = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).to(on_triton)
        launches = submodule("triton_parts.launch").Launches()
        masks = torch.arange(length, dtype=torch.int32) % 5 - 2  # multiplied into rows and columns
        padded = torch.nn.functional.pad(masks, (0, pitch - length))
        scales = split.PlaneScales(of_planes, padded[None].to(on_triton))
        exponents = subject.split_planes(memory, scales, launches).exponents.cpu()
        dt *= 2.0 ** masks[:, None] * 2.0**padded
        assert torch.equal(exponents[0::2], of_planes.cpu())
        numbers = memory.cpu().view(torch.float16).double().unflatten(-1, (2, pitch))
        found = (numbers[:, :, 0] + numbers[:, :, 1] / 2**11) / 2.0 ** exponents[1].view(-1, 1, 1)
        finite = dt.isfinite()
        assert not found[~finite].isfinite().any()
        assert numbers[:, :, 0][finite].abs().max() < 2**15
        off = (found - dt.double()).abs()[finite]
        assert (off <= dt.double().abs()[finite] * 2**-21).all()
