"""The budgets of helpers.py: wider than chance needs, and too narrow for a fault."""

import os
from dataclasses import replace

import pytest
import torch
from helpers import (
    DTYPES,
    Problem,
    assert_close,
    assert_no_worse,
    formula,
    leaves_of,
    make_problem,
    reference_gradients,
    room,
    seeded,
    with_leaves,
)
from torch import Tensor
from transitions import BIASES, TransitionProblem, in_tree_transition, make_transition


def without(name: str):
    """As if this factor were 1, or this bias 0."""

    def fault(problem: Problem) -> Problem:
        neutral = torch.zeros_like if name.endswith("bias") else torch.ones_like
        return with_leaves(problem, {name: neutral(leaves_of(problem)[name])})

    return fault


def rounded_norms(problem: Problem) -> Problem:
    norms = [name for name in problem.weights if name.startswith("norm")]
    return with_leaves(problem, {name: problem.weights[name].bfloat16() for name in norms})


FAULTS = {
    "no mask": without("mask"),
    "no drop mask": without("drop_mask"),
    "no bias": without("p_in_bias"),
    "other direction": lambda problem: replace(problem, direction="incoming"),
    "norms in bfloat16": rounded_norms,
}
# In 16 bits rounded norms are lost among the other roundings, but for their direction:
# test_fuzz.py's test_norm_weights_are_used_as_they_are.
PLANTED = [
    (dtype, fault)
    for dtype in DTYPES
    for fault in FAULTS
    if dtype == torch.float32 or fault != "norms in bfloat16"
]


def problem_of(dtype: torch.dtype, seed: int = 0) -> Problem:
    """A problem with the fewest values over which results are compared."""
    return make_problem(4, 16, dtype=dtype, mask="soft", drop_mask=True, biases=True, seed=seed)


def plain_gradients(problem: Problem, grad_out: Tensor) -> dict[str, Tensor]:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves_of(problem).items()}
    out = formula(with_leaves(problem, leaves), problem.x.dtype)
    return dict(zip(leaves, torch.autograd.grad(out, leaves.values(), grad_out), strict=True))


@pytest.mark.parametrize("dtype, fault", PLANTED)
def test_faults_are_seen_in_outputs(dtype, fault):
    """In a result that has no error besides."""
    problem = problem_of(dtype)
    assert_close(formula(problem).to(dtype), problem)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(formula(FAULTS[fault](problem)).to(dtype), problem)


@pytest.mark.parametrize("dtype, fault", PLANTED)
def test_faults_are_seen_in_gradients(dtype, fault):
    exact, faulty = [], []
    for seed in range(8):  # of vectors of 16 values: elsewhere there are no fewer in all
        problem = problem_of(dtype, seed)
        grad_out = torch.randn(problem.x.shape, generator=seeded(5)).to(dtype)
        wanted, plain = (of(problem, grad_out) for of in (reference_gradients, plain_gradients))
        exact.append((wanted, plain, wanted))
        faulty.append((reference_gradients(FAULTS[fault](problem), grad_out), plain, wanted))
    assert_no_worse(exact, 1.1)
    with pytest.raises(AssertionError):
        assert_no_worse(faulty, 1.1)


def exchanged(problem: TransitionProblem) -> TransitionProblem:
    w = problem.weights
    return with_leaves(problem, {"gate_weight": w["up_weight"], "up_weight": w["gate_weight"]})


TRANSITION_FAULTS = {
    "no norm weight": without("norm_weight"),
    "no gate bias": without("gate_bias"),
    "no down bias": without("down_bias"),
    "gate and up exchanged": exchanged,
    "no lengths": lambda problem: replace(problem, lengths=None),
    "norms in bfloat16": rounded_norms,
}
TRANSITION_PLANTED = [
    (dtype, fault)
    for dtype in DTYPES
    for fault in TRANSITION_FAULTS
    if dtype == torch.float32 or fault != "norms in bfloat16"
]


def transition_of(dtype: torch.dtype, seed: int = 0) -> TransitionProblem:
    return make_transition((1, 6, 6, 16), 24, dtype=dtype, biases=BIASES, lengths=(4,), seed=seed)


@pytest.mark.parametrize("dtype, fault", TRANSITION_PLANTED)
def test_faults_are_seen_in_outputs_of_transitions(dtype, fault):
    problem = transition_of(dtype)
    assert_close(formula(problem).to(dtype), problem)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(formula(TRANSITION_FAULTS[fault](problem)).to(dtype), problem)


@pytest.mark.parametrize(
    "dtype, fault",
    # No gradient depends on the last bias.
    [(dtype, fault) for dtype, fault in TRANSITION_PLANTED if fault != "no down bias"],
)
def test_faults_are_seen_in_gradients_of_transitions(dtype, fault):
    exact, faulty = [], []
    for seed in range(8):
        problem = transition_of(dtype, seed)
        grad_out = torch.randn(problem.x.shape, generator=seeded(5)).to(dtype)
        wanted, plain = (of(problem, grad_out) for of in (reference_gradients, plain_gradients))
        exact.append((wanted, plain, wanted))
        fault_of = TRANSITION_FAULTS[fault]
        faulty.append((reference_gradients(fault_of(problem), grad_out), plain, wanted))
    assert_no_worse(exact, 1.1)
    with pytest.raises(AssertionError):
        assert_no_worse(faulty, 1.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_in_tree_transition_is_not_within_the_bounds_beside_it(dtype):
    """With as many values as test_transition.py compares at the real width."""
    draws = []
    for seed in range(2):
        problem = make_transition((1, 16, 16, 256), 1024, dtype=dtype, residual="x", seed=seed)
        with torch.no_grad():
            plain = in_tree_transition(problem)(problem.x)
        draws.append((plain, plain, formula(problem)))
    for factor in (0.85, 0.95):
        with pytest.raises(AssertionError):
            assert_no_worse(draws, factor)


def test_what_was_asked_for_is_in_force():
    """Else tests/isa.py would show nothing."""
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    assert int(os.environ.get("TRIMUL_TEST_THREADS", threads)) == threads
    assert os.environ.get("ATEN_CPU_CAPABILITY", capability).upper() == capability


@pytest.mark.parametrize("values", [16, 100, 1000])
def test_room_is_more_than_chance_takes_and_not_much_more(values):
    first, second = torch.randn(2, 4000, values, generator=seeded()).norm(dim=-1)
    assert room(values) ** 0.3 < float((first / second).max()) < room(values)


def test_no_worse_is_of_all_draws_together():
    """One draw of many may be worse by chance, however ill-conditioned it is, and not each."""
    wanted = torch.ones(100, dtype=torch.float64)
    good, bad = (wanted + 1e-3, wanted + 2e-3, wanted), (wanted + 0.3, wanted + 0.1, wanted)
    assert_no_worse([good] * 9 + [bad], 1.0)
    for draws in ([bad] * 10, [(wanted * torch.nan, wanted + 1, wanted)]):
        with pytest.raises(AssertionError):
            assert_no_worse(draws, 1.0)
