"""LayerNorm of rows: their statistics, from registers or from memory, and the normalised values.

Stage 1 stores the moments of every row of x in fp32: its mean and 1 / sqrt(var + eps). Stage 3
reads them, so that they are computed once.
"""

import triton
import triton.language as tl

from .split_operands import split_tile
from .tiles import as_multiplied, beside, identity, load_channels, load_tile

# Keeps sums of up to 2^16 channels from overflowing; as a power of two it rounds nothing.
_SUM_SCALE = tl.constexpr(2.0**-16)
# A norm's weight nearer to 0 counts as this where rows are multiplied by it, and divided later.
LEAST_SCALE = 2.0**-64
# The most channels that 16-bit rows are loaded in as one tile.
_CHUNK = tl.constexpr(64)


@triton.jit
def load_first(ptr, offs_m, valid_m):
    """[M, 1]: the first channel of each row in fp32, the shift of `row_statistics`."""
    return tl.load(ptr + offs_m, mask=valid_m, other=0.0).to(tl.float32)[:, None]


@triton.jit
def row_statistics(x, first, eps, WIDTH: tl.constexpr):
    """The mean and 1 / sqrt(var + eps), [M, 1] each, of the rows of x [M, K >= WIDTH] in fp32.

    A constant row has a deviation of exactly zero, so its normalised value is exactly the bias. The
    mean of a constant 16-bit row is exact: fp32 holds every partial sum of equal 16-bit values,
    scaled by a power of two against overflow. From fp32 rows `first`, the row's first channel, is
    subtracted beforehand (the mean returned is that of x - first): the shift doesn't change
    LayerNorm, and no digits are lost to a large mean. `first` is None for 16-bit rows.
    """
    valid = (tl.arange(0, x.shape[1]) < WIDTH)[None, :]
    if first is not None:
        x = tl.where(valid, x - first, 0.0)
    mean = mean_of(tl.sum(x * _SUM_SCALE, 1, keep_dims=True), WIDTH) * (1.0 / _SUM_SCALE)
    centred = x - mean
    if WIDTH != x.shape[1]:
        centred = tl.where(valid, centred, 0.0)
    variance = tl.sum(centred * centred, 1, keep_dims=True) * (1.0 / WIDTH)
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def mean_of(total, WIDTH: tl.constexpr):
    """total / WIDTH, correctly rounded."""
    if WIDTH & (WIDTH - 1) == 0:
        return total * (1.0 / WIDTH)
    else:
        return tl.div_rn(total, tl.full(total.shape, WIDTH, tl.float32))


@triton.jit
def row_moments(
    ptr, offs_m, stride_k, first, valid_m, eps, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """`row_statistics` of rows too wide for registers: two passes over memory."""
    mean, variance = row_variances(ptr, offs_m, stride_k, first, valid_m, WIDTH, BLOCK_K)
    return mean, tl.rsqrt(variance + eps)


@triton.jit
def row_variances(
    ptr, offs_m, stride_k, first, valid_m, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The means, as `row_moments` has them, and the variances."""
    total = tl.zeros([offs_m.shape[0], 1], tl.float32)
    for start_k in range(0, WIDTH, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x = load_tile(ptr, offs_m, offs_k, stride_k, valid_m, WIDTH, WIDTH % BLOCK_K == 0)
        x = x.to(tl.float32)
        if first is not None:
            x = tl.where((offs_k < WIDTH)[None, :], x - first, 0.0)
        total += tl.sum(x * _SUM_SCALE, 1, keep_dims=True)
    mean = mean_of(total, WIDTH) * (1.0 / _SUM_SCALE)
    total = tl.zeros([offs_m.shape[0], 1], tl.float32)
    for start_k in range(0, WIDTH, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x = load_tile(ptr, offs_m, offs_k, stride_k, valid_m, WIDTH, WIDTH % BLOCK_K == 0)
        x = x.to(tl.float32)
        if first is not None:
            x -= first
        x = tl.where((offs_k < WIDTH)[None, :], x - mean, 0.0)
        total += tl.sum(x * x, 1, keep_dims=True)
    return mean, total * (1.0 / WIDTH)


@triton.jit
def normalise(
    x, offs_k, first, mean, rstd, norm_weight_ptr, norm_bias_ptr,
    WIDTH: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm of x [M, K], channels offs_k of rows with these statistics; 0 from WIDTH on."""
    if first is not None:
        x -= first
    centred = x - mean
    if not EVEN_K:
        centred = tl.where((offs_k < WIDTH)[None, :], centred, 0.0)
    weight = load_channels(norm_weight_ptr, offs_k, 1.0, WIDTH, EVEN_K)
    bias = load_channels(norm_bias_ptr, offs_k, 0.0, WIDTH, EVEN_K)
    return centred * rstd * weight + bias


@triton.jit
def store_means_of_projection(
    weight_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, shift_ptr, start_n, stride_weight,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores W g / K and, if there is a `shift_ptr`, W b, of BLOCK_N rows of W [N, K] in fp32.

    W is rounded as in its products.
    """
    offs_n = start_n + tl.arange(0, BLOCK_N)
    valid = offs_n < N
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    scale = tl.zeros([BLOCK_N], tl.float32)
    shift = tl.zeros([BLOCK_N], tl.float32)
    for start_k in range(0, K, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        offs_weight = offs_n.to(tl.int64) * stride_weight
        weight = load_tile(weight_ptr, offs_weight, offs_k, 1, valid, K, EVEN_K)
        weight = as_multiplied(weight, PRECISION)
        scale += tl.sum(weight * load_channels(norm_weight_ptr, offs_k, 1.0, K, EVEN_K), 1)
        shift += tl.sum(weight * load_channels(norm_bias_ptr, offs_k, 0.0, K, EVEN_K), 1)
    tl.store(scale_ptr + offs_n, scale * (1.0 / K), mask=valid)
    if shift_ptr is not None:
        tl.store(shift_ptr + offs_n, shift, mask=valid)


@triton.jit
def load_chunks(
    ptr, offs_m, stride_k, valid_m, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    MOST: tl.constexpr = _CHUNK,
):  # fmt: skip
    """The rows [M, BLOCK_K >= WIDTH] as a tuple of tiles of at most MOST channels."""
    CHUNK: tl.constexpr = min(BLOCK_K, MOST)
    chunks = ()
    for c in tl.static_range(BLOCK_K // CHUNK):
        offs_k = tl.arange(0, CHUNK) + c * CHUNK
        tile = load_tile(ptr, offs_m, offs_k, stride_k, valid_m, WIDTH, WIDTH == BLOCK_K)
        chunks = chunks + (tile,)
    return chunks


@triton.jit
def chunk_statistics(chunks, first, eps, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mean and 1 / sqrt(var + eps), [M, 1] each, of 16-bit rows in chunks, in one pass.

    With d = x - first, the variance is mean(d^2) - mean(d)^2. The first channel, like any other, is
    at most sqrt(WIDTH - 1) standard deviations from the mean, so the difference loses at most a
    factor of WIDTH of fp32's precision. A constant row has d = 0: its mean is exact.
    """
    CHUNK: tl.constexpr = min(BLOCK_K, _CHUNK)
    total = tl.zeros(chunks[0].shape, tl.float32)
    squares = tl.zeros(chunks[0].shape, tl.float32)
    for c in tl.static_range(BLOCK_K // CHUNK):
        d = chunks[c].to(tl.float32) - first
        if WIDTH != BLOCK_K:
            d = tl.where((tl.arange(0, CHUNK) + c * CHUNK < WIDTH)[None, :], d, 0.0)
        total += d
        squares += d * d
    mean = tl.sum(total, 1, keep_dims=True) * (1.0 / WIDTH)
    variance = tl.sum(squares, 1, keep_dims=True) * (1.0 / WIDTH) - mean * mean
    return first + mean, tl.rsqrt(tl.maximum(variance, 0.0) + eps)


@triton.jit
def chunk_moments(chunks, first, eps, WIDTH: tl.constexpr):
    """`row_statistics` of fp32 rows in chunks, in two passes over them."""
    CHUNK: tl.constexpr = chunks[0].shape[1]
    total = tl.zeros(chunks[0].shape, tl.float32)
    for c in tl.static_range(len(chunks)):
        total += _within(chunks[c] - first, c * CHUNK, WIDTH) * _SUM_SCALE
    mean = mean_of(tl.sum(total, 1, keep_dims=True), WIDTH) * (1.0 / _SUM_SCALE)
    squares = tl.zeros(chunks[0].shape, tl.float32)
    for c in tl.static_range(len(chunks)):
        d = _within(chunks[c] - first - mean, c * CHUNK, WIDTH)
        squares += d * d
    return mean, tl.rsqrt(tl.sum(squares, 1, keep_dims=True) * (1.0 / WIDTH) + eps)


@triton.jit
def _within(x, start: tl.constexpr, WIDTH: tl.constexpr):
    """x [M, K] of the channels from `start` on; 0 from WIDTH on."""
    if start + x.shape[1] <= WIDTH:
        return x
    else:
        return tl.where((tl.arange(0, x.shape[1]) + start < WIDTH)[None, :], x, 0.0)


@triton.jit
def hold(
    chunks, mean, rstd, norm_weight_ptr, norm_bias_ptr,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm of 16-bit rows in chunks, [M, BLOCK_K], held in registers as a left operand.

    Each chunk is multiplied by the identity matrix. The result is exact, in fp32, and in the layout
    of an accumulator, from which wgmma takes its left operand without a move. Otherwise Triton (3.6
    to 3.9) keeps the normalised rows in shared memory and reads them again for each dot that
    follows.
    """
    CHUNK: tl.constexpr = min(BLOCK_K, _CHUNK)
    COUNT: tl.constexpr = BLOCK_K // CHUNK
    dtype = chunks[0].dtype
    one = identity(CHUNK, dtype)
    held = ()
    for c in tl.static_range(COUNT):
        offs_k = tl.arange(0, CHUNK) + c * CHUNK
        x = tl.dot(chunks[c], one)
        z = normalise(
            x, offs_k, None, mean, rstd, norm_weight_ptr, norm_bias_ptr, WIDTH, WIDTH == BLOCK_K
        )
        held = held + (z.to(dtype),)
    return _joined(held)


@triton.jit
def hold_split(
    chunks, first, mean, rstd, norm_weight_ptr, norm_bias_ptr, WIDTH: tl.constexpr
):  # fmt: skip
    """Split numbers of fp32 rows in chunks, normalised: tuples of [M, chunk], the high ones held.

    The norm is in the scale of `split_weights`.
    """
    CHUNK: tl.constexpr = chunks[0].shape[1]
    one = identity(CHUNK, tl.float16)
    highs, lows = (), ()
    for c in tl.static_range(len(chunks)):
        offs_k = tl.arange(0, CHUNK) + c * CHUNK
        z = normalise(
            chunks[c], offs_k, first, mean, rstd, norm_weight_ptr, norm_bias_ptr,
            WIDTH, c * CHUNK + CHUNK <= WIDTH,
        )  # fmt: skip
        high, low = split_tile(z)
        highs = highs + (tl.dot(high, one).to(tl.float16),)
        lows = lows + (low,)
    return highs, lows


@triton.jit
def _joined(held):
    """Up to eight tiles side by side."""
    COUNT: tl.constexpr = len(held)
    if COUNT == 1:
        return held[0]
    elif COUNT == 2:
        return beside(held[0], held[1])
    elif COUNT == 4:
        return beside(beside(held[0], held[1]), beside(held[2], held[3]))
    else:
        tl.static_assert(COUNT == 8, "a held row has at most 512 channels")
        left = beside(beside(held[0], held[1]), beside(held[2], held[3]))
        return beside(left, beside(beside(held[4], held[5]), beside(held[6], held[7])))
