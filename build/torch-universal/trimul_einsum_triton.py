"""Stage 2: the batched triangular product of the planes.

    product[b, d, i, j] = sum_k a[b, d, i, k] * b[b, d, j, k]

planes [B, 2D, L, pitch] hold a in [0, D) and b in [D, 2D), k contiguous (stage 1 wrote them so for
both directions); product is [B, D, L, pitch] in the same dtype. Sums run in fp32.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._device import device_target
from ._tiles import dot, dot_precision
from .launch_config import LaunchConfig, pick_config, shape_class

_GROUP_M = tl.constexpr(8)


@triton.jit(do_not_specialize=["L"])
def _trimul_einsum_fwd_kernel(
    a, b, product, L, pitch, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of a @ b^T of one plane; M = i, N = j, K = k, all of extent L.

    Programs run plane by plane, so that the plane's a and b are read from L2 after their first use,
    and within a plane in groups of _GROUP_M rows of tiles.
    """
    # Without it ptxas 12.8 (Triton 3.6) waits after every single wgmma of the loop.
    tl.assume(L > 0)
    tiles_m = tl.cdiv(L, BLOCK_M)
    tiles_n = tl.cdiv(L, BLOCK_N)
    pid = tl.program_id(0)
    plane = pid // (tiles_m * tiles_n)
    pid = pid % (tiles_m * tiles_n)
    group = pid // (_GROUP_M * tiles_n)
    rows = min(tiles_m - group * _GROUP_M, _GROUP_M)
    pid_in_group = pid % (_GROUP_M * tiles_n)
    start_m = (group * _GROUP_M + pid_in_group % rows) * BLOCK_M
    start_n = (pid_in_group // rows) * BLOCK_N
    plane_a = plane + (plane // D) * D
    plane_b = plane_a + D

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if DESCRIPTORS:
        for start_k in range(0, L, BLOCK_K):
            a_tile = a.load([plane_a, start_m, start_k]).reshape(BLOCK_M, BLOCK_K)
            b_tile = b.load([plane_b, start_n, start_k]).reshape(BLOCK_N, BLOCK_K)
            acc = dot(a_tile, b_tile.T, acc, PRECISION)
        product.store(
            [plane, start_m, start_n],
            acc.to(product.dtype).reshape(1, BLOCK_M, BLOCK_N),
        )
    else:
        plane_size = L * pitch
        offs_k = tl.arange(0, BLOCK_K)
        # Rows past L read row L - 1: their sums are never stored, and no row needs a mask.
        row_m = tl.minimum(offs_m, L - 1) * pitch
        row_n = tl.minimum(offs_n, L - 1) * pitch
        a_ptrs = a + plane_a.to(tl.int64) * plane_size + row_m[:, None] + offs_k[None, :]
        b_ptrs = b + plane_b.to(tl.int64) * plane_size + row_n[:, None] + offs_k[None, :]
        for start_k in range(0, L, BLOCK_K):
            # Columns [L, pitch) are zeros. Bounded by pitch, not by L: a multiple of 16 keeps the
            # accesses 16 bytes wide.
            valid_k = (start_k + offs_k < pitch)[None, :]
            a_tile = tl.load(a_ptrs + start_k, mask=valid_k, other=0.0)
            b_tile = tl.load(b_ptrs + start_k, mask=valid_k, other=0.0)
            acc = dot(a_tile, b_tile.T, acc, PRECISION)
        ptrs = product + plane.to(tl.int64) * plane_size
        ptrs = ptrs + (offs_m * pitch)[:, None] + offs_n[None, :]
        valid = (offs_m < L)[:, None] & (offs_n < pitch)[None, :]
        tl.store(ptrs, acc.to(product.dtype.element_ty), mask=valid)


def trimul_einsum_fwd(
    planes: torch.Tensor, length: int, precision: str, config: LaunchConfig | None = None
) -> torch.Tensor:
    """product [B, D, L, pitch] of planes [B, 2D, L, pitch]; columns [L, pitch) have no meaning."""
    batch, n, _, pitch = planes.shape
    hidden = n // 2
    product = planes.new_empty(batch, hidden, length, pitch)
    device = device_target(planes.device)
    if config is None:
        shape = shape_class(planes.element_size(), hidden, length)
        config = pick_config("trimul_einsum", device.target, device.name, shape)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    a_arg, b_arg, product_arg = planes, planes, product
    if config.descriptors:
        strides = [length * pitch, pitch, 1]
        a_arg = TensorDescriptor(
            planes, [batch * n, length, length], strides, [1, block_m, block_k]
        )
        b_arg = TensorDescriptor(
            planes, [batch * n, length, length], strides, [1, block_n, block_k]
        )
        product_arg = TensorDescriptor(
            product, [batch * hidden, length, length], strides, [1, block_m, block_n]
        )
    tiles = triton.cdiv(length, block_m) * triton.cdiv(length, block_n)
    _trimul_einsum_fwd_kernel[(batch * hidden * tiles,)](
        a_arg, b_arg, product_arg, length, pitch, hidden,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        DESCRIPTORS=config.descriptors, PRECISION=dot_precision(precision, device.fp32_dots),
        **config.options(),
    )  # fmt: skip
    return product
