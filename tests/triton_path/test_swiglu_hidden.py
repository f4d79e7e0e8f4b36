"""The transition's first stage against float64, alone: h, or p, u, x^ and the moments of x."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, relative_error
from transitions import BIASES, as_transition, make_transition, poisoned

# Roundings of the normalised operand and of the result, in relative L2.
STAGE_BUDGET = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4, torch.float32: 2e-6}
MOMENTS_BUDGET = 1e-6


def in_float64(problem):
    """h, p and u [M, H], and x^ [M, C], by the formulas in the stage's docstring."""
    w = {name: value.double() for name, value in (problem.weights | problem.biases).items()}
    x = problem.x.double().flatten(0, -2)
    hat = F.layer_norm(x, x.shape[-1:], eps=problem.eps)
    z = hat * w["norm_weight"] + w["norm_bias"]
    p = F.linear(z, w["gate_weight"], w.get("gate_bias"))
    u = F.linear(z, w["up_weight"], w.get("up_bias"))
    return F.silu(p) * u, p, u, hat


def moments_in_float64(problem):
    """[2, M]: an fp32 row's mean is that of x - its first channel."""
    rows = problem.x.double().flatten(0, -2)
    variance = rows.var(-1, unbiased=False)
    if problem.x.dtype == torch.float32:
        rows = rows - rows[:, :1]
    return torch.stack([rows.mean(-1), (variance + problem.eps).rsqrt()])


def nans(*shape, dtype, device):
    return torch.full(shape, math.nan, dtype=dtype, device=device)


@pytest.fixture
def stage(submodule, on_triton):
    """stage(problem, config=None, projections=False, rows=None): what the stage writes.

    h [M, H]; or [p, u] [M, 2H], x^ and the moments. `rows` are those of x [B, I, J, C] to take.
    NaN is what was not written; nothing is written beyond the rows.
    """

    def run(problem, config=None, projections=False, rows=slice(None)):
        call = as_transition(submodule("_call"), problem.to(on_triton))
        call = call._replace(x=call.x[:, rows])
        count = call.x.shape[:3].numel()
        like = {"dtype": call.x.dtype, "device": call.x.device}
        width = 2 * call.hidden if projections else call.hidden
        out = [nans(count + 200, width, **like)]
        others = [None, None]
        if projections:
            moments = nans(2, count, dtype=torch.float32, device=on_triton)
            out += [nans(count + 200, call.x.shape[3], **like)]
            others = [moments, out[1][:count]]
        submodule("triton_path.swiglu_hidden").swiglu_hidden(
            call, submodule("triton_parts.launch").Launches(), out[0][:count], rows.start or 0,
            config, *others,
        )  # fmt: skip
        assert all(memory[count:].isnan().all() for memory in out)
        written = [memory[:count].cpu() for memory in out]
        return [*written, moments.cpu()] if projections else written[0]

    return run


@pytest.fixture
def config_of(submodule):
    return submodule("triton_parts.settings").LaunchConfig


def assert_hidden(got, problem):
    error = relative_error(got, in_float64(problem)[0])
    assert got.dtype == problem.x.dtype
    assert error <= STAGE_BUDGET[got.dtype], f"relative error {error:.2e}"


def assert_projections(got, problem):
    pair, hat, moments = got
    _, p, u, wanted_hat = in_float64(problem)
    assert pair.dtype == hat.dtype == problem.x.dtype
    of_p, of_u = pair.chunk(2, dim=1)
    for name, value, wanted in (("p", of_p, p), ("u", of_u, u), ("x^", hat, wanted_hat)):
        # Of one channel x^ is zero.
        error, size = (value - wanted).norm(), wanted.norm()
        assert error <= STAGE_BUDGET[pair.dtype] * size, f"{name}: error {error:.2e} of {size:.2e}"
    for value, wanted in zip(moments, moments_in_float64(problem), strict=True):
        assert (value - wanted).norm() <= MOMENTS_BUDGET * wanted.norm()


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biases", [(), BIASES])
def test_hidden_and_projections(stage, dtype, biases):
    problem = make_transition((2, 5, 13, 32), 96, dtype=dtype, biases=biases)
    assert_hidden(stage(problem), problem)
    assert_projections(stage(problem, projections=True), problem)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 129])
def test_numbers_of_rows(stage, rows):
    problem = make_transition((rows, 16), 24)
    assert_hidden(stage(problem), problem)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("given", [("gate_bias",), ("up_bias",)])
def test_one_bias(stage, given, bias_dtype):
    problem = make_transition(
        (30, 16), 24, dtype=torch.float16, biases=given, bias_dtype=bias_dtype
    )
    assert_hidden(stage(problem), problem)
    assert_projections(stage(problem, projections=True), problem)


@pytest.mark.parametrize("channels, hidden", [
    (1, 1), (2, 9), (5, 3), (20, 16), (33, 65), (48, 24), (72, 100), (130, 40), (200, 72),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_widths(stage, channels, hidden, dtype):
    problem = make_transition((7, 9, channels), hidden, dtype=dtype, biases=BIASES)
    assert_hidden(stage(problem), problem)
    assert_projections(stage(problem, projections=True), problem)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("block_k", [16, 32, 64])
@pytest.mark.parametrize("channels", [40, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_channels_whole_or_in_blocks(stage, config_of, channels, block_k, descriptors, dtype):
    """Of which none may divide the width."""
    config = config_of(32, 32, block_k, 4, 2, descriptors)
    problem = make_transition((2, 3, 11, channels), 48, dtype=dtype)
    assert_hidden(stage(problem, config), problem)
    assert_projections(stage(problem, config, projections=True), problem)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("channels", [5, 48, 64, 128, 200, 256, 384, 512])
def test_held_rows(stage, config_of, channels, descriptors):
    block_k = max(16, 1 << (channels - 1).bit_length())
    config = config_of(32, 16, block_k, 4, 2, descriptors, True)
    problem = make_transition((6, 11, channels), 32, dtype=torch.float16)
    assert_hidden(stage(problem, config), problem)
    assert_projections(stage(problem, config, projections=True), problem)


@pytest.mark.parametrize("descriptors, held", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("hidden", [96, 100])
def test_programs_that_share_the_channels(stage, config_of, descriptors, held, hidden):
    """Each computes what one would."""
    problem = make_transition((70, 32), hidden, dtype=torch.float16, biases=BIASES)
    config = config_of(32, 16, 32, 4, 2, descriptors, held)
    for projections in (False, True):
        wanted = stage(problem, config, projections)
        for split in (2, 3, 7, 100):
            shared = config_of(32, 16, 32, 4, 2, descriptors, held, split=split)
            got = stage(problem, shared, projections)
            for one, other in zip(got, wanted, strict=True):
                assert torch.equal(one, other)


LAYOUTS = {
    "axes swapped": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda v: v.movedim(-1, 0).contiguous().movedim(0, -1),
    "sliced channels": lambda v: F.pad(v, (3, 2), value=99.0)[..., 3:-2],
    "one row for all": lambda v: v[:, :1].expand(v.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("descriptors, held", [(False, False), (True, True)])
def test_strides_of_x(stage, config_of, layout, descriptors, held):
    config = config_of(32, 16, 32, 4, 2, descriptors, held)
    problem = make_transition((2, 5, 7, 32), 24, dtype=torch.float16)
    problem.x = LAYOUTS[layout](problem.x)
    assert_hidden(stage(problem, config), problem)
    assert_projections(stage(problem, config, projections=True), problem)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("layout", ["gate first", "up first", "apart", "odd rows", "one row"])
def test_where_the_projections_lie(stage, config_of, descriptors, layout, on_triton):
    config = config_of(32, 16, 32, 4, 2, descriptors)
    problem = make_transition((40, 32), 48, dtype=torch.float16)
    gate, up = (problem.weights[name] for name in ("gate_weight", "up_weight"))
    if layout == "odd rows":
        gate = F.pad(gate, (3, 4))[:, 3:-4]
    elif layout == "one row":
        up = up[:1].expand(up.shape)
    elif layout == "apart":
        gate, up = gate.clone(), up.clone()
    else:
        pair = torch.cat([gate, up] if layout == "gate first" else [up, gate]).to(on_triton)
        gate, up = pair.chunk(2) if layout == "gate first" else pair.chunk(2)[::-1]
    problem.weights |= {"gate_weight": gate, "up_weight": up}
    got = stage(problem, config)
    problem.weights |= {"gate_weight": gate.cpu(), "up_weight": up.cpu()}
    assert_hidden(got, problem)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_constant_rows_are_rows_of_zeros(stage, config_of, dtype, held):
    config = config_of(32, 16, 64, 4, 2, False, held)
    problem = make_transition((9, 48), 24, dtype=dtype)
    problem.x = torch.zeros_like(problem.x)
    wanted = stage(problem, config)
    constants = torch.tensor([1.0, 1000.0, -3e4, 6e4, 0.1, -1.0, 1e-6, 3.0, 333.0])
    problem.x = constants.to(dtype)[:, None].expand(9, 48).contiguous()
    assert torch.equal(stage(problem, config), wanted)


@pytest.mark.parametrize("descriptors, held", [(False, False), (True, True)])
@pytest.mark.parametrize("first", [0, 3])
def test_lengths(stage, config_of, descriptors, held, first):
    """Of several sequences in a tile; tiles of padding alone are not written.

    x is NaN in the padding, and begins with a row of its sequences.
    """
    problem = make_transition((5, 9, 9, 32), 48, dtype=torch.float16, lengths=(9, 4, 0, 1, 7))
    config = config_of(16, 16, 32, 4, 2, descriptors, held)
    wanted = in_float64(problem)[0].view(5, 9, 9, 48)[:, first:]
    # The stage takes `rows` of x.
    got = stage(poisoned(problem), config, rows=slice(first, 9)).view(wanted.shape)
    residues = torch.arange(9) < problem.lengths[:, None]
    within = (residues[:, :, None] & residues[:, None, :])[:, first:]
    error = relative_error(got[within], wanted[within])
    assert error <= STAGE_BUDGET[torch.float16], f"relative error {error:.2e}"
    rows = within.flatten()
    tiles = F.pad(rows, (0, -len(rows) % 16)).view(-1, 16).any(1)
    skipped = ~tiles.repeat_interleave(16)[: len(rows)]
    assert 0 < skipped.sum() < len(rows)
    assert got.view(-1, 48)[skipped].isnan().all()


@pytest.mark.parametrize("length", [3, 16, 37])
def test_rows_are_divided_without_division(stage, config_of, length):
    """Each row's place in x [B, R, J, C], also where a tile spans many."""
    problem = make_transition((3, 4, length, 16), 8)
    x = torch.arange(12.0 * length).reshape(3, 4, length)
    problem.x = (x[..., None] * 1e-2).repeat(1, 1, 1, 16)
    problem.x[..., 0] = 0
    problem.x = LAYOUTS["axes swapped"](problem.x)
    _, _, moments = stage(problem, config_of(128, 16, 16, 4, 2), projections=True)
    assert torch.allclose(moments[0], problem.x.flatten(0, 2).mean(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("projections", [False, True])
def test_equal_calls_give_equal_bits(stage, dtype, projections):
    problem = make_transition((2, 9, 11, 40), 48, dtype=dtype, biases=BIASES)
    for one, other in zip(*(stage(problem, None, projections) for _ in "ab"), strict=True):
        assert torch.equal(one, other)


def test_rows_alone_are_those_among_others(stage, config_of):
    """What a chunk makes doesn't depend on where it was cut."""
    problem = make_transition((1, 96, 1, 40), 48, dtype=torch.float16)
    config = config_of(32, 16, 64, 4, 2)
    whole = stage(problem, config)
    for rows in (slice(0, 32), slice(32, 96), slice(64, 65)):
        assert torch.equal(stage(problem, config, rows=rows), whole[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_of_odd_widths_with_descriptors(stage, config_of, dtype):
    """One row of hidden channels may be at any stride from the next, which is none.

    A descriptor would store up to 16 bytes beyond it.
    """
    problem = make_transition((1, 83), 83, dtype=dtype)
    config = config_of(16, 16, 16, 4, 2, True)
    assert_hidden(stage(problem, config), problem)
    assert_projections(stage(problem, config, projections=True), problem)
