"""float32 operands of dots as two float16 numbers, split once: three products at 16 bits' speed.

    v = high + low / 2^s,  high = fp16(v),  low = fp16(2^s (v - high))
    a b = high_a high_b + (high_a low_b + low_a high_b) / 2^s         to 22 bits, in three products

Tensor cores truncate whatever they add to an accumulator. So they sum blocks of a setting's BLOCK_K
alone, and blocks are added in fp32. Within a block the products with low numbers come first, while
the sum is small.

float16 has few exponents, so every operand is multiplied by a power of two:

- normalised rows, so that sqrt(K) times the norm's largest weight and its largest bias stay below
  2^15: what is given to the kernels are a norm's weights and biases times that power; those of t
  also by one of their own, if they are small (`exponents_of_rows`)
- a row of a projection by its own, so that its largest element is between 2^14 and 2^15
- a plane of a, or of b, by its own, so that a bound of its elements is below 2^15:
  |z W^T + bias| <= sqrt(K) |W diag(g)| + |W b| + |bias|, and a gate is at most 1
- a row of all planes, by that of the mask if its dtype is not bool, which may have any values

What a plane holds may lie far below its bound, as where gates are shut. Its low numbers are 2^11
times as large (s = 11), and stage 2 sums their products in an accumulator of their own: 22 bits are
right down to 2^-28 of the bound. Elsewhere s = 0.

The scales are made with the split weights, from the parameters, by one launch of a forward and one
of a backward; those of a mask by another.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._call import Call, Transition, Weights
from .device import device_target
from .launch import Launches, PreparedLaunch, named_strides, pointers, strides
from .settings import settings_of
from .tiles import dot, length_of, load_weight, padded_pitch

FP16X3 = "fp16x3"  # the precision of a call of these products, beside Triton's own words
_MAX_WIDTH = 256  # the widest rows that stage 1 holds in registers
_WIDEST = tl.constexpr(_MAX_WIDTH)
_MAX_HIDDEN = 2048  # the widest rows of a projection that a program splits
_BLOCK_N = 16
_NORMS = ("norm_in_weight", "norm_in_bias", "norm_out_weight", "norm_out_bias")
_PROJECTIONS = ("p_in_weight", "g_in_weight", "p_out_weight", "g_out_weight")
LOW = tl.constexpr(2.0**11)  # of the low numbers of planes
ROWS_UNIT = tl.constexpr(14)  # sums of `multiply_rows` are 2^14 smaller, so as not to overflow
_MOST_OF_ROWS = tl.constexpr(40)  # where squares of small rows are no numbers of fp32 any more


def is_default(device: torch.device) -> bool:
    """Whether the target's float32 calls have these products where no word is given."""
    target = device_target(device)
    return settings_of(target.target, target.name).get("fp32_default") == FP16X3


def refusal(call: Call | Transition) -> str | None:
    """Why a call in float32 can't have these products; None if it can."""
    device, channels, hidden = device_target(call.x.device), call.x.shape[-1], call.hidden
    if "split" not in settings_of(device.target, device.name)["fused_dual_gemm"]:
        return f"{device.target} has no settings for it"
    name, most = ("D", _MAX_WIDTH) if isinstance(call, Call) else ("H", _MAX_HIDDEN)
    if channels > _MAX_WIDTH or hidden > most or channels % 16 or hidden % 16:
        return (
            f"C and {name} must be multiples of 16, at most {_MAX_WIDTH} and {most}; "
            f"got C, {name} = {channels, hidden}"
        )
    return None


@triton.jit
def split_tile(x):
    """x in fp32 as two tiles in fp16 whose sum it is, to 22 bits."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def split_plane(x):
    """x in fp32 as two tiles in fp16, the second `LOW` times as large."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * LOW).to(tl.float16)


@triton.jit
def product_of_split(high, low, right_high, right_low):
    """(high + low) @ (right_high + right_low) in fp32, the smaller products first."""
    block = tl.dot(low, right_high)
    block = tl.dot(high, right_low, block)
    return tl.dot(high, right_high, block)


@triton.jit
def dot_split(high, low, weight_high, weight_low, acc):
    """acc + (high + low) @ (weight_high + weight_low).T in fp32."""
    return acc + product_of_split(high, low, weight_high.T, weight_low.T)


@triton.jit
def load_split_weight(
    weight, start_n, start_k, stride_n,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Tiles [BLOCK_N, BLOCK_K] of a split projection: high numbers [N, K], and below them low ones.

    A descriptor is of both.
    """
    high = load_weight(weight, start_n, start_k, stride_n, N, K, BLOCK_N, BLOCK_K, DESCRIPTORS)
    if DESCRIPTORS:
        low = weight.load([N + start_n, start_k])
    else:
        low = load_weight(
            weight + N * stride_n, start_n, start_k, stride_n, N, K, BLOCK_N, BLOCK_K, False
        )
    return high, low


@triton.jit
def dot_weight(
    rows, weight, start_n, start_k, stride_n, acc,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + rows W^T, of channels from start_n on and BLOCK_K summed ones from start_k on.

    With PRECISION "fp16x3" W is split, high numbers [N, K] above low ones, and the rows are here.
    """
    if PRECISION == "fp16x3":
        high, low = load_split_weight(
            weight, start_n, start_k, stride_n, N, K, BLOCK_N, BLOCK_K, DESCRIPTORS
        )
        rows_high, rows_low = split_tile(rows)
        return dot_split(rows_high, rows_low, high, low, acc)
    else:
        tile = load_weight(weight, start_n, start_k, stride_n, N, K, BLOCK_N, BLOCK_K, DESCRIPTORS)
        return dot(rows, tile.T, acc, PRECISION)


@triton.jit
def add_dot(a, b, acc):
    """acc + a @ b, added in fp32 outside of the tensor cores."""
    # Without this word, which says nothing about 16 bits, Triton makes acc the dot's accumulator.
    return acc + tl.dot(a, b, max_num_imprecise_acc=a.shape[1])


@triton.jit
def scaled(acc, scales_ptr, rows, TOTAL: tl.constexpr):
    """acc [M, N] of `dot_split` in its own scale, and with its constant; rows [N] of TOTAL."""
    factor = tl.load(scales_ptr + rows, mask=rows < TOTAL, other=0.0)
    constant = tl.load(scales_ptr + TOTAL + rows, mask=rows < TOTAL, other=0.0)
    return acc * factor[None, :] + constant[None, :]


@triton.jit
def product_of_planes(
    acc, acc_low, exponents_ptr, stride_exponents, channel, masks_ptr, offs_m, offs_n, L,
    MASKED: tl.constexpr,
):  # fmt: skip
    """The product of a channel's planes: acc of their high numbers, acc_low of those with low ones.

    masks_ptr: the exponents of a sequence's rows, of a mask that is not bool. The rows of both
    planes were divided by their powers of two; or, if MASKED is "left" or "right", of that one they
    were multiplied.
    """
    exponent = tl.load(exponents_ptr + channel) + tl.load(
        exponents_ptr + stride_exponents + channel
    )
    exponent = exponent.to(tl.int32)
    first = exponent >> 1  # in two steps, neither of which leaves the exponents of fp32
    acc = (acc + acc_low * (1.0 / LOW)) * power_of_two(-first) * power_of_two(first - exponent)
    if masks_ptr is not None:
        if MASKED != "right":
            of_m = tl.load(masks_ptr + offs_m, mask=offs_m < L, other=0)
            acc *= power_of_two(-of_m if MASKED == "left" else of_m)[:, None]
        if MASKED != "left":
            of_n = tl.load(masks_ptr + offs_n, mask=offs_n < L, other=0)
            acc *= power_of_two(-of_n if MASKED == "right" else of_n)[None, :]
    return acc


@triton.jit
def exponents_of_rows(variance, rstd, norm_bias_ptr, K: tl.constexpr):
    """The exponents of powers of two that bring normalised rows [M, K] near their norm's bound.

    They are 0 but for rows whose deviation is far below sqrt(eps), which are small, and whose norm
    leaves room for it: `norm_bias_ptr` [K] are the norm's biases in its scale, or None.
    """
    exponent = (-exponent_of(variance * rstd * rstd)) >> 1
    if norm_bias_ptr is not None:
        offs_k = tl.arange(0, _WIDEST)
        biases = tl.load(norm_bias_ptr + offs_k, mask=offs_k < K, other=0.0)
        exponent = tl.minimum(exponent, exponent_for(2.0 * largest_finite(biases, 0)))
    return tl.maximum(tl.minimum(exponent, _MOST_OF_ROWS), 0)


@triton.jit
def power_of_two(exponent):
    """2^exponent for exponents between -126 and 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of(x):
    """The largest integer whose power of two is not above x >= 0; -127 for 0, 128 for infinity."""
    return ((x.to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def exponent_for(largest):
    """The exponent of the power of two that brings what is at most `largest` >= 0 below 2^15."""
    return tl.minimum(14 - exponent_of(largest), 126)


@triton.jit
def largest_finite(x, AXIS: tl.constexpr):
    """The largest |x| along an axis of those that are finite; 0 if none is."""
    sizes = tl.abs(x)
    return tl.max(tl.where(sizes < float("inf"), sizes, 0.0), AXIS)


@triton.jit
def _split_weights_kernel(
    p_in_weight_ptr, g_in_weight_ptr, p_out_weight_ptr, g_out_weight_ptr,
    norm_in_weight_ptr, norm_in_bias_ptr, norm_out_weight_ptr, norm_out_bias_ptr,
    p_in_bias_ptr, g_in_bias_ptr, p_out_bias_ptr, g_out_bias_ptr,
    split_ptr, scales_ptr, norms_ptr,
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
        split_projection(
            p_in_weight_ptr, stride_p_in_weight, norm_in_weight_ptr, norm_in_bias_ptr,
            p_in_bias_ptr, None, split_ptr, scales_ptr, start, 0,
            2 * D, C, TOTAL, BLOCK_N, BLOCK_C, True, True,
        )  # fmt: skip
    elif start < 4 * D:
        split_projection(
            g_in_weight_ptr, stride_g_in_weight, norm_in_weight_ptr, norm_in_bias_ptr,
            g_in_bias_ptr, None, split_ptr + 4 * D * C, scales_ptr, start, 2 * D,
            2 * D, C, TOTAL, BLOCK_N, BLOCK_C, True, False,
        )  # fmt: skip
    elif start < 4 * D + C:
        split_projection(
            p_out_weight_ptr, stride_p_out_weight, norm_out_weight_ptr, norm_out_bias_ptr,
            p_out_bias_ptr, None, split_ptr + 8 * D * C, scales_ptr, start, 4 * D,
            C, D, TOTAL, BLOCK_N, BLOCK_D, True, False,
        )  # fmt: skip
    else:
        split_projection(
            g_out_weight_ptr, stride_g_out_weight, norm_in_weight_ptr, norm_in_bias_ptr,
            g_out_bias_ptr, None, split_ptr + 10 * D * C, scales_ptr, start, 4 * D + C,
            C, C, TOTAL, BLOCK_N, BLOCK_C, True, False,
        )  # fmt: skip
    if start == 0:
        store_norm(norm_in_weight_ptr, norm_in_bias_ptr, norms_ptr, C, BLOCK_C)
        store_norm(norm_out_weight_ptr, norm_out_bias_ptr, norms_ptr + 2 * C, D, BLOCK_D)


@triton.jit(
    do_not_specialize=[
        "L", "mask_ptr", "lengths_ptr", "stride_mask_b", "stride_mask_q", "stride_mask_p",
    ]
)  # fmt: skip
def _mask_exponents_kernel(
    mask_ptr, lengths_ptr, exponents_ptr, L, pitch, stride_mask_b, stride_mask_q, stride_mask_p,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The exponents of the least powers of two that no finite value of a row of a mask is above.

    BLOCK_Q rows q of one sequence's mask, of planes a[q, p].
    """
    tiles = tl.cdiv(L, BLOCK_Q)
    b = tl.program_id(0) // tiles
    q = (tl.program_id(0) - b * tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    length = length_of(lengths_ptr, b, L)
    rows = b.to(tl.int64) * stride_mask_b + q.to(tl.int64) * stride_mask_q
    largest = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, length, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        valid = (q < length)[:, None] & (p < length)[None, :]
        ptrs = mask_ptr + rows[:, None] + (p.to(tl.int64) * stride_mask_p)[None, :]
        mask = tl.load(ptrs, mask=valid, other=0).to(tl.float32)
        largest = tl.maximum(largest, largest_finite(mask, 1))
    exponent = exponent_of(largest)
    exponent += (largest > power_of_two(exponent)).to(tl.int32)
    exponent = tl.where(largest > 0, tl.minimum(tl.maximum(exponent, -126), 126), 0)
    tl.store(exponents_ptr + b * pitch + q, exponent, mask=q < L)


@triton.jit
def scale_mask(mask, exponents_ptr, rows, valid):
    """mask [M] by the powers of two of its rows [M] in `exponents_ptr`, so that it is at most 1."""
    if exponents_ptr is None:
        return mask
    else:
        exponents = tl.load(exponents_ptr + rows, mask=valid, other=0)
        return mask * power_of_two(-exponents)


@triton.jit
def split_projection(
    weight_ptr, stride_weight, norm_ptr, norm_bias_ptr, bias_ptr, columns_ptr,
    split_ptr, scales_ptr, start, first, N: tl.constexpr, K: tl.constexpr, TOTAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORMED: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Rows start + [0, BLOCK_N) of the TOTAL, of the projection [N, K] whose first is `first`.

    It is of NORMED rows, in the scale of their norm, or of those of `multiply_rows`; and makes
    PLANES, whose values have powers of two of their own, or not. If there are `columns_ptr` [K],
    its columns are of such values, with these exponents.
    """
    start_n = start - first
    offs_n, offs_k = start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weight = load_weight(weight_ptr, start_n, 0, stride_weight, N, K, BLOCK_N, BLOCK_K, False)
    weight = weight.to(tl.float32)
    if columns_ptr is not None:
        columns = tl.load(columns_ptr + offs_k, mask=offs_k < K, other=0.0)
        weight *= power_of_two(-columns.to(tl.int32))[None, :]
    sizes = tl.abs(weight)
    finite = tl.where(sizes < float("inf"), weight, 0.0)
    unit = _norm_exponent(norm_ptr, norm_bias_ptr, K, BLOCK_K) if NORMED else -ROWS_UNIT
    # Together within the exponents of fp32.
    up = tl.minimum(exponent_for(tl.max(tl.abs(finite), 1)), tl.minimum(116, 126 - unit))
    weight *= power_of_two(up)[:, None]
    high, low = split_tile(weight)
    # An infinite weight is a low number: those meet the high numbers of rows alone, whose signs are
    # the rows' own.
    infinite = sizes == float("inf")
    low = tl.where(infinite, weight.to(tl.float16), low)
    high = tl.where(infinite, 0.0, high)
    ptrs = split_ptr + (offs_n * K)[:, None] + offs_k[None, :]
    tl.store(ptrs, high, mask=(offs_k < K)[None, :])
    tl.store(ptrs + N * K, low, mask=(offs_k < K)[None, :])

    constant = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:
        constant += tl.load(bias_ptr + offs_n).to(tl.float32)
    down = -up - unit
    ptrs = scales_ptr + start + tl.arange(0, BLOCK_N)
    tl.store(ptrs + 3 * TOTAL, power_of_two(-up))
    if PLANES:
        norm, norm_bias = _norm_of(norm_ptr, norm_bias_ptr, K, BLOCK_K)
        finite *= power_of_two(up)[:, None]
        of_rows = finite * (norm * power_of_two(unit))[None, :]
        of_rows = tl.sqrt(tl.sum(of_rows * of_rows, 1) * K)
        of_rows += tl.abs(tl.sum(finite * (norm_bias * power_of_two(unit))[None, :], 1))
        bound = tl.maximum(exponent_of(of_rows) - up - unit, exponent_of(tl.abs(constant))) + 1
        exponent = tl.maximum(tl.minimum(14 - bound, 126), -126)
        down += exponent
        constant *= power_of_two(exponent)
        tl.store(ptrs + 2 * TOTAL, exponent.to(tl.float32))
    tl.store(ptrs, power_of_two(tl.maximum(tl.minimum(down, 127), -126)))
    tl.store(ptrs + TOTAL, constant)


@triton.jit
def _norm_of(norm_ptr, norm_bias_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The weights and the biases of a norm, [BLOCK_K] each."""
    offs_k = tl.arange(0, BLOCK_K)
    weight = tl.full([BLOCK_K], 1.0, tl.float32)
    bias = tl.zeros([BLOCK_K], tl.float32)
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    if norm_bias_ptr is not None:
        bias = tl.load(norm_bias_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def _norm_exponent(norm_ptr, norm_bias_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The exponent of the power of two of rows with this norm: they stay below 2^15."""
    weight, bias = _norm_of(norm_ptr, norm_bias_ptr, K, BLOCK_K)
    largest = largest_finite(weight, 0) * tl.sqrt(K * 1.0) + largest_finite(bias, 0)
    return tl.maximum(exponent_for(largest), -113)


@triton.jit
def store_norm(norm_ptr, norm_bias_ptr, norms_ptr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The weights and the biases of a norm, [2, K], in the scale of its rows."""
    exponent = _norm_exponent(norm_ptr, norm_bias_ptr, K, BLOCK_K)
    weight, bias = _norm_of(norm_ptr, norm_bias_ptr, K, BLOCK_K)
    offs_k = tl.arange(0, BLOCK_K)
    tl.store(norms_ptr + offs_k, weight * power_of_two(exponent), mask=offs_k < K)
    tl.store(norms_ptr + K + offs_k, bias * power_of_two(exponent), mask=offs_k < K)


class Scales(NamedTuple):
    """The scales of a call's split numbers."""

    # [4, 4D + 2C] in fp32, of the rows of p_in, g_in, p_out and g_out: factors of the products,
    # constants to be added, of p_in the exponents of the planes' powers of two, and factors of the
    # split rows alone.
    projections: Tensor
    # [B, pitch] in int32, of a mask that is not bool: the exponents of its rows' powers of two, by
    # which planes are divided.
    masks: Tensor | None

    def of_entries(self, entries: slice) -> "Scales":
        """The scales of some sequences of the batch."""
        return self if self.masks is None else self._replace(masks=self.masks[entries])

    def of_planes(
        self, hidden: int, channels: slice = slice(None), sequences: int = 1
    ) -> "PlaneScales":
        """Those of some channels' a and b, of so many merged sequences."""
        exponents = self.projections[2, : 2 * hidden].view(2, hidden)
        return PlaneScales(exponents[:, channels], self.masks, sequences=sequences)


class PlaneScales(NamedTuple):
    """The scales of two planes of G channels that are multiplied."""

    exponents: Tensor  # of their powers of two, [2, G] in fp32
    masks: Tensor | None  # as in `Scales`
    masked: str = "both"  # see `product_of_planes`
    sequences: int = 1  # that are merged: a channel has a plane for each, all of one scale


class Split(NamedTuple):
    """What a backward takes of a call of split numbers."""

    weights: Weights  # split and scaled
    scales: Scales

    @property
    def factors(self) -> Tensor:
        """Of the split rows of all projections, [4D + 2C]."""
        return self.scales.projections[3]


def multiplied(weights: Weights, split: Split | None) -> Weights:
    """The weights as products take them."""
    return weights if split is None else split.weights


def split_weights(call: Call, launches: Launches) -> tuple[Call, Scales | None]:
    """The call with split parameters, and their scales; as it is unless its precision is "fp16x3".

    Of a projection [N, K] then high [N, K] and low [N, K] lie one behind the other, the norms are
    scaled, and the biases are among the scales.
    """
    if call.precision != FP16X3:
        return call, None
    weights, device, channels, hidden = call.weights, call.x.device, call.x.shape[-1], call.hidden
    rows = 2 * hidden, 2 * hidden, channels, channels
    widths = channels, channels, hidden, channels
    sizes = [2 * n * k for n, k in zip(rows, widths, strict=True)]
    memory = launches.empty("split weights", (sum(sizes),), torch.float16, device)
    scales = launches.empty("scales", (4, sum(rows)), torch.float32, device)
    norms = launches.empty("scaled norms", (2 * channels + 2 * hidden,), torch.float32, device)
    masks = None
    if call.mask is not None and call.mask.dtype != torch.bool:
        batch, length, _ = call.mask.shape
        shape = (batch, padded_pitch(length))
        masks = launches.empty("exponents of the mask", shape, torch.int32, device)
        launches.of(("mask_exponents",), _prepare_mask_exponents, call).launch(
            mask_ptr=call.mask, lengths_ptr=call.lengths, exponents_ptr=masks
        )
    launches.of(("split_weights",), _prepare, call).launch(
        **{f"{name}_ptr": value for name, value in weights._asdict().items()},
        split_ptr=memory,
        scales_ptr=scales,
        norms_ptr=norms,
    )
    parts = [part.view(-1, k) for part, k in zip(memory.split(sizes), widths, strict=True)]
    norms = norms.split([channels, channels, hidden, hidden])
    split = dict.fromkeys(Weights._fields)
    split |= dict(zip((*_NORMS, *_PROJECTIONS), (*norms, *parts), strict=True))
    return call._replace(weights=Weights(**split)), Scales(scales, masks)


def _prepare(call: Call) -> PreparedLaunch:
    """The launch of `split_weights` for calls like this one."""
    weights, channels, hidden = call.weights, call.x.shape[-1], call.hidden
    return PreparedLaunch(
        _split_weights_kernel,
        (4 * hidden + 2 * channels) // _BLOCK_N,
        tensors=pointers(
            *[f"{name}_ptr" for name in Weights._fields], "split_ptr", "scales_ptr", "norms_ptr"
        ),
        values={f"stride_{name}": getattr(weights, name).stride(0) for name in _PROJECTIONS},
        constants=dict(
            C=channels, D=hidden, BLOCK_N=_BLOCK_N,
            BLOCK_C=triton.next_power_of_2(channels), BLOCK_D=triton.next_power_of_2(hidden),
        ),
        options=dict(num_warps=4, num_stages=2),
    )  # fmt: skip


def _prepare_mask_exponents(call: Call) -> PreparedLaunch:
    """The launch of `_mask_exponents_kernel` for calls like this one."""
    batch, length, _ = call.mask.shape
    axes = "bpq" if call.direction == "incoming" else "bqp"
    return PreparedLaunch(
        _mask_exponents_kernel,
        batch * triton.cdiv(length, _BLOCK_N),
        tensors=pointers("mask_ptr", "lengths_ptr", "exponents_ptr"),
        values=dict(
            L=length, pitch=padded_pitch(length), **named_strides("mask", axes, strides(call.mask))
        ),
        constants=dict(BLOCK_Q=_BLOCK_N, BLOCK_P=128),
        options=dict(num_warps=4, num_stages=2),
    )
