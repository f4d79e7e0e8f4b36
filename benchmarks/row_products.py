"""left^T right over all pairs, of our kernel and of the vendor's GEMM: rows left out, and time.

    python benchmarks/row_products.py --device cuda --out results.json

Whether every row counts is seen with ones, of which M rows make M exactly: for M = L^2, and for M
rounded up to a multiple of 64. Milliseconds are of device time, the median of single calls with
cold caches on a GPU (see `bench.clock` of the tools), for the rows of a chunk of the backward.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from esmfold2_trimul_tools.bench.clock import make_clock
from esmfold2_trimul_tools.bench.problem import relative_error
from esmfold2_trimul_tools.bench.report import origin
from esmfold2_trimul_tools.bench.rivals import Call, Sources
from esmfold2_trimul_tools.documents import write_document
from esmfold2_trimul_tools.environment import ScriptSettings, describe_environment
from esmfold2_trimul_tools.folding.model import resolve_device
from esmfold2_trimul_tools.repository import find_root, load_kernel

WIDTHS = [(16, 16), (64, 64), (128, 128), (256, 256), (640, 128), (1280, 256)]
TIMED = [(16_384, 128), (16_384, 256), (32_768, 128), (32_768, 256), (73_728, 256)]


def vendors(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.mm(left.t(), right, out_dtype=torch.float32)


def ours(subject: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    prepared = subject.prepare_row_products(left, right, "fp32")
    return subject.row_products(left, right, prepared).products.sum(0)


def wrong_counts(
    subject: Any, width: int, other: int, counts: list[int], dtype: torch.dtype, device: Any
) -> dict[str, list[int]]:
    """The numbers of rows of which not every one is in the product."""
    left = torch.ones(max(counts), width, dtype=dtype, device=device)
    right = torch.ones(max(counts), other, dtype=dtype, device=device)
    wrong: dict[str, list[int]] = {"vendor": [], "ours": []}
    for count in counts:
        some = left[:count], right[:count]
        for name, got in (("vendor", vendors(*some)), ("ours", ours(subject, *some))):
            if not torch.equal(got, torch.full_like(got, float(count))):
                wrong[name].append(count)
    return wrong


def timed(
    subject: Any, clock: Any, count: int, width: int, other: int, dtype: torch.dtype, device: Any
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)
    left, right = (
        torch.randn(count, some, generator=generator, dtype=dtype, device=device)
        for some in (width, other)
    )
    total = torch.zeros(width, other, device=device)
    wanted = left.double().t() @ right.double()
    prepared = subject.prepare_row_products(left, right, "fp32")

    def add_vendors(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return total.add_(vendors(left, right))

    def add_ours(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return total.add_(subject.row_products(left, right, prepared).products.sum(0))

    row: dict[str, Any] = {"M": count, "N": width, "K": other}
    for name, add in (("vendor", add_vendors), ("ours", add_ours)):
        total.zero_()
        row[f"{name}_error"] = relative_error(add(left, right), wanted)
        row[f"{name}_ms"] = clock.time(Call(add, (left, right), {}), 0.2)["device_ms"]["median"]
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device")
    parser.add_argument("--longest", type=int, default=700)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--commit", help="what to record; git's answer unless given")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = ScriptSettings(resolve_device(options.device), find_root(), tuple(options.dtypes))
    device = settings.device
    if device.type != "cuda":
        parser.error(f"--device must be a GPU, whose vendor's GEMM is compared; got {device}")
    sources = Sources(load_kernel(settings.root))
    subject = importlib.import_module(f"{sources.kernel.__name__}.triton_path.row_products")
    command = shlex.join(["python", "benchmarks/row_products.py", *sys.argv[1:]])
    environment = describe_environment(settings, sources, command, options.commit)
    environment["cublas"] = next(
        (found.version for found in metadata.distributions()
         if (found.name or "").startswith("nvidia-cublas")), None
    )  # fmt: skip
    print(origin(environment), f"cuBLAS {environment['cublas']}")
    squares = [length**2 for length in range(1, options.longest + 1)]
    rounded = sorted({-(-count // 64) * 64 for count in squares})
    rows, times = [], []
    print("| dtype | N, K | M | numbers of rows | vendor wrong | ours wrong |")
    print("|---|---|---|---|---|---|")
    for dtype in options.dtypes:
        for width, other in WIDTHS:
            for which, counts in (("L^2", squares), ("L^2 to 64", rounded)):
                wrong = wrong_counts(subject, width, other, counts, getattr(torch, dtype), device)
                rows.append(
                    {"dtype": dtype, "N": width, "K": other, "M": which, "counts": len(counts)}
                    | wrong
                )
                print(
                    f"| {dtype} | {width}, {other} | {which} | {len(counts)} "
                    f"| {len(wrong['vendor'])} | {len(wrong['ours'])} |", flush=True,
                )  # fmt: skip
    print("| M | N, K | vendor ms | ours ms | ratio | vendor error | ours |")
    print("|---|---|---|---|---|---|---|")
    clock = make_clock(device)
    for count, width in TIMED:
        for wide in (width, 5 * width):
            row = timed(subject, clock, count, wide, width, torch.bfloat16, device)
            times.append(row)
            print(
                f"| {count} | {wide}, {width} | {row['vendor_ms']:.4f} | {row['ours_ms']:.4f} "
                f"| {row['ours_ms'] / row['vendor_ms']:.2f} | {row['vendor_error']:.1e} "
                f"| {row['ours_error']:.1e} |", flush=True,
            )  # fmt: skip
    if options.out is not None:
        write_document({"environment": environment, "rows": rows, "times": times}, options.out)


if __name__ == "__main__":
    main()
