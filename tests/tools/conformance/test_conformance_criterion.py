"""The faults that the conformance suite must notice, and the errors that it allows."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conformance_cases import CASE, CPU, implementation, outcome, posed, rounded, turned, unmasked
from esmfold2_trimul_tools.bench.rivals import Absent
from esmfold2_trimul_tools.conformance.cases import EVERY_CASE
from esmfold2_trimul_tools.conformance.criterion import BUDGETS, Answer, Errors, errors, fault
from esmfold2_trimul_tools.conformance.run import check
from helpers import ERROR_BUDGET

pytestmark = pytest.mark.usefixtures("one_thread")


def test_budgets_are_the_tests_own():
    assert {getattr(torch, name): value for name, value in BUDGETS.items()} == ERROR_BUDGET


def failures(run, words: str = "") -> dict[str, str]:
    """The reason by case for which an implementation fails, of the cases that have the words."""
    cases = [case for case in EVERY_CASE if words in case.name and case.length < 100]
    rows = [check(implementation(run), posed(case), None, CPU) for case in cases]
    return {row["case"]: row["note"] for row in rows if row["status"] != "passed"}


def with_weights(problem, **weights):
    return dataclasses.replace(problem, weights=problem.weights | weights)


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


def gates_for_ups(problem):
    gates, ups = problem.weights["gate_weight"], problem.weights["up_weight"]
    return rounded(with_weights(problem, gate_weight=ups, up_weight=gates))


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
        (gates_for_ups, "transition: the update", "relative error"),
        (residual_alone, "transition: another residual", "relative error"),
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
