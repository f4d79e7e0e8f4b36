"""The Hopper variant of dx: which calls it takes; on a GPU that runs it, beside float64."""

import json

import pytest
import torch
from fresh_process import python_output
from helpers import assert_no_worse, seeded

pytest.importorskip("triton")
BF16 = torch.bfloat16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
pytestmark = [pytest.mark.kernels_ci, pytest.mark.usefixtures("watched")]

# In a process without TRITON_INTERPRET: what a setting of the variant gives, by case.
TAKEN = """
import json, torch
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule

package = load_kernel(find_root())
stage, device = submodule(package, "triton_path.input_backward"), submodule(
    package, "triton_parts.device"
)
config = submodule(package, "triton_parts.settings").LaunchConfig
config = config(128, 256, 64, num_warps=4, num_stages=4, split=6, kernel="hopper")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def taken(
    x=None, channels=256, hidden=256, gated=True, padded=False, dtype=torch.bfloat16,
    weight_dtype=None, target="sm_90",
):
    x = empty(40, 48, channels, dtype=dtype) if x is None else x
    rows = x.shape[0] * x.shape[1]
    pair = empty(rows, 4 * hidden, dtype=dtype)
    gate = empty(rows, channels, dtype=dtype) if gated else None
    moments = empty(2, *x.shape[:2], dtype=torch.float32)
    weights = [empty(2 * hidden, channels, dtype=weight_dtype or dtype) for _ in range(2)]
    if gated:
        weights.append(empty(channels, channels, dtype=weight_dtype or dtype))
    with device.standing_in(device.target_of(target, "any", 132)):
        try:
            launch = stage.prepare_input_bwd(
                pair, gate, x, moments, tuple(weights), "bf16", config, 0, padded
            )
        except ValueError as error:
            assert "setting must be of one of ['']" in str(error)
            return None
    assert launch.variant == "hopper" and launch.stage == "input_bwd"
    return launch.programs


print(json.dumps({
    "triangle": taken(),
    "narrow": taken(channels=128, hidden=128),
    "more hidden channels": taken(channels=128, hidden=256),
    "fewer hidden channels": taken(hidden=128),
    "a step of each projection": taken(channels=128, hidden=32),
    "transition": taken(hidden=512, gated=False),
    "rows along one axis": taken(empty(40 * 48, 1, 256)),
    "one row": taken(empty(1, 48, 512)[..., :256]),
    "channels apart": taken(empty(40, 48, 512)[..., :256]),
    "ragged hidden channels": taken(hidden=144),
    "axes exchanged": taken(empty(40, 48, 256).transpose(0, 1)),
    "rows apart": taken(empty(40, 60, 256)[:, :48]),
    "unaligned": taken(empty(40, 48, 260)[..., :256]),
    "padded": taken(padded=True),
    "other width": taken(channels=192),
    "wide": taken(channels=512),
    "float16": taken(dtype=torch.float16),
    "float32": taken(dtype=torch.float32),
    "float32 weights": taken(weight_dtype=torch.float32),
    "another GPU": taken(target="sm_100"),
}))
"""
WANTED = {
    "triangle": 30, "narrow": 30, "more hidden channels": 30, "fewer hidden channels": 30,
    "a step of each projection": 30,
    "transition": 30, "rows along one axis": 30, "one row": 1, "channels apart": 30,
}  # fmt: skip


def test_what_it_takes():
    """With a program for each tile of 64 rows where they are few; the rest is left to the plain."""
    found = json.loads(python_output(TAKEN))
    assert {name: programs for name, programs in found.items() if programs is not None} == WANTED
    assert len(found) == 20


@pytest.fixture
def setting(submodule):
    """By channels: 64 rows and 128 rows a consumer."""
    made = submodule("triton_parts.settings").LaunchConfig
    return {
        256: made(128, 256, 64, num_warps=4, num_stages=4, split=6, kernel="hopper"),
        128: made(256, 128, 64, num_warps=4, num_stages=4, split=5, kernel="hopper"),
    }


class Problem:
    """dp, dg, dq, x [R, L, C] with its moments, and parameters."""

    def __init__(self, rows, columns, channels, hidden, gated, norm_dtype=torch.float32):
        generator = seeded(channels + rows)

        def randn(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).cuda()

        width = 2 * hidden
        self.pair = randn(rows * columns, 2 * width).to(BF16)
        self.gate = randn(rows * columns, channels).to(BF16) if gated else None
        self.x = (randn(rows, columns, channels) + randn(rows, columns, 1)).to(BF16)
        x = self.x.double()
        rstd = torch.rsqrt(x.var(-1, correction=0) + 1e-5)
        self.moments = torch.stack([x.mean(-1), rstd]).float()
        bundle = randn(2 * width, channels, scale=channels**-0.5).to(BF16)
        self.weights = tuple(bundle.chunk(2))
        if gated:
            self.weights += (randn(channels, channels, scale=channels**-0.5).to(BF16),)
        self.norm = None
        if norm_dtype is not None:
            self.norm = (1 + randn(channels, scale=0.2)).to(norm_dtype)

    def run(self, stage, config, over_gate=False):
        """dx, by a setting, or by the shipped one of the plain kernel, in the memory of dq."""
        pair, gate, x, moments = self.pair, self.gate, self.x, self.moments
        out = torch.full(x.shape, torch.nan, dtype=BF16, device="cuda")
        if over_gate:
            gate = out.copy_(gate.view(out.shape)).view(gate.shape)
        prepared = stage.prepare_input_bwd(pair, gate, x, moments, self.weights, "bf16", config)
        assert (prepared.variant == "hopper") == (config is not None)
        stage.input_bwd(pair, gate, x, moments, self.weights, self.norm, out, prepared)
        return out

    def exact(self):
        grads = *self.pair.double().chunk(2, dim=1), self.gate
        scaled = sum(
            grad.double() @ weight.double()
            for grad, weight in zip(grads, self.weights, strict=False)
        )
        if self.norm is not None:
            scaled = scaled * self.norm.double()
        mean, rstd = self.moments.double().flatten(1)[..., None]
        hat = (self.x.double().reshape(scaled.shape) - mean) * rstd
        along = hat * (scaled * hat).mean(1, keepdim=True)
        grad = rstd * (scaled - scaled.mean(1, keepdim=True) - along)
        return grad.view(self.x.shape).cpu()


PROBLEMS = {
    "whole tiles": (16, 64, 256, 256, True),
    "one pair": (1, 1, 256, 256, True),
    "a tile and a pair": (1, 65, 128, 128, True),
    "ragged rows": (7, 77, 256, 256, True),
    "many tiles": (150, 257, 256, 256, True),
    "many tiles, narrow": (300, 257, 128, 128, True),
    "fewer hidden channels": (30, 50, 256, 128, True),
    "a step of each projection": (9, 40, 128, 32, True),
    "bfloat16 norm": (9, 40, 128, 256, True, BF16),
    "no norm weight": (9, 40, 256, 256, True, None),
    "transition": (20_000, 1, 256, 512, False),
    "transition, narrow": (40_001, 1, 128, 256, False),
}


@on_hopper
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_worse_than_the_plain_kernel(submodule, setting, name):
    stage, hopper = submodule("triton_path.input_backward"), submodule("hopper")
    problem = Problem(*PROBLEMS[name])
    config = setting[problem.x.shape[2]]
    got = problem.run(stage, config)
    assert torch.equal(got, problem.run(stage, config))
    if problem.gate is not None:
        assert torch.equal(got, problem.run(stage, config, over_gate=True))
    with hopper.without_variants():
        plain = problem.run(stage, None)
    assert_no_worse([(got, plain, problem.exact())], 1.0)


@on_hopper
def test_strides(submodule, setting):
    """Channels of x apart, and moments with their axes exchanged, as incoming."""
    stage, problem = submodule("triton_path.input_backward"), Problem(20, 33, 256, 256, True)
    wanted = problem.run(stage, setting[256])
    problem.x = torch.cat([problem.x, problem.x], dim=-1)[..., :256]
    problem.moments = problem.moments.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(problem.run(stage, setting[256]), wanted)


@on_hopper
@pytest.mark.parametrize("far", [0.0, 1e3, 1e20, 1e25])
def test_rows_far_from_zero(submodule, setting, far):
    """And constant ones, whose x^ is 0 to the last bit."""
    stage, hopper = submodule("triton_path.input_backward"), submodule("hopper")
    problem = Problem(5, 40, 128, 128, True)
    x = problem.x.float() * max(1.0, far) + far
    x[:, ::2] = far
    problem.x = x.to(BF16)
    mean = problem.x.double().mean(-1)
    var = problem.x.double().var(-1, correction=0)
    problem.moments = torch.stack([mean, torch.rsqrt(var + 1e-5)]).float()
    got = problem.run(stage, setting[128])
    with hopper.without_variants():
        plain = problem.run(stage, None)
    assert_no_worse([(got, plain, problem.exact())], 1.0)
