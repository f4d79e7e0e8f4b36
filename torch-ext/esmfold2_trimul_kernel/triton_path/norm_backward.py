"""The backward of the output's LayerNorm, for some rows of one sequence.

    dt = rstd (g2 dn - mean(g2 dn) - t^ mean(g2 dn t^)),   dn = de We      t [D, R, pitch], planes

with t^ = (t - mean) rstd: a GEMM followed by the norm's backward, whose two means come from stage
3's backward.

For a sequence shorter than L, every output is zero at pairs with a residue beyond its length, where
t and the moments may be NaN. Tiles that hold only such pairs write zeros and return.
"""

import torch
import triton
import triton.language as tl

from .. import hopper
from .._call import Weights
from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    PreparedLaunch,
    block_of,
    dot_precision,
    named_strides,
    pointers,
    setting_of,
)
from ..triton_parts.layer_norm import normalise
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.split_operands import Split, multiplied
from ..triton_parts.split_rows import dot_rows, store_hat
from ..triton_parts.tiles import (
    any_of,
    load_channels,
    load_tile,
    positions,
    within_length,
)


@triton.jit(do_not_specialize=["R", "L", "first_row", "lengths_ptr"])
def _norm_out_bwd_kernel(
    grad_emit_ptr, t_ptr, rows_ptr, lengths_ptr, grad_t_ptr, hat_ptr, emit_weight, norm_weight_ptr,
    factors_ptr,
    R, L, pitch, first_row, stride_t_d, stride_t_i, stride_grad_d, stride_grad_i, stride_emit,
    C: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dt = rstd (g2 dn - mean(g2 dn) - t^ mean(g2 dn t^)) of one [BLOCK_M, BLOCK_N] tile, and t^.

    M = R * pitch positions, N = D channels of t, K = C channels of dn = de We. t^ is optional.
    dt may be written over t: a program reads and writes the same elements. Columns
    [L, pitch) of dt become zeros. With PRECISION "fp16x3" We is split numbers, and `factors` are of
    the rows of all projections.
    """
    BLOCKS: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // BLOCKS
    start_n = (tl.program_id(0) - tile * BLOCKS) * BLOCK_N
    start_m = tile * BLOCK_M
    offs_n = start_n + tl.arange(0, BLOCK_N)
    i, j = positions(start_m, pitch, BLOCK_M)
    valid_t = start_m + tl.arange(0, BLOCK_M) < R * pitch
    valid_m = (i < R) & (j < L)
    dtype = t_ptr.dtype.element_ty
    row = i.to(tl.int64) * L + j
    EVEN_D: tl.constexpr = D % BLOCK_N == 0
    offs_grad = tl.max_contiguous(tl.multiple_of(i.to(tl.int64) * stride_grad_i + j, 16), 16)
    if lengths_ptr is not None:
        within = valid_m & within_length(lengths_ptr, 0, first_row + i, j, L)
        if hat_ptr is not None:
            zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            store_hat(hat_ptr, row, offs_n, zeros, valid_m & ~within, D, EVEN_D, PRECISION)
        valid_m = within
        if not any_of(valid_m):
            planes = tl.zeros([BLOCK_N, BLOCK_M], dtype)
            _store_planes(grad_t_ptr, offs_n, offs_grad, stride_grad_d, planes, valid_t, D, EVEN_D)
            return

    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, C, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        grad_emit = load_tile(grad_emit_ptr, row * C, offs_k, 1, valid_m, C, C % BLOCK_K == 0)
        grad = dot_rows(
            grad_emit, emit_weight, factors_ptr, 4 * D, start_k, start_n, stride_emit, grad,
            C, D, BLOCK_N, BLOCK_K, False, PRECISION,
        )  # fmt: skip

    count = R.to(tl.int64) * L
    mean_t = tl.load(rows_ptr + count + row, mask=valid_m, other=0.0)[:, None]
    rstd_t = tl.load(rows_ptr + 2 * count + row, mask=valid_m, other=0.0)[:, None]
    offs_t = tl.max_contiguous(tl.multiple_of(i.to(tl.int64) * stride_t_i + j, 16), 16)
    t = load_tile(t_ptr, offs_t, offs_n, stride_t_d, valid_t, D, EVEN_D).to(tl.float32)
    first_t = None
    if dtype == tl.float32:
        first_t = tl.load(rows_ptr + row, mask=valid_m, other=0.0)[:, None]
    hat = normalise(t, offs_n, first_t, mean_t, rstd_t, None, None, D, EVEN_D)
    if hat_ptr is not None:
        store_hat(hat_ptr, row, offs_n, hat, valid_m, D, EVEN_D, PRECISION)
    mean_grad = tl.load(rows_ptr + 3 * count + row, mask=valid_m, other=0.0)[:, None]
    mean_grad_hat = tl.load(rows_ptr + 4 * count + row, mask=valid_m, other=0.0)[:, None]
    grad *= load_channels(norm_weight_ptr, offs_n, 1.0, D, EVEN_D)
    grad = rstd_t * (grad - mean_grad - hat * mean_grad_hat)
    # The padding columns of t are uninitialised and may be NaN.
    grad = tl.where(valid_m[:, None], grad, 0.0).to(dtype).T  # [BLOCK_N, BLOCK_M]
    _store_planes(grad_t_ptr, offs_n, offs_grad, stride_grad_d, grad, valid_t, D, EVEN_D)


@triton.jit
def _store_planes(
    ptr, offs_n, offs_m, stride_d, tile, valid_t, D: tl.constexpr, EVEN_D: tl.constexpr
):
    """Stores tile [N, M] at channels offs_n of planes, and at offsets offs_m within a plane."""
    ptrs = ptr + (offs_n.to(tl.int64) * stride_d)[:, None] + offs_m[None, :]
    valid = valid_t[None, :]
    if not EVEN_D:
        valid = valid & (offs_n < D)[:, None]
    tl.store(ptrs, tile, mask=valid)


def norm_out_bwd(
    grad_emit: torch.Tensor,
    t: torch.Tensor,
    rows: torch.Tensor,
    weights: Weights,
    prepared: PreparedLaunch,
    grad_t: torch.Tensor,
    hat_t: torch.Tensor | None,
    lengths: torch.Tensor | None = None,
    split: Split | None = None,
) -> None:
    """Fills grad_t [D, R, pitch] and, where given, hat_t [R*L, D] with t^.

    t is [D, R, pitch]; `fused_ln_residual_bwd` wrote grad_emit [R*L, C] and `rows` [5, R*L]. Both
    outputs have the dtype of t, and grad_t may be t. `prepared` is from `prepare_norm_out_bwd` for
    tensors like these. `lengths` [1] int32 is the length of a padded sequence. `split` is of a call
    of split numbers, whose hat_t is [R*L, 2D] in float16: see `store_hat`.
    """
    if prepared.variant == "hopper":
        variant = hopper.kernels("norm_backward")
        variant.launch(prepared, grad_emit, t, rows, weights, grad_t, hat_t)
        return
    prepared.launch(
        grad_emit_ptr=grad_emit,
        t_ptr=t,
        rows_ptr=rows,
        lengths_ptr=lengths,
        grad_t_ptr=grad_t,
        hat_ptr=hat_t,
        emit_weight=multiplied(weights, split).p_out_weight,
        norm_weight_ptr=weights.norm_out_weight,
        factors_ptr=None if split is None else split.factors,
    )


def prepare_norm_out_bwd(
    t: torch.Tensor,
    grad_t: torch.Tensor,
    length: int,
    weights: Weights,
    precision: str,
    config: LaunchConfig | None = None,
    first_row: int = 0,
    padded: bool = False,
    with_hat: bool = True,
    split: Split | None = None,
) -> PreparedLaunch:
    """The launch of `norm_out_bwd` for tensors like these, with L = `length`.

    The first row is row `first_row` of its sequence, which has a length if `padded`. t^ is written
    if `with_hat`. `split` is of a call of split numbers.
    """
    hidden, count, pitch = t.shape
    weight = weights.p_out_weight
    channels = weight.shape[0]
    device = device_target(t.device)
    variants = hopper.variants("norm_backward", "takes", weight, t, grad_t, weight, padded)
    if config is None:
        width = max(channels, hidden)
        config = setting_of("norm_out_bwd", t, width, length, 1, variants, split is not None)
    if hopper.is_variant(config, variants):
        variant = hopper.kernels("norm_backward")
        return variant.prepare(t, grad_t, length, weight, with_hat, config)
    block_n = block_of(config.block_n, hidden)
    block_k = block_of(config.block_k, channels)
    return PreparedLaunch(
        _norm_out_bwd_kernel,
        triton.cdiv(count * pitch, config.block_m) * triton.cdiv(hidden, block_n),
        tensors=pointers(
            "grad_emit_ptr", "t_ptr", "rows_ptr", "lengths_ptr", "grad_t_ptr", "hat_ptr",
            "emit_weight", "norm_weight_ptr", "factors_ptr",
        ),
        values=dict(
            R=count, L=length, pitch=pitch, first_row=first_row,
            stride_emit=multiplied(weights, split).p_out_weight.stride(0),
            **named_strides("t", "di", t.stride()[:2]),
            **named_strides("grad", "di", grad_t.stride()[:2]),
        ),
        constants=dict(
            C=channels, D=hidden, BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            PRECISION=dot_precision(precision, device.fp32_dots),
        ),
        options=config.options(),
    )  # fmt: skip
