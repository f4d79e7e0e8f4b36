"""The Triton path: the three stages of a call, as they come or in little memory.

Peak memory beyond the arguments, in tensors of the pair's size where C = D:

    default   a, b and the product, 3.0; then the product and the output, 2.0
    lean      1 + 2/n + 1/16: the product, a and b of one of n groups of channels, and room ahead of
              the product into which the output moves as the product is read. No output at all if it
              is written over the residual.

Both also keep 8 bytes a pair of residues, the moments of x.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import PreparedLaunch
from ._tiles import padded_pitch
from .fused_dual_gemm import fused_dual_gemm_fwd, prepare_dual_gemm
from .fused_ln_residual import fused_ln_residual_fwd, prepare_ln_residual
from .trimul_einsum_triton import prepare_einsum, trimul_einsum_fwd
from .validation import Weights

_MOST_PLANS = 1024
# Lean: what a and b of one group may take, in tensors of the pair's size, and the steps in which
# the output is made.
_LEAN_PLANES = 0.375
_LEAN_STEPS = 16


class TritonCall(NamedTuple):
    """The op's arguments, checked; precision is one of the kernels' words."""

    x: Tensor  # [B, L, L, C]
    direction: str
    mask: Tensor | None  # [B, L, L]
    residual: Tensor | None  # like x
    drop_mask: Tensor | None  # [B, L, C]
    weights: Weights
    eps_in: float
    eps_out: float
    precision: str
    inplace: bool  # the output is written over the residual


class _Plan(NamedTuple):
    """The launches of all calls of one kind."""

    dual_gemm: PreparedLaunch
    einsum: PreparedLaunch
    ln_residual: PreparedLaunch


_plans: dict[tuple, _Plan] = {}


def run_triton(call: TritonCall) -> Tensor:
    """[B, L, L, C]; x's device must be the current one."""
    x, weights = call.x, call.weights
    kind = _kind(call)
    plan = _plans.get(kind)
    dual_gemm, einsum, ln_residual = plan or (None, None, None)
    if plan is None:
        dual_gemm = prepare_dual_gemm(
            x, call.direction, call.mask, weights, call.eps_in, call.precision
        )
    planes, moments = fused_dual_gemm_fwd(
        x, call.direction, call.mask, weights, call.eps_in, call.precision, prepared=dual_gemm
    )
    batch, n, length, pitch = planes.shape
    product = planes.new_empty(batch, n // 2, length, pitch)
    if plan is None:
        einsum = prepare_einsum(planes, length, call.precision, None, product.stride())
    trimul_einsum_fwd(planes, length, call.precision, product=product, prepared=einsum)
    del planes  # before the output exists: the peak is a, b and the product
    moments = _with_axes_of_x(moments, call.direction)
    if plan is None:
        ln_residual = prepare_ln_residual(
            product, x, moments.stride(), call.residual, call.drop_mask, weights,
            call.eps_out, call.precision, None,
        )  # fmt: skip
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[kind] = _Plan(dual_gemm, einsum, ln_residual)
    if call.inplace and not _may_overwrite(call, ln_residual):
        return _by_steps_into_residual(call, product, moments)
    return fused_ln_residual_fwd(
        product, x, moments, call.residual, call.drop_mask, weights, call.eps_out, call.precision,
        out=call.residual if call.inplace else None, prepared=ln_residual,
    )  # fmt: skip


def _kind(call: TritonCall) -> tuple:
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
        weights.p_in_weight.shape[0],
        weights.g_in_weight.data_ptr() - weights.p_in_weight.data_ptr(),
        *[
            None if t is None else (t.dtype, t.stride(), t.data_ptr() % 16)
            for t in (x, call.mask, call.residual, call.drop_mask, *weights)
        ],
    )


def _with_axes_of_x(moments: Tensor, direction: str) -> Tensor:
    """Stage 1's moments [B, 2, q, p] as [B, 2, i, j]."""
    return moments.transpose(-1, -2) if direction == "incoming" else moments


def _may_overwrite(call: TritonCall, ln_residual: PreparedLaunch) -> bool:
    """Whether stage 3 may write over the residual while it runs.

    Not if the residual is x and a program reads rows of x again after some of their channels have
    been written, by itself or by another.
    """
    constants = ln_residual.constants
    whole_rows = constants["BLOCK_N"] >= constants["C"] and constants["SPLIT"] == 1
    return whole_rows or call.residual.data_ptr() != call.x.data_ptr()


def run_triton_lean(call: TritonCall) -> Tensor:
    """The same in less memory and more time: see the module's docstring.

    The product is [B, L, D, pitch] here, a row's channels together, so that the rows that have been
    read make room for those of the output.
    """
    x = call.x
    batch, length, _, channels = x.shape
    hidden = call.weights.p_in_weight.shape[0] // 2
    pitch = padded_pitch(length)
    rows, step = batch * length, -(-length // _LEAN_STEPS)
    row_out, row_product = length * channels, hidden * pitch
    ahead = 0
    if not call.inplace:
        # The last row that a step writes must end before the first that it reads, at the first step
        # or, where a row of the output is the longer, at the last.
        ahead = max(step * row_out, rows * row_out - (rows - step) * row_product)
        ahead = -(-ahead // 16) * 16  # the product is as aligned as memory of its own would be
    memory = torch.empty(ahead + rows * row_product, dtype=x.dtype, device=x.device)
    products = memory[ahead:].view(batch, length, hidden, pitch)
    out = call.residual if call.inplace else memory[: rows * row_out].view(x.shape)
    for entry in range(batch):
        of_entry = call._replace(
            **{
                name: None if (value := getattr(call, name)) is None else value[entry : entry + 1]
                for name in ("x", "mask", "residual", "drop_mask")
            }
        )
        product = products[entry : entry + 1].transpose(1, 2)  # [1, D, L, pitch]
        moments = _product_by_groups(of_entry, product, batch)
        _by_steps(of_entry, product, moments, out[entry : entry + 1], step)
    return out


def _product_by_groups(call: TritonCall, product: Tensor, batch: int) -> Tensor:
    """Fills the product of one sequence of `batch`; returns the moments [1, 2, L, L] of x."""
    x, direction, mask = call.x, call.direction, call.mask
    length, channels = x.shape[2:]
    hidden, pitch = product.shape[1], product.shape[3]
    most = _LEAN_PLANES * batch * length * channels / (2 * pitch)
    groups = math.ceil(hidden / max(16, most // 16 * 16))
    size = -(-hidden // (16 * groups)) * 16
    moments = None
    einsums: dict[int, PreparedLaunch] = {}
    for first in range(0, hidden, size):
        count = min(size, hidden - first)
        planes, moments = fused_dual_gemm_fwd(
            x, direction, mask, call.weights, call.eps_in, call.precision,
            group=(first, count), moments=moments,
        )  # fmt: skip
        part = product[:, first : first + count]
        if count not in einsums:
            einsums[count] = prepare_einsum(planes, length, call.precision, None, part.stride())
        trimul_einsum_fwd(planes, length, call.precision, product=part, prepared=einsums[count])
        del planes  # before the next group's exist
    return _with_axes_of_x(moments, direction)


def _by_steps(call: TritonCall, product: Tensor, moments: Tensor, out: Tensor, step: int) -> None:
    """Stage 3 of one sequence in steps of `step` rows, one after the other, into `out`.

    `out` may be the memory of the residual, or of x, or lie ahead of the product in its memory.
    """
    length = call.x.shape[1]
    over_x = out.data_ptr() == call.x.data_ptr()
    prepared: dict[tuple, PreparedLaunch] = {}
    for start in range(0, length, step):
        some = slice(start, min(start + step, length))
        x, target = call.x[:, some], out[:, some]
        residual = None if call.residual is None else call.residual[:, some]
        operands = (product[:, :, some], x, moments[:, :, some], residual)
        kind = (x.shape[1], *[t.data_ptr() % 16 for t in (x, target, residual) if t is not None])
        if kind not in prepared:
            prepared[kind] = prepare_ln_residual(
                operands[0], x, moments.stride(), residual, call.drop_mask,
                call.weights, call.eps_out, call.precision, None,
            )  # fmt: skip
        direct = not over_x or _may_overwrite(call, prepared[kind])
        made = fused_ln_residual_fwd(
            *operands, call.drop_mask, call.weights, call.eps_out, call.precision,
            out=target if direct else None, prepared=prepared[kind],
        )  # fmt: skip
        if not direct:
            target.copy_(made)
        del made  # the next step's takes its memory: after the first step no allocation can fail


def _by_steps_into_residual(call: TritonCall, product: Tensor, moments: Tensor) -> Tensor:
    """Stage 3 into a residual that is x itself, where `_may_overwrite` says no."""
    step = -(-call.x.shape[1] // _LEAN_STEPS)
    for entry in range(call.x.shape[0]):
        one = slice(entry, entry + 1)
        of_entry = call._replace(
            x=call.x[one],
            residual=call.residual[one],
            drop_mask=None if call.drop_mask is None else call.drop_mask[one],
        )
        _by_steps(of_entry, product[one], moments[one], call.residual[one], step)
    return call.residual
