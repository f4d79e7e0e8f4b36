"""The results of whole folds, one JSON document, and those of training steps of a pair layer.

    {"environment": {...}, "model": {...}, "rows": [{...}, ...], "longest": [{...}, ...]}
    {"environment": {...}, "layer": {...}, "steps": [{...}, ...]}

A row is one way at one length, with the entries of `ROW`; "longest" has those of `LONGEST`, and
"steps" those of `STEP`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...documents import read_document
from ...errors import UserError
from .ways import OURS

Results = dict[str, Any]
Row = dict[str, Any]

# A row's entries; None if not measured.
ROW = {
    "L": "residues",
    "way": "its name in ways.WAYS",
    "status": "measured; does not fit (out of memory), absent (can't be had here), failed (raised) "
    "or wrong (numbers that are not finite)",
    "note": "what the way changed, or why there is no measurement",
    "seconds": "of a fold with all loops: the median of the timed folds, or by extrapolation if "
    "they had fewer loops",
    "loops": "of the fold: refinements after the first pass",
    "loops_timed": "loops of the timed folds; the missing ones are added as so many times a loop",
    "seconds_timed": "of each timed fold, without hooks",
    "peak_bytes": "highest level of memory in a timed fold, the model's weights included",
    "parts": "seconds of each part in a fold with all loops, from a fold of none with hooks, in "
    "which what is looped counts once a loop",
    "mean_plddt": "of that fold, 0 to 1; random weights, so it tells only whether ways agree",
    "trunk_seconds": "of one pass of the folding trunk's layers",
    "trunk_layers_timed": "layers of that pass that were run; the time is scaled to all of them",
    "trunk_peak_bytes": "highest level of memory in that pass, the model's weights included",
    "trunk_pairs": "how far that is above the level at its start, in pair tensors",
}
LONGEST = {
    "way": "its name in ways.WAYS",
    "status": "measured, absent or failed",
    "note": "as in a row",
    "gib": "the memory that torch's allocator could have",
    "L": "the longest that folds, in steps of `step`",
    "step": "residues",
    "tried": "each length that was tried, and whether it fitted",
    "peak_bytes": "of a fold at that length without loops",
    "bound_by": "the part within which that peak was reached",
    "peak_by_loops": "that peaks do not depend on the loops: bytes at L = 256 with 0 and 2 loops",
}
STEP = {
    "L": "residues",
    "way": "its name in ways.WAYS",
    "status": "as in a row of folds; wrong: its gradient is far from float64, or not finite",
    "note": "what the way changed, our ops in a step with their number, or why it was not timed",
    "error": "relative L2 error of the pair tensor's gradient against float64; None for long L",
    "checked_pairs": "L L",
    "device_ms": "median, p10, p90 and number of the times of single steps; on a GPU, caches cold",
    "wall_ms": "time a step of many issued back to back, on a GPU",
    "host_ms": "time until one step returns to its caller, on a GPU",
    "steps_per_s": "of those issued back to back; on a CPU, of single ones",
    "peak_pairs": "most memory of a step beyond the parameters, the pair tensor and the gradient "
    "that comes in, in pair tensors; all gradients that it makes are included",
}
FOLDS = {"environment", "model", "rows", "longest"}
STEPS = {"environment", "layer", "steps"}


def read_results(path: Path) -> Results:
    """The results in a file, of whole folds or of training steps.

    Raises:
        UserError: there is no such file, or it holds no such results.
    """
    results = read_document(path)
    if not isinstance(results, dict) or results.keys() not in (FOLDS, STEPS):
        raise UserError(f"{path}: holds no results of whole folds")
    return results


def rows_of(results: Results) -> list[Row]:
    """All rows, of whichever kind."""
    return [row for rows in results.values() if isinstance(rows, list) for row in rows]


def ours_is_right(results: Results) -> bool:
    """Whether no row of ours failed or was wrong. One that does not fit is a result."""
    return all(
        row["status"] in ("measured", "does not fit", "absent")
        for row in rows_of(results)
        if row["way"].startswith(OURS)
    )
