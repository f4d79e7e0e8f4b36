"""The results of whole folds as tables, and the tables in the docs."""

import pytest
import torch
from conftest import ROOT
from esmfold2_trimul_tools.bench.whole.report import (
    estimate,
    longest_table,
    markdown,
    notes,
    readme_table,
    table,
    tables,
)
from esmfold2_trimul_tools.bench.whole.results import read_results
from esmfold2_trimul_tools.bench.whole.settings import Plan
from esmfold2_trimul_tools.bench.whole.ways import WAYS
from esmfold2_trimul_tools.folding.options import Settings
from whole_fakes import (
    BY_NAME,
    longest_row,
    step_results,
    step_row,
    whole_results,
    whole_row,
    without_numbers,
)

FULL = "OutOfMemoryError: CUDA out of memory. Tried to allocate 32.00 GiB."
# As several runs left them: the tables go by length and way.
RESULTS = whole_results(
    without_numbers("stock", "does not fit", f"{FULL} GPU 0 has a total of 80 GiB.", length=512),
    whole_row("stock"),
    without_numbers("published", "absent", "needs a GPU"),
    whole_row("ours", seconds=2.5, loops_timed=1),
    whole_row("stock-compiled", parts={"pair layers": 1.0, "transition": 0.25, "rest": 0.5}),
    without_numbers("published", "absent", "needs a GPU", length=512),
    whole_row("ours", length=512, seconds=123.4),
)


def test_a_line_for_each_row():
    head, lines = table(RESULTS)
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    stock, compiled, published, ours, too_long = rows[:5]
    assert [row["L"] for row in rows] == ["256"] * 4 + ["512"] * 3
    assert (stock["fold, s"], stock["x stock"], stock["peak, GiB"]) == ("4.00", "1.00x", "3.0")
    assert (stock["triangle"], stock["transition"]) == ("1.00", "0.500")
    trunk = [stock[f"trunk, {unit}"] for unit in ("s", "GiB", "pairs")]
    assert trunk == ["0.125", "2.0", "5.0"]
    # A layer that is one to its compiler has both parts together.
    assert (compiled["triangle"], compiled["transition"]) == ("1.25 with transition", "-")
    assert (compiled["rest"], compiled["diffusion"]) == ("0.500", "-")
    assert (published["fold, s"], published["rest"]) == ("absent", "-")
    # Extrapolated.
    assert (ours["fold, s"], ours["x stock"]) == ("≈ 2.50", "1.60x")
    assert too_long["fold, s"] == "does not fit"
    assert (rows[6]["fold, s"], rows[6]["x stock"]) == ("123", "-")


def test_a_note_for_each_way_and_reason():
    assert notes(RESULTS) == [
        "published, absent at L = 256, L = 512: needs a GPU",
        f"stock, does not fit at L = 512: {FULL}",
    ]
    (note,) = notes(whole_results(longest=[longest_row("ours", note="76 modules swapped")]))
    assert note == "ours, measured at 80 GiB: 76 modules swapped"


def test_the_longest_folds():
    failed = longest_row("stock", status="failed", L=None, peak_bytes=None, bound_by=None,
                         peak_by_loops=None)  # fmt: skip
    head, lines = longest_table(whole_results(longest=[longest_row("ours"), failed]))
    assert head[:5] == ["GiB", "way", "longest L", "peak, GiB", "bound by"]
    assert lines[0] == ["80", "ours", "1088", "79.0", "transition in confidence", "4.0 / 4.0"]
    assert lines[1] == ["80", "stock", "failed", "-", "-", "-"]


def test_markdown_says_what_was_measured_where():
    text = markdown(RESULTS)
    for words in (
        "A GPU, torch 2.0", "2026-01-02, commit abc.",
        "6.50 billion parameters, 13.0 GiB, bfloat16",
        "10 loops, 8 samples, 48 denoising steps", "```\none\ntwo\n```", "| 256 | stock | 4.00 |",
        "- published, absent at L = 256, L = 512: needs a GPU",
    ):  # fmt: skip
        assert words in text
    assert "longest L" not in text
    assert "| 80 | ours | 1088 |" in markdown(whole_results(longest=[longest_row("ours")]))


def test_the_readmes_table_has_the_ways_that_were_measured():
    assert readme_table(RESULTS).splitlines() == [
        "| L | transformers, as loaded | torch.compile | published kernel "
        "| ours, `patch` |",
        "|---|---|---|---|---|",
        "| 256 | 4.00 s (1.60x), 3.0 GiB | 4.00 s (1.60x), 3.0 GiB | absent | ≈ 2.50 s, 3.0 GiB |",
        "| 512 | does not fit | - | absent | 123 s, 3.0 GiB |",
    ]


def test_training_steps_in_markdown_and_in_a_table():
    results = step_results(
        step_row("ours", 2.0, note="20 modules swapped by patch"),
        step_row("esm", status="absent", note="not given"),
        step_row("stock", 5.0),
        step_row("ours", 8.0, length=512, error=None),
    )
    ((title, head, lines),) = tables(results)
    assert title.startswith("Training steps of a pair layer")
    stock, esm, ours, longer = [dict(zip(head, line, strict=True)) for line in lines]
    assert (stock["ms"], stock["p10 to p90"], stock["x stock"]) == ("5.00", "2.50 to 10.0", "1.00x")
    assert (esm["way"], esm["ms"], esm["wall"], esm["error"]) == ("esm", "absent", "-", "-")
    assert (ours["x stock"], ours["wall"], ours["host"]) == ("2.50x", "2.00", "1.50")
    assert (ours["steps a second"], ours["peak, pairs"], ours["error"]) == (
        "500", "12.35", "4.5e-03"
    )  # fmt: skip
    assert (longer["L"], longer["x stock"], longer["error"]) == ("512", "-", "-")
    text = markdown(results)
    for words in (
        "One pair-update layer, random weights, small: C = 256, transition 1024 wide, 1.50 million "
        "parameters, bfloat16.", "| 256 | stock | 5.00 | 2.50 to 10.0 |", "```\none\ntwo\n```",
        "- esm, absent at L = 256: not given", "- ours, measured at L = 256: 20 modules swapped",
    ):  # fmt: skip
        assert words in text


def plan(**changes):
    options = {
        "device": torch.device("cuda", 0), "dtype": torch.bfloat16, "ways": WAYS,
        "lengths": (256, 512, 1024, 2048), "fold": Settings(), "small": False, "longest": None,
        "fold_seconds": 15.0, "root": ROOT, "published": None, "esm": None,
    }  # fmt: skip
    return Plan(**options | changes)


def test_the_estimate_follows_the_ways_and_lengths():
    whole = estimate(plan())
    parts = [estimate(plan(lengths=(length,))) for length in (256, 512, 1024, 2048)]
    # Each makes the model.
    assert sum(parts) == pytest.approx(whole + 3 * 20 / 60)
    assert parts[0] < parts[1] < parts[2]
    ours, stock = (
        estimate(plan(ways=(BY_NAME[name],), lengths=(1024,))) for name in ("ours", "stock")
    )
    assert ours < stock < whole
    # What does not fit costs little more than the trunk alone.
    assert estimate(plan(ways=(BY_NAME["stock-unchunked"],), lengths=(2048,))) < parts[2]
    assert estimate(plan(fold_seconds=60.0)) > whole
    for changes in (
        {"small": True}, {"longest": 80.0}, {"device": torch.device("cpu")}, {"training": True}
    ):  # fmt: skip
        assert estimate(plan(**changes)) is None


def test_the_tables_in_the_docs_are_those_of_the_results():
    """What differs is mended with --results FILE --markdown, and by `readme_table`."""
    page = (ROOT / "docs" / "performance.md").read_text()
    files = sorted((ROOT / "benchmarks" / "results").glob("*_whole.json"))
    assert bool(files) == ("Whole folds were not measured yet." not in page)
    for path in files:
        results = read_results(path)
        assert markdown(results) in page, path.name
        assert readme_table(results) in (ROOT / "README.md").read_text(), path.name
