"""Random calls of the three public functions: how they are drawn, made, computed and judged.

A `Case`, or a `TransitionCase`, is a call as plain values, and its repr is Python that makes it
again. The call's result is compared with the formula in float64. The allowed error is measured on
the same numbers: the formula runs in float64 again, with a random error wherever plain PyTorch
would round (`Rounding`).
"""

import torch
from cuequivariance_enums import TriMulPrecision

from .case import (
    BIASES,
    NORMS,
    PROJECTIONS,
    TRANSITION,
    TRANSITION_BIASES,
    TRANSITION_NORMS,
    TRANSITION_PROJECTIONS,
    UPDATE,
    WITH_RESIDUAL,
    Case,
    Layout,
    Lengths,
    Mask,
    TransitionCase,
)
from .draw import ATEN, GPU, INTERPRETER, calls
from .judge import GRADIENTS, Oracle, gradients, oracle, ratio, share_of_rounding
from .rounding import Exact, formula
from .tensors import Call, lecun, make

# Also all names that a repr of a case needs.
__all__ = [
    "ATEN",
    "BIASES",
    "GPU",
    "GRADIENTS",
    "INTERPRETER",
    "NORMS",
    "PROJECTIONS",
    "TRANSITION",
    "TRANSITION_BIASES",
    "TRANSITION_NORMS",
    "TRANSITION_PROJECTIONS",
    "UPDATE",
    "WITH_RESIDUAL",
    "Call",
    "Case",
    "Exact",
    "Layout",
    "Lengths",
    "Mask",
    "Oracle",
    "TransitionCase",
    "TriMulPrecision",
    "calls",
    "formula",
    "gradients",
    "lecun",
    "make",
    "oracle",
    "ratio",
    "share_of_rounding",
    "torch",
]
