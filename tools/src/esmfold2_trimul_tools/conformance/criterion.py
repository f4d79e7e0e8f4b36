"""The conformance suite's criterion: float64, and plain PyTorch in the same dtype.

An output conforms if it has the right shape and dtype; is finite wherever float64, rounded to the
dtype, is; is 0 wherever float64 is exactly 0; and

    ||got - float64|| / ||float64||      <= max(B, 1.1 times the same of plain PyTorch)
    max |got - float64| / rms(float64)   <= max(16 B, 2 times the same of plain PyTorch)

B is a fixed budget of the dtype and the precision. Plain PyTorch is the formula, each operation
rounded to the dtype, with norms in float32: the arithmetic of transformers' module, for every case.
It runs on the CPU on the same numbers, but gets constant rows as zeros (LayerNorm of such a row is
its bias; plain PyTorch gives anything if the constant is large). The factor 1.1 allows for another
order of summation on a GPU. Where plain PyTorch overflows, B decides.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..oracle import transition, triangle_multiplication
from .cases import Case, TransitionCase
from .problem import Problem

# From tests/helpers.py, and from docs/numerics.md for the other words of `precision`.
BUDGETS = {"bfloat16": 4.8e-3, "float16": 7e-4, "float32": 5e-6}
PRECISION_BUDGETS = {
    "IEEE": 5e-6, "TF32x3": 5e-6, "fp16x3": 5e-6, "TF32": 2e-3, "bfloat16": 1e-2
}  # fmt: skip
# The largest of a million normal errors is five times their L2 error, and outputs have heavy tails.
_LARGEST_OVER_BUDGET = 16
_OVER_PLAIN = 1.1
_LARGEST_OVER_PLAIN = 2


class Errors(NamedTuple):
    """relative: the L2 error over the output's norm. largest: the largest over its RMS."""

    relative: float
    largest: float


class Answer(NamedTuple):
    """A case's float64 output, plain PyTorch's errors and the limits."""

    wanted: Tensor
    plain: Errors
    limits: Errors


def budget(case: Case | TransitionCase) -> float:
    """B of the case."""
    if case.dtype == "float32" and case.precision is not None:
        return PRECISION_BUDGETS[case.precision]
    return BUDGETS[case.dtype]


def answer(problem: Problem) -> Answer:
    """The answer to a problem on the CPU."""
    wanted = reference(problem)
    without = problem.without_constant_rows() or problem
    plain = errors(formula(without, problem.x.dtype), wanted, problem.x.dtype)
    limits = Errors(budget(problem.case), _LARGEST_OVER_BUDGET * budget(problem.case))
    if math.isfinite(plain.relative):
        limits = Errors(
            max(limits.relative, _OVER_PLAIN * plain.relative),
            max(limits.largest, _LARGEST_OVER_PLAIN * plain.largest),
        )
    return Answer(wanted, plain, limits)


def reference(problem: Problem) -> Tensor:
    """The output in float64."""
    # The shift doesn't change LayerNorm, and makes rows of one huge number exact zeros.
    x = problem.x.double()
    return formula(replace(problem, x=x - x[..., :1]), torch.float64)


def formula(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The oracle's output, every operation's result in `dtype`, but norms in float32 at least."""
    p = problem
    if isinstance(p.case, TransitionCase):
        return transition(
            p.x, p.weights | p.biases, residual=p.residual, lengths=p.lengths, eps=p.case.eps,
            dtype=dtype,
        )  # fmt: skip
    return triangle_multiplication(
        p.x, p.case.direction, p.weights | p.biases, mask=p.mask, residual=p.residual,
        drop_mask=p.drop_mask, lengths=p.lengths, eps=p.case.eps, dtype=dtype,
    )  # fmt: skip


def errors(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> Errors:
    """Errors of an output on the CPU, where float64 rounds to a finite number of `dtype`.

    NaN if any element is NaN. For an output that must be 0, they are 0 if it is, else infinite.
    """
    counted = wanted.to(dtype).isfinite()
    off = torch.where(counted, got.double() - wanted, 0.0)
    size = torch.where(counted, wanted, 0.0).norm()
    if size == 0:
        worst = float(off.abs().max())
        return Errors(worst and math.inf, worst and math.inf)
    rms = size / counted.sum().sqrt()
    return Errors(float(off.norm() / size), float(off.abs().max() / rms))


def fault(got: Tensor, held_to: Answer, dtype: torch.dtype) -> str | None:
    """The reason why an output on the CPU doesn't conform; None if it does."""
    wanted = held_to.wanted
    if got.shape != wanted.shape or got.dtype != dtype:
        return f"gave {got.dtype} {tuple(got.shape)} for {dtype} {tuple(wanted.shape)}"
    lost = wanted.to(dtype).isfinite() & ~got.isfinite()
    if lost.any():
        return f"{int(lost.sum())} of {lost.numel()} numbers are not finite where float64's are"
    missed = (wanted == 0) & (got != 0)
    if missed.any():
        return f"{int(missed.sum())} of {missed.numel()} numbers are not 0 where float64's are"
    found, limits = errors(got, wanted, dtype), held_to.limits
    if not found.relative <= limits.relative:
        return f"relative error {found.relative:.2e}, above {limits.relative:.2e}"
    if not found.largest <= limits.largest:
        return f"largest error {found.largest:.2e} of the RMS, above {limits.largest:.2e}"
    return None
