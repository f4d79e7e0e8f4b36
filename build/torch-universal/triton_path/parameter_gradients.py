"""The gradients of projections of normalised rows, and of the norm, from sums over the rows.

    rows = (g h + b) W^T + bias     h [M, K] normalised without norm weights, W [N, K]
    S = d^T h, s = sum d            d [M, N] the rows' gradient; S and s come in parts

    dW = S g + s b^T,   dbias = s,   dg = sum over n of W S,   db = sum over n of W s

The parts are of `row_products`. W is up to three projections, one above the other. One kernel adds
the parts, in their order, and writes dW and each block's share of dg and db; another adds the
shares. All sums are in fp32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_parts.launch import Launches, PreparedLaunch, pointers
from ..triton_parts.tiles import load_channels, load_tile, store_tile
from .row_products import RowParts

_BLOCK_N = 16
_BLOCK_K = 64
_BLOCK_R = 32


@triton.jit(do_not_specialize=["P", "last_P"])
def _projection_gradients_kernel(
    parts_ptr, sums_ptr, last_sums_ptr, norm_weight_ptr, norm_bias_ptr,
    first_ptr, second_ptr, last_ptr, grad_first_ptr, grad_second_ptr, grad_last_ptr,
    totals_ptr, norm_parts_ptr, P, last_P,
    stride_sums, last_stride_sums, stride_first, stride_second, stride_last,
    FIRST: tl.constexpr, SECOND: tl.constexpr, LAST: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_N, BLOCK_K] tile of dW of one of three projections, of FIRST, SECOND, LAST rows.

    parts [P, FIRST + SECOND + LAST, K]; sums [P, ...] of the rows of the first two, and last_sums
    [last_P, ...] of the last. `totals` [FIRST + SECOND + LAST] are s. The shares of dg and db are
    norm_parts [blocks, 2, K].
    """
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    BEFORE_SECOND: tl.constexpr = (FIRST + BLOCK_N - 1) // BLOCK_N
    BEFORE_LAST: tl.constexpr = BEFORE_SECOND + (SECOND + BLOCK_N - 1) // BLOCK_N
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    block = tl.program_id(0) // BLOCKS_K
    start_k = (tl.program_id(0) - block * BLOCKS_K) * BLOCK_K
    offs_k = start_k + tl.arange(0, BLOCK_K)
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
    offs_n = (block - before) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid_n = offs_n < count
    row = (base + offs_n).to(tl.int64)

    some_sums = tl.where(is_last, last_sums_ptr, sums_ptr) + tl.where(is_last, 0, base)
    stride_some = tl.where(is_last, last_stride_sums, stride_sums).to(tl.int64)
    end = tl.where(is_last, last_P, P)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, end, BLOCK_R):
        part = start + tl.arange(0, BLOCK_R)
        valid = (part < end)[:, None] & valid_n[None, :]
        ptrs = some_sums + (part * stride_some)[:, None] + offs_n[None, :]
        sums += tl.sum(tl.load(ptrs, mask=valid, other=0.0), 0)
    if start_k == 0:
        tl.store(totals_ptr + row, sums, mask=valid_n)

    products = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, P, 8):
        for ahead in tl.static_range(8):  # loaded together, added in order
            offs_part = (row + (start + ahead) * (FIRST + SECOND + LAST)) * K
            valid = valid_n & (start + ahead < P)
            products += load_tile(parts_ptr, offs_part, offs_k, 1, valid, K, EVEN_K)
    grad = products * load_channels(norm_weight_ptr, offs_k, 1.0, K, EVEN_K)
    if norm_bias_ptr is not None:
        grad += sums[:, None] * load_channels(norm_bias_ptr, offs_k, 0.0, K, EVEN_K)
    rounded = grad.to(grad_ptr.dtype.element_ty)
    store_tile(grad_ptr, offs_n.to(tl.int64) * K, offs_k, rounded, valid_n, K, EVEN_K)
    if norm_parts_ptr is not None:
        offs_weight = offs_n.to(tl.int64) * stride
        weight = load_tile(weight_ptr, offs_weight, offs_k, 1, valid_n, K, EVEN_K).to(tl.float32)
        ptrs = norm_parts_ptr + block * 2 * K + offs_k
        tl.store(ptrs, tl.sum(products * weight, 0), mask=offs_k < K)
        tl.store(ptrs + K, tl.sum(sums[:, None] * weight, 0), mask=offs_k < K)


@triton.jit(do_not_specialize=["R"])
def _norm_gradients_kernel(
    parts_ptr, grad_weight_ptr, grad_bias_ptr, R,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dg and db, either of them optional, at BLOCK_K channels: the sums of parts [R, 2, K]."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
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


def gradients_of_projections(
    launches: Launches,
    names: Projections,
    weights: NamedTuple,
    parts: RowParts,
    last_sums: Tensor | None,
    needs: frozenset[str],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The gradients that `needs` names of projections, their biases, and the norm.

    Each has the parameter's dtype, or `dtype`, and memory of its own.

    Args:
        weights: the call's; projections have unit last stride and one dtype.
        parts: of the rows' gradient, its products with the normalised rows, and its sums [P, ...].
        last_sums: the sums [P', N] of the last projection's rows, if they are not in `parts`.
    """
    given = [getattr(weights, name) for name in names.weights]
    norm_weight = norm_bias = None
    if names.norm is not None:
        norm_weight = getattr(weights, f"{names.norm}_weight")
        norm_bias = getattr(weights, f"{names.norm}_bias")
    grads = [torch.empty(w.shape, dtype=dtype or w.dtype, device=w.device) for w in given]
    counts = [weight.shape[0] for weight in given]
    total, width = parts.products.shape[1:]
    if last_sums is None:
        last_sums = parts.sums[:, total - counts[-1] :]
    # The last projection, and up to two before it; those that are not there have no rows.
    absent = 3 - len(given)
    counts = counts[:-1] + [0] * absent + counts[-1:]
    three, three_grads = (some[:-1] + some[-1:] * (1 + absent) for some in (given, grads))
    blocks = sum([-(-count // _BLOCK_N) for count in counts])
    sums = torch.empty(total, dtype=torch.float32, device=parts.products.device)
    norm_parts = None if norm_weight is norm_bias is None else sums.new_empty(blocks, 2, width)
    prepared = launches.of(
        ("projection_gradients", names), _prepare_projection_gradients, blocks, counts, three,
        parts, last_sums,
    )  # fmt: skip
    prepared.launch(
        parts_ptr=parts.products,
        sums_ptr=parts.sums,
        last_sums_ptr=last_sums,
        norm_weight_ptr=norm_weight,
        norm_bias_ptr=norm_bias,
        first_ptr=three[0],
        second_ptr=three[1],
        last_ptr=three[2],
        grad_first_ptr=three_grads[0],
        grad_second_ptr=three_grads[1],
        grad_last_ptr=three_grads[2],
        totals_ptr=sums,
        norm_parts_ptr=norm_parts,
    )
    found = dict(zip(names.weights, grads, strict=True))
    row = 0
    for name, weight in zip(names.weights, given, strict=True):
        bias = name.replace("weight", "bias")
        if bias in needs:
            of_bias = sums[row : row + weight.shape[0]]
            found[bias] = of_bias.to(dtype or getattr(weights, bias).dtype, copy=True)
        row += weight.shape[0]
    if norm_parts is not None:
        made = [
            None if norm is None else torch.empty_like(norm, dtype=dtype)
            for norm in (norm_weight, norm_bias)
        ]
        found |= {f"{names.norm}_weight": made[0], f"{names.norm}_bias": made[1]}
        prepared = launches.of(("norm_gradients", names), _prepare_norm_gradients, blocks, width)
        prepared.launch(parts_ptr=norm_parts, grad_weight_ptr=made[0], grad_bias_ptr=made[1])
    return {name: gradient for name, gradient in found.items() if name in needs}


def _prepare_projection_gradients(
    blocks: int, counts: list[int], three: list[Tensor], parts: RowParts, last_sums: Tensor
) -> PreparedLaunch:
    width = parts.products.shape[2]
    return PreparedLaunch(
        _projection_gradients_kernel,
        blocks * triton.cdiv(width, _BLOCK_K),
        tensors=pointers(
            "parts_ptr", "sums_ptr", "last_sums_ptr", "norm_weight_ptr", "norm_bias_ptr",
            "first_ptr", "second_ptr", "last_ptr", "grad_first_ptr", "grad_second_ptr",
            "grad_last_ptr", "totals_ptr", "norm_parts_ptr",
        ),
        values=dict(
            P=parts.products.shape[0], last_P=last_sums.shape[0],
            stride_sums=parts.sums.stride(0), last_stride_sums=last_sums.stride(0),
            stride_first=three[0].stride(0), stride_second=three[1].stride(0),
            stride_last=three[2].stride(0),
        ),
        constants=dict(
            FIRST=counts[0], SECOND=counts[1], LAST=counts[2], K=width,
            BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, BLOCK_R=_BLOCK_R,
        ),
        options=dict(num_warps=4, num_stages=2),
    )  # fmt: skip


def _prepare_norm_gradients(blocks: int, width: int) -> PreparedLaunch:
    return PreparedLaunch(
        _norm_gradients_kernel,
        triton.cdiv(width, _BLOCK_K),
        tensors=pointers("parts_ptr", "grad_weight_ptr", "grad_bias_ptr"),
        values=dict(R=blocks),
        constants=dict(K=width, BLOCK_K=_BLOCK_K, BLOCK_R=_BLOCK_R),
        options=dict(num_warps=4, num_stages=2),
    )
