"""Random calls of the two public functions: how they are drawn, made, computed and judged.

A `Case` is a call as plain values, and its repr is Python that makes it again. What its call must
give is the formula in float64; how far from that it may be is measured on the same numbers, with
the formula once more in float64 and a random error wherever plain PyTorch would round (`Rounding`).
"""

import torch
from cuequivariance_enums import TriMulPrecision

from .case import BIASES, NORMS, PROJECTIONS, UPDATE, WITH_RESIDUAL, Case, Layout, Lengths, Mask
from .draw import ATEN, GPU, INTERPRETER, calls
from .judge import GRADIENTS, Oracle, gradients, oracle, ratio, share_of_rounding
from .rounding import Exact, formula
from .tensors import Call, lecun, make

# All that a repr of a case needs, too.
__all__ = [
    "ATEN",
    "BIASES",
    "GPU",
    "GRADIENTS",
    "INTERPRETER",
    "NORMS",
    "PROJECTIONS",
    "UPDATE",
    "WITH_RESIDUAL",
    "Call",
    "Case",
    "Exact",
    "Layout",
    "Lengths",
    "Mask",
    "Oracle",
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
