"""float32 operands of dots as two float16 numbers, split once: three products at 16 bits' speed.

    v = high + low / 2^s,  high = fp16(v),  low = fp16(2^s (v - high))
    a b = high_a high_b + (high_a low_b + low_a high_b) / 2^s         to 22 bits, in three products

float16 has few exponents, so every operand is first multiplied by a power of two:

- a normalised row, |x^| <= sqrt(K), by 2^10; the norm's weight and bias go into the projection
- a row of W' = W diag(g) by its own, so that its largest element is between 2^14 and 2^15
- a plane of a, or of b, by its own, so that a bound of its elements is below 2^15: with
  c = W b + bias, |x^ W'^T + c| <= sqrt(K) |W'| + |c|, and a gate or a mask is at most 1

What a plane holds may lie far below its bound, as where gates are shut. Its low numbers are 2^11
times as large (s = 11), and stage 2 sums their products in an accumulator of their own: 22 bits are
right down to 2^-28 of the bound. Elsewhere s = 0, and one accumulator serves all three.

The scales are made with the split weights, from the parameters alone, by one launch for a call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._call import Call, Weights
from .device import device_target
from .launch import Launches, PreparedLaunch, pointers
from .settings import settings_of
from .tiles import load_channels, load_weight

FP16X3 = "fp16x3"  # the precision of a call of these products, beside Triton's own words
_MAX_WIDTH = 256  # the widest rows that stage 1 holds in registers
_BLOCK_N = 16
_PROJECTIONS = ("p_in_weight", "g_in_weight", "p_out_weight", "g_out_weight")
_UNIT_EXPONENT = tl.constexpr(10)  # of the power of two of normalised rows
_LOW = tl.constexpr(2.0**11)  # of the low numbers of planes


def refusal(call: Call, keeps_planes: bool) -> str | None:
    """Why a forward in float32 can't have these products; None if it can."""
    device, widths = device_target(call.x.device), (call.x.shape[-1], call.hidden)
    if "split" not in settings_of(device.target, device.name)["fused_dual_gemm"]:
        return f"{device.target} has no settings for it"
    if keeps_planes:
        return "a and b are kept for a backward, which takes no split numbers"
    if call.mask is not None and call.mask.dtype != torch.bool:
        return "the mask is not bool, so nothing bounds its values"
    if max(widths) > _MAX_WIDTH or any([width % 16 for width in widths]):
        return f"C and D must be multiples of 16, at most {_MAX_WIDTH}; got C, D = {widths}"
    return None


@triton.jit
def split_tile(x):
    """x in fp32 as two tiles in fp16 whose sum it is, to 22 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def split_plane(x):
    """x in fp32 as two tiles in fp16, the second `_LOW` times as large."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * _LOW).to(tl.float16)


@triton.jit
def unit_rows(rstd):
    """1 / deviation of rows, for normalised rows as `dot_split` takes them."""
    return rstd * (2**_UNIT_EXPONENT)


@triton.jit
def dot_split(high, low, weight_high, weight_low, acc):
    """acc + (high + low) @ (weight_high + weight_low).T in fp32, the smaller products first."""
    acc = tl.dot(low, weight_high.T, acc)
    acc = tl.dot(high, weight_low.T, acc)
    return tl.dot(high, weight_high.T, acc)


@triton.jit
def scaled(acc, scales_ptr, rows, TOTAL: tl.constexpr):
    """acc [M, N] of `dot_split` in its own scale, and with its constant; rows [N] of TOTAL."""
    factor = tl.load(scales_ptr + rows, mask=rows < TOTAL, other=0.0)
    constant = tl.load(scales_ptr + TOTAL + rows, mask=rows < TOTAL, other=0.0)
    return acc * factor[None, :] + constant[None, :]


@triton.jit
def product_of_planes(acc, acc_low, exponents_ptr, stride_exponents, channel):
    """The product of a channel's planes: acc of their high numbers, acc_low of those with low ones.
    """
    exponent = tl.load(exponents_ptr + channel) + tl.load(
        exponents_ptr + stride_exponents + channel
    )
    exponent = exponent.to(tl.int32)
    first = exponent >> 1  # in two steps, neither of which leaves the exponents of fp32
    return (acc + acc_low * (1.0 / _LOW)) * _power_of_two(-first) * _power_of_two(first - exponent)


@triton.jit
def _power_of_two(exponent):
    """2^exponent for exponents between -126 and 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponent_of(x):
    """The largest integer whose power of two is not above x >= 0; -127 for 0, 128 for infinity."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def _split_weights_kernel(
    p_in_weight_ptr, g_in_weight_ptr, p_out_weight_ptr, g_out_weight_ptr,
    norm_in_weight_ptr, norm_in_bias_ptr, norm_out_weight_ptr, norm_out_bias_ptr,
    p_in_bias_ptr, g_in_bias_ptr, p_out_bias_ptr, g_out_bias_ptr, split_ptr, scales_ptr,
    stride_p_in_weight, stride_g_in_weight, stride_p_out_weight, stride_g_out_weight,
    C: tl.constexpr, D: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one of the four projections: split, their scales and constants.

    C and D are multiples of BLOCK_N.
    """
    start = tl.program_id(0) * BLOCK_N  # of the rows of all four
    TOTAL: tl.constexpr = 4 * D + 2 * C
    if start < 2 * D:
        _split_rows(
            p_in_weight_ptr, stride_p_in_weight, norm_in_weight_ptr, norm_in_bias_ptr,
            p_in_bias_ptr, split_ptr, scales_ptr, start, 0,
            2 * D, C, TOTAL, BLOCK_N, BLOCK_C, True,
        )  # fmt: skip
    elif start < 4 * D:
        _split_rows(
            g_in_weight_ptr, stride_g_in_weight, norm_in_weight_ptr, norm_in_bias_ptr,
            g_in_bias_ptr, split_ptr + 4 * D * C, scales_ptr, start, 2 * D,
            2 * D, C, TOTAL, BLOCK_N, BLOCK_C, False,
        )  # fmt: skip
    elif start < 4 * D + C:
        _split_rows(
            p_out_weight_ptr, stride_p_out_weight, norm_out_weight_ptr, norm_out_bias_ptr,
            p_out_bias_ptr, split_ptr + 8 * D * C, scales_ptr, start, 4 * D,
            C, D, TOTAL, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
    else:
        _split_rows(
            g_out_weight_ptr, stride_g_out_weight, norm_in_weight_ptr, norm_in_bias_ptr,
            g_out_bias_ptr, split_ptr + 10 * D * C, scales_ptr, start, 4 * D + C,
            C, C, TOTAL, BLOCK_N, BLOCK_C, False,
        )  # fmt: skip


@triton.jit
def _split_rows(
    weight_ptr, stride_weight, norm_ptr, norm_bias_ptr, bias_ptr, split_ptr, scales_ptr,
    start, first, N: tl.constexpr, K: tl.constexpr, TOTAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Rows start + [0, BLOCK_N) of the TOTAL, of the projection [N, K] whose first is `first`."""
    start_n = start - first
    offs_n, offs_k = start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weight = load_weight(weight_ptr, start_n, 0, stride_weight, N, K, BLOCK_N, BLOCK_K, False)
    weight = weight.to(tl.float32)
    constant = tl.sum(weight * load_channels(norm_bias_ptr, offs_k, 0.0, K, K == BLOCK_K), 1)
    if bias_ptr is not None:
        constant += tl.load(bias_ptr + offs_n).to(tl.float32)
    weight *= load_channels(norm_ptr, offs_k, 1.0, K, K == BLOCK_K)
    sizes = tl.abs(weight)
    largest = tl.max(tl.where(sizes < float("inf"), sizes, 0.0), 1)
    up = tl.minimum(14 - _exponent_of(largest), 116)
    weight *= _power_of_two(up)[:, None]
    high, low = split_tile(weight)
    low = tl.where(tl.abs(high.to(tl.float32)) < float("inf"), low, 0.0)
    ptrs = split_ptr + (offs_n * K)[:, None] + offs_k[None, :]
    tl.store(ptrs, high, mask=(offs_k < K)[None, :])
    tl.store(ptrs + N * K, low, mask=(offs_k < K)[None, :])

    down = -up - _UNIT_EXPONENT
    ptrs = scales_ptr + start + tl.arange(0, BLOCK_N)
    if PLANES:
        bound = _exponent_of(tl.sqrt(tl.sum(weight * weight, 1) * K)) - up
        bound = tl.maximum(bound, _exponent_of(tl.abs(constant))) + 1
        exponent = tl.maximum(tl.minimum(14 - bound, 126), -126)
        down = tl.maximum(down + exponent, -126)
        constant *= _power_of_two(exponent)
        tl.store(ptrs + 2 * TOTAL, exponent.to(tl.float32))
    tl.store(ptrs, _power_of_two(down))
    tl.store(ptrs + TOTAL, constant)


def split_weights(call: Call, launches: Launches) -> tuple[Call, Tensor | None]:
    """The call with split parameters, and their scales; as it is unless its precision is "fp16x3".

    Of a projection [N, K] then high [N, K] and low [N, K] lie one behind the other, and there are
    neither norm weights nor biases. The scales [3, 4D + 2C] in float32 are, for the rows of p_in,
    g_in, p_out and g_out: factors of the products, constants to be added, and, of p_in, the
    exponents of the planes' powers of two.
    """
    if call.precision != FP16X3:
        return call, None
    weights, device, channels, hidden = call.weights, call.x.device, call.x.shape[-1], call.hidden
    rows = 2 * hidden, 2 * hidden, channels, channels
    widths = channels, channels, hidden, channels
    sizes = [2 * n * k for n, k in zip(rows, widths, strict=True)]
    memory = launches.empty("split weights", (sum(sizes),), torch.float16, device)
    scales = launches.empty("scales", (3, sum(rows)), torch.float32, device)
    launches.of(("split_weights",), _prepare, call).launch(
        **{f"{name}_ptr": value for name, value in weights._asdict().items()},
        split_ptr=memory,
        scales_ptr=scales,
    )
    parts = [part.view(-1, k) for part, k in zip(memory.split(sizes), widths, strict=True)]
    split = dict.fromkeys(Weights._fields) | dict(zip(_PROJECTIONS, parts, strict=True))
    return call._replace(weights=Weights(**split)), scales


def exponents_of(scales: Tensor | None, hidden: int, channels: slice) -> Tensor | None:
    """The exponents of the powers of two of some channels' a and b, [2, G]."""
    return None if scales is None else scales[2, : 2 * hidden].view(2, hidden)[:, channels]


def _prepare(call: Call) -> PreparedLaunch:
    """The launch of `split_weights` for calls like this one."""
    weights, channels, hidden = call.weights, call.x.shape[-1], call.hidden
    return PreparedLaunch(
        _split_weights_kernel,
        (4 * hidden + 2 * channels) // _BLOCK_N,
        tensors=pointers(*[f"{name}_ptr" for name in Weights._fields], "split_ptr", "scales_ptr"),
        values={f"stride_{name}": getattr(weights, name).stride(0) for name in _PROJECTIONS},
        constants=dict(
            C=channels, D=hidden, BLOCK_N=_BLOCK_N,
            BLOCK_C=triton.next_power_of_2(channels), BLOCK_D=triton.next_power_of_2(hidden),
        ),
        options=dict(num_warps=4, num_stages=2),
    )  # fmt: skip
