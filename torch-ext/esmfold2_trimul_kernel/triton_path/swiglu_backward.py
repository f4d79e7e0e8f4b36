"""The backward of the transition's gated unit, through the down projection.

    p = z Wg^T + bg, u = z Wu^T + bu, s = sigmoid(p)               [M, H] each
    h = p s u

    dh = G Wd                               of h, from the output's gradient G [M, C]
    dp = dh u s (1 + p (1 - s))             of the gate before silu
    du = dh p s                             of the up projection

p and u come from `swiglu_hidden`, side by side [M, 2, H] in the dtype of x; dp and du take their
memory, so that dz is one product with the projections. h is for the gradient of Wd.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..triton_parts.device import device_target
from ..triton_parts.launch import (
    PreparedLaunch,
    block_of,
    descriptor_of,
    dot_precision,
    has_descriptor,
    pointers,
    setting_of,
)
from ..triton_parts.settings import LaunchConfig
from ..triton_parts.split_operands import FP16X3, scaled
from ..triton_parts.split_rows import multiply_rows
from ..triton_parts.tiles import halves, load_tile, sigmoid, store_tile


@triton.jit(do_not_specialize=["M"])
def _swiglu_bwd_kernel(
    grad_ptr, grad, down_turned, scales_ptr, pair, hidden, M,
    C: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, FAST_RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """dp, du and h of one [BLOCK_M, BLOCK_N] tile of rows and hidden channels. K = C channels of G.

    `down_turned` is Wd^T [H, C]. `pair` [M, 2, H] holds p and u, and then dp and du. h may be None.
    With PRECISION "fp16x3" Wd^T is split, and its rows' scales are the last H of 3H.
    """
    TILES_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tile_m = tl.program_id(0) // TILES_N
    start_n = (tl.program_id(0) - tile_m * TILES_N) * BLOCK_N
    start_m = tile_m * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    valid_m = offs_m < M
    row = offs_m.to(tl.int64)
    acc = multiply_rows(
        grad_ptr, grad, down_turned, C, start_m, start_n, valid_m, C,
        H, C, BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
    )  # fmt: skip

    dtype = grad_ptr.dtype.element_ty
    # Half of the columns at a time: all would take twice the registers.
    EVEN_H: tl.constexpr = H % BLOCK_N == 0
    if PRECISION == "fp16x3":
        acc = scaled(acc, scales_ptr, 2 * H + start_n + tl.arange(0, BLOCK_N), 3 * H)
    parts = halves(acc)
    WIDTH: tl.constexpr = BLOCK_N // 2
    for half in tl.static_range(2):
        first_n = start_n + half * WIDTH
        offs_n = first_n + tl.arange(0, WIDTH)
        if DESCRIPTORS:
            gate = pair.load([start_m, 0, first_n]).reshape(BLOCK_M, WIDTH)
            up = pair.load([start_m, 1, first_n]).reshape(BLOCK_M, WIDTH)
        else:
            gate = load_tile(pair, row * 2 * H, offs_n, 1, valid_m, H, EVEN_H)
            up = load_tile(pair + H, row * 2 * H, offs_n, 1, valid_m, H, EVEN_H)
        gate, up = gate.to(tl.float32), up.to(tl.float32)
        share = sigmoid(gate, FAST_RECIPROCAL)
        silu = gate * share
        grad_gate = (parts[half] * up * share * (1.0 + gate * (1.0 - share))).to(dtype)
        grad_up = (parts[half] * silu).to(dtype)
        if DESCRIPTORS:
            pair.store([start_m, 0, first_n], grad_gate.reshape(BLOCK_M, 1, WIDTH))
            pair.store([start_m, 1, first_n], grad_up.reshape(BLOCK_M, 1, WIDTH))
        else:
            store_tile(pair, row * 2 * H, offs_n, grad_gate, valid_m, H, EVEN_H)
            store_tile(pair + H, row * 2 * H, offs_n, grad_up, valid_m, H, EVEN_H)
        if hidden is not None:
            if DESCRIPTORS:
                hidden.store([start_m, first_n], (silu * up).to(dtype))
            else:
                store_tile(hidden, row * H, offs_n, (silu * up).to(dtype), valid_m, H, EVEN_H)


def swiglu_bwd(
    grad_out: Tensor,
    down_turned: Tensor,
    pair: Tensor,
    hidden: Tensor | None,
    prepared: PreparedLaunch,
    scales: Tensor | None = None,
) -> None:
    """Overwrites pair [M, 2H], p and u, with dp and du; fills hidden where given.

    Args:
        grad_out: [M, C], contiguous, in the dtype of x.
        down_turned: Wd^T [H, C], contiguous; split with "fp16x3", with its rows' scales the last
            of `scales` [4, 3H].
        hidden: h [M, H] in the dtype of x.
        prepared: from `prepare_swiglu_bwd` for tensors like these.
    """
    prepared.launch(
        grad_ptr=grad_out,
        grad=grad_out,
        down_turned=down_turned,
        scales_ptr=scales,
        pair=pair,
        hidden=hidden,
    )


def prepare_swiglu_bwd(
    grad_out: Tensor,
    down_turned: Tensor,
    pair: Tensor,
    hidden: Tensor | None,
    precision: str,
    config: LaunchConfig | None = None,
) -> PreparedLaunch:
    """The launch of `swiglu_bwd` for tensors like these."""
    (rows, channels), width, split = grad_out.shape, pair.shape[1] // 2, precision == FP16X3
    device = device_target(grad_out.device)
    if config is None:
        config = setting_of("swiglu_bwd", grad_out, channels, math.isqrt(rows), split=split)
    block_n = block_of(config.block_n, width)
    block_k = block_of(config.block_k, channels)
    made = pair.view(rows, 2, width)
    descriptors = config.descriptors and all([
        has_descriptor(tensor, stored)
        for tensor, stored in (
            (grad_out, False), (down_turned, False), (made, True), (hidden, True)
        )
        if tensor is not None
    ])
    tensors = pointers("grad_ptr", "grad", "down_turned", "scales_ptr", "pair", "hidden")
    if descriptors:
        tile = [config.block_m, block_n // 2]
        tensors |= {
            "grad": descriptor_of(
                grad_out, [rows, channels], [channels, 1], [config.block_m, block_k]
            ),
            "down_turned": descriptor_of(
                down_turned, down_turned.shape, [channels, 1], [block_n, block_k]
            ),
            "pair": descriptor_of(made, made.shape, made.stride(), [tile[0], 1, tile[1]]),
        }
        if hidden is not None:
            tensors["hidden"] = descriptor_of(hidden, [rows, width], [width, 1], tile)
    return PreparedLaunch(
        _swiglu_bwd_kernel,
        triton.cdiv(rows, config.block_m) * triton.cdiv(width, block_n),
        tensors=tensors,
        values=dict(M=rows),
        constants=dict(
            C=channels, H=width,
            BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            DESCRIPTORS=descriptors,
            PRECISION=dot_precision(precision, device.fp32_dots, config.fp32_dot),
            FAST_RECIPROCAL=device.fast_reciprocal,
        ),
        options=config.options(),
    )  # fmt: skip
