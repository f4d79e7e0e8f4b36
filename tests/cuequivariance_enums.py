"""Enums that callers of cuEquivariance pass for `precision`."""

import enum


class Mxfp8(enum.Enum):
    MXFP8 = 4


class TriMulPrecision(enum.Enum):
    """cuEquivariance 0.13's enum."""

    NONE = -1
    DEFAULT = 0
    TF32 = 1
    TF32x3 = 2
    IEEE = 3
    BFLOAT16 = 5
