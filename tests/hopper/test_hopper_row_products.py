"""The Hopper variant of sums over pairs: which calls it takes; on a GPU that runs it, its sums."""

import json

import pytest
import torch
from fresh_process import python_output
from helpers import memory_of_no_numbers, relative_error, seeded

pytest.importorskip("triton")
BF16, F16 = torch.bfloat16, torch.float16
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="no Hopper GPU")
pytestmark = [pytest.mark.kernels_ci, pytest.mark.usefixtures("watched")]
BUDGET = 1e-5  # of sums of up to 100,000 products in fp32

# In a process without TRITON_INTERPRET: programs and parts under a setting of the variant, by case.
TAKEN = """
import json, torch
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule

package = load_kernel(find_root())
stage, device = submodule(package, "triton_path.row_products"), submodule(
    package, "triton_parts.device"
)
config = submodule(package, "triton_parts.settings").LaunchConfig


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def taken(
    left=1024, last=256, right=256, rows=20_000, dtype=torch.bfloat16, parts=None, sums=True,
    block_k=256, target="sm_90", pitch=0,
):
    width = left + last
    if parts is not None:
        parts = stage.RowParts(
            empty(parts, width, right, dtype=torch.float32), empty(parts, left, dtype=torch.float32)
        )
    with device.standing_in(device.target_of(target, "any", 132)):
        try:
            launch = stage.prepare_row_products(
                empty(rows, left + pitch, dtype=dtype)[:, :left], empty(rows, right, dtype=dtype),
                "bf16", parts=parts,
                partial=empty(40, left, dtype=torch.float32) if sums else None,
                last=empty(rows, last, dtype=dtype) if last else None,
                config=config(64, 128, block_k, num_warps=4, num_stages=4, kernel="hopper"),
            )
        except ValueError as error:
            assert "setting must be of one of ['']" in str(error)
            return None
    assert launch.variant == "hopper" and launch.stage == "row_products"
    assert launch.value_of("accumulate") == (parts is not None)
    return [launch.programs, launch.programs // launch.constants["TILES"]]


print(json.dumps({
    "into": taken(),
    "narrow": taken(512, 128, 128, block_k=128),
    "out": taken(256, 0, 256),
    "wide": taken(2048, 512, 512),
    "three blocks": taken(192, 0, 256),
    "columns of wider rows": taken(pitch=8),
    "float16": taken(dtype=torch.float16),
    "few rows": taken(rows=130),
    "more parts": taken(parts=29),
    "without sums": taken(sums=False),
    "ragged hidden channels": taken(left=1000),
    "other width": taken(right=192),
    "unaligned": taken(pitch=4),
    "float32": taken(dtype=torch.float32),
    "another GPU": taken(target="sm_100"),
}))
"""
# Programs, and parts: as many as have programs for all tiles.
WANTED = {
    "into": [130, 13], "narrow": [130, 26], "out": [132, 66], "wide": [120, 3],
    "three blocks": [132, 66], "columns of wider rows": [130, 13], "float16": [130, 13],
    "few rows": [30, 3], "more parts": [290, 29], "without sums": [130, 13],
}  # fmt: skip


def test_what_it_takes():
    found = json.loads(python_output(TAKEN))
    assert {name: counts for name, counts in found.items() if counts is not None} == WANTED
    assert len(found) == 15


@pytest.fixture
def product(submodule):
    """The parts of rows left, right, partial and last, by a setting, chunk after chunk.

    Without `partial` the sums are those of left and last.
    """
    stage = submodule("triton_path.row_products")
    made = submodule("triton_parts.settings").LaunchConfig

    def compute(left, right, partial, last, blocks, chunks=1):
        parts, config = None, made(64, *blocks, num_warps=4, num_stages=4, kernel="hopper")
        nothing = [None] * chunks
        own_sums = partial is None
        for some in zip(
            left.chunk(chunks), right.chunk(chunks),
            nothing if own_sums else partial.chunk(chunks),
            nothing if last is None else last.chunk(chunks), strict=True,
        ):  # fmt: skip
            left, right, partial, last = some
            prepared = stage.prepare_row_products(
                left, right, "bf16", None, own_sums, parts, partial, last, config
            )
            parts = stage.row_products(left, right, prepared, parts, partial, last)
        return parts

    return compute


def rows(count, width, dtype=BF16, seed=0):
    return torch.randn(count, width, generator=seeded(seed)).to(dtype).cuda()


# Rows, their columns, those of `last` and of right, the blocks of columns, chunks.
PROBLEMS = {
    "one row": (1, 512, 128, 128, (128, 128), 1),
    "a step and a row": (65, 1024, 256, 256, (128, 256), 1),
    "ragged": (9_999, 1024, 256, 256, (128, 256), 1),
    "narrow": (9_999, 512, 128, 128, (128, 128), 1),
    "blocks of twice the columns": (5_000, 512, 128, 128, (256, 128), 1),
    "three blocks": (5_000, 192, 64, 256, (128, 256), 1),
    "none of another tensor": (5_000, 256, 0, 256, (128, 256), 1),
    "wide": (3_000, 2048, 512, 512, (128, 256), 1),
    "chunks": (30_000, 1024, 256, 256, (128, 256), 4),
    "chunks, one of few steps": (4_097, 512, 128, 128, (128, 128), 2),
}


@on_hopper
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_row_counts_once(product, name, dtype):
    """Beside float64; memory is NaN before, and equal calls give equal bits."""
    count, width, width_last, width_right, blocks, chunks = PROBLEMS[name]
    left, right = rows(count, width, dtype), rows(count, width_right, dtype, 1)
    last = rows(count, width_last, dtype, 2) if width_last else None
    partial = rows(count // 64 + chunks, width, torch.float32, 3)
    with memory_of_no_numbers():
        parts = product(left, right, partial, last, blocks, chunks)
        again = product(left, right, partial, last, blocks, chunks)
        own = product(left, right, None, last, blocks, chunks)
    assert torch.equal(parts.products, again.products) and torch.equal(parts.sums, again.sums)
    both = (left if last is None else torch.cat([left, last], 1)).double().cpu()
    got = parts.products.double().sum(0).cpu()
    assert relative_error(got, both.T @ right.double().cpu()) <= BUDGET
    assert relative_error(parts.sums.double().sum(0), partial.double().sum(0).cpu()) <= BUDGET
    assert torch.equal(own.products, parts.products)
    assert relative_error(own.sums.double().sum(0), both.sum(0)) <= BUDGET
