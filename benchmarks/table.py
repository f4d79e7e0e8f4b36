"""The Markdown table of a result file of compare_with_in_tree.py, as docs/performance.md shows it.

python benchmarks/table.py benchmarks/results/nvidia_h200_bfloat16.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

OURS, CHUNKED, WHOLE = "ours", "in-tree, chunk_size 64", "in-tree, chunk_size None"


def table(result: dict, flow: str) -> str:
    """One line for each C and L, the rows of one direction side by side."""
    cells: dict[tuple[int, int], dict[str, dict]] = {}
    for row in result["rows"]:
        if row["flow"] == flow:
            cells.setdefault((row["C"], row["L"]), {})[row["who"]] = row
    lines = [
        "| C | L | ours, ms | in-tree, ms | in-tree unchunked, ms | faster by "
        "| peak, ours / in-tree | error, ours / in-tree |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (width, length), who in cells.items():
        ours, chunked, whole = who[OURS], who[CHUNKED], who[WHOLE]
        times = [row["milliseconds"] for row in (ours, chunked, whole)]

        def pair(key: str, form: str, ours=ours, chunked=chunked) -> str:
            values = (ours[key], chunked[key])
            return " / ".join("not measured" if v is None else f"{v:{form}}" for v in values)

        lines.append(
            f"| {width} | {length} | {times[0]:.2f} | {times[1]:.2f} | {times[2]:.2f} "
            f"| {times[1] / times[0]:.1f}x, {times[2] / times[0]:.1f}x "
            f"| {pair('peak_pairs', '.2f')} | {pair('error', '.1e')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--flow", choices=["outgoing", "incoming"], default="outgoing")
    args = parser.parse_args()
    result = json.loads(args.result.read_text())
    print(", ".join(f"{name} {value}" for name, value in result["environment"].items()))
    print(table(result, args.flow))


if __name__ == "__main__":
    main()
