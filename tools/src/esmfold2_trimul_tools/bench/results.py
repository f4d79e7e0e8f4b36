"""The benchmark's results, one JSON document, and the numbers derived from them.

    {"environment": {...}, "ceilings": {...}, "rows": [{...}, ...]}

A row is one rival at one shape: C, D, L, batch, dtype, direction, mask, passes, and the entries of
`ROW`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..documents import read_document
from ..errors import UserError
from .case import Case, stage_floors
from .rivals import BASELINES, OURS

Results = dict[str, Any]
Row = dict[str, Any]

# A row's entries besides its shape; None if not measured.
ROW = {
    "rival": "its name in rivals.RIVALS",
    "status": "measured; absent (can't be had here), failed (raised) or wrong, and then not timed",
    "note": "why it was not timed, or what else is to be said",
    "variants": "of our calls: the forward's stages that ran a variant for this GPU, and which",
    "error": "relative L2 error against float64 over the pairs that were checked; of the output, "
    "in training of the gradient of x",
    "checked_pairs": "B L L, or for long sequences some hundred of them",
    "device_ms": "median, p10, p90 and number of the times of single calls; on a GPU, caches cold",
    "wall_ms": "time a call of many issued back to back, on a GPU",
    "host_ms": "time until one call returns to its caller, on a GPU",
    "peak_pairs": "most memory beyond the inputs, the output included, in tensors of x's size",
    "first_call_s": "seconds of the first call in a fresh process with an empty Triton cache",
    "floor_ms": "sum of the stages' floors, of a forward call",
    "floor_share": "floor_ms / median device_ms",
    "gemm_ms": "time of plain GEMMs of the same FLOPs: of a triangle in float32 on a CPU, of a "
    "transition in its dtype",
    "gemm_times": "median device_ms / gemm_ms",
    "speed_up": "of each baseline that was measured here: its median device_ms over this row's",
}


def derive(row: Row, case: Case, ceilings: dict[str, Any], gemm_ms: float | None) -> None:
    """Fill in the entries that follow from the row's time, the ceilings and the GEMMs' time."""
    row["gemm_ms"] = gemm_ms
    if case.passes == "forward":
        floors = stage_floors(case, ceilings["copy_bytes_per_s"], ceilings["matrix_flops_per_s"])
        row["floor_ms"] = 1e3 * sum(floors)
    if row["device_ms"] is not None:
        if row["floor_ms"] is not None:
            row["floor_share"] = row["floor_ms"] / row["device_ms"]["median"]
        row["gemm_times"] = None if gemm_ms is None else row["device_ms"]["median"] / gemm_ms


def compare(rows: list[Row]) -> None:
    """Fill in speed_up in the rows of one shape."""
    times = {row["rival"]: row["device_ms"]["median"] for row in rows if row["device_ms"]}
    for row in rows:
        if row["rival"] in times:
            row["speed_up"] = {
                name: times[name] / times[row["rival"]] for name in BASELINES if name in times
            }


def row_case(row: Row) -> Case:
    """A row's shape."""
    names = ("C", "L", "dtype", "direction", "mask", "batch")
    # Results from before training was measured have no passes.
    return Case(*[row[name] for name in names], passes=row.get("passes", "forward"))


def read_results(path: Path) -> Results:
    """The results in a file.

    Raises:
        UserError: there is no such file, or it holds no such results.
    """
    results = read_document(path)
    if not isinstance(results, dict) or results.keys() != {"environment", "ceilings", "rows"}:
        raise UserError(f"{path}: holds no results of this benchmark")
    return results


def ours_is_right(results: Results) -> bool:
    """Whether no row of ours failed or was wrong."""
    return all(
        row["status"] in ("measured", "absent")
        for row in results["rows"]
        if row["rival"].startswith(OURS)
    )
