"""A run of the conformance suite, its command and its reports."""

import dataclasses
import json

import pytest
import torch
from cli_runner import ready, run
from conformance_cases import BY_NAME, CPU, implementation, outcome, rounded, turned, unmasked
from conftest import ROOT
from esmfold2_trimul_tools.bench.rivals import Sources
from esmfold2_trimul_tools.conformance import implementations
from esmfold2_trimul_tools.conformance import run as conformance
from esmfold2_trimul_tools.conformance.implementations import Implementation
from esmfold2_trimul_tools.conformance.report import markdown, read_results
from esmfold2_trimul_tools.conformance.settings import Settings
from esmfold2_trimul_tools.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sources(kernel) -> Sources:
    return Sources(kernel)


@pytest.fixture
def only(monkeypatch):
    """only(IMPLEMENTATION, ...): those are all that there are."""

    def replace(*some):
        monkeypatch.setattr(implementations, "IMPLEMENTATIONS", some)

    return replace


def test_what_breaks_the_device_breaks_no_other(only, sources, monkeypatch):
    only(BY_NAME["ours, ATen path"], implementation(rounded),
         dataclasses.replace(implementation(rounded), name="after it"))  # fmt: skip
    settings = ready(Settings, device="cpu", cases=["direction: outgoing"])
    settings = dataclasses.replace(settings, device=torch.device("meta"))
    monkeypatch.setattr(Implementation, "device", lambda one, device: CPU if one.ours else device)
    monkeypatch.setattr(conformance, "check", lambda one, posed, sources, device: {
        "implementation": one.name, "status": "passed", "note": None
    })  # fmt: skip
    monkeypatch.setattr(conformance, "_loss", lambda device: "illegal memory access")
    results = {"absent": {}, "rows": []}
    conformance.run(settings, results)
    note = "planted broke the device at direction: outgoing, bfloat16: illegal memory access"
    assert [outcome(row) for row in results["rows"]] == [("passed", None)] * 3 + [("failed", note)]
    assert results["absent"] == {"after it": note}


def run_command(*arguments):
    return run("conformance", *arguments)


def test_command_reports_and_writes(only, tmp_path):
    lacking = implementation(turned, lacks={"float16": "has no float16"})
    only(BY_NAME["ours, ATen path"], lacking, BY_NAME["published"])
    out = tmp_path / "new" / "results.json"
    result = run_command(
        "--device", "cpu", "--case", "direction: outgoing", "--case", "L = 2", "--out", out
    )
    # Others' failures are no failure of ours.
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    for text in (
        "torch ", "6 cases.", "ours, ATen path", "planted failed L = 2, float32: relative",
        "planted, not supported, of how many cases: has no float16 (2)",
        "published is absent: needs a GPU",
    ):  # fmt: skip
        assert text in result.stdout, text
    results = read_results(out)
    assert [row["status"] for row in results["rows"]] == ["passed"] * 6 + [
        "failed", "not supported", "failed", "failed", "not supported", "failed"
    ]  # fmt: skip
    assert results["environment"]["commands"][0].startswith("esmfold2-trimul")
    assert {"device", "torch", "commit", "date"} <= results["environment"].keys()

    shown = run_command("--results", out, "--json")
    assert json.loads(shown.stdout) == results
    report = run_command("--results", out, "--markdown").stdout
    assert report == markdown(results) + "\n"
    assert "| planted | 0 | 4 | 2 |" in report and "| ours, ATen path | 6 | 0 | 0 |" in report


def test_command_fails_where_ours_does(only):
    only(dataclasses.replace(implementation(unmasked), ours=True))
    passing = run_command("--device", "cpu", "--case", "mask: none")
    failing = run_command("--device", "cpu", "--case", "mask: soft, float32")
    assert (passing.exit_code, failing.exit_code) == (0, 1)
    assert "planted failed mask: soft, float32: relative error" in failing.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementation", "theirs"], "--implementation must be one of ours, ATen path; "),
        (["--case", "nothing"], "--case must be a part of a case's name; got 'nothing', in none"),
        (["--published", "nowhere"], "--published nowhere: holds no package esmfold2_trimul"),
        (["--seed", "-1"], "--seed must be at least 0; got -1"),
        (["--results", "nowhere.json"], "nowhere.json: can't be read"),
    ],
)
def test_command_names_what_it_cant_use(arguments, message):
    result = run_command(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


def test_other_files_are_no_results(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"rows": []}')
    with pytest.raises(UserError, match="other.json: holds no results of the conformance suite"):
        read_results(path)


def test_the_reports_in_the_docs_are_those_of_the_results():
    """What differs is mended with --results FILE --markdown. In none has ours failed."""
    page = (ROOT / "docs" / "conformance.md").read_text()
    files = list((ROOT / "benchmarks" / "results").glob("conformance_*.json"))
    assert files
    for path in files:
        results = read_results(path)
        assert markdown(results) in page, path.name
        ours = [row for row in results["rows"] if row["implementation"].startswith("ours")]
        assert ours and all(row["status"] != "failed" for row in ours), path.name
