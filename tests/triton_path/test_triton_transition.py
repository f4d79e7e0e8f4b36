"""The transition's schedules on the Triton path: chunks, merged axes, memory, launches."""

import functools
import importlib
import itertools

import pytest
import torch
from helpers import (
    assert_close,
    leaves_of,
    reference,
    reference_gradients,
    relative_error,
    run,
    seeded,
)
from peak_bytes import PeakBytes, bytes_of_parts
from transitions import BIASES, NORMS, as_transition, make_transition, poisoned

FLOAT32_BUDGET = 2e-5
NAMES = ("x", *NORMS, "gate_weight", "up_weight", "down_weight", *BIASES)


@pytest.fixture
def subject(submodule):
    """The path; launches of other tests, which may have had other settings, are forgotten."""
    launches = submodule("triton_path.launches")._launches
    launches.clear()
    yield submodule("triton_path.transition")
    launches.clear()


@pytest.fixture
def call_of(submodule, on_triton):
    return lambda problem, **others: as_transition(
        submodule("_call"), problem.to(on_triton), **others
    )


@pytest.fixture
def small_chunks(subject, monkeypatch):
    """Chunks of few rows, forward and backward; small_chunks(bytes) says how many."""

    def set_(forward, backward):
        monkeypatch.setattr(subject, "_FORWARD_CHUNK", (1e-9, forward, forward))
        monkeypatch.setattr(subject, "_BACKWARD_CHUNK", (1e-9, backward, backward))
        monkeypatch.setattr(subject, "_TILE", 8)

    return set_


def grad_of(problem, device):
    return torch.randn(problem.x.shape, generator=seeded(5)).to(problem.x.dtype).to(device)


def gradients(subject, call_of, problem, device, needs=None):
    call = call_of(problem)
    grad = grad_of(problem, device).view(call.x.shape)
    needs = set(needs or leaves_of(problem)) - {"residual"}
    return subject.backward(call, grad, frozenset(needs))


def assert_gradients(got, problem, budget=FLOAT32_BUDGET):
    wanted = reference_gradients(problem, grad_of(problem, "cpu"))
    for name, gradient in got.items():
        error = relative_error(gradient.view(wanted[name].shape), wanted[name])
        assert error <= budget, (name, error)


SHAPES = {
    "one sequence": (1, 7, 9, 16),
    "rows": (70, 16),
    "several sequences": (5, 3, 4, 16),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("strided", [False, True])
def test_chunks(
    subject, small_chunks, call_of, recorded, on_triton, shape, lengths, strided
):
    """Whole sequences, some sequences, rows of one, and all at once: the same, but for order."""
    shape = SHAPES[shape]
    if lengths:
        shape = (shape[0], 9, 9, 16) if len(shape) == 4 else (1, 9, 9, 16)
    problem = make_transition(
        shape, 24, residual="own", biases=BIASES,
        lengths=[max(9 - 3 * entry, 0) for entry in range(shape[0])] if lengths else None,
    )  # fmt: skip
    if strided and len(shape) == 4:
        problem.x, problem.residual = (
            value.transpose(1, 2).contiguous().transpose(1, 2)
            for value in (problem.x, problem.residual)
        )
    given = poisoned(problem) if lengths else problem
    counts = set()
    row = 24 * 4
    for rows in (1, 20, 100, 10_000):
        small_chunks(rows * row, rows * row * (3 * 24 + 2 * 16) // 24)
        recorded.clear()
        assert_close(subject.forward(call_of(given)).view(shape), problem)
        counts.add(sum(stage == "swiglu_hidden" for stage, _ in recorded))
        recorded.clear()
        got = gradients(subject, call_of, given, on_triton)
        assert_gradients(got, problem)
        counts.add(sum(stage == "swiglu_bwd" for stage, _ in recorded))
    assert len(counts) >= 3 and 1 in counts


@pytest.mark.parametrize("batch, rows, columns", [
    (1, 100, 1), (1, 1, 100), (7, 5, 9), (3, 50, 1), (2, 3, 1000), (1, 1000, 3),
])  # fmt: skip
@pytest.mark.parametrize("least", [1, 100, 5_000, 10**9])
def test_chunks_are_a_partition(subject, submodule, batch, rows, columns, least):
    """All of x, once, the largest first; of one axis in whole tiles."""
    problem = make_transition((1, 16), 24)
    call = as_transition(submodule("_call"), problem)
    call = call._replace(x=torch.empty(batch, rows, columns, 16))
    seen = torch.zeros(batch, rows)
    sizes = []
    for entries, part in subject._chunks(call, 24, 1e-9, least, least):
        seen[entries, part] += 1
        sizes.append(seen[entries, part].numel())
        assert part == slice(0, rows) or entries.stop == entries.start + 1
        if columns == 1 and part.stop != rows:
            assert part.stop % subject._TILE == 0
    assert (seen == 1).all() and sizes[0] == max(sizes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("residual", ["own", "x"])
def test_over_the_residual_in_chunks(
    kernel, subject, small_chunks, recorded, on_triton, dtype, residual
):
    small_chunks(24 * 4 * 30, 1)
    problem = make_transition((2, 9, 9, 16), 24, dtype=dtype, residual=residual)
    wanted = reference(problem)
    moved = problem.to(on_triton)
    got = moved.run(kernel, inplace=True)
    assert got is moved.residual and len(recorded) > 2
    assert relative_error(got, wanted) <= {torch.float16: 7e-4, torch.float32: 5e-6}[dtype]


def test_the_hidden_channels_take_one_memory(subject, small_chunks, call_of, recorded):
    small_chunks(24 * 4 * 30, 1)
    subject.forward(call_of(make_transition((2, 9, 9, 16), 24)))
    hidden = [tensors["hidden"] for stage, tensors in recorded if stage == "swiglu_hidden"]
    assert len(hidden) > 2 and len({some.data_ptr() for some in hidden}) == 1
    assert hidden[0].numel() == max(some.numel() for some in hidden)


LAYOUTS = {
    "whole": (lambda x: x, True),
    "rows apart": (lambda x: torch.cat([x, x], dim=-1)[..., :16], True),
    "every other row": (lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2], True),
    "one row for all": (lambda x: x[:1, :1, :1].expand(x.shape), True),
    "columns cut": (lambda x: torch.cat([x, x], dim=2)[:, :, :7], False),
    "rows cut": (lambda x: torch.cat([x, x], dim=1)[:, :5], False),
    "axes swapped": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), False),
    "entries turned": (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), False),
    "channels first": (lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1), False),
    "all channels first": (lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1), True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_axes_that_can_be_merged(subject, layout):
    lay, merges = LAYOUTS[layout]
    x = torch.randn(2, 5, 7, 16, generator=seeded())
    laid = lay(x)
    assert subject._is_one_axis(laid) == merges
    if merges:
        rows = subject._along_one_axis(laid)
        assert rows.shape == (1, 70, 1, 16) and torch.equal(rows.view(2, 5, 7, 16), laid)
        assert rows.untyped_storage().data_ptr() == laid.untyped_storage().data_ptr()


@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (1, 1, 7, 16), (1, 7, 1, 16), (7, 1, 1, 16),
                                   (2, 1, 7, 16), (2, 7, 1, 16)])  # fmt: skip
def test_axes_of_one_do_not_count(subject, shape):
    x = torch.randn(shape, generator=seeded())
    odd = x.as_strided(shape, [s if n > 1 else 99 for n, s in zip(shape, x.stride(), strict=True)])
    assert subject._is_one_axis(odd)
    assert torch.equal(subject._along_one_axis(odd).view(shape), x)
    sliced = torch.cat([x, x], dim=-1)[..., :16]
    assert subject._is_one_axis(sliced)
    assert torch.equal(subject._along_one_axis(sliced).view(shape), x)


@pytest.mark.parametrize("x_layout, residual_layout", list(itertools.product(LAYOUTS, LAYOUTS)))
def test_a_call_is_merged_where_both_can_be(kernel, subject, recorded, on_triton,
                                            x_layout, residual_layout):  # fmt: skip
    """The residual's rows stay beside those of x."""
    problem = make_transition((2, 5, 7, 16), 24, dtype=torch.float16, residual="own").to(on_triton)
    problem.x = LAYOUTS[x_layout][0](problem.x)
    problem.residual = LAYOUTS[residual_layout][0](problem.residual)
    assert_close(run(kernel, problem, on_triton), problem)
    merged = LAYOUTS[x_layout][1] and LAYOUTS[residual_layout][1]
    assert recorded[0][1]["x_ptr"].shape == ((1, 70, 1, 16) if merged else (2, 5, 7, 16))


@pytest.mark.parametrize("inplace", [False, True])
def test_columns_beyond_what_the_kernels_divide_by(
    kernel, subject, recorded, monkeypatch, on_triton, inplace
):
    """Rows that can't be merged are copied then."""
    monkeypatch.setattr(subject, "_MOST_COLUMNS", 6)
    problem = make_transition((2, 5, 7, 16), 24, residual="own", biases=BIASES)
    problem.x = LAYOUTS["axes swapped"][0](problem.x)
    if not inplace:
        problem.residual = LAYOUTS["columns cut"][0](problem.residual)
        assert_gradients(
            gradients(
                subject, lambda p: as_moved(kernel, p, on_triton), problem, on_triton
            ), problem,
        )  # fmt: skip
    wanted = reference(problem)
    got = run(kernel, problem, on_triton, inplace=inplace)
    assert relative_error(got, wanted) <= 5e-6
    assert all(
        tensors["x_ptr"].shape[2] == 1 for stage, tensors in recorded if stage == "swiglu_hidden"
    )


def as_moved(kernel, problem, device):
    types = importlib.import_module(f"{kernel.__name__}._call")
    return as_transition(types, problem.to(device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("lengths", [None, (6, 2, 0)])
def test_as_on_the_aten_path(subject, submodule, call_of, on_triton, dtype, lengths):
    problem = make_transition(
        (3, 6, 6, 24), 40, dtype=dtype, residual="own", biases=BIASES, lengths=lengths
    )
    aten, call = submodule("aten_path.transition"), call_of(problem)
    limit = 2e-3 if dtype == torch.float16 else FLOAT32_BUDGET
    wanted = aten.forward(call)
    assert relative_error(subject.forward(call), wanted.cpu().double()) <= limit
    grad = grad_of(problem, on_triton)
    needs = frozenset(NAMES)
    wanted = aten.backward(call, grad, needs)
    for name, got in subject.backward(call, grad, needs).items():
        assert relative_error(got, wanted[name].cpu().double()) <= limit, name


def test_every_subset_has_the_gradients_of_all(subject, call_of, on_triton):
    """Exactly what was asked for, with the very bits that it has among all others."""
    problem = make_transition((3, 11, 16), 24, biases=BIASES)
    of = functools.partial(gradients, subject, call_of, problem, on_triton)
    together = of()
    assert_gradients(together, problem)
    subsets = [names for count in (1, 2) for names in itertools.combinations(NAMES, count)]
    for needs in [*subsets, NAMES[:4], NAMES[3:6], tuple(n for n in NAMES if n != "x")]:
        got = of(needs)
        assert set(got) == set(needs)
        for name, gradient in got.items():
            assert torch.equal(gradient, together[name]), (name, needs)


FINISH = ["projection_gradients", "norm_gradients"]


@pytest.mark.parametrize(
    "needs, stages",
    [
        (["x"], ["swiglu_hidden", "swiglu_bwd", "input_bwd"]),
        (["gate_bias"], ["swiglu_hidden", "swiglu_bwd", "row_products", *FINISH]),
        (["down_weight"], ["swiglu_hidden", "swiglu_bwd", *["row_products"] * 2, *FINISH]),
        (
            ["x", "norm_weight"],
            ["swiglu_hidden", "swiglu_bwd", "row_products", "input_bwd", *FINISH],
        ),
    ],
)
def test_nothing_else_is_computed(subject, call_of, recorded, on_triton, needs, stages):
    problem = make_transition((30, 16), 24, biases=BIASES)
    gradients(subject, call_of, problem, on_triton, needs)
    assert [stage for stage, _ in recorded] == stages


def test_gradients_share_no_memory(subject, call_of, on_triton):
    problem = make_transition((30, 16), 24, biases=BIASES)
    got = list(gradients(subject, call_of, problem, on_triton).values())
    assert len({gradient.untyped_storage().data_ptr() for gradient in got}) == len(got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_equal_calls_give_equal_bits(subject, small_chunks, call_of, on_triton, dtype):
    small_chunks(24 * 2 * 40, 24 * 2 * 200)
    problem = make_transition((2, 9, 9, 16), 24, dtype=dtype, residual="own", biases=BIASES)
    forward = [subject.forward(call_of(problem)) for _ in "ab"]
    assert torch.equal(*forward)
    first, second = (gradients(subject, call_of, problem, on_triton) for _ in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("held, descriptors", [(False, False), (False, True), (True, True)])
def test_settings_as_on_a_gpu(
    kernel, subject, submodule, small_chunks, monkeypatch, call_of, on_triton, held, descriptors
):
    """Every stage in blocks of which none divides a width."""
    config = submodule("triton_parts.settings").LaunchConfig
    wide = config(32, 16, 64 if held else 16, 4, 2, descriptors, held, split=2)
    configs = {
        "swiglu_hidden": wide, "swiglu_projections": wide,
        "swiglu_bwd": config(32, 32, 32, 4, 2, descriptors),
        "row_linear": config(32, 32, 16, 4, 2, descriptors),
        "row_products": config(32, 16, 32, 4, 2),
        "row_products_and_sums": config(32, 16, 32, 4, 2),
        "input_bwd": config(16, 32, 16, 4, 1, descriptors),
    }  # fmt: skip
    launch = submodule("triton_parts.launch")
    monkeypatch.setattr(launch, "pick_config", lambda stage, *_: configs[stage])
    small_chunks(72 * 4 * 40, 72 * 4 * 150)
    problem = make_transition((2, 9, 7, 40), 72, dtype=torch.float16, residual="own")
    assert_close(run(kernel, problem, on_triton), problem)
    assert_gradients(gradients(subject, call_of, problem, on_triton), problem, 2e-3)


@pytest.mark.parametrize("inplace, limit", [(False, 2.0), (True, 1.0)])
@pytest.mark.parametrize("shape", [(1, 64, 64, 128), (4, 32, 32, 128), (4096, 128)])
def test_peak_memory(subject, submodule, call_of, monkeypatch, inplace, limit, shape):
    """Beyond the arguments, in tensors of x's size: the output, and the hidden channels.

    Of the two stages: a kernel for the whole transition has no hidden channels in memory.
    """
    launch = submodule("triton_parts.launch").PreparedLaunch
    monkeypatch.setattr(launch, "launch", lambda *_, **tensors: None)
    monkeypatch.setattr(subject, "_FORWARD_CHUNK", (1.0, 1, 2**40))
    problem = make_transition(shape, 512, dtype=torch.float16, residual="own")
    call = call_of(problem, inplace=inplace)
    alone = submodule("hopper").without_variants()
    with alone, PeakBytes(call.x, call.residual) as bytes_:
        subject.forward(call)
    assert limit - 0.6 <= bytes_.peak / call.x.nbytes <= limit


@pytest.mark.parametrize("shape", [(1, 64, 64, 128), (4, 32, 32, 128), (4096, 128)])
def test_peak_memory_of_a_backward(subject, submodule, call_of, on_triton, monkeypatch, shape):
    """Beyond x, its gradient and the arguments at most three tensors of x's size."""
    launch = submodule("triton_parts.launch").PreparedLaunch
    monkeypatch.setattr(launch, "launch", lambda *_, **tensors: None)
    share, _, most = subject._BACKWARD_CHUNK
    monkeypatch.setattr(subject, "_BACKWARD_CHUNK", (share, 1, most))
    monkeypatch.setattr(subject, "_TILE", 8)  # of few rows 128 are many
    width, hidden = 128, 512
    problem = make_transition(shape, hidden, dtype=torch.float16)
    call = call_of(problem)
    grad = torch.zeros_like(call.x)
    sums = bytes_of_parts(monkeypatch, subject)
    subject.backward(call, grad, frozenset(leaves_of(problem)))  # is recorded
    with PeakBytes(call.x, grad, *problem.weights.values()) as bytes_:
        subject.backward(call, grad, frozenset(leaves_of(problem)))
    # A projection turned, the gradients of three, and the sums.
    parameters = 4 * 2 * width * hidden + sum(sums)
    assert 3.0 <= (bytes_.peak - parameters) / call.x.nbytes <= 4.0


def test_prepared_launches_serve_the_next_call(kernel, subject, submodule, on_triton):
    kinds = submodule("triton_path.launches")._launches
    problem = make_transition((30, 16), 24, dtype=torch.float16, residual="own")
    for _ in range(2):
        problem.x = torch.randn_like(problem.x)
        assert_close(run(kernel, problem, on_triton), problem)
        assert len(kinds) == 1
    problem.residual = None
    assert_close(run(kernel, problem, on_triton), problem)
    assert len(kinds) == 2


def test_plans_of_training_have_every_stage(subject, call_of):
    stages = [launch.stage for launch, _ in subject.plan_training(call_of(make_transition(
        (1, 6, 6, 16), 24, residual="own"
    )))]  # fmt: skip
    assert stages == [
        "swiglu_hidden", "row_linear", "swiglu_hidden", "swiglu_bwd", "row_products",
        "row_products", "input_bwd", *FINISH,
    ]  # fmt: skip
