"""The conformance suite's table, held against our implementations and called on others.

The whole table runs on the ATen path, and on a GPU on the Triton path. In Triton's interpreter some
of its cases run at small sizes.
"""

import dataclasses
import functools
import sys

import pytest
import torch
from conformance_cases import BY_NAME, CASE, CPU, outcome, posed
from conftest import HAS_GPU
from esmfold2_trimul_tools.bench import rivals as bench_rivals
from esmfold2_trimul_tools.bench.rivals import Sources
from esmfold2_trimul_tools.conformance.cases import CASES, EVERY_CASE, Case
from esmfold2_trimul_tools.conformance.run import check
from transitions import PATHS

# Each kind of argument once: about a second a case.
INTERPRETED = (
    "direction: outgoing, bfloat16",
    "direction: outgoing, float16",
    "direction: incoming, float32",
    "L = 1, one sequence, float32",
    "biases: all, C = 64, D = 32, bfloat16",
    "mask: none, float32",
    "mask: soft, bfloat16",
    "mask: all-masked rows, incoming, float16",
    "mask: expanded, strides of 0, bfloat16",
    "leading: none, bfloat16",
    "leading: x 2 x 1 x 4, mask 3 x 1, float32",
    "precision: bfloat16, float32",
    "precision: fp16x3, float32",
    "heavy tails: Cauchy, bfloat16",
    "constant rows: up to 3e38, bfloat16",
    "constant rows: up to 3e38, float32",
    "means: 1000 deviations, float32",
    "norms: digits beyond bfloat16, bfloat16",
    "norms: absent, bfloat16",
    "residual and drop mask [B*L, C], bfloat16",
    "residual: overwritten, bfloat16",
    "strides: sliced channels, bfloat16",
    "memory: lean, residual, bfloat16",
    "lengths: 0, 1, some, L, float32",
    "lengths: with residual and drop mask, bfloat16",
)


def small(case: Case) -> Case:
    """The case at widths and lengths for the interpreter.

    Of a shorter one a single row of few channels, whose norm magnifies what t was rounded by, can
    be most of the error: one draw in fifteen at L = 5 is then above plain PyTorch's.
    """
    length = min(case.length, 9)
    lengths = case.lengths and tuple(min(real, length) for real in case.lengths)
    return dataclasses.replace(
        case, channels=16, hidden=8 if case.hidden < case.channels else 16, length=length,
        lengths=lengths,
    )  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")
# Those of the paths that transitions have.
ON_GPU = EVERY_CASE if "triton" in PATHS else CASES
ON_TRITON = ON_GPU if HAS_GPU else [small(CASE[name]) for name in INTERPRETED]
named = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)


@pytest.fixture
def sources(kernel) -> Sources:
    return Sources(kernel)


@named(EVERY_CASE)
def test_aten_path_conforms(sources, case):
    ours = BY_NAME["ours, ATen path"]
    assert ours.missing(CPU, sources) is None
    assert outcome(check(ours, posed(case), sources, CPU)) == ("passed", None)


@named(ON_TRITON)
def test_triton_path_conforms(sources, on_triton, case):
    ours = BY_NAME["ours, Triton path"]
    device = torch.device(on_triton)
    assert ours.missing(device, sources) is None
    assert outcome(check(ours, posed(case), sources, device)) == ("passed", None)


def test_hub_layer_conforms(sources):
    layer = BY_NAME["ours, Hub layer"]
    rows = [check(layer, posed(case), sources, CPU) for case in CASES if case.length < 33]
    rows += [check(layer, posed(case), sources, CPU) for case in CASES if "mask" in case.name]
    assert [row for row in rows if row["status"] == "failed"] == []
    assert sum(row["status"] == "passed" for row in rows) > 20


def test_in_tree_module_is_measured(sources):
    """Whether it conforms is its own business; that it is held to the same is ours."""
    in_tree = BY_NAME["in-tree"]
    for case in EVERY_CASE:
        row = check(in_tree, posed(case), sources, CPU)
        lacks = not case.features.isdisjoint(in_tree.lacks)
        assert (row["status"] == "not supported") == lacks
        if lacks:
            assert row["note"] and row["error"] is None
        elif row["error"] is not None and "constant rows" not in case.name:
            # Plain PyTorch is this very module, for the cases that it supports.
            assert row["error"] == pytest.approx(row["plain_error"], rel=0.02), case.name


def test_rivals_are_called_with_what_their_case_has(sources, monkeypatch):
    """cuEquivariance by its own signature, which is that of our function."""
    package = type(sys)("cuequivariance_torch")
    package.triangle_multiplicative_update = sources.kernel.triangle_multiplicative_update
    monkeypatch.setitem(sys.modules, "cuequivariance_torch", package)
    monkeypatch.setitem(sys.modules, "cuequivariance_ops_torch", type(sys)("ops"))
    cuequivariance = BY_NAME["cuequivariance, fp32 norms"]
    assert cuequivariance.missing(CPU, sources) == "needs a GPU"
    assert cuequivariance.missing(torch.device("cuda"), sources) is None
    for name, status in (
        ("biases: all, C = 64, D = 32, bfloat16", "passed"),
        ("eps: 0.1, float32", "passed"),
        ("leading: 2 x 3, float32", "passed"),
        ("C = 77, D = 41, float32", "not supported"),
        ("residual: alone, bfloat16", "not supported"),
    ):
        assert check(cuequivariance, posed(CASE[name]), sources, CPU)["status"] == status, name


def test_published_gets_residual_and_drop_mask(sources, monkeypatch):
    given = []

    def update(pair, direction, residual, drop_mask, **others):
        given.append((residual, drop_mask, others["eps"]))
        return sources.kernel.triangle_multiplicative_update_with_residual(
            pair, direction, residual, drop_mask, **others
        )

    module = type(sys)("published")
    module.triangle_multiplicative_update_with_residual = update
    monkeypatch.setattr(bench_rivals, "find_published", lambda folder: module)
    published = BY_NAME["published"]
    assert published.missing(torch.device("cuda"), sources) is None
    for name, status in (
        ("residual and drop mask [B*L, C], bfloat16", "passed"),
        ("eps: 0.1, bfloat16", "passed"),
        ("norms: digits beyond bfloat16, bfloat16", "failed"),
        ("C = D = 48, channels first, bfloat16", "not supported"),
    ):
        assert check(published, posed(CASE[name]), sources, CPU)["status"] == status, name
    assert given[0][0] is not None and given[0][1].shape == (66, 64)
    assert not given[1][0].any() and given[1][1:] == (None, 0.1)
