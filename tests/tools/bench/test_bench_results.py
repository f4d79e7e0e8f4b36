"""The rows and the file of the benchmark's results."""

import pytest
from bench_fakes import CASE, row_of
from esmfold2_trimul_tools.bench.case import stage_floors
from esmfold2_trimul_tools.bench.results import compare, ours_is_right, read_results, row_case
from esmfold2_trimul_tools.documents import write_document
from esmfold2_trimul_tools.errors import UserError


def test_share_of_floor_speed_up_and_gemm_time():
    ours = row_of("ours", milliseconds=4.0, gemm_ms=2.0)
    floor = 1e3 * sum(stage_floors(CASE, 1e9, 1e12))
    assert ours["floor_ms"] == pytest.approx(floor) and floor > 0
    assert ours["floor_share"] == pytest.approx(floor / 4)
    assert ours["gemm_times"] == 2.0
    rows = [
        ours,
        row_of("in-tree, chunk 64", milliseconds=10.0),
        row_of("in-tree, unchunked"),
        row_of("cuequivariance, bf16 norms", milliseconds=5.0),
    ]
    compare(rows)
    assert ours["speed_up"] == {"in-tree, chunk 64": 2.5, "cuequivariance, bf16 norms": 1.25}
    assert rows[1]["speed_up"]["cuequivariance, bf16 norms"] == 0.5
    assert rows[2]["speed_up"] == {}
    assert row_case(ours) == CASE


@pytest.mark.parametrize(("status", "right"), [
    ("measured", True), ("absent", True), ("failed", False), ("wrong", False),
])  # fmt: skip
def test_ours_is_right_unless_it_failed(status, right):
    rows = [row_of("ours", milliseconds=1.0), row_of("ours, plain", status=status)]
    assert ours_is_right({"rows": rows}) is right
    assert ours_is_right({"rows": [row_of("published", status=status)]})


def test_a_write_that_fails_spares_the_file(tmp_path):
    out = tmp_path / "results.json"
    results = {"environment": {}, "ceilings": {}, "rows": [row_of("ours", milliseconds=1.0)]}
    write_document(results, out)
    assert read_results(out) == results
    with pytest.raises(ValueError):
        write_document({**results, "ceilings": {"copy": float("nan")}}, out)
    assert read_results(out) == results
    with pytest.raises(UserError, match="can't be written to"):
        write_document(results, out / "below a file")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "not JSON"), ("[]", "holds no results of this benchmark"),
     ('{"environment": {}, "rows": []}', "holds no results of this benchmark")],
)  # fmt: skip
def test_what_is_no_results_file_is_refused(tmp_path, content, message):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_results(path)
