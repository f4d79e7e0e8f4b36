"""Lean memory, results over the residual, prepared launches: the same results in every way."""

import dataclasses
import logging

import pytest
import torch
from helpers import (
    DTYPES,
    as_call,
    assert_close,
    make_problem,
    reference,
    relative_error,
    run,
)
from peak_bytes import PeakBytes


def call(kernel, problem, device, **options):
    p = problem.to(device)
    return kernel.triangle_multiplicative_update_with_residual(
        p.x, p.direction, p.residual, p.drop_mask, mask=p.mask, eps=p.eps, **p.weights, **options
    )


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_lean(kernel, on_triton, dtype, direction):
    problem = make_problem(
        19, 32, dtype=dtype, direction=direction, mask="soft", residual=True, drop_mask=True
    )
    assert_close(call(kernel, problem, on_triton, memory="lean"), problem)


@pytest.mark.parametrize("length", [1, 2, 16, 35])
def test_lean_lengths(kernel, on_triton, length):
    problem = make_problem(length, 16, mask="bool")
    assert_close(call(kernel, problem, on_triton, memory="lean"), problem)


@pytest.mark.parametrize("channels, hidden", [(40, 24), (16, 40), (48, 16), (5, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_lean_widths_and_batches(kernel, on_triton, channels, hidden, batch):
    """Groups of channels of unequal size, and outputs with longer rows than the product's."""
    problem = make_problem(5, channels, hidden, batch=batch, mask="soft")
    assert_close(call(kernel, problem, on_triton, memory="lean"), problem)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lean_with_the_other_signature(kernel, on_triton, dtype):
    problem = make_problem(10, 32, 48, dtype=dtype, biases=True, mask="float").to(on_triton)
    got = kernel.triangle_multiplicative_update(
        problem.x, problem.direction, problem.mask, **problem.weights, **problem.biases,
        memory="lean",
    )  # fmt: skip
    assert_close(got, problem)


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("residual_is_pair", [False, True])
@pytest.mark.parametrize("channels", [16, 80])
def test_inplace(kernel, on_triton, memory, direction, residual_is_pair, channels):
    """80 channels are two blocks of columns: rows of x are read after some were written."""
    problem = make_problem(
        5, channels, direction=direction, residual=True, batch=2, mask="soft", dtype=torch.float16
    )
    if residual_is_pair:
        problem.residual = problem.x
    wanted = reference(problem)
    p = problem.to(on_triton)
    residual = p.x if residual_is_pair else p.residual
    got = kernel.triangle_multiplicative_update_with_residual(
        p.x, p.direction, residual, None, mask=p.mask, eps=p.eps, **p.weights,
        memory=memory, inplace=True,
    )  # fmt: skip
    assert got.data_ptr() == residual.data_ptr() and got.shape == residual.shape
    assert relative_error(got, wanted) <= 7e-4


@pytest.mark.parametrize("hidden", [3, 8, 24, 64, 128, 200, 256, 384])
@pytest.mark.parametrize("slots", [16, 24, 48, 96, 144])
def test_groups_have_room(submodule, hidden, slots):
    slots = min(slots, 2 * hidden)
    end = 0
    for first, count, apart in submodule("triton_path.lean").groups_of(hidden, slots):
        assert first == end and count > 0
        end = first + count
        if apart:  # a lies in channels of the product that are yet to come
            assert count <= slots and end + count <= hidden
        else:
            assert 2 * count <= slots
    assert end == hidden


def test_lean_takes_four_groups_at_the_widths_of_the_models(submodule):
    groups_of = submodule("triton_path.lean").groups_of
    assert [count for _, count, _ in groups_of(256, 96)] == [96, 80, 48, 32]
    assert [count for _, count, _ in groups_of(128, 48)] == [48, 40, 24, 16]


@pytest.mark.parametrize("descriptors, direction", [(False, "incoming"), (True, "outgoing")])
def test_lean_as_on_a_gpu(kernel, submodule, on_triton, monkeypatch, descriptors, direction):
    """Planes among the product, products in rows, in the ways that a GPU takes."""
    config = submodule("triton_parts.settings").LaunchConfig
    configs = {
        "fused_dual_gemm": config(32, 16, 32, 4, 2, descriptors, held=True),
        "trimul_einsum": config(16, 32, 16, 4, 2, descriptors, persistent=2),
        "fused_ln_residual": config(32, 32, 16, 4, 2, descriptors, held=True),
    }
    launch = submodule("triton_parts.launch")
    monkeypatch.setattr(launch, "pick_config", lambda stage, *_: configs[stage])
    submodule("triton_path.launches")._launches.clear()
    problem = make_problem(
        17, 32, dtype=torch.float16, direction=direction, residual=True, mask="soft", batch=2
    )
    try:
        for memory in ("default", "lean"):
            assert_close(call(kernel, problem, on_triton, memory=memory), problem)
    finally:
        submodule("triton_path.launches")._launches.clear()


def test_inplace_on_the_aten_path(kernel):
    problem = make_problem(6, 16, residual=True)
    got = call(kernel, problem, "cpu", inplace=True)
    assert got is problem.residual
    problem.residual = make_problem(6, 16, residual=True).residual
    assert_close(got, problem)


class TestRefusals:
    @pytest.mark.parametrize("memory", ["LEAN", "", None, 3])
    def test_memory(self, kernel, memory):
        with pytest.raises(ValueError) as caught:
            call(kernel, make_problem(4, 16), "cpu", memory=memory)
        assert str(caught.value) == (
            f"memory must be 'auto', 'default' or 'lean'; got {memory!r}"
        )

    def test_inplace_of_another_type(self, kernel):
        with pytest.raises(TypeError) as caught:
            call(kernel, make_problem(4, 16, residual=True), "cpu", inplace=1)
        assert str(caught.value) == "inplace must be a bool; got int"

    def test_inplace_without_a_residual(self, kernel):
        with pytest.raises(ValueError) as caught:
            call(kernel, make_problem(4, 16), "cpu", inplace=True)
        assert str(caught.value) == (
            "inplace writes the result over residual, which must be given; got None"
        )

    def test_inplace_over_strided_memory(self, kernel):
        problem = make_problem(4, 16)
        problem.residual = torch.randn(1, 16, 4, 4).permute(0, 2, 3, 1)
        with pytest.raises(ValueError) as caught:
            call(kernel, problem, "cpu", inplace=True)
        assert str(caught.value).startswith("residual must be contiguous with inplace=True; got")

    @pytest.mark.parametrize("what", ["pair", "drop_mask"])
    def test_inplace_over_another_argument(self, kernel, what):
        problem = make_problem(4, 16)
        memory = torch.randn(2, 4, 4, 16)
        problem.residual = memory[:1]
        if what == "pair":
            problem.x = memory[1:]
        else:
            problem.drop_mask = memory[1:, :1]
        with pytest.raises(ValueError) as caught:
            call(kernel, problem, "cpu", inplace=True)
        assert str(caught.value) == (
            "residual must be pair itself, or share no memory with another argument, with "
            f"inplace=True; got memory of {what}"
        )

    def test_inplace_beside_what_is_no_tensor(self, kernel):
        problem = make_problem(4, 16, residual=True)
        problem.mask = [1.0]
        with pytest.raises(TypeError, match="mask must be a torch.Tensor; got list"):
            call(kernel, problem, "cpu", inplace=True)

    def test_inplace_of_an_empty_batch(self, kernel):
        """Tensors without elements have no memory to share."""
        problem = make_problem(4, 16)
        problem.x, problem.residual = torch.zeros(0, 4, 4, 16), torch.zeros(0, 4, 4, 16)
        problem.mask = torch.ones(0, 4, 4)
        assert call(kernel, problem, "cpu", inplace=True) is problem.residual

    def test_inplace_where_a_gradient_is_needed(self, kernel):
        problem = make_problem(4, 16, residual=True)
        problem.weights["p_in_weight"].requires_grad_()
        with pytest.raises(ValueError) as caught:
            call(kernel, problem, "cpu", inplace=True)
        assert str(caught.value) == "inplace must be False where a gradient is needed; got True"


class TestOutOfMemory:
    @pytest.fixture
    def default_fails(self, submodule, on_triton, monkeypatch):
        path = submodule("triton_path")

        def fail(*_):
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(path, "_run_default", fail)
        submodule("paths").say_once.cache_clear()

    def test_auto_is_lean_then_and_says_so_once(self, kernel, on_triton, default_fails, caplog):
        problem = make_problem(7, 16, mask="bool")
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert_close(run(kernel, problem, on_triton), problem)
        assert [record.getMessage() for record in caplog.records] == [
            "The triangle multiplication runs in lean mode: an allocation of the default mode "
            "failed."
        ]

    @pytest.mark.parametrize("memory", ["auto", "lean"])
    @pytest.mark.parametrize("batch, within", [(3, False), (1, True), (2, True)])
    def test_no_mode_adds_to_a_residual_twice(
        self, kernel, submodule, on_triton, monkeypatch, memory, batch, within
    ):
        """Where memory that is shared in turn is gone when its second user comes.

        Those are groups of sequences, or steps of rows `within` a sequence whose residual is x.
        """
        stage_3 = submodule("fused_ln_residual")
        launches = submodule("triton_parts.launch").Launches
        problem = make_problem(20, 16, batch=batch).to(on_triton)
        problem.residual = problem.x if within else problem.x.clone()
        before = problem.residual.clone()

        def empty(self, name, *arguments, empty=launches.empty):
            begun = not torch.equal(problem.residual, before)
            if begun and name == ("output" if within else "moments"):
                raise torch.OutOfMemoryError("no room")
            return empty(self, name, *arguments)

        monkeypatch.setattr(launches, "empty", empty)
        monkeypatch.setattr(stage_3, "_may_overwrite", lambda *_: not within)
        monkeypatch.setattr(submodule("triton_path"), "_sequences_together", lambda call: 1)
        with pytest.raises(stage_3.PartlyWritten, match="^an allocation failed when part of resid"):
            problem.run(kernel, inplace=True, memory=memory)

    def test_default_is_not(self, kernel, on_triton, default_fails):
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            call(kernel, make_problem(7, 16), on_triton, memory="default")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "memory, hidden, length, batch, fills, beside",
    [
        ("default", 256, 64, 1, True, 3.1),
        ("default", 128, 67, 3, True, 9.3),
        ("default", 128, 67, 4, False, 3.1),
        ("lean", 256, 64, 1, True, None),
        ("lean", 128, 96, 1, True, None),
        ("lean", 128, 67, 3, True, None),
        ("lean", 128, 67, 4, True, 1.5),
    ],
)
def test_peak_memory(
    submodule, on_triton, monkeypatch, memory, inplace, hidden, length, batch, fills, beside
):
    """Counted from the allocations of the path itself, in tensors of one sequence's pair size.

    Where a sequence `fills` a GPU, a batch is run in groups: then all that is held `beside` the
    output is one sequence's. In lean mode a small batch's output lies over its products.
    """
    x, residual = (torch.zeros(batch, length, length, hidden, dtype=torch.float16) for _ in "xr")
    problem = make_problem(1, hidden, dtype=torch.float16)
    path, pairs = submodule("triton_path"), 2**18 if fills else length**2
    monkeypatch.setattr(submodule("triton_path.launches"), "_FILLING_PAIRS", pairs)
    problem = dataclasses.replace(problem, x=x, direction="incoming", residual=residual)
    call = as_call(submodule("_call"), problem, inplace=inplace, memory=memory)
    # Nothing runs: the interpreter keeps what it has run on alive for a while.
    launch = submodule("triton_parts.launch").PreparedLaunch
    monkeypatch.setattr(launch, "launch", lambda *_, **tensors: None)
    with PeakBytes(x, residual) as bytes_:
        out = path.forward(call)
    assert out.shape == x.shape and out.is_contiguous()
    if beside is None:
        limit = 1.5 if inplace else 1.5 * batch
    else:
        together = memory == "default" and (fills or batch == 1)
        limit = beside if inplace or together else beside + batch
    # Of a length that is no multiple of 16, the pads are memory too.
    pads = -(-length // 16) * 16 / length
    assert 1.0 <= bytes_.peak * batch / (x.numel() * 2) <= limit * pads


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
@pytest.mark.parametrize("together", [1, 2])
def test_groups_of_sequences(kernel, submodule, on_triton, monkeypatch, together, direction):
    """A batch in groups has the bits of the whole, with lengths too, and over the residual."""
    problem = make_problem(
        6, 16, batch=4, dtype=torch.float32, mask="soft", residual=True, drop_mask=True,
        direction=direction,
    ).to(on_triton)  # fmt: skip
    for lengths in (None, torch.tensor([6, 3, 0, 5], device=on_triton)):
        whole = call(kernel, problem, on_triton, lengths=lengths)
        with monkeypatch.context() as patch:
            path = submodule("triton_path")
            patch.setattr(submodule("triton_path.launches"), "_FILLING_PAIRS", together * 36)
            assert path._sequences_together(as_call(submodule("_call"), problem)) == together
            assert torch.equal(call(kernel, problem, on_triton, lengths=lengths), whole)
            over = dataclasses.replace(problem, residual=problem.residual.clone())
            made = call(kernel, over, on_triton, lengths=lengths, inplace=True)
            assert made is over.residual and torch.equal(made, whole)


def test_sequences_that_are_not_aligned_alike_run_together(submodule):
    """One launch serves all groups: rows of 2 * 5 * 5 * 3 bytes begin anywhere."""
    problem = make_problem(5, 3, batch=4, dtype=torch.float16)
    assert submodule("triton_path")._sequences_together(as_call(submodule("_call"), problem)) == 4


def test_a_prepared_launch_serves_the_next_call(kernel, submodule, on_triton):
    """The second call of a kind takes the first one's launches; another kind has its own."""
    plans = submodule("triton_path.launches")._launches
    plans.clear()
    problem = make_problem(8, 16, mask="float", dtype=torch.float16).to(on_triton)
    for _ in range(2):
        problem.x = torch.randn_like(problem.x)
        assert_close(run(kernel, problem, on_triton), problem)
        assert len(plans) == 1
    problem.mask = problem.mask.bool()
    assert_close(run(kernel, problem, on_triton), problem)
    assert len(plans) == 2


def test_launches_of_other_kinds_are_forgotten_at_last(kernel, submodule, on_triton, monkeypatch):
    path = submodule("triton_path.launches")
    path._launches.clear()
    monkeypatch.setattr(path, "_MOST_KINDS", 2)
    for length in (3, 4, 5):
        problem = make_problem(length, 16)
        assert_close(run(kernel, problem, on_triton), problem)
        assert len(path._launches) <= 2


@pytest.mark.kernels_ci
@pytest.mark.parametrize(
    "names", [("p_out_weight",), ("g_out_weight",), ("p_in_weight", "g_in_weight")]
)
def test_projections_whose_rows_lie_in_one_place(kernel, on_triton, names):
    """Expanded ones, which no tensor descriptor describes, forward and backward."""
    problem = make_problem(5, 16, dtype=torch.float16).to(on_triton)
    for name in names:
        weight = problem.weights[name]
        problem.weights[name] = weight[:1].contiguous().expand(weight.shape)
    copied = {name: value.contiguous() for name, value in problem.weights.items()}
    results = []
    for weights in (problem.weights, copied):
        x = problem.x.clone().requires_grad_()
        out = kernel.triangle_multiplicative_update(x, **weights)
        results.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
    for got, wanted in zip(*results, strict=True):
        assert torch.allclose(got, wanted, rtol=2e-2, atol=2e-2)


def test_what_a_descriptor_may_describe(submodule, on_triton):
    describes = submodule("triton_parts.launch").has_descriptor
    whole = torch.zeros(16, 32, dtype=torch.float16)
    assert describes(whole) and describes(whole[:1])
    assert not describes(whole[:1].expand(16, 32))
    assert not describes(whole[:, 1:]) and not describes(whole.t())
