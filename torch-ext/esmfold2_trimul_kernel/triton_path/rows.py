"""The three stages on some rows of each sequence, for `sharded`.

Stage 1 writes the planes in the orientation of x for both directions, so that a rank's rows are
rows of every plane; stage 2 reads them transposed for "incoming".
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor

from .._call import Call
from ..fused_dual_gemm import fused_dual_gemm_fwd
from ..fused_ln_residual import (
    fused_ln_residual_by_steps,
    fused_ln_residual_fwd,
    writes_gates,
)
from ..hopper.folded_norm import Folds
from ..trimul_einsum_triton import trimul_einsum_fwd
from ..triton_parts.tiles import padded_pitch
from .launches import current_device, for_unsplit_kernels, launches_of, wants_split


@contextlib.contextmanager
def stages(call: Call, first_row: int) -> Iterator["Rows"]:
    """The stages for `sharded`, of a call whose x [B, R, L, C] begins at row `first_row`."""
    with current_device(call.x):
        yield Rows(call, first_row)


class Rows:
    """The stages of a call whose x has R of the L rows, each on one sequence `index`."""

    slots = 3  # planes that stage 2 works on: a, b and the product
    moment_bytes = 8  # of a pair, in `moments`

    def __init__(self, call: Call, first_row: int) -> None:
        self._call = for_unsplit_kernels(call)
        self._folds = Folds(launches_of(call, "folds"), self._call.weights)
        self.would_split = wants_split(call)  # in a call of one process
        self.moments: Tensor | None = None  # [1, 2, R, pitch] in fp32, of x, from stage 1
        self._first_row = 0 if call.lengths is None else first_row
        self._scratch: Tensor | None = None
        self.pitch = padded_pitch(call.x.shape[2])

    def project(self, index: int, planes: Tensor, channels: slice | None = None) -> None:
        """Stage 1: planes [2, D, R, pitch] of a and b, or of some channels, of which the first come
        first; the moments are kept for the others and for `emit`. It may write to all planes of b,
        which nobody needs then.
        """
        self._scratch = planes[1] if channels is None else None
        call = self._call.of_entry(index)._replace(direction="outgoing")
        group, moments = None, None
        if channels is not None:
            group = channels.start, channels.stop - channels.start
            moments = self.moments if channels.start else None
        self.moments = fused_dual_gemm_fwd(
            call, launches_of(call, "rows"), planes[None].unbind(1), group, moments,
            first_row=self._first_row, folds=self._folds,
        )  # fmt: skip

    def multiply(self, index: int, a: Tensor, b: Tensor, product: Tensor) -> None:
        """Stage 2: the product [G, L, pitch] of whole planes."""
        call = self._call.of_entry(index)
        turned = (call.direction == "incoming",) * 2
        trimul_einsum_fwd(
            call, launches_of(call, "rows"), a[None], b[None], product[None],
            key=a.shape[0], turned=turned,
        )  # fmt: skip

    def emit(self, index: int, product: Tensor, out: Tensor) -> None:
        """Stage 3: `out` [R, L, C] of the product [D, R, pitch]."""
        call, scratch = self._call.of_entry(index), self._scratch
        launches, product = launches_of(call, "rows", out.data_ptr() % 16), product[None]
        if scratch is None and writes_gates(call, product):  # few rows at a time need little memory
            fused_ln_residual_by_steps(
                call, launches, product, self.moments, out[None], self._first_row,
                folds=self._folds,
            )  # fmt: skip
            return
        fused_ln_residual_fwd(
            call, launches, product, self.moments, out[None], first_row=self._first_row,
            folds=self._folds, scratch=scratch,
        )  # fmt: skip
