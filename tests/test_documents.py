import json

import pytest
from esmfold2_trimul_tools.documents import in_lines, write_document
from fresh_process import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def test_a_row_takes_a_line_and_so_does_a_flat_dict():
    document = {
        "environment": {"device": "a CPU", "rivals": {"one": None}},
        "flat": {"a": 1, "b": "two"},
        "rows": [{"C": 16, "ms": {"median": 0.5}}, {"C": 32}],
        "none": [],
    }
    assert in_lines(document).splitlines() == [
        "{",
        '  "environment": {',
        '    "device": "a CPU",',
        '    "rivals": {"one": null}',
        "  },",
        '  "flat": {"a": 1, "b": "two"},',
        '  "rows": [',
        '    {"C": 16, "ms": {"median": 0.5}},',
        '    {"C": 32}',
        "  ],",
        '  "none": []',
        "}",
    ]
    assert json.loads(in_lines(document)) == document


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_recorded_results_have_a_row_a_line(path):
    assert path.read_text() == in_lines(json.loads(path.read_text())) + "\n"


def test_what_is_no_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_document({"rows": [{"ms": float("nan")}]}, tmp_path / "results.json")
    assert not (tmp_path / "results.json").exists()
