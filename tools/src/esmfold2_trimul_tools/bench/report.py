"""The benchmark's results as tables: for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

from .case import TRANSITION
from .results import Results, Row, row_case
from .rivals import OURS


def groups(results: Results) -> Iterator[tuple[str, list[Row]]]:
    """(name, rows) of each dtype, direction, mask and passes that were measured."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in results["rows"]:
        case = row_case(row)
        found.setdefault((case.dtype, case.direction, case.mask, case.passes), []).append(row)
    for (dtype, direction, mask, passes), rows in found.items():
        words = [dtype, direction, *([] if direction == TRANSITION else [_mask_in_words(mask)])]
        name = ", ".join(words)
        yield name if passes == "forward" else f"{name}, forward and backward", rows


def caption(results: Results) -> str:
    """Device, versions, commit, date and ceilings, a sentence each."""
    ceilings = results["ceilings"]
    return (
        f"{origin(results['environment'])} "
        f"Ceilings in the same run: {ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s "
        f"({ceilings['copy']}), {ceilings['matrix_flops_per_s'] / 1e12:.2f} TFLOP/s "
        f"({ceilings['matrix']})."
    )


def origin(environment: dict[str, Any]) -> str:
    """Device, versions, date and commit in a sentence."""
    names = ("torch", "triton", "cuda", "driver", "python")
    versions = {name: environment[name] for name in names} | environment["rivals"]
    listed = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    busy = environment.get("busy_loops")
    beside = f", {busy} busy {'loop' if busy == 1 else 'loops'} beside it" if busy else ""
    return (
        f"{environment['device']}{beside}, {listed}, {environment['date']}, "
        f"commit {environment['commit'] or 'unknown'}."
    )


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Column names, and a line of text for each row that was measured, for a terminal."""
    columns: dict[str, Callable[[Row], str]] = {
        "C": lambda row: str(row["C"]),
        "L": lambda row: str(row["L"]),
        "rival": lambda row: row["rival"],
        "ms": lambda row: milliseconds(row["device_ms"]["median"]),
        "p10 to p90": lambda row: " to ".join(
            milliseconds(row["device_ms"][name]) for name in ("p10", "p90")
        ),
        "wall": lambda row: _or_dash(row["wall_ms"], milliseconds),
        "host": lambda row: _or_dash(row["host_ms"], milliseconds),
        "first call, s": lambda row: _or_dash(row["first_call_s"], "{:.1f}".format),
        "peak, pairs": lambda row: _or_dash(row["peak_pairs"], "{:.2f}".format),
        "error": lambda row: _or_dash(row["error"], "{:.1e}".format),
        "of floor": lambda row: _or_dash(row["floor_share"], "{:.0%}".format),
        "x GEMMs": lambda row: _or_dash(row["gemm_times"], "{:.2f}".format),
        "vs in-tree": lambda row: _or_dash(row["speed_up"].get("in-tree, chunk 64"), ratio),
        "vs cuEq": lambda row: _or_dash(row["speed_up"].get("cuequivariance, bf16 norms"), ratio),
    }
    lines = [
        [cell(row) for cell in columns.values()] for row in rows if row["status"] == "measured"
    ]
    # An empty column is left out.
    kept = [i for i in range(len(columns)) if any(line[i] != "-" for line in lines)]
    return [list(columns)[i] for i in kept], [[line[i] for i in kept] for line in lines]


def notes(results: Results) -> list[str]:
    """A sentence for each rival and reason for which shapes were not measured."""
    where: dict[tuple[str, str, str], list[str]] = {}
    for row in results["rows"]:
        if row["note"] is not None:
            key = (row["rival"], row["status"], row["note"])
            where.setdefault(key, []).append(f"C={row['C']} L={row['L']}")
    total = len({(row["C"], row["L"]) for row in results["rows"]})
    return [
        f"{rival}, {status} at {'every shape' if len(set(at)) == total else ', '.join(at)}: {note}"
        for (rival, status, note), at in where.items()
    ]


def markdown(results: Results) -> str:
    """The tables of docs/performance.md: times, then memory and error, ours beside each rival."""
    parts = [
        caption(results),
        "\n".join(["```", *results["environment"]["commands"], "```"]),
    ]
    for name, rows in groups(results):
        parts += [f"{title} ({name}):\n\n{drawn}" for title, drawn in _tables(rows) if drawn]
    if found := notes(results):
        parts.append("\n".join(f"- {note}" for note in found))
    return "\n\n".join(parts)


def milliseconds(value: float) -> str:
    """Three significant digits, without an exponent; four decimals for less than 0.001."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".") if value >= 1e-3 else f"{value:.4f}"


def ratio(value: float) -> str:
    """For example 4.87x or 45.6x."""
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def _tables(rows: list[Row]) -> Iterator[tuple[str, str]]:
    """(title, Markdown table) of one group's rows; a table without values is empty."""
    extra = {}
    if any(row["floor_share"] is not None for row in rows):
        extra["ours, of floor"] = lambda ours: f"{ours['floor_share']:.0%}"
    if any(row["gemm_times"] is not None for row in rows):
        extra["ours, x GEMM time"] = lambda ours: f"{ours['gemm_times']:.2f}"
    beside = "in brackets a rival's over ours"
    yield f"Time, ms, median of single calls; {beside}", _ratios(rows, _median, extra)
    for key, title in (
        ("wall_ms", "Calls issued back to back, ms a call"),
        ("host_ms", "Host time of a call, ms"),
    ):
        yield f"{title}; {beside}", _ratios(rows, itemgetter(key), {})
    yield (
        "Peak memory in pair tensors, and relative L2 error against float64",
        _markdown_table(
            rows,
            itemgetter("peak_pairs"),
            lambda row, _: f"{row['peak_pairs']:.2f}, {_or_dash(row['error'], '{:.1e}'.format)}",
            {},
        ),
    )
    yield (
        "First call in a fresh process with an empty Triton cache, seconds",
        _markdown_table(
            rows, itemgetter("first_call_s"), lambda row, _: f"{row['first_call_s']:.1f}", {}
        ),
    )


def _median(row: Row) -> float | None:
    return None if row["device_ms"] is None else row["device_ms"]["median"]


def _ratios(
    rows: list[Row],
    time: Callable[[Row], float | None],
    extra: dict[str, Callable[[Row], str]],
) -> str:
    def cell(row: Row, ours: Row | None) -> str:
        shown = milliseconds(time(row))
        if row is ours or ours is None or time(ours) is None:
            return shown
        return f"{shown} ({ratio(time(row) / time(ours))})"

    return _markdown_table(rows, time, cell, extra)


def _markdown_table(
    rows: list[Row],
    value: Callable[[Row], float | None],
    cell: Callable[[Row, Row | None], str],
    extra: dict[str, Callable[[Row], str]],
) -> str:
    """A line for each C and L, and a column for each rival with any value; empty without values.

    Args:
        value: the entry that a row must have to be shown.
        cell: makes a cell from a row and our row of its shape.
        extra: further columns, for our rows alone.
    """
    shown = [row for row in rows if value(row) is not None]
    if not shown:
        return ""
    rivals = list(dict.fromkeys(row["rival"] for row in shown))
    head = ["C", "L", *rivals, *extra]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for channels, length in dict.fromkeys((row["C"], row["L"]) for row in shown):
        here = {row["rival"]: row for row in rows if (row["C"], row["L"]) == (channels, length)}
        ours = here.get(OURS)
        cells = [str(channels), str(length)]
        for row in map(here.get, rivals):
            if row in shown:
                cells.append(cell(row, ours))
            else:
                cells.append("-" if row is None or row["status"] == "measured" else row["status"])
        cells += [make(ours) if ours in shown else "-" for make in extra.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _or_dash(value: Any, form: Callable[[Any], str]) -> str:
    return "-" if value is None else form(value)


def _mask_in_words(mask: str) -> str:
    return "no mask" if mask == "none" else f"{mask} mask"
