"""A pair tensor over many ranks beside one: time, memory, bytes, bits, and the messages' rate.

What each rank runs. All of them measure every shape together, and the first keeps the results.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...documents import write_document
from ...environment import describe_environment
from ...folding.memory import measure_peak_memory
from ...ranks import join_ranks, received_rate, slowest_seconds
from ...repository import load_kernel
from ..case import Case
from ..problem import Problem, make_problem, relative_error
from ..rivals import Sources
from .results import Results, Row
from .settings import Plan

_LEAST_CALLS, _MOST_CALLS = 3, 50
_HIDDEN_RESIDUES = 3


def run(
    plan: Plan,
    command: str,
    out: Path | None,
    commit: str | None,
    progress: Callable[[str, int, int], None] | None,
) -> Results | None:
    """The results on the first rank, None on the others.

    Args:
        out: the file that the first rank keeps them in, after every shape.
        progress: called on the first rank with (what, done, total); None on the others.

    Raises:
        UserError: `out` can't be written.
    """
    device = join_ranks(plan.device.type)
    first, cases = dist.get_rank() == 0, plan.cases()
    sources = Sources(load_kernel(plan.root))
    environment = describe_environment(replace(plan, device=device), sources, command, commit)
    results: Results = {
        "environment": environment, "ranks": dist.get_world_size(), "messages": [], "rows": []
    }  # fmt: skip

    def report(what: str, done: int) -> None:
        if first:
            progress(what, done, len(cases))
            if out is not None:
                write_document(results, out)

    def seconds(call: Callable[[], Any]) -> float:
        """The median time of a call that every rank makes."""
        slowest_seconds(call, device)  # compiles, and makes the channels between the ranks
        once = slowest_seconds(call, device)
        calls = max(_LEAST_CALLS, min(_MOST_CALLS, int(plan.budget / once)))
        return statistics.median(slowest_seconds(call, device) for _ in range(calls))

    with torch.no_grad():
        for size in plan.messages:
            report(f"messages of {size} MiB", 0)
            rate = received_rate(size << 20, device, seconds)
            results["messages"].append({"mib": size, "bytes_per_s": rate})
        for done, case in enumerate(cases):
            report(str(case), done)
            results["rows"].append(_measure(sources.kernel, plan, case, device, seconds))
    report("done", len(cases))
    dist.destroy_process_group()
    return results if first else None


def _measure(
    kernel: Any,
    plan: Plan,
    case: Case,
    device: torch.device,
    seconds: Callable[[Callable[[], Any]], float],
) -> Row:
    """One row, the same on all ranks."""
    ranks, rank, length = dist.get_world_size(), dist.get_rank(), case.length
    rows, beside = kernel.exchange.Layout(ranks, length, 1).rows(rank), length <= plan.alone_up_to
    problem = _problem_of(case, rows, beside, device, plan.seed)
    x = problem.x[:, rows].contiguous() if beside else problem.x
    layout = kernel.exchange.Layout.of(ranks, length, case.hidden, x)
    training, grad_out = case.passes == "training", problem.grad_out
    own_grad_out = grad_out[:, rows].contiguous() if training and beside else grad_out
    leaves = [problem.x, x, *problem.weights.values()]
    for leaf in leaves:
        leaf.requires_grad_(training)

    def value(
        update: Callable[[], torch.Tensor], of: torch.Tensor, grad: torch.Tensor | None
    ) -> torch.Tensor:
        """The output; in training the gradient of `of`, made beside those of all parameters."""
        if not training:
            return update()
        with torch.enable_grad():
            return torch.autograd.grad(update(), [of, *problem.weights.values()], grad)[0]

    real = torch.arange(length, device=device) < max(1, length - _HIDDEN_RESIDUES)
    mask = real[:, None] & real
    own_mask = mask[rows].contiguous()

    of_rows = partial(
        kernel.sharded_triangle_multiplicative_update_with_residual, x, case.direction, x, None,
        group=None, length=length, mask=own_mask, **problem.weights,
    )  # fmt: skip
    of_whole = partial(
        kernel.triangle_multiplicative_update_with_residual, problem.x, case.direction, problem.x,
        None, mask=mask[None], **problem.weights,
    )  # fmt: skip

    def sharded() -> torch.Tensor:
        return value(of_rows, x, own_grad_out)

    def alone() -> torch.Tensor | None:
        return None if rank else value(of_whole, problem.x, grad_out)

    row = {"C": case.channels, "L": length, "dtype": case.dtype, "direction": case.direction}
    row |= {"passes": case.passes}
    row |= {"ms": 1e3 * seconds(sharded), "alone_ms": None, "same_bits": None, "difference": None}
    with measure_peak_memory(device) as memory:
        made = sharded()
    kept = kernel.carriers.memory.known_memory_of(None)
    mapped = 0 if kept is None else kept.bytes(device)
    kernel.free_exchange_memory()  # of another case there may be less
    own = {
        "residues": rows.stop - rows.start,
        "channels": layout.channel_count(rank),
        "peak_bytes": memory.added_bytes + mapped,
        "mapped_bytes": mapped,
        # A backward sends dt, and da and db.
        "sent_bytes": layout.sent(rank, 2 + training, 1 + 2 * training)[1]
        * length
        * case.torch_dtype.itemsize,
    }
    of_ranks: list[dict[str, int]] = [own] * ranks
    dist.all_gather_object(of_ranks, own)
    row["peak_shares"] = max(of["peak_bytes"] for of in of_ranks) * ranks / case.pair_bytes
    row["of_ranks"] = of_ranks
    if not beside:
        return row

    row["alone_ms"] = 1e3 * seconds(alone)
    whole = torch.empty_like(problem.x) if rank else alone()
    dist.broadcast(whole, 0)
    wanted = whole[:, rows]
    found: list[tuple[bool, float]] = [(True, 0.0)] * ranks
    difference = relative_error(made, wanted.double()) if made.numel() else 0.0
    dist.all_gather_object(found, (torch.equal(made, wanted), difference))
    row["same_bits"] = all(same for same, _ in found)
    # JSON has no NaN, which a maximum of torch's keeps.
    off = torch.tensor([off for _, off in found], dtype=torch.float64).max().item()
    row["difference"] = off if math.isfinite(off) else None
    return row


def _problem_of(case: Case, rows: slice, whole: bool, device: torch.device, seed: int) -> Problem:
    """The problem, the same on all ranks; not `whole`, its x is a rank's rows alone.

    Rows alone need no memory for the rest. Its mask is not for use.
    """
    if whole:
        return make_problem(case, device, seed)
    problem = make_problem(replace(case, length=1), device, seed)
    shape = 1, rows.stop - rows.start, case.length, case.channels
    x = torch.randn(shape, device=device).to(case.torch_dtype)
    return problem._replace(x=x, grad_out=None if problem.grad_out is None else x.clone())
