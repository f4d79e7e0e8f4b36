"""What a training step on a batch of short sequences takes, run as one and each sequence alone.

    python benchmarks/batches.py --device cuda --out results.json

Milliseconds of device and of host time, the median of single calls with cold caches on a GPU (see
`bench.clock` of the tools), and the peak beyond the arguments in tensors of the batch's pair size.
"Alone" is the same step where nothing counts as small enough to run as one.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from esmfold2_trimul_tools.bench.case import Case
from esmfold2_trimul_tools.bench.clock import make_clock
from esmfold2_trimul_tools.bench.problem import make_problem
from esmfold2_trimul_tools.bench.report import origin
from esmfold2_trimul_tools.bench.rivals import Call, Sources, trained
from esmfold2_trimul_tools.bench.run import peak_bytes
from esmfold2_trimul_tools.documents import write_document
from esmfold2_trimul_tools.environment import ScriptSettings, describe_environment
from esmfold2_trimul_tools.folding.model import resolve_device
from esmfold2_trimul_tools.repository import find_root, load_kernel

BATCHES = ["8x64", "4x128", "2x256", "4x256", "2x384"]


def measure(kernel: Any, clock: Any, case: Case, device: torch.device) -> dict[str, Any]:
    """One row: the times and peaks of both ways, and whether their gradients of x are equal."""
    launches = importlib.import_module(f"{kernel.__name__}.triton_path.launches")
    problem, small = make_problem(case, device), launches.SMALL_PLANES
    options = {**problem.weights, "mask": problem.mask, "direction": case.direction}
    call = Call(kernel.triangle_multiplicative_update, (problem.x,), options)
    step = trained(call, problem.grad_out)
    row = {"C": case.channels, "L": case.length, "B": case.batch, "dtype": case.dtype}
    row |= {"direction": case.direction}
    gradients = []
    for way, bytes_ in (("together", small), ("alone", 0)):
        launches.SMALL_PLANES = bytes_
        launches._launches.clear()
        with torch.enable_grad():
            gradients.append(step())
            peak = peak_bytes(step, device)
            row[way] = clock.time(step, 0.3) | {"peak_pairs": peak / problem.x.nbytes}
    launches.SMALL_PLANES = small
    launches._launches.clear()
    return row | {"equal": torch.equal(*gradients)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batches", nargs="+", default=BATCHES, help="sequences x residues")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--commit", help="what to record; git's answer unless given")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = ScriptSettings(resolve_device(options.device), find_root(), (options.dtype,))
    sources, clock = Sources(load_kernel(settings.root)), make_clock(settings.device)
    if settings.device.type != "cuda":
        parser.error(f"--device must be a GPU, where sequences run as one; got {settings.device}")
    command = shlex.join(["python", "benchmarks/batches.py", *sys.argv[1:]])
    environment = describe_environment(settings, sources, command, options.commit)
    print(origin(environment))
    print("| C | B x L | direction | alone, ms | together | host, alone | together | peaks | dx |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for width, batch, direction in product(
        options.widths, options.batches, ("outgoing", "incoming")
    ):
        count, length = map(int, batch.split("x"))
        case = Case(width, length, options.dtype, direction, batch=count, passes="training")
        row = measure(sources.kernel, clock, case, settings.device)
        rows.append(row)
        one, all_ = row["alone"], row["together"]
        print(
            f"| {width} | {batch} | {direction} | {one['device_ms']['median']:.3g} "
            f"| {all_['device_ms']['median']:.3g} | {one['host_ms']:.3g} | {all_['host_ms']:.3g} "
            f"| {one['peak_pairs']:.2f}, {all_['peak_pairs']:.2f} "
            f"| {'equal' if row['equal'] else 'differ'} |", flush=True,
        )  # fmt: skip
    if options.out is not None:
        write_document({"environment": environment, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
