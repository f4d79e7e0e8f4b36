"""A pair tensor over many ranks beside one: time, memory, bits, and the rate of the messages.

    torchrun --standalone --nproc-per-node 8 benchmarks/sharded_pairs.py --out results.json

One process a GPU, with NCCL; on CPUs with gloo, of which the figures tell nothing about GPUs. On
several hosts, start it on each as torchrun's documentation says.

Milliseconds are those of the slowest rank, the median of calls that all begin together. "alone" is
the same call of the whole pair tensor on one rank, while the others wait. "peak" is the most memory
of a rank beyond its arguments, in its share of the pair tensor.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from esmfold2_trimul_tools.bench.case import DIRECTIONS, Case
from esmfold2_trimul_tools.bench.problem import Problem, make_problem, relative_error
from esmfold2_trimul_tools.bench.report import origin
from esmfold2_trimul_tools.bench.rivals import Sources
from esmfold2_trimul_tools.documents import write_document
from esmfold2_trimul_tools.environment import ScriptSettings, describe_environment
from esmfold2_trimul_tools.folding.memory import measure_peak_memory
from esmfold2_trimul_tools.repository import find_root, load_kernel

LEAST_CALLS, MOST_CALLS = 3, 50
HIDDEN_RESIDUES = 3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device, budget: float) -> float:
    """The median time of a call that every rank makes, of the slowest rank each time."""

    def once() -> float:
        synchronize(device)
        dist.barrier()
        start = time.perf_counter()
        call()
        synchronize(device)
        slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item()

    once()  # compiles, and makes the channels between the ranks
    calls = max(LEAST_CALLS, min(MOST_CALLS, int(budget / once())))
    return statistics.median(once() for _ in range(calls))


def message_rate(megabytes: int, device: torch.device, budget: float) -> float:
    """Bytes a second that a rank receives, if every rank sends so much to each other."""
    ranks = dist.get_world_size()
    sent = torch.randint(0, 256, (ranks, megabytes << 20), dtype=torch.uint8, device=device)
    received = torch.empty_like(sent)
    spent = seconds(lambda: dist.all_to_all_single(received, sent), device, budget)
    return (ranks - 1) * (megabytes << 20) / spent


def problem_of(
    case: Case, rows: slice, whole: bool, device: torch.device
) -> tuple[Problem, torch.Tensor]:
    """The problem and this rank's mask; x is the whole pair tensor, the same on all ranks, or rows.

    Rows alone need no memory for the rest.
    """
    length = case.length
    small = Case(case.channels, 1, case.dtype, case.direction, mask="none")
    problem = make_problem(case if whole else small, device)
    if not whole:
        shape = 1, rows.stop - rows.start, length, case.channels
        problem = problem._replace(x=torch.randn(shape, device=device).to(case.torch_dtype))
    real = torch.arange(length, device=device) < max(1, length - HIDDEN_RESIDUES)
    return problem, (real[rows, None] & real).contiguous()


def measure(
    kernel: Any, case: Case, whole: bool, device: torch.device, budget: float
) -> dict[str, Any]:
    """One row."""
    ranks = dist.get_world_size()
    rows = kernel.exchange.Layout(ranks, case.length, case.hidden).rows(dist.get_rank())
    problem, mask = problem_of(case, rows, whole, device)
    x = problem.x[:, rows].contiguous() if whole else problem.x

    def sharded() -> torch.Tensor:
        return kernel.sharded_triangle_multiplicative_update_with_residual(
            x, case.direction, x, None, group=None, length=case.length, mask=mask,
            **problem.weights,
        )  # fmt: skip

    spent = seconds(sharded, device, budget)
    with measure_peak_memory(device) as memory:
        made = sharded()
    peak = torch.tensor(memory.added_bytes)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    share = case.pair_bytes / ranks
    row = {
        "C": case.channels, "L": case.length, "dtype": case.dtype, "direction": case.direction,
        "ranks": ranks, "ms": 1e3 * spent, "peak_shares": peak.item() / share,
        "alone_ms": None, "same_bits": None, "difference": None,
    }  # fmt: skip
    if not whole:
        return row
    masks = [None] * ranks
    dist.all_gather_object(masks, mask.cpu())
    full = torch.cat(masks).to(device)

    def alone() -> torch.Tensor | None:
        if dist.get_rank() == 0:
            return kernel.triangle_multiplicative_update_with_residual(
                problem.x, case.direction, problem.x, None, mask=full[None], **problem.weights
            )
        return None

    row["alone_ms"] = 1e3 * seconds(alone, device, budget)
    wanted = alone()
    if wanted is None:
        wanted = torch.empty_like(problem.x)
    dist.broadcast(wanted, 0)
    wanted = wanted[:, rows]
    found = torch.tensor([
        float(not torch.equal(made, wanted)),
        relative_error(made, wanted.double()) if made.numel() else 0.0,
    ], dtype=torch.float64)  # fmt: skip
    dist.all_reduce(found, dist.ReduceOp.MAX)
    row["same_bits"], row["difference"] = found[0].item() == 0, found[1].item()
    return row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--dtype", help="bfloat16 on GPUs and float32 on CPUs unless given")
    parser.add_argument("--whole-up-to", type=int, help="the longest L also run on one rank")
    parser.add_argument(
        "--messages", type=int, nargs="+", default=[1, 16, 64],
        help="MiB from each rank to each other, of which the rate is measured",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing for each row")
    parser.add_argument("--commit", help="what to record; git's answer unless given")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kind = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = kind == "cuda"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    lengths = options.lengths or ([1024, 2048, 4096, 8192] if on_gpu else [64, 128])
    whole_up_to = options.whole_up_to or (4096 if on_gpu else 512)
    settings = ScriptSettings(device, find_root(), (dtype,))
    sources = Sources(load_kernel(settings.root))
    ranks, first = dist.get_world_size(), dist.get_rank() == 0
    command = shlex.join([
        "torchrun", "--nproc-per-node", str(ranks), "benchmarks/sharded_pairs.py", *sys.argv[1:]
    ])  # fmt: skip
    environment = describe_environment(settings, sources, command, options.commit)

    def say(line: str) -> None:
        if first:
            print(line, flush=True)

    say(f"{ranks} ranks, each {origin(environment)}")
    rates = {size: message_rate(size, device, options.budget) for size in options.messages}
    for size, rate in rates.items():
        say(f"{size} MiB from each rank to each other: {rate / 1e9:.3g} GB/s received")
    columns = "C", "L", "direction", "ms", "alone", "alone / ms", "peak", "same bits", "difference"
    say(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    rows = []
    for channels, length, direction in product(options.widths, lengths, options.directions):
        case = Case(channels, length, dtype, direction)
        row = measure(sources.kernel, case, length <= whole_up_to, device, options.budget)
        rows.append(row)
        alone, many = row["alone_ms"], row["ms"]
        beside = ["-"] * 4
        if alone is not None:
            bits = "yes" if row["same_bits"] else "no"
            beside = [f"{alone:.3g}", f"{alone / many:.2f}", bits, f"{row['difference']:.1e}"]
        say(
            f"| {channels} | {length} | {direction} | {many:.3g} | {beside[0]} | {beside[1]} "
            f"| {row['peak_shares']:.2f} | {beside[2]} | {beside[3]} |"
        )
        if first and options.out is not None:
            found = {"environment": environment, "ranks": ranks, "rates": rates, "rows": rows}
            write_document(found, options.out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
