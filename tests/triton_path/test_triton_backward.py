"""The backward on the Triton path against float64 autograd: every gradient, alone and together."""

from collections import Counter

import pytest
import torch
from gradients_of_calls import RECOMPUTE, in_many_parts
from helpers import (
    Problem,
    as_call,
    leaves_of,
    make_problem,
    reference_gradients,
    relative_error,
    seeded,
)
from peak_bytes import PeakBytes, bytes_of_parts
from process_wide import NoProducts
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
    """backward(problem, needs=None, recompute="none"): the gradients by name."""

    def run(problem: Problem, needs=None, recompute="none", grad_out=None, precision="fp32"):
        call = call_of(problem, precision)._replace(recompute=recompute)
        saved = (None, None, None)
        if call.keeps_product:
            _, *saved = submodule("triton_path").forward_saving(call)
        grad_out = grad_out_of(problem) if grad_out is None else grad_out
        return submodule("triton_path").backward(
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
@pytest.mark.parametrize("recompute", RECOMPUTE)
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


@pytest.mark.parametrize("descriptors, block_n", [(False, 16), (True, 64)])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_chunks_groups_and_blocks_as_on_a_gpu(
    backward, submodule, monkeypatch, direction, descriptors, block_n
):
    """Several chunks, groups and blocks of channels, of which none divides the width.

    dz is held in whole rows, or computed in blocks of channels.
    """
    config = submodule("triton_parts.settings").LaunchConfig
    configs = {
        "fused_dual_gemm": config(64, 16, 64, 4, 2, descriptors),
        "trimul_einsum": config(16, 32, 16, 4, 2, descriptors, persistent=2),
        "fused_ln_residual": config(64, 64, 64, 4, 2, descriptors),
        "fused_ln_residual_bwd": config(32, 32, 16, 4, 2, descriptors),
        "norm_out_bwd": config(64, 16, 32, 4, 2),
        "input_bwd": config(16, block_n, 16, 4, 1, descriptors),
        "fused_dual_gemm_bwd": config(64, 16, 32, 4, 2, descriptors),
        "row_products": config(32, 16, 32, 4, 2),
    }
    problem = make_problem(9, 40, 32, direction=direction, mask="soft", drop_mask=True)
    with in_many_parts(submodule, monkeypatch, configs):
        assert submodule("triton_path.gradients").group_size(32, 9) == 16
        for recompute in RECOMPUTE:
            assert_gradients(backward(problem, recompute=recompute), problem, FLOAT32_BUDGET)


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
        got = submodule("triton_path").backward(call, grad_out, *saved, frozenset(needs))
        assert set(got) == set(needs)
        for name, gradient in got.items():
            assert torch.equal(gradient, together[name]), (name, needs)


@pytest.mark.parametrize(
    "needs, kernels, products",
    [
        (["drop_mask"], "part of stage 3", 0),
        (["mask"], "all but the last", 0),
        (["p_in_bias"], "all but the last", 2),
        (["x"], "all", 0),
        (["x", "p_out_weight"], "all", 2),
    ],
)
def test_nothing_else_is_computed(backward, submodule, monkeypatch, needs, kernels, products):
    """The launches; `products` are those over all pairs. No product is torch's own."""
    problem = make_problem(3, 16, mask="soft", drop_mask=True, biases=True)
    parts, launched = submodule("triton_parts.launch"), []
    launch, play = parts.PreparedLaunch.launch, parts.PlacedLaunch.launch

    def record(prepared, **tensors):
        launched.append(prepared.kernel.__name__)
        launch(prepared, **tensors)

    def play_by_tensors(placed, *memories):
        placed._prepared._run = None  # on a GPU a recording would not call `launch`
        play(placed, *memories)

    monkeypatch.setattr(parts.PreparedLaunch, "launch", record)
    monkeypatch.setattr(parts.PlacedLaunch, "launch", play_by_tensors)
    with NoProducts():
        backward(problem, needs)
    wanted = ["_fused_dual_gemm_fwd_kernel", "_trimul_einsum_fwd_kernel"]
    wanted += ["_fused_ln_residual_fwd_kernel", "_emit_means_kernel"]
    wanted += ["_fused_ln_residual_bwd_kernel"]
    if "all" in kernels:
        of_rows = ["_row_products_kernel"] * (products // 2)
        wanted += ["_norm_out_bwd_kernel", *of_rows]
        wanted += ["_trimul_einsum_fwd_kernel"] * 2 + ["_fused_dual_gemm_bwd_kernel", *of_rows]
    if kernels == "all":
        wanted += ["_input_bwd_kernel"]
    if products:
        wanted += ["_projection_gradients_kernel", "_norm_gradients_kernel"]
    assert launched == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_calls_give_equal_bits(backward, dtype):
    problem = make_problem(5, 16, 24, dtype=dtype, mask="soft", drop_mask=True, biases=True)
    first, second = backward(problem), backward(problem)
    for again in (second, *(backward(problem, recompute=word) for word in ("product", "all"))):
        for name, gradient in first.items():
            assert torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("name", ["p_out_bias", "p_out_weight", "g_out_weight"])
def test_parameters_of_the_output_alone_without_a_product(backward, name):
    problem = make_problem(4, 16, biases=True)
    assert_gradients(backward(problem, [name], recompute="all"), problem, FLOAT32_BUDGET)


def test_what_was_saved_serves_twice(submodule, call_of, on_triton):
    problem = make_problem(9, 16)
    call, needs = call_of(problem), frozenset(leaves_of(problem))
    _, *saved = submodule("triton_path").forward_saving(call)
    product, moments, planes = saved
    assert product.shape == (1, 16, 9, 16) and product.dtype == problem.x.dtype
    assert moments.shape == (1, 2, 9, 16) and moments.dtype == torch.float32
    assert planes.shape == (1, 2, 16, 9, 16) and planes.dtype == problem.x.dtype
    run = submodule("triton_path").backward
    product[..., 9:] = float("nan")  # these columns have no meaning
    kept = [tensor.clone() for tensor in saved]
    first, second = (
        run(call, grad_out_of(problem).to(on_triton), *saved, needs) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in needs)
    assert_gradients(first, problem, FLOAT32_BUDGET)
    assert torch.equal(product[..., :9], kept[0][..., :9]) and torch.equal(moments, kept[1])
    assert torch.equal(planes, kept[2])


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
    got = backward(problem, recompute="all")
    assert all(gradient.count_nonzero() == 0 for gradient in got.values())


@pytest.mark.parametrize("precision", ["fp32", "ieee", "tf32x3", "tf32"])
def test_products_follow_the_precision_of_the_call(
    submodule, backward, monkeypatch, precision
):
    """All of them, as if the target knew each word."""
    given, device = {}, submodule("triton_parts.device")
    target = device.target_of("interpreter", "cpu")._replace(fp32_dots=("tf32x3", "tf32", "ieee"))
    monkeypatch.setattr(device, "_target_of_real", lambda _: target)
    submodule("triton_path.launches")._launches.clear()

    def record(prepared, **tensors):
        given[prepared.stage] = prepared.constants.get("PRECISION")

    monkeypatch.setattr(submodule("triton_parts.launch").PreparedLaunch, "launch", record)
    try:
        backward(make_problem(3, 16), precision=precision)
    finally:
        submodule("triton_path.launches")._launches.clear()
    for stage in ("projection_gradients", "norm_gradients"):
        assert given.pop(stage) is None
    assert given.pop("emit_means") == precision and len(given) == 8
    assert set(given.values()) == {"tf32x3" if precision == "fp32" else precision}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_comes_through_a_norm_of_one_channel(backward, precision):
    """Where dt cancels, its terms have seen the same roundings."""
    got = backward(make_problem(3, 24, 1), ["p_in_weight", "p_out_weight"], precision=precision)
    assert got["p_in_weight"].norm() <= 1e-2 * got["p_out_weight"].norm()


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("width, length", [(256, 64), (128, 96)])
def test_peak_memory(submodule, call_of, on_triton, monkeypatch, width, length, recompute):
    """Counted from the allocations, in tensors of the pair's size, what was saved not counted.

    A chunk's rows lie where da, db or dt are not, and the largest buffers are dx and these three;
    or dx, dt, a, b, and room for a quarter of da and db.
    """
    subject = submodule("triton_path.gradients")
    monkeypatch.setattr(subject, "_CHUNK_PAIRS", 64)
    for name in ("SMALL_PLANES", "_SMALL_PLANES_AGAIN"):
        monkeypatch.setattr(subject, name, 0)
    monkeypatch.setattr(subject, "_GROUP_ELEMENTS", 1)
    # A GPU's programs and folded norms have small buffers that this length would not hide.
    recording = submodule("triton_parts.recording")
    on_cpu = recording.device_target(torch.device("cpu"))
    monkeypatch.setattr(recording, "device_target", lambda device: on_cpu)
    launch = submodule("triton_parts.launch").PreparedLaunch
    monkeypatch.setattr(launch, "launch", lambda *_, **tensors: None)
    launches = submodule("triton_path.launches")._launches
    launches.clear()
    problem = make_problem(1, width, dtype=torch.float16)
    problem.x = torch.zeros(1, length, length, width, dtype=torch.float16)
    call = call_of(problem)
    product = torch.zeros(1, width, length, length, dtype=torch.float16, device=on_triton)
    moments = torch.zeros(1, 2, length, length, device=on_triton)
    planes = torch.zeros(1, 2, width, length, length, dtype=torch.float16, device=on_triton)
    saved = {
        "none": (product, moments, planes),
        "product": (product, moments, None),
        "all": (None, None, None),
    }[recompute]
    needs = frozenset(leaves_of(problem))
    grad_out = torch.zeros_like(call.x)
    inputs = [call.x, grad_out, product, moments, planes]
    inputs += [weight for weight in call.weights if weight is not None]
    sums, backward = bytes_of_parts(monkeypatch, subject), submodule("triton_path").backward
    try:
        backward(call, grad_out, *saved, needs)  # is recorded
        with PeakBytes(*inputs) as bytes_:
            backward(call, grad_out, *saved, needs)
    finally:
        launches.clear()
    # The parameters' gradients are there from the beginning.
    gradients = sum(weight.nbytes for weight in problem.weights.values())
    # A fifth of the rows, rounded up, are those of a chunk.
    found = (bytes_.peak - sum(sums) - gradients) / call.x.nbytes
    most = 4 if recompute == "none" else 4.5
    assert most - 0.15 <= found <= most + 0.2


class NoKernels(TorchDispatchMode):
    """A context in which torch may allocate and view, and compute nothing."""

    MAY = (
        "alias", "detach", "empty", "empty_like", "expand", "new_empty", "select", "slice", "split",
        "split_with_sizes", "transpose", "unbind", "unsqueeze", "view",
    )  # fmt: skip

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ in self.MAY, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "recompute, of_stage_3, of_stage_1, groups", [("none", 1, 5, 1), ("product", 4, 4, 4)]
)
def test_launches_of_a_backward(
    submodule, call_of, on_triton, monkeypatch, recompute, of_stage_3, of_stage_1, groups
):
    """As many chunks, whatever L is from some L on, and no kernel of torch's."""
    subject, launched = submodule("triton_path.gradients"), []
    monkeypatch.setattr(subject, "_CHUNK_PAIRS", 64)
    monkeypatch.setattr(subject.Sequence, "_wave", lambda _: 1)  # whatever the device
    for name in ("SMALL_PLANES", "_SMALL_PLANES_AGAIN"):
        monkeypatch.setattr(subject, name, 0)
    monkeypatch.setattr(subject, "_GROUP_ELEMENTS", 1)
    launch = submodule("triton_parts.launch").PreparedLaunch
    monkeypatch.setattr(launch, "launch", lambda one, **tensors: launched.append(one.stage))
    problem = make_problem(1, 64, dtype=torch.float16, mask="bool")
    problem.x = torch.zeros(1, 80, 80, 64, dtype=torch.float16)
    problem.mask = torch.ones(1, 80, 80, dtype=torch.bool)
    call = call_of(problem)
    planes = torch.zeros(1, 3, 64, 80, 80, dtype=torch.float16, device=on_triton)
    moments, both = torch.zeros(1, 2, 80, 80, device=on_triton), planes[:, 1:]
    saved = planes[:, 0], moments, both if recompute == "none" else None
    with NoKernels(), submodule("hopper").without_variants():
        subject.run_backward(call, call.x, *saved, frozenset(leaves_of(problem)))
    again = {} if recompute == "none" else {"fused_dual_gemm": 1}
    assert Counter(launched) == again | {
        "emit_means": 1, "fused_ln_residual_bwd": of_stage_3, "norm_out_bwd": of_stage_3,
        "row_products": of_stage_3 + of_stage_1, "trimul_einsum": 2 * groups,
        "fused_dual_gemm_bwd": of_stage_1, "input_bwd": of_stage_1,
        "projection_gradients": 1, "norm_gradients": 1,
    }  # fmt: skip


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


@pytest.mark.parametrize(
    "channels, length, forward, chunks",
    [(256, 256, 4, 1), (128, 512, 4, 2), (256, 384, 4, 2), (256, 512, 4, 2), (256, 768, 4, 6)],
)
def test_launches_of_a_step_on_an_h200(
    submodule, meta_call, monkeypatch, channels, length, forward, chunks
):
    """A small sequence is one chunk, of 192 MiB, or two; a large one has as many at any L."""
    device, launched = submodule("triton_parts.device"), []
    launch = submodule("triton_parts.launch").PreparedLaunch
    monkeypatch.setattr(launch, "launch", lambda one, **tensors: launched.append(one.stage))
    x = torch.empty(1, length, length, channels, dtype=torch.bfloat16, device="meta")
    call, path = meta_call(channels, x), submodule("triton_path")
    launches = submodule("triton_parts.launch").Launches
    needs = {"x", *[name for name, of in call.weights._asdict().items() if of is not None]}
    with device.standing_in(device.target_of("sm_90", "NVIDIA H200", 132)), torch.no_grad():
        _, *saved = path._run_saving(call, launches(), True)
        assert len(launched) == forward
        launched.clear()
        backward = submodule("triton_path.gradients").run_backward
        backward(call, x, *saved, frozenset(needs), launches())
    of_chunks = [launched.count(name) for name in ("fused_dual_gemm_bwd", "input_bwd")]
    assert of_chunks == [chunks, 0]  # one kernel for both
    assert launched.count("trimul_einsum") == 1  # for da and db
    assert len(launched) == 7 + 2 * chunks


def test_sums_of_entries_that_have_other_kernels(submodule, meta_call):
    """Of two entries one has rows at multiples of 16 bytes, so a Hopper kernel, and its sums."""
    rehearsal = submodule("triton_parts.rehearsal").rehearsal
    target = submodule("triton_parts.device").target_of("sm_90", "NVIDIA H200", 132)
    channels, length, given = 128, 256, []

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    x = meta(2, length**2 * channels + 4)[:, 4:].view(2, length, length, channels)
    call = meta_call(channels, x)
    with rehearsal(target) as launches:
        write_down = launches._write_down

        def seen(prepared, **tensors):
            if prepared.stage == "row_products":
                given.append((prepared.value_of("partials"), tensors["partial_ptr"].shape[0]))
            write_down(prepared, **tensors)

        launches._write_down = seen
        call = submodule("triton_path.launches").for_kernels(
            submodule("triton_path.launches").twin_of(call)
        )
        shapes = submodule("triton_path").saved_shapes(call)
        product, moments = meta(*shapes[0]), meta(*shapes[1], dtype=torch.float32)
        needs = {"x", *[name for name, of in call.weights._asdict().items() if of is not None]}
        submodule("triton_path.gradients").run_backward(
            call, meta(2, length, length, channels), product, moments, None, frozenset(needs),
            launches,
        )  # fmt: skip
    assert len({held for held, _ in given}) > 1 and all([held == got for held, got in given])
