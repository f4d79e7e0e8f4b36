"""left^T right and sums over all rows: every row, whatever their number, in a fixed order."""

import pytest
import torch
from conftest import HAS_GPU
from helpers import DTYPES, relative_error, seeded

BUDGET = 1e-5


@pytest.fixture
def product(submodule, on_triton):
    """product(left, right, programs): with_sums gives both; `chunks` of rows, one after another."""
    subject = submodule("triton_path.row_products")

    def compute(left, right, programs=None, with_sums=False, chunks=1, partial=None):
        parts, given = None, [None] * chunks
        if partial is not None:
            given = partial.to(on_triton).chunk(chunks)
        both = (rows.to(on_triton).chunk(chunks) for rows in (left, right))
        for some, others, sums in zip(*both, given, strict=True):
            prepared = subject.prepare_row_products(
                some, others, "fp32", programs, with_sums, parts, sums
            )
            parts = subject.row_products(some, others, prepared, parts, sums)
        total = parts.products.sum(0)
        return total if parts.sums is None else (total, parts.sums.sum(0))

    return compute


@pytest.mark.parametrize("programs", [1, 7])
@pytest.mark.parametrize("width, columns", [(48, 48), (48, 96), (70, 33)])
def test_chunks_and_sums_of_others(product, programs, width, columns):
    """Later chunks, the last a smaller one, add to the parts of the first."""
    left, right = rows(2100, width), rows(2100, 24, seed=1)
    partial = rows(115, columns, dtype=torch.float32, seed=2)
    for chunks in (1, 3, 4):
        got, sums = product(left, right, programs, chunks=chunks, partial=partial)
        assert relative_error(got, left.double().t() @ right.double()) <= BUDGET
        assert relative_error(sums, partial.double().sum(0)) <= BUDGET
        got, sums = product(left, right, programs, with_sums=True, chunks=chunks)
        assert relative_error(sums, left.double().sum(0)) <= BUDGET


@pytest.mark.parametrize("programs", [1, 40])
@pytest.mark.parametrize("width, last", [(256, 128), (40, 24), (130, 7)])
def test_last_columns_of_another_tensor(submodule, on_triton, programs, width, last):
    """They have tiles and rows of the result of their own; sums of others are of the first."""
    subject = submodule("triton_path.row_products")
    left, beside = rows(700, width).to(on_triton), rows(700, last, seed=2).to(on_triton)
    right = rows(700, 24, seed=1).to(on_triton)
    partial = rows(9, width, dtype=torch.float32, seed=3).to(on_triton)
    prepared = subject.prepare_row_products(
        left, right, "fp32", programs, partial=partial, last=beside
    )
    parts = subject.row_products(left, right, prepared, None, partial, beside)
    both = torch.cat([left, beside], dim=1).cpu().double()
    got = parts.products.sum(0)
    assert relative_error(got, both.t() @ right.cpu().double()) <= BUDGET
    assert relative_error(parts.sums.sum(0), partial.cpu().double().sum(0)) <= BUDGET


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [None, 1, 7])
@pytest.mark.parametrize(
    "count, width, other",
    [(1, 1, 1), (63, 16, 16), (64, 3, 40), (65, 128, 7), (1000, 130, 24), (2000, 24, 136)],
)
def test_product(product, dtype, programs, count, width, other):
    left, right = rows(count, width, dtype=dtype), rows(count, other, dtype=dtype, seed=1)
    got, sums = product(left, right, programs, with_sums=True)
    assert relative_error(got, left.double().t() @ right.double()) <= BUDGET
    assert relative_error(sums, left.double().sum(0)) <= BUDGET
    if dtype != torch.float32:  # float32 has settings for products with sums
        assert torch.equal(product(left, right, programs), got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_sums_of_a_row_that_is_much_larger(product, dtype):
    """The sums are in fp32, also where an element is as large as all others together."""
    left = rows(600, 40, dtype=dtype)
    left[123] *= 600
    _, sums = product(left, rows(600, 16, dtype=dtype, seed=1), 5, with_sums=True)
    assert relative_error(sums, left.double().sum(0)) <= BUDGET


@pytest.mark.parametrize("programs", [1, 7])
def test_columns_of_wider_rows(product, programs):
    wide, right = rows(600, 83), rows(600, 20, seed=1)
    for columns in (slice(0, 40), slice(16, 48), slice(3, 83)):
        left = wide[:, columns]
        got = product(left, right, programs)
        assert relative_error(got, left.double().t() @ right.double()) <= BUDGET


COUNTS = [1, 2, 65, 66, 255, 256, 257, 289, 1025]
if HAS_GPU:  # cuBLAS 13.1 leaves rows out for most of these
    COUNTS += [4225, 4226, 6724, 9409, 16129, 16900, 65025, 66049, 95488, 256064, 462400]


@pytest.mark.parametrize("count", COUNTS)
def test_every_row_counts_once(product, count):
    for dtype in (torch.bfloat16, torch.float32):
        ones = torch.ones(count, 32, dtype=dtype)
        for width, other in ((16, 16), (32, 16)):
            for programs in (None, 40):
                given = ones[:, :width], ones[:, :other], programs
                got, sums = product(*given, with_sums=True)
                assert torch.equal(got, torch.full_like(got, count))
                assert torch.equal(sums, torch.full_like(sums, count))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_equal_calls_give_equal_bits(product, dtype):
    left, right = rows(3000, 48, dtype=dtype), rows(3000, 32, dtype=dtype, seed=1)
    first, sums = product(left, right, 9, with_sums=True)
    for _ in range(3):
        again, sums_again = product(left, right, 9, with_sums=True)
        assert torch.equal(again, first) and torch.equal(sums_again, sums)
