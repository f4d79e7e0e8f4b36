"""The transition with precision="fp16x3" against float64, beside whole operands.

On a GPU whose target has no settings for it, all of this is skipped.
"""

import pytest
import torch
from gradients_of_calls import in_many_parts
from helpers import leaves_of, reference_gradients, relative_error, room, seeded
from transitions import BIASES, as_transition, make_transition, poisoned

# Rounding to 22 bits and sums in float32; the formula in plain PyTorch has as much.
BUDGET = 2e-6


@pytest.fixture
def subject(submodule, on_split):
    """The path, on a target that splits operands; launches of other settings are forgotten."""
    launches = submodule("triton_path.launches")._launches
    launches.clear()
    yield submodule("triton_path.transition")
    launches.clear()


@pytest.fixture
def forward(subject, submodule, on_triton):
    """forward(problem, precision): the output on the CPU."""

    def run(problem, precision="fp16x3"):
        call = as_transition(submodule("_call"), problem.to(on_triton), precision=precision)
        return subject.forward(call).cpu().view(problem.x.shape)

    return run


@pytest.fixture
def gradients(subject, submodule, on_triton):
    """gradients(problem, grad_out, precision, needs): all of them by name, on the CPU."""

    def run(problem, grad_out=None, precision="fp16x3", needs=None):
        call = as_transition(submodule("_call"), problem.to(on_triton), precision=precision)
        grad_out = grad_out_of(problem) if grad_out is None else grad_out
        needs = frozenset(needs or set(leaves_of(problem)) - {"residual"})
        found = subject.backward(call, grad_out.to(on_triton).view(call.x.shape), needs)
        shapes = {name: leaf.shape for name, leaf in leaves_of(problem).items()}
        return {name: value.cpu().view(shapes[name]) for name, value in found.items()}

    return run


@pytest.fixture
def standing_in(submodule, on_triton):
    """standing_in(): a context in which meta tensors stand for those of the device."""
    device = submodule("triton_parts.device")
    return lambda: device.standing_in(device.device_target(torch.device(on_triton)))


def grad_out_of(problem):
    return torch.randn(problem.x.shape, generator=seeded(5))


def errors_of(got, wanted):
    return {name: relative_error(value, wanted[name]) for name, value in got.items()}


@pytest.mark.kernels_ci
@pytest.mark.parametrize("biases", [(), BIASES])
def test_every_result(forward, gradients, submodule, biases):
    """As exact as with whole operands, and from kernels that split theirs."""
    problem = make_transition((2, 5, 13, 32), 96, biases=biases, residual="own")
    wanted = problem.formula(torch.float64)
    whole = relative_error(forward(problem, "fp32"), wanted)
    error = relative_error(forward(problem), wanted)
    assert error <= BUDGET and error <= 2 * whole * room(wanted.numel()) + 1e-7
    wanted = reference_gradients(problem, grad_out_of(problem))
    whole = errors_of(gradients(problem, precision="fp32"), wanted)
    got = gradients(problem)
    assert len(got) == (9 if biases else 6)
    for name, error in errors_of(got, wanted).items():
        assert error <= BUDGET, name
        assert error <= 2 * whole[name] * room(wanted[name].numel()) + 1e-7, name


@pytest.mark.parametrize(
    "channels, hidden", [(16, 16), (48, 80), (80, 320), (192, 32), (256, 48), (16, 2048)]
)
def test_widths(forward, gradients, channels, hidden):
    problem = make_transition((7, 9, channels), hidden, biases=BIASES)
    assert_exact(forward, gradients, problem)


@pytest.mark.parametrize("rows", [1, 2, 63, 65, 129])
def test_numbers_of_rows(forward, gradients, rows):
    assert_exact(forward, gradients, make_transition((rows, 16), 32))


def assert_exact(forward, gradients, problem, grad_out=None):
    assert relative_error(forward(problem), problem.formula(torch.float64)) <= BUDGET
    wanted = reference_gradients(problem, grad_out_of(problem) if grad_out is None else grad_out)
    errors = errors_of(gradients(problem, grad_out), wanted)
    assert all(error <= BUDGET for error in errors.values()), errors


def test_padded_sequences(forward, gradients):
    """Padding doesn't matter, even if it is NaN."""
    problem = make_transition((2, 9, 9, 32), 48, residual="own", lengths=[9, 5])
    given, grad_out = poisoned(problem), grad_out_of(problem)
    padding = given.x.isnan()
    assert relative_error(forward(given), problem.formula(torch.float64)) <= BUDGET
    wanted = reference_gradients(problem, grad_out)
    got = gradients(given, grad_out.masked_fill(padding, torch.nan))
    assert got["x"][padding].count_nonzero() == 0
    assert all(error <= BUDGET for error in errors_of(got, wanted).values())


@pytest.mark.parametrize("exponent", [-60, -40, 40, 60])
def test_output_gradients_of_any_size(gradients, exponent):
    """No bound of a gradient is known beforehand; a power of two changes no bit but its own."""
    problem = make_transition((70, 16), 32)
    plain = gradients(problem)
    scaled = gradients(problem, grad_out_of(problem) * 2.0**exponent)
    for name, value in plain.items():
        assert torch.equal(scaled[name], value * 2.0**exponent), name


def test_rows_with_small_gradients_beside_large_ones(gradients):
    """Rows of G, and of dp and du, that are 2^0 to 2^-24 of the largest."""
    problem = make_transition((25, 4, 16), 32)
    grad_out = grad_out_of(problem) * 2.0 ** -torch.arange(25.0)[:, None, None]
    got, wanted = gradients(problem, grad_out)["x"], reference_gradients(problem, grad_out)["x"]
    for row in range(25):
        assert relative_error(got[row], wanted[row]) <= BUDGET, row


def test_channels_of_any_size(forward, gradients):
    """Rows of the weights, channels of h, of dp and of du: each has a power of two of its own."""
    problem = make_transition((60, 32), 48)
    sizes = 2.0 ** torch.linspace(-30, 30, 48)
    for name, by in (("up_weight", sizes[:, None]), ("down_weight", 1 / sizes)):
        problem.weights[name] = problem.weights[name] * by
    assert relative_error(forward(problem), problem.formula(torch.float64)) <= BUDGET
    got, wanted = gradients(problem), reference_gradients(problem, grad_out_of(problem))
    for name in ("x", "gate_weight"):
        assert relative_error(got[name], wanted[name]) <= BUDGET, name
    for found, one in zip(got["up_weight"], wanted["up_weight"], strict=True):
        assert relative_error(found, one) <= BUDGET
    for found, one in zip(got["down_weight"].T, wanted["down_weight"].T, strict=True):
        assert relative_error(found, one) <= BUDGET


@pytest.mark.parametrize("up, down, out", [(110, -60, 0), (0, 0, 112), (0, -30, 120)])
def test_sums_near_the_end_of_float32(forward, gradients, up, down, out):
    """They are made in a scale that leaves them finite where whole operands do."""
    problem = make_transition((40, 32), 48)
    problem.weights["up_weight"] = problem.weights["up_weight"] * 2.0**up
    problem.weights["down_weight"] = problem.weights["down_weight"] * 2.0**down
    assert relative_error(forward(problem), problem.formula(torch.float64)) <= BUDGET
    grad_out = grad_out_of(problem) * 2.0**out
    whole = gradients(problem, grad_out, precision="fp32")
    for name, got in gradients(problem, grad_out).items():
        assert torch.equal(got.isfinite(), whole[name].isfinite()), name


@pytest.mark.parametrize("name", ["x", "gate_weight", "up_weight", "down_weight"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_not_finite_where_whole_operands_are_not(forward, gradients, name, value):
    problem = make_transition((40, 32), 48)
    given = problem.x if name == "x" else problem.weights[name]
    given[3, 5] = float(value)
    got, whole = forward(problem), forward(problem, "fp32")
    assert torch.equal(got.isfinite(), whole.isfinite())
    if name == "x" or value == "nan":
        got, whole = gradients(problem), gradients(problem, precision="fp32")
        for of, found in got.items():
            assert torch.equal(found.isfinite(), whole[of].isfinite()), of


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("parts, block_n", [(1, 16), (2, 32), (1, 64)])
def test_settings(forward, gradients, submodule, monkeypatch, descriptors, parts, block_n):
    """Blocks that divide no width; whole rows of dz in one block or two, or computed twice."""
    config = submodule("triton_parts.settings").LaunchConfig
    configs = {
        "swiglu_hidden": config(32, 32, 32, 4, 2, descriptors),
        "swiglu_projections": config(32, 32, 16, 4, 2, descriptors, split=2),
        "row_linear": config(32, 64, 32, 4, 2, descriptors),
        "swiglu_bwd": config(32, 64, 16, 4, 2, descriptors),
        "input_bwd": config(16, block_n, 16, 4, 1, descriptors, split=parts),
        "row_products": config(32, 32, 32, 4, 2, persistent=2),
        "row_products_and_sums": config(16, 32, 32, 4, 2, persistent=2),
    }
    problem = make_transition((3, 11, 48), 80, biases=BIASES)
    with in_many_parts(submodule, monkeypatch, configs):
        assert_exact(forward, gradients, problem)


NEEDS = [("x",), ("norm_bias",), ("down_weight",), ("x", "gate_bias")]


def test_alone_as_together(gradients, on_triton):
    """What else is asked for changes no bit, but how a GPU's kernels fuse products and sums."""
    problem = make_transition((40, 32), 48, biases=BIASES)
    together = gradients(problem)
    for needs in NEEDS:
        got = gradients(problem, needs=needs)
        assert set(got) == set(needs)
        for name in needs:
            same = torch.equal(got[name], together[name])
            assert same or on_triton == "cuda", name
            assert relative_error(got[name], together[name].double()) <= BUDGET / 4, name


def test_chunks_of_rows(forward, gradients, subject, recorded, monkeypatch):
    """Each chunk's products are added to the ones before; the weights are split once for all."""
    problem = make_transition((300, 16), 32, biases=BIASES)
    monkeypatch.setattr(subject, "_FORWARD_CHUNK", (1e-9, 128 * 32 * 4, 128 * 32 * 4))
    monkeypatch.setattr(subject, "_BACKWARD_CHUNK", (1e-9, 2**16, 2**16))
    assert_exact(forward, gradients, problem)
    launched = [stage for stage, _ in recorded]
    assert launched.count("swiglu_hidden") >= 5  # of three chunks forward, and two backward
    # In two launches forward, of which the second waits for the first, and in one backward.
    assert launched.count("split_transition") == 3


@pytest.mark.parametrize(
    "channels, hidden, reason",
    [(24, 32, "multiples of 16"), (32, 40, "multiples of 16"), (272, 32, "at most 256 and 2048")],
)
def test_what_can_not_be_split_is_computed_in_tf32x3(
    forward, subject, submodule, standing_in, channels, hidden, reason
):
    problem = make_transition((40, channels), hidden)
    assert torch.equal(forward(problem), forward(problem, "tf32x3"))
    call = as_transition(submodule("_call"), problem, precision="fp16x3")
    with standing_in():
        (note,) = [note for note in subject.plan(call).notes if "is run as TF32x3" in note]
    assert reason in note


def test_every_stage_is_one_of_split_operands(subject, submodule, standing_in):
    """The kernels with whole operands would be as exact, and three times slower."""
    call = as_transition(submodule("_call"), make_transition((40, 32), 48), precision="fp16x3")
    precisions = {}
    with standing_in():
        launches = subject.plan_training(call)
    for launch, _ in launches:
        if "PRECISION" in launch.constants:
            precisions.setdefault(launch.stage, set()).add(launch.constants["PRECISION"])
    stages = "swiglu_hidden", "row_linear", "swiglu_bwd", "row_products", "input_bwd"
    assert precisions == dict.fromkeys(stages, {"fp16x3"})
