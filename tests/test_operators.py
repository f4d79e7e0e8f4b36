"""All that autograd, torch.func and torch.compile may ask of the two public functions."""

import contextlib

import pytest
import torch
from gradients_of_calls import (
    BF16,
    LIMIT,
    RECOMPUTE,
    Asked,
    assert_equal,
    fresh_leaves,
    grad_of_output,
    gradients,
)
from helpers import (
    Problem,
    as_call,
    formula,
    leaves_of,
    make_problem,
    reference_gradients,
    relative_error,
    run,
    with_leaves,
)
from selection import pairwise, slow
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transitions import PATHS


@pytest.fixture(params=PATHS)
def device(request) -> str:
    """The device whose tensors take the path: every test here is for each path."""
    return request.getfixturevalue("on_triton") if request.param == "triton" else "cpu"


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_output_is_that_without_a_gradient(kernel, device, dtype):
    problem = make_problem(12, 16, dtype=dtype, mask="soft", residual=True, drop_mask=True)
    wanted = run(kernel, problem, device)
    for recompute in RECOMPUTE:
        problem.x.requires_grad_()
        got = run(kernel, problem, device, recompute=recompute)
        assert got.requires_grad and got.is_contiguous()
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_second_backward_of_a_kept_graph(kernel, device, recompute):
    problem = make_problem(9, 16, mask="soft", residual=True, drop_mask=True).to(device)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
    out = run(kernel, problem, device, recompute=recompute)
    grad = grad_of_output(problem).to(device)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, leaves, grad)


def test_an_input_changed_before_the_backward_is_noticed(kernel, device):
    problem = make_problem(5, 8).to(device)
    leaf = problem.x.clone().requires_grad_()
    problem.x = leaf * 1.0
    out = run(kernel, problem, device)
    problem.x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("recompute, pair_sized", [("none", 3), ("product", 1), ("all", 0)])
@pytest.mark.parametrize("channels, hidden", [(16, 16), (8, 24)])
def test_what_is_saved(
    kernel, submodule, device, recompute, pair_sized, channels, hidden
):
    """The inputs but for the residual, and at most the product, a and b beside them."""
    path = submodule("paths").execution_path(torch.device(device), torch.float32)
    if path.name == "aten":
        pair_sized = min(pair_sized, 1)
    problem = make_problem(
        16, channels, hidden, batch=2, mask="soft", residual=True, drop_mask=True
    ).to(device)
    for leaf in leaves_of(problem).values():
        leaf.requires_grad_()
    inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves_of(problem).values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(kernel, problem, device, recompute=recompute)
    storages = {t.untyped_storage().data_ptr() for t in saved}
    assert problem.residual.untyped_storage().data_ptr() not in storages
    beside = [t for t in saved if t.untyped_storage().data_ptr() not in inputs and t.numel()]
    pairs = 2 * 16 * 16
    assert sum(t.numel() // (pairs * hidden) for t in beside) == pair_sized
    moments = 2 * pairs
    assert sum(t.numel() for t in beside) <= pair_sized * pairs * hidden + moments


@pytest.mark.parametrize("recompute", ["none", "product", "all"])
@pytest.mark.parametrize("padded", [False, True])
def test_hooks_that_give_back_what_was_saved_with_other_strides(
    kernel, device, submodule, recompute, padded
):
    """Nor do other calls take them for their own, before or after."""
    problem = make_problem(7, 16, batch=2, mask="soft").to(device)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(problem).items()}
    options = {"lengths": torch.tensor([7, 4], dtype=torch.int32).to(device)} if padded else {}
    inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}

    def moved(saved):
        if saved.untyped_storage().data_ptr() in inputs or not saved.numel():
            return saved
        room = saved.new_zeros(*[2 * size + 1 for size in saved.shape])
        room = room[tuple([slice(1, None, 2)] * saved.ndim)]
        return room.copy_(saved)

    def gradients(hook):
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda saved: saved):
            out = run(kernel, problem, device, recompute=recompute, **options)
        return torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    path = submodule("paths").execution_path(torch.device(device), torch.float32)
    whole = torch.Tensor.detach
    for hooks in ((moved, whole), (whole, moved)):
        if path.name == "triton":
            submodule("triton_path.launches")._launches.clear()
        found = {hook: gradients(hook) for hook in hooks}
        assert all(torch.equal(a, b) for a, b in zip(found[moved], found[whole], strict=True))


def test_nothing_is_saved_without_a_gradient(kernel, device, submodule, monkeypatch):
    problem = make_problem(5, 8).to(device)
    for value in problem.weights.values():
        value.requires_grad_()
    function = submodule("operators").TriangleMultiplication
    monkeypatch.setattr(function, "apply", None)
    with torch.no_grad():
        assert not run(kernel, problem, device).requires_grad
    with torch.inference_mode():
        out = run(kernel, problem, device)
        assert not out.requires_grad and out.is_inference()


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_double_backward_is_refused(kernel, device, recompute):
    problem = make_problem(5, 8, mask="soft").to(device)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
    out = run(kernel, problem, device, recompute=recompute)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    assert all(grad.requires_grad for grad in grads)
    with pytest.raises(
        NotImplementedError,
        match="the gradients of the triangle multiplication can't be differentiated again; the "
        "transforms of torch.func can take higher derivatives, in plain PyTorch",
    ):
        sum(grad.square().sum() for grad in grads).backward()


def test_a_graph_of_the_gradients_alone_changes_nothing(kernel, device):
    problem = make_problem(5, 8, mask="soft").to(device)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
    grad = grad_of_output(problem).to(device)
    plain = torch.autograd.grad(run(kernel, problem, device), leaves, grad)
    graphed = torch.autograd.grad(run(kernel, problem, device), leaves, grad, create_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(plain, graphed, strict=True))


def test_inplace_needs_no_gradient(kernel, device):
    problem = make_problem(5, 8, residual=True).to(device)
    problem.weights["p_in_weight"].requires_grad_()
    message = "inplace must be False where a gradient is needed; got True"
    with pytest.raises(ValueError, match=message):
        run(kernel, problem, device, inplace=True)


@pytest.mark.parametrize("biases", [False, True])
def test_recompute_is_checked(kernel, device, biases):
    problem = make_problem(5, 8, biases=biases)
    for recompute in ("some", "", None, True):
        with pytest.raises(ValueError) as caught:
            run(kernel, problem, device, recompute=recompute)
        words = "recompute must be 'none', 'product' or 'all'"
        assert str(caught.value) == f"{words}; got {recompute!r}"


class TestTransforms:
    """torch.func and forward-mode AD follow the formula, to any order."""

    def test_grad(self, kernel, device):
        problem = make_problem(6, 8, direction="incoming", mask="soft")
        wanted = reference_gradients(problem, grad_of_output(problem))["x"]
        p, grad = problem.to(device), grad_of_output(problem).to(device)

        def loss(x: Tensor) -> Tensor:
            return (run(kernel, with_leaves(p, {"x": x}), device) * grad).sum()

        assert relative_error(torch.func.grad(loss)(p.x), wanted) <= LIMIT
        batch = torch.func.vmap(torch.func.grad(loss))(torch.stack([p.x, 2 * p.x]))
        assert relative_error(batch[0], wanted) <= LIMIT

    def test_second_derivatives(self, kernel, device):
        problem = make_problem(4, 5).to(device)
        weight = problem.weights["norm_in_weight"]

        def loss(weight: Tensor) -> Tensor:
            return run(kernel, with_leaves(problem, {"norm_in_weight": weight}), device).sum()

        def exact(weight: Tensor) -> Tensor:
            return formula(with_leaves(problem, {"norm_in_weight": weight})).sum()

        wanted = torch.func.hessian(exact)(weight.cpu().double())
        assert relative_error(torch.func.hessian(loss)(weight), wanted) <= 1e-4

    def test_batched_gradients(self, kernel, device):
        problem = make_problem(6, 8, mask="soft").to(device)
        leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
        grads = torch.randn(3, *problem.x.shape, device=device)
        out = run(kernel, problem, device)
        batched = torch.autograd.grad(
            out, leaves, grads, is_grads_batched=True, retain_graph=True
        )
        for index, grad in enumerate(grads):
            alone = torch.autograd.grad(out, leaves, grad, retain_graph=True)
            assert all(torch.equal(b[index], a) for b, a in zip(batched, alone, strict=True))


@pytest.mark.parametrize(
    "device, recompute, reentrant", pairwise(PATHS, RECOMPUTE, [False, True]), indirect=["device"]
)
def test_under_checkpoint(kernel, device, reentrant, recompute):
    problem = make_problem(9, 16, dtype=BF16, mask="soft", residual=True, drop_mask=True)
    wanted = gradients(kernel, problem, device)
    got = gradients(
        kernel, problem, device, recompute=recompute,
        through=lambda call, *leaves: checkpoint(call, *leaves, use_reentrant=reentrant),
    )  # fmt: skip
    assert_equal(got, wanted)


@pytest.mark.parametrize(
    "device, dtype, backward_inside",
    pairwise(PATHS, [BF16, torch.float32], [False, True]),
    indirect=["device"],
)
def test_autocast_does_not_reach_inside(kernel, device, dtype, backward_inside):
    """The dtype of the pair tensor decides, in the backward too."""
    problem = make_problem(9, 16, dtype=dtype, mask="soft", drop_mask=True)
    wanted = gradients(kernel, problem, device)
    leaves = {n: leaf.requires_grad_() for n, leaf in fresh_leaves(problem, device).items()}
    moved = with_leaves(problem.to(device), leaves)
    autocast = torch.autocast(device, dtype=BF16)
    with autocast:
        out = run(kernel, moved, device)
    with autocast if backward_inside else contextlib.nullcontext():
        out.backward(grad_of_output(problem).to(device))
    assert_equal({name: leaf.grad for name, leaf in leaves.items()}, wanted)


@pytest.mark.parametrize(
    "device, recompute",
    [("aten", "none"), ("aten", "all"), ("triton", "none"), slow("triton", "all")],
    indirect=["device"],
)
def test_ops_are_registered_as_torch_wants_them(kernel, device, submodule, recompute):
    # Of this length the planes that are kept have no padding, which isn't all written.
    problem = make_problem(
        16, 16, direction="incoming", mask="soft", residual=True, drop_mask=True
    ).to(device)
    for leaf in leaves_of(problem).values():
        leaf.requires_grad_()
    call = as_call(submodule("_call"), problem, precision="default", recompute=recompute)
    call = call._replace(drop_mask=call.drop_mask.detach().requires_grad_())
    ops = submodule("_ops").ops
    results = torch.library.opcheck(ops.trimul_fwd_saving.default, call.flat())
    assert set(results.values()) == {"SUCCESS"}

    with torch.no_grad():
        _, *kept = ops.trimul_fwd_saving(*call.flat())
    kept = [tensor if tensor.numel() else None for tensor in kept]
    grad = grad_of_output(problem).to(device)
    flat = call._replace(residual=None).flat()
    detached = [value.detach() if isinstance(value, Tensor) else value for value in flat]
    given = dict(zip(submodule("_call").FLAT, detached, strict=True))
    names = submodule("_call").DIFFERENTIABLE
    for needs in ([given[name] is not None for name in names], [True] + [False] * 14):
        backward = (grad, *kept, needs, *detached)
        results = torch.library.opcheck(ops.trimul_bwd.default, backward)
        assert set(results.values()) == {"SUCCESS"}


class TestCompiled:
    @staticmethod
    def gradients_of(block, problem: Problem, device: str) -> dict[str, Tensor]:
        """Of all leaves of `block`(x, residual, mask, drop_mask, weights)."""
        leaves = {n: v.requires_grad_() for n, v in fresh_leaves(problem, device).items()}
        p = with_leaves(problem.to(device), leaves)
        out = block(p.x, p.residual, p.mask, p.drop_mask, p.weights)
        out.backward(grad_of_output(problem).to(device))
        return {name: leaf.grad for name, leaf in leaves.items()}

    @staticmethod
    def block(kernel, recompute: str = "none", **options):
        """The function, compiled into one graph."""
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, **{"backend": "aot_eager", **options})
        def block(x, residual, mask, drop_mask, weights):
            return kernel.triangle_multiplicative_update_with_residual(
                x, "outgoing", residual, drop_mask, mask=mask, recompute=recompute, **weights
            )

        return block

    @pytest.mark.parametrize("recompute", RECOMPUTE)
    def test_into_one_graph(self, kernel, device, recompute):
        problem = make_problem(9, 16, mask="soft", residual=True, drop_mask=True)
        wanted = gradients(kernel, problem, device, recompute=recompute)
        block = self.block(kernel, recompute)
        assert_equal(self.gradients_of(block, problem, device), wanted)

    @pytest.mark.parametrize(
        "device, dynamic",
        [("aten", None), ("aten", True), ("triton", None), slow("triton", True)],
        indirect=["device"],
    )
    def test_compiles_once_more_at_most_when_lengths_vary(self, kernel, device, dynamic):
        backend = CompileCounterWithBackend("aot_eager")
        block = self.block(kernel, backend=backend, dynamic=dynamic)
        graphs = []
        for length in (5, 6, 8, 7, 9):
            problem = make_problem(length, 16, mask="soft", residual=True, drop_mask=True)
            wanted = gradients(kernel, problem, device)
            assert_equal(self.gradients_of(block, problem, device), wanted)
            graphs.append(len(backend.graphs))
        assert graphs[-1] <= 2 and graphs[1:] == [graphs[-1]] * 4

    def test_only_what_needs_a_gradient_has_one(self, kernel, device, submodule):
        problem = make_problem(6, 8, mask="soft").to(device)
        block = self.block(kernel)
        problem.x.requires_grad_()
        problem.weights["p_in_weight"].requires_grad_()
        out = block(problem.x, None, problem.mask, None, problem.weights)
        with Asked(submodule("_call").DIFFERENTIABLE) as asked:
            out.backward(grad_of_output(problem).to(device))
        assert asked.names == [{"x", "p_in_weight"}]


class TestTracedInPlace:
    """Tensors that have no address are not asked for it; real aliases stay refused."""

    @pytest.fixture(params=["the pair itself", "another tensor"])
    def update(self, request, kernel, device):
        problem = make_problem(8, 16, mask="soft").to(device)

        def call(x):
            pair = x.clone()
            residual = pair if request.param == "the pair itself" else x * 2
            return kernel.triangle_multiplicative_update_with_residual(
                pair, "outgoing", residual, None, mask=problem.mask, inplace=True,
                **problem.weights,
            )  # fmt: skip

        return call, problem.x

    @pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
    @torch.no_grad()
    def test_make_fx(self, update, mode):
        call, x = update
        options = {} if mode == "real" else {"_allow_non_fake_inputs": True}
        traced = make_fx(call, tracing_mode=mode, **options)(x)
        assert torch.equal(traced(x), call(x))

    @pytest.mark.parametrize("strict", [False, True])
    @torch.no_grad()
    def test_export(self, update, strict):
        call, x = update
        module = torch.nn.Module()
        module.forward = call
        exported = torch.export.export(module, (x,), strict=strict)
        assert torch.equal(exported.module()(x), call(x))

    @torch.no_grad()
    def test_fake_tensors_and_one_graph(self, update):
        call, x = update
        assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert call(mode.from_tensor(x)).shape == x.shape


@pytest.mark.kernels_ci
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_captured_in_a_cuda_graph(kernel, recompute):
    first, second = (
        make_problem(33, 32, dtype=BF16, mask="soft", residual=True, seed=seed) for seed in (0, 1)
    )
    grad_out = grad_of_output(first).cuda()
    leaves = {name: leaf.requires_grad_() for name, leaf in fresh_leaves(first, "cuda").items()}
    problem = with_leaves(first.to("cuda"), leaves)

    def step() -> tuple[Tensor, ...]:
        out = run(kernel, problem, "cuda", recompute=recompute)
        return torch.autograd.grad(out, list(leaves.values()), grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name, leaf in leaves_of(second).items():
            leaves[name].copy_(leaf)
    graph.replay()
    got = [gradient.clone() for gradient in captured]
    for name, mine, eager in zip(leaves, got, step(), strict=True):
        assert torch.equal(mine, eager), name
