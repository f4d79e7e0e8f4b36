"""Helpers that the three stages share: positions, tiles, the gate and the dot.

Planes. Stages 1 and 2 write channel-major planes [B, channels, L, pitch]. `pitch` is L rounded up
to PITCH_MULTIPLE elements, so that every row starts at a multiple of 32 bytes (64 for fp32)
whatever L is. A plane is one contiguous run of L * pitch elements. Stages 1 and 3 cut that run into
tiles, which may span rows, so that only the padding (at most 15 columns) is idle.
"""

import triton
import triton.language as tl

PITCH_MULTIPLE = 16
# The planes of a padded sequence hold zeros up to the next multiple of this in both axes, because
# stage 2 sums in blocks of at most this many elements.
PADDING_MULTIPLE = 128
_PADDING_MULTIPLE = tl.constexpr(PADDING_MULTIPLE)
_LOG2_E = tl.constexpr(1.4426950408889634)


def padded_pitch(length: int) -> int:
    """Elements from one plane row to the next for rows of `length` elements."""
    return -(-length // PITCH_MULTIPLE) * PITCH_MULTIPLE


@triton.jit
def positions(start, pitch, BLOCK_M: tl.constexpr):
    """Row and column of the flat positions start + [0, BLOCK_M) of a plane, row * pitch + column.

    One integer division for the whole tile. The others are products in fp32, exact once truncated:
    (column + 0.5) / pitch is at least 0.5 / pitch away from any integer, many times the error of
    the product for any pitch up to 2^17.
    """
    row = start // pitch
    column = start - row * pitch + tl.arange(0, BLOCK_M)
    wraps = ((column.to(tl.float32) + 0.5) * (1.0 / pitch)).to(tl.int32)
    return row + wraps, column - wraps * pitch


@triton.jit
def pairs_of_rows(start, R, J, BLOCK_M: tl.constexpr):
    """(b, i, j) of the rows start + [0, BLOCK_M) of [B, R, J], m = (b * R + i) * J + j."""
    row, j = positions(start, J, BLOCK_M)
    b = row // R
    return b, row - b * R, j


@triton.jit
def length_of(lengths_ptr, batch, L):
    """The length of a sequence without its padding; L if there are no lengths."""
    if lengths_ptr is None:
        return L
    else:
        return tl.minimum(tl.load(lengths_ptr + batch), L)


@triton.jit
def within_length(lengths_ptr, batch, i, j, L):
    """Whether neither residue of the pairs (i, j) of a sequence is padding."""
    length = length_of(lengths_ptr, batch, L)
    return (i < length) & (j < length)


@triton.jit
def within_lengths(lengths_ptr, b, i, j, valid_m, L):
    """As `within_length` for pairs of several sequences b [M]."""
    length = tl.minimum(tl.load(lengths_ptr + b, mask=valid_m, other=0), L)
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
    """acc + a @ b in fp32; PRECISION applies to fp32 operands, 16-bit products are exact."""
    if a.dtype == tl.float32:
        if PRECISION == "bf16":
            return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc)
        else:
            return tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def as_multiplied(x, PRECISION: tl.constexpr):
    """An operand of `dot` in fp32, rounded to bfloat16 as `dot` does if PRECISION asks for it."""
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
def load_channels(ptr, offs_k, DEFAULT: tl.constexpr, WIDTH: tl.constexpr, EVEN_K: tl.constexpr):
    """[1, K] of a [WIDTH] parameter in fp32; DEFAULT everywhere if `ptr` is None."""
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
        ptrs = weight + (offs_n.to(tl.int64) * stride_n)[:, None] + offs_k[None, :]
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

    `half` selects a or b on the first axis. With one operand of twice the width, a dot reads its
    other operand half as often.
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
            # The base pointer isn't specialised, so its alignment is stated here.
            ptrs = tl.multiple_of(ptrs, [16, 16])
        if D % BLOCK_N == 0 and K % BLOCK_K == 0:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs_d < D)[:, None] & (offs_k < K)[None, :], other=0.0)


@triton.jit
def add_bias(acc, bias_ptr, offs_n, limit):
    """acc [M, N] plus the bias, if any, at those channels offs_n that are below `limit`."""
    if bias_ptr is None:
        return acc
    else:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < limit, other=0.0)
        return acc + bias.to(tl.float32)[None, :]


@triton.jit
def halves(x):
    """The two halves of x [M, N] along N: registers are renamed, no data moves."""
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
