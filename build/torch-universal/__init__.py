"""Triangle multiplication of protein folding models as three fused Triton kernels.

`triangle_multiplicative_update` and `triangle_multiplicative_update_with_residual` are AlphaFold
2's Algorithms 11 ("outgoing" edges) and 12 ("incoming" edges), Supplementary Methods 1.6.5, on a
pair tensor [B, L, L, C]. `layers.ESMFold2TriangleMultiplication` is the same function as a Hugging
Face Hub layer for ESMFold2 in transformers. `warmup` compiles the kernels beforehand, and
`lengths_from_mask` finds the lengths that a padded batch can be called with.
"""

from . import layers
from ._warmup import warmup
from .trimul_with_residual import (
    triangle_multiplicative_update,
    triangle_multiplicative_update_with_residual,
)
from .validation import lengths_from_mask

__all__ = [
    "layers",
    "lengths_from_mask",
    "triangle_multiplicative_update",
    "triangle_multiplicative_update_with_residual",
    "warmup",
]
