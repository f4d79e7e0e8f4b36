"""The results of whole folds and of training steps as tables: for a terminal, and in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from ..report import milliseconds as seconds
from ..report import origin, ratio
from .parts import LAYER, PARTS, TRANSITION, TRIANGLE
from .results import Results, Row, rows_of
from .settings import TWICE_BELOW, Plan
from .ways import OURS, STOCK, WAYS

_H200_GIB = 139.8
_ORDER = [way.name for way in WAYS]
# What follows tells of the process and of the allocator's settings.
_AFTER_ALLOCATION = re.compile(r"(?<=iB\.) GPU \d+ has .*")

# What the README's table shows, by the words that it uses.
README_WAYS = {
    STOCK: "transformers, as loaded",
    "stock-compiled": "torch.compile",
    "published": "published kernel",
    "esm": "biohub's esm, fused",
    OURS: "ours, `patch`",
    "ours-graph": "and `--cuda-graph`",
}


def caption(results: Results) -> str:
    """Device, versions, commit, date and the model, a sentence each."""
    if "layer" in results:
        layer = results["layer"]
        return (
            f"{origin(results['environment'])} "
            f"One pair-update layer, random weights, {layer['architecture']}: C = "
            f"{layer['pair_width']}, transition {layer['transition_width']} wide, "
            f"{layer['parameters'] / 1e6:.2f} million parameters, {layer['dtype']}."
        )
    model = results["model"]
    return (
        f"{origin(results['environment'])} "
        f"Random weights, {model['architecture']}: {model['parameters'] / 1e9:.2f} billion "
        f"parameters, {gib(model['bytes'])} GiB, {model['dtype']}; {model['loops']} loops, "
        f"{model['samples']} samples, {model['denoiser_calls']} denoising steps."
    )


def tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, column names and lines of text of each table that has any."""
    if "steps" in results:
        made = {"Training steps of a pair layer; times in ms, medians": step_table}
    else:
        made = {"Whole folds, by part, seconds": table, "The longest fold": longest_table}
    drawn = [(title, *make(results)) for title, make in made.items()]
    return [(title, head, lines) for title, head, lines in drawn if lines]


def step_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column names, and a line of text for each training step."""
    stock = {row["L"]: median(row) for row in results["steps"] if row["way"] == STOCK}
    columns: dict[str, Callable[[Row], str]] = {
        "L": lambda row: str(row["L"]),
        "way": lambda row: row["way"],
        "ms": lambda row: row["status"] if median(row) is None else seconds(median(row)),
        "p10 to p90": lambda row: _or_dash(
            row["device_ms"], lambda ms: f"{seconds(ms['p10'])} to {seconds(ms['p90'])}"
        ),
        "x stock": lambda row: _quotient(stock.get(row["L"]), median(row)),
        "wall": lambda row: _or_dash(row["wall_ms"], seconds),
        "host": lambda row: _or_dash(row["host_ms"], seconds),
        "steps a second": lambda row: _or_dash(row["steps_per_s"], seconds),
        "peak, pairs": lambda row: _or_dash(row["peak_pairs"], "{:.2f}".format),
        "error": lambda row: _or_dash(row["error"], "{:.1e}".format),
    }
    rows = _in_order(results["steps"])
    return list(columns), [[cell(row) for cell in columns.values()] for row in rows]


def median(row: Row) -> float | None:
    """Milliseconds of a step."""
    return row["device_ms"] and row["device_ms"]["median"]


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column names, and a line of text for each row."""
    stock = {row["L"]: row["seconds"] for row in results["rows"] if row["way"] == STOCK}
    columns: dict[str, Callable[[Row], str]] = {
        "L": lambda row: str(row["L"]),
        "way": lambda row: row["way"],
        "fold, s": fold_seconds,
        "x stock": lambda row: _quotient(stock.get(row["L"]), row["seconds"]),
        "peak, GiB": lambda row: _or_dash(row["peak_bytes"], gib),
        **{part: lambda row, part=part: _part(row, part) for part in PARTS if part != LAYER},
        "trunk, s": lambda row: _or_dash(row["trunk_seconds"], seconds),
        "trunk, GiB": lambda row: _or_dash(row["trunk_peak_bytes"], gib),
        "trunk, pairs": lambda row: _or_dash(row["trunk_pairs"], "{:.1f}".format),
    }
    rows = _in_order(results["rows"])
    return list(columns), [[cell(row) for cell in columns.values()] for row in rows]


def longest_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """The same of the longest folds."""
    columns: dict[str, Callable[[Row], str]] = {
        "GiB": lambda row: f"{row['gib']:g}",
        "way": lambda row: row["way"],
        "longest L": lambda row: row["status"] if row["L"] is None else str(row["L"]),
        "peak, GiB": lambda row: _or_dash(row["peak_bytes"], gib),
        "bound by": lambda row: _or_dash(row["bound_by"], str),
        "peak at L = 256 with 0 / 2 loops, GiB": lambda row: _or_dash(
            row["peak_by_loops"], lambda peaks: " / ".join(map(gib, peaks.values()))
        ),
    }
    return list(columns), [[cell(row) for cell in columns.values()] for row in results["longest"]]


def notes(results: Results) -> list[str]:
    """A sentence for each way and note."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for row in _in_order(rows_of(results)):
        if row["note"] is not None:
            key = (row["way"], row["status"], _AFTER_ALLOCATION.sub("", row["note"]))
            at = f"{row['gib']:g} GiB" if "gib" in row else f"L = {row['L']}"
            where.setdefault(key, []).append(at)
    return [
        f"{way}, {status} at {', '.join(at)}: {note}" for (way, status, note), at in where.items()
    ]


def markdown(results: Results) -> str:
    """The section of docs/performance.md."""
    parts = [caption(results), "\n".join(["```", *results["environment"]["commands"], "```"])]
    parts += [in_markdown(head, lines) for _, head, lines in tables(results)]
    if found := notes(results):
        parts.append("\n".join(f"- {note}" for note in found))
    return "\n\n".join(parts)


def readme_table(results: Results) -> str:
    """Seconds and peak GiB of a fold by length; brackets give another way's seconds over ours."""
    rows = {(row["L"], row["way"]): row for row in _in_order(results["rows"])}
    lengths = dict.fromkeys(length for length, _ in rows)
    ways = [way for way in README_WAYS if any((length, way) in rows for length in lengths)]

    def cell(length: int, way: str) -> str:
        row = rows.get((length, way))
        if row is None or row["seconds"] is None:
            return "-" if row is None else row["status"]
        ours = rows.get((length, OURS))
        times = "" if way == OURS or ours is None else _quotient(row["seconds"], ours["seconds"])
        beside = f" ({times})" if times not in ("", "-") else ""
        return f"{fold_seconds(row)} s{beside}, {gib(row['peak_bytes'])} GiB"

    head = ["L", *(README_WAYS[way] for way in ways)]
    return in_markdown(
        head, [[str(length), *(cell(length, way) for way in ways)] for length in lengths]
    )


def in_markdown(head: list[str], lines: list[list[str]]) -> str:
    drawn = [f"| {' | '.join(line)} |" for line in (head, *lines)]
    return "\n".join([drawn[0], "|" + "---|" * len(head), *drawn[1:]])


def fold_seconds(row: Row) -> str:
    """The time of a fold; marked where it is extrapolated. The status where there is none."""
    if row["seconds"] is None:
        return row["status"]
    return f"{'≈ ' if row['loops_timed'] != row['loops'] else ''}{seconds(row['seconds'])}"


def gib(size: float) -> str:
    return f"{size / 2**30:.1f}"


def estimate(plan: Plan) -> float | None:
    """About how many minutes the rows take on one H200; None where nothing is known of it.

    The default architecture runs 32 pair-update layers a loop, and outside the loops 2 and, for
    each sample, 4; with one layer a stack, 7 before the samples' own.
    """
    if plan.device.type != "cuda" or plan.small or plan.training or plan.longest is not None:
        return None
    loops = 10 if plan.fold.loops is None else plan.fold.loops
    samples = 8 if plan.fold.samples is None else plan.fold.samples
    total = 20.0  # making the model
    for length in plan.lengths:
        diffusion = max(1.0, 3.25 * (length / 1024) ** 1.4)
        for way in plan.ways:
            short, long = way.layer_ms
            layer = short / 1e3 * (length / 512) ** max(2.0, math.log2(long / short))
            total += 7 * layer + min(24 * layer, plan.fold_seconds)
            if way.gib * (length / 1024) ** 2 > _H200_GIB:
                continue
            outside, loop = (2 + 4 * samples) * layer + diffusion, 32 * layer
            fold = min(outside + (loops + 1) * loop, max(plan.fold_seconds, outside + 2 * loop))
            total += 2 * outside + loop + (2 if fold < TWICE_BELOW else 1) * fold
    return total / 60


def _in_order(rows: list[Row]) -> list[Row]:
    """By length, and each length's in the order of WAYS, in however many runs they came.

    Those of the longest folds are last, as they came.
    """

    def key(row: Row) -> tuple[float, int]:
        return (math.inf, 0) if "gib" in row else (row["L"], _ORDER.index(row["way"]))

    return sorted(rows, key=key)


def _part(row: Row, part: str) -> str:
    """Seconds of a part. Where a layer is one to its compiler, both of its parts together."""
    parts = row["parts"] or {}
    if LAYER in parts and part == TRIANGLE:
        both = sum(parts.get(name, 0.0) for name in (LAYER, TRIANGLE, TRANSITION))
        return f"{seconds(both)} with transition"
    if part not in parts or (LAYER in parts and part == TRANSITION):
        return "-"
    return seconds(parts[part])


def _quotient(one: float | None, other: float | None) -> str:
    return "-" if one is None or other is None else ratio(one / other)


def _or_dash(value: Any, form: Callable[[Any], str]) -> str:
    return "-" if value is None else form(value)
