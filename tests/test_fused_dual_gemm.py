"""Stage 1 against float64, alone: planes, pads, moments, both directions, every way to load."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, as_call, make_problem, relative_error

# One rounding of the planes and one of the normalised operand, in relative L2.
STAGE_BUDGET = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4, torch.float32: 2e-6}


def planes_in_float64(problem):
    """[B, 2D, L, L] by the formula in the stage's docstring."""
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


def moments_in_float64(x, eps):
    """[B, 2, L, L] as in the stage's docstring: an fp32 row's mean is that of x - first channel."""
    shift = x[..., :1] if x.dtype == torch.float32 else 0
    rows = x.double() - shift
    variance = rows.var(-1, unbiased=False)
    return torch.stack([rows.mean(-1), (variance + eps).rsqrt()], dim=1)


def planes_like(submodule, x, direction, size):
    """a and b [B, G, Q, pitch] of one piece of memory, uninitialised."""
    rows, columns = x.shape[1:3] if direction == "outgoing" else x.shape[2:0:-1]
    shape = (x.shape[0], 2, size, rows, submodule("triton_parts.tiles").padded_pitch(columns))
    return torch.empty(shape, dtype=x.dtype, device=x.device).unbind(1)


@pytest.fixture
def stage(submodule, on_triton):
    """stage(problem, config=None, ...): planes, columns [0, L) and the pads apart, and moments."""

    def run(problem, config=None, group=None, **others):
        p = problem.to(on_triton)
        call = as_call(submodule("_call"), p)
        planes = planes_like(submodule, p.x, p.direction, call.hidden if not group else group[1])
        moments = submodule("fused_dual_gemm").fused_dual_gemm_fwd(
            call, submodule("triton_parts.launch").Launches(), planes, group, config=config,
            **others,
        )  # fmt: skip
        planes = torch.cat(planes, dim=1)
        length = p.x.shape[1]
        return planes[..., :length].cpu(), planes[..., length:].cpu(), moments[..., :length].cpu()

    return run


def assert_planes(got, problem):
    planes, pads, moments = got
    wanted = planes_in_float64(problem)
    assert planes.shape == wanted.shape and planes.dtype == problem.x.dtype
    error = relative_error(planes, wanted)
    assert error <= STAGE_BUDGET[problem.x.dtype], f"relative error {error:.2e}"
    assert pads.count_nonzero() == 0
    wanted = moments_in_float64(problem.x, problem.eps)
    if problem.direction == "incoming":
        wanted = wanted.transpose(-1, -2)
    for got, one in zip(moments.unbind(1), wanted.unbind(1), strict=True):
        assert (got - one).norm() <= 1e-6 * one.norm()


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


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("block_k", [16, 32, 64])
@pytest.mark.parametrize("channels", [48, 64])
def test_channels_whole_or_in_blocks(stage, submodule, channels, block_k, descriptors):
    config = submodule("triton_parts.settings").LaunchConfig(32, 32, block_k, 4, 2, descriptors)
    problem = make_problem(10, channels, 32, mask="soft", batch=2, direction="incoming")
    assert_planes(stage(problem, config), problem)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("channels", [5, 48, 64, 128, 200])
def test_held_rows(stage, submodule, channels, descriptors):
    block_k = 64 if channels <= 64 else 128 if channels <= 128 else 256
    settings = submodule("triton_parts.settings")
    config = settings.LaunchConfig(32, 16, block_k, 4, 2, descriptors, True)
    problem = make_problem(6, channels, 16, dtype=torch.float16, mask="soft", batch=2)
    assert_planes(stage(problem, config), problem)


def test_held_rows_of_float32_are_refused(stage, submodule):
    config = submodule("triton_parts.settings").LaunchConfig(32, 16, 32, 4, 2, True, True)
    with pytest.raises(ValueError, match="a held operand is of 16-bit rows"):
        stage(make_problem(4, 32), config)


@pytest.mark.parametrize("descriptors, held", [(False, False), (True, False), (True, True)])
def test_groups_of_channels_are_the_whole(stage, submodule, on_triton, descriptors, held):
    config = submodule("triton_parts.settings").LaunchConfig(32, 16, 32, 4, 2, descriptors, held)
    problem = make_problem(5, 32, 48, dtype=torch.bfloat16, mask="soft", biases=True)
    planes, _, moments = stage(problem, config)
    for first, size in ((0, 16), (16, 32)):
        given = torch.nn.functional.pad(moments, (0, 11)).to(on_triton)
        for read in (None, given):
            group, pads, kept = stage(
                problem, config, group=(first, size), moments=None if read is None else read
            )
            left, right = planes.chunk(2, dim=1)
            wanted = [half[:, first : first + size] for half in (left, right)]
            assert torch.equal(group, torch.cat(wanted, dim=1))
            assert pads.count_nonzero() == 0 and torch.equal(kept, moments)


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("real", [None, 18])
@pytest.mark.parametrize("descriptors, held", [(False, False), (True, True)])
def test_some_rows_are_those_of_the_whole(
    submodule, on_triton, descriptors, held, direction, real
):
    """Rows of x are rows of the planes, and for "incoming" their columns; the bits are the same."""
    config = submodule("triton_parts.settings").LaunchConfig(32, 16, 32, 4, 2, descriptors, held)
    p = make_problem(21, 32, dtype=torch.bfloat16, mask="soft", direction=direction, batch=2)
    p = p.to(on_triton)
    lengths = None
    if real is not None:
        lengths = torch.tensor([real, 21], dtype=torch.int32, device=on_triton)

    def planes_of(rows):
        call = as_call(submodule("_call"), p, lengths=lengths)
        call = call._replace(x=p.x[:, rows], mask=p.mask[:, rows])
        a, b = planes_like(submodule, call.x, direction, 32)
        moments = submodule("fused_dual_gemm").fused_dual_gemm_fwd(
            call, submodule("triton_parts.launch").Launches(), (a, b), config=config,
            first_row=rows.start,
        )  # fmt: skip
        count = rows.stop - rows.start
        parts = (a, b, moments) if direction == "outgoing" else [
            part[..., :count].transpose(-1, -2) for part in (a, b, moments)
        ]  # fmt: skip
        if direction == "incoming":
            assert a[..., count:].count_nonzero() == b[..., count:].count_nonzero() == 0
        return [part[..., :21].cpu() for part in parts]

    whole = planes_of(slice(0, 21))
    for rows in (slice(0, 2), slice(2, 19), slice(19, 21)):
        for part, all_rows in zip(planes_of(rows), whole, strict=True):
            assert torch.equal(part, all_rows[:, :, rows])


@pytest.mark.parametrize("length", [3, 16, 37])
def test_positions_are_divided_without_division(stage, submodule, length):
    """Each position's row and column, also where a tile spans many rows."""
    problem = make_problem(length, 16, batch=2)
    x = problem.x
    x[:] = torch.arange(x[..., 0].numel()).reshape(x[..., 0].shape)[..., None] * 1e-2
    x[..., 0] = 0
    config = submodule("triton_parts.settings").LaunchConfig(128, 16, 16, 4, 2)
    _, _, moments = stage(problem, config)
    assert torch.allclose(moments[:, 0], x.mean(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("descriptors", [False, True])
def test_projections_in_either_order_in_memory(stage, submodule, descriptors, on_triton):
    config = submodule("triton_parts.settings").LaunchConfig(32, 16, 32, 4, 2, descriptors)
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


def test_projections_with_rows_of_any_stride(stage):
    rows = make_problem(7, 24, 20)
    wide = torch.randn(40, 31)
    wide[:, 3:27] = rows.weights["p_in_weight"]
    rows.weights["p_in_weight"] = wide[:, 3:27]
    assert_planes(stage(rows), rows)


def test_pads_stay_zero_where_the_bias_is_not(stage):
    problem = make_problem(3, 16, biases=True)
    _, pads, _ = stage(problem)
    assert pads.numel() > 0 and pads.count_nonzero() == 0
