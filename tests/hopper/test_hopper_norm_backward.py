"""The Hopper variant of dt: which calls it takes; on a GPU that runs it, beside float64."""

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

# In a process without TRITON_INTERPRET: the programs under a setting of the variant, by case.
TAKEN = """
import json, torch
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule

package = load_kernel(find_root())
stage, device = submodule(package, "triton_path.norm_backward"), submodule(
    package, "triton_parts.device"
)
config = submodule(package, "triton_parts.settings").LaunchConfig
config = config(128, 256, 64, num_warps=4, num_stages=1, split=4, kernel="hopper")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def taken(
    t=None, hidden=256, channels=None, length=48, dtype=torch.bfloat16, padded=False,
    with_hat=True, target="sm_90", weight_pitch=0,
):
    t = empty(hidden, 40, -(-length // 16) * 16, dtype=dtype) if t is None else t
    emit = empty(channels or hidden, hidden + weight_pitch, dtype=dtype)[:, :hidden]
    weights = submodule(package, "_call").Weights(*[None] * 8, emit, None, None, None)
    with device.standing_in(device.target_of(target, "any", 132)):
        try:
            launch = stage.prepare_norm_out_bwd(
                t, t, length, weights, "bf16", config, 0, padded, with_hat
            )
        except ValueError as error:
            assert "setting must be of one of ['']" in str(error)
            return None
    assert launch.variant == "hopper" and launch.stage == "norm_out_bwd"
    return launch.programs


print(json.dumps({
    "pairs in one row": taken(),
    "narrow": taken(hidden=128),
    "many tiles": taken(length=640),
    "padding columns": taken(length=50),
    "planes of a chunk": taken(empty(256, 90, 48)[:, 7:47]),
    "rows apart": taken(empty(256, 40, 64)[..., :48]),
    "fewer pair channels": taken(channels=64),
    "without hat": taken(with_hat=False),
    "weight in a larger one": taken(weight_pitch=8),
    "more pair channels": taken(channels=320),
    "ragged pair channels": taken(channels=96),
    "unaligned weight": taken(weight_pitch=4),
    "padded": taken(padded=True),
    "other width": taken(hidden=192),
    "wide": taken(hidden=512),
    "float16": taken(dtype=torch.float16),
    "float32": taken(dtype=torch.float32),
    "another GPU": taken(target="sm_100"),
}))
"""
WANTED = {
    "pairs in one row": 30, "narrow": 30, "many tiles": 132, "padding columns": 40,
    "planes of a chunk": 30, "rows apart": 40, "fewer pair channels": 30, "without hat": 30,
    "weight in a larger one": 30,
}  # fmt: skip


def test_what_it_takes():
    found = json.loads(python_output(TAKEN))
    assert {name: programs for name, programs in found.items() if programs is not None} == WANTED
    assert len(found) == 18


@pytest.fixture
def setting(submodule):
    """By hidden channels."""
    made = submodule("triton_parts.settings").LaunchConfig
    return {
        hidden: made(128, hidden, 64, num_warps=4, num_stages=1, split=slots, kernel="hopper")
        for hidden, slots in ((256, 4), (128, 6))
    }


class Problem:
    """de, t [D, R, pitch] with what is known of its rows, and parameters."""

    def __init__(self, weights, rows, length, hidden, channels=None, normed=True):
        generator = seeded(hidden + rows)
        channels = channels or hidden

        def randn(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).cuda()

        pitch = -(-length // 16) * 16
        self.t = torch.full((hidden, rows + 1, pitch), torch.nan, dtype=BF16, device="cuda")
        self.t[..., :length] = randn(hidden, rows + 1, length) + randn(1, rows + 1, length)
        self.t, self.length = self.t[:, 1:], length
        self.grad = randn(rows * length, channels).to(BF16)
        emit = randn(channels, hidden, scale=hidden**-0.5).to(BF16)
        norm = 1 + randn(hidden, scale=0.2) if normed else None
        self.weights = weights(*[None] * 6, norm, None, emit, None, None, None)
        t = self.t[..., :length].double().flatten(1).T
        mean, rstd = t.mean(1), torch.rsqrt(t.var(1, correction=0) + 1e-5)
        self.hat = (t - mean[:, None]) * rstd[:, None]
        grad = self.grad.double() @ emit.double()
        grad = grad if norm is None else grad * norm.double()
        along, along_hat = grad.mean(1), (grad * self.hat).mean(1)
        self.rows = torch.stack([t[:, 0], mean, rstd, along, along_hat]).float()
        grad = rstd[:, None] * (grad - along[:, None] - self.hat * along_hat[:, None])
        self.exact = grad.T.reshape(hidden, rows, length)

    def run(self, stage, config, over_t=False, with_hat=True):
        """dt and t^, of NaN before, by a setting or by the shipped one of the plain kernel."""
        t = self.t.clone() if over_t else self.t
        out = t if over_t else torch.full(t.shape, torch.nan, dtype=BF16, device="cuda")
        shape = self.rows.shape[1], t.shape[0]
        hat = torch.full(shape, torch.nan, dtype=BF16, device="cuda") if with_hat else None
        prepared = stage.prepare_norm_out_bwd(
            t, out, self.length, self.weights, "bf16", config, 0, False, with_hat
        )
        assert (prepared.variant == "hopper") == (config is not None)
        stage.norm_out_bwd(self.grad, t, self.rows, self.weights, prepared, out, hat)
        assert not out[..., self.length :].any()
        return (out[..., : self.length], hat) if with_hat else (out[..., : self.length],)


PROBLEMS = {
    "whole tiles": (16, 64, 256),
    "one pair": (1, 1, 256),
    "a tile and a pair": (3, 65, 128),
    "ragged rows": (7, 77, 256),
    "rows of less than a tile": (9, 33, 128),
    "many tiles": (150, 257, 256),
    "many tiles in one row": (300, 256, 128),
    "fewer pair channels": (10, 130, 256, 64),
    "more pair channels": (10, 130, 128, 256),
    "no norm weight": (9, 40, 256, None, False),
}


@on_hopper
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_worse_than_the_plain_kernel(submodule, setting, name):
    stage, hopper = submodule("triton_path.norm_backward"), submodule("hopper")
    problem = Problem(submodule("_call").Weights, *PROBLEMS[name])
    config = setting[problem.t.shape[0]]
    got = problem.run(stage, config)
    for again in (
        problem.run(stage, config), problem.run(stage, config, over_t=True),
        problem.run(stage, config, with_hat=False),
    ):  # fmt: skip
        assert all(torch.equal(one, other) for one, other in zip(got, again, strict=False))
    with hopper.without_variants():
        plain = problem.run(stage, None)
    for one, other, exact in zip(got, plain, (problem.exact, problem.hat), strict=True):
        assert_no_worse([(one, other, exact.cpu())], 1.0)
