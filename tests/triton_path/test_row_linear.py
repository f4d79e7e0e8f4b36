"""The transition's second stage against float64, alone: bias, residual, lengths, blocks."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, relative_error, room, seeded

STAGE_BUDGET = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4, torch.float32: 1e-6}


def randn(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


@pytest.fixture
def stage(submodule, on_triton):
    """stage(rows, weight, ...): out [M, N]; nothing is written beyond the rows.

    `over`: the residual's memory takes the output.
    """
    subject = submodule("triton_path.row_linear")

    def run(
        rows, weight, bias=None, residual=None, lengths=None, first_row=0, config=None, over=False
    ):
        rows, weight, bias, residual, lengths = (
            None if value is None else value.to(on_triton)
            for value in (rows, weight, bias, residual, lengths)
        )
        shape = len(rows) + 200, len(weight)
        memory = torch.full(shape, math.nan, dtype=rows.dtype, device=on_triton)
        out = memory[: len(rows)]
        if over:
            out.copy_(residual.reshape(out.shape))
            residual = out.view(residual.shape)
        pairs = (1, 1) if residual is None else tuple(residual.shape[1:3])
        prepared = subject.prepare_row_linear(
            rows, weight, residual, pairs, "fp32", first_row, lengths is not None, config
        )
        subject.row_linear(rows, weight, bias, residual, lengths, out, prepared)
        assert memory[len(rows) :].isnan().all()
        return out.cpu()

    return run


@pytest.fixture
def config_of(submodule):
    return submodule("triton_parts.settings").LaunchConfig


def in_float64(rows, weight, bias=None, residual=None):
    out = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
    return out if residual is None else out + residual.double().reshape(out.shape)


def assert_out(got, *given):
    error = relative_error(got, in_float64(*given))
    assert got.dtype == given[0].dtype
    assert error <= STAGE_BUDGET[got.dtype] * room(got.numel()), f"relative error {error:.2e}"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
def test_out(stage, dtype, with_bias, with_residual):
    rows, weight = randn(2 * 5 * 13, 96, dtype=dtype), randn(32, 96, dtype=dtype, seed=1)
    bias = randn(32, dtype=torch.float32, seed=2) if with_bias else None
    residual = randn(2, 5, 13, 32, dtype=dtype, seed=3) if with_residual else None
    given = rows, weight, bias, residual
    assert_out(stage(*given), *given)


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 200])
def test_numbers_of_rows(stage, rows):
    given = randn(rows, 24), randn(16, 24, seed=1)
    assert_out(stage(*given), *given)


@pytest.mark.parametrize("width, channels", [
    (1, 1), (3, 5), (9, 2), (65, 33), (16, 20), (200, 48), (40, 130),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_widths(stage, width, channels, dtype):
    rows, weight = randn(70, width, dtype=dtype), randn(channels, width, dtype=dtype, seed=1)
    bias = randn(channels, dtype=torch.bfloat16, seed=2)
    given = rows, weight, bias, randn(7, 1, 10, channels, dtype=dtype, seed=3)
    assert_out(stage(*given), *given)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("block_n", [16, 32, 128])
@pytest.mark.parametrize("block_k", [16, 64])
def test_blocks(stage, config_of, block_n, block_k, descriptors):
    """K = 72 and N = 40 are no multiples of them; a tile's columns are cut into up to four."""
    given = randn(50, 72), randn(40, 72, seed=1), randn(40, seed=2), randn(1, 1, 50, 40, seed=3)
    config = config_of(32, block_n, block_k, 4, 2, descriptors)
    assert_out(stage(*given, config=config), *given)


LAYOUTS = {
    "axes swapped": lambda v: v.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda v: v.movedim(-1, 0).contiguous().movedim(0, -1),
    "sliced channels": lambda v: F.pad(v, (3, 2), value=99.0)[..., 3:-2],
    "every other row": lambda v: v.repeat_interleave(2, dim=1)[:, ::2],
    "one for all": lambda v: v[:1, :1].expand(v.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("descriptors", [False, True])
def test_strides_of_the_residual(stage, config_of, layout, descriptors):
    residual = LAYOUTS[layout](randn(3, 5, 7, 24, seed=3))
    given = randn(3 * 5 * 7, 32), randn(24, 32, seed=1), None, residual
    assert_out(stage(*given, config=config_of(32, 32, 16, 4, 2, descriptors)), *given)


@pytest.mark.parametrize("layout", ["padded rows", "odd rows", "one row for all"])
def test_weights_whose_rows_lie_apart(stage, config_of, layout):
    weight = randn(24, 32, seed=1)
    weight = {
        "padded rows": F.pad(weight, (0, 8))[:, :32],
        "odd rows": F.pad(weight, (3, 4))[:, 3:-4],
        "one row for all": weight[:1].expand(24, 32),
    }[layout]
    given = randn(60, 32), weight
    assert_out(stage(*given, config=config_of(32, 32, 16, 4, 2, True)), *given)


@pytest.mark.parametrize("channels", [24, 80])
def test_over_the_residual(stage, config_of, channels):
    """With several tiles of columns too."""
    given = randn(105, 32), randn(channels, 32, seed=1), None, randn(3, 5, 7, channels, seed=3)
    config = config_of(32, 32, 16, 4, 2)
    assert torch.equal(stage(*given, config=config, over=True), stage(*given, config=config))


@pytest.mark.parametrize("residual", ["none", "given", "over"])
@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("first", [0, 3])
def test_lengths(stage, config_of, residual, descriptors, first):
    """A row of padding is its residual, or 0, though its operands are NaN."""
    lengths = torch.tensor([9, 4, 0, 1, 7])
    residues = torch.arange(9) < lengths[:, None]
    within = (residues[:, :, None] & residues[:, None, :])[:, first:].flatten()
    rows = torch.where(within[:, None], randn(len(within), 32), math.nan)
    weight, bias = randn(24, 32, seed=1), randn(24, seed=2)
    given = None if residual == "none" else randn(5, 9 - first, 9, 24, seed=3)
    # Without a residual the launch still has to know where the pairs are.
    config = config_of(16, 32, 16, 4, 2, descriptors)
    shaped = torch.zeros(5, 9 - first, 9, 24, dtype=rows.dtype) if given is None else given
    got = stage(
        rows, weight, bias, shaped, lengths.int(), first, config, over=residual == "over"
    )
    left = shaped.view(-1, 24)
    assert torch.equal(got[~within], left[~within])
    assert_out(got[within], rows[within], weight, bias, left[within])


def test_lengths_without_a_residual(submodule, on_triton):
    subject = submodule("triton_path.row_linear")
    rows, weight = randn(2 * 5 * 5, 32).to(on_triton), randn(24, 32, seed=1).to(on_triton)
    lengths = torch.tensor([3, 5], dtype=torch.int32, device=on_triton)
    out = torch.full((50, 24), math.nan, dtype=rows.dtype, device=on_triton)
    prepared = subject.prepare_row_linear(rows, weight, None, (5, 5), "fp32")
    subject.row_linear(rows, weight, None, None, lengths, out, prepared)
    wanted = in_float64(rows.cpu(), weight.cpu()).view(2, 5, 5, 24)
    wanted[0, 3:] = wanted[0, :, 3:] = 0
    assert out.view(2, 5, 5, 24)[0, 3:].count_nonzero() == 0
    assert relative_error(out, wanted.view(50, 24)) <= STAGE_BUDGET[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_equal_calls_give_equal_bits(stage, dtype):
    given = randn(70, 40, dtype=dtype), randn(48, 40, dtype=dtype, seed=1)
    assert torch.equal(stage(*given), stage(*given))
