import csv
import json
from pathlib import Path

import pytest
from esmfold2_trimul_tools.folding.files import write_whole
from esmfold2_trimul_tools.folding.results import LINES, TABLE, Results
from esmfold2_trimul_tools.folding.sequences import Record

SETTINGS = {"seed": 3}
RECORD = Record("one", "MQIF")
FOLDED = {"status": "folded", "name": "one", "sequence": "MQIF", "mean_plddt": 0.5,
          "peak_memory_bytes": 2**29, "files": {"mmcif": "one.cif"}}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "one.cif").touch()
    results = Results(tmp_path, SETTINGS)
    results.begin([])
    results.add("one", FOLDED)
    return tmp_path


def rows(folder) -> list[dict]:
    with (folder / TABLE).open(newline="") as table:
        return list(csv.DictReader(table))


def test_a_fold_is_done_where_everything_is_equal_and_there(folder):
    assert Results(folder, SETTINGS).done("one", RECORD)["mean_plddt"] == 0.5
    assert Results(folder, {"seed": 4}).done("one", RECORD) is None
    assert Results(folder, SETTINGS).done("one", Record("one", "MQIK")) is None
    assert Results(folder, SETTINGS).done("two", RECORD) is None
    (folder / "one.cif").unlink()
    assert Results(folder, SETTINGS).done("one", RECORD) is None


def test_a_failure_is_not_done(folder):
    Results(folder, SETTINGS).add("one", {"status": "failed", "name": "one", "error": "no"})
    results = Results(folder, SETTINGS)
    assert results.done("one", RECORD) is None and not results.has("one")


def test_the_last_line_of_a_protein_counts(folder):
    Results(folder, {"seed": 4}).add("one", {**FOLDED, "mean_plddt": 0.75})
    assert Results(folder, SETTINGS).done("one", RECORD) is None
    assert Results(folder, {"seed": 4}).done("one", RECORD)["mean_plddt"] == 0.75


@pytest.mark.parametrize("torn", ['{"stem": "two", "sta', "[]", '{"stem": 3}', "null"])
def test_a_line_that_a_killed_run_left_is_no_result(folder, torn):
    lines = folder / LINES
    lines.write_text(lines.read_text() + torn)
    results = Results(folder, SETTINGS)
    assert list(results.entries) == ["one"]
    results.add("three", {**FOLDED, "name": "three"})
    assert list(Results(folder, SETTINGS).entries) == ["one", "three"]
    assert json.loads(lines.read_text().splitlines()[-1])["name"] == "three"


def test_the_table_has_a_row_for_each_protein(folder):
    assert rows(folder) == [
        {"name": "one", "status": "folded", "chains": "", "residues": "", "mean_plddt": "50.0",
         "ptm": "", "iptm": "", "seconds": "", "peak_gib": "0.5", "structure": "one.cif",
         "error": ""}
    ]  # fmt: skip
    results = Results(folder, SETTINGS)
    results.add("two", {"status": "failed", "name": "two", "error": 'a "comma", here'})
    assert [row["error"] for row in rows(folder)] == ["", 'a "comma", here']
    results.begin(["one"])  # it is about to be folded again
    assert [row["name"] for row in rows(folder)] == ["two"]
    results.add("one", {**FOLDED, "mean_plddt": 0.25})
    assert [row["mean_plddt"] for row in rows(folder)] == ["", "25.0"]


def test_files_of_an_earlier_fold_do_not_stay(folder):
    (folder / "two.cif").touch()
    results = Results(folder, SETTINGS)
    results.begin(["one"])
    results.add("one", {"status": "failed", "name": "one", "error": "no"})
    assert (folder / "one.cif").exists()
    results = Results(folder, SETTINGS)
    results.add("one", FOLDED)
    results = Results(folder, SETTINGS)
    results.begin(["one"])
    results.add("one", {**FOLDED, "files": {"mmcif": "two.cif"}})
    assert not (folder / "one.cif").exists() and (folder / "two.cif").exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "it.txt"
    write_whole(path, "Å")
    assert path.read_bytes() == "Å".encode()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        write_whole(path, b"new")
    assert path.read_bytes() == "Å".encode()
    assert [one.name for one in tmp_path.iterdir()] == ["it.txt"]
