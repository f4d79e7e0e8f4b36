"""Stage 3's backward on Hopper GPUs: what it takes; on a GPU that runs it, beside float64."""

import json

import pytest
import torch
from fresh_process import python_output
from helpers import assert_no_worse, relative_error, seeded

pytest.importorskip("triton")
BF16 = torch.bfloat16
EPS = 1e-5
OUTPUTS = frozenset({"emit", "gate", "rows", "sums"})
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
pytestmark = [pytest.mark.kernels_ci, pytest.mark.usefixtures("watched")]

# In a process without TRITON_INTERPRET: the partial sums under a setting of the variant, by case.
TAKEN = """
import json, torch
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule

package = load_kernel(find_root())
stage, device = submodule(package, "triton_path.fused_ln_residual_backward"), submodule(
    package, "triton_parts.device"
)
config = submodule(package, "triton_parts.settings").LaunchConfig
config = config(128, 32, 256, num_warps=4, num_stages=2, split=2, kernel="hopper")
ALL = {"emit", "gate", "rows", "sums"}


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def taken(
    channels=256, hidden=None, dtype=torch.bfloat16, outputs=ALL, target="sm_90", length=48, **other
):
    hidden = hidden or channels
    tensors = dict(
        t=empty(hidden, 40, length, dtype=dtype), x=empty(40, length, channels, dtype=dtype),
        moments=empty(2, 40, length, dtype=torch.float32),
        grad_out=empty(40, length, channels, dtype=dtype), drop_mask=None,
    )
    rows = stage.Rows(**{**tensors, **other})
    norm = [empty(channels, dtype=torch.float32)] * 2
    one = empty(channels, channels, dtype=dtype)
    emit = empty(channels, hidden, dtype=dtype)
    weights = submodule(package, "_call").Weights(
        *norm, one, None, one, None, *norm, emit, None, one, None
    )
    with device.standing_in(device.target_of(target, "any", 132)):
        try:
            launch = stage.prepare_ln_residual_bwd(
                rows, weights, (1e-5, 1e-5), "fp32", frozenset(outputs), config
            )
        except ValueError as error:
            assert "setting must be of one of ['']" in str(error)
            return None
    assert launch.variant == "hopper" and launch.stage == "fused_ln_residual_bwd"
    return stage.partial_sums(launch)


print(json.dumps({
    "pairs in one row": taken(),
    "narrow": taken(channels=128),
    "many tiles": taken(length=640),
    "rows apart": taken(grad_out=empty(40, 60, 256)[:, :48]),
    "axes exchanged": taken(x=empty(48, 40, 256).transpose(0, 1)),
    "planes of a chunk": taken(t=empty(256, 90, 48)[:, 7:47]),
    "padding columns": taken(t=empty(256, 40, 64)),
    "drop mask": taken(drop_mask=empty(48, 256)),
    "no parameters": taken(outputs=ALL - {"sums"}),
    "drop mask's gradient": taken(outputs=ALL | {"drop_mask"}),
    "mask's gradient alone": taken(outputs={"emit", "rows"}),
    "expanded": taken(grad_out=empty(1, 1, 1).expand(40, 48, 256)),
    "unaligned": taken(grad_out=empty(40, 48, 260)[..., :256]),
    "channels apart": taken(x=empty(256, 40, 48).permute(1, 2, 0)),
    "padded": taken(lengths=empty(1, dtype=torch.int32)),
    "more hidden channels": taken(channels=128, hidden=256),
    "other width": taken(channels=192),
    "wide": taken(channels=512),
    "float16": taken(dtype=torch.float16),
    "float32": taken(dtype=torch.float32),
    "another GPU": taken(target="sm_100"),
}))
"""
# Eight of each program, which has two tiles of 64 pairs at a time.
WANTED = {
    "pairs in one row": 120, "narrow": 120, "many tiles": 8 * 132, "rows apart": 160,
    "axes exchanged": 160, "planes of a chunk": 120, "padding columns": 160, "drop mask": 160,
    "no parameters": 120,
}  # fmt: skip


def test_what_it_takes():
    found = json.loads(python_output(TAKEN))
    assert {name: count for name, count in found.items() if count is not None} == WANTED
    assert len(found) == 21


class Problem:
    """Stage 3's inputs at `rows` x `columns` pairs, the gradient of its output, and parameters."""

    def __init__(self, stage, weights, rows, columns, channels, drop=None, biases=False):
        generator = seeded(channels + rows)

        def randn(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).cuda()

        def norm():
            return [1 + randn(channels, scale=0.2), randn(channels, scale=0.3)]

        def projection():
            weight = randn(channels, channels, scale=channels**-0.5).to(BF16)
            return weight, randn(channels, scale=0.5).to(BF16) if biases else None

        self.stage, pitch = stage, -(-columns // 16) * 16
        x = (randn(rows, columns, channels) + randn(rows, columns, 1)).to(BF16)
        t = torch.full((channels, rows, pitch), torch.nan, dtype=BF16, device="cuda")
        t[..., :columns] = randn(channels, rows, columns) * 3 + randn(1, rows, columns)
        rstd = torch.rsqrt(x.double().var(-1, correction=0) + EPS)
        moments = torch.stack([x.double().mean(-1), rstd]).float()
        if drop is not None:
            drop = ((randn(columns, channels) > -0.5) * 1.5).to(drop)
        grad = randn(rows, columns, channels).to(BF16)
        self.rows = stage.Rows(t, x, moments, grad, drop)
        self.weights = weights(
            *norm(), *projection(), *projection(), *norm(), *projection(), *projection()
        )

    def run(self, launches, config, outputs=OUTPUTS, rows=None):
        """de, dq, the rows' moments and means, and the sums over the pairs, of NaN before."""
        stage, rows = self.stage, rows or self.rows
        count, channels = rows.x.shape[:2].numel(), rows.x.shape[2]

        def nan(*shape, dtype=torch.float32):
            return torch.full(shape, torch.nan, dtype=dtype, device="cuda")

        prepared = stage.prepare_ln_residual_bwd(
            rows, self.weights, (EPS, EPS), "fp32", outputs, config
        )
        assert (prepared.variant == "hopper") == (config is not None)
        out = stage.Stage3Gradients(
            nan(count, channels, dtype=BF16), nan(count, channels, dtype=BF16), nan(5, count), None,
            nan(stage.partial_sums(prepared), 2, channels) if "sums" in outputs else None,
        )  # fmt: skip
        if prepared.variant:
            folds = stage.hopper.kernels("folded_norm").Folds(launches, self.weights)
            means, folded = folds.of_backward()
        else:
            made = stage.prepare_emit_means(self.weights, "fp32")
            means, folded = stage.emit_means(self.weights, made), None
        stage.fused_ln_residual_bwd(rows, self.weights, means, prepared, out, folded)
        found = dict(emit=out.emit, gate=out.gate, rows=out.rows[1:])
        if out.sums is not None:
            found["sums"] = out.sums.double().sum(0)
        return found

    def exact(self):
        t, x, _, grad, drop, _ = self.rows
        w = {n: 0.0 if v is None else v.double() for n, v in self.weights._asdict().items()}
        channels = x.shape[2]
        t = t[..., : x.shape[1]].double().flatten(1).T
        mean, rstd = t.mean(1), torch.rsqrt(t.var(1, correction=0) + EPS)
        x, grad = x.double(), grad.double()
        z = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(
            x.var(-1, correction=0, keepdim=True) + EPS
        )
        z = (z * w["norm_in_weight"] + w["norm_in_bias"]).flatten(0, 1)
        gate = torch.sigmoid(z @ w["g_out_weight"].T + w["g_out_bias"])
        scaled = (t - mean[:, None]) * rstd[:, None] * w["norm_out_weight"]
        without = scaled @ w["p_out_weight"].T
        emit = without + w["p_out_weight"] @ w["norm_out_bias"] + w["p_out_bias"]
        grad = (grad if drop is None else grad * drop.double()).flatten(0, 1)
        grad_emit, grad_gate = grad * gate, grad * emit * gate * (1 - gate)
        along = grad_emit @ (w["p_out_weight"] @ w["norm_out_weight"]) / channels
        along_hat = (grad_emit * without).sum(1) / channels
        return dict(
            emit=grad_emit, gate=grad_gate, rows=torch.stack([mean, rstd, along, along_hat]),
            sums=torch.stack([grad_emit.sum(0), grad_gate.sum(0)]),
        )  # fmt: skip


@pytest.fixture
def problem(submodule):
    stage = submodule("triton_path.fused_ln_residual_backward")
    return lambda *what: Problem(stage, submodule("_call").Weights, *what)


@pytest.fixture
def setting(submodule):
    made = submodule("triton_parts.settings").LaunchConfig
    return {
        channels: made(128, 32, channels, 4, num_stages=stages, split=slots, kernel="hopper")
        for channels, stages, slots in ((256, 2, 2), (128, 4, 3))
    }


PROBLEMS = {
    "whole tiles": (16, 64, 256),
    "one pair": (1, 1, 256),
    "a tile and a pair": (1, 65, 128),
    "padding columns": (7, 77, 256),
    "many tiles": (150, 257, 256),
    "many tiles, narrow": (300, 272, 128),
    "drop mask": (9, 40, 256, BF16),
    "boolean drop mask": (9, 130, 128, torch.bool),
    "biases": (30, 50, 256, None, True),
}


@on_hopper
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_worse_than_the_plain_kernel(submodule, problem, setting, name):
    mine, launches = problem(*PROBLEMS[name]), submodule("triton_parts.launch").Launches()
    config, exact = setting[mine.rows.x.shape[2]], mine.exact()
    got = mine.run(launches, config)
    again = mine.run(launches, config)
    with submodule("hopper").without_variants():
        plain = mine.run(launches, None)
    for what, wanted in exact.items():
        assert torch.equal(got[what], again[what])
        if what in ("emit", "gate", "sums"):
            assert_no_worse([(got[what], plain[what], wanted.cpu())], 1.0)
    for number in range(2):  # the moments of t
        assert relative_error(got["rows"][number], exact["rows"][number].cpu()) <= 2**-20
    for number in (2, 3) if name != "one pair" else ():  # a mean of one row may cancel
        found = got["rows"][number], plain["rows"][number]
        assert_no_worse([(*found, exact["rows"][number].cpu())], 1.0)


@on_hopper
def test_strides_and_chunks(submodule, problem, setting):
    """x and grad_out with rows apart, moments with their axes exchanged, and rows of the planes."""
    whole, launches = problem(20, 48, 256), submodule("triton_parts.launch").Launches()
    wanted = whole.run(launches, setting[256])
    t, x, moments, grad, *_ = whole.rows
    apart = whole.rows._replace(
        x=torch.cat([x, x], dim=1)[:, :48], grad_out=torch.cat([grad, grad], dim=-1)[..., :256],
        moments=moments.transpose(1, 2).contiguous().transpose(1, 2),
    )  # fmt: skip
    parts = [
        whole.run(launches, setting[256], rows=whole.stage.Rows(
            apart.t[:, cut], apart.x[cut], apart.moments[:, cut], apart.grad_out[cut], None
        ))
        for cut in (slice(0, 12), slice(12, 20))
    ]  # fmt: skip
    for what, axis in (("emit", 0), ("gate", 0), ("rows", 1)):
        assert torch.equal(torch.cat([part[what] for part in parts], axis), wanted[what])
    without = whole.run(launches, setting[256], OUTPUTS - {"sums"})
    assert torch.equal(without["emit"], wanted["emit"])


@on_hopper
def test_constant_rows_and_rows_far_from_zero(submodule, problem, setting):
    mine, launches = problem(8, 64, 128), submodule("triton_parts.launch").Launches()
    t = mine.rows.t
    t[:, ::2] += 1000.0
    t[:, 1, :32] = -700.0
    mine.rows.x[3, :32] = 50.0
    x = mine.rows.x.double()
    rstd = torch.rsqrt(x.var(-1, correction=0) + EPS)
    mine.rows.moments.copy_(torch.stack([x.mean(-1), rstd]))
    got = mine.run(launches, setting[128])
    with submodule("hopper").without_variants():
        plain = mine.run(launches, None)
    exact = mine.exact()
    for what in ("emit", "gate"):
        # Where values of a row differ in their last bits alone, sums of products lose some.
        assert_no_worse([(got[what], plain[what], exact[what].cpu())], 1.1)
