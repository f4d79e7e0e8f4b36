"""What fold and validate print for people."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ..console import stdout
from .model_setup import Setup

if TYPE_CHECKING:
    from .fold import Outcome
    from .memory import PeakMemory
    from .validate import Validation


def print_fold(outcome: "Outcome", setup: Setup, stem: Path, files: list[str]) -> None:
    """A fold in a table, with its comparison. stem: of the files, with their folder."""
    result, stock, differences = outcome.fold, outcome.stock, outcome.differences
    console = stdout(soft_wrap=True)
    record = result.record
    console.print(
        f"\n{record.name}, {record.length} residues, "
        f"{setup.name} in {str(setup.dtype).removeprefix('torch.')} on {setup.device}"
    )
    if setup.random_weights:
        console.print(
            "Random weights: as biology this fold is meaningless, only the machinery works."
        )
    swapped, total = outcome.swap
    console.print(f"Sites swapped: {swapped} of {total} ({setup.kernel_description()})")

    columns = [setup.kernel if setup.kernel != "off" else "stock"]
    rows = [
        ["Seconds", f"{result.seconds:.2f}"],
        ["Peak memory", _memory(result.memory)],
        ["Mean pLDDT", f"{result.mean_plddt:.4f}"],
        ["pTM", f"{float(result.ptm[result.best]):.4f}"],
    ]
    if result.several:
        rows.append(["ipTM", f"{float(result.iptm[result.best]):.4f}"])
    if stock is not None and differences is not None:
        columns += ["stock", "difference"]
        speed = stock.seconds / result.seconds
        saved = stock.memory.peak_bytes - result.memory.peak_bytes
        rows[0] += [f"{stock.seconds:.2f}", f"{speed:.2f}x as fast"]
        rows[1] += [_memory(stock.memory), f"{-saved / 2**20:+.0f} MiB"]
        rows[2] += [f"{stock.mean_plddt:.4f}", f"{differences.plddt_of_means:.1e}"]
        rows[3] += [f"{float(stock.ptm[result.best]):.4f}", f"{differences.ptm:.1e}"]
        if result.several:
            rows[4] += [f"{float(stock.iptm[result.best]):.4f}", f"{differences.iptm:.1e}"]
        rows += [
            ["pLDDT, largest", "", "", f"{differences.plddt_max:.1e}"],
            ["Distogram, mean", "", "", f"{differences.distogram_mean:.1e}"],
            ["Distogram, largest", "", "", f"{differences.distogram_max:.1e}"],
            ["Coordinates, RMSD", "", "", f"{differences.coords_rmsd:.1e} Å"],
        ]
    table = Table("", *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    stdout().print(table)
    if stock is not None:
        console.print("Differences are absolute; those of the distogram are of probabilities")
    console.print(f"Memory: {result.memory.meaning}; in brackets, above the fold's start")
    of_best = [name for name in files if not name.startswith(f"{stem.name}_rank_")]
    lower = f"; lower ranks as {stem.name}_rank_2 and so on" if len(result.ranked) > 1 else ""
    console.print(
        f"Wrote {stem.parent / of_best[0]}, "
        + ", ".join(name.removeprefix(stem.name) for name in of_best[1:])
        + lower
    )


def facts(outcome: "Outcome", setup: Setup) -> list[list[str]]:
    """The settings and timings of a fold, names and values."""
    result, stock = outcome.fold, outcome.stock
    swapped, total = outcome.swap
    found = [
        ["Model", setup.name],
        ["Computed", f"in {str(setup.dtype).removeprefix('torch.')} on {setup.device}"],
        ["Kernel", setup.kernel_description()],
        ["Sites swapped", f"{swapped} of {total}"],
        *([name, str(getattr(result.settings, name.lower()))]
          for name in ("Loops", "Samples", "Steps", "Seed")),
        ["Seconds", f"{result.seconds:.2f}"],
        ["Peak memory", _memory(result.memory)],
    ]  # fmt: skip
    if outcome.replayed_steps is not None:
        found.append(["CUDA graph", f"{outcome.replayed_steps} denoising steps"])
    if stock is not None:
        found += [
            ["Seconds, stock path", f"{stock.seconds:.2f}"],
            ["Peak memory, stock path", _memory(stock.memory)],
        ]
    return found


def print_line(outcome: "Outcome", file: Path) -> None:
    """A fold in a line, as one of many. file: what to open."""
    result = outcome.fold
    between = f", ipTM {float(result.iptm[result.best]):.3f}" if result.several else ""
    stdout(soft_wrap=True).print(
        f"{result.record.name}, {result.record.length} residues: {result.seconds:.2f} s, "
        f"pLDDT {100 * result.mean_plddt:.1f}, pTM {float(result.ptm[result.best]):.3f}{between}; "
        f"{file}"
    )


def print_validation(result: "Validation", setup: Setup) -> None:
    """Each protein's differences beside the spread, and the verdict."""
    from .validate import DECIDING

    console = stdout(soft_wrap=True)
    if setup.random_weights:
        console.print("Random weights: as biology these folds are meaningless.")
    swapped, total = result.swap
    console.print(f"Sites swapped: {swapped} of {total} ({setup.kernel_description()})")
    names = {
        "plddt_of_means": "Mean pLDDT",
        "plddt_mean": "pLDDT by residue, mean",
        "ptm": "pTM",
        "distogram_mean": "Distogram, mean",
        "distogram_max": "Distogram, largest",
    }
    for verdict in result.verdicts:
        table = Table(
            f"{verdict.record.name}, {verdict.record.length} residues",
            "kernel to stock",
            "stock's spread",
            "within",
        )
        for name, label in names.items():
            within = ("yes" if verdict.within_spread(name) else "NO") if name in DECIDING else ""
            spread = getattr(verdict.spread, name)
            table.add_row(label, f"{verdict.worst(name):.2e}", f"{spread:.2e}", within)
        for path, folds in (("stock", verdict.stock), ("kernel", verdict.kernel)):
            numbers = ", ".join(
                f"pLDDT {one.mean_plddt:.3f} pTM {float(one.ptm[one.best]):.3f}" for one in folds
            )
            console.print(f"{verdict.record.name}, {path}, two seeds: {numbers}")
        stdout().print(table)
    if result.passed:
        console.print("Passed: the kernel differs from the stock path by less than its own spread.")
    else:
        console.print(
            "FAILED: the kernel differs from the stock path by more than its own spread. "
            "A spread of two seeds can be small by luck: try another --seed too."
        )


def _memory(memory: "PeakMemory") -> str:
    return f"{memory.peak_bytes / 2**20:.0f} MiB (+{memory.added_bytes / 2**20:.0f})"
