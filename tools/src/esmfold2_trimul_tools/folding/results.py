"""What a folder of folds holds: a line of results.jsonl for each fold, and summary.csv as a table.

A line is written once the files that it names are there, so a run that is stopped loses nothing
that was done, and the next run skips it.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from .files import write_whole
from .sequences import Record

LINES, TABLE, INDEX = "results.jsonl", "summary.csv", "index.html"
_COLUMNS = (
    "name", "status", "chains", "residues", "mean_plddt", "ptm", "iptm", "seconds", "peak_gib",
    "structure", "error",
)  # fmt: skip

Entry = dict[str, Any]


class Results:
    """The results in a folder, by the stems of their files.

    Args:
        folder: where they are, which exists.
        settings: what a fold depends on beside its sequence; folds with other settings don't count
            as done.

    Raises:
        OSError: the folder's files can't be read or written.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder, self._settings = folder, settings
        self.entries: dict[str, Entry] = {}
        self._replaced: dict[str, Entry] = {}
        path = folder / LINES
        if path.exists():
            text = path.read_text(encoding="utf-8")
            for line in text.splitlines():
                self._take(line)
            if text and not text.endswith("\n"):  # a run was killed while it wrote
                with path.open("a", encoding="utf-8") as lines:
                    lines.write("\n")

    def _take(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if isinstance(entry, dict) and isinstance(entry.get("stem"), str):
            self.entries[entry["stem"]] = entry

    def done(self, stem: str, record: Record) -> Entry | None:
        """The entry of this very fold, if all its files are there."""
        entry = self.entries.get(stem)
        if (
            entry is None
            or entry.get("status") != "folded"
            or entry.get("sequence") != record.sequence
            or entry.get("settings") != self._settings
            or not all((self._folder / file).is_file() for file in entry["files"].values())
        ):
            return None
        return entry

    def has(self, stem: str) -> bool:
        """Whether it is folded."""
        return self.entries.get(stem, {}).get("status") == "folded"

    def begin(self, stems: list[str]) -> None:
        """Write the table anew, without the proteins that are to be folded."""
        for stem in stems:
            if stem in self.entries:
                self._replaced[stem] = self.entries.pop(stem)
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows(
            [_COLUMNS, *map(_row, self.entries.values())]
        )
        write_whole(self._folder / TABLE, table.getvalue())

    def add(self, stem: str, entry: Entry) -> None:
        """Append a fold, or a failure, to both files.

        What an earlier fold wrote and this one did not, such as further samples, is removed.
        """
        if "files" in entry:
            earlier = self._replaced.get(stem, {}).get("files", {}).values()
            for file in set(earlier) - set(entry["files"].values()):
                (self._folder / file).unlink(missing_ok=True)
        entry = {"stem": stem, **entry, "settings": self._settings}
        self.entries[stem] = entry
        with (self._folder / LINES).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")
        with (self._folder / TABLE).open("a", encoding="utf-8", newline="") as table:
            csv.writer(table, lineterminator="\n").writerow(_row(entry))


def _row(entry: Entry) -> list[Any]:
    peak = entry.get("peak_memory_bytes")
    values = {
        **entry,
        "mean_plddt": _rounded(entry, "mean_plddt", 2, 100),
        "ptm": _rounded(entry, "ptm", 4),
        "iptm": _rounded(entry, "iptm", 4),
        "seconds": _rounded(entry, "seconds", 2),
        "peak_gib": None if peak is None else round(peak / 2**30, 3),
        "structure": entry.get("files", {}).get("mmcif"),
    }
    return [values.get(column) for column in _COLUMNS]


def _rounded(entry: Entry, key: str, digits: int, factor: int = 1) -> float | None:
    value = entry.get(key)
    return None if value is None else round(factor * value, digits)
