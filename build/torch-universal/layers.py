"""The Hub layer that takes the place of transformers' `EsmFold2TriangleMultiplicativeUpdate`.

The kernels library puts this class's `forward` into the adopting module, so `self` is that module:
the layer has no constructor and no state of its own and reads the module's parameters and eps.
"""

import os

import torch
from torch import nn

from .models.parts import fault_of_parts, linear_of
from .paths import say_own
from .sharded import division
from .trimul_with_residual import triangle_multiplicative_update_with_residual
from .validation import check_memory, check_recompute

MEMORY_VARIABLE = "ESMFOLD2_TRIMUL_MEMORY"
RECOMPUTE_VARIABLE = "ESMFOLD2_TRIMUL_RECOMPUTE"
_LINEARS, _NORMS = ("proj_bundle", "proj_emit", "proj_gate"), ("norm_start", "norm_mix")


class ESMFold2TriangleMultiplication(nn.Module):
    """Triangle multiplication without residual, for ESMFold2 (AlphaFold 2, Algorithms 11, 12)."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self, pair_grid: torch.Tensor, visibility: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The update of the pair tensor; the caller adds it to `pair_grid`.

        Args:
            pair_grid: [B, L, L, C], bfloat16, float16 or float32, in the dtype of the projections.
                Under torch.autocast both are taken in the autocast dtype, as the linear layers of
                the module would.
            visibility: [B, L, L] pair mask of any real dtype, or None for "every pair is real".

        The environment variable ESMFOLD2_TRIMUL_MEMORY, "auto" by default, is the function's
        `memory`: "lean" trades time for memory. ESMFOLD2_TRIMUL_RECOMPUTE, "none" by default, is
        its `recompute`: with "all" nothing but the inputs is kept for the backward.

        Where a part of the module is not plain (a hook, a quantised or offloaded weight, an adapter
        other than LoRA), the module's own forward runs, and the log says why once. LoRA on a plain
        linear layer is merged into its weight for the call.

        Returns:
            [B, L, L, C] in the dtype of the computation.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that don't fit each other, or a word
                in ESMFOLD2_TRIMUL_MEMORY or ESMFOLD2_TRIMUL_RECOMPUTE that the function doesn't
                know; a part that is not plain in a module without a forward of its own, or inside
                `sharded_pairs`.
        """
        memory = os.environ.get(MEMORY_VARIABLE, "auto")
        check_memory(memory, MEMORY_VARIABLE)
        recompute = os.environ.get(RECOMPUTE_VARIABLE, "none")
        check_recompute(recompute, RECOMPUTE_VARIABLE)
        fault = fault_of_parts(self, _LINEARS, _NORMS)
        if fault is not None:
            own = type(self).forward
            if own is ESMFold2TriangleMultiplication.forward or division() is not None:
                raise TypeError(fault)  # a forward of its own would take rows for a whole
            say_own(fault)
            return own(self, pair_grid, visibility)
        bundle, emit, gate = [linear_of(self._modules[name]).weight for name in _LINEARS]
        if torch.is_autocast_enabled(pair_grid.device.type):
            dtype = torch.get_autocast_dtype(pair_grid.device.type)
            pair_grid, bundle = pair_grid.to(dtype), bundle.to(dtype)
            emit, gate = emit.to(dtype), gate.to(dtype)
        return triangle_multiplicative_update_with_residual(
            pair_grid,
            self.flow,
            None,
            None,
            norm_in_weight=self.norm_start.weight,
            norm_in_bias=self.norm_start.bias,
            p_in_weight=bundle[: 2 * self.dim],
            g_in_weight=bundle[2 * self.dim :],
            norm_out_weight=self.norm_mix.weight,
            norm_out_bias=self.norm_mix.bias,
            p_out_weight=emit,
            g_out_weight=gate,
            mask=visibility,
            eps=self.norm_start.eps,
            eps_out=self.norm_mix.eps,
            memory=memory,
            recompute=recompute,
        )


__all__ = ["ESMFold2TriangleMultiplication"]
