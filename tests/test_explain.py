"""`explain` agrees with the call that follows."""

import pytest
import torch
from helpers import make_problem
from peak_bytes import PeakBytes
from transitions import make_transition

MODES = [
    ("default", False, None), ("default", True, None), ("lean", False, None),
    ("lean", True, None), ("lean", False, (17, 3)), ("auto", False, (17, 3)),
]  # fmt: skip


def explained(kernel, problem, **others):
    """The explanation of `run`'s call."""
    p = problem
    function = kernel.triangle_multiplicative_update_with_residual
    return kernel.explain(
        function, p.x, p.direction, p.residual, p.drop_mask, mask=p.mask, eps=p.eps, **p.weights,
        **others,
    )  # fmt: skip


def peak_bytes(submodule, problem, **others) -> int:
    """The most that the body of the call's op has allocated at once."""
    _, call = submodule("_explain")._call_of(
        submodule("trimul_with_residual").triangle_multiplicative_update_with_residual,
        (problem.x, problem.direction, problem.residual, None),
        {"mask": problem.mask, **problem.weights, **others},
    )
    given = (call.x, problem.mask, call.residual, call.lengths, *call.weights)
    with PeakBytes(*[value for value in given if value is not None]) as memory:
        submodule("operators")._trimul_fwd(*call.flat())
    return memory.peak


@pytest.mark.parametrize("memory, inplace, lengths", MODES)
@pytest.mark.parametrize("channels, hidden", [(32, 32), (16, 48)])
@torch.no_grad()
def test_launches_and_memory_are_those_of_the_call(
    kernel, on_triton, submodule, monkeypatch, memory, inplace, lengths, channels, hidden
):
    problem = make_problem(
        17, channels, hidden, batch=2, dtype=torch.float16, direction="incoming", mask="bool",
        residual=True,
    ).to(on_triton)  # fmt: skip
    options = dict(memory=memory, inplace=inplace)
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths, dtype=torch.int32, device=on_triton)
    found = explained(kernel, problem, **options)
    launched = {}

    def record(launch, **tensors):
        if launch.kernel.__module__.endswith("backward"):
            return
        name = launch.kernel.__name__.removeprefix("_").removesuffix("_fwd_kernel")
        launched.setdefault(name, (launch.programs, launch.constants, launch.options))

    monkeypatch.setattr(submodule("triton_parts.launch").PreparedLaunch, "launch", record)
    submodule("triton_path.launches")._launches.clear()
    measured = peak_bytes(submodule, problem, **options)
    submodule("triton_path.launches")._launches.clear()
    assert launched == {
        name: (stage.programs, stage.constants, stage.options)
        for name, stage in found.stages.items()
    }
    assert found.path == "triton" and found.memory == ("lean" if memory == "lean" else "default")
    assert found.peak_bytes == measured
    assert found.peak == pytest.approx(measured / problem.x.nbytes)
    assert found.kept == 0.0


@pytest.mark.parametrize("recompute, kept", [("none", 3.0), ("product", 1.0), ("all", 0.0)])
def test_what_is_kept_for_a_backward(kernel, on_triton, recompute, kept):
    problem = make_problem(16, 32, dtype=torch.bfloat16).to(on_triton)
    problem.x.requires_grad_()
    found = explained(kernel, problem, recompute=recompute)
    moments = 8 / (32 * 2)
    assert found.kept == (kept + moments if kept else 0.0)
    wanted = {
        "none": "a, b and the product are kept", "product": "the product is kept",
        "all": "recompute='all'",
    }[recompute]
    assert any(note.startswith(wanted) for note in found.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [32, 48])
@pytest.mark.parametrize("with_lengths", [False, True])
@torch.no_grad()
def test_the_aten_path(kernel, monkeypatch, submodule, dtype, hidden, with_lengths):
    problem = make_problem(96, 32, hidden, batch=2, dtype=dtype)
    others = {"lengths": torch.tensor([96, 96])} if with_lengths else {}
    found = explained(kernel, problem, **others)
    assert found.path == "aten" and not found.stages and found.memory is None
    monkeypatch.setattr(submodule("aten_path.blocks"), "_BLOCK_POSITIONS", 96)
    measured = peak_bytes(submodule, problem, **others)
    assert found.peak_bytes <= measured <= found.peak_bytes + 0.4 * problem.x.nbytes


@torch.no_grad()
def test_a_copy_of_x_is_counted(kernel):
    """If leading dimensions are broadcast or can't be merged; a view costs nothing."""
    p = make_problem(4, 8)
    update = kernel.triangle_multiplicative_update
    x = torch.randn(2, 1, 3, 4, 4, 8)
    alone, merged = (kernel.explain(update, x, mask=mask, **p.weights) for mask in (
        torch.ones(2, 1, 3, 4, 4), torch.ones(1, 5, 1, 4, 4)
    ))  # fmt: skip
    assert "copy of x" not in alone.buffers
    assert merged.buffers["copy of x"] == 1.0
    assert merged.peak == pytest.approx(sum(merged.buffers.values()))
    assert merged.peak_bytes == round(merged.peak * 2 * 5 * 3 * x[0, 0, 0].nbytes)
    assert merged.notes[-1].startswith("x is copied")
    turned = kernel.explain(update, x.transpose(0, 2), **p.weights)
    assert turned.buffers["copy of x"] == 1.0


def test_precision_and_descriptors_have_their_notes(kernel, on_triton):
    problem = make_problem(5, 16).to(on_triton)
    found = explained(kernel, problem)
    assert found.precision in ("ieee", "tf32x3")
    assert "products are those of float32, as nothing allowed TF32" in found.notes
    assert explained(kernel, problem, precision="TF32").precision == (
        "ieee" if on_triton == "cpu" else "tf32"
    )
    if on_triton == "cpu":
        assert any(note.startswith("no tensor descriptors in") for note in found.notes)
    half = make_problem(5, 16, dtype=torch.float16).to(on_triton)
    assert explained(kernel, half).precision is None


def test_the_formula_of_torch_func(kernel):
    problem = make_problem(3, 8)
    seen = []

    def call(x):
        seen.append(kernel.explain(kernel.triangle_multiplicative_update, x, **problem.weights))
        return x

    torch.func.jvp(call, (problem.x,), (problem.x,))
    assert (seen[0].path, seen[0].peak) == ("formula", None)
    assert "at once" not in str(seen[0])


def test_vmap_without_a_gradient_takes_the_usual_path(kernel):
    problem = make_problem(3, 8)
    seen = []

    def call(x):
        seen.append(kernel.explain(kernel.triangle_multiplicative_update, x, **problem.weights))
        return x

    torch.vmap(call)(problem.x)
    assert seen[0].path == "aten" and seen[0].peak is None
    assert "explain one of them" in str(seen[0])


def test_an_empty_call(kernel):
    p = make_problem(3, 8)
    function = kernel.triangle_multiplicative_update
    found = kernel.explain(function, p.x[:0], **p.weights)
    assert found.peak_bytes == 0 and "empty" in found.reason


def test_prints_as_a_page(kernel, on_triton):
    problem = make_problem(16, 32, dtype=torch.bfloat16).to(on_triton)
    lines = str(explained(kernel, problem, lengths=torch.tensor([9], device=on_triton))).split("\n")
    assert lines[0].startswith("outgoing, pair tensor 1x16x16x32 bfloat16 on c")
    assert lines[1].startswith("  path     triton: ")
    assert sum(line.startswith("  stage    ") for line in lines) == 3
    assert any(line.startswith("  at once  3.12 such tensors") for line in lines)
    assert "  note     tiles beyond the lengths are skipped; the programs above are all" in lines


def test_what_the_call_refuses_explain_refuses(kernel):
    p = make_problem(3, 8)
    update = kernel.triangle_multiplicative_update
    with pytest.raises(ValueError, match="direction must be 'outgoing' or 'incoming'; got 'up'"):
        kernel.explain(update, p.x, "up", **p.weights)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        kernel.explain(update)
    for function in (torch.add, "swiglu_transition", [update]):
        with pytest.raises(TypeError) as caught:
            kernel.explain(function, p.x)
        assert str(caught.value) == (
            "function must be triangle_multiplicative_update, "
            "triangle_multiplicative_update_with_residual or swiglu_transition, or a "
                "sharded one; "
            f"got {function!r}"
        )
    with pytest.raises(ValueError, match=r"x must be \[..., C\] with C of at least 1; got \(\)"):
        transition = make_transition((3, 8), 12)
        kernel.explain(kernel.swiglu_transition, torch.ones(()), **transition.weights)


class TestTransition:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("lengths", [None, (96, 40)])
    @torch.no_grad()
    def test_the_aten_path(self, kernel, monkeypatch, submodule, dtype, inplace, lengths):
        problem = make_transition(
            (2, 96, 96, 32), 64, dtype=dtype, residual="own", lengths=lengths
        )
        found = self.explained(kernel, problem, inplace=inplace)
        assert found.path == "aten" and not found.stages and found.memory is None
        assert found.call.startswith("transition, tensor 2x96x96x32")
        assert found.buffers == ({} if inplace else {"output": 1.0})
        aten = submodule("aten_path.transition")
        for name in ("_BLOCK_POSITIONS", "LEAST_POSITIONS"):
            monkeypatch.setattr(aten, name, 96)
        given = (problem.x, problem.residual, *problem.weights.values())
        with PeakBytes(*given) as memory:
            problem.run(kernel, inplace=inplace)
        assert found.peak_bytes <= memory.peak <= found.peak_bytes + 0.2 * problem.x.nbytes
        if lengths is not None:
            assert "each sequence is cut to its length, which the host reads" in found.notes

    @staticmethod
    def explained(kernel, problem, **others):
        p = problem
        return kernel.explain(
            kernel.swiglu_transition, p.x, **p.weights, residual=p.residual, lengths=p.lengths,
            **others,
        )  # fmt: skip

    def test_what_is_kept_for_a_backward(self, kernel):
        problem = make_transition((16, 32), 64)
        assert "no gradient is needed: nothing is kept" in self.explained(kernel, problem).notes
        problem.x.requires_grad_()
        found = self.explained(kernel, problem)
        assert found.kept == 0.0
        assert "the backward computes everything again, nothing is kept" in found.notes

    def test_copies_of_x_and_the_residual_are_counted(self, kernel):
        problem = make_transition((2, 3, 2, 5, 4, 16), 24, residual="own")
        for name in ("x", "residual"):
            value = getattr(problem, name).transpose(0, 2).contiguous().transpose(0, 2)
            setattr(problem, name, value)
        problem.x.requires_grad_()
        found = self.explained(kernel, problem)
        assert found.buffers == {"output": 1.0, "copy of x": 1.0, "copy of residual": 1.0}
        assert (found.peak, found.kept) == (3.0, 1.0)
        assert found.notes[-1].startswith("residual is copied")

    def test_the_formula_and_vmap(self, kernel):
        problem, seen = make_transition((3, 8), 12), []

        def call(x):
            seen.append(kernel.explain(kernel.swiglu_transition, x, **problem.weights))
            return x

        torch.func.jvp(call, (problem.x,), (problem.x,))
        torch.vmap(call)(problem.x)
        assert [found.path for found in seen] == ["formula", "aten"]
        assert "explain one of them" in str(seen[1])

    def test_an_empty_call(self, kernel):
        found = self.explained(kernel, make_transition((0, 8), 12))
        assert found.peak_bytes == 0 and "empty" in found.reason

    def test_prints_as_a_page(self, kernel):
        lines = str(self.explained(kernel, make_transition((5, 7, 16), 24))).split("\n")
        assert lines[0] == "transition, tensor 1x5x7x16 float32 on cpu, H = 24"
        assert lines[1] == "  path     aten: CPU tensors run the ATen path"
        assert lines[2:4] == [
            "  buffer   output: 1.00 such tensors",
            "  at once  1.00 such tensors, 0.0 MiB, of which 0.00 are kept for a backward",
        ]
