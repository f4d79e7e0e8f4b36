"""Right-padded batches: `lengths` mean what the mask of the padding means, and cost less."""

import contextlib
import dataclasses

import pytest
import torch
from gradients_of_calls import fresh_leaves, grad_of_output
from helpers import (
    Problem,
    make_problem,
    memory_of_no_numbers,
    relative_error,
    run,
    with_leaves,
)

PATHS = ("aten", "triton")


@pytest.fixture(params=PATHS)
def device(request):
    """The device whose tensors take the path: the whole module runs on both."""
    return request.getfixturevalue("on_triton") if request.param == "triton" else "cpu"


@pytest.fixture
def pairs_within(submodule):
    return submodule("validation").pairs_within


def masked(problem: Problem, within: torch.Tensor) -> Problem:
    """The problem whose mask says what its lengths would."""
    mask = within if problem.mask is None else problem.mask * within
    return dataclasses.replace(problem, mask=mask)


def poisoned(problem: Problem, within: torch.Tensor) -> Problem:
    """The problem with NaN in its padding."""
    x = torch.where(within[..., None], problem.x, torch.nan)
    return dataclasses.replace(problem, x=x)


def assert_as_masked(kernel, problem, lengths, within, device, **options) -> torch.Tensor:
    """The result equals that of the padding's mask; the padding's update is zero, even from NaN.

    With the same options: in 16 bits lean mode's first stage has another kernel on Hopper GPUs.
    """
    wanted = run(kernel, masked(problem, within), device, **options).cpu()
    padding = torch.zeros(()) if problem.residual is None else problem.residual
    wanted = torch.where(within[..., None], wanted, padding)
    with memory_of_no_numbers():
        got = run(kernel, poisoned(problem, within), device, lengths=lengths.to(device), **options)
    assert got.dtype == problem.x.dtype and got.is_contiguous()
    # The sums are the same ones, in blocks of another order at most.
    bound = {torch.float32: 2e-7, torch.float16: 2e-4, torch.bfloat16: 1.6e-3}[problem.x.dtype]
    assert relative_error(got, wanted.double()) <= bound
    assert torch.equal(got.cpu()[~within], wanted[~within])
    return got


@pytest.mark.kernels_ci
@pytest.mark.parametrize(
    "dtype, direction, memory",
    [
        (torch.float16, "outgoing", "default"),
        (torch.float32, "incoming", "default"),
        (torch.float16, "incoming", "lean"),
        (torch.float32, "outgoing", "lean"),
    ],
)
def test_lengths(kernel, device, pairs_within, dtype, direction, memory):
    problem = make_problem(
        11, 16, 32, batch=4, dtype=dtype, direction=direction, mask="soft", residual=True,
        drop_mask=True,
    )  # fmt: skip
    lengths = torch.tensor([11, 8, 1, 0])
    within = pairs_within(lengths, 11)
    got = assert_as_masked(kernel, problem, lengths, within, device, memory=memory)
    target = problem.residual.to(device)
    over = dataclasses.replace(poisoned(problem, within), residual=target)
    out = run(kernel, over, device, lengths=lengths.to(device), memory=memory, inplace=True)
    assert out.data_ptr() == target.data_ptr() and torch.equal(out, got)


def test_what_lies_behind_a_length_in_a_block_is_zero(
    kernel, on_triton, submodule, pairs_within, monkeypatch
):
    """Stage 2 reads whole blocks of k, of which stage 1 must have skipped no part."""
    blocks = 128
    if on_triton == "cpu":  # as the interpreter's setting has them
        import triton.language as tl

        blocks = 32
        tiles = submodule("triton_parts.tiles")
        monkeypatch.setattr(tiles, "_PADDING_MULTIPLE", tl.constexpr(blocks))
    length = blocks + 1
    short = make_problem(length, 16, dtype=torch.bfloat16)
    longest = length + 11
    nothing = torch.full((1, longest, longest, 16), torch.nan).bfloat16()
    padded = dataclasses.replace(short, x=nothing)
    padded.x[:, :length, :length] = short.x
    with memory_of_no_numbers():
        got = run(kernel, padded, on_triton, lengths=torch.tensor([length]).to(on_triton))
    wanted = run(kernel, short, on_triton)
    assert relative_error(got[:, :length, :length], wanted.cpu().double()) <= 1.6e-3
    assert got.count_nonzero() == wanted.count_nonzero()


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [128, 256])
@pytest.mark.parametrize("memory", ["default", "lean"])
def test_lengths_with_shipped_settings(kernel, on_triton, pairs_within, dtype, channels, memory):
    if on_triton == "cpu":
        pytest.skip("the interpreter's setting is another")
    problem = make_problem(390, channels, batch=4, dtype=dtype, residual=True)
    lengths = torch.tensor([390, 257, 64, 5])
    within = pairs_within(lengths, 390)
    assert_as_masked(kernel, problem, lengths, within, on_triton, memory=memory)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_beyond_the_sequence(kernel, device, dtype):
    problem = make_problem(6, 16, batch=2)
    lengths = torch.tensor([9, 2**31 - 1], dtype=dtype, device=device)
    torch.use_deterministic_algorithms(True)  # new memory is NaN: what isn't written shows
    try:
        with_lengths = run(kernel, problem, device, lengths=lengths)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(with_lengths, run(kernel, problem, device))
    none = torch.tensor([-3, 0], dtype=dtype, device=device)
    nothing = run(kernel, problem, device, lengths=none)
    assert not nothing.any()


def test_lengths_of_any_rank(kernel, device):
    p = make_problem(7, 16, batch=6, mask="soft").to(device)
    lengths = torch.tensor([7, 5, 0, 1, 2, 6], device=device)
    update = kernel.triangle_multiplicative_update
    wanted = update(p.x, mask=p.mask, lengths=lengths, **p.weights)
    got = update(
        p.x.view(2, 3, 7, 7, 16), mask=p.mask.view(2, 3, 7, 7), lengths=lengths.view(2, 3).int(),
        **p.weights,
    )  # fmt: skip
    assert torch.equal(got.flatten(0, 1), wanted)
    shared = update(p.x, mask=p.mask, lengths=lengths[1], **p.weights)
    assert torch.equal(shared[1], wanted[1])
    alone = update(p.x[1], mask=p.mask[1], lengths=lengths[1], **p.weights)
    assert torch.allclose(alone, wanted[1], atol=1e-6)


def test_no_look_at_the_lengths_from_the_host(kernel, on_triton):
    if on_triton == "cpu":
        pytest.skip("CPU tensors have nothing to wait for")
    p = make_problem(20, 32, batch=2).to(on_triton)
    lengths = torch.tensor([20, 7], device=on_triton)
    update = kernel.triangle_multiplicative_update
    wanted = update(p.x, lengths=lengths, **p.weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = update(p.x, lengths=lengths, **p.weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, wanted)


def gradients(kernel, problem, lengths, within, device, as_mask: bool, **options):
    """Gradients of all leaves, by the call with lengths or by the masked one without padding."""
    leaves = {n: leaf.requires_grad_() for n, leaf in fresh_leaves(problem, device).items()}
    p = with_leaves(problem.to(device), leaves)
    within = within.to(device)
    with contextlib.nullcontext() if as_mask else memory_of_no_numbers():
        if as_mask:
            out = run(kernel, masked(p, within), device, **options)
            padding = torch.zeros_like(out) if p.residual is None else p.residual
            out = torch.where(within[..., None], out, padding)
        else:
            p = poisoned(p, within)
            if p.mask is not None:
                p.mask = torch.where(within, p.mask, torch.nan)
            out = run(kernel, p, device, lengths=lengths.to(device), **options)
        out.backward(grad_of_output(problem).to(device))
    return {name: leaf.grad for name, leaf in leaves.items()}


def assert_gradients_as_masked(kernel, problem, lengths, within, device, limit, **options):
    wanted = gradients(kernel, problem, lengths, within, device, True, **options)
    got = gradients(kernel, problem, lengths, within, device, False, **options)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert relative_error(gradient, wanted[name].cpu().double()) <= limit, name
    assert not got["x"].cpu()[~within].any()


@pytest.mark.kernels_ci
@pytest.mark.parametrize(
    "recompute, residual, direction",
    [("none", True, "incoming"), ("product", True, "incoming"), ("all", False, "outgoing")],
)
def test_gradients(kernel, device, pairs_within, recompute, residual, direction):
    """They equal those of the masked call without padding, even if the padding is NaN."""
    problem = make_problem(
        9, 16, batch=3, mask="float", residual=residual, drop_mask=residual, direction=direction
    )
    lengths = torch.tensor([9, 4, 0])
    within = pairs_within(lengths, 9)
    assert_gradients_as_masked(
        kernel, problem, lengths, within, device, 1e-6, recompute=recompute
    )


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 7.5e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize("channels", [128, 256])
def test_gradients_with_shipped_settings(
    kernel, on_triton, pairs_within, channels, dtype, limit
):
    """The kernels for lengths are others, and in bfloat16 have roundings of their own.

    Either call's gradients are up to 5e-3 from those in float64 (H200), so that with independent
    roundings they are sqrt(2) as far from each other. A row without its share would be 5e-2 off.
    """
    if on_triton == "cpu":
        pytest.skip("the interpreter's setting is another")
    problem = make_problem(390, channels, batch=3, dtype=dtype, residual=True, drop_mask=True)
    lengths = torch.tensor([390, 257, 60])
    within = pairs_within(lengths, 390)
    assert_gradients_as_masked(kernel, problem, lengths, within, on_triton, limit)


def test_a_mask_of_no_numbers_in_the_padding(kernel, device, pairs_within):
    p = make_problem(5, 16, batch=2, mask="float").to(device)
    lengths = torch.tensor([5, 3], device=device)
    within = pairs_within(lengths, 5)
    update = kernel.triangle_multiplicative_update
    poisoned = torch.where(within, p.mask, torch.nan)
    for needs_grad in (False, True):
        x = p.x.clone().requires_grad_(needs_grad)
        got, wanted = (
            update(x, mask=mask, lengths=lengths, **p.weights) for mask in (poisoned, p.mask)
        )
        assert torch.equal(got, wanted)


def test_compiles_into_one_graph(kernel, device):
    problem = make_problem(9, 16, batch=2, mask="bool").to(device)
    lengths = torch.tensor([9, 4], device=device)

    def block(x, mask, lengths):
        update = kernel.triangle_multiplicative_update
        return update(x, mask=mask, lengths=lengths, **problem.weights) * 2

    arguments = (problem.x, problem.mask, lengths)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), block(*arguments))
