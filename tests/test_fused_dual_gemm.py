"""Stage 1 against float64, alone: planes, pads, both directions, every way to load an operand."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, make_problem, relative_error

# One rounding of the planes and one of the normalised operand, in relative L2.
STAGE_BUDGET = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4, torch.float32: 2e-6}


def planes_in_float64(problem):
    """[B, 2D, L, L] by the formula of the module's docstring."""
    w = {name: value.double() for name, value in problem.weights.items()}
    bias = {name: value.double() for name, value in problem.biases.items()}
    x = problem.x.double()
    z = F.layer_norm(x, x.shape[-1:], w["norm_in_weight"], w["norm_in_bias"], problem.eps)
    gated = F.linear(z, w["p_in_weight"], bias.get("p_in_bias"))
    gated = gated * torch.sigmoid(F.linear(z, w["g_in_weight"], bias.get("g_in_bias")))
    if problem.mask is not None:
        gated = gated * problem.mask.double().unsqueeze(-1)
    planes = gated.movedim(-1, 1)
    return planes if problem.direction == "outgoing" else planes.transpose(-1, -2)


def weights_of(submodule, problem):
    values = {**problem.weights, **problem.biases}
    names = submodule("validation").Weights._fields
    return submodule("validation").Weights(**{name: values.get(name) for name in names})


@pytest.fixture
def stage(submodule, on_triton):
    """stage(problem, config=None): the stage's planes, columns [0, L) and the pads apart."""

    def run(problem, config=None):
        p = problem.to(on_triton)
        planes = submodule("fused_dual_gemm").fused_dual_gemm_fwd(
            p.x, p.direction, p.mask, weights_of(submodule, p), p.eps, "fp32", config
        )
        length = p.x.shape[1]
        return planes[..., :length].cpu(), planes[..., length:].cpu()

    return run


def assert_planes(got, problem):
    planes, pads = got
    wanted = planes_in_float64(problem)
    assert planes.shape == wanted.shape and planes.dtype == problem.x.dtype
    error = relative_error(planes, wanted)
    assert error <= STAGE_BUDGET[problem.x.dtype], f"relative error {error:.2e}"
    assert pads.count_nonzero() == 0


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_planes(stage, dtype, direction):
    problem = make_problem(19, 32, dtype=dtype, direction=direction, mask="soft", batch=2)
    assert_planes(stage(problem), problem)


@pytest.mark.parametrize("mask", [None, "bool", "float", "expanded"])
def test_masks(stage, mask):
    problem = make_problem(17, 16, mask=mask, direction="incoming")
    assert_planes(stage(problem), problem)


@pytest.mark.parametrize("length", [1, 2, 16, 33])
def test_lengths(stage, length):
    problem = make_problem(length, 16, mask="soft")
    assert_planes(stage(problem), problem)


@pytest.mark.parametrize("channels, hidden", [(48, 24), (72, 96), (5, 3), (1, 1), (20, 16)])
def test_widths(stage, channels, hidden):
    problem = make_problem(6, channels, hidden, mask="soft", biases=True)
    assert_planes(stage(problem), problem)


@pytest.mark.parametrize("descriptors, held", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("block_k", [16, 32, 64])
@pytest.mark.parametrize("channels", [48, 64])
def test_channels_whole_or_in_blocks(stage, submodule, channels, block_k, descriptors, held):
    config = submodule("launch_config").LaunchConfig(32, 32, block_k, 4, 2, descriptors, held)
    problem = make_problem(10, channels, 32, mask="soft", batch=2, direction="incoming")
    assert_planes(stage(problem, config), problem)


@pytest.mark.parametrize("descriptors", [False, True])
def test_projections_in_either_order_in_memory(stage, submodule, descriptors, on_triton):
    config = submodule("launch_config").LaunchConfig(32, 16, 32, 4, 2, descriptors)
    for gate_first in (False, True):
        problem = make_problem(9, 32)
        pair = torch.empty(2, 64, 32, device=on_triton)
        value, gate = pair[int(gate_first)], pair[int(not gate_first)]
        value.copy_(problem.weights["p_in_weight"])
        gate.copy_(problem.weights["g_in_weight"])
        problem.weights.update(p_in_weight=value, g_in_weight=gate)
        assert (value.data_ptr() > gate.data_ptr()) == gate_first
        got = stage(problem, config)
        problem.weights.update(p_in_weight=value.cpu(), g_in_weight=gate.cpu())
        assert_planes(got, problem)


def test_projections_of_any_strides(stage):
    problem = make_problem(7, 24, 20)
    for name in ("p_in_weight", "g_in_weight"):
        problem.weights[name] = problem.weights[name].t().contiguous().t()
    assert_planes(stage(problem), problem)
    rows = make_problem(7, 24, 20)
    wide = torch.randn(40, 31)
    wide[:, 3:27] = rows.weights["p_in_weight"]
    rows.weights["p_in_weight"] = wide[:, 3:27]
    assert_planes(stage(rows), rows)


def test_pads_stay_zero_where_the_bias_is_not(stage):
    problem = make_problem(3, 16, biases=True)
    _, pads = stage(problem)
    assert pads.numel() > 0 and pads.count_nonzero() == 0
