"""left^T right over all rows: every row, whatever their number, in fp32 and a fixed order."""

import pytest
import torch
from conftest import HAS_GPU
from helpers import relative_error, seeded

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture
def product(submodule, on_triton):
    """product(left, right, programs): onto a total that is not zero."""
    subject = submodule("triton_path.row_products")

    def compute(left, right, programs=None):
        left, right = left.to(on_triton), right.to(on_triton)
        shape = left.shape[1], right.shape[1]
        total = torch.full(shape, 3.0, device=on_triton)
        prepared = subject.prepare_row_products(left, right, programs)
        subject.add_row_products(total, left, right, prepared)
        return total - 3.0

    return compute


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed)).to(dtype)


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("programs", [None, 1, 7])
@pytest.mark.parametrize(
    "count, width, other",
    [(1, 1, 1), (63, 16, 16), (64, 3, 40), (65, 128, 7), (1000, 130, 24), (2000, 24, 136)],
)
def test_product(product, dtype, programs, count, width, other):
    left, right = rows(count, width, dtype=dtype), rows(count, other, dtype=dtype, seed=1)
    got = product(left, right, programs)
    assert relative_error(got, left.double().t() @ right.double()) <= 1e-5


@pytest.mark.parametrize("programs", [1, 7])
def test_columns_of_wider_rows(product, programs):
    wide, right = rows(600, 83), rows(600, 20, seed=1)
    for columns in (slice(0, 40), slice(16, 48), slice(3, 83)):
        left = wide[:, columns]
        got = product(left, right, programs)
        assert relative_error(got, left.double().t() @ right.double()) <= 1e-5


COUNTS = [1, 2, 65, 66, 255, 256, 257, 289, 1025]
if HAS_GPU:  # cuBLAS 13.1 leaves rows out for most of these
    COUNTS += [4225, 4226, 6724, 9409, 16129, 16900, 65025, 66049, 95488, 256064, 462400]


@pytest.mark.parametrize("count", COUNTS)
def test_every_row_counts_once(product, count):
    ones = torch.ones(count, 32, dtype=torch.bfloat16)
    for width, other in ((16, 16), (32, 16)):
        for programs in (None, 40):
            got = product(ones[:, :width], ones[:, :other], programs)
            assert torch.equal(got, torch.full((width, other), float(count), device=got.device))


def test_equal_calls_give_equal_bits(product):
    left, right = rows(3000, 48), rows(3000, 32, seed=1)
    first = product(left, right, 9)
    assert all(torch.equal(product(left, right, 9), first) for _ in range(3))
