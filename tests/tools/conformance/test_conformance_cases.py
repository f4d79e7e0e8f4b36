"""The cases of the conformance suite, and their problems."""

import dataclasses

import pytest
import torch
from conformance_cases import CASE, CPU
from esmfold2_trimul_tools.conformance.cases import (
    BIASES,
    CASES,
    DTYPES,
    EVERY_CASE,
    TRANSITION_BIASES,
    TRANSITIONS,
)
from esmfold2_trimul_tools.conformance.criterion import reference
from esmfold2_trimul_tools.conformance.implementations import IMPLEMENTATIONS
from esmfold2_trimul_tools.conformance.problem import INPUTS, LAYOUTS, MASKS, make_problem

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_table_has_every_word_and_says_nothing_twice():
    assert len(CASE) == len(EVERY_CASE)
    for table in (CASES, TRANSITIONS):
        assert len({dataclasses.replace(case, name="") for case in table}) == len(table)
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
        ("precision", (None, "IEEE", "TF32", "TF32x3", "fp16x3", "bfloat16")),
        ("lengths_dtype", ("int64", "int32")),
        ("memory", ("auto", "lean")),
        ("biases", [(), *[(name,) for name in BIASES], BIASES]),
        ("length", (1, 2, 8, 9, 31, 33, 65, 66, 127)),
        ("hidden", (16, 32, 41, 48, 64, 128, 250)),
    ):
        assert {getattr(case, field) for case in CASES} == set(known), field


def test_the_transitions_have_every_word():
    for field, known in (
        ("dtype", DTYPES),
        ("x", INPUTS),
        ("layout", LAYOUTS.keys() - {"every second sequence"}),
        ("weights", ("trunk", "wide gates", "fine norms")),
        ("norms", ("float32", "bfloat16", "absent")),
        ("residual", ("none", "own", "pair", "overwritten")),
        ("precision", (None, "IEEE", "TF32", "TF32x3", "fp16x3", "bfloat16")),
        ("lengths_dtype", ("int64", "int32")),
        ("biases", [(), *[(name,) for name in TRANSITION_BIASES], TRANSITION_BIASES]),
    ):
        assert {getattr(case, field) for case in TRANSITIONS} == set(known), field


def test_what_an_implementation_may_lack_is_asked_for():
    asked_for = frozenset().union(*(case.features for case in EVERY_CASE))
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


def test_lengths_are_a_mask_and_zeros():
    case = CASE["lengths: with a soft mask, bfloat16"]
    problem = make_problem(case)
    real = torch.arange(33) < torch.tensor(case.lengths)[:, None]
    pairs = real[:, :, None] & real[:, None, :]
    masked = dataclasses.replace(problem, mask=problem.mask * pairs, lengths=None)
    wanted = reference(masked) * pairs.unsqueeze(-1)
    assert torch.equal(reference(problem), wanted)
    assert not wanted[1, 5:].any() and wanted[0].any()
