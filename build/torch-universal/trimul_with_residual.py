"""The two public functions, and their arguments as one checked `Call`."""

import enum
from typing import Any

import torch
from torch import Tensor

from . import operators, sharded
from ._call import Call, Weights
from .validation import (
    broadcast_leading,
    broadcast_lengths,
    broadcast_mask,
    check_direction,
    check_eps,
    check_inplace,
    check_memory,
    check_pair,
    check_recompute,
    check_residual,
    check_weights,
    default_projections,
    resolve_precision,
    view_drop_mask,
)


def triangle_multiplicative_update_with_residual(
    pair: Tensor,
    direction: str,
    residual: Tensor | None,
    drop_mask: Tensor | None,
    *,
    norm_in_weight: Tensor | None,
    norm_in_bias: Tensor | None,
    p_in_weight: Tensor,
    g_in_weight: Tensor,
    norm_out_weight: Tensor | None,
    norm_out_bias: Tensor | None,
    p_out_weight: Tensor,
    g_out_weight: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    eps_out: float | None = None,
    precision: str | int | enum.Enum | None = None,
    memory: str = "auto",
    recompute: str = "none",
    inplace: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """`residual + drop_mask * TriangleMultiplication(pair)`, the update and the sum in one pass.

    AlphaFold 2, Supplementary Methods 1.6.5, Algorithm 11 (outgoing) and Algorithm 12 (incoming).

    Args:
        pair: [B, L, L, C], bfloat16, float16 or float32; any strides. It may be a DTensor whose
            sequences, rows and columns are divided among ranks; then the result is one too, of the
            same placements, and other arguments may be (see docs/distributed.md).
        direction: "outgoing" (sum over k of a[i, k] b[j, k]) or "incoming" (a[k, i] b[k, j]).
        residual: [B, L, L, C] in the dtype of pair; may be pair itself. None gives the update
            alone, without allocating or reading anything for it.
        drop_mask: [B, 1, L, C] or [B*L, C], bool or real, shared over the first residue axis; or
            None.
        norm_in_weight, norm_in_bias: [C], any of the three dtypes (float32 beside bfloat16 tensors
            is used as it is); None means ones and zeros.
        p_in_weight, g_in_weight: [2D, C] in the dtype of pair; rows [0, D) make a, [D, 2D) make b.
        norm_out_weight, norm_out_bias: [D], as norm_in_*.
        p_out_weight, g_out_weight: [C, D] and [C, C] in the dtype of pair.
        mask: pair mask [L, L], [1, L, L] or [B, L, L], bool or real, or None; multiplies a and b.
        eps: added to the variance by the LayerNorm of pair, and by that of the product too unless
            eps_out is given.
        eps_out: the second LayerNorm's own eps.
        precision: arithmetic of float32 inputs: "IEEE", "TF32x3", "TF32" or "bfloat16" operands, or
            "fp16x3" (as exact as "TF32x3" and twice as fast; on Hopper GPUs, else "TF32x3"), in
            upper or lower case, or a member or value of cuEquivariance's TriMulPrecision. None is
            "fp16x3" on Hopper GPUs, where "TF32" takes longer. Elsewhere, and for calls that can't
            have it, None follows torch's own setting (torch.backends.cuda.matmul.allow_tf32, or
            torch.set_float32_matmul_precision, which is the same): "TF32" where that allows it,
            else "TF32x3" or what is as exact. It binds the Triton kernels; the ATen path follows
            torch's own settings, which are more exact on a CPU.
        memory: "default" is the fastest; it holds three tensors of the pair's size beyond its
            arguments. "lean" holds at most one and a half, its result included, and takes longer.
            "auto" is "default", or "lean" if an allocation of the default mode fails, which is
            logged once. Only the Triton kernels have these modes.
        recompute: how much of the forward a backward computes again. "none" keeps a, b and their
            product, three tensors of the pair's size beside the inputs, so that no stage runs
            twice; "product" keeps the product alone, and a and b are made again; "all" keeps only
            the inputs. All three give the same gradients but for roundings. The first two run the
            default mode whatever `memory` says. The ATen path keeps the product alone with "none"
            too. Without a gradient nothing is kept.
        inplace: write the result over residual and return residual, which must be contiguous, and
            be pair itself or share no memory with another argument. Not where a gradient is needed.
        lengths: [B], int32 or int64, on the device of pair: sequence b has lengths[b] residues, and
            the rest of its L is padding on the right. A pair with a padded residue is masked, and
            its update is zero: its output is the residual, or 0. All kernels, forward and backward,
            skip tiles of padding, and the host doesn't read the lengths (on the ATen path it may).
            Lengths beyond [0, L] count as 0 or L.

    An enclosing torch.autocast changes nothing: the dtype of pair decides.

    Returns:
        [B, L, L, C] in the dtype of pair, contiguous. In lean mode it may be the beginning of a
        storage that is a few per cent longer.

    Raises:
        ValueError: a direction, shape, device, eps, precision, memory, recompute or inplace that
            doesn't fit.
        TypeError: an argument that is no tensor, or of a dtype that doesn't fit.
        NotImplementedError: L above 46,336.
        torch.OutOfMemoryError: too little memory. The residual of an inplace call is as it was,
            unless the message says that part of it was written.
    """
    if is_dtensor(pair):
        return _run_on_dtensors("pair", locals())
    if sharded.division() is not None:
        return sharded.run_divided("pair", locals(), sharded.division())
    weights = Weights(
        norm_in_weight, norm_in_bias, p_in_weight, None, g_in_weight, None,
        norm_out_weight, norm_out_bias, p_out_weight, None, g_out_weight, None,
    )  # fmt: skip
    return operators.run(
        call_with_residual(
            pair, direction, residual, drop_mask, weights, mask, eps, eps_out, precision, memory,
            recompute, inplace, lengths,
        )
    )  # fmt: skip


def triangle_multiplicative_update(
    x: Tensor,
    direction: str = "outgoing",
    mask: Tensor | None = None,
    norm_in_weight: Tensor | None = None,
    norm_in_bias: Tensor | None = None,
    p_in_weight: Tensor | None = None,
    p_in_bias: Tensor | None = None,
    g_in_weight: Tensor | None = None,
    g_in_bias: Tensor | None = None,
    norm_out_weight: Tensor | None = None,
    norm_out_bias: Tensor | None = None,
    p_out_weight: Tensor | None = None,
    p_out_bias: Tensor | None = None,
    g_out_weight: Tensor | None = None,
    g_out_bias: Tensor | None = None,
    eps: float = 1e-5,
    precision: str | int | enum.Enum | None = None,
    *,
    memory: str = "auto",
    recompute: str = "none",
    lengths: Tensor | None = None,
) -> Tensor:
    """The triangle multiplication of x, with the signature of `cuequivariance_torch`'s function.

    AlphaFold 2, Supplementary Methods 1.6.5, Algorithm 11 (outgoing) and Algorithm 12 (incoming).

    Args:
        x: [..., L, L, C] with any number of leading dimensions; bfloat16, float16 or float32; any
            strides (it is copied if its leading dimensions, once they have been broadcast to those
            of mask, can't be merged into one as a view). It may be a DTensor, as there.
        direction: "outgoing" (sum over k of a[i, k] b[j, k]) or "incoming" (a[k, i] b[k, j]).
        mask: pair mask [..., L, L], bool or real; multiplies a and b. Its leading dimensions and
            those of x broadcast with each other, its residue axes to those of x.
        norm_in_weight, norm_in_bias: [C]; None means ones and zeros.
        p_in_weight, g_in_weight: [2D, C] in the dtype of x; rows [0, D) make a.
        norm_out_weight, norm_out_bias: [D]; None means ones and zeros.
        p_out_weight, g_out_weight: [C, D] and [C, C] in the dtype of x. A projection that is None
            is drawn at random in each call, for trials (see docs/cuequivariance.md).
        p_in_bias, g_in_bias, p_out_bias, g_out_bias: [2D], [2D], [C], [C], or None.
        eps: added to the variance by both LayerNorms.
        precision, memory, recompute: as for `triangle_multiplicative_update_with_residual`.
        lengths: as there, with the leading dimensions of the result, or a shape that broadcasts to
            them.

    Returns:
        [..., L, L, C] in the dtype of x, contiguous, the leading dimensions those of x and mask
        together: the update, without a residual.

    Raises:
        ValueError: a direction, shape, device, eps, precision, memory or recompute that doesn't
            fit.
        TypeError: an argument that is no tensor, or of a dtype that doesn't fit.
        NotImplementedError: L above 46,336.
    """
    if is_dtensor(x):
        return _run_on_dtensors("x", locals())
    if sharded.division() is not None:
        return sharded.run_divided("x", locals(), sharded.division())
    weights = Weights(
        norm_in_weight, norm_in_bias, p_in_weight, p_in_bias, g_in_weight, g_in_bias,
        norm_out_weight, norm_out_bias, p_out_weight, p_out_bias, g_out_weight, g_out_bias,
    )  # fmt: skip
    call, shape = call_of_any_rank(
        x, direction, mask, weights, eps, precision, memory, recompute, lengths
    )
    return operators.run(call).view(shape)


def is_dtensor(pair: Tensor) -> bool:
    """Whether it is a DTensor, without an import of their module."""
    return type(pair) is not Tensor and hasattr(pair, "device_mesh")


def _run_on_dtensors(name: str, arguments: dict[str, Any]) -> Tensor:
    """The value of the function whose pair tensor is called `name`."""
    from .dtensors import run_on_dtensors  # imports what takes long, and torch may not have

    return run_on_dtensors(name, arguments)


def call_with_residual(
    pair: Tensor,
    direction: str,
    residual: Tensor | None,
    drop_mask: Tensor | None,
    weights: Weights,
    mask: Tensor | None,
    eps: float,
    eps_out: float | None,
    precision: str | int | enum.Enum | None,
    memory: str,
    recompute: str,
    inplace: bool,
    lengths: Tensor | None,
) -> Call:
    """The arguments of `triangle_multiplicative_update_with_residual`, checked."""
    check_direction(direction)
    check_pair("pair", pair, leading="B")
    check_weights("pair", pair, weights)
    check_residual(residual, "pair", pair)
    check_eps("eps", eps)
    if eps_out is not None:
        check_eps("eps_out", eps_out)
    check_memory(memory)
    check_recompute(recompute)
    call = Call(
        x=pair,
        direction=direction,
        mask=broadcast_mask(mask, "pair", pair),
        residual=residual,
        drop_mask=view_drop_mask(drop_mask, pair),
        weights=weights,
        eps_in=eps,
        eps_out=eps if eps_out is None else eps_out,
        precision=resolve_precision(precision, "pair", pair),
        memory=memory,
        recompute=recompute,
        inplace=inplace,
        lengths=broadcast_lengths(lengths, "pair", pair),
    )
    if inplace is not False:
        others = {"mask": mask, "drop_mask": drop_mask, "lengths": lengths, **weights._asdict()}
        check_inplace(inplace, "pair", pair, residual, others)
    return call


def call_of_any_rank(
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    weights: Weights,
    eps: float,
    precision: str | int | enum.Enum | None,
    memory: str,
    recompute: str,
    lengths: Tensor | None,
) -> tuple[Call, torch.Size]:
    """The arguments of `triangle_multiplicative_update`, checked, and the shape of its result."""
    check_direction(direction)
    check_pair("x", x, leading="...")
    weights = default_projections(x, weights)
    check_weights("x", x, weights)
    check_eps("eps", eps)
    check_memory(memory)
    check_recompute(recompute)
    x, mask = broadcast_leading(mask, "x", x)
    batch = x.shape[:-3].numel()
    call = Call(
        x=x.reshape(batch, *x.shape[-3:]),
        direction=direction,
        mask=None if mask is None else mask.reshape(batch, *mask.shape[-2:]),
        residual=None,
        drop_mask=None,
        weights=weights,
        eps_in=eps,
        eps_out=eps,
        precision=resolve_precision(precision, "x", x),
        memory=memory,
        recompute=recompute,
        inplace=False,
        lengths=broadcast_lengths(lengths, "x", x),
    )
    return call, x.shape
