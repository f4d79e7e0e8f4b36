"""`swiglu_transition`, end to end, on each path."""

import dataclasses

import pytest
import torch
from helpers import (
    DTYPES,
    assert_close,
    assert_no_worse,
    reference,
    relative_error,
    run,
    seeded,
    with_leaves,
)
from transitions import (
    BIASES,
    LAYOUTS,
    NORMS,
    PATHS,
    between,
    in_tree_transition,
    make_transition,
    poisoned,
    shifted,
    turned,
)

# The most that errors of 16 bits may be beside plain PyTorch's. GEMMs of a CPU in bf16 round their
# results before the gate, as plain PyTorch's do.
BESIDE_PLAIN = {"aten": 0.95, "triton": 0.85}


@pytest.fixture(params=PATHS)
def path(request) -> str:
    """The whole module runs on each path."""
    return request.param


@pytest.fixture
def device(request, path) -> str:
    """The device whose tensors take the path."""
    return request.getfixturevalue("on_triton") if path == "triton" else "cpu"


@pytest.fixture
def close(path):
    """close(got, problem): `assert_close` with the path's bound."""
    return lambda got, problem: assert_close(got, problem, BESIDE_PLAIN[path])


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [None, "own", "x"])
def test_matches_float64(kernel, device, close, dtype, residual):
    problem = make_transition((1, 24, 24, 32), 96, dtype=dtype, residual=residual)
    close(run(kernel, problem, device), problem)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_beside_the_in_tree_modules(kernel, path, device, dtype):
    """With x added, as the module does, and of the update alone."""
    whole, update = [], []
    for seed in range(2):
        problem = make_transition((1, 16, 16, 64), 256, dtype=dtype, residual="x", seed=seed)
        module = in_tree_transition(problem)
        with torch.no_grad():
            of_module = module(problem.x), module.mlp(module.norm(problem.x))
        alone = dataclasses.replace(problem, residual=None)
        for draws, p, plain in ((whole, problem, of_module[0]), (update, alone, of_module[1])):
            draws.append((run(kernel, p, device), plain, reference(p)))
    assert_no_worse(whole, BESIDE_PLAIN[path])
    assert_no_worse(update, BESIDE_PLAIN[path])


@pytest.mark.parametrize("shape", [
    (32,), (5, 32), (3, 5, 32), (2, 3, 5, 32), (2, 1, 3, 5, 32), (1, 2, 1, 3, 2, 32),
])  # fmt: skip
@pytest.mark.parametrize("residual", [None, "own"])
def test_any_number_of_leading_dimensions(kernel, device, close, shape, residual):
    problem = make_transition(shape, 48, residual=residual)
    close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("channels, hidden", [
    (1, 1), (1, 9), (16, 1), (7, 3), (33, 65), (48, 200), (130, 72),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_widths(kernel, device, close, channels, hidden, dtype):
    problem = make_transition(
        (40, 13, channels), hidden, dtype=dtype, biases=BIASES, residual="own"
    )
    close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("rows", [1, 2, 15, 17, 127, 129, 1000])
def test_numbers_of_rows(kernel, device, close, rows):
    problem = make_transition((rows, 16), 24, residual="own")
    close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("given", [(), *[(name,) for name in BIASES], BIASES[:2], BIASES])
@pytest.mark.parametrize("dtype, bias_dtype", [
    (torch.bfloat16, torch.float32), (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16), (torch.bfloat16, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("residual", [None, "own"])
def test_biases(kernel, device, close, given, dtype, bias_dtype, residual):
    problem = make_transition(
        (6, 7, 32), 48, dtype=dtype, biases=given, bias_dtype=bias_dtype, residual=residual
    )
    close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BIASES)
def test_biases_keep_digits_that_the_dtype_of_x_lacks(kernel, device, name, dtype):
    """In 16 bits such an error is lost among the others, but for its direction."""
    problem = make_transition((40, 40, 32), 48, dtype=dtype, residual="own", biases=BIASES)
    width, unit = problem.biases[name].shape[0], torch.finfo(dtype).eps
    problem.biases[name] = torch.full((width,), 1 + 0.45 * unit)
    weight = name.replace("bias", "weight")
    problem.weights[weight] = torch.zeros_like(problem.weights[weight])
    rounded = dataclasses.replace(
        problem, biases=problem.biases | {name: problem.biases[name].to(dtype)}
    )
    exact = reference(problem)
    step = reference(rounded) - exact
    off = run(kernel, problem, device).cpu().double() - exact
    assert abs(float((off * step).sum() / step.square().sum())) < 0.5


@pytest.mark.parametrize("norm_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_any_dtype(kernel, device, close, dtype, norm_dtype):
    problem = make_transition((6, 7, 32), 48, dtype=dtype, norm_dtype=norm_dtype)
    close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("absent", [NORMS, *[(name,) for name in NORMS]])
def test_absent_norm_parameters_mean_ones_and_zeros(kernel, device, absent):
    problem = make_transition((6, 7, 32), 48)
    for name in absent:
        problem.weights[name] = torch.full((32,), float(name.endswith("weight")))
    wanted = run(kernel, problem, device)
    problem.weights |= dict.fromkeys(absent)
    assert relative_error(run(kernel, problem, device), wanted.cpu().double()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_x_and_the_residual(kernel, device, layout, dtype):
    problem = make_transition((2, 9, 7, 16), 24, dtype=dtype, residual="own").to(device)
    wanted = run(kernel, problem, device)
    for names in (("x",), ("residual",), ("x", "residual")):
        laid = with_leaves(problem, {n: LAYOUTS[layout](getattr(problem, n)) for n in names})
        value = getattr(laid, names[0])
        assert not value.is_contiguous() or value.data_ptr() % 16
        got = run(kernel, laid, device)
        assert got.is_contiguous()
        assert relative_error(got, wanted.cpu().double()) <= {4: 1e-6, 2: 2e-3}[dtype.itemsize]


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1, 2)])
def test_expanded(kernel, device, close, axes):
    problem = make_transition((2, 5, 7, 16), 24, residual="own")
    for name in ("x", "residual"):
        value = getattr(problem, name)
        for axis in axes:
            value = value.narrow(axis, 0, 1)
        setattr(problem, name, value.expand(2, 5, 7, 16))
    close(run(kernel, problem, device), problem)


def test_leading_dimensions_that_cannot_be_merged(kernel, device, close):
    problem = make_transition((2, 3, 2, 5, 4, 16), 24, residual="own")
    for name in ("x", "residual"):
        value = getattr(problem, name).transpose(0, 2).contiguous().transpose(0, 2)
        setattr(problem, name, value)
    close(run(kernel, problem, device), problem)


def test_channels_more_than_two_to_the_31_elements_apart(kernel, device, close):
    """A channels-first pair tensor of a long protein, with all but a few of its pages left out."""
    problem = make_transition((1, 4, 4, 16), 24, dtype=torch.bfloat16)
    stride = 150_000_000
    far = torch.empty(15 * stride + 64, dtype=torch.bfloat16, device=device)
    far = far.as_strided((1, 4, 4, 16), (0, 4, 1, stride))
    far.copy_(problem.x)
    problem.x = far
    close(run(kernel, problem, device), problem)


WEIGHT_LAYOUTS = {
    "columns first": lambda w: w.t().contiguous().t(),
    "every other column": between,
    "unaligned rows": lambda w: torch.nn.functional.pad(w, (1, 2))[:, 1:-2],
    "an odd offset": shifted,
    "one row for all": lambda w: w[:1].expand(w.shape),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("name", ["gate_weight", "up_weight", "down_weight"])
def test_strides_of_the_projections(kernel, device, close, name, layout, dtype):
    problem = make_transition((5, 9, 32), 48, dtype=dtype, residual="own")
    problem.weights[name] = WEIGHT_LAYOUTS[layout](problem.weights[name])
    close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("halves", ["gate first", "up first", "rows in turn"])
def test_gate_and_up_may_be_views_of_one_matrix(kernel, device, halves):
    problem = make_transition((5, 9, 32), 48, dtype=torch.bfloat16, residual="own").to(device)
    gate, up = (problem.weights[name].clone() for name in ("gate_weight", "up_weight"))
    wanted = run(kernel, problem, device)
    if halves == "rows in turn":
        views = torch.stack([gate, up], dim=1).unbind(1)
    elif halves == "gate first":
        views = torch.cat([gate, up]).chunk(2)
    else:
        views = torch.cat([up, gate]).chunk(2)[::-1]
    problem.weights |= dict(zip(("gate_weight", "up_weight"), views, strict=True))
    assert relative_error(run(kernel, problem, device), wanted.cpu().double()) <= 2e-3


def test_parameter_vectors_of_any_stride(kernel, device, close):
    problem = make_transition((5, 9, 16), 24, biases=BIASES)
    wanted = run(kernel, problem, device).cpu().double()
    moved = problem.to(device)

    def replace_vectors(by):
        for group in (moved.weights, moved.biases):
            group.update({name: by(v) for name, v in group.items() if v.ndim == 1})

    replace_vectors(between)
    assert not moved.biases["up_bias"].is_contiguous()
    assert relative_error(run(kernel, moved, device), wanted) < 1e-6
    replace_vectors(lambda v: torch.full_like(v[:1], 0.5).expand(v.shape))
    close(run(kernel, moved, device), moved)


@pytest.mark.parametrize("residual", [None, "own", "x"])
def test_arguments_stay_as_they_are(kernel, device, residual):
    problem = make_transition((5, 9, 16), 24, residual=residual, biases=BIASES).to(device)
    given = [problem.x, *problem.weights.values(), *problem.biases.values()]
    given += [] if residual is None else [problem.residual]
    before = [value.clone() for value in given]
    out = run(kernel, problem, device)
    assert all(torch.equal(one, other) for one, other in zip(given, before, strict=True))
    assert out.untyped_storage().data_ptr() not in [v.untyped_storage().data_ptr() for v in given]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16,), (33, 16), (2, 9, 9, 16), (2, 2, 3, 3, 16)])
@pytest.mark.parametrize("residual", ["own", "x"])
def test_over_the_residual(kernel, device, dtype, shape, residual):
    problem = make_transition(shape, 24, dtype=dtype, residual=residual).to(device)
    wanted = run(kernel, problem, device)
    assert wanted is not problem.residual
    got = problem.run(kernel, inplace=True)
    assert got is problem.residual and torch.equal(got, wanted)


def test_over_the_residual_nothing_beside_it_is_written(kernel, device):
    problem = make_transition((2, 5, 5, 16), 24, residual="own", lengths=(5, 3)).to(device)
    memory = torch.full((problem.x.numel() + 20,), 99.0, device=device)
    target = memory[10:-10].view(problem.x.shape).copy_(problem.residual)
    wanted = problem.run(kernel)
    got = problem.run(kernel, residual=target, inplace=True)
    assert got is target and torch.equal(got, wanted)
    assert (memory[:10] == 99).all() and (memory[-10:] == 99).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [48, 200])
def test_constant_rows_normalise_to_the_bias(kernel, device, dtype, channels):
    """Whatever the constant: constant rows give what zero rows give, bit for bit."""
    problem = make_transition((3, 3, channels), 16, dtype=dtype)
    problem.x = torch.zeros_like(problem.x)
    wanted = run(kernel, problem, device)
    constants = torch.tensor([1.0, 1000.0, -3e4, 1e30, 3e38, -1.0, 0.1, 1e-30, -3e38])
    problem.x = constants.to(dtype).view(3, 3, 1).expand_as(problem.x).contiguous()
    assert torch.equal(run(kernel, problem, device), wanted)


def test_means_far_from_zero_keep_their_digits(kernel, device, close):
    problem = make_transition((6, 6, 32), 48)
    problem.x = problem.x + 1000.0
    close(run(kernel, problem, device), problem)


@pytest.mark.parametrize("eps", [1e-8, 1e-3, 0.5, 1])
def test_eps(kernel, device, close, eps):
    problem = make_transition((6, 6, 32), 48)
    problem.x = problem.x * 0.1
    problem.eps = eps
    close(run(kernel, problem, device), problem)


def test_wide_gates(kernel, device, close):
    """Where silu is the identity, and where it vanishes."""
    problem = make_transition((9, 9, 32), 48)
    problem.weights["gate_weight"] = problem.weights["gate_weight"] * 50
    out = run(kernel, problem, device)
    assert out.isfinite().all()
    close(out, problem)


def test_precisions_of_float32(kernel, device):
    """Each precision is at least as exact as its name; the default follows torch's own setting.

    The operands of three products in a row are shortened, gate, up and down, six in all: to ten
    bits of TF32 (a GPU cuts them off), or rounded to eight of bfloat16.
    """
    problem = make_transition((16, 16, 32), 64)
    wanted = reference(problem)
    bounds = {None: 5e-6, "IEEE": 5e-6, "TF32x3": 5e-6, "TF32": 6 * 2**-10, "bfloat16": 6 * 2**-9}
    for precision, bound in bounds.items():
        out = run(kernel, problem, device, precision=precision)
        assert relative_error(out, wanted) <= bound, precision
    previous = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        out = run(kernel, problem, device)
    finally:
        torch.set_float32_matmul_precision(previous)
    assert relative_error(out, wanted) <= bounds["TF32"]


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_bits_from_equal_calls(kernel, device, dtype):
    problem = make_transition((1, 20, 20, 32), 96, dtype=dtype, residual="own", biases=BIASES)
    assert torch.equal(run(kernel, problem, device), run(kernel, problem, device))


@pytest.mark.parametrize("lengths", [None, "given"])
@pytest.mark.parametrize("shape", [(0, 5, 5, 16), (2, 0, 0, 16), (0, 2, 3, 3, 16)])
@pytest.mark.parametrize("inplace", [False, True])
def test_empty(kernel, device, shape, lengths, inplace):
    problem = make_transition((4, 16), 24)
    problem.x = torch.zeros(shape)
    problem.residual = torch.zeros(shape)
    if lengths is not None:
        problem.lengths = torch.zeros(shape[:-3], dtype=torch.int32)
    out = run(kernel, problem, device, inplace=inplace)
    assert out.shape == shape and out.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16)])
def test_empty_rows(kernel, device, shape):
    problem = make_transition(shape, 24)
    assert run(kernel, problem, device).shape == shape


class TestLengths:
    @pytest.fixture
    def no_numbers(self):
        """torch.empty gives NaN: what isn't written shows."""
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)

    @pytest.mark.kernels_ci
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("residual", [None, "own"])
    def test_padding_has_no_update(self, kernel, device, close, no_numbers, dtype, residual):
        """Even if x is NaN there."""
        problem = make_transition(
            (4, 11, 11, 32), 48, dtype=dtype, residual=residual, lengths=(11, 8, 1, 0),
            biases=BIASES,
        )  # fmt: skip
        got = run(kernel, poisoned(problem), device)
        close(got, problem)
        padding = poisoned(problem).x.isnan()
        left = torch.zeros(()) if residual is None else problem.residual[padding]
        assert (got.cpu()[padding] == left).all()

    @pytest.mark.parametrize("residual", ["own", "x"])
    def test_over_the_residual(self, kernel, device, residual):
        problem = make_transition(
            (3, 9, 9, 16), 24, dtype=torch.bfloat16, residual=residual, lengths=(9, 4, 0)
        ).to(device)
        wanted = problem.run(kernel)
        got = problem.run(kernel, inplace=True)
        assert got is problem.residual and torch.equal(got, wanted)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_beyond_the_sequence(self, kernel, device, no_numbers, dtype):
        problem = make_transition((2, 6, 6, 16), 24)
        whole = run(kernel, problem, device).cpu().double()
        lengths = torch.tensor([9, 2**31 - 1], dtype=dtype, device=device)
        assert relative_error(run(kernel, problem, device, lengths=lengths), whole) <= 1e-6
        none = torch.tensor([-3, 0], dtype=dtype, device=device)
        assert not run(kernel, problem, device, lengths=none).any()

    def test_of_any_rank(self, kernel, device):
        problem = make_transition((2, 3, 7, 7, 16), 24, lengths=(7, 5, 0, 1, 2, 6)).to(device)
        whole = problem.run(kernel)
        shared = problem.run(kernel, lengths=problem.lengths[:1])
        assert relative_error(shared[1], whole[0].cpu().double()) > 0.1
        assert relative_error(shared[0], whole[0].cpu().double()) <= 1e-6
        alone = kernel.swiglu_transition(
            problem.x[0, 1], **problem.weights, lengths=problem.lengths[0, 1]
        )
        assert alone.shape == (7, 7, 16)
        assert relative_error(alone, whole[0, 1].cpu().double()) <= 1e-6

    def test_strided_lengths_and_rows(self, kernel, device, close):
        problem = make_transition((3, 6, 6, 16), 24, residual="own", lengths=(6, 3, 2))
        problem.lengths = torch.stack([problem.lengths, problem.lengths + 1], dim=1)[:, 0]
        problem.x, problem.residual = turned(problem.x), turned(problem.residual)
        close(run(kernel, problem, device), problem)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, hidden", [(64, 256), (128, 512), (256, 1024), (320, 1280)])
@pytest.mark.parametrize("length", [64, 200])
def test_shipped_settings_on_a_gpu(kernel, on_triton, dtype, channels, hidden, length):
    """What only machine code can get wrong: each width class, and many times."""
    if on_triton == "cpu":
        pytest.skip("the interpreter's setting is another")
    problem = make_transition((1, length, length, channels), hidden, dtype=dtype, residual="own")
    first = run(kernel, problem, on_triton)
    assert_close(first, problem)
    moved = problem.to(on_triton)
    for _ in range(20):
        assert torch.equal(run(kernel, moved, on_triton), first)


def test_indices_past_two_to_the_31(kernel, on_triton):
    if on_triton == "cpu":
        pytest.skip("needs 10 GB of GPU memory")
    small = make_transition((8, 256), 512, dtype=torch.bfloat16)
    rows = 2**31 // 256 + 64
    x = torch.randn(rows, 256, generator=seeded()).bfloat16().to(on_triton)
    x[-8:] = small.x.to(on_triton)
    weights = {name: value.to(on_triton) for name, value in small.weights.items()}
    out = kernel.swiglu_transition(x, **weights)
    assert relative_error(out[-8:], reference(small)) <= 4.8e-3
