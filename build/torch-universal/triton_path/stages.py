"""The three stages of a call, each launch prepared once for all calls of its kind."""

import torch
from torch import Tensor

from .._call import Call
from ..fused_dual_gemm import fused_dual_gemm_fwd, prepare_dual_gemm
from ..fused_ln_residual import fused_ln_residual_fwd, prepare_ln_residual
from ..trimul_einsum_triton import prepare_einsum, trimul_einsum_fwd
from ..triton_parts.launch import Launches, PreparedLaunch

_MOST_KINDS = 1024
_STEPS = 16
_launches: dict[tuple, Launches] = {}


def launches_of(call: Call, *what: object) -> Launches:
    """The launches for `what` of calls of this kind."""
    kind = (what, *_kind(call))
    found = _launches.get(kind)
    if found is None:
        if len(_launches) >= _MOST_KINDS:
            _launches.clear()
        found = _launches[kind] = Launches()
    return found


def _kind(call: Call) -> tuple:
    """Everything of a call that its launches depend on besides the addresses of its tensors.

    Of the addresses: whether they are multiples of 16, and how far the input projections are apart.
    """
    x, weights = call.x, call.weights
    return (
        x.shape,
        x.device,
        call.direction,
        call.eps_in,
        call.eps_out,
        call.precision,
        call.inplace,
        call.lengths is None,
        weights.p_in_weight.shape[0],
        weights.g_in_weight.data_ptr() - weights.p_in_weight.data_ptr(),
        *[
            None if t is None else (t.dtype, t.stride(), t.data_ptr() % 16)
            for t in (x, call.mask, call.residual, call.drop_mask, *weights)
        ],
    )


def dual_gemm(
    call: Call,
    launches: Launches,
    planes: tuple[Tensor, Tensor],
    group: tuple[int, int] | None = None,
    moments: Tensor | None = None,
) -> Tensor:
    """Stage 1 into `planes`; returns the moments [B, 2, L, pitch], computed unless given."""
    stage = (call.x, call.direction, call.mask, call.weights, call.eps_in, call.precision)
    prepared = launches.of(
        ("dual_gemm", group, moments is None, call.x.data_ptr() % 16),
        prepare_dual_gemm, *stage, planes, None, group, moments is not None,
    )  # fmt: skip
    if moments is None:
        batch, _, length, pitch = planes[0].shape
        shape = (batch, 2, length, pitch)
        moments = launches.empty("moments", shape, torch.float32, call.x.device)
    fused_dual_gemm_fwd(
        *stage, planes=planes, moments=moments, prepared=prepared, lengths=call.lengths
    )
    return moments


def einsum(
    call: Call,
    launches: Launches,
    a: Tensor,
    b: Tensor,
    product: Tensor,
    key: object = 0,
    turned: tuple[bool, bool] = (False, False),
) -> None:
    """Stage 2 into `product`; `key` identifies this launch among the stage-2 launches of a call."""
    prepared = launches.of(
        ("einsum", key),
        prepare_einsum, a, b, call.precision, product, None, turned,
        call.lengths is not None,
    )  # fmt: skip
    trimul_einsum_fwd(
        a, b, call.precision, product=product, prepared=prepared, lengths=call.lengths
    )


def ln_residual(
    call: Call,
    launches: Launches,
    product: Tensor,
    moments: Tensor,
    out: Tensor,
    rows: slice | None = None,
) -> None:
    """Stage 3 of all rows, or of `rows`, into those rows of `out` [B, L, L, C].

    `out` may be the memory of the residual. Where that is x too, and a program reads rows of x
    again after they have been written, few rows at a time are written apart and copied.
    """
    x, residual, first_row, key = call.x, call.residual, 0, ("ln_residual",)
    if rows is not None:
        product, moments = product[:, :, rows], moments[:, :, rows]
        x, out = x[:, rows], out[:, rows]
        residual = None if residual is None else residual[:, rows]
        first_row = 0 if call.lengths is None else rows.start
        alignments = [t.data_ptr() % 16 for t in (x, out, residual) if t is not None]
        key = ("ln_residual", x.shape[1], first_row, *alignments)
    stage = (product, x, moments, residual, call.drop_mask)
    stage += (call.weights, call.eps_out, call.precision)
    prepared = launches.of(key, prepare_ln_residual, *stage, None, first_row)
    made = out
    if call.inplace and not _may_overwrite(call, prepared):
        if rows is None:
            for entry in range(x.shape[0]):
                one = slice(entry, entry + 1)
                by_steps(call.of_entry(entry), launches, product[one], moments[one], out[one])
            return
        made = launches.empty("output", x.shape, x.dtype, x.device)
    fused_ln_residual_fwd(*stage, out=made, prepared=prepared, lengths=call.lengths)
    if made is not out:
        out.copy_(made)


def by_steps(
    call: Call, launches: Launches, product: Tensor, moments: Tensor, out: Tensor
) -> None:
    """Stage 3 of one sequence, `step_of` rows after the other.

    Only the first step can fail to allocate: the memory of a step is the next one's.
    """
    length = call.x.shape[1]
    step = step_of(length)
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        ln_residual(call, launches, product, moments, out, rows)


def step_of(length: int) -> int:
    """The rows of the output that are made at once where they are made by steps."""
    return -(-length // _STEPS)


def _may_overwrite(call: Call, prepared: PreparedLaunch) -> bool:
    """Whether stage 3 may write over the residual while it runs.

    Not if the residual is x and a program reads rows of x again after some of their channels have
    been written, by itself or by another.
    """
    constants = prepared.constants
    whole_rows = constants["BLOCK_N"] >= constants["C"] and constants["SPLIT"] == 1
    return whole_rows or call.residual.data_ptr() != call.x.data_ptr()


def with_axes_of_x(moments: Tensor, direction: str) -> Tensor:
    """Stage 1's moments [B, 2, q, p] as [B, 2, i, j]."""
    return moments.transpose(-1, -2) if direction == "incoming" else moments
