"""The rivals of the benchmark: what they are called with, and where they are absent."""

import os
import sys
import types
import warnings
import weakref

import pytest
import torch
from bench_fakes import CASE, CPU, answer, with_variants
from esmfold2_trimul_tools.bench import rivals as bench_rivals
from esmfold2_trimul_tools.bench.case import PASSES, TRANSITION, Case
from esmfold2_trimul_tools.bench.problem import (
    make_problem,
    reference,
    reference_gradient,
    relative_error,
)
from esmfold2_trimul_tools.bench.rivals import (
    RIVALS,
    TRANSITION_RIVALS,
    Absent,
    Call,
    Sources,
)
from fresh_process import ROOT, python_output


@pytest.fixture
def sources(kernel) -> Sources:
    return Sources(kernel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_our_own_rivals_are_right(sources, dtype):
    case = Case(16, 9, dtype, "incoming", "float")
    problem = make_problem(case, CPU)
    wanted = reference(problem)
    makes = {
        rival.name: rival.make
        for rival in RIVALS
        if rival.on_cpu and not rival.slow and case.passes in rival.passes
    }
    assert makes.keys() == {"ours", "in-tree, chunk 64", "in-tree, unchunked"}
    with torch.no_grad():
        errors = {
            name: relative_error(make(problem, sources)(), wanted) for name, make in makes.items()
        }
        module = bench_rivals.in_tree(problem, sources, chunk_size=64).function
    assert max(errors.values()) < (1e-2 if dtype == "bfloat16" else 1e-6)
    assert module.chunk_size == 64 and module.norm_mix.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("passes", PASSES)
def test_our_own_transitions_are_right(sources, dtype, passes):
    case = Case(16, 9, dtype, TRANSITION, "none", passes=passes)
    problem = make_problem(case, CPU)
    wanted = reference(problem) if passes == "forward" else reference_gradient(problem)
    makes = {r.name: r.make for r in TRANSITION_RIVALS if r.on_cpu and not r.slow}
    assert makes.keys() == {"ours", "in-tree, chunk 64", "in-tree, unchunked"}
    for name, make in makes.items():
        call = make(problem, sources)
        if passes == "training":
            call = bench_rivals.trained(call, problem.grad_out)
        error = relative_error(call(), wanted)
        assert error < (1e-2 if dtype == "bfloat16" else 1e-6), name
    module = bench_rivals.in_tree_transition(problem, sources, chunk_size=64).function
    assert module.chunk_size == 64 and module.norm.weight.dtype == torch.float32


def test_cuequivariance_gets_its_arguments_in_its_own_order(kernel, sources, monkeypatch):
    # Our function of that name has cuequivariance_torch's signature.
    taken = []

    def theirs(*args):
        taken.append(args)
        return kernel.triangle_multiplicative_update(*args)

    module = types.ModuleType("cuequivariance_torch")
    module.triangle_multiplicative_update = theirs
    monkeypatch.setitem(sys.modules, "cuequivariance_torch", module)
    case = Case(16, 9, "bfloat16", "incoming", "bool")
    problem = make_problem(case, CPU)
    for norm_dtype in ("bfloat16", "float32"):
        call = bench_rivals.cuequivariance(problem, sources, norm_dtype)
        assert relative_error(call(), reference(problem)) < 1e-2
        _, _, mask, *norms = taken[-1][:5]
        assert mask.dtype == torch.bfloat16
        assert {norm.dtype for norm in norms} == {getattr(torch, norm_dtype)}
    problem = make_problem(CASE, CPU)
    with pytest.raises(Absent, match="for a bfloat16 pair"):
        bench_rivals.cuequivariance(problem, sources, "bfloat16")


def test_without_its_package_cuequivariance_is_absent(sources, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuequivariance_torch", None)
    with pytest.raises(Absent, match="cuequivariance_torch"):
        bench_rivals.cuequivariance(make_problem(CASE, CPU), sources, "float32")


PUBLISHED = """
import os, warnings
import torch
os.environ["CUEQ_DEFAULT_CONFIG"] = "1"
os.environ["EXISTING"] = "changed"
warnings.filterwarnings("ignore", category=DeprecationWarning)
calls = []

def triangle_multiplicative_update_with_residual(pair, direction, residual, drop_mask, **rest):
    calls.append((residual, drop_mask, rest))
    return residual
"""


@pytest.fixture
def published(tmp_path, monkeypatch):
    folder = tmp_path / "published" / "esmfold2_trimul"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "trimul_with_residual.py").write_text(PUBLISHED)
    yield folder.parent
    bench_rivals.find_published.cache_clear()
    for name in ("esmfold2_trimul", "esmfold2_trimul.trimul_with_residual"):
        sys.modules.pop(name, None)


def test_published_is_called_as_its_layer_does_and_changes_no_settings(
    kernel, published, monkeypatch
):
    monkeypatch.setenv("EXISTING", "kept")
    monkeypatch.delenv("CUEQ_DEFAULT_CONFIG", raising=False)
    filters = list(warnings.filters)
    sources = Sources(kernel, published)
    problem = make_problem(Case(16, 9, "bfloat16"), CPU)
    call = bench_rivals.published(problem, sources)
    assert torch.equal(call(), torch.zeros_like(problem.x))
    residual, drop_mask, rest = bench_rivals.find_published(published).calls[0]
    assert not residual.any() and drop_mask is None
    assert rest.pop("mask") is problem.mask and rest.pop("eps") == 1e-5
    assert {value.dtype for value in rest.values()} == {torch.bfloat16}
    assert rest.keys() == problem.weights.keys()
    assert os.environ["EXISTING"] == "kept" and "CUEQ_DEFAULT_CONFIG" not in os.environ
    assert warnings.filters == filters
    assert sources.versions(True)["published"].startswith("sha256 ")
    with pytest.raises(Absent, match="bfloat16 alone"):
        bench_rivals.published(make_problem(CASE, CPU), sources)


def test_published_that_cant_be_had_is_absent(kernel, tmp_path):
    sources = Sources(kernel, tmp_path)
    with pytest.raises(Absent, match="No module named 'esmfold2_trimul'"):
        bench_rivals.published(make_problem(Case(16, 9, "bfloat16"), CPU), sources)
    assert sources.versions(True)["published"] is None


def test_esm_is_called_as_its_block_does_or_absent(kernel, monkeypatch):
    calls = []

    def theirs(pair, direction, residual, drop_mask, **rest):
        calls.append((direction, drop_mask, rest))
        return residual

    layers = types.SimpleNamespace(
        TRITON_KERNELS_AVAILABLE=True, _fused_trimul_with_residual=theirs
    )
    half, found = make_problem(Case(16, 9, "bfloat16", "incoming"), CPU), layers
    monkeypatch.setattr(bench_rivals, "find_esm", lambda folder: found)
    call = bench_rivals.esm(half, Sources(kernel))
    assert torch.equal(call(), torch.zeros_like(half.x))
    direction, drop_mask, rest = calls[0]
    assert direction == "incoming" and drop_mask is None
    assert rest.pop("mask") is half.mask and rest.pop("eps") == 1e-5
    assert rest.keys() == half.weights.keys()
    assert {value.dtype for value in rest.values()} == {torch.bfloat16}
    with pytest.raises(Absent, match="bfloat16 alone"):
        bench_rivals.esm(make_problem(CASE, CPU), Sources(kernel))
    layers.TRITON_KERNELS_AVAILABLE = False
    with pytest.raises(Absent, match="can't be imported here"):
        bench_rivals.esm(half, Sources(kernel))
    found = "no esm"
    with pytest.raises(Absent, match="no esm"):
        bench_rivals.esm(half, Sources(kernel))


def test_our_own_kernel_is_never_taken_for_the_published_one():
    # What README.md asks for in transformers puts ours where the published one is looked for.
    script = """
        import sys
        from pathlib import Path
        from esmfold2_trimul_tools.bench.rivals import Sources, find_published
        from esmfold2_trimul_tools.repository import load_kernel

        root = Path(sys.argv[1])
        kernel = load_kernel(root)
        assert find_published(None).triangle_multiplicative_update_with_residual
        print(Sources(kernel).published_module(), Sources(kernel).versions(True)["published"])
    """
    printed = python_output(
        script, str(ROOT), LOCAL_KERNELS=f"biohub/esmfold2-trimul={ROOT}",
        PYTHONPATH=str(ROOT / "tools" / "src"),
    )  # fmt: skip
    assert printed == "LOCAL_KERNELS puts our own kernel in its place None\n"


def test_compiled_is_the_same_function(sources):
    problem = make_problem(CASE, CPU)
    make = bench_rivals.compiled(bench_rivals.ours, backend="eager", fullgraph=True)
    with torch.no_grad():
        call = make(problem, sources)
        assert relative_error(call(), reference(problem)) < 1e-6
    assert call.function is not bench_rivals.ours(problem, sources).function


@pytest.mark.parametrize("case", [CASE, Case(16, 9, "float32", TRANSITION, "none")], ids=str)
def test_the_variants_of_a_call_are_known_however_it_is_called(sources, monkeypatch, case):
    problem = make_problem(case, CPU)
    make, other = bench_rivals.ours, bench_rivals.in_tree
    if case.is_transition:
        make, other = bench_rivals.our_transition, bench_rivals.in_tree_transition
    assert make(problem, sources).variants() == {}  # by the real `explain`
    assert other(problem, sources).variants() is None
    with_variants(monkeypatch, sources.kernel)
    wanted = {"fused_dual_gemm": "hopper"}
    compiled = bench_rivals.compiled(make, backend="eager")(problem, sources)
    assert compiled.variants() == make(problem, sources).variants() == wanted
    assert bench_rivals.trained(compiled, problem.x).variants() == wanted


@pytest.mark.parametrize("case", [CASE, Case(16, 9, "float32", TRANSITION, "none")], ids=str)
def test_plain_is_without_variants_and_absent_where_there_are_none(sources, monkeypatch, case):
    problem = make_problem(case, CPU)
    with pytest.raises(Absent, match="no variant of a stage runs here"):
        with bench_rivals.plain(problem, sources):
            pass
    hopper = with_variants(monkeypatch, sources.kernel)
    with pytest.raises(ZeroDivisionError), bench_rivals.plain(problem, sources):
        assert hopper.plain_only()
        raise ZeroDivisionError
    assert not hopper.plain_only()


def test_the_plain_rivals_are_those_of_their_name():
    for rivals in (RIVALS, TRANSITION_RIVALS):
        assert [rival.name for rival in rivals if rival.plain] == [
            "ours, plain", "ours, plain, CUDA graph"
        ]  # fmt: skip
        by_name = {rival.name: rival for rival in rivals}
        plain, graph = by_name["ours, plain"], by_name["ours, plain, CUDA graph"]
        assert plain.make is by_name["ours"].make
        assert (graph.in_capture, graph.passes, graph.option) == (True, ("forward",), "graphs")


def test_captured_warms_up_beside_the_stream_and_then_replays(sources, monkeypatch):
    log = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def __enter__(self):
            log.append(f"on {self.name}")

        def __exit__(self, *_):
            log.append(f"off {self.name}")

    class Graph:
        name = "graph"

        def replay(self):
            log.append("replay")

    for name, value in {
        "Stream": Stream,
        "current_stream": lambda: Stream("current"),
        "stream": lambda stream: stream,
        "CUDAGraph": Graph,
        "graph": lambda graph: Stream(graph.name),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    problem = make_problem(CASE, CPU)

    parameters = []

    def make(problem, sources):
        parameter = torch.ones(1)
        parameters.append(weakref.ref(parameter))
        ours = bench_rivals.ours(problem, sources).explained
        return Call(lambda one: log.append("call") or answer(problem) * one, (parameter,), {}, ours)

    call = bench_rivals.captured(make)(problem, sources)
    assert log == [
        "side waits for current", "on side", "call", "call", "call", "off side",
        "current waits for side", "on current", "on graph", "call", "off graph", "off current",
    ]  # fmt: skip
    del log[:]
    assert relative_error(call(), reference(problem)) < 1e-6
    assert log == ["replay"]
    assert call.variants() == {}
    # A graph reads where its parameters lay, whether they are still there or not.
    assert parameters[0]() is not None
