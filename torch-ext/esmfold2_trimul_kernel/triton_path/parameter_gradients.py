"""The gradients of projections of normalised rows, and of the norm, from sums over the rows.

    rows = (g h + b) W^T + bias     h [M, K] normalised without norm weights, W [N, K]
    S = d^T h, s = sum d            d [M, N] the rows' gradient; S and s come in parts

    dW = S g + s b^T,   dbias = s,   dg = sum over n of W S,   db = sum over n of W s

S may come as d^T (g h), of which it is made again, with a g nearer to 0 than `LEAST_SCALE` as that.
The parts are of `row_products`. W is up to three projections, one above the other. One kernel adds
the parts, in their order, and writes dW, dbias and each block's share of dg and db; another adds
the shares. Both take a further projection, of other rows. All sums are in fp32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_parts.launch import Launches, PreparedLaunch, pointers
from ..triton_parts.layer_norm import LEAST_SCALE
from ..triton_parts.tiles import load_channels, load_tile, store_tile
from .row_products import RowParts

# Small tiles, as the sums have many parts, of which a program loads _AHEAD at a time.
_BLOCK_N = 16
_BLOCK_K = 16
_BLOCK_R = 32
_AHEAD = 32
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)


@triton.jit(do_not_specialize=["P", "last_P", "other_P"])
def _projection_gradients_kernel(
    parts_ptr, sums_ptr, last_sums_ptr, norm_weight_ptr, norm_bias_ptr, norm_parts_ptr,
    first_ptr, second_ptr, last_ptr, grad_first_ptr, grad_second_ptr, grad_last_ptr,
    bias_first_ptr, bias_second_ptr, bias_last_ptr,
    other_parts_ptr, other_sums_ptr, other_norm_weight_ptr, other_norm_bias_ptr,
    other_norm_parts_ptr, other_ptr, grad_other_ptr, bias_other_ptr,
    P, last_P, other_P, stride_sums, last_stride_sums, other_stride_sums,
    stride_first, stride_second, stride_last, stride_other,
    FIRST: tl.constexpr, SECOND: tl.constexpr, LAST: tl.constexpr, K: tl.constexpr,
    OTHER: tl.constexpr, OTHER_K: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_K] tile of dW of one of three projections, or of the other rows' one.

    The three have FIRST, SECOND, LAST rows: parts [P, FIRST + SECOND + LAST, K]; sums [P, ...] of
    the rows of the first two, and last_sums [last_P, ...] of the last. That of other rows has
    OTHER: parts [other_P, OTHER, OTHER_K], and sums where its bias or norm has a gradient. The
    shares of dg and db are norm_parts [blocks, 2, K]. Gradients of biases are optional. SCALED: the
    parts of the three are multiplied by their norm's weight.
    """
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    OTHER_BLOCKS_K: tl.constexpr = (OTHER_K + BLOCK_K - 1) // BLOCK_K
    BEFORE_SECOND: tl.constexpr = (FIRST + BLOCK_N - 1) // BLOCK_N
    BEFORE_LAST: tl.constexpr = BEFORE_SECOND + (SECOND + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = BEFORE_LAST + (LAST + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    if OTHER > 0:
        if program >= BLOCKS * BLOCKS_K:
            program -= BLOCKS * BLOCKS_K
            block = program // OTHER_BLOCKS_K
            start_k = (program - block * OTHER_BLOCKS_K) * BLOCK_K
            sums = _projection_gradients_tile(
                other_parts_ptr, other_sums_ptr, other_norm_weight_ptr, other_norm_bias_ptr,
                other_norm_parts_ptr, other_ptr, grad_other_ptr,
                other_P, other_P, other_stride_sums, stride_other, block, block * BLOCK_N, 0,
                OTHER, start_k, OTHER, OTHER_K, False, BLOCK_N, BLOCK_K, BLOCK_R, AHEAD,
            )  # fmt: skip
            _store_bias(bias_other_ptr, sums, start_k, block * BLOCK_N, OTHER)
            return
    block = program // BLOCKS_K
    start_k = (program - block * BLOCKS_K) * BLOCK_K
    is_last = block >= BEFORE_LAST
    is_second = (block >= BEFORE_SECOND) & (block < BEFORE_LAST)
    weight_ptr = tl.where(is_last, last_ptr, tl.where(is_second, second_ptr, first_ptr))
    grad_ptr = tl.where(
        is_last, grad_last_ptr, tl.where(is_second, grad_second_ptr, grad_first_ptr)
    )
    stride = tl.where(is_last, stride_last, tl.where(is_second, stride_second, stride_first))
    before = tl.where(is_last, BEFORE_LAST, tl.where(is_second, BEFORE_SECOND, 0))
    count = tl.where(is_last, LAST, tl.where(is_second, SECOND, FIRST))
    base = tl.where(is_last, FIRST + SECOND, tl.where(is_second, FIRST, 0))
    start_n = (block - before) * BLOCK_N
    some_sums = tl.where(is_last, last_sums_ptr, sums_ptr) + tl.where(is_last, 0, base)
    stride_some = tl.where(is_last, last_stride_sums, stride_sums)
    sums = _projection_gradients_tile(
        parts_ptr, some_sums, norm_weight_ptr, norm_bias_ptr, norm_parts_ptr, weight_ptr, grad_ptr,
        P, tl.where(is_last, last_P, P), stride_some, stride, block, start_n, base, count,
        start_k, FIRST + SECOND + LAST, K, SCALED, BLOCK_N, BLOCK_K, BLOCK_R, AHEAD,
    )  # fmt: skip
    if is_last:
        _store_bias(bias_last_ptr, sums, start_k, start_n, LAST)
    elif is_second:
        _store_bias(bias_second_ptr, sums, start_k, start_n, SECOND)
    else:
        _store_bias(bias_first_ptr, sums, start_k, start_n, FIRST)


@triton.jit
def _store_bias(ptr, sums, start_k, start_n, COUNT: tl.constexpr):
    """The first tile of some rows stores their sums as the gradient of a bias, if there is one."""
    if ptr is not None:
        offs_n = start_n + tl.arange(0, sums.shape[0])
        rounded = sums.to(ptr.dtype.element_ty)
        tl.store(ptr + offs_n, rounded, mask=(offs_n < COUNT) & (start_k == 0))


@triton.jit
def _projection_gradients_tile(
    parts_ptr, sums_ptr, norm_weight_ptr, norm_bias_ptr, norm_parts_ptr, weight_ptr, grad_ptr,
    P, end, stride_sums, stride_weight, block, start_n, base, count, start_k,
    N: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One tile of dW of a projection [count, K] whose rows begin at row `base` of parts [P, N, K].

    Returns the sums, of sums [end, ...]. Stores the shares of dg and db as those of `block`.
    """
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    offs_k = start_k + tl.arange(0, BLOCK_K)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    valid_n = offs_n < count
    row = (base + offs_n).to(tl.int64)
    sums = tl.zeros([BLOCK_N], tl.float32)
    if sums_ptr is not None:
        for start in range(0, end, BLOCK_R):
            part = start + tl.arange(0, BLOCK_R)
            valid = (part < end)[:, None] & valid_n[None, :]
            ptrs = sums_ptr + (part.to(tl.int64) * stride_sums)[:, None] + offs_n[None, :]
            sums += tl.sum(tl.load(ptrs, mask=valid, other=0.0), 0)
    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, P, AHEAD):
        for ahead in tl.static_range(AHEAD):  # loaded together, added in order
            offs_part = (row + (start + ahead) * N) * K
            valid = valid_n & (start + ahead < P)
            products += load_tile(parts_ptr, offs_part, offs_k, 1, valid, K, EVEN_K)
    norm_weight = load_channels(norm_weight_ptr, offs_k, 1.0, K, EVEN_K)
    if SCALED:
        products /= tl.where(tl.abs(norm_weight) < _LEAST_SCALE, _LEAST_SCALE, norm_weight)
    grad = products * norm_weight
    if norm_bias_ptr is not None:
        grad += sums[:, None] * load_channels(norm_bias_ptr, offs_k, 0.0, K, EVEN_K)
    rounded = grad.to(grad_ptr.dtype.element_ty)
    store_tile(grad_ptr, offs_n.to(tl.int64) * K, offs_k, rounded, valid_n, K, EVEN_K)
    if norm_parts_ptr is not None:
        offs_weight = offs_n.to(tl.int64) * stride_weight
        weight = load_tile(weight_ptr, offs_weight, offs_k, 1, valid_n, K, EVEN_K).to(tl.float32)
        ptrs = norm_parts_ptr + block * 2 * K + offs_k
        tl.store(ptrs, tl.sum(products * weight, 0), mask=offs_k < K)
        tl.store(ptrs + K, tl.sum(sums[:, None] * weight, 0), mask=offs_k < K)
    return sums


@triton.jit(do_not_specialize=["R", "other_R"])
def _norm_gradients_kernel(
    parts_ptr, grad_weight_ptr, grad_bias_ptr,
    other_parts_ptr, other_grad_weight_ptr, other_grad_bias_ptr, R, other_R,
    K: tl.constexpr, OTHER_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dg and db, either of them optional, at BLOCK_K channels of one norm or of another."""
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block = tl.program_id(0)
    if block < BLOCKS:
        _norm_gradients_tile(
            parts_ptr, grad_weight_ptr, grad_bias_ptr, R, block * BLOCK_K, K, BLOCK_K, BLOCK_R
        )
    else:
        _norm_gradients_tile(
            other_parts_ptr, other_grad_weight_ptr, other_grad_bias_ptr, other_R,
            (block - BLOCKS) * BLOCK_K, OTHER_K, BLOCK_K, BLOCK_R,
        )  # fmt: skip


@triton.jit
def _norm_gradients_tile(
    parts_ptr, grad_weight_ptr, grad_bias_ptr, R, start_k,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The sums of parts [R, 2, K] at BLOCK_K channels; without parts nothing."""
    if parts_ptr is not None:
        offs_k = start_k + tl.arange(0, BLOCK_K)
        weight = tl.zeros([BLOCK_K], tl.float32)
        bias = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, R, BLOCK_R):
            row = start + tl.arange(0, BLOCK_R)
            weight += tl.sum(load_tile(parts_ptr, row * 2 * K, offs_k, 1, row < R, K, False), 0)
            bias += tl.sum(load_tile(parts_ptr + K, row * 2 * K, offs_k, 1, row < R, K, False), 0)
        if grad_weight_ptr is not None:
            rounded = weight.to(grad_weight_ptr.dtype.element_ty)
            tl.store(grad_weight_ptr + offs_k, rounded, mask=offs_k < K)
        if grad_bias_ptr is not None:
            rounded = bias.to(grad_bias_ptr.dtype.element_ty)
            tl.store(grad_bias_ptr + offs_k, rounded, mask=offs_k < K)


class Projections(NamedTuple):
    """The names of up to three projections [N, K] of the same normalised rows, and of the norm."""

    weights: tuple[str, ...]
    norm: str | None  # "norm_in" of norm_in_weight and norm_in_bias; None: the rows are no norm's


class Sums(NamedTuple):
    """What the gradients of projections are made of."""

    names: Projections
    # Of the rows' gradient: its products with the normalised rows, and its sums [P, N], which a
    # second set with no bias and no norm may lack.
    parts: RowParts
    last_sums: Tensor | None = None  # [P', N] of the last projection's rows, if not in `parts`


class _Set(NamedTuple):
    """Projections of the same rows, with their gradients."""

    sums: Sums
    weights: list[Tensor]
    grads: list[Tensor]
    biases: list[Tensor | None]  # gradients
    norm: list[Tensor | None]  # weight and bias
    norm_grads: list[Tensor | None]
    norm_parts: Tensor | None
    blocks: int


def gradients_of_projections(
    launches: Launches,
    sets: list[Sums],
    weights: NamedTuple,
    needs: frozenset[str],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The gradients that `needs` names of projections, their biases, and the norms.

    Each has the parameter's dtype, or `dtype`, and memory of its own.

    Args:
        sets: one or two, of which the second has one projection and parts that aren't scaled.
        weights: the call's; the projections of a set have unit last stride and one dtype.
    """
    made = [_set_of(sums, weights, dtype) for sums in sets]
    one, other = made if len(made) == 2 else (made[0], None)
    which = tuple(sums.names for sums in sets)
    prepared = launches.of(
        ("projection_gradients", which), _prepare_projection_gradients, one, other
    )
    # The last projection, and up to two before it; those that are not there have no rows.
    absent = 3 - len(one.weights)
    three, grads, biases = (
        some[:-1] + some[-1:] * (1 + absent) for some in (one.weights, one.grads, one.biases)
    )
    prepared.launch(
        parts_ptr=one.sums.parts.products,
        sums_ptr=one.sums.parts.sums,
        last_sums_ptr=_last_sums(one),
        norm_weight_ptr=one.norm[0],
        norm_bias_ptr=one.norm[1],
        norm_parts_ptr=one.norm_parts,
        first_ptr=three[0],
        second_ptr=three[1],
        last_ptr=three[2],
        grad_first_ptr=grads[0],
        grad_second_ptr=grads[1],
        grad_last_ptr=grads[2],
        bias_first_ptr=biases[0],
        bias_second_ptr=biases[1],
        bias_last_ptr=biases[2],
        other_parts_ptr=None if other is None else other.sums.parts.products,
        other_sums_ptr=None if other is None else _last_sums(other),
        other_norm_weight_ptr=None if other is None else other.norm[0],
        other_norm_bias_ptr=None if other is None else other.norm[1],
        other_norm_parts_ptr=None if other is None else other.norm_parts,
        other_ptr=None if other is None else other.weights[0],
        grad_other_ptr=None if other is None else other.grads[0],
        bias_other_ptr=None if other is None else other.biases[0],
    )
    norms = [of_set for of_set in made if of_set.norm_parts is not None]
    if norms:
        prepared = launches.of(("norm_gradients", which), _prepare_norm_gradients, norms)
        prepared.launch(
            parts_ptr=norms[0].norm_parts,
            grad_weight_ptr=norms[0].norm_grads[0],
            grad_bias_ptr=norms[0].norm_grads[1],
            other_parts_ptr=None if len(norms) == 1 else norms[1].norm_parts,
            other_grad_weight_ptr=None if len(norms) == 1 else norms[1].norm_grads[0],
            other_grad_bias_ptr=None if len(norms) == 1 else norms[1].norm_grads[1],
        )
    found = {}
    for of_set in made:
        names = of_set.sums.names
        found |= dict(zip(names.weights, of_set.grads, strict=True))
        found |= {_bias(n): bias for n, bias in zip(names.weights, of_set.biases, strict=True)}
        if names.norm is not None:
            found |= dict(zip(_norm_names(names.norm), of_set.norm_grads, strict=True))
    return {name: gradient for name, gradient in found.items() if name in needs}


def _bias(name: str) -> str:
    return name.replace("weight", "bias")


def _norm_names(norm: str) -> tuple[str, str]:
    return f"{norm}_weight", f"{norm}_bias"


def _set_of(sums: Sums, weights: NamedTuple, dtype: torch.dtype | None) -> _Set:
    def gradient(like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)

    names = sums.names
    given = [getattr(weights, name) for name in names.weights]
    biases = [gradient(getattr(weights, _bias(name))) for name in names.weights]
    norm = [None, None]
    if names.norm is not None:
        norm = [getattr(weights, name) for name in _norm_names(names.norm)]
    blocks = sum([-(-weight.shape[0] // _BLOCK_N) for weight in given])
    norm_parts = None
    if norm[0] is not None or norm[1] is not None:
        norm_parts = sums.parts.products.new_empty(blocks, 2, given[0].shape[1])
    grads, norm_grads = [gradient(one) for one in given], [gradient(one) for one in norm]
    return _Set(sums, given, grads, biases, norm, norm_grads, norm_parts, blocks)


def _last_sums(of_set: _Set) -> Tensor | None:
    parts, last_sums = of_set.sums.parts, of_set.sums.last_sums
    if last_sums is not None or parts.sums is None:
        return last_sums
    return parts.sums[:, parts.products.shape[1] - of_set.weights[-1].shape[0] :]


def _prepare_projection_gradients(one: _Set, other: _Set | None) -> PreparedLaunch:
    parts, last_sums = one.sums.parts, _last_sums(one)
    width, absent = parts.products.shape[2], 3 - len(one.weights)
    counts = [weight.shape[0] for weight in one.weights]
    counts = counts[:-1] + [0] * absent + counts[-1:]
    three = one.weights[:-1] + one.weights[-1:] * (1 + absent)
    programs = one.blocks * triton.cdiv(width, _BLOCK_K)
    values = dict(
        P=parts.products.shape[0], last_P=last_sums.shape[0], other_P=0,
        stride_sums=parts.sums.stride(0), last_stride_sums=last_sums.stride(0),
        other_stride_sums=0, stride_first=three[0].stride(0), stride_second=three[1].stride(0),
        stride_last=three[2].stride(0), stride_other=0,
    )  # fmt: skip
    count = other_width = 0
    if other is not None:
        (weight,), sums = other.weights, _last_sums(other)
        count, other_width = weight.shape
        programs += other.blocks * triton.cdiv(other_width, _BLOCK_K)
        values |= dict(
            other_P=other.sums.parts.products.shape[0], stride_other=weight.stride(0),
            other_stride_sums=0 if sums is None else sums.stride(0),
        )  # fmt: skip
    return PreparedLaunch(
        _projection_gradients_kernel,
        programs,
        tensors=pointers(
            "parts_ptr", "sums_ptr", "last_sums_ptr", "norm_weight_ptr", "norm_bias_ptr",
            "norm_parts_ptr", "first_ptr", "second_ptr", "last_ptr", "grad_first_ptr",
            "grad_second_ptr", "grad_last_ptr", "bias_first_ptr", "bias_second_ptr",
            "bias_last_ptr", "other_parts_ptr", "other_sums_ptr", "other_norm_weight_ptr",
            "other_norm_bias_ptr", "other_norm_parts_ptr", "other_ptr", "grad_other_ptr",
            "bias_other_ptr",
        ),
        values=values,
        constants=dict(
            FIRST=counts[0], SECOND=counts[1], LAST=counts[2], K=width,
            OTHER=count, OTHER_K=other_width, SCALED=one.sums.parts.scaled,
            BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, BLOCK_R=_BLOCK_R, AHEAD=_AHEAD,
        ),
        options=dict(num_warps=4, num_stages=2),
    )  # fmt: skip


def _prepare_norm_gradients(norms: list[_Set]) -> PreparedLaunch:
    widths = [of_set.norm_parts.shape[2] for of_set in norms]
    blocks = [of_set.blocks for of_set in norms]
    return PreparedLaunch(
        _norm_gradients_kernel,
        sum([triton.cdiv(width, _BLOCK_K) for width in widths]),
        tensors=pointers(
            "parts_ptr", "grad_weight_ptr", "grad_bias_ptr", "other_parts_ptr",
            "other_grad_weight_ptr", "other_grad_bias_ptr",
        ),
        values=dict(R=blocks[0], other_R=blocks[1] if len(norms) == 2 else 0),
        constants=dict(
            K=widths[0], OTHER_K=widths[1] if len(norms) == 2 else 0,
            BLOCK_K=_BLOCK_K, BLOCK_R=_BLOCK_R,
        ),
        options=dict(num_warps=4, num_stages=2),
    )  # fmt: skip
