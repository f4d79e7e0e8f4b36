"""The backward of the transition's gated unit against float64, alone."""

import math

import pytest
import torch
from helpers import DTYPES, relative_error, room, seeded

# One rounding of each result.
STAGE_BUDGET = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4, torch.float32: 1e-6}


def operands(rows, channels, hidden, dtype):
    """G [M, C], Wd [C, H] and [p, u] [M, 2H]."""
    generator = seeded()
    shapes = (rows, channels), (channels, hidden), (rows, 2 * hidden)
    grad, down, pair = (torch.randn(shape, generator=generator) for shape in shapes)
    return grad.to(dtype), (down * channels**-0.5).to(dtype), (pair * 2 + 0.3).to(dtype)


def in_float64(grad, down, pair):
    """dp, du and h [M, H] by autograd."""
    p, u = (half.double().requires_grad_() for half in pair.chunk(2, dim=1))
    h = torch.nn.functional.silu(p) * u
    grads = torch.autograd.grad(h, (p, u), grad.double() @ down.double())
    return [*grads, h.detach()]


@pytest.fixture
def stage(submodule, on_triton):
    """stage(grad, down, pair, config=None): dp, du and h; nothing is written beyond the rows."""
    subject = submodule("triton_path.swiglu_backward")

    def run(grad, down, pair, config=None, with_hidden=True):
        rows, hidden = len(grad), down.shape[1]
        grad, turned = grad.to(on_triton), down.t().contiguous().to(on_triton)
        memory = [
            torch.full((rows + 200, width), math.nan, dtype=grad.dtype, device=on_triton)
            for width in (2 * hidden, hidden)
        ]
        memory[0][:rows] = pair.to(on_triton)
        made = memory[1][:rows] if with_hidden else None
        pair = memory[0][:rows]
        prepared = subject.prepare_swiglu_bwd(grad, turned, pair, made, "fp32", config)
        subject.swiglu_bwd(grad, turned, pair, made, prepared)
        assert all(some[rows:].isnan().all() for some in memory)
        gradients = memory[0][:rows].cpu().chunk(2, dim=1)
        return [*gradients, memory[1][:rows].cpu()] if with_hidden else [*gradients]

    return run


@pytest.fixture
def config_of(submodule):
    return submodule("triton_parts.settings").LaunchConfig


def assert_stage(got, grad, down, pair):
    wanted_ones = in_float64(grad, down, pair)
    for name, value, wanted in zip(("dp", "du", "h"), got, wanted_ones, strict=True):
        error = relative_error(value, wanted)
        assert value.dtype == grad.dtype
        limit = STAGE_BUDGET[grad.dtype] * room(value.numel())
        assert error <= limit, f"{name}: relative error {error:.2e}"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63, 65, 150])
def test_gradients_and_hidden(stage, dtype, rows):
    given = operands(rows, 32, 96, dtype)
    assert_stage(stage(*given), *given)


@pytest.mark.parametrize("channels, hidden", [
    (1, 1), (5, 3), (33, 65), (20, 16), (48, 200), (130, 40),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_widths(stage, channels, hidden, dtype):
    given = operands(70, channels, hidden, dtype)
    assert_stage(stage(*given), *given)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("block_n", [16, 32, 128])
@pytest.mark.parametrize("block_k", [16, 64])
def test_blocks(stage, config_of, block_n, block_k, descriptors):
    """C = 40 and H = 72 are no multiples of them; a tile is made in two halves."""
    given = operands(50, 40, 72, torch.float16)
    assert_stage(stage(*given, config_of(32, block_n, block_k, 4, 2, descriptors)), *given)


def test_without_hidden(stage):
    given = operands(40, 16, 24, torch.float16)
    got, wanted = stage(*given, with_hidden=False), stage(*given)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_gates_that_are_open_or_shut(stage):
    grad, down, pair = operands(40, 16, 24, torch.float32)
    pair[:, :24] *= 40  # exp of it overflows
    got = stage(grad, down, pair)
    assert all(bool(value.isfinite().all()) for value in got)
    assert_stage(got, grad, down, pair)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_equal_calls_give_equal_bits(stage, dtype):
    given = operands(70, 40, 48, dtype)
    first, second = stage(*given), stage(*given)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
