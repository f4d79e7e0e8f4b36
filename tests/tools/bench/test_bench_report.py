"""The benchmark's tables, on a terminal and in Markdown."""

import dataclasses

import pytest
from bench_fakes import CASE, CEILINGS, TINY, example_results, row_of
from cli_runner import ready
from esmfold2_trimul_tools.bench import plots as bench_plots
from esmfold2_trimul_tools.bench import report as bench_report
from esmfold2_trimul_tools.bench.case import Case, stage_floors
from esmfold2_trimul_tools.bench.rivals import Sources
from esmfold2_trimul_tools.bench.settings import Settings
from esmfold2_trimul_tools.environment import describe_environment


@pytest.fixture
def sources(kernel) -> Sources:
    return Sources(kernel)


def test_training_rows_have_no_floor_and_groups_of_their_own(sources, tmp_path):
    forward = row_of("ours", milliseconds=2.0)
    both = row_of("ours", dataclasses.replace(CASE, passes="training"), milliseconds=6.0)
    assert both["floor_ms"] is both["floor_share"] is None and forward["floor_share"]
    del forward["passes"]  # as results of before have it
    environment = describe_environment(ready(Settings, **TINY), sources, "the command", "abc")
    results = {"environment": environment, "ceilings": CEILINGS, "rows": [forward, both]}
    names = [name for name, _ in bench_report.groups(results)]
    assert names == ["float32, outgoing, bool mask",
                     "float32, outgoing, bool mask, forward and backward"]  # fmt: skip
    assert bench_report.markdown(results).count("ours, of floor") == 1
    assert {path.stem for path in bench_plots.plot(results, tmp_path)} >= {"time_1", "time_2"}
    assert not (tmp_path / "floor_2.png").exists()


def test_markdown_has_ours_beside_each_rival():
    lines = bench_report.markdown(example_results()).splitlines()
    floors = [
        1e3 * sum(stage_floors(case, 1e9, 1e12)) / milliseconds
        for case, milliseconds in (
            (Case(128, 76, "bfloat16"), 0.5),
            (Case(128, 1024, "bfloat16"), 4),
        )
    ]
    assert lines[0].startswith("A GPU, torch 2.0, cuda 12, python 3.10, transformers 5, 2026-01-02")
    assert lines[2:6] == ["```", "one", "two", "```"]
    start = lines.index("| C | L | ours | in-tree, chunk 64 | published | ours, of floor |")
    assert lines[start + 1 : start + 4] == [
        "|---|---|---|---|---|---|",
        f"| 128 | 76 | 0.500 | 22.8 (45.6x) | 1.00 (2.00x) | {floors[0]:.0%} |",
        f"| 128 | 1024 | 4.00 | 182 (45.6x) | failed | {floors[1]:.0%} |",
    ]
    start = lines.index("| C | L | ours | in-tree, chunk 64 |", start)
    assert lines[start + 2] == "| 128 | 76 | 0.600 | 9.00 (15.0x) |"
    assert "| 128 | 76 | 3.00, 4.5e-03 | 12.00, 6.1e-03 |" in lines
    first_calls = lines.index("| C | L | ours |")
    assert lines[first_calls + 2 : first_calls + 4] == ["| 128 | 76 | 2.0 |", ""]
    assert "| C | L | ours | ours, of floor | ours, x GEMM time |" in lines
    assert "| 128 | 76 | 3.00, - |" in lines
    assert "- cuequivariance, fp32 norms, absent at every shape: not installed" in lines
    assert "- published, failed at C=128 L=1024: OutOfMemoryError: no" in lines


def test_ours_without_variants_stands_beside_ours_or_is_a_note():
    results = example_results()
    results["rows"] = results["rows"][:1]
    case = Case(128, 76, "bfloat16")
    results["rows"].append(row_of("ours, plain", case, 0.65, peak_pairs=3.0, error=4.5e-3))
    text = bench_report.markdown(results)
    assert "| C | L | ours | ours, plain | ours, of floor |" in text
    assert "| 128 | 76 | 0.500 | 0.650 (1.30x) | " in text
    absent = {"status": "absent", "note": "no variant of a stage runs here"}
    results["rows"][1] = row_of("ours, plain", case, **absent)
    text = bench_report.markdown(results)
    assert "| ours, plain |" not in text
    assert "- ours, plain, absent at every shape: no variant of a stage runs here" in text


def test_tables_have_a_line_for_each_row_that_was_measured():
    results = example_results()
    tables = [bench_report.table(rows) for _, rows in bench_report.groups(results)]
    head = tables[0][0]
    assert head[:3] == ["C", "L", "rival"]
    for title in ("p10 to p90", "wall", "host", "first call, s", "peak, pairs", "vs in-tree"):
        assert title in head
    assert "vs cuEq" not in head and "x GEMMs" not in head
    numbers = [line for _, lines in tables for line in lines]
    assert len(numbers) == sum(row["status"] == "measured" for row in results["rows"])
    assert numbers[0][:4] == ["128", "76", "ours", "0.500"] and "45.6x" in numbers[0]
    results["rows"] = [row for row in results["rows"] if row["status"] == "absent"]
    assert all("absent at every shape" in note for note in bench_report.notes(results))
    assert not bench_report.markdown(results).count("|")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1255.4, "1255"), (125.6, "126"), (99.96, "100"), (63.1, "63.1"), (0.4071, "0.407"),
     (0.5, "0.500"), (0.00012, "0.0001")],
)  # fmt: skip
def test_milliseconds_have_three_digits(value, shown):
    assert bench_report.milliseconds(value) == shown
