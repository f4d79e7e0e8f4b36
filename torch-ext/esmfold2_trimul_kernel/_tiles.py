"""What the three stages share: LayerNorm of rows, the gate, the dot, padded planes, launch helpers.

Planes. Stages 1 and 2 write channel-major planes [B, channels, L, pitch] whose rows are padded to
`pitch`, L rounded up to PITCH_MULTIPLE elements, so that every row starts on a 32-byte sector (64
for fp32) whatever L is. A plane is then one contiguous run of L * pitch elements, and stages 1 and
3 cut that run into tiles: a tile may span rows, so no length leaves more than the pad (15 columns
at most) idle.
"""

import torch
import triton
import triton.language as tl

PITCH_MULTIPLE = 16
_LOG2_E = tl.constexpr(1.4426950408889634)
# Keeps sums of up to 2^16 channels from overflowing; a power of two, so that it rounds nothing.
_SUM_SCALE = tl.constexpr(2.0**-16)


def padded_pitch(length: int) -> int:
    """Elements from one plane row to the next for rows of `length` elements."""
    return -(-length // PITCH_MULTIPLE) * PITCH_MULTIPLE


@triton.jit
def sigmoid(x, FAST_RECIPROCAL: tl.constexpr):
    """1 / (1 + exp(-x)); the reciprocal within 1 ulp in one instruction where the target has it."""
    denominator = 1.0 + tl.exp2(x * -_LOG2_E)
    if FAST_RECIPROCAL:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            "=f,f",
            [denominator],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / denominator


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32; PRECISION is about fp32 operands, 16-bit products are exact."""
    if a.dtype == tl.float32:
        if PRECISION == "bf16":
            return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
        else:
            return tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def load_rows(ptr, offs_m, offs_k, stride_k, valid_m, WIDTH: tl.constexpr):
    """[M, K] tile at row offsets offs_m and channels offs_k, in fp32; 0 outside."""
    ptrs = ptr + offs_m[:, None] + (offs_k.to(tl.int64) * stride_k)[None, :]
    valid = valid_m[:, None] & (offs_k < WIDTH)[None, :]
    return tl.load(ptrs, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def load_first(ptr, offs_m, valid_m):
    """[M, 1]: the first channel of each fp32 row. See `normalise`."""
    return tl.load(ptr + offs_m, mask=valid_m, other=0.0)[:, None]


@triton.jit
def load_channels(ptr, offs_k, DEFAULT: tl.constexpr, WIDTH: tl.constexpr):
    """[1, K] of a [WIDTH] parameter in fp32; DEFAULT everywhere if there is no such parameter."""
    if ptr is None:
        return tl.full([1, offs_k.shape[0]], DEFAULT, tl.float32)
    else:
        return tl.load(ptr + offs_k, mask=offs_k < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_weight(
    weight, start_n, start_k, stride_n, stride_k,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] tile of a projection [N, K]; 0 outside."""
    if DESCRIPTORS:
        return weight.load([start_n, start_k])
    else:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        offs_k = start_k + tl.arange(0, BLOCK_K)
        ptrs = weight + (offs_n * stride_n)[:, None] + (offs_k * stride_k)[None, :]
        if N % BLOCK_N == 0 and K % BLOCK_K == 0:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def load_weight_pair(
    weight, start_n, start_k, gap, stride_first_n, stride_first_k, stride_second_n, stride_second_k,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[2 * BLOCK_N, BLOCK_K]: the same tile of two projections [N, K], `gap` elements apart.

    One operand of twice the width: a dot reads its other operand half as often.
    """
    if DESCRIPTORS:
        return weight.load([0, start_n, start_k]).reshape(2 * BLOCK_N, BLOCK_K)
    else:
        rows = tl.arange(0, 2 * BLOCK_N)
        second = rows >= BLOCK_N
        offs_n = start_n + rows % BLOCK_N
        offs_k = start_k + tl.arange(0, BLOCK_K)
        offs_n = offs_n.to(tl.int64)
        base = tl.where(second, gap + offs_n * stride_second_n, offs_n * stride_first_n)
        base = tl.multiple_of(base, ALIGNMENT)
        if ALIGNMENT > 1:  # then both have unit stride along k
            ptrs = weight + base[:, None] + offs_k[None, :]
            # The base pointer isn't specialised, so its alignment is said here.
            ptrs = tl.multiple_of(ptrs, [16, 16])
        else:
            stride_k = tl.where(second, stride_second_k, stride_first_k)
            ptrs = weight + base[:, None] + stride_k[:, None] * offs_k[None, :]
        if N % BLOCK_N == 0 and K % BLOCK_K == 0:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def add_bias(acc, bias_ptr, offs_n, WIDTH: tl.constexpr):
    """acc [M, N] plus a [WIDTH] bias at channels offs_n, if there is one."""
    if bias_ptr is None:
        return acc
    else:
        return acc + load_channels(bias_ptr, offs_n, 0.0, WIDTH)


@triton.jit
def normalise(x, first, norm_weight_ptr, norm_bias_ptr, eps, WIDTH: tl.constexpr):
    """LayerNorm of the rows of x [M, K >= WIDTH]: (x - mean) / sqrt(var + eps) * weight + bias.

    A row of one constant value has a deviation of exactly zero, so that its normalised value is
    exactly the bias. For rows that were 16 bits wide the mean itself is exact: fp32 holds every
    partial sum of equal 16-bit values, scaled by a power of two against overflow. From fp32 rows
    `first`, the row's own first channel, is taken off beforehand: LayerNorm sees no shift, and
    the digits are kept whatever the mean. `first` is None for 16-bit rows.
    """
    offs_k = tl.arange(0, x.shape[1])
    valid = (offs_k < WIDTH)[None, :]
    if first is not None:
        x = tl.where(valid, x - first, 0.0)
    mean = tl.sum(x * _SUM_SCALE, 1, keep_dims=True)
    mean = tl.div_rn(mean, tl.full(mean.shape, WIDTH * _SUM_SCALE, tl.float32))
    centred = x - mean
    if WIDTH != x.shape[1]:
        centred = tl.where(valid, centred, 0.0)
    variance = tl.sum(centred * centred, 1, keep_dims=True) * (1.0 / WIDTH)
    scaled = centred * tl.rsqrt(variance + eps)
    weight = load_channels(norm_weight_ptr, offs_k, 1.0, WIDTH)
    return scaled * weight + load_channels(norm_bias_ptr, offs_k, 0.0, WIDTH)


@triton.jit
def hold_as_operand(rows, HELD: tl.constexpr):
    """The same [M, K] rows, held in registers as the left operand of the dots in a loop to come.

    Adding a product of zeros leaves every value as it is and brings the rows into the layout of an
    accumulator, from which wgmma takes its left operand without a move. Otherwise Triton (3.6 to
    3.9) keeps them in shared memory and reads them again for each dot.
    """
    if HELD:
        m: tl.constexpr = rows.shape[0]
        k: tl.constexpr = rows.shape[1]
        left = tl.zeros([m, 16], rows.dtype)
        right = tl.zeros([16, k], rows.dtype)
        return tl.dot(left, right, rows.to(tl.float32)).to(rows.dtype)
    else:
        return rows


@triton.jit
def row_moments(
    ptr, offs_m, stride_k, first, valid_m, eps, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The mean (of x - first) and 1 / sqrt(var + eps), [M, 1] each, of rows too wide to be held."""
    total = tl.zeros([offs_m.shape[0], 1], tl.float32)
    for start_k in range(0, WIDTH, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x = load_rows(ptr, offs_m, offs_k, stride_k, valid_m, WIDTH)
        if first is not None:
            x = tl.where((offs_k < WIDTH)[None, :], x - first, 0.0)
        total += tl.sum(x * _SUM_SCALE, 1, keep_dims=True)
    mean = tl.div_rn(total, tl.full(total.shape, WIDTH * _SUM_SCALE, tl.float32))
    total = tl.zeros([offs_m.shape[0], 1], tl.float32)
    for start_k in range(0, WIDTH, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x = load_rows(ptr, offs_m, offs_k, stride_k, valid_m, WIDTH)
        if first is not None:
            x -= first
        x = tl.where((offs_k < WIDTH)[None, :], x - mean, 0.0)
        total += tl.sum(x * x, 1, keep_dims=True)
    return mean, tl.rsqrt(total * (1.0 / WIDTH) + eps)


@triton.jit
def normalise_block(
    x, offs_k, first, mean, rstd, norm_weight_ptr, norm_bias_ptr, WIDTH: tl.constexpr
):  # fmt: skip
    """`normalise` of one block of channels, with the moments of `row_moments`."""
    if first is not None:
        x -= first
    centred = tl.where((offs_k < WIDTH)[None, :], x - mean, 0.0)
    weight = load_channels(norm_weight_ptr, offs_k, 1.0, WIDTH)
    return centred * rstd * weight + load_channels(norm_bias_ptr, offs_k, 0.0, WIDTH)


def dot_precision(precision: str, fp32_dots: tuple[str, ...]) -> str:
    """Triton's word for an fp32 dot on a target that has `fp32_dots`, its fp32-accurate one first.

    "fp32" means that first one, which also stands in for a word that the target doesn't have.
    """
    return precision if precision in fp32_dots or precision == "bf16" else fp32_dots[0]


def strides(tensor: torch.Tensor) -> list[int]:
    """The strides, 0 where an axis has one element, so that they don't differ for nothing."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [0 if size == 1 else stride for size, stride in pairs]


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether 16-byte accesses along the last axis are in order wherever a row starts."""
    *outer, inner = strides(tensor)
    if inner != 1 or tensor.data_ptr() % 16:
        return False
    elements = 16 // tensor.element_size()
    return not any([stride % elements for stride in outer])
