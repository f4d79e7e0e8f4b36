"""Stage 3 against float64, alone: gate, drop mask and residual, strided operands, pads ignored."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, as_call, make_problem, relative_error, seeded
from test_fused_dual_gemm import moments_in_float64

STAGE_BUDGET = {torch.bfloat16: 3.5e-3, torch.float16: 5e-4, torch.float32: 2e-6}


def make_product(problem, submodule):
    """A random product [B, D, L, pitch] whose padding columns are NaN."""
    batch, length = problem.x.shape[:2]
    hidden = problem.weights["p_out_weight"].shape[1]
    generator = seeded(1)
    pitch = submodule("triton_parts.tiles").padded_pitch(length)
    product = torch.full((batch, hidden, length, pitch), float("nan"), dtype=problem.x.dtype)
    values = torch.randn(batch, hidden, length, length, generator=generator) * 3 + 1
    product[..., :length] = values.to(problem.x.dtype)
    return product


def out_in_float64(problem, product):
    w = {name: value.double() for name, value in problem.weights.items()}
    bias = {name: value.double() for name, value in problem.biases.items()}
    x = problem.x.double()
    t = product[..., : x.shape[1]].double().movedim(1, -1)
    t = F.layer_norm(t, t.shape[-1:], w["norm_out_weight"], w["norm_out_bias"], problem.eps)
    z = F.layer_norm(x, x.shape[-1:], w["norm_in_weight"], w["norm_in_bias"], problem.eps)
    delta = F.linear(t, w["p_out_weight"], bias.get("p_out_bias"))
    delta = delta * torch.sigmoid(F.linear(z, w["g_out_weight"], bias.get("g_out_bias")))
    if problem.drop_mask is not None:
        delta = delta * problem.drop_mask.double()
    return delta if problem.residual is None else problem.residual.double() + delta


def assert_out(submodule, device, problem, config=None, by_rows=False):
    """`by_rows`: a product whose channels follow each other within a row, not plane by plane."""
    product = make_product(problem, submodule)
    p = problem.to(device)
    given = product.to(device)
    if by_rows:
        given = given.transpose(1, 2).contiguous().transpose(1, 2)
    out = torch.empty(p.x.shape, dtype=p.x.dtype, device=device)
    submodule("fused_ln_residual").fused_ln_residual_fwd(
        as_call(submodule("_call"), p), submodule("triton_parts.launch").Launches(), given,
        moments_in_float64(p.x, p.eps).float(), out, config=config,
    )  # fmt: skip
    error = relative_error(out, out_in_float64(problem, product))
    assert error <= STAGE_BUDGET[problem.x.dtype], f"relative error {error:.2e}"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_out(submodule, on_triton, dtype, residual):
    problem = make_problem(18, 32, dtype=dtype, residual=residual, drop_mask=residual, batch=2)
    assert_out(submodule, on_triton, problem)


@pytest.mark.parametrize("residual, drop_mask", [(True, False), (False, True)])
def test_residual_and_drop_mask_apart(submodule, on_triton, residual, drop_mask):
    problem = make_problem(13, 16, residual=residual, drop_mask=drop_mask)
    assert_out(submodule, on_triton, problem)


@pytest.mark.parametrize("channels, hidden", [(48, 24), (24, 72), (5, 3), (1, 1)])
def test_widths(submodule, on_triton, channels, hidden):
    problem = make_problem(5, channels, hidden, biases=True, residual=True)
    assert_out(submodule, on_triton, problem)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("block_k", [16, 32, 64])
@pytest.mark.parametrize("channels, hidden", [(48, 64), (64, 48)])
def test_channels_in_blocks(submodule, on_triton, channels, hidden, block_k, descriptors):
    config = submodule("triton_parts.settings").LaunchConfig(32, 32, block_k, 4, 2, descriptors)
    problem = make_problem(9, channels, hidden, residual=True, batch=2)
    assert_out(submodule, on_triton, problem, config)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("channels, hidden", [(5, 5), (48, 64), (64, 64), (64, 40), (128, 128)])
def test_held_rows(submodule, on_triton, channels, hidden, descriptors):
    config = submodule("triton_parts.settings").LaunchConfig(32, 128, 32, 4, 2, descriptors, True)
    problem = make_problem(
        7, channels, hidden, dtype=torch.float16, residual=True, drop_mask=True, biases=True
    )
    assert_out(submodule, on_triton, problem, config)


def test_held_rows_of_float32_are_refused(submodule, on_triton):
    config = submodule("triton_parts.settings").LaunchConfig(32, 32, 32, 4, 2, True, True)
    with pytest.raises(ValueError, match="a held operand is of 16-bit rows"):
        assert_out(submodule, on_triton, make_problem(4, 16), config)


@pytest.mark.parametrize("descriptors, held", [(False, False), (True, False), (True, True)])
def test_a_product_of_any_strides(submodule, on_triton, descriptors, held):
    config = submodule("triton_parts.settings").LaunchConfig(32, 32, 16, 4, 2, descriptors, held)
    problem = make_problem(18, 32, dtype=torch.float16, batch=2)
    assert_out(submodule, on_triton, problem, config, by_rows=True)


def test_some_rows_alone_and_in_the_memory_of_the_residual(submodule, on_triton):
    """A slice of the rows of every operand gives its rows; the residual may be overwritten."""
    problem = make_problem(18, 32, residual=True, batch=1)
    product = make_product(problem, submodule).to(on_triton)
    p = problem.to(on_triton)
    moments = moments_in_float64(p.x, p.eps).float()

    def run(rows=None, **others):
        call = as_call(submodule("_call"), p, **others)
        out = p.residual if call.inplace else torch.full_like(p.x, 7.0)
        submodule("fused_ln_residual").fused_ln_residual_fwd(
            call, submodule("triton_parts.launch").Launches(), product, moments, out, rows
        )
        return out

    whole, some = run(), run(slice(5, 11))
    assert relative_error(some[:, 5:11], whole[:, 5:11].double().cpu()) <= 1e-6
    assert bool((some[:, :5] == 7).all()) and bool((some[:, 11:] == 7).all())
    assert torch.equal(run(inplace=True), whole)


def test_a_call_on_some_rows(submodule, on_triton):
    """x begins at a row of its sequence; the drop mask has a value for each row, not column."""
    problem = make_problem(18, 16, residual=True)
    problem.drop_mask = torch.rand(1, 18, 1, 16, generator=seeded(2)).round() * 2
    product = make_product(problem, submodule)
    rows, real = slice(5, 18), 14
    wanted = out_in_float64(problem, product)
    wanted[:, real:] = problem.residual[:, real:].double()
    wanted[:, :, real:] = problem.residual[:, :, real:].double()
    p, stage = problem.to(on_triton), submodule("fused_ln_residual")
    moments = moments_in_float64(p.x, p.eps).float()[:, :, rows]
    lengths = torch.tensor([real], dtype=torch.int32, device=on_triton)
    for run in (stage.fused_ln_residual_fwd, stage.fused_ln_residual_by_steps):
        residual = p.residual[:, rows].clone()
        call = as_call(submodule("_call"), p, lengths=lengths, inplace=True)._replace(
            x=p.x[:, rows], residual=residual, drop_mask=p.drop_mask[:, rows]
        )
        launches = submodule("triton_parts.launch").Launches()
        some = product.to(on_triton)[:, :, rows]
        run(call, launches, some, moments, residual, first_row=rows.start)
        assert relative_error(residual, wanted[:, rows]) <= STAGE_BUDGET[torch.float32]


def test_strided_residual_and_expanded_drop_mask(submodule, on_triton):
    problem = make_problem(6, 16)
    problem.residual = torch.randn(1, 16, 6, 6).permute(0, 2, 3, 1)
    problem.drop_mask = torch.tensor([0.5]).expand(1, 1, 6, 16)
    assert_out(submodule, on_triton, problem)

