"""What padding costs: a batch of proteins with `lengths`, masked, and each of them alone.

    python benchmarks/padded_batches.py --device cuda --out results.json

Milliseconds of device time, the median of single calls with cold caches on a GPU (see `bench.clock`
of the tools), of forward calls and of steps with the gradients of x and of every parameter. "alone"
is the sum over the sequences, each cut out to its own length beforehand.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from esmfold2_trimul_tools.bench.case import PASSES, Case
from esmfold2_trimul_tools.bench.clock import make_clock
from esmfold2_trimul_tools.bench.problem import make_problem, relative_error
from esmfold2_trimul_tools.bench.report import origin
from esmfold2_trimul_tools.bench.rivals import Call, Sources, trained
from esmfold2_trimul_tools.documents import write_document
from esmfold2_trimul_tools.environment import ScriptSettings, describe_environment
from esmfold2_trimul_tools.folding.model import resolve_device
from esmfold2_trimul_tools.repository import find_root, load_kernel

BATCHES = ["512,300,200,100", "1024,700,400,200", "1024,256,256,256", "1024,1024,1024,1024"]


def measure(
    kernel: Any,
    clock: Any,
    channels: int,
    lengths: list[int],
    dtype: str,
    passes: str,
    device: torch.device,
) -> dict[str, Any]:
    """One row: milliseconds of each way, and how far the padded way is from the masked one.

    That is of outputs, whatever the passes.
    """
    longest = max(lengths)
    case = Case(channels, longest, dtype, batch=len(lengths), mask="none", passes=passes)
    problem = make_problem(case, device)
    x = problem.x
    real = torch.tensor(lengths, dtype=torch.int32, device=device)
    within = torch.arange(longest, device=device) < real[:, None]
    mask = within[:, :, None] & within[:, None, :]
    assert torch.equal(kernel.lengths_from_mask(mask), real)
    update = partial(kernel.triangle_multiplicative_update, **problem.weights)
    wanted = update(x, mask=mask).masked_fill(~mask[..., None], 0).double()
    row = {"passes": passes, "C": channels, "lengths": lengths, "dtype": dtype}
    row["difference"] = relative_error(update(x, lengths=real), wanted)
    del wanted

    def milliseconds(grad_out: torch.Tensor | None, x: torch.Tensor, **options: Any) -> float:
        call = Call(kernel.triangle_multiplicative_update, (x,), {**problem.weights, **options})
        if passes == "training":
            call = trained(call, grad_out)
        with torch.set_grad_enabled(passes == "training"):
            return clock.time(call, 0.3)["device_ms"]["median"]

    row["masked_ms"] = milliseconds(problem.grad_out, x, mask=mask)
    row["lengths_ms"] = milliseconds(problem.grad_out, x, lengths=real)
    row["alone_ms"] = 0.0
    for index, length in enumerate(lengths):
        cut = slice(index, index + 1), slice(length), slice(length)
        grad_out = None if problem.grad_out is None else problem.grad_out[cut].contiguous()
        row["alone_ms"] += milliseconds(grad_out, x.detach()[cut].contiguous())
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device")
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batches", nargs="+", default=BATCHES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--commit", help="what to record; git's answer unless given")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = ScriptSettings(resolve_device(options.device), find_root(), (options.dtype,))
    sources = Sources(load_kernel(settings.root))
    clock = make_clock(settings.device)
    command = shlex.join(["python", "benchmarks/padded_batches.py", *sys.argv[1:]])
    environment = describe_environment(settings, sources, command, options.commit)
    print(origin(environment))
    print("| passes | C | lengths | masked | lengths | alone | lengths / masked | / alone |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for passes, channels, batch in product(options.passes, options.widths, options.batches):
        lengths = [int(length) for length in batch.split(",")]
        row = measure(
            sources.kernel, clock, channels, lengths, options.dtype, passes, settings.device
        )
        rows.append(row)
        masked, padded, alone = (row[f"{way}_ms"] for way in ("masked", "lengths", "alone"))
        print(
            f"| {passes} | {channels} | {', '.join(map(str, lengths))} | {masked:.3g} "
            f"| {padded:.3g} | {alone:.3g} | {padded / masked:.2f} | {padded / alone:.2f} |",
            flush=True,
        )
    if options.out is not None:
        write_document({"environment": environment, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
