"""The conformance suite's results, one JSON document, and its reports: for a terminal, in Markdown.

    {"environment": {...}, "absent": {"implementation": "why", ...}, "rows": [{...}, ...]}

A row is one case of one implementation, with the entries of `ROW`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ..bench.report import origin
from ..documents import read_document
from ..errors import UserError
from . import implementations

Results = dict[str, Any]
Row = dict[str, Any]

ROW = {
    "implementation": "its name in implementations.IMPLEMENTATIONS",
    "case": "its name in cases.EVERY_CASE",
    "status": "passed, failed or not supported",
    "note": "why it isn't passed",
    "error": "relative L2 error against float64; None for what is no finite number, here and below",
    "limit": "what it may be",
    "largest": "largest error over the RMS of float64's output",
    "largest_limit": "what it may be",
    "plain_error": "relative L2 error of plain PyTorch in the same dtype",
}
_STATUSES = ("passed", "failed", "not supported")


class Summary(NamedTuple):
    """One implementation's rows in numbers; worst is the row whose error is nearest its limit."""

    implementation: str
    counts: dict[str, int]
    worst: Row | None

    def cells(self) -> list[str]:
        """The cells of a table line with the columns `COLUMNS`."""
        worst = ["-", "-"]
        if self.worst is not None:
            error, limit = self.worst["error"], self.worst["limit"]
            worst = [f"{error:.1e} of {limit:.1e}", self.worst["case"]]
        return [self.implementation, *[str(self.counts[status]) for status in _STATUSES], *worst]


COLUMNS = ("implementation", *_STATUSES, "worst error of its limit", "at")


def read_results(path: Path) -> Results:
    """The results in a file.

    Raises:
        UserError: there is no such file, or it holds no such results.
    """
    results = read_document(path)
    if not isinstance(results, dict) or results.keys() != {"environment", "absent", "rows"}:
        raise UserError(f"{path}: holds no results of the conformance suite")
    return results


def ours_conforms(results: Results) -> bool:
    """Whether no case of ours failed."""
    ours = {one.name for one in implementations.IMPLEMENTATIONS if one.ours}
    failed = {row["implementation"] for row in results["rows"] if row["status"] == "failed"}
    return ours.isdisjoint(failed)


def summaries(results: Results) -> list[Summary]:
    """A summary for each implementation that took part."""
    rows: dict[str, list[Row]] = {}
    for row in results["rows"]:
        rows.setdefault(row["implementation"], []).append(row)
    return [
        Summary(
            name,
            Counter(row["status"] for row in of_one),
            max(
                (row for row in of_one if row["error"] is not None),
                key=lambda row: row["error"] / row["limit"],
                default=None,
            ),
        )
        for name, of_one in rows.items()
    ]


def notes(results: Results) -> list[str]:
    """A line for each failure, each implementation that lacks a feature, and each absent one."""
    failed = [
        f"{row['implementation']} failed {row['case']}: {row['note']}"
        for row in results["rows"]
        if row["status"] == "failed"
    ]
    lacking = []
    for summary in summaries(results):
        reasons = Counter(
            row["note"]
            for row in results["rows"]
            if row["implementation"] == summary.implementation and row["status"] == "not supported"
        )
        listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
        if listed:
            lacking.append(f"{summary.implementation}, not supported, of how many cases: {listed}")
    absent = [f"{name} is absent: {reason}" for name, reason in results["absent"].items()]
    return failed + lacking + absent


def caption(results: Results) -> str:
    """Device, versions, date and commit, the CPU beside a GPU, and how many cases there were."""
    environment = results["environment"]
    cases = {row["case"] for row in results["rows"]}
    beside = f", beside {environment['cpu']}" if environment["device"] != environment["cpu"] else ""
    return f"{origin(environment)} {len(cases)} cases{beside}."


def markdown(results: Results) -> str:
    """The report of docs/conformance.md."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    lines += [summary.cells() for summary in summaries(results)]
    parts = [
        caption(results),
        "\n".join(["```", *results["environment"]["commands"], "```"]),
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        "\n".join(f"- {note}" for note in notes(results)),
    ]
    return "\n\n".join(part for part in parts if part)
