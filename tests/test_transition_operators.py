"""All that autograd, torch.func and torch.compile may ask of `swiglu_transition`."""

import contextlib

import pytest
import torch
from gradients_of_calls import (
    BF16,
    LIMIT,
    Asked,
    assert_equal,
    fresh_leaves,
    grad_of_output,
    gradients,
)
from helpers import (
    DTYPES,
    assert_no_worse,
    formula,
    leaves_of,
    reference,
    reference_gradients,
    relative_error,
    room,
    run,
    seeded,
    with_leaves,
)
from selection import pairwise, slow
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from transitions import (
    BIASES,
    LAYOUTS,
    NORMS,
    PATHS,
    TransitionProblem,
    as_transition,
    in_tree_transition_gradients,
    make_transition,
    poisoned,
)

NAMES = ("x", *NORMS, "gate_weight", "up_weight", "down_weight", *BIASES)


@pytest.fixture(params=PATHS)
def device(request) -> str:
    """The device whose tensors take the path: every test here is for each path."""
    return request.getfixturevalue("on_triton") if request.param == "triton" else "cpu"


class TestGradients:
    @pytest.mark.kernels_ci
    @pytest.mark.parametrize("shape, hidden, others", [
        ((8,), 8, {}),
        ((5, 16), 24, {"biases": BIASES}),
        ((2, 9, 7, 16), 48, {"residual": "own"}),
        ((1, 2, 7, 3, 11), 13, {"residual": "own", "biases": BIASES}),
        ((40, 40, 24), 40, {"biases": ("up_bias",)}),
        ((3, 1), 5, {"residual": "own"}),
    ])  # fmt: skip
    def test_all_together(self, kernel, device, shape, hidden, others):
        problem = make_transition(shape, hidden, **others)
        wanted = reference_gradients(problem, grad_of_output(problem))
        got = gradients(kernel, problem, device)
        assert set(got) == set(wanted)
        for name, leaf in leaves_of(problem).items():
            assert got[name].shape == leaf.shape and got[name].dtype == leaf.dtype, name
            error = (got[name].cpu().double() - wanted[name]).norm()
            assert error <= LIMIT * wanted[name].norm() + 1e-6, name

    @pytest.mark.parametrize("name", [*NAMES, "residual"])
    def test_each_alone_and_no_other(self, kernel, device, submodule, name):
        problem = make_transition((7, 8, 12), 20, residual="own", biases=BIASES)
        wanted = reference_gradients(problem, grad_of_output(problem))[name]
        with Asked(submodule("_call").TRANSITION_DIFFERENTIABLE, "swiglu_bwd") as asked:
            got = gradients(kernel, problem, device, (name,))[name]
        assert asked.names == ([] if name == "residual" else [{name}])
        assert relative_error(got, wanted) <= LIMIT

    @pytest.mark.parametrize("names", [
        ("x", "down_bias"), ("norm_weight", "down_weight"), ("gate_bias", "up_weight"),
        ("residual", "norm_bias"), ("gate_weight", "up_bias", "residual"),
    ])  # fmt: skip
    def test_some(self, kernel, device, names):
        problem = make_transition((7, 8, 12), 20, residual="own", biases=BIASES)
        wanted = reference_gradients(problem, grad_of_output(problem))
        got = gradients(kernel, problem, device, names)
        assert all(relative_error(got[name], wanted[name]) <= LIMIT for name in names)

    @pytest.mark.parametrize("dtype", [BF16, torch.float16])
    def test_16_bit_errors_beside_the_in_tree_modules(self, kernel, device, dtype):
        draws = []
        for seed in range(4):
            problem = make_transition((1, 9, 9, 32), 128, dtype=dtype, residual="x", seed=seed)
            grad_out = grad_of_output(problem)
            got = with_residual_of_x(kernel, problem, device)
            in_tree = in_tree_transition_gradients(problem, grad_out)
            assert all(got[name].dtype == in_tree[name].dtype for name in got | in_tree)
            wanted = reference_gradients(problem, grad_out)
            wanted["x"] = wanted["x"] + wanted.pop("residual")
            draws.append((got, in_tree, wanted))
        assert_no_worse(draws, 1.0)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes_are_the_leaves_own(self, kernel, device, dtype):
        problem = make_transition((6, 7, 16), 32, dtype=dtype, residual="own", biases=BIASES)
        problem.weights["norm_bias"] = problem.weights["norm_bias"].to(BF16)
        problem.biases["up_bias"] = problem.biases["up_bias"].to(torch.float16)
        leaves = leaves_of(problem)
        got = gradients(kernel, problem, device)
        wanted = reference_gradients(problem, grad_of_output(problem))
        for name, gradient in got.items():
            assert gradient.dtype == leaves[name].dtype
            assert relative_error(gradient, wanted[name]) <= 8e-3 * room(gradient.numel()), name

    def test_residual_that_is_x(self, kernel, device):
        problem = make_transition((9, 5, 16), 24, residual="x")
        wanted = reference_gradients(problem, grad_of_output(problem))
        got = with_residual_of_x(kernel, problem, device)
        assert relative_error(got["x"], wanted["x"] + grad_of_output(problem).double()) <= LIMIT

    @pytest.mark.parametrize("absent", [NORMS, *[(name,) for name in NORMS]])
    def test_absent_norm_parameters(self, kernel, device, absent):
        problem = make_transition((7, 7, 8), 12)
        default = {n: torch.full((8,), float(n.endswith("weight"))) for n in absent}
        wanted = reference_gradients(
            with_leaves(problem, default), grad_of_output(problem)
        )
        problem.weights |= dict.fromkeys(absent)
        got = gradients(kernel, problem, device)
        assert set(wanted) - set(got) == set(absent)
        assert all(relative_error(got[name], wanted[name]) <= LIMIT for name in got)

    def test_rows_of_one_constant(self, kernel, device):
        problem = make_transition((6, 6, 16), 24)
        problem.x[2] = 1000.0
        problem.x[:, 4] = -3.0
        wanted = reference_gradients(problem, grad_of_output(problem))
        for name, gradient in gradients(kernel, problem, device).items():
            assert relative_error(gradient, wanted[name]) <= LIMIT, name

    @pytest.mark.parametrize("kind", ["expanded", "strided"])
    def test_gradients_of_the_output_of_any_strides(self, kernel, device, kind):
        problem = make_transition((2, 7, 5, 8), 12, residual="own").to(device)
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves_of(problem).items()}
        grad = grad_of_output(problem).to(device)
        if kind == "expanded":
            grad = grad[:1, :1, :1, :1].expand(problem.x.shape)
        else:
            grad = LAYOUTS["batch and channels turned"](grad)
        wanted = reference_gradients(problem, grad)
        out = run(kernel, problem, device)
        for name, got in zip(leaves, torch.autograd.grad(out, leaves.values(), grad), strict=True):
            assert relative_error(got, wanted[name]) <= LIMIT, name

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strided_leaves(self, kernel, device, layout):
        """Gradients arrive in the leaves' places, whatever their strides."""
        problem = make_transition((2, 6, 7, 8), 12, residual="own")
        wanted = reference_gradients(problem, grad_of_output(problem))
        laid = {name: LAYOUTS[layout](getattr(problem, name)) for name in ("x", "residual")}
        laid["down_weight"] = problem.weights["down_weight"].t().contiguous().t()
        given = with_leaves(problem, laid).to(device)
        leaves = {n: leaf.detach().requires_grad_() for n, leaf in leaves_of(given).items()}
        out = run(kernel, with_leaves(given, leaves), device)
        grads = torch.autograd.grad(out, leaves.values(), grad_of_output(problem).to(device))
        for name, got in zip(leaves, grads, strict=True):
            assert relative_error(got, wanted[name]) <= LIMIT, name

    def test_leading_dimensions_that_cannot_be_merged(self, kernel, device):
        problem = make_transition((2, 3, 2, 5, 4, 8), 12)
        problem.x = problem.x.transpose(0, 2).contiguous().transpose(0, 2)
        wanted = reference_gradients(problem, grad_of_output(problem))["x"]
        got = gradients(kernel, problem, device, ("x",))["x"]
        assert relative_error(got, wanted) <= LIMIT

    @pytest.mark.kernels_ci
    @pytest.mark.parametrize("dtype", [BF16, torch.float32])
    @pytest.mark.parametrize("residual", [None, "own"])
    def test_lengths(self, kernel, device, dtype, residual):
        """Padding gives nothing, even if x is NaN there."""
        problem = make_transition(
            (3, 9, 9, 16), 24, dtype=dtype, residual=residual, lengths=(9, 4, 0), biases=BIASES
        )
        wanted = reference_gradients(problem, grad_of_output(problem))
        torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
        try:
            got = gradients(kernel, poisoned(problem), device)
        finally:
            torch.use_deterministic_algorithms(False)
        limit = LIMIT if dtype == torch.float32 else 1e-2
        for name, gradient in got.items():
            assert relative_error(gradient, wanted[name]) <= limit, name
        padding = poisoned(problem).x.isnan()
        assert padding.any() and not got["x"].cpu()[padding].any()

    @pytest.mark.parametrize("shape", [(0, 5, 5, 16), (2, 0, 0, 16), (0, 16)])
    def test_empty(self, kernel, device, shape):
        problem = make_transition((4, 16), 24, biases=BIASES)
        problem.x, problem.residual = torch.zeros(shape), torch.zeros(shape)
        got = gradients(kernel, problem, device)
        for name, leaf in leaves_of(problem).items():
            assert torch.equal(got[name], torch.zeros_like(leaf, device=device)), name

    def test_all_of_it_padding(self, kernel, device):
        problem = make_transition((2, 3, 3, 16), 24, lengths=(0, 0), biases=BIASES)
        assert not any(g.any() for g in gradients(kernel, poisoned(problem), device).values())

    @pytest.mark.kernels_ci
    def test_equal_bits_from_equal_calls(self, kernel, device):
        problem = make_transition(
            (2, 20, 20, 32), 48, dtype=BF16, residual="own", biases=BIASES
        )
        first = gradients(kernel, problem, device)
        for _ in range(3):
            assert_equal(gradients(kernel, problem, device), first)

    def test_reference_gradients_are_those_of_central_differences(self):
        """Checks this file's oracle, autograd of the formula, against the formula itself."""
        problem = make_transition((4, 4, 5), 3, residual="own", biases=BIASES, lengths=(3,))
        probe, step = grad_of_output(problem).double(), 1e-5
        for name, gradient in reference_gradients(problem, grad_of_output(problem)).items():
            leaf = leaves_of(problem)[name].double()
            along = torch.randn(leaf.shape, generator=seeded(2)).double()
            ahead = reference(with_leaves(problem, {name: leaf + step * along}))
            behind = reference(with_leaves(problem, {name: leaf - step * along}))
            slope = float(((ahead - behind) * probe).sum()) / (2 * step)
            assert float((gradient * along).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-6)


def with_residual_of_x(kernel, problem: TransitionProblem, device: str) -> dict[str, Tensor]:
    """The gradients where the residual is x itself."""
    leaves = fresh_leaves(problem, device)
    del leaves["residual"]
    for leaf in leaves.values():
        leaf.requires_grad_()
    given = with_leaves(problem.to(device), leaves | {"residual": leaves["x"]})
    run(kernel, given, device).backward(grad_of_output(problem).to(device))
    return {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_is_that_without_a_gradient(kernel, device, dtype):
    problem = make_transition((12, 12, 16), 24, dtype=dtype, residual="own", biases=BIASES)
    wanted = run(kernel, problem, device)
    problem.x.requires_grad_()
    got = run(kernel, problem, device)
    assert got.requires_grad and got.is_contiguous() and torch.equal(got, wanted)


def test_a_second_backward_of_a_kept_graph(kernel, device):
    problem = make_transition((9, 9, 16), 24, residual="own").to(device)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
    out = run(kernel, problem, device)
    grad = grad_of_output(problem).to(device)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, leaves, grad)


def test_an_input_changed_before_the_backward_is_noticed(kernel, device):
    problem = make_transition((5, 5, 8), 12).to(device)
    leaf = problem.x.clone().requires_grad_()
    problem.x = leaf * 1.0
    out = run(kernel, problem, device)
    problem.x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_nothing_is_saved_but_the_arguments(kernel, device):
    problem = make_transition((2, 8, 8, 16), 24, residual="own", biases=BIASES).to(device)
    for leaf in leaves_of(problem).values():
        leaf.requires_grad_()
    inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves_of(problem).values()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(kernel, problem, device)
    storages = {t.untyped_storage().data_ptr() for t in saved}
    assert storages == inputs - {problem.residual.untyped_storage().data_ptr()}


def test_nothing_is_saved_without_a_gradient(kernel, device, submodule, monkeypatch):
    problem = make_transition((5, 5, 8), 12).to(device)
    for value in problem.weights.values():
        value.requires_grad_()
    monkeypatch.setattr(submodule("transition_operators").SwiGLUTransition, "apply", None)
    with torch.no_grad():
        assert not run(kernel, problem, device).requires_grad
    with torch.inference_mode():
        out = run(kernel, problem, device)
        assert not out.requires_grad and out.is_inference()


def test_double_backward_is_refused(kernel, device):
    problem = make_transition((5, 5, 8), 12, biases=BIASES).to(device)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
    out = run(kernel, problem, device)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(
        NotImplementedError,
        match="the gradients of the transition can't be differentiated again; the transforms of "
        "torch.func can take higher derivatives, in plain PyTorch",
    ):
        sum(grad.square().sum() for grad in grads).backward()


def test_a_graph_of_the_gradients_alone_changes_nothing(kernel, device):
    problem = make_transition((5, 5, 8), 12).to(device)
    leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
    grad = grad_of_output(problem).to(device)
    plain = torch.autograd.grad(run(kernel, problem, device), leaves, grad)
    graphed = torch.autograd.grad(run(kernel, problem, device), leaves, grad, create_graph=True)
    assert all(torch.equal(one, two) for one, two in zip(plain, graphed, strict=True))


@pytest.mark.parametrize("leaf", ["x", "residual", "gate_weight", "norm_bias"])
def test_inplace_needs_no_gradient(kernel, device, leaf):
    problem = make_transition((5, 5, 8), 12, residual="own").to(device)
    leaves_of(problem)[leaf].requires_grad_()
    before = problem.residual.detach().clone()
    message = "inplace must be False where a gradient is needed; got True"
    with pytest.raises(ValueError, match=message):
        run(kernel, problem, device, inplace=True)
    assert torch.equal(problem.residual, before)
    with torch.no_grad():
        assert run(kernel, problem, device, inplace=True).data_ptr() == problem.residual.data_ptr()


class TestTransforms:
    """torch.func and forward-mode AD follow the formula, to any order."""

    @pytest.mark.parametrize("lengths", [None, (4,)])
    def test_grad(self, kernel, device, lengths):
        problem = make_transition((1, 6, 6, 8), 12, residual="own", lengths=lengths)
        wanted = reference_gradients(problem, grad_of_output(problem))["x"]
        p, grad = problem.to(device), grad_of_output(problem).to(device)

        def loss(x: Tensor) -> Tensor:
            return (run(kernel, with_leaves(p, {"x": x}), device) * grad).sum()

        x = p.x if lengths is None else poisoned(problem).x.to(device)
        assert relative_error(torch.func.grad(loss)(x), wanted) <= LIMIT
        batch = torch.func.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x]))
        assert relative_error(batch[0], wanted) <= LIMIT

    @pytest.mark.parametrize("shape", [(6, 8), (2, 6, 5, 8)])
    def test_jvp(self, kernel, device, shape):
        problem = make_transition(shape, 12, residual="own", biases=BIASES)
        p, tangent = problem.to(device), grad_of_output(problem)
        _, got = torch.func.jvp(
            lambda x: run(kernel, with_leaves(p, {"x": x}), device), (p.x,), (tangent.to(device),)
        )
        _, wanted = torch.func.jvp(
            lambda x: formula(with_leaves(problem, {"x": x})),
            (problem.x.double(),), (tangent.double(),),
        )  # fmt: skip
        assert relative_error(got, wanted) <= LIMIT

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_vmap_without_a_gradient(self, kernel, device, dtype):
        problem = make_transition((3, 4, 5, 8), 12, dtype=dtype, biases=BIASES).to(device)
        got = torch.func.vmap(lambda x: run(kernel, with_leaves(problem, {"x": x}), device))(
            problem.x
        )
        wanted = torch.stack(
            [run(kernel, with_leaves(problem, {"x": x}), device) for x in problem.x]
        )
        assert torch.equal(got, wanted)

    def test_inplace_is_refused(self, kernel, device):
        problem = make_transition((3, 4, 5, 8), 12, residual="x").to(device)
        with pytest.raises(ValueError, match="inplace must be False under the transforms"):
            torch.func.vmap(
                lambda x: run(
                    kernel, with_leaves(problem, {"x": x, "residual": x}), device, inplace=True
                )
            )(problem.x)

    def test_second_derivatives(self, kernel, device):
        problem = make_transition((4, 5), 6).to(device)
        weight = problem.weights["gate_weight"]

        def loss(weight: Tensor) -> Tensor:
            return run(kernel, with_leaves(problem, {"gate_weight": weight}), device).sum()

        def exact(weight: Tensor) -> Tensor:
            return formula(with_leaves(problem, {"gate_weight": weight})).sum()

        wanted = torch.func.hessian(exact)(weight.cpu().double())
        assert relative_error(torch.func.hessian(loss)(weight), wanted) <= 1e-4

    def test_batched_gradients(self, kernel, device):
        problem = make_transition((6, 5, 8), 12, residual="own").to(device)
        leaves = [leaf.requires_grad_() for leaf in leaves_of(problem).values()]
        grads = torch.randn(3, *problem.x.shape, device=device)
        out = run(kernel, problem, device)
        batched = torch.autograd.grad(
            out, leaves, grads, is_grads_batched=True, retain_graph=True
        )
        for index, grad in enumerate(grads):
            alone = torch.autograd.grad(out, leaves, grad, retain_graph=True)
            assert all(torch.equal(b[index], a) for b, a in zip(batched, alone, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpoint(kernel, device, reentrant):
    problem = make_transition((9, 9, 16), 24, dtype=BF16, residual="own")
    wanted = gradients(kernel, problem, device)
    got = gradients(
        kernel, problem, device,
        through=lambda call, *leaves: checkpoint(call, *leaves, use_reentrant=reentrant),
    )  # fmt: skip
    assert_equal(got, wanted)


@pytest.mark.parametrize(
    "device, dtype, backward_inside", pairwise(PATHS, DTYPES, [False, True]), indirect=["device"]
)
def test_autocast_does_not_reach_inside(kernel, device, dtype, backward_inside):
    """The dtype of x decides, in the backward too."""
    problem = make_transition((9, 9, 16), 24, dtype=dtype, residual="own", biases=BIASES)
    wanted, out_wanted = gradients(kernel, problem, device), run(kernel, problem, device)
    leaves = {n: leaf.requires_grad_() for n, leaf in fresh_leaves(problem, device).items()}
    moved = with_leaves(problem.to(device), leaves)
    autocast = torch.autocast(device, dtype=BF16)
    with autocast:
        out = run(kernel, moved, device)
        with torch.no_grad():
            assert torch.equal(run(kernel, moved, device), out_wanted)
    assert torch.equal(out, out_wanted)
    with autocast if backward_inside else contextlib.nullcontext():
        out.backward(grad_of_output(problem).to(device))
    assert_equal({name: leaf.grad for name, leaf in leaves.items()}, wanted)


@pytest.mark.parametrize(
    "device, lengths, biases", pairwise(PATHS, [None, (5, 3)], [(), BIASES]), indirect=["device"]
)
def test_ops_are_registered_as_torch_wants_them(kernel, device, submodule, lengths, biases):
    types, ops = submodule("_call"), submodule("_ops").ops
    problem = make_transition(
        (2, 5, 5, 16), 24, residual="own", lengths=lengths, biases=biases
    ).to(device)
    call = as_transition(types, problem, precision="default")

    def check(op, arguments) -> None:
        assert set(torch.library.opcheck(op.default, arguments).values()) == {"SUCCESS"}

    check(ops.swiglu_fwd, call.flat())
    check(ops.swiglu_fwd_, call._replace(inplace=True).flat())
    flat = call._replace(residual=None).flat()
    given = dict(zip(types.TRANSITION_FLAT, flat, strict=True))
    names = types.TRANSITION_DIFFERENTIABLE
    grad = grad_of_output(problem).to(device).view(call.x.shape)
    for needs in ([given[name] is not None for name in names], [True] + [False] * 8):
        check(ops.swiglu_bwd, (grad, needs, *flat))
    for leaf in leaves_of(problem).values():
        leaf.requires_grad_()
    check(ops.swiglu_fwd_saving, as_transition(types, problem, precision="default").flat())


class TestCompiled:
    @staticmethod
    def block(kernel, **options):
        """The function, compiled into one graph."""
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, **{"backend": "aot_eager", **options})
        def block(problem: TransitionProblem):
            return problem.run(kernel)

        return block

    @staticmethod
    def gradients_of(block, problem: TransitionProblem, device: str) -> dict[str, Tensor]:
        leaves = {n: v.requires_grad_() for n, v in fresh_leaves(problem, device).items()}
        out = block(with_leaves(problem.to(device), leaves))
        out.backward(grad_of_output(problem).to(device))
        return {name: leaf.grad for name, leaf in leaves.items()}

    @pytest.mark.parametrize(
        "device, shape, lengths, dynamic",
        pairwise(PATHS, [(2, 9, 9, 16), (2, 1, 9, 9, 16)], [None, (9, 4)], [None, True])
        + [("aten", (9, 16), None, True), slow("triton", (9, 16), None, None)],
        indirect=["device"],
    )
    def test_into_one_graph(self, kernel, device, shape, dynamic, lengths):
        problem = make_transition(shape, 24, residual="own", biases=BIASES, lengths=lengths)
        block = self.block(kernel, dynamic=dynamic)
        with torch.no_grad():
            assert torch.equal(block(problem.to(device)), run(kernel, problem, device))
        wanted = gradients(kernel, problem, device)
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
            problem = make_transition((1, length, length, 16), 24, residual="own")
            wanted = gradients(kernel, problem, device)
            assert_equal(self.gradients_of(block, problem, device), wanted)
            graphs.append(len(backend.graphs))
        assert graphs[-1] <= 2 and graphs[1:] == [graphs[-1]] * 4

    def test_only_what_needs_a_gradient_has_one(self, kernel, device, submodule):
        problem = make_transition((6, 6, 8), 12).to(device)
        block = self.block(kernel)
        problem.x.requires_grad_()
        problem.weights["up_weight"].requires_grad_()
        out = block(problem)
        with Asked(submodule("_call").TRANSITION_DIFFERENTIABLE, "swiglu_bwd") as asked:
            out.backward(grad_of_output(problem).to(device))
        assert asked.names == [{"x", "up_weight"}]


class TestTracedInPlace:
    """Tensors that have no address are not asked for it."""

    @pytest.fixture(params=["x itself", "another tensor"])
    def update(self, request, kernel, device):
        problem = make_transition((2, 8, 8, 16), 24).to(device)

        def call(x):
            given = x.clone()
            residual = given if request.param == "x itself" else x * 2
            return kernel.swiglu_transition(
                given, residual=residual, inplace=True, **problem.weights
            )

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


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export_of_any_length(kernel, device, strict):
    problem = make_transition((2, 8, 8, 16), 24).to(device)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return kernel.swiglu_transition(x, residual=x, **problem.weights)

    length = torch.export.Dim("length", min=2, max=512)
    shapes = {"x": {1: length, 2: length}}
    exported = torch.export.export(Module(), (problem.x,), dynamic_shapes=shapes, strict=strict)
    other = make_transition((2, 13, 13, 16), 24).x.to(device)
    for x in (problem.x, other):
        assert torch.equal(exported.module()(x), Module()(x))


@pytest.mark.kernels_ci
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_captured_in_a_cuda_graph(kernel):
    first, second = (
        make_transition((1, 33, 33, 32), 128, dtype=BF16, residual="own", seed=seed)
        for seed in (0, 1)
    )
    grad_out = grad_of_output(first).cuda()
    leaves = {name: leaf.requires_grad_() for name, leaf in fresh_leaves(first, "cuda").items()}
    problem = with_leaves(first.to("cuda"), leaves)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(kernel, problem, "cuda"), list(leaves.values()), grad_out)

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
