"""What the three stages share: positions, LayerNorm of rows, the gate, the dot, launch helpers.

Planes. Stages 1 and 2 write channel-major planes [B, channels, L, pitch] whose rows are padded to
`pitch`, L rounded up to PITCH_MULTIPLE elements, so that every row starts on a 32-byte sector (64
for fp32) whatever L is. A plane is then one contiguous run of L * pitch elements, and stages 1 and
3 cut that run into tiles: a tile may span rows, so no length leaves more than the pad (15 columns
at most) idle.

Moments. Stage 1 keeps the mean and 1 / sqrt(var + eps) of every row of x in fp32 and stage 3 reads
them, so that a row's statistics are taken once.
"""

import torch
import triton
import triton.language as tl

PITCH_MULTIPLE = 16
# The planes of a sequence with padding hold zeros up to the next multiple of it in both axes: stage
# 2 sums blocks of so many elements at most.
PADDING_MULTIPLE = 128
_PADDING_MULTIPLE = tl.constexpr(PADDING_MULTIPLE)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Keeps sums of up to 2^16 channels from overflowing; a power of two, so that it rounds nothing.
_SUM_SCALE = tl.constexpr(2.0**-16)
# The most channels that `load_chunks` loads as one tile.
_CHUNK = tl.constexpr(64)


def padded_pitch(length: int) -> int:
    """Elements from one plane row to the next for rows of `length` elements."""
    return -(-length // PITCH_MULTIPLE) * PITCH_MULTIPLE


@triton.jit
def positions(start, pitch, BLOCK_M: tl.constexpr):
    """Row and column of the flat positions start + [0, BLOCK_M) of a plane, row * pitch + column.

    One integer division for the whole tile. The rest are products in fp32, exact here: a column and
    a half is at least 0.5 / pitch away from the next multiple of pitch, many times the error of the
    product for any pitch up to 2^17.
    """
    row = start // pitch
    column = start - row * pitch + tl.arange(0, BLOCK_M)
    wraps = ((column.to(tl.float32) + 0.5) * (1.0 / pitch)).to(tl.int32)
    return row + wraps, column - wraps * pitch


@triton.jit
def length_of(lengths_ptr, batch, L):
    """The residues of a sequence that are no padding: L of them where there are no lengths."""
    if lengths_ptr is None:
        return L
    else:
        return tl.minimum(tl.load(lengths_ptr + batch), L)


@triton.jit
def within_length(lengths_ptr, batch, i, j, L):
    """Whether both residues of the pairs (i, j) of a sequence are no padding."""
    length = length_of(lengths_ptr, batch, L)
    return (i < length) & (j < length)


@triton.jit
def end_of_zeros(length):
    """Where the zeros after a sequence's `length` residues end."""
    return tl.cdiv(length, _PADDING_MULTIPLE) * _PADDING_MULTIPLE


@triton.jit
def any_of(valid):
    """Whether any entry of valid [M] is true."""
    return tl.max(valid.to(tl.int32), 0) > 0


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
def as_multiplied(x, PRECISION: tl.constexpr):
    """An operand of `dot` in fp32, with the rounding to bfloat16 that PRECISION may ask for."""
    if x.dtype == tl.float32 and PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    return x.to(tl.float32)


@triton.jit
def load_tile(ptr, offs_m, offs_k, stride_k, valid_m, WIDTH: tl.constexpr, EVEN_K: tl.constexpr):
    """[M, K] tile at row offsets offs_m and channels offs_k; 0 outside."""
    ptrs = ptr + offs_m[:, None] + (offs_k.to(tl.int64) * stride_k)[None, :]
    valid = valid_m[:, None]
    if not EVEN_K:
        valid = valid & (offs_k < WIDTH)[None, :]
    return tl.load(ptrs, mask=valid, other=0.0)


@triton.jit
def store_tile(ptr, offs_m, offs_n, tile, valid_m, WIDTH: tl.constexpr, EVEN_N: tl.constexpr):
    """Stores tile [M, N] at row offsets offs_m and channels offs_n, which have unit stride."""
    valid = valid_m[:, None]
    if not EVEN_N:
        valid = valid & (offs_n < WIDTH)[None, :]
    tl.store(ptr + offs_m[:, None] + offs_n[None, :], tile, mask=valid)


@triton.jit
def store_zeros(ptr, offs_m, valid_m, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeros in all WIDTH channels at row offsets offs_m."""
    for start_n in range(0, WIDTH, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        zeros = tl.zeros([offs_m.shape[0], BLOCK_N], ptr.dtype.element_ty)
        store_tile(ptr, offs_m, offs_n, zeros, valid_m, WIDTH, WIDTH % BLOCK_N == 0)


@triton.jit
def load_first(ptr, offs_m, valid_m):
    """[M, 1]: the first channel of each row in fp32, the shift of `row_statistics`."""
    return tl.load(ptr + offs_m, mask=valid_m, other=0.0).to(tl.float32)[:, None]


@triton.jit
def load_channels(ptr, offs_k, DEFAULT: tl.constexpr, WIDTH: tl.constexpr, EVEN_K: tl.constexpr):
    """[1, K] of a [WIDTH] parameter in fp32; DEFAULT everywhere if there is no such parameter."""
    if ptr is None:
        return tl.full([1, offs_k.shape[0]], DEFAULT, tl.float32)
    elif EVEN_K:
        return tl.load(ptr + offs_k).to(tl.float32)[None, :]
    else:
        return tl.load(ptr + offs_k, mask=offs_k < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_weight(
    weight, start_n, start_k, stride_n,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_K] tile of a projection [N, K] with unit stride along k; 0 outside."""
    if DESCRIPTORS:
        return weight.load([start_n, start_k])
    else:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        offs_k = start_k + tl.arange(0, BLOCK_K)
        ptrs = weight + (offs_n * stride_n)[:, None] + offs_k[None, :]
        if N % BLOCK_N == 0 and K % BLOCK_K == 0:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def load_weight_pair(
    weight, half, start_n, start_k, gap,
    stride_first, stride_second,
    D: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """[2 * BLOCK_N, BLOCK_K]: the same tile of two projections [2, D, K], `gap` elements apart.

    `half` is the first axis, a or b. One operand of twice the width: a dot reads its other operand
    half as often.
    """
    if DESCRIPTORS:
        return weight.load([0, half, start_n, start_k]).reshape(2 * BLOCK_N, BLOCK_K)
    else:
        rows = tl.arange(0, 2 * BLOCK_N)
        second = rows >= BLOCK_N
        offs_d = start_n + rows % BLOCK_N
        offs_n = (half * D + offs_d).to(tl.int64)
        offs_k = start_k + tl.arange(0, BLOCK_K)
        base = tl.where(second, gap + offs_n * stride_second, offs_n * stride_first)
        base = tl.multiple_of(base, ALIGNMENT)
        ptrs = weight + base[:, None] + offs_k[None, :]
        if ALIGNMENT > 1:
            # The base pointer isn't specialised, so its alignment is said here.
            ptrs = tl.multiple_of(ptrs, [16, 16])
        if D % BLOCK_N == 0 and K % BLOCK_K == 0:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs_d < D)[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def add_bias(acc, bias_ptr, offs_n, limit):
    """acc [M, N] plus a bias at channels offs_n, those below `limit`, if there is one."""
    if bias_ptr is None:
        return acc
    else:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < limit, other=0.0)
        return acc + bias.to(tl.float32)[None, :]


@triton.jit
def halves(x):
    """The two halves of x [M, N] along N: registers with new names, no data moves."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def quarters(x):
    """x [M, N] as a tuple of up to four tiles of at least 16 columns, like `halves`."""
    if x.shape[1] >= 64:
        left, right = halves(x)
        first, second = halves(left)
        third, fourth = halves(right)
        return (first, second, third, fourth)
    elif x.shape[1] >= 32:
        left, right = halves(x)
        return (left, right)
    else:
        return (x,)


@triton.jit
def beside(left, right):
    """[M, 2N]: left [M, N] and right [M, N] side by side, the reverse of `halves`."""
    return tl.join(left, right).permute(0, 2, 1).reshape(left.shape[0], 2 * left.shape[1])


@triton.jit
def identity(K: tl.constexpr, dtype: tl.constexpr):
    """[K, K] identity matrix."""
    offs_k = tl.arange(0, K)
    return (offs_k[:, None] == offs_k[None, :]).to(dtype)


@triton.jit
def row_statistics(x, first, eps, WIDTH: tl.constexpr):
    """The mean and 1 / sqrt(var + eps), [M, 1] each, of the rows of x [M, K >= WIDTH] in fp32.

    A row of one constant value has a deviation of exactly zero, so that its normalised value is
    exactly the bias. For rows that were 16 bits wide the mean itself is exact: fp32 holds every
    partial sum of equal 16-bit values, scaled by a power of two against overflow. From fp32 rows
    `first`, the row's own first channel, is taken off beforehand (the mean returned is then that of
    x - first): LayerNorm sees no shift, and the digits are kept whatever the mean. `first` is None
    for 16-bit rows.
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
    """`row_statistics` of rows that are too wide to be held: two passes over memory."""
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
    return mean, tl.rsqrt(total * (1.0 / WIDTH) + eps)


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
def load_chunks(
    ptr, offs_m, stride_k, valid_m, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The rows [M, BLOCK_K >= WIDTH] as a tuple of tiles of at most _CHUNK channels."""
    CHUNK: tl.constexpr = min(BLOCK_K, _CHUNK)
    chunks = ()
    for c in tl.static_range(BLOCK_K // CHUNK):
        offs_k = tl.arange(0, CHUNK) + c * CHUNK
        tile = load_tile(ptr, offs_m, offs_k, stride_k, valid_m, WIDTH, WIDTH == BLOCK_K)
        chunks = chunks + (tile,)
    return chunks


@triton.jit
def chunk_statistics(chunks, first, eps, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mean and 1 / sqrt(var + eps), [M, 1] each, of 16-bit rows in chunks, in one pass.

    Of d = x - first, the variance is mean(d^2) - mean(d)^2. No channel of a row is further than
    sqrt(WIDTH - 1) deviations from the mean, the first one neither, so the difference loses a
    factor of WIDTH of fp32's precision at most. A constant row has d = 0: its mean is exact.
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
def hold(
    chunks, mean, rstd, norm_weight_ptr, norm_bias_ptr,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm of 16-bit rows in chunks, [M, BLOCK_K], held in registers as a left operand.

    Each chunk is multiplied by the identity matrix: exact, and it comes out in fp32 in the layout
    of an accumulator, from which wgmma takes its left operand without a move. Otherwise Triton (3.6
    to 3.9) keeps the normalised rows in shared memory and reads them again for each dot of the loop
    to come.
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


def dot_precision(precision: str, fp32_dots: tuple[str, ...]) -> str:
    """Triton's word for an fp32 dot on a target that has `fp32_dots`, its fp32-accurate one first.

    "fp32" means that first one, which also stands in for a word that the target doesn't have.
    """
    return precision if precision in fp32_dots or precision == "bf16" else fp32_dots[0]


def shared_by(programs: int, blocks: int) -> int:
    """The most programs, at most `programs`, that can share `blocks` equally."""
    return max(n for n in range(1, min(programs, blocks) + 1) if blocks % n == 0)


def strides(tensor: torch.Tensor) -> list[int]:
    """The strides, with 0 for axes of length 1, so that equal layouts give equal cache keys."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [0 if size == 1 else stride for size, stride in pairs]


def has_descriptor(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor may describe it: aligned, and no two rows in one place.

    What TMA does with a stride of 0, that of an expanded tensor, is nowhere promised.
    """
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return is_aligned(tensor) and all([size == 1 or stride > 0 for size, stride in pairs])


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether 16-byte accesses along the last axis are in order wherever a row starts."""
    *outer, inner = strides(tensor)
    if inner != 1 or tensor.data_ptr() % 16:
        return False
    elements = 16 // tensor.element_size()
    return not any([stride % elements for stride in outer])
