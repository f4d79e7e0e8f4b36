"""The results of a pair tensor over many ranks, one JSON document, and their tables.

    {"environment": {...}, "ranks": N, "messages": [{...}, ...], "rows": [{...}, ...]}

A row is a call of one shape: C, L, dtype, direction, and the entries of `ROW`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...documents import read_document
from ...errors import UserError
from ..report import milliseconds, origin, ratio
from ..run import WILD_ERROR

Results = dict[str, Any]
Row = dict[str, Any]

# A row's entries besides its shape; None if not measured.
ROW = {
    "passes": "forward, or training: with the gradients of x and of all parameters",
    "ms": "of a call, of the slowest rank: the median of calls that all ranks begin together",
    "alone_ms": "of the call of the whole pair tensor on one rank, while the others wait",
    "same_bits": "whether every rank's part has the bits of that call's output or gradient",
    "difference": "relative L2 difference from it, of the rank that has the largest; None, where "
    "there is an alone_ms, if it is not finite",
    "peak_shares": "peak_bytes of the rank that has the most, in its share of the pair tensor: "
    "U / N of N ranks",
    "of_ranks": "for each rank OF_RANK",
}
OF_RANK = {
    "residues": "rows of the pair tensor that it has",
    "channels": "that it multiplies",
    "peak_bytes": "the most memory beyond its arguments, the output and mapped memory included",
    "mapped_bytes": "of them for copies among GPUs; 0 where messages carry",
    "sent_bytes": "to all others in a call, without what pads the rows of planes",
}
# Of "messages": every rank sends one of so many MiB to each other at once.
MESSAGE = {"mib": "its size", "bytes_per_s": "what a rank receives, while it sends as many"}


def read_results(path: Path) -> Results:
    """The results in a file.

    Raises:
        UserError: there is no such file, or it holds no such results.
    """
    results = read_document(path)
    if not isinstance(results, dict) or results.keys() != {
        "environment", "ranks", "messages", "rows"
    }:  # fmt: skip
        raise UserError(f"{path}: holds no results of ranks")
    return results


def wrong(results: Results) -> list[str]:
    """The calls, in words, whose result differs from one rank's by more than rounding."""
    return [
        f"C={row['C']} L={row['L']} {row['dtype']} {row['direction']} {row['passes']}: "
        f"off by {_off(row)}"
        for row in results["rows"]
        if row["alone_ms"] is not None
        and (row["difference"] is None or row["difference"] > WILD_ERROR[row["dtype"]])
    ]


def _off(row: Row) -> str:
    return "NaN or infinity" if row["difference"] is None else f"{row['difference']:.1e}"


def caption(results: Results) -> list[str]:
    """Lines above the table."""
    rates = "; ".join(
        f"{message['mib']} MiB {message['bytes_per_s'] / 1e9:.3g} GB/s"
        for message in results["messages"]
    )
    return [
        f"{results['ranks']} ranks, each {origin(results['environment'])}",
        f"Received by a rank while every rank sends to each other messages of {rates}.",
    ]


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Column names, and a line of text for each row."""
    head = [
        "pass", "C", "L", "dtype", "direction", "carrier", "ms", "one rank", "speed-up",
        "peak, shares", "sent, MB", "same bits", "difference",
    ]  # fmt: skip
    lines = []
    for row in results["rows"]:
        beside = ["-", "-", "-", "-"]
        if row["alone_ms"] is not None:
            beside = [
                milliseconds(row["alone_ms"]), ratio(row["alone_ms"] / row["ms"]),
                "yes" if row["same_bits"] else "no", _off(row),
            ]  # fmt: skip
        sent = max(of["sent_bytes"] for of in row["of_ranks"])
        mapped = any(of["mapped_bytes"] for of in row["of_ranks"])
        lines.append([
            row["passes"], str(row["C"]), str(row["L"]), row["dtype"], row["direction"],
            "copies" if mapped else "messages", milliseconds(row["ms"]),
            *beside[:2], f"{row['peak_shares']:.2f}", f"{sent / 1e6:.3g}", *beside[2:],
        ])  # fmt: skip
    return head, lines


def markdown(results: Results) -> str:
    head, lines = table(results)
    drawn = [f"| {' | '.join(line)} |" for line in (head, *lines)]
    drawn.insert(1, "|---" * len(head) + "|")
    commands = "\n".join(["```", *results["environment"]["commands"], "```"])
    return "\n\n".join([*caption(results), commands, "\n".join(drawn)])
