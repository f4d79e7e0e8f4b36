"""The transition's ATen path: its blocks, GEMMs, memory and threads."""

import dataclasses
import math

import pytest
import torch
from helpers import (
    DTYPES,
    assert_close,
    assert_no_worse,
    draws_of,
    leaves_of,
    reference,
    reference_gradients,
    relative_error,
    seeded,
    with_leaves,
)
from peak_bytes import PeakBytes
from selection import slow
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transitions import (
    BIASES,
    NORMS,
    as_transition,
    in_tree_transition,
    in_tree_transition_gradients,
    make_transition,
)

# Modes that count bytes and products see the thread that they are set on, and no other.
pytestmark = pytest.mark.usefixtures("one_thread")
BF16 = torch.bfloat16


@pytest.fixture
def aten(submodule):
    return submodule("aten_path.transition")


@pytest.fixture
def call(submodule):
    """call(problem, ...): the call that the entry point gives the path."""
    return lambda problem, **others: as_transition(submodule("_call"), problem, **others)


@pytest.fixture
def forward(aten, call):
    return lambda problem, **others: aten.forward(call(problem, **others)).view(problem.x.shape)


@pytest.fixture
def backward(aten, call):
    """backward(problem, grad_out, needs): the gradients, by name."""

    def backward(problem, grad_out, needs=None):
        needs = frozenset(leaves_of(problem)) - {"residual"} if needs is None else needs
        of = call(problem)
        found = aten.backward(of, grad_out.reshape(of.x.shape), frozenset(needs))
        return found | ({"x": found["x"].view(problem.x.shape)} if "x" in found else {})

    return backward


@pytest.fixture(params=[True, False], ids=["native_bf16", "no_native_bf16"])
def native(request, submodule, monkeypatch) -> bool:
    """Whether the CPU is taken to multiply bf16."""
    monkeypatch.setattr(submodule("aten_path.blocks"), "_multiplies_bf16", lambda: request.param)
    return request.param


@pytest.fixture
def blocks_of(aten, monkeypatch):
    """blocks_of(positions): blocks of at most so many rows."""

    def set_positions(positions: int) -> None:
        monkeypatch.setattr(aten, "_BLOCK_POSITIONS", positions)
        for name in ("LEAST_POSITIONS_A_THREAD", "LEAST_POSITIONS", "_LEAST_POSITIONS_BACKWARD"):
            monkeypatch.setattr(aten, name, 1)

    return set_positions


def grad_like(problem) -> Tensor:
    return torch.randn(problem.x.shape, generator=seeded(5)).to(problem.x.dtype)


def in_tree_output(problem) -> Tensor:
    with torch.no_grad():
        return in_tree_transition(problem)(problem.x)


CASES = [
    ((16,), 16, {}),
    ((300, 48), 96, {"biases": BIASES}),
    ((2, 9, 7, 40), 72, {"residual": "own", "biases": ("down_bias",)}),
    ((3, 8, 8, 24), 40, {"residual": "x", "lengths": (8, 0, 5)}),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, hidden, others", CASES)
def test_output(forward, native, shape, hidden, others, dtype):
    problem = make_transition(shape, hidden, dtype=dtype, **others)
    assert_close(forward(problem), problem, 0.95 if native else 0.85)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("channels, hidden", [(32, 128), (256, 1024)])
def test_errors_beside_the_in_tree_modules(forward, native, dtype, channels, hidden):
    """GEMMs in bf16 round before the gate, as the module's do; those in fp32 don't."""
    whole, update = [], []
    for seed in range(2):
        problem = make_transition((1, 16, 16, channels), hidden, dtype=dtype, residual="x",
                                  seed=seed)  # fmt: skip
        module = in_tree_transition(problem)
        with torch.no_grad():
            of_mlp = module.mlp(module.norm(problem.x))
        alone = dataclasses.replace(problem, residual=None)
        whole.append((forward(problem), in_tree_output(problem), reference(problem)))
        update.append((forward(alone), of_mlp, reference(alone)))
    factor = 0.95 if native and dtype == BF16 else 0.85
    assert_no_worse(whole, factor)
    assert_no_worse(update, factor)


@pytest.mark.parametrize("shape, hidden, others", CASES)
def test_the_formula(aten, call, shape, hidden, others):
    problem = make_transition(shape, hidden, **others)
    assert_close(aten.formula(call(problem)).view(shape), problem)


@pytest.mark.parametrize("shape, hidden, others", CASES)
def test_gradients(backward, native, shape, hidden, others):
    problem = make_transition(shape, hidden, **others)
    wanted = reference_gradients(problem, grad_like(problem))
    for name, gradient in backward(problem, grad_like(problem)).items():
        assert relative_error(gradient, wanted[name]) <= 2e-5, name


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("positions", [1024, 16])
def test_gradients_beside_the_in_tree_modules(
    backward, native, blocks_of, dtype, positions
):
    """In one block and in several, whose sums are in fp32."""
    blocks_of(positions)
    draws = []
    for seed in draws_of(32):
        problem = make_transition((1, 8, 8, 32), 128, dtype=dtype, residual="x", seed=seed)
        grad_out = grad_like(problem)
        wanted = reference_gradients(problem, grad_out)
        got, in_tree = backward(problem, grad_out), in_tree_transition_gradients(problem, grad_out)
        got["x"] = got["x"] + grad_out
        wanted["x"] = wanted["x"] + wanted.pop("residual")
        draws.append((got, in_tree, wanted))
    assert_no_worse(draws, 1.0)


def test_gradcheck(aten, call, blocks_of):
    """In float64, of all arguments and in several blocks."""
    problem = make_transition((3, 3, 4), 5, residual="own", biases=BIASES)
    leaves = {n: leaf.double() for n, leaf in leaves_of(problem).items() if n != "residual"}

    class Exact(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *values):
            ctx.save_for_backward(*values)
            given = call(with_leaves(problem, dict(zip(leaves, values, strict=True))))
            return aten.forward(given._replace(residual=None)).view(3, 3, 4)

        @staticmethod
        def backward(ctx, grad_out):
            values = ctx.saved_tensors
            given = call(with_leaves(problem, dict(zip(leaves, values, strict=True))))
            found = aten.backward(given, grad_out.view(1, 3, 3, 4), frozenset(leaves))
            shaped = zip(leaves, values, strict=True)
            return tuple([found[name].view(value.shape) for name, value in shaped])

    for positions in (100, 2):
        blocks_of(positions)
        values = [leaf.clone().requires_grad_() for leaf in leaves.values()]
        assert torch.autograd.gradcheck(Exact.apply, values)


@pytest.mark.parametrize("lengths", [None, (13, 0, 6)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_blocks_do_not_show(aten, call, forward, backward, native, blocks_of, dtype, lengths):
    problem = make_transition(
        (3, 13, 13, 16), 24, dtype=dtype, residual="own", biases=BIASES, lengths=lengths
    )
    found = []
    # One block, a ragged last one, a row of pairs each, a part of a row, and a pair.
    for positions in (10**6, 50, 13, 5, 1):
        blocks_of(positions)
        windows = aten._blocks_of(call(problem)).windows
        assert positions > 1000 or all(
            math.prod(axis.stop - axis.start for axis in window) <= positions
            for window in windows
        )
        found.append({"out": forward(problem), **backward(problem, grad_like(problem))})
    assert_close(found[0]["out"], problem, 0.95)
    limit = 2e-6 if dtype == torch.float32 else 4e-3
    for name, value in found[0].items():
        for other in found[1:]:
            assert relative_error(other[name], value.double()) <= limit, name


@pytest.mark.parametrize("shape", [(7,), (1000, 1, 1), (1, 1, 999), (5, 6, 7), (64, 3, 2)])
@pytest.mark.parametrize("positions", [1, 5, 16, 10**4])
def test_every_row_is_in_one_window(aten, shape, positions):
    shape = (1, 1, 1, *shape)[-3:]
    seen = torch.zeros(shape, dtype=torch.int32)
    sizes = []
    for window in aten._windows(tuple(range(extent) for extent in shape), positions):
        seen[window] += 1
        sizes.append(seen[window].numel())
    assert (seen == 1).all() and max(sizes) <= positions


def test_only_what_lies_within_is_computed(forward, backward):
    """The products are those of each sequence cut to its length."""
    whole = make_transition((4, 16, 16, 8), 12)
    problem = dataclasses.replace(whole, lengths=torch.tensor([16, 8, 1, 0]))
    share = (16**2 + 8**2 + 1) / (4 * 16**2)
    for function in (forward, lambda p: backward(p, grad_like(p))):
        counts = []
        for p in (whole, problem):
            with Products() as products:
                function(p)
            counts.append(products.count)
        assert counts[1] == counts[0] * share


def test_a_sequence_does_not_see_its_batch(forward, native):
    problem = make_transition((3, 11, 11, 16), 24, dtype=BF16, residual="own")
    batch = forward(problem)
    for index in range(3):
        alone = with_leaves(
            problem, {"x": problem.x[index], "residual": problem.residual[index]}
        )
        assert relative_error(forward(alone), batch[index].double()) <= 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backward_leaves_its_inputs_as_they_are(backward, native, dtype):
    problem = make_transition((9, 9, 16), 24, dtype=dtype, residual="own", biases=BIASES)
    inputs = [*leaves_of(problem).values(), grad_like(problem)]
    before = [value.clone() for value in inputs]
    got = backward(problem, inputs[-1])
    assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))
    places = {value.untyped_storage().data_ptr() for value in inputs}
    outputs = {value.untyped_storage().data_ptr() for value in got.values()}
    assert not outputs & places and len(outputs) == len(got)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("residual", [None, "own", "x"])
@torch.no_grad()
def test_peak_memory_is_the_output(forward, native, blocks_of, dtype, residual):
    """All else is a block's and the parameters'. In-tree there are many."""
    problem = make_transition((1, 96, 96, 32), 128, dtype=dtype, residual=residual)
    module, size = in_tree_transition(problem), problem.x.nbytes
    given = [*leaves_of(problem).values()]
    with PeakBytes(problem.x, *module.parameters()) as in_tree:
        module(problem.x)
    blocks_of(96)
    with PeakBytes(*given) as ours:
        forward(problem)
    assert size <= ours.peak <= 1.5 * size
    assert ours.peak < 0.2 * in_tree.peak
    if residual is not None:
        with PeakBytes(*given) as ours:
            forward(problem, inplace=True)
        assert ours.peak <= 0.5 * size


# float16 has bfloat16's sizes; what is copied to float32 takes the most.
@pytest.mark.parametrize(
    "native, dtype",
    [(False, BF16), (True, torch.float32), slow(True, BF16), slow(False, torch.float32)],
    indirect=["native"],
)
@torch.no_grad()
def test_peak_memory_of_a_backward(backward, native, dtype):
    """At the real width: at most three tensors like x beyond it and its gradient."""
    problem = make_transition((1, 128, 128, 256), 1024, dtype=dtype)
    grad_out, weights = grad_like(problem), list(problem.weights.values())
    with PeakBytes(problem.x, grad_out, *weights) as ours:
        backward(problem, grad_out)
    # Beside them the parameters' sums and copies, and one block's parameter gradients.
    of_parameters = 3 * 4 * sum(weight.numel() for weight in weights)
    assert ours.peak <= (1 + 3) * problem.x.nbytes + of_parameters
    with torch.enable_grad():
        module = in_tree_transition(problem)
        x = problem.x.clone().requires_grad_()
        with PeakBytes(x, grad_out, *module.parameters()) as in_tree:
            module(x).backward(grad_out)
    assert ours.peak < 0.25 * in_tree.peak


class Products(TorchDispatchMode):
    """Multiply-adds of the matrix products within."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.__name__.partition(".")[0] in ("mm", "addmm"):
            left, right = [value for value in args if isinstance(value, Tensor)][-2:]
            self.count += left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


def test_a_gradient_that_is_not_asked_for_is_not_computed(backward):
    problem = make_transition((9, 9, 8), 12, biases=BIASES)
    everything, one = set(leaves_of(problem)), 9 * 9 * 8 * 12

    def products(needs) -> int:
        with Products() as counted:
            got = backward(problem, grad_like(problem), needs)
        assert set(got) == set(needs)
        return counted.count

    assert products(everything) == 8 * one
    for name in ("gate_weight", "up_weight", "down_weight"):
        assert products(everything - {name}) == 7 * one
    assert products(everything - {"x", *NORMS}) == 6 * one
    assert products({"down_weight"}) == products({"gate_bias"}) == 3 * one
    assert products({"x"}) == products({"norm_bias"}) == 5 * one
    assert products({"down_bias"}) == products(()) == 0


@pytest.fixture
def several_threads(aten, monkeypatch, blocks_of):
    monkeypatch.setattr(aten, "region_threads", lambda _: 3)
    blocks_of(64)


@pytest.mark.parametrize("lengths", [None, (29, 11)])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_threads_do_not_show(aten, call, kernel, several_threads, dtype, lengths):
    problem = make_transition(
        (2, 29, 29, 32), 48, dtype=dtype, residual="own", biases=BIASES, lengths=lengths
    )
    blocks = aten._blocks_of(call(problem))
    assert blocks.threads == 3 and len(blocks.windows) > 3

    def step() -> dict:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves_of(problem).items()}
        out = with_leaves(problem, leaves).run(kernel)
        grads = torch.autograd.grad(out, leaves.values(), grad_like(problem))
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    got = step()
    wanted = {"out": reference(problem), **reference_gradients(problem, grad_like(problem))}
    limit = 5e-6 if dtype == torch.float32 else 1e-2
    assert all(relative_error(value, wanted[name]) <= limit for name, value in got.items())
    for _ in range(3):
        again = step()
        assert all(torch.equal(again[name], value) for name, value in got.items())
    with torch.inference_mode(), torch.autocast("cpu", dtype=BF16):
        assert torch.equal(problem.run(kernel), got["out"])


def test_many_threads_have_blocks_of_their_own_only_where_those_are_large(
    aten, call, monkeypatch
):
    def cut(rows: int, threads: int, *of) -> tuple[int, int]:
        monkeypatch.setattr(aten, "region_threads", lambda _: threads)
        blocks = aten._blocks_of(call(make_transition((rows, 1), 1)), *of)
        return blocks.threads, len(blocks.windows)

    assert cut(2**14, 1) == (1, 16) and cut(2**14, 2) == (2, 16) and cut(1000, 2) == (2, 2)
    assert cut(256, 2) == (2, 1) and cut(2**14, 8) == (8, 16) and cut(2**13, 16) == (1, 8)
    assert cut(2**16, 16) == (16, 32)
    assert cut(2**14, 2, 16, 512) == (2, 32) and cut(2**15, 2, 16, 512) == (2, 32)


def test_elsewhere_than_on_a_cpu_blocks_are_large(aten, call):
    problem = make_transition((2, 200, 300, 2), 3)
    problem.x = problem.x.to("meta")
    blocks = aten._blocks_of(call(problem))
    assert blocks.threads == 1 and len(blocks.windows) == 8
