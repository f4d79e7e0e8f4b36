"""Stage 1's backward, from dp, dg and dq to dx, for some rows; the transition's is the same.

    dz = dp Wp + dg Wg + dq Wo
    dx = rstd (g1 dz - mean(g1 dz) - x^ mean(g1 dz x^)),   x^ = (x - mean) rstd

    pair [R*L, 2N]: dp and dg side by side, or the gradients of a transition's gates and values
    dq [R*L, C], or none;  x [R, L, C], any strides;  Wp, Wg [N, C], Wo [C, C]

dz stays in registers where a program's block, or few of them, hold a whole row of it. Then dx may
be the memory of dq, because a program reads dq's rows before it writes their dx. Of wider rows each
block of dz is computed twice, for the means and for dx.

For a sequence shorter than L, dx is zero at pairs with a residue beyond its length, where the
moments may be NaN. Tiles that hold only such pairs write zeros and return.
"""

import torch
import triton
import triton.language as tl

from .. import hopper
from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    PreparedLaunch,
    block_of,
    descriptor_of,
    dot_precision,
    has_descriptor,
    is_aligned,
    named_strides,
    pointers,
    setting_of,
    strides,
)
from ..triton_parts.layer_norm import load_first, normalise
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.split_operands import FP16X3
from ..triton_parts.split_rows import dot_rows
from ..triton_parts.tiles import (
    any_of,
    load_channels,
    load_tile,
    positions,
    quarters,
    store_tile,
    store_zeros,
    within_length,
)


@triton.jit(
    do_not_specialize=[
        "R", "L", "first_row", "moments_ptr", "lengths_ptr", "stride_x_i", "stride_x_j",
        "stride_moments_n", "stride_moments_i", "stride_moments_j",
    ]
)  # fmt: skip
def _input_bwd_kernel(
    pair_ptr, pair, gate_ptr, gate, x_ptr, moments_ptr, lengths_ptr,
    first_weight, second_weight, gate_weight, norm_weight_ptr, factors_ptr, grad_x_ptr,
    R, L, first_row, stride_first, stride_second, stride_gate,
    stride_x_i, stride_x_j, stride_x_c, stride_moments_n, stride_moments_i, stride_moments_j,
    C: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    X_ALIGNMENT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_M rows m = i * L + j.

    M = R * L rows, N = C channels in blocks, K = the 2N columns of `pair`, then dq's C. With
    DESCRIPTORS `pair`, `gate` (dq) and the projections are descriptors. With PRECISION "fp16x3" the
    projections are split numbers, whose rows have `factors`: of Wp, of Wg, and C rows on of Wo.
    """
    start_m = tl.program_id(0) * BLOCK_M
    i, j = positions(start_m, L, BLOCK_M)
    valid_m = i < R
    row = i.to(tl.int64) * L + j
    if lengths_ptr is not None:
        within = valid_m & within_length(lengths_ptr, 0, first_row + i, j, L)
        store_zeros(grad_x_ptr, row * C, valid_m & ~within, C, BLOCK_N)
        valid_m = within
        if not any_of(valid_m):
            return
    if PARTS * BLOCK_N >= C:
        grads = ()
        for part in tl.static_range(PARTS):
            grad = _grad_z(
                pair_ptr, pair, gate_ptr, gate, first_weight, second_weight, gate_weight,
                factors_ptr, row, start_m, part * BLOCK_N, valid_m, stride_first, stride_second,
                stride_gate, C, N, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
            )  # fmt: skip
            grads = grads + (grad,)
        # After the products, which need the registers that the rows' positions take.
        offs_x, mean, rstd = _rows_of_x(
            x_ptr, moments_ptr, i, j, valid_m, stride_x_i, stride_x_j,
            stride_moments_n, stride_moments_i, stride_moments_j, X_ALIGNMENT,
        )  # fmt: skip
        mean_grad = tl.zeros([BLOCK_M, 1], tl.float32)
        mean_grad_hat = tl.zeros([BLOCK_M, 1], tl.float32)
        for part in tl.static_range(PARTS):
            of_part, of_part_hat = _means(
                grads[part], part * BLOCK_N, x_ptr, offs_x, stride_x_c, valid_m, mean, rstd,
                norm_weight_ptr, C, BLOCK_N,
            )  # fmt: skip
            mean_grad += of_part
            mean_grad_hat += of_part_hat
        for part in tl.static_range(PARTS):
            _store_grad_x(
                grad_x_ptr, row, grads[part], mean_grad, mean_grad_hat, part * BLOCK_N,
                x_ptr, offs_x, stride_x_c, valid_m, mean, rstd, norm_weight_ptr, C, BLOCK_N,
            )  # fmt: skip
    else:
        offs_x, mean, rstd = _rows_of_x(
            x_ptr, moments_ptr, i, j, valid_m, stride_x_i, stride_x_j,
            stride_moments_n, stride_moments_i, stride_moments_j, X_ALIGNMENT,
        )  # fmt: skip
        mean_grad = tl.zeros([BLOCK_M, 1], tl.float32)
        mean_grad_hat = tl.zeros([BLOCK_M, 1], tl.float32)
        for start_n in range(0, C, BLOCK_N):
            grad = _grad_z(
                pair_ptr, pair, gate_ptr, gate, first_weight, second_weight, gate_weight,
                factors_ptr, row, start_m, start_n, valid_m, stride_first, stride_second,
                stride_gate, C, N, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
            )  # fmt: skip
            of_block, of_block_hat = _means(
                grad, start_n, x_ptr, offs_x, stride_x_c, valid_m, mean, rstd,
                norm_weight_ptr, C, BLOCK_N,
            )  # fmt: skip
            mean_grad += of_block
            mean_grad_hat += of_block_hat
        for start_n in range(0, C, BLOCK_N):
            grad = _grad_z(
                pair_ptr, pair, gate_ptr, gate, first_weight, second_weight, gate_weight,
                factors_ptr, row, start_m, start_n, valid_m, stride_first, stride_second,
                stride_gate, C, N, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
            )  # fmt: skip
            _store_grad_x(
                grad_x_ptr, row, grad, mean_grad, mean_grad_hat, start_n,
                x_ptr, offs_x, stride_x_c, valid_m, mean, rstd, norm_weight_ptr, C, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _rows_of_x(
    x_ptr, moments_ptr, i, j, valid_m, stride_x_i, stride_x_j,
    stride_moments_n, stride_moments_i, stride_moments_j, X_ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """The rows' offsets, means and 1 / std."""
    offs_x = i.to(tl.int64) * stride_x_i + j.to(tl.int64) * stride_x_j
    offs_x = tl.multiple_of(offs_x, X_ALIGNMENT)
    mean_ptrs = moments_ptr + i.to(tl.int64) * stride_moments_i + j.to(tl.int64) * stride_moments_j
    mean = tl.load(mean_ptrs, mask=valid_m, other=0.0)[:, None]
    rstd = tl.load(mean_ptrs + stride_moments_n, mask=valid_m, other=0.0)[:, None]
    return offs_x, mean, rstd


@triton.jit
def _means(
    grad, start_n, x_ptr, offs_x, stride_x_c, valid_m, mean, rstd, norm_weight_ptr,
    C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The share of a block dz [M, N] in mean(g1 dz) and mean(g1 dz x^), [M, 1] each."""
    EVEN: tl.constexpr = C % BLOCK_N == 0
    mean_grad = tl.zeros([grad.shape[0], 1], tl.float32)
    mean_grad_hat = tl.zeros([grad.shape[0], 1], tl.float32)
    # A quarter of the columns at a time: x has a layout of its own, see stage 3.
    parts = quarters(grad)
    first = None
    if x_ptr.dtype.element_ty == tl.float32:
        first = load_first(x_ptr, offs_x, valid_m)
    for quarter in tl.static_range(len(parts)):
        offs_n = start_n + quarter * parts[0].shape[1] + tl.arange(0, parts[0].shape[1])
        x = load_tile(x_ptr, offs_x, offs_n, stride_x_c, valid_m, C, EVEN).to(tl.float32)
        hat = normalise(x, offs_n, first, mean, rstd, None, None, C, EVEN)
        scaled = parts[quarter] * load_channels(norm_weight_ptr, offs_n, 1.0, C, EVEN)
        mean_grad += tl.sum(scaled, 1, keep_dims=True) * (1.0 / C)
        mean_grad_hat += tl.sum(scaled * hat, 1, keep_dims=True) * (1.0 / C)
    return mean_grad, mean_grad_hat


@triton.jit
def _store_grad_x(
    grad_x_ptr, row, grad, mean_grad, mean_grad_hat, start_n,
    x_ptr, offs_x, stride_x_c, valid_m, mean, rstd, norm_weight_ptr,
    C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores dx of a block dz [M, N]."""
    EVEN: tl.constexpr = C % BLOCK_N == 0
    parts = quarters(grad)
    first = None
    if x_ptr.dtype.element_ty == tl.float32:
        first = load_first(x_ptr, offs_x, valid_m)
    for quarter in tl.static_range(len(parts)):
        offs_n = start_n + quarter * parts[0].shape[1] + tl.arange(0, parts[0].shape[1])
        x = load_tile(x_ptr, offs_x, offs_n, stride_x_c, valid_m, C, EVEN).to(tl.float32)
        hat = normalise(x, offs_n, first, mean, rstd, None, None, C, EVEN)
        scaled = parts[quarter] * load_channels(norm_weight_ptr, offs_n, 1.0, C, EVEN)
        grad_x = rstd * (scaled - mean_grad - hat * mean_grad_hat)
        rounded = grad_x.to(x_ptr.dtype.element_ty)
        store_tile(grad_x_ptr, row * C, offs_n, rounded, valid_m, C, EVEN)


@triton.jit
def _grad_z(
    pair_ptr, pair, gate_ptr, gate, first_weight, second_weight, gate_weight, factors_ptr,
    row, start_m, start_n, valid_m, stride_first, stride_second, stride_gate,
    C: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of dz in fp32, channels from start_n on."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for which in tl.static_range(2):
        for start_k in range(0, N, BLOCK_K):
            if DESCRIPTORS:
                rows = pair.load([start_m, which * N + start_k])
            else:
                offs_k = start_k + tl.arange(0, BLOCK_K)
                rows = load_tile(
                    pair_ptr + which * N, row * (2 * N), offs_k, 1, valid_m, N, N % BLOCK_K == 0
                )
            if which == 0:
                acc = dot_rows(
                    rows, first_weight, factors_ptr, 0, start_k, start_n, stride_first, acc,
                    N, C, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
                )  # fmt: skip
            else:
                acc = dot_rows(
                    rows, second_weight, factors_ptr, N, start_k, start_n, stride_second, acc,
                    N, C, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
                )  # fmt: skip
    if gate_ptr is not None:
        for start_k in range(0, C, BLOCK_K):
            if DESCRIPTORS:
                rows = gate.load([start_m, start_k])
            else:
                offs_k = start_k + tl.arange(0, BLOCK_K)
                rows = load_tile(gate_ptr, row * C, offs_k, 1, valid_m, C, C % BLOCK_K == 0)
            acc = dot_rows(
                rows, gate_weight, factors_ptr, 2 * N + C, start_k, start_n, stride_gate, acc,
                C, C, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
            )  # fmt: skip
    return acc


def input_bwd(
    pair: torch.Tensor,
    gate: torch.Tensor | None,
    x: torch.Tensor,
    moments: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    norm_weight: torch.Tensor | None,
    grad_x: torch.Tensor,
    prepared: PreparedLaunch,
    lengths: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> None:
    """Fills grad_x [R, L, C], contiguous, from pair [R*L, 2N] and gate [R*L, C], dq.

    grad_x may be the gate's memory if `holds_rows`. x is [R, L, C], moments [2, R, L], weights are
    Wp, Wg and Wo. `prepared` is from `prepare_input_bwd` for tensors like these. `lengths` [1]
    int32 is the length of a padded sequence. `factors` are of the rows of split weights: of Wp, of
    Wg, and C rows on of Wo.
    """
    if prepared.variant == "hopper":
        variant = hopper.kernels("input_backward")
        variant.launch(prepared, pair, gate, x, moments, weights, norm_weight, grad_x)
        return
    prepared.launch(
        pair_ptr=pair,
        pair=pair,
        gate_ptr=gate,
        gate=gate,
        x_ptr=x,
        moments_ptr=moments,
        lengths_ptr=lengths,
        first_weight=weights[0],
        second_weight=weights[1],
        gate_weight=weights[-1],
        norm_weight_ptr=norm_weight,
        factors_ptr=factors,
        grad_x_ptr=grad_x,
    )


def holds_rows(x: torch.Tensor, precision: str) -> bool:
    """Whether a program holds whole rows of dz for x [..., L, C]: then dx may overwrite dq."""
    channels, split = x.shape[-1], precision == FP16X3
    config = setting_of("input_bwd", x, channels, x.shape[-2], split=split)
    return config.split * config.block_n >= channels


def prepare_input_bwd(
    pair: torch.Tensor,
    gate: torch.Tensor | None,
    x: torch.Tensor,
    moments: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    precision: str,
    config: LaunchConfig | None = None,
    first_row: int = 0,
    padded: bool = False,
) -> PreparedLaunch:
    """The launch of `input_bwd` for tensors like these.

    They begin at row `first_row`, of a sequence with a length if `padded`.
    """
    count, length, channels = x.shape
    width = pair.shape[1] // 2
    device = device_target(x.device)
    variants = hopper.variants("input_backward", "takes", x, pair, gate, x, weights, padded)
    if config is None:
        split = precision == FP16X3
        config = setting_of("input_bwd", x, channels, length, 1, variants, split)
    if hopper.is_variant(config, variants):
        variant = hopper.kernels("input_backward")
        return variant.prepare(pair, gate, x, moments, weights, config)
    block_m = config.block_m
    block_n = block_of(config.block_n, channels)
    block_k = block_of(config.block_k, max(channels, width))
    rows = {"pair": pair, "gate": gate}
    named = dict(zip(("first_weight", "second_weight"), weights, strict=False))
    named["gate_weight"] = weights[-1]
    operands = [tensor for tensor in (*rows.values(), *weights) if tensor is not None]
    # A block of dp's columns must not reach into dg's.
    descriptors = config.descriptors and width % block_k == 0 and all(map(has_descriptor, operands))
    arguments = dict.fromkeys((*rows, *named))
    if descriptors:
        arguments |= {
            name: descriptor_of(tensor, tensor.shape, tensor.stride(), [block_m, block_k])
            for name, tensor in rows.items()
            if tensor is not None
        } | {
            name: descriptor_of(tensor, tensor.shape, tensor.stride(), [block_k, block_n])
            for name, tensor in named.items()
        }  # fmt: skip
    return PreparedLaunch(
        _input_bwd_kernel,
        triton.cdiv(count * length, block_m),
        tensors=pointers(
            "pair_ptr", "gate_ptr", "x_ptr", "moments_ptr", "lengths_ptr", "norm_weight_ptr",
            "factors_ptr", "grad_x_ptr",
        ) | arguments,
        values=dict(
            R=count, L=length, first_row=first_row,
            stride_first=weights[0].stride(0), stride_second=weights[1].stride(0),
            stride_gate=weights[-1].stride(0),
            **named_strides("x", "ijc", strides(x)),
            **named_strides("moments", "nij", moments.stride()),
        ),
        constants=dict(
            C=channels, N=width, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            PARTS=min(config.split, triton.cdiv(channels, block_n)),
            X_ALIGNMENT=16 // x.element_size() if is_aligned(x) else 1,
            DESCRIPTORS=descriptors,
            PRECISION=dot_precision(precision, device.fp32_dots, config.fp32_dot),
        ),
        options=config.options(),
    )  # fmt: skip
