"""What padding costs: a batch of proteins with `lengths`, masked, and each of them alone.

    python benchmarks/padded_batches.py --device cuda --out results.json

Times of device time, median of single calls with cold caches on a GPU (see `bench_clock` of the
tools). "alone" is the sum over the sequences, each cut out to its own length beforehand.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from esmfold2_trimul_tools.bench_clock import make_clock
from esmfold2_trimul_tools.bench_environment import describe_environment
from esmfold2_trimul_tools.bench_problem import Case, make_problem, relative_error
from esmfold2_trimul_tools.bench_report import origin
from esmfold2_trimul_tools.bench_results import write_results
from esmfold2_trimul_tools.bench_rivals import Sources
from esmfold2_trimul_tools.model import resolve_device
from esmfold2_trimul_tools.repository import find_root, load_kernel

BATCHES = ["512,300,200,100", "1024,700,400,200", "1024,256,256,256", "1024,1024,1024,1024"]


@dataclass(frozen=True)
class Settings:
    """What `describe_environment` asks for."""

    device: torch.device
    root: Path
    dtypes: tuple[str, ...]
    seed: int = 0


def measure(
    kernel: Any, clock: Any, channels: int, lengths: list[int], dtype: str, device: torch.device
) -> dict[str, Any]:
    """One row: milliseconds of each way, and how far the padded way is from the masked one."""
    longest = max(lengths)
    case = Case(channels, longest, dtype, batch=len(lengths), mask="none")
    problem = make_problem(case, device)
    x = problem.x
    real = torch.tensor(lengths, dtype=torch.int32, device=device)
    within = torch.arange(longest, device=device) < real[:, None]
    mask = within[:, :, None] & within[:, None, :]
    assert torch.equal(kernel.lengths_from_mask(mask), real)
    update = partial(kernel.triangle_multiplicative_update, **problem.weights)
    wanted = update(x, mask=mask).masked_fill(~mask[..., None], 0).double()
    row = {"C": channels, "lengths": lengths, "dtype": dtype}
    row["difference"] = relative_error(update(x, lengths=real), wanted)

    def milliseconds(*call: Any, **options: Any) -> float:
        return clock.time(partial(update, *call, **options), 0.3)["device_ms"]["median"]

    row["masked_ms"] = milliseconds(x, mask=mask)
    row["lengths_ms"] = milliseconds(x, lengths=real)
    row["alone_ms"] = sum(
        milliseconds(x[index : index + 1, :length, :length].contiguous())
        for index, length in enumerate(lengths)
    )
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batches", nargs="+", default=BATCHES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--commit", help="what to record; git's answer unless given")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = Settings(resolve_device(options.device), find_root(), (options.dtype,))
    sources = Sources(load_kernel(settings.root))
    clock = make_clock(settings.device)
    command = shlex.join(["python", "benchmarks/padded_batches.py", *sys.argv[1:]])
    environment = describe_environment(settings, sources, command, options.commit)
    print(origin(environment))
    print("| C | lengths | masked, ms | lengths, ms | alone, ms | lengths / masked | / alone |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for channels in options.widths:
        for batch in options.batches:
            lengths = [int(length) for length in batch.split(",")]
            row = measure(
                sources.kernel, clock, channels, lengths, options.dtype, settings.device
            )
            rows.append(row)
            masked, padded, alone = (row[f"{way}_ms"] for way in ("masked", "lengths", "alone"))
            print(
                f"| {channels} | {', '.join(map(str, lengths))} | {masked:.3g} | {padded:.3g} "
                f"| {alone:.3g} | {padded / masked:.2f} | {padded / alone:.2f} |",
                flush=True,
            )
    if options.out is not None:
        write_results({"environment": environment, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
