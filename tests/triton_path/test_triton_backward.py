"""The backward on the Triton path against float64 autograd: every gradient, alone and together."""

import pytest
import torch
from fresh_process import ROOT, python_output
from helpers import (
    Problem,
    as_call,
    leaves_of,
    make_problem,
    reference_gradients,
    relative_error,
    seeded,
)
from peak_bytes import PeakBytes
from torch.utils._python_dispatch import TorchDispatchMode

PARAMETERS = (
    "norm_in_weight", "norm_in_bias", "p_in_weight", "p_in_bias", "g_in_weight", "g_in_bias",
    "norm_out_weight", "norm_out_bias", "p_out_weight", "p_out_bias", "g_out_weight", "g_out_bias",
)  # fmt: skip
FLOAT32_BUDGET = 2e-5


def grad_out_of(problem: Problem) -> torch.Tensor:
    generator = seeded(5)
    return torch.randn(problem.x.shape, generator=generator).to(problem.x.dtype)


@pytest.fixture
def call_of(submodule, on_triton):
    """call_of(problem): the problem on the device as the path takes it."""

    def make(problem: Problem, precision: str = "fp32"):
        return as_call(submodule("_call"), problem.to(on_triton), precision=precision)

    return make


@pytest.fixture
def backward(submodule, call_of, on_triton):
    """backward(problem, needs=None, recompute=False): the gradients by name."""

    def run(problem: Problem, needs=None, recompute=False, grad_out=None, precision="fp32"):
        call = call_of(problem, precision)
        saved = (None, None)
        if not recompute:
            _, *saved = submodule("triton_path").forward_saving(call)
        grad_out = grad_out_of(problem) if grad_out is None else grad_out
        return submodule("triton_path.gradients").run_backward(
            call, grad_out.to(on_triton), *saved, frozenset(needs or leaves_of(problem))
        )

    return run


def assert_gradients(got: dict, problem: Problem, budget: float, grad_out=None) -> None:
    wanted = reference_gradients(problem, grad_out_of(problem) if grad_out is None else grad_out)
    leaves = leaves_of(problem)
    errors = {}
    for name, gradient in got.items():
        want = wanted[name].squeeze(1) if name == "drop_mask" else wanted[name]
        assert gradient.shape == want.shape and gradient.dtype == leaves[name].dtype, name
        errors[name] = relative_error(gradient, want)
    assert all(error <= budget for error in errors.values()), errors


@pytest.mark.kernels_ci
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_every_gradient(backward, direction, recompute):
    problem = make_problem(
        5, 16, 24, direction=direction, mask="soft", drop_mask=True, biases=True, batch=2
    )
    got = backward(problem, recompute=recompute)
    assert set(got) == {"x", "mask", "drop_mask", *PARAMETERS}
    assert_gradients(got, problem, FLOAT32_BUDGET)


@pytest.mark.parametrize("channels, hidden", [(16, 16), (48, 24), (5, 3), (200, 16)])
def test_widths(backward, channels, hidden):
    problem = make_problem(6, channels, hidden, mask="soft", biases=True)
    assert_gradients(backward(problem), problem, FLOAT32_BUDGET)


@pytest.mark.parametrize("length", [1, 2, 16, 33])
def test_lengths(backward, length):
    # Of one residue the mask scales t, which the LayerNorm undoes: its gradient is but rounding.
    mask = "bool" if length == 1 else "soft"
    problem = make_problem(length, 16, 4, mask=mask, direction="incoming")
    assert_gradients(backward(problem), problem, FLOAT32_BUDGET)


@pytest.mark.parametrize("mask", [None, "bool", "float", "expanded"])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_masks(backward, mask, direction):
    problem = make_problem(7, 16, 24, mask=mask, direction=direction, seed=3)
    assert_gradients(backward(problem), problem, FLOAT32_BUDGET)


def test_a_mask_of_integers_has_no_gradient(backward):
    problem = make_problem(5, 16, mask="bool")
    whole = backward(problem)
    problem.mask = problem.mask.to(torch.int32)
    got = backward(problem)
    assert all(torch.equal(got[name], whole[name]) for name in whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_of_masks_in_their_own_dtype(backward, dtype):
    problem = make_problem(6, 16, mask="soft", drop_mask=True)
    problem.mask, problem.drop_mask = problem.mask.to(dtype), problem.drop_mask.to(dtype)
    budget = 3e-3 if dtype == torch.bfloat16 else FLOAT32_BUDGET
    assert_gradients(backward(problem, ["mask", "drop_mask"]), problem, budget)


def test_without_norm_parameters(backward):
    problem = make_problem(6, 16, 24, mask="soft", biases=True)
    for name in ("norm_in_weight", "norm_in_bias", "norm_out_weight", "norm_out_bias"):
        del problem.weights[name]
    assert_gradients(backward(problem), problem, FLOAT32_BUDGET)


def test_norm_weights_of_zero(backward):
    """Nothing is divided by them."""
    problem = make_problem(6, 16)
    for name in ("norm_in_weight", "norm_out_weight"):
        problem.weights[name][::3] = 0
    assert_gradients(backward(problem), problem, FLOAT32_BUDGET)


def test_a_norm_weight_that_is_small_beside_its_bias(backward):
    """The bias is no part of what is rounded: its rounding would be as large as t^ times g2."""
    problem = make_problem(6, 16, dtype=torch.bfloat16)
    problem.weights["norm_out_weight"] = problem.weights["norm_out_weight"] * 1e-3
    assert_gradients(backward(problem), problem, 3e-2)


@pytest.mark.parametrize("what", ["expanded", "turned", "sliced"])
def test_gradients_and_x_of_any_strides(backward, what):
    problem = make_problem(6, 16, mask="soft")
    if what == "expanded":
        grad_out = torch.randn(16).expand(problem.x.shape)
    elif what == "turned":
        grad_out = torch.randn(1, 6, 16, 6).transpose(-1, -2)
        problem.x = problem.x.transpose(1, 2)
    else:
        grad_out = torch.randn(1, 6, 6, 20)[..., 3:19]
        problem.x = torch.randn(1, 6, 9, 16)[:, :, 2:8]
    got = backward(problem, grad_out=grad_out)
    assert got["x"].is_contiguous()
    assert_gradients(got, problem, FLOAT32_BUDGET, grad_out)


def test_rows_far_from_zero_and_constant_rows(backward):
    problem = make_problem(6, 16, 24)
    problem.x += 300
    assert_gradients(backward(problem), problem, FLOAT32_BUDGET)
    problem.x[0, 2] = 1000.0
    assert all(bool(gradient.isfinite().all()) for gradient in backward(problem).values())


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_chunks_groups_and_blocks_as_on_a_gpu(
    backward, submodule, monkeypatch, direction, descriptors
):
    """Several chunks, groups and blocks of channels, of which none divides the width."""
    config = submodule("triton_parts.settings").LaunchConfig
    configs = {
        "fused_dual_gemm": config(64, 16, 64, 4, 2, descriptors),
        "trimul_einsum": config(16, 32, 16, 4, 2, descriptors, persistent=2),
        "fused_ln_residual": config(64, 64, 64, 4, 2, descriptors),
        "fused_ln_residual_bwd": config(32, 32, 16, 4, 2, descriptors),
        "norm_out_bwd": config(64, 16, 32, 4, 2),
        "norm_in_bwd": config(16, 1, 16, 4, 1),
        "row_products": config(32, 32, 16, 4, 2),
        "row_linear": config(16, 32, 16, 4, 2, descriptors),
        "fused_dual_gemm_bwd": config(64, 16, 32, 4, 2, descriptors),
    }
    launch = submodule("triton_parts.launch")
    monkeypatch.setattr(launch, "pick_config", lambda stage, *_: configs[stage])
    launches, subject = submodule("triton_path.launches"), submodule("triton_path.gradients")
    monkeypatch.setattr(subject, "_CHUNK_PAIRS", 27)
    monkeypatch.setattr(subject, "_CHUNKS", 4)
    monkeypatch.setattr(subject, "_GROUP_ELEMENTS", 1)
    launches._launches.clear()
    problem = make_problem(9, 40, 32, direction=direction, mask="soft", drop_mask=True)
    assert subject.group_size(32, 9) == 16
    try:
        assert_gradients(backward(problem, recompute=True), problem, FLOAT32_BUDGET)
    finally:
        launches._launches.clear()


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("channels", [5, 48, 128])
def test_held_rows(backward, submodule, monkeypatch, channels, descriptors):
    block_k = max(16, 1 << (channels - 1).bit_length())
    settings = submodule("triton_parts.settings")
    config = settings.LaunchConfig(64, 16, block_k, 4, 2, descriptors, True)
    launch = submodule("triton_parts.launch")
    problem = make_problem(4, channels, 16, dtype=torch.float16, mask="soft")
    wanted = backward(problem)
    submodule("triton_path.launches")._launches.clear()
    monkeypatch.setattr(launch, "pick_config", lambda *_: config)
    try:
        got = backward(problem)
    finally:
        submodule("triton_path.launches")._launches.clear()
    for name, gradient in got.items():
        assert relative_error(gradient, wanted[name].cpu().double()) <= 2e-3, name


def test_held_rows_of_float32_are_refused(backward, submodule, monkeypatch):
    config = submodule("triton_parts.settings").LaunchConfig(32, 16, 32, 4, 2, True, True)
    launch = submodule("triton_parts.launch")
    monkeypatch.setattr(launch, "pick_config", lambda *_: config)
    submodule("triton_path.launches")._launches.clear()
    with pytest.raises(ValueError, match="a held operand is of 16-bit rows"):
        backward(make_problem(4, 32))


NEEDS = [
    *[(name,) for name in ("x", "mask", "drop_mask", *PARAMETERS)],
    ("x", "g_out_weight"),
    ("p_in_weight", "g_out_weight"),
    ("p_out_weight", "p_out_bias"),
    ("x", "mask", "p_in_bias"),
    tuple(name for name in PARAMETERS if "bias" not in name),
]


def test_alone_as_together(submodule, backward, call_of, on_triton):
    """Exactly what was asked for comes back, with the very bits that it has among all others."""
    problem = make_problem(3, 16, mask="soft", drop_mask=True, biases=True)
    together = backward(problem)
    call, grad_out = call_of(problem), grad_out_of(problem).to(on_triton)
    _, *saved = submodule("triton_path").forward_saving(call)
    for needs in NEEDS:
        got = submodule("triton_path.gradients").run_backward(
            call, grad_out, *saved, frozenset(needs)
        )
        assert set(got) == set(needs)
        for name, gradient in got.items():
            assert torch.equal(gradient, together[name]), (name, needs)


@pytest.mark.parametrize(
    "needs, kernels, products",
    [
        (["drop_mask"], "part of stage 3", []),
        (["mask"], "all but the last", []),
        (["p_in_bias"], "all but the last", ["row_products", "row_products"]),
        (["x"], "all", ["row_linear"]),
        (["x", "p_out_weight"], "all", ["row_products", "row_products", "row_linear"]),
    ],
)
def test_nothing_else_is_computed(backward, submodule, monkeypatch, needs, kernels, products):
    """The backward's launches; no product is torch's, whose settings are the process's."""
    problem = make_problem(3, 16, mask="soft", drop_mask=True, biases=True)
    launched, launch = [], submodule("triton_parts.launch").PreparedLaunch.launch

    def record(prepared, **tensors):
        launched.append(prepared.stage)
        launch(prepared, **tensors)

    monkeypatch.setattr(submodule("triton_parts.launch").PreparedLaunch, "launch", record)
    with CountedProducts() as counted:
        backward(problem, needs)
    wanted = ["fused_dual_gemm", "trimul_einsum", "fused_ln_residual", "fused_ln_residual_bwd"]
    if "all" in kernels:
        wanted += ["norm_out_bwd", "fused_dual_gemm", "trimul_einsum", "trimul_einsum"]
        wanted += ["fused_dual_gemm_bwd"]
    if kernels == "all":
        wanted += ["norm_in_bwd"]
    assert [stage for stage in launched if stage not in ("row_products", "row_linear")] == wanted
    assert [stage for stage in launched if stage in ("row_products", "row_linear")] == products
    assert counted.number == 0


class CountedProducts(TorchDispatchMode):
    """Counts matrix products within it."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_calls_give_equal_bits(backward, dtype):
    problem = make_problem(5, 16, 24, dtype=dtype, mask="soft", drop_mask=True, biases=True)
    first, second = backward(problem), backward(problem)
    again = backward(problem, recompute=True)
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]) and torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("name", ["p_out_bias", "p_out_weight", "g_out_weight"])
def test_parameters_of_the_output_alone_without_a_product(backward, name):
    problem = make_problem(4, 16, biases=True)
    assert_gradients(backward(problem, [name], recompute=True), problem, FLOAT32_BUDGET)


def test_what_was_saved_serves_twice(submodule, call_of, on_triton):
    problem = make_problem(9, 16)
    call, needs = call_of(problem), frozenset(leaves_of(problem))
    _, product, moments = submodule("triton_path").forward_saving(call)
    assert product.shape == (1, 16, 9, 16) and product.dtype == problem.x.dtype
    assert moments.shape == (1, 2, 9, 16) and moments.dtype == torch.float32
    run = submodule("triton_path.gradients").run_backward
    product[..., 9:] = float("nan")  # these columns have no meaning
    kept = product.clone(), moments.clone()
    first, second = (
        run(call, grad_out_of(problem).to(on_triton), product, moments, needs) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in needs)
    assert_gradients(first, problem, FLOAT32_BUDGET)
    assert torch.equal(product[..., :9], kept[0][..., :9]) and torch.equal(moments, kept[1])


def test_the_saving_forward_is_the_forward(submodule, call_of):
    call = call_of(make_problem(9, 16, residual=True, mask="soft"))
    path = submodule("triton_path")
    assert torch.equal(path.forward_saving(call)[0], path.forward(call))


def test_gradients_share_no_memory(backward):
    problem = make_problem(4, 16, mask="soft", biases=True)
    gradients = list(backward(problem).values())
    memories = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    assert len(memories) == len(gradients)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_nothing_to_sum(backward, shape):
    batch, length = shape
    problem = make_problem(length, 16, batch=batch, mask="soft", biases=True)
    got = backward(problem, recompute=True)
    assert all(gradient.count_nonzero() == 0 for gradient in got.values())


@pytest.mark.parametrize("precision", ["fp32", "ieee", "tf32x3", "tf32", "bf16"])
def test_products_follow_the_precision_of_the_call(
    submodule, call_of, on_triton, monkeypatch, precision
):
    """Torch's own setting is neither read nor changed, so that threads can't disturb each other."""
    launch = submodule("triton_parts.launch")
    words = []
    monkeypatch.setattr(
        launch.PreparedLaunch, "launch",
        lambda prepared, **_: words.append((prepared.stage, prepared.constants.get("PRECISION"))),
    )
    call = call_of(make_problem(3, 16))._replace(precision=precision)
    shapes = submodule("triton_path").saved_shapes(call)
    saved = [torch.zeros(shape, device=on_triton) for shape in shapes]
    for name in ("get_float32_matmul_precision", "set_float32_matmul_precision"):
        monkeypatch.setattr(torch, name, forbidden)
    grad_out = torch.ones_like(call.x)
    submodule("triton_path").backward(call, grad_out, *saved, frozenset({"x", "p_out_weight"}))
    fp32_dots = submodule("triton_parts.device").device_target(call.x.device).fp32_dots
    found = {stage: word for stage, word in words if word is not None}
    assert {"row_products", "row_linear"} <= found.keys()
    for stage, word in found.items():
        setting = launch.setting_of(stage, call.x, 16, 3)
        assert word == launch.dot_precision(precision, fp32_dots, setting.fp32_dot), stage


def forbidden(*_):
    raise AssertionError("a backward must leave torch's settings alone")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_deterministic_algorithms(backward, monkeypatch):
    """Without the variable that cuBLAS wants for a product of its own."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    problem = make_problem(6, 16, dtype=torch.bfloat16, mask="soft")
    wanted = backward(problem)
    torch.use_deterministic_algorithms(True)
    try:
        got = backward(problem)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in got.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_comes_through_a_norm_of_one_channel(backward, precision):
    """Where dt cancels, its terms have seen the same roundings."""
    got = backward(make_problem(3, 24, 1), ["p_in_weight", "p_out_weight"], precision=precision)
    assert got["p_in_weight"].norm() <= 1e-2 * got["p_out_weight"].norm()


NEWER_SETTING = """
import importlib, sys, torch
from pathlib import Path
from kernels import get_local_kernel

kernel = get_local_kernel(Path(sys.argv[1]))
validation = importlib.import_module(f"{kernel.__name__}.validation")
for setting, allowed in (("ieee", False), ("tf32", True)):
    torch.backends.cuda.matmul.fp32_precision = setting
    assert validation.torch_allows_tf32() is allowed
print("fine")
"""


def test_torchs_newer_setting_of_precision():
    """In a process of its own: torch wants one of its two settings to be used, not both."""
    pytest.importorskip("kernels")
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 brought it")
    assert python_output(NEWER_SETTING, str(ROOT)).split() == ["fine"]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("width, length", [(256, 64), (128, 96)])
def test_peak_memory(submodule, call_of, on_triton, monkeypatch, width, length, recompute):
    """Counted from the allocations, in tensors of the pair's size, t not counted if it was saved.

    A chunk's rows of [dp, dg, dq], x^ and dz are the largest buffers beside dx, da and db.
    """
    subject = submodule("triton_path.gradients")
    monkeypatch.setattr(subject, "_CHUNK_PAIRS", 64)
    monkeypatch.setattr(subject, "_GROUP_ELEMENTS", 1)
    launch = submodule("triton_parts.launch").PreparedLaunch
    monkeypatch.setattr(launch, "launch", lambda *_, **tensors: None)
    problem = make_problem(1, width, dtype=torch.float16)
    problem.x = torch.zeros(1, length, length, width, dtype=torch.float16)
    call = call_of(problem)
    product = torch.zeros(1, width, length, length, dtype=torch.float16, device=on_triton)
    moments = torch.zeros(1, 2, length, length, device=on_triton)
    saved = (None, None) if recompute else (product, moments)
    needs = frozenset(leaves_of(problem))
    grad_out = torch.zeros_like(call.x)
    with PeakBytes(call.x, grad_out, product, moments, *problem.weights.values()) as bytes_:
        subject.run_backward(call, grad_out, *saved, needs)
    # The parameters' sums, the projections stacked and turned, and one chunk's products, of its
    # parts and of all: from some length on they are no larger.
    programs = submodule("triton_parts.device").device_target(call.x.device).multiprocessors
    parts = max(1, min(programs // (5 * (width // 128) ** 2), length**2 // 8 // 256))
    sums = (4 * 6 + 2 * 5 * 2 + 4 * (parts + 1) * 5) * width**2
    assert 3.85 <= (bytes_.peak - sums) / call.x.nbytes <= 4.1


def test_prepared_launches_serve_the_next_call(backward, submodule, on_triton):
    plans = submodule("triton_path.launches")._launches
    plans.clear()
    problem = make_problem(6, 16, dtype=torch.float16).to(on_triton)
    for _ in range(2):
        problem.x = torch.randn_like(problem.x)
        got = backward(problem)
        assert_gradients(got, problem, 5e-3)
        assert len(plans) == 2  # the forward's and the backward's
    backward(problem, ["x"])
    assert len(plans) == 3
