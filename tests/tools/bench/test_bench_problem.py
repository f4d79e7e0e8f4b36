"""The benchmark's inputs, references and floors."""

import pytest
import torch
from bench_fakes import CPU
from esmfold2_trimul_tools.bench.case import TRANSITION, Case, stage_floors
from esmfold2_trimul_tools.bench.problem import (
    make_problem,
    reference,
    reference_gradient,
    relative_error,
    sample,
)
from helpers import Problem, reference_gradients
from helpers import reference as oracle
from transitions import TransitionProblem

# Lengths and widths that are no multiple of what the reference takes at once.
ODD_CASES = [
    Case(24, 70, "float32", "outgoing", "bool"),
    Case(24, 70, "bfloat16", "incoming", "float"),
    Case(16, 9, "float16", "outgoing", "none", batch=2),
    Case(40, 2, "float32", "incoming", "bool"),
]


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_reference_is_the_tests_own(case):
    problem = make_problem(case, CPU)
    x = problem.x.clone()
    wanted = oracle(Problem(problem.x, problem.weights, case.direction, problem.mask))
    assert relative_error(reference(problem), wanted) < 1e-12
    assert torch.equal(problem.x, x)


@pytest.mark.parametrize("case", [
    Case(24, 70, "float32", TRANSITION, "none", passes="training"),
    Case(5, 9, "bfloat16", TRANSITION, "none", batch=2, passes="training"),
], ids=str)  # fmt: skip
def test_a_transitions_reference_and_gradient_are_the_tests_own(case):
    problem = make_problem(case, CPU)
    assert problem.mask is None and case.hidden == 4 * case.channels
    own = TransitionProblem(problem.x, problem.weights, problem.x)
    assert relative_error(reference(problem), oracle(own)) < 1e-12
    gradients = reference_gradients(own, problem.grad_out)
    wanted = gradients["x"] + gradients["residual"]
    assert relative_error(reference_gradient(problem), wanted) < 1e-12


@pytest.mark.parametrize("case", ODD_CASES, ids=str)
def test_a_sample_is_the_references(case):
    problem = make_problem(case, CPU)
    some = sample(problem)
    residues = min(16, case.length)
    assert some.wanted.shape == (case.batch, residues, residues, case.channels)
    for chosen in (some.i, some.j):
        assert {0, case.length - 1} <= set(chosen.tolist()) and chosen.unique().numel() == residues
    assert relative_error(some.wanted, some.of(reference(problem))) < 1e-12


def test_relative_error_is_over_the_whole_tensor():
    wanted = torch.zeros(1, 70, 70, 2, dtype=torch.float64)
    wanted[0, 0, 0] = torch.tensor([3.0, 4.0])
    got = wanted.float()
    got[0, 69, 69, 1] = 2.0
    assert relative_error(got, wanted) == pytest.approx(2 / 5)
    got[0, 0, 0, 0] = float("nan")
    assert relative_error(got, wanted) != relative_error(got, wanted)


def test_inputs_are_a_trained_trunks():
    problem = make_problem(Case(64, 32, "bfloat16"), CPU, seed=3)
    assert problem.x.dtype == torch.bfloat16
    assert problem.x.float().mean() == pytest.approx(0.3, abs=0.02)
    assert {name: value.dtype for name, value in problem.weights.items()} == {
        name: torch.float32 if name.startswith("norm_") else torch.bfloat16
        for name in problem.weights
    }
    assert problem.weights["norm_in_weight"].std() > 0.1
    shown = torch.arange(32) < 29
    assert torch.equal(problem.mask[0], shown[:, None] & shown)
    assert torch.equal(problem.x, make_problem(Case(64, 32, "bfloat16"), CPU, seed=3).x)
    assert not torch.equal(problem.x, make_problem(Case(64, 32, "bfloat16"), CPU, seed=4).x)
    assert make_problem(Case(16, 2, "float32"), CPU).mask.any()
    assert make_problem(Case(16, 5, "float32", mask="none"), CPU).mask is None


def test_floor_is_the_larger_of_traffic_and_work_of_each_stage():
    case = Case(128, 2, "bfloat16")  # n = 4
    traffic = (4 * (128 + 256) * 2 + 4, 4 * 3 * 128 * 2, 4 * (128 + 128 + 128) * 2)
    work = (2 * 4 * 128 * 512, 2 * 128 * 2**3, 2 * 4 * (128 * 128 + 128 * 128))
    assert stage_floors(case, copy_rate=1, matrix_rate=1e12) == traffic == (3076, 3072, 3072)
    assert stage_floors(case, copy_rate=1e12, matrix_rate=1) == work == (524288, 2048, 262144)
    # Stage 1 is bound by its work, the others by their traffic.
    assert stage_floors(case, copy_rate=1, matrix_rate=160) == (3276.8, 3072, 3072)


def test_a_transitions_floor_is_of_x_twice_or_of_three_products():
    case = Case(8, 3, "bfloat16", TRANSITION, "none")
    assert stage_floors(case, 1, 1e12) == (9 * 2 * 8 * 2,)
    assert stage_floors(case, 1e12, 1) == (2 * 9 * 3 * 8 * 32,)


@pytest.mark.parametrize(("mask", "bytes_more"), [("bool", 1), ("float", 4), ("none", 0)])
def test_floor_counts_the_mask_the_batch_and_the_dtype(mask, bytes_more):
    case = Case(4, 3, "float32", mask=mask, batch=2)
    first, second, third = stage_floors(case, copy_rate=1, matrix_rate=1e12)
    assert (first, second, third) == (18 * (12 * 4 + bytes_more), 18 * 48, 18 * 48)
    assert stage_floors(case, 1e12, 1)[1] == 2 * 2 * 4 * 27


@pytest.mark.parametrize(
    ("channels", "length", "milliseconds"),
    [(256, 512, (0.176, 0.094, 0.094)), (128, 1024, (0.187, 0.352, 0.187))],
)
def test_floor_agrees_with_the_published_table(channels, length, milliseconds):
    # docs/performance.md, from 4.3 TB/s and 780 TFLOP/s
    floors = stage_floors(Case(channels, length, "bfloat16"), 4.3e12, 780e12)
    assert [1e3 * floor for floor in floors] == pytest.approx(milliseconds, abs=6e-4)


@pytest.mark.parametrize("direction", ["outgoing", "incoming"])
def test_reference_gradient_is_that_of_the_tests_own(direction):
    problem = make_problem(Case(16, 9, "float32", direction, passes="training"), CPU)
    weights = {name: value.double() for name, value in problem.weights.items()}
    direction_of_x = torch.randn(problem.x.shape, dtype=torch.float64)

    def loss(step: float) -> torch.Tensor:
        x = problem.x.double() + step * direction_of_x
        return (oracle(Problem(x, weights, direction, problem.mask)) * problem.grad_out).sum()

    wanted = (loss(1e-5) - loss(-1e-5)) / 2e-5
    got = (reference_gradient(problem) * direction_of_x).sum()
    assert got.item() == pytest.approx(wanted.item(), rel=1e-7)
