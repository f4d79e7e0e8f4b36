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
from ..triton_parts.tiles import dot, load_tile, load_weight, quarters, sigmoid, store_tile


@triton.jit(do_not_specialize=["M"])
def _swiglu_bwd_kernel(
    grad_ptr, grad, down_turned, pair_ptr, hidden_ptr, M,
    C: tl.constexpr, H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, FAST_RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """dp, du and h of one [BLOCK_M, BLOCK_N] tile of rows and hidden channels. K = C channels of G.

    `down_turned` is Wd^T [H, C]. `pair` [M, 2, H] holds p and u, and then dp and du. h may be None.
    """
    TILES_N: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    tile_m = tl.program_id(0) // TILES_N
    start_n = (tl.program_id(0) - tile_m * TILES_N) * BLOCK_N
    start_m = tile_m * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    valid_m = offs_m < M
    row = offs_m.to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, C, BLOCK_K):
        if DESCRIPTORS:
            left = grad.load([start_m, start_k])
        else:
            offs_k = start_k + tl.arange(0, BLOCK_K)
            left = load_tile(grad_ptr, row * C, offs_k, 1, valid_m, C, C % BLOCK_K == 0)
        right = load_weight(down_turned, start_n, start_k, C, H, C, BLOCK_N, BLOCK_K, DESCRIPTORS)
        acc = dot(left, right.T, acc, PRECISION)

    # A quarter of the columns at a time: see stage 3.
    dtype = pair_ptr.dtype.element_ty
    EVEN_H: tl.constexpr = H % BLOCK_N == 0
    parts = quarters(acc)
    WIDTH: tl.constexpr = parts[0].shape[1]
    for quarter in tl.static_range(len(parts)):
        offs_n = start_n + quarter * WIDTH + tl.arange(0, WIDTH)
        gate = load_tile(pair_ptr, row * 2 * H, offs_n, 1, valid_m, H, EVEN_H).to(tl.float32)
        up = load_tile(pair_ptr + H, row * 2 * H, offs_n, 1, valid_m, H, EVEN_H).to(tl.float32)
        share = sigmoid(gate, FAST_RECIPROCAL)
        silu = gate * share
        grad_gate = parts[quarter] * up * share * (1.0 + gate * (1.0 - share))
        grad_up = parts[quarter] * silu
        store_tile(pair_ptr, row * 2 * H, offs_n, grad_gate.to(dtype), valid_m, H, EVEN_H)
        store_tile(pair_ptr + H, row * 2 * H, offs_n, grad_up.to(dtype), valid_m, H, EVEN_H)
        if hidden_ptr is not None:
            store_tile(hidden_ptr, row * H, offs_n, (silu * up).to(dtype), valid_m, H, EVEN_H)


def swiglu_bwd(
    grad_out: Tensor,
    down_turned: Tensor,
    pair: Tensor,
    hidden: Tensor | None,
    prepared: PreparedLaunch,
) -> None:
    """Overwrites pair [M, 2H], p and u, with dp and du; fills hidden where given.

    Args:
        grad_out: [M, C], contiguous, in the dtype of x.
        down_turned: Wd^T [H, C], contiguous.
        hidden: h [M, H] in the dtype of x.
        prepared: from `prepare_swiglu_bwd` for tensors like these.
    """
    prepared.launch(
        grad_ptr=grad_out,
        grad=grad_out,
        down_turned=down_turned,
        pair_ptr=pair,
        hidden_ptr=hidden,
    )


def prepare_swiglu_bwd(
    grad_out: Tensor, down_turned: Tensor, precision: str, config: LaunchConfig | None = None
) -> PreparedLaunch:
    """The launch of `swiglu_bwd` for tensors like these."""
    (rows, channels), hidden = grad_out.shape, down_turned.shape[0]
    device = device_target(grad_out.device)
    if config is None:
        config = setting_of("swiglu_bwd", grad_out, channels, math.isqrt(rows))
    block_n = block_of(config.block_n, hidden)
    block_k = block_of(config.block_k, channels)
    descriptors = (
        config.descriptors and has_descriptor(grad_out) and has_descriptor(down_turned)
    )
    grad = turned = None
    if descriptors:
        grad = descriptor_of(grad_out, grad_out.shape, [channels, 1], [config.block_m, block_k])
        turned = descriptor_of(down_turned, [hidden, channels], [channels, 1], [block_n, block_k])
    return PreparedLaunch(
        _swiglu_bwd_kernel,
        triton.cdiv(rows, config.block_m) * triton.cdiv(hidden, block_n),
        tensors=pointers("grad_ptr", "pair_ptr", "hidden_ptr")
        | {"grad": grad, "down_turned": turned},
        values=dict(M=rows),
        constants=dict(
            C=channels, H=hidden,
            BLOCK_M=config.block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            DESCRIPTORS=descriptors,
            PRECISION=dot_precision(precision, device.fp32_dots, config.fp32_dot),
            FAST_RECIPROCAL=device.fast_reciprocal,
        ),
        options=config.options(),
    )  # fmt: skip
