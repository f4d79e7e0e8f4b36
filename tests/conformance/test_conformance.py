"""The conformance suite's table, held against our implementations, and what the suite must notice.

The whole table runs on the ATen path, and on a GPU on the Triton path. In Triton's interpreter some
of its cases run at small sizes.
"""

import dataclasses
import functools
import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import HAS_GPU, ROOT
from esmfold2_trimul_tools import cli
from esmfold2_trimul_tools.bench import rivals as bench_rivals
from esmfold2_trimul_tools.bench.rivals import Absent, Sources
from esmfold2_trimul_tools.conformance import implementations
from esmfold2_trimul_tools.conformance import run as conformance
from esmfold2_trimul_tools.conformance.cases import BIASES, CASES, DTYPES, Case
from esmfold2_trimul_tools.conformance.criterion import (
    BUDGETS,
    Answer,
    Errors,
    errors,
    fault,
    reference,
)
from esmfold2_trimul_tools.conformance.implementations import IMPLEMENTATIONS, Implementation
from esmfold2_trimul_tools.conformance.problem import INPUTS, LAYOUTS, MASKS, make_problem
from esmfold2_trimul_tools.conformance.report import markdown, read_results
from esmfold2_trimul_tools.conformance.run import check, pose
from esmfold2_trimul_tools.conformance.settings import read_settings
from esmfold2_trimul_tools.errors import UserError
from helpers import ERROR_BUDGET, SEED, Problem, relative_error
from helpers import reference as oracle
from typer.testing import CliRunner

CPU = torch.device("cpu")
BY_NAME = {one.name: one for one in IMPLEMENTATIONS}
CASE = {case.name: case for case in CASES}
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
    "leading: none, mask [1, L], bfloat16",
    "leading: x 2 x 1 x 4, mask 3 x 1, float32",
    "precision: bfloat16, float32",
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
ON_TRITON = CASES if HAS_GPU else [small(CASE[name]) for name in INTERPRETED]
named = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)
posed = functools.cache(functools.partial(pose, seed=SEED))


@pytest.fixture
def sources(kernel) -> Sources:
    return Sources(kernel)


def outcome(row) -> tuple[str, str | None]:
    return row["status"], row["note"]


@named(CASES)
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
    for case in CASES:
        row = check(in_tree, posed(case), sources, CPU)
        lacks = not case.features.isdisjoint(in_tree.lacks)
        assert (row["status"] == "not supported") == lacks
        if lacks:
            assert row["note"] and row["error"] is None
        elif row["error"] is not None and "constant rows" not in case.name:
            # Plain PyTorch is this very module, for the cases that it supports.
            assert row["error"] == pytest.approx(row["plain_error"], rel=0.02), case.name


def test_the_table_has_every_word_and_says_nothing_twice():
    assert len(CASE) == len(CASES)
    assert len({dataclasses.replace(case, name="") for case in CASES}) == len(CASES)
    for field, known in (
        ("dtype", DTYPES),
        ("direction", ("outgoing", "incoming")),
        ("mask", ["none", *MASKS]),
        ("x", INPUTS),
        ("layout", LAYOUTS),
        ("weights", ("trunk", "wide gates", "fine norms")),
        ("norms", ("float32", "bfloat16", "absent")),
        ("residual", ("none", "own", "pair", "overwritten")),
        ("drop_mask", ("none", "bool", "[B, 1, L, C]", "[B*L, C]")),
        ("precision", (None, "IEEE", "TF32", "TF32x3", "bfloat16")),
        ("lengths_dtype", ("int64", "int32")),
        ("memory", ("auto", "lean")),
        ("biases", [(), *[(name,) for name in BIASES], BIASES]),
        ("length", (1, 2, 8, 9, 31, 33, 65, 66, 127)),
        ("hidden", (16, 32, 41, 48, 64, 128, 250)),
    ):
        assert {getattr(case, field) for case in CASES} == set(known), field


def test_what_an_implementation_may_lack_is_asked_for():
    asked_for = frozenset().union(*(case.features for case in CASES))
    for one in IMPLEMENTATIONS:
        assert set(one.lacks) <= asked_for, one.name
        # Ours have what their functions have: what they lack is what the module has no place for.
        assert not one.ours or not one.lacks or one.name == "ours, Hub layer"


def test_problems_are_the_same_everywhere():
    case = CASE["residual and drop mask [B*L, C], bfloat16"]
    one, same, other = make_problem(case), make_problem(case), make_problem(case, seed=1)
    assert torch.equal(one.x, same.x) and torch.equal(one.drop_mask, same.drop_mask)
    assert not torch.equal(one.x, other.x)
    assert not torch.equal(one.x, make_problem(dataclasses.replace(case, name="other")).x)


def test_layouts_change_strides_and_nothing_else():
    for name, contiguous in (
        ("strides: channels first, bfloat16", False),
        ("strides: residues swapped, bfloat16", False),
        ("strides: sliced channels, bfloat16", False),
        ("strides: every second sequence, bfloat16", False),
        ("direction: outgoing, bfloat16", True),
    ):
        problem = make_problem(CASE[name])
        laid_out = problem.laid_out_on(CPU)
        assert torch.equal(laid_out.x, problem.x)
        assert laid_out.x.is_contiguous() == contiguous, name
    expanded = make_problem(CASE["mask: expanded, strides of 0, bfloat16"]).laid_out_on(CPU).mask
    assert expanded.shape == (2, 33, 33) and expanded.stride(1) == 0
    pair = make_problem(CASE["residual: the pair itself, bfloat16"]).laid_out_on(CPU)
    assert pair.residual is pair.x


def test_reference_is_the_tests_own():
    for name in (
        "direction: incoming, float32",
        "biases: all, C = 64, D = 32, bfloat16",
        "mask: soft, bfloat16",
        "residual and drop mask [B*L, C], bfloat16",
        "norms: absent, bfloat16",
        "eps: 0.1, float32",
    ):
        p = make_problem(CASE[name])
        theirs = Problem(
            p.x, p.weights, p.case.direction, p.mask, p.residual, p.drop_mask, p.case.eps, p.biases
        )
        assert relative_error(reference(p), oracle(theirs)) < 1e-12, name


def test_lengths_are_a_mask_and_zeros():
    case = CASE["lengths: with a soft mask, bfloat16"]
    problem = make_problem(case)
    real = torch.arange(33) < torch.tensor(case.lengths)[:, None]
    pairs = real[:, :, None] & real[:, None, :]
    masked = dataclasses.replace(problem, mask=problem.mask * pairs, lengths=None)
    wanted = reference(masked) * pairs.unsqueeze(-1)
    assert torch.equal(reference(problem), wanted)
    assert not wanted[1, 5:].any() and wanted[0].any()


def test_budgets_are_the_tests_own():
    assert {getattr(torch, name): value for name, value in BUDGETS.items()} == ERROR_BUDGET


def implementation(run, **others) -> Implementation:
    return Implementation(
        "planted", lambda problem, sources: run(problem), lambda device, sources: None, **others
    )


def rounded(problem):
    return reference(problem).to(problem.x.dtype)


def failures(run, words: str = "") -> dict[str, str]:
    """The reason by case for which an implementation fails, of the cases that have the words."""
    cases = [case for case in CASES if words in case.name and case.length < 100]
    rows = [check(implementation(run), posed(case), None, CPU) for case in cases]
    return {row["case"]: row["note"] for row in rows if row["status"] != "passed"}


def with_weights(problem, **weights):
    return dataclasses.replace(problem, weights=problem.weights | weights)


def turned(problem):
    other = {"outgoing": "incoming", "incoming": "outgoing"}[problem.case.direction]
    case = dataclasses.replace(problem.case, direction=other)
    return rounded(dataclasses.replace(problem, case=case))


def unmasked(problem):
    return rounded(dataclasses.replace(problem, mask=None))


def masked_output(problem):
    out = rounded(problem)
    return out if problem.mask is None else out * (problem.mask != 0).unsqueeze(-1)


def swapped_halves(problem):
    swapped = {
        name: torch.cat(problem.weights[name].chunk(2)[::-1])
        for name in ("p_in_weight", "g_in_weight")
    }
    return rounded(with_weights(problem, **swapped))


def gate_for_value(problem):
    values, gates = problem.weights["p_in_weight"], problem.weights["g_in_weight"]
    return rounded(with_weights(problem, p_in_weight=gates, g_in_weight=values))


def rounded_norms(problem):
    """In the arithmetic of our own kernels otherwise, which leaves an error room to hide in."""
    norms = {
        name: None if value is None else value.bfloat16().float()
        for name, value in problem.weights.items()
        if name.startswith("norm_")
    }
    return rounded(with_weights(problem, **norms))


def without_biases(problem):
    return rounded(dataclasses.replace(problem, biases={}))


def default_eps(problem):
    case = dataclasses.replace(problem.case, eps=1e-5)
    return rounded(dataclasses.replace(problem, case=case))


def residual_alone(problem):
    out = rounded(problem)
    return out if problem.residual is None else out - problem.residual


def padded_pairs_computed(problem):
    """Lengths that mask, and leave the update of the pairs beyond them."""
    if problem.lengths is None:
        return rounded(problem)
    real = torch.arange(problem.case.length) < problem.lengths.unsqueeze(-1)
    pairs = real.unsqueeze(-1) & real.unsqueeze(-2)
    mask = pairs.double() if problem.mask is None else pairs * problem.mask
    return rounded(dataclasses.replace(problem, mask=mask, lengths=None))


def by_hand(problem, norm=F.layer_norm, stored=lambda value: value):
    """The formula in float32, with another norm, or with other values stored."""
    w, case = {name: value.float() for name, value in problem.weights.items()}, problem.case
    norm_in = (case.channels,), w["norm_in_weight"], w["norm_in_bias"], case.eps
    z = stored(norm(problem.x.float(), *norm_in))
    ab = F.linear(z, w["p_in_weight"]) * F.linear(z, w["g_in_weight"]).sigmoid()
    a, b = stored(ab * problem.mask.unsqueeze(-1)).chunk(2, dim=-1)
    equation = "bikd,bjkd->bijd" if case.direction == "outgoing" else "bkid,bkjd->bijd"
    t = stored(torch.einsum(equation, a, b))
    t = stored(norm(t, (case.hidden,), w["norm_out_weight"], w["norm_out_bias"], case.eps))
    delta = F.linear(t, w["p_out_weight"]) * F.linear(z, w["g_out_weight"]).sigmoid()
    return stored(delta).to(problem.x.dtype)


def truncated(problem):
    """Stored values and operands cut off to bfloat16, as by Triton's interpreter."""
    return by_hand(problem, stored=lambda v: (v.view(torch.int32) & -65536).view(torch.float32))


def norm_in_one_pass(problem):
    """The mean of a row of one number is off in its last place; 1 / sqrt(eps) makes that 300."""

    def norm(value, shape, weight, bias, eps):
        mean = value.sum(-1, keepdim=True) * torch.tensor(1 / value.shape[-1])
        variance = (value.square().mean(-1, keepdim=True) - mean.square()).clamp_min(0)
        return (value - mean) * (variance + eps).rsqrt() * weight + bias

    return by_hand(problem, norm)


def constant_rows_off_a_bit(problem):
    """Within the limits, and not exact."""
    out, first = rounded(problem), problem.x[..., :1]
    constant = (problem.x == first).all(-1, keepdim=True) & (first != 0)
    return torch.where(constant, out.nextafter(torch.zeros_like(out)), out)


def one_element_off(problem):
    out = rounded(problem)
    out.view(-1)[-1] += 1
    return out


@pytest.mark.parametrize(
    ("run", "words", "reason"),
    [
        (turned, "direction", "relative error"),
        (unmasked, "mask: random", "relative error"),
        (unmasked, "mask: all zero", "relative error"),
        (masked_output, "mask: random", "relative error"),
        (swapped_halves, "direction", "relative error"),
        (gate_for_value, "direction", "relative error"),
        (rounded_norms, "norms: digits", "relative error"),
        (rounded_norms, "direction: outgoing, float32", "relative error"),
        (without_biases, "biases", "relative error"),
        (default_eps, "eps", "relative error"),
        (residual_alone, "residual: alone", "relative error"),
        (padded_pairs_computed, "lengths", "are not 0 where float64's are"),
        (truncated, "direction: outgoing, bfloat16", "relative error"),
        (one_element_off, "L = 65, bfloat16", "largest error"),
        (norm_in_one_pass, "constant rows: up to 3e4, bfloat16", "relative error"),
        (norm_in_one_pass, "constant rows: up to 3e4, float32", "relative error"),
        (constant_rows_off_a_bit, "constant rows: up to 3e38", "where constant rows are made"),
        (lambda p: rounded(p).double(), "scale: 30", "gave torch.float64"),
        (lambda p: rounded(p)[..., 1:], "scale: 30", "gave torch."),
        (lambda p: rounded(p).log(), "scale: 30", "not finite where float64's are"),
        (lambda p: rounded(p) + p.x.zero_(), "scale: 30", "changed its input x"),
        (lambda p: 1 / 0, "scale: 30", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_planted_errors_fail(run, words, reason):
    found = failures(run, words)
    applies = [name for name in CASE if words in name]
    if run is padded_pairs_computed:  # a residual, or no padding, hides the zeros
        applies = [name for name in applies if "residual" not in name]
    assert set(applies) <= set(found), found
    assert all(reason in found[name] for name in applies), found


def test_what_computes_well_conforms():
    assert failures(rounded) == {}
    assert failures(by_hand, "direction") == {}


def test_errors_count_what_the_dtype_can_hold():
    wanted = torch.tensor([3.0, 4.0, 1e6], dtype=torch.float64)
    got = torch.tensor([3.0, 4.5, torch.inf], dtype=torch.float16)
    found = errors(got, wanted, torch.float16)
    assert found.relative == pytest.approx(0.5 / 5)
    assert found.largest == pytest.approx(0.5 / (5 / 2**0.5))
    held_to = Answer(wanted, Errors(0.0, 0.0), Errors(0.2, 0.2))
    assert "largest error 1.41e-01" not in (fault(got, held_to, torch.float16) or "")
    got[1] = torch.nan
    assert fault(got, held_to, torch.float16).startswith("1 of 3 numbers are not finite")


def test_errors_of_an_output_that_is_to_be_zero():
    zeros = torch.zeros(4, dtype=torch.float64)
    assert errors(zeros.float(), zeros, torch.float32) == (0, 0)
    assert errors(zeros.float() + 1e-9, zeros, torch.float32) == (torch.inf, torch.inf)


def test_what_is_lacking_is_neither_passed_nor_failed():
    def run(problem):
        raise Absent("not for such a problem")

    case = CASE["biases: p_in_bias alone, bfloat16"]
    lacking = implementation(rounded, lacks={"linear biases": "has no biases"})
    assert outcome(check(lacking, posed(case), None, CPU)) == ("not supported", "has no biases")
    row = check(implementation(run), posed(case), None, CPU)
    assert outcome(row) == ("not supported", "not for such a problem")


@pytest.fixture
def only(monkeypatch):
    """only(IMPLEMENTATION, ...): those are all that there are."""

    def replace(*some):
        monkeypatch.setattr(implementations, "IMPLEMENTATIONS", some)

    return replace


def test_what_breaks_the_device_breaks_no_other(only, sources, monkeypatch):
    only(BY_NAME["ours, ATen path"], implementation(rounded),
         dataclasses.replace(implementation(rounded), name="after it"))  # fmt: skip
    settings = read_settings(device="cpu", cases=["direction: outgoing"])
    settings = dataclasses.replace(settings, device=torch.device("meta"))
    monkeypatch.setattr(Implementation, "device", lambda one, device: CPU if one.ours else device)
    monkeypatch.setattr(conformance, "check", lambda one, posed, sources, device: {
        "implementation": one.name, "status": "passed", "note": None
    })  # fmt: skip
    monkeypatch.setattr(conformance, "_loss", lambda device: "illegal memory access")
    results = {"absent": {}, "rows": []}
    conformance.run(settings, results)
    note = "planted broke the device at direction: outgoing, bfloat16: illegal memory access"
    assert [outcome(row) for row in results["rows"]] == [("passed", None)] * 3 + [("failed", note)]
    assert results["absent"] == {"after it": note}


def run_command(*arguments):
    return CliRunner().invoke(cli.app, ["conformance", *map(str, arguments)])


def test_command_reports_and_writes(only, tmp_path):
    lacking = implementation(turned, lacks={"float16": "has no float16"})
    only(BY_NAME["ours, ATen path"], lacking, BY_NAME["published"])
    out = tmp_path / "new" / "results.json"
    result = run_command(
        "--device", "cpu", "--case", "direction: outgoing", "--case", "L = 2", "--out", out
    )
    # Others' failures are no failure of ours.
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    for text in (
        "torch ", "6 cases.", "ours, ATen path", "planted failed L = 2, float32: relative",
        "planted, not supported, of how many cases: has no float16 (2)",
        "published is absent: needs a GPU",
    ):  # fmt: skip
        assert text in result.stdout, text
    results = read_results(out)
    assert [row["status"] for row in results["rows"]] == ["passed"] * 6 + [
        "failed", "not supported", "failed", "failed", "not supported", "failed"
    ]  # fmt: skip
    assert results["environment"]["commands"][0].startswith("esmfold2-trimul")
    assert {"device", "torch", "commit", "date"} <= results["environment"].keys()

    shown = run_command("--results", out, "--json")
    assert json.loads(shown.stdout) == results
    report = run_command("--results", out, "--markdown").stdout
    assert report == markdown(results) + "\n"
    assert "| planted | 0 | 4 | 2 |" in report and "| ours, ATen path | 6 | 0 | 0 |" in report


def test_command_fails_where_ours_does(only):
    only(dataclasses.replace(implementation(unmasked), ours=True))
    passing = run_command("--device", "cpu", "--case", "mask: none")
    failing = run_command("--device", "cpu", "--case", "mask: soft, float32")
    assert (passing.exit_code, failing.exit_code) == (0, 1)
    assert "planted failed mask: soft, float32: relative error" in failing.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementation", "theirs"], "--implementation must be one of ours, ATen path; "),
        (["--case", "nothing"], "--case must be a part of a case's name; got 'nothing', in none"),
        (["--published", "nowhere"], "--published nowhere: holds no package esmfold2_trimul"),
        (["--seed", "-1"], "--seed must be at least 0; got -1"),
        (["--results", "nowhere.json"], "nowhere.json: can't be read"),
    ],
)
def test_command_names_what_it_cant_use(arguments, message):
    result = run_command(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_other_files_are_no_results(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    with pytest.raises(UserError, match="other.json: holds no results of the conformance suite"):
        read_results(path)


def test_the_reports_in_the_docs_are_those_of_the_results():
    """What differs is mended with --results FILE --markdown. In none has ours failed."""
    page = (ROOT / "docs" / "conformance.md").read_text()
    files = list((ROOT / "benchmarks" / "results").glob("conformance_*.json"))
    assert files
    for path in files:
        results = read_results(path)
        assert markdown(results) in page, path.name
        ours = [row for row in results["rows"] if row["implementation"].startswith("ours")]
        assert ours and all(row["status"] != "failed" for row in ours), path.name


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
