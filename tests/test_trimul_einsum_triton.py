"""Stage 2 against float64, alone: ragged lengths, pads that are NaN, groups of tiles."""

from types import SimpleNamespace

import pytest
import torch
from helpers import DTYPES, relative_error, room, seeded

STAGE_BUDGET = {torch.bfloat16: 2.5e-3, torch.float16: 4e-4, torch.float32: 1e-6}


def make_planes(length, hidden, batch, dtype, submodule, pads=0.0):
    generator = seeded(length)
    pitch = submodule("triton_parts.tiles").padded_pitch(length)
    planes = torch.full((batch, 2 * hidden, length, pitch), pads, dtype=dtype)
    planes[..., :length] = torch.randn(batch, 2 * hidden, length, length, generator=generator).to(
        dtype
    )
    return planes


def multiply(submodule, a, b, config=None, product=None, **others):
    """The product of a and b, into `product` if it is given."""
    product = torch.empty_like(a) if product is None else product
    call = SimpleNamespace(precision="fp32", lengths=None, hidden=a.shape[1])
    launches = submodule("triton_parts.launch").Launches()
    submodule("trimul_einsum_triton").trimul_einsum_fwd(
        call, launches, a, b, product, config=config, **others
    )
    return product


def assert_product(submodule, device, planes, length, config=None, product=None):
    """The product of the planes [B, 2D, L, pitch] of a and b."""
    a, b = planes[..., :length].double().chunk(2, dim=1)
    wanted = torch.einsum("bdik,bdjk->bdij", a, b)
    product = multiply(submodule, *planes.to(device).chunk(2, dim=1), config, product)
    error = relative_error(product[..., :length], wanted)
    limit = STAGE_BUDGET[planes.dtype] * room(wanted.numel())
    assert error <= limit, f"relative error {error:.2e}"


@pytest.mark.kernels_ci
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 33, 70])
def test_product(submodule, on_triton, dtype, length):
    planes = make_planes(length, 3, 2, dtype, submodule)
    assert_product(submodule, on_triton, planes, length)


@pytest.mark.parametrize("block_m, block_n, block_k", [(16, 64, 32), (64, 16, 16), (32, 32, 64)])
def test_descriptors_never_read_the_pads(submodule, on_triton, block_m, block_n, block_k):
    config = submodule("triton_parts.settings").LaunchConfig(block_m, block_n, block_k, 4, 2, True)
    for length in (9, 41):
        planes = make_planes(length, 2, 1, torch.float16, submodule, pads=float("nan"))
        assert_product(submodule, on_triton, planes, length, config)


@pytest.mark.parametrize("persistent", [1, 2])
@pytest.mark.parametrize("descriptors", [False, True])
def test_persistent_programs_take_every_tile(submodule, on_triton, persistent, descriptors):
    config = submodule("triton_parts.settings").LaunchConfig(
        16, 32, 32, 4, 2, descriptors, persistent=persistent
    )
    planes = make_planes(41, 3, 2, torch.float16, submodule)
    assert_product(submodule, on_triton, planes, 41, config)


@pytest.mark.parametrize("descriptors", [False, True])
def test_a_product_that_is_given(submodule, on_triton, descriptors):
    """Rows of a product whose channels follow each other within a row; the rest is left alone."""
    config = submodule("triton_parts.settings").LaunchConfig(16, 32, 32, 4, 2, descriptors)
    planes = make_planes(21, 3, 1, torch.float16, submodule)
    buffer = torch.full((21, 5, 32), 7.0, dtype=torch.float16, device=on_triton)
    product = buffer[:, 1:4].unsqueeze(0).transpose(1, 2)
    assert_product(submodule, on_triton, planes, 21, config, product)
    assert bool((buffer[:, 0] == 7).all()) and bool((buffer[:, 4] == 7).all())


@pytest.mark.parametrize("descriptors", [False, True])
def test_planes_that_lie_apart(submodule, on_triton, descriptors):
    """a among the channels of the rows of a longer memory, b by itself."""
    config = submodule("triton_parts.settings").LaunchConfig(16, 32, 32, 4, 2, descriptors)
    planes = make_planes(21, 3, 1, torch.float16, submodule)
    a, b = planes.to(on_triton).chunk(2, dim=1)
    buffer = torch.full((21, 5, 32), float("nan"), dtype=torch.float16, device=on_triton)
    apart = buffer[:, 1:4].unsqueeze(0).transpose(1, 2)
    apart.copy_(a)
    got, wanted = (
        multiply(submodule, *pair, config)[..., :21] for pair in ((apart, b.clone()), (a, b))
    )
    assert torch.equal(got, wanted)


def test_more_rows_of_tiles_than_a_group_holds(submodule, on_triton):
    config = submodule("triton_parts.settings").LaunchConfig(16, 32, 32, 4, 2)
    planes = make_planes(16 * 9 + 3, 1, 1, torch.float32, submodule)
    assert_product(submodule, on_triton, planes, 16 * 9 + 3, config)


@pytest.mark.parametrize("turned", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("descriptors, persistent", [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_operands_that_lie_the_other_way(submodule, on_triton, turned, descriptors, persistent):
    """Planes [K, M] of a and [K, N] of b; with both turned no pad is ever summed over."""
    config = submodule("triton_parts.settings").LaunchConfig(
        16, 32, 16, 4, 2, descriptors, persistent=persistent
    )
    for length in (1, 37):
        pads = float("nan") if descriptors or all(turned) else 0.0
        planes = make_planes(length, 2, 1, torch.float16, submodule, pads)
        a, b = planes.to(on_triton).chunk(2, dim=1)
        product = multiply(submodule, a, b, config, turned=turned)
        left, right = (
            plane[..., :length].transpose(-1, -2) if turn else plane[..., :length]
            for plane, turn in zip(planes.chunk(2, dim=1), turned, strict=True)
        )
        wanted = left.double() @ right.double().transpose(-1, -2)
        assert relative_error(product[..., :length], wanted) <= STAGE_BUDGET[torch.float16]
