"""The two public functions, end to end, on the ATen path and on the Triton kernels."""

import logging
import sys
import types

import pytest
import torch
from helpers import (
    DTYPES,
    as_call,
    assert_close,
    formula,
    make_problem,
    reference,
    relative_error,
    run,
    with_leaves,
)

PATHS = ("aten", "triton")


@pytest.fixture(params=PATHS)
def device(request):
    """The device whose tensors take the path: the whole module runs on both."""
    return request.getfixturevalue("on_triton") if request.param == "triton" else "cpu"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_matches_float64(kernel, device, dtype, direction):
    problem = make_problem(
        24, 32, dtype=dtype, direction=direction, mask="soft", residual=True, drop_mask=True
    )
    assert_close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("length", [1, 2, 15, 17, 33])
def test_lengths(kernel, device, length):
    problem = make_problem(length, 16, mask="soft", direction="incoming")
    assert_close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("channels, hidden", [(16, 16), (48, 96), (72, 40), (7, 3), (1, 2)])
def test_widths(kernel, device, channels, hidden):
    problem = make_problem(9, channels, hidden, biases=True, mask="float")
    assert_close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("mask", [None, "bool", "float", "soft", "expanded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_masks(kernel, device, mask, dtype):
    problem = make_problem(11, 16, batch=2, mask=mask, dtype=dtype)
    assert_close(run(kernel, problem, device), problem)


def test_all_pairs_masked_leaves_the_gated_norm_bias(kernel, device):
    problem = make_problem(6, 16, residual=True)
    problem.mask = torch.zeros(1, 6, 6, dtype=torch.bool)
    assert_close(run(kernel, problem, device), problem)


def test_masked_pairs_contribute_nothing(kernel, device):
    """A right-padded batch gives the single sequence's rows; the pads' contents don't matter."""
    single = make_problem(10, 16)
    padded = make_problem(14, 16, batch=2)
    padded.x[0, :10, :10] = single.x[0]
    padded.weights = single.weights
    padded.mask = torch.ones(2, 14, 14, dtype=torch.bool)
    padded.mask[0, 10:] = False
    padded.mask[0, :, 10:] = False
    wanted = run(kernel, single, device)
    got = run(kernel, padded, device)[:1, :10, :10]
    assert relative_error(got, wanted.cpu().double()) < 1e-6


def test_strided_and_misaligned_inputs(kernel, device):
    problem = make_problem(9, 16, residual=True, mask="soft")
    wanted = run(kernel, problem, device).cpu().double()
    p = problem.to(device)
    channels_first = p.x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    transposed = p.x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(1, 9, 9, 21, device=device)
    wide[..., 5:] = p.x
    for x in (channels_first, transposed, wide[..., 5:]):
        problem.x = x
        assert not x.is_contiguous()
        assert relative_error(run(kernel, problem, device), wanted) < 1e-6
    shifted = torch.zeros(p.x.numel() + 1, device=device)[1:].view_as(p.x)
    shifted.copy_(p.x)
    problem.x = shifted
    assert shifted.data_ptr() % 16 != 0
    assert relative_error(run(kernel, problem, device), wanted) < 1e-6


def test_parameter_vectors_of_any_stride(kernel, device):
    problem = make_problem(7, 16, biases=True)
    wanted = run(kernel, problem, device).cpu().double()
    moved = problem.to(device)

    def replace_vectors(by):
        for group in (moved.weights, moved.biases):
            group.update({name: by(v) for name, v in group.items() if v.ndim == 1})

    replace_vectors(lambda v: torch.stack([v, torch.full_like(v, 99.0)], dim=1)[:, 0])
    assert not moved.weights["norm_in_weight"].is_contiguous()
    assert relative_error(run(kernel, moved, device), wanted) < 1e-6
    replace_vectors(lambda v: torch.full_like(v[:1], 0.5).expand(v.shape))
    assert moved.weights["norm_in_weight"].stride() == (0,)
    assert_close(run(kernel, moved, device), moved)


def test_channels_more_than_two_to_the_31_elements_apart(kernel, device):
    """A channels-first pair tensor of a long protein, with all but a few of its pages left out."""
    problem = make_problem(4, 16, dtype=torch.bfloat16)
    stride = 150_000_000
    far = torch.empty(15 * stride + 64, dtype=torch.bfloat16, device=device)
    far = far.as_strided((1, 4, 4, 16), (0, 4, 1, stride))
    far.copy_(problem.x)
    problem.x = far
    assert_close(run(kernel, problem, device), problem)


def test_expanded_pair(kernel, device):
    problem = make_problem(7, 16)
    row = torch.randn(1, 1, 7, 16)
    problem.x = row.expand(1, 7, 7, 16)
    assert_close(run(kernel, problem, device), problem)


def test_residual_may_be_the_pair_and_inputs_stay(kernel, device):
    problem = make_problem(8, 16, mask="soft")
    problem.residual = problem.x
    before = problem.x.clone()
    assert_close(run(kernel, problem, device), problem)
    assert torch.equal(problem.x, before)


def test_drop_mask_forms_agree(kernel, device):
    problem = make_problem(8, 16, batch=2, drop_mask=True, residual=True)
    four = run(kernel, problem, device)
    problem.drop_mask = problem.drop_mask.reshape(2 * 8, 16)
    assert torch.equal(four, run(kernel, problem, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [48, 200])
def test_constant_rows_normalise_to_the_bias(kernel, device, dtype, channels):
    """Whatever the constant: constant rows give what zero rows give, bit for bit."""
    problem = make_problem(3, channels, 16, dtype=dtype, mask="soft")
    problem.x = torch.zeros_like(problem.x)
    wanted = run(kernel, problem, device)
    constants = torch.tensor([1.0, 1000.0, -3e4, 1e30, 3e38, -1.0, 0.1, 1e-30, -3e38])
    problem.x = constants.to(dtype).view(1, 3, 3, 1).expand_as(problem.x).contiguous()
    assert torch.equal(run(kernel, problem, device), wanted)


def test_means_far_from_zero_keep_their_digits(kernel, device):
    problem = make_problem(6, 32)
    problem.x = problem.x + 1000.0
    assert_close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("shape", [(0, 5, 5, 16), (2, 0, 0, 16)])
def test_empty(kernel, device, shape):
    problem = make_problem(4, 16)
    problem.x = torch.zeros(shape)
    out = run(kernel, problem, device)
    assert out.shape == shape and out.dtype == torch.float32


@pytest.mark.kernels_ci
def test_equal_bits_from_equal_calls(kernel, device):
    problem = make_problem(20, 32, dtype=torch.bfloat16, mask="soft", residual=True)
    assert torch.equal(run(kernel, problem, device), run(kernel, problem, device))


def test_any_number_of_leading_dimensions(kernel, device):
    problem = make_problem(5, 16, batch=6, mask="soft")
    wanted = run(kernel, problem, device)
    p = problem.to(device)
    update = kernel.triangle_multiplicative_update
    got = update(p.x.view(2, 3, 5, 5, 16), mask=p.mask.view(2, 3, 5, 5), **p.weights)
    assert torch.equal(got.view(6, 5, 5, 16), wanted)
    one = update(p.x[0], mask=p.mask[0], **p.weights)
    assert one.shape == (5, 5, 16)
    assert relative_error(one, wanted[0].cpu().double()) < 1e-6
    same = update(p.x, mask=p.mask[0], **p.weights)  # broadcast over the batch
    problem.mask = problem.mask[:1].expand(6, 5, 5)
    assert torch.equal(same, run(kernel, problem, device))


def test_absent_norm_weights_mean_ones_and_zeros(kernel, device):
    problem = make_problem(5, 16)
    for name in ("norm_in_weight", "norm_out_weight"):
        problem.weights[name] = torch.ones(16)
    for name in ("norm_in_bias", "norm_out_bias"):
        problem.weights[name] = torch.zeros(16)
    wanted = run(kernel, problem, device)
    for name in ("norm_in_weight", "norm_out_weight", "norm_in_bias", "norm_out_bias"):
        problem.weights[name] = None
    assert torch.equal(run(kernel, problem, device), wanted)


def test_each_norm_has_its_own_eps(kernel, device):
    problem = make_problem(5, 16)
    p = problem.to(device)

    def call(**eps):
        function = kernel.triangle_multiplicative_update_with_residual
        return function(p.x, "outgoing", None, None, **p.weights, **eps)

    both, inner, outer = call(eps=0.5), call(eps=0.5, eps_out=1e-5), call(eps=1e-5, eps_out=0.5)
    assert torch.equal(both, call(eps=0.5, eps_out=0.5))
    assert not torch.equal(both, inner) and not torch.equal(both, outer)
    problem.eps = 0.5
    assert relative_error(both, reference(problem)) < 1e-5


def test_precisions_of_float32(kernel, device, monkeypatch):
    """Each precision is at least as exact as its name; the default follows torch's own setting."""
    p = make_problem(16, 32)
    wanted = reference(p)
    q = p.to(device)
    bounds = {None: 5e-6, "IEEE": 5e-6, "TF32x3": 5e-6, "TF32": 2e-3, "bfloat16": 1e-2}
    for precision, bound in bounds.items():
        out = kernel.triangle_multiplicative_update(q.x, precision=precision, **q.weights)
        assert relative_error(out, wanted) <= bound, precision
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        out = kernel.triangle_multiplicative_update(q.x, **q.weights)
    finally:
        torch.set_float32_matmul_precision(previous)
    assert relative_error(out, wanted) <= bounds["TF32"]


def test_forward_mode_derivatives_take_the_formula(kernel, device):
    problem = make_problem(5, 16)
    p = problem.to(device)
    tangent = torch.randn_like(p.x)

    def update(x):
        return kernel.triangle_multiplicative_update(x, **p.weights)

    _, got = torch.func.jvp(update, (p.x,), (tangent,))
    _, wanted = torch.func.jvp(
        lambda x: formula(with_leaves(problem, {"x": x})),
        (problem.x.double(),),
        (tangent.cpu().double(),),
    )
    assert relative_error(got, wanted) <= 2e-5


def test_empty_batch_with_drop_mask(kernel, device):
    p = make_problem(5, 16).to(device)
    x = torch.zeros(0, 5, 5, 16, device=device)
    function = kernel.triangle_multiplicative_update_with_residual
    out = function(x, "outgoing", None, torch.ones(0, 16, device=device), **p.weights)
    assert out.shape == (0, 5, 5, 16)


def test_lengths_past_32_bit_planes_are_refused(kernel, submodule):
    limit = submodule("validation").MAX_LENGTH
    pitch = submodule("triton_parts.tiles").padded_pitch
    assert limit * pitch(limit) < 2**31 <= (limit + 1) * pitch(limit + 1)
    p = make_problem(2, 1)
    x = torch.empty(1, limit + 1, limit + 1, 1, device="meta")
    with pytest.raises(NotImplementedError, match=f"x may have at most {limit} residues"):
        kernel.triangle_multiplicative_update(x, **p.weights)


def test_fp32_dots_that_a_target_lacks_are_done_by_its_exact_one(submodule):
    target_of = submodule("triton_parts.device").target_of
    precision = submodule("triton_parts.launch").dot_precision
    wanted = {
        "sm_90": {"fp32": "tf32x3", "tf32": "tf32", "ieee": "ieee", "bf16": "bf16"},
        "gfx942": {"fp32": "ieee", "tf32": "tf32", "tf32x3": "ieee", "bf16": "bf16"},
        "gfx950": {"fp32": "ieee", "tf32": "ieee", "tf32x3": "ieee"},
        "xpu": {"fp32": "ieee", "tf32": "ieee"},
    }
    for target, words in wanted.items():
        dots = target_of(target, "any").fp32_dots
        assert {word: precision(word, dots) for word in words} == words


def test_runs_on_the_device_of_its_tensors(kernel):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    problem = make_problem(20, 32)
    with torch.cuda.device(0):
        assert_close(run(kernel, problem, "cuda:1"), problem)


@pytest.mark.parametrize("name, memory", [("trimul_fwd", "default"), ("trimul_fwd_", "lean")])
@pytest.mark.parametrize("lengths", [None, (3,)])
def test_ops_are_registered_as_torch_wants_them(kernel, device, submodule, name, memory, lengths):
    problem = make_problem(5, 16, mask="soft", residual=True).to(device)
    if lengths is not None:
        lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    settings = {"precision": "default", "memory": memory, "inplace": name == "trimul_fwd_"}
    call = as_call(submodule("_call"), problem, lengths=lengths, **settings)
    op = getattr(submodule("_ops").ops, name).default
    results = torch.library.opcheck(op, call.flat())
    assert set(results.values()) == {"SUCCESS"}


def test_compiles_into_one_graph(kernel, device):
    problem = make_problem(9, 16, mask="bool", residual=True).to(device)

    def block(x, residual, mask):
        out = kernel.triangle_multiplicative_update_with_residual(
            x, "incoming", residual, None, mask=mask, **problem.weights
        )
        return out * 2

    arguments = (problem.x, problem.residual, problem.mask)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), block(*arguments))


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [32, 128, 256, 320])
@pytest.mark.parametrize("length", [64, 200])
def test_shipped_settings_on_a_gpu(kernel, on_triton, dtype, channels, length):
    """What only machine code can get wrong: each width class, small L or not, and many times."""
    if on_triton == "cpu":
        pytest.skip("the interpreter's setting is another")
    for direction in ("outgoing", "incoming"):
        problem = make_problem(
            length, channels, dtype=dtype, direction=direction, mask="soft", residual=True
        )
        first = run(kernel, problem, on_triton)
        assert_close(first, problem)
        moved = problem.to(on_triton)
        for _ in range(20):
            assert torch.equal(run(kernel, moved, on_triton), first)


def test_no_compilation_from_one_length_to_the_next(kernel, submodule, on_triton):
    if on_triton == "cpu":
        pytest.skip("the interpreter compiles nothing; test_resources.py counts specialisations")
    jit = submodule("fused_dual_gemm")._fused_dual_gemm_fwd_kernel

    def compiled():
        return sum(len(cache[0]) for cache in jit.device_caches.values())

    for length in (130, 199):  # of two classes, on some targets
        run(kernel, make_problem(length, 128, dtype=torch.bfloat16, mask="bool"), on_triton)
    before = compiled()
    for length in range(131, 200, 7):
        run(kernel, make_problem(length, 128, dtype=torch.bfloat16, mask="bool"), on_triton)
    assert compiled() == before


def test_indices_past_two_to_the_31(kernel, on_triton):
    if on_triton == "cpu":
        pytest.skip("needs 40 GB of GPU memory")
    length, channels = 2920, 256
    assert length * length * channels > 2**31
    small = make_problem(8, channels, dtype=torch.bfloat16)
    x = torch.zeros(1, length, length, channels, dtype=torch.bfloat16, device=on_triton)
    mask = torch.zeros(1, length, length, dtype=torch.bool, device=on_triton)
    x[:, -8:, -8:] = small.x.to(on_triton)
    mask[:, -8:, -8:] = True
    weights = {name: value.to(on_triton) for name, value in small.weights.items()}
    out = kernel.triangle_multiplicative_update(x, mask=mask, **weights)
    assert relative_error(out[:, -8:, -8:], reference(small)) <= 4.8e-3


class TestExecutionPath:
    """Which path runs, and that a GPU call that can't take Triton says why, once."""

    def test_cpu(self, submodule):
        path = submodule("paths").execution_path(torch.device("cpu"), torch.float32)
        assert path.name == "aten" and "CPU" in path.reason

    def test_interpreter(self, submodule, on_triton):
        paths = submodule("paths")
        path = paths.execution_path(torch.device(on_triton), torch.bfloat16)
        assert path.name == "triton"

    def test_unknown_device_and_dtype(self, submodule):
        paths = submodule("paths")
        path = paths.execution_path(torch.device("meta"), torch.float32)
        assert path == ("aten", "there are no Triton kernels for meta tensors")
        with pytest.raises(TypeError, match="dtype must be .*; got torch.float64"):
            paths.execution_path(torch.device("cpu"), torch.float64)

    def test_old_gpu_and_old_triton(self, submodule, monkeypatch):
        triton = pytest.importorskip("triton")
        paths = submodule("paths")
        cuda = torch.device("cuda", 0)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
        reason = paths.execution_path(cuda, torch.float16).reason
        assert reason == "Tesla T4 has compute capability 7.5; the kernels need 8.0"
        paths.execution_path.cache_clear()
        monkeypatch.setattr(triton, "__version__", "3.5.1")
        assert paths.execution_path(cuda, torch.float16).reason == "Triton 3.5.1 is older than 3.6"

    @pytest.mark.parametrize(
        ("version", "name"),
        [
            ("3.9rc1", "triton"),
            ("3.10.0.post26", "triton"),
            ("3.6.0+git1a2b3c", "triton"),
            ("4", "triton"),
            ("3.5rc2", "aten"),
        ],
    )
    def test_tritons_version_in_any_form(self, submodule, monkeypatch, version, name):
        triton = pytest.importorskip("triton")
        paths = submodule("paths")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(triton, "__version__", version)
        path = paths.execution_path.__wrapped__(torch.device("cuda", 0), torch.float16)
        assert path.name == name and f"Triton {version} " in path.reason

    def test_a_folder_named_triton(self, submodule, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
        find = submodule("paths").execution_path.__wrapped__
        path = find(torch.device("cuda", 0), torch.float16)
        assert path.name == "aten" and path.reason.startswith("Triton can't be imported (")

    def test_reason_is_said_from_a_compiled_caller(self, submodule, caplog):
        paths = submodule("paths")
        paths.say_once.cache_clear()

        def caller(x):
            paths.say_plain("there is no reason")
            return x + 1

        with caplog.at_level(logging.WARNING):
            compiled = torch.compile(caller, fullgraph=True, backend="eager")
            for _ in range(2):
                assert compiled(torch.zeros(1)) == 1
        assert len(caplog.records) == 1

    def test_reason_is_said_once(self, submodule, caplog):
        paths = submodule("paths")
        paths.say_once.cache_clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                paths.say_plain("Triton can't be imported")
        assert [record.getMessage() for record in caplog.records] == [
            "The triangle multiplication runs in plain PyTorch: Triton can't be imported."
        ]
