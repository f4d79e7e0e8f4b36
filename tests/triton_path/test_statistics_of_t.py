"""The variance of t in stage 3, forward in one pass and backward in two: docs/numerics.md."""

import math

import pytest
import torch
from helpers import as_call, make_problem, seeded

LENGTH, WIDTH = 8, 256
EPS_OF_FLOAT32 = 2.0**-24
RATIOS = (0.0, 1.0, 1e2, 1e3, 1e4, 1e5)  # of t's mean^2 to its variance


def product_of(ratio: float, dtype: torch.dtype) -> torch.Tensor:
    """t [1, D, L, pitch] of deviation 1 about a mean of either sign."""
    t = torch.randn(1, WIDTH, LENGTH, 16, generator=seeded(1))
    signs = torch.randn(1, 1, LENGTH, 16, generator=seeded(2)).sign()
    return (t + math.sqrt(ratio) * signs).to(dtype)


@pytest.fixture
def deviations(submodule, on_triton):
    """deviations(ratio, dtype): relative errors of 1 / deviation, forward and backward, by row."""
    settings = submodule("triton_parts.settings")
    forward = submodule("fused_ln_residual")
    backward = submodule("triton_path.fused_ln_residual_backward")

    def measure(ratio: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        problem = make_problem(LENGTH, WIDTH, dtype=dtype)
        # The output is the normalised t: no gate, and no projection.
        problem.weights |= {
            "norm_out_weight": torch.ones(WIDTH), "norm_out_bias": torch.zeros(WIDTH),
            "p_out_weight": torch.eye(WIDTH, dtype=dtype),
            "g_out_weight": torch.zeros(WIDTH, WIDTH, dtype=dtype),
        }  # fmt: skip
        problem.biases = {"g_out_bias": torch.full((WIDTH,), 40.0)}
        call = as_call(submodule("_call"), problem.to(on_triton))
        t = product_of(ratio, dtype).to(on_triton)
        moments = torch.ones(1, 2, LENGTH, LENGTH, device=on_triton)
        out = torch.empty_like(call.x)
        held = settings.LaunchConfig(64, WIDTH, 32, 4, 2, False, True)
        launches = submodule("triton_parts.launch").Launches()
        forward.fused_ln_residual_fwd(call, launches, t, moments, out, config=held)

        rows = backward.Rows(t[0], call.x[0], moments[0], torch.ones_like(out)[0], None)
        # As of the means of the norm's backward, to which nothing here is compared.
        means = torch.zeros(WIDTH, device=on_triton), None
        statistics = torch.empty(5, LENGTH * LENGTH, device=on_triton)
        prepared = backward.prepare_ln_residual_bwd(
            rows, call.weights, (problem.eps, problem.eps), "fp32", frozenset({"rows"})
        )
        backward.fused_ln_residual_bwd(
            rows, call.weights, means, prepared,
            backward.Stage3Gradients(None, None, statistics, None, None),
        )  # fmt: skip

        values = t[0, :, :, :LENGTH].double().cpu().reshape(WIDTH, -1)
        wanted = (values.var(0, unbiased=False) + problem.eps).rsqrt()
        hat = (values - values.mean(0)) * wanted
        # The roundings of many channels cancel.
        of_forward = (out.double().cpu().view(-1, WIDTH) * hat.T).sum(1) / (hat.T**2).sum(1)
        return of_forward - 1, statistics[2].double().cpu() / wanted - 1

    return measure


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", RATIOS)
def test_both_are_as_exact_as_stated(deviations, ratio, dtype):
    """The forward loses what cancels between two squares in fp32; the backward loses nothing."""
    of_forward, of_backward = deviations(ratio, dtype)
    assert float(of_backward.abs().max()) <= 4 * EPS_OF_FLOAT32
    # Half of the variance's relative error is that of its root. The rest is the output's rounding.
    limit = 2 * EPS_OF_FLOAT32 * (1 + ratio) + torch.finfo(dtype).eps / 4
    assert float(of_forward.abs().max()) <= limit
