"""The commands `esmfold2-trimul fold` and `validate`."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest
from cli_runner import refusal, run
from esmfold2_trimul_tools import cli
from esmfold2_trimul_tools.console import ProgressBar
from esmfold2_trimul_tools.errors import BrokenFoldError, UserError
from esmfold2_trimul_tools.folding import fold, model, plots, validate
from esmfold2_trimul_tools.folding.sequences import Record
from folding import (
    QUICK,
    SHORT,
    STOCK_LAYER,
    TINY_SITES,
    ZERO_LAYER,
    tiny_config,
    write_kernel_repository,
)
from matplotlib.image import imread
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(monkeypatch):
    """--random-weights makes the tests' tiny model."""
    monkeypatch.setattr(model, "random_config", tiny_config)


def test_fold_takes_a_file_for_a_sequence(tiny):
    Path("my.fasta").write_text(">one\nMQIF\n>two\nTLTG\n")
    result = run("fold", "my.fasta", *QUICK, "--dtype", "fp32", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [Path(one["pdb"]).stem for one in document["folds"]] == ["one", "two"]
    assert document["dtype"] == "float32"


def test_fold_writes_its_files_and_says_what_it_did(tiny):
    result = run("fold", SHORT.sequence.lower(), *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert f"Sites swapped: {TINY_SITES} of {TINY_SITES} (ours, aten path" in result.stdout
    assert "as biology this fold is meaningless" in result.stdout
    for word in ("Seconds", "Peak memory", "Mean pLDDT", "pTM", "out/sequence.pdb"):
        assert word in result.stdout
    assert "stock" not in result.stdout
    pdb = Path("out/sequence.pdb").read_text()
    assert "REMARK   1 RANDOM WEIGHTS: MEANINGLESS AS BIOLOGY" in pdb
    assert sum(line[12:16] == " CA " for line in pdb.splitlines()) == len(SHORT.sequence)
    assert imread("out/sequence.png").size > 0


def test_fold_compares_with_the_stock_path(tiny):
    result = run("fold", SHORT.sequence, *QUICK, "--compare")
    assert result.exit_code == 0, result.output
    for word in ("ours", "stock", "difference", "x as fast", "Distogram, largest", "RMSD"):
        assert word in result.stdout


def test_fold_json_is_all_there_is_on_stdout(tiny, tmp_path):
    fasta = tmp_path / "two.fasta"
    fasta.write_text(">a/b first\nMQIFVK\n>A_B\nTLTGX\n")
    result = run("fold", "--fasta", fasta, *QUICK, "--compare", "--json", "--out", "new/folder")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    document = json.loads(result.stdout)
    settings = {name: document[name] for name in ("loops", "samples", "steps", "seed")}
    assert settings == {"loops": 1, "samples": 1, "steps": 2, "seed": 0}
    assert (document["device"], document["dtype"]) == ("cpu", "float32")
    assert (document["kernel"], document["path"]) == ("ours", "aten")
    assert document["random_weights"] is True
    one, other = document["folds"]
    assert (one["name"], one["residues"], other["residues"]) == ("a/b", 6, 5)
    assert one["sites"] == {"swapped": TINY_SITES, "total": TINY_SITES}
    assert one["differences"]["plddt_max"] < 1e-4
    assert one["peak_memory_bytes"] > one["added_memory_bytes"] >= 0
    assert one["seconds"] > 0 and one["stock"]["seconds"] > 0
    files = [Path(record[kind]) for record in (one, other) for kind in ("pdb", "png")]
    assert [file.name for file in files] == ["a_b.pdb", "a_b.png", "A_B-2.pdb", "A_B-2.png"]
    assert all(file.is_file() for file in files)


def test_files_that_cant_be_written_are_named(tiny):
    Path("out/sequence.pdb").mkdir(parents=True)
    message = "--out out/sequence.pdb: can't be written to (Is a directory)"
    assert refusal("fold", "MQIF", *QUICK) == message


def test_fold_reads_standard_input(tiny):
    for name in (["-"], ["--fasta", "-"]):
        result = CliRunner().invoke(cli.app, ["fold", *name, *QUICK, "--json"], input=">p\nMQIF*\n")
        assert result.exit_code == 0, result.output
        (one,) = json.loads(result.stdout)["folds"]
        assert (one["name"], one["residues"]) == ("p", 4)


def test_fold_reads_a_pipe(tiny, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=[">p\nMQIF\n"])
    writer.start()
    result = run("fold", tmp_path / "pipe", *QUICK, "--json")
    writer.join()
    assert json.loads(result.stdout)["folds"][0]["name"] == "p"


def test_a_folder_of_a_sequences_name_is_no_file(tiny):
    Path("MQIF").mkdir()
    assert run("fold", "MQIF", *QUICK).exit_code == 0
    assert refusal("fold", "./MQIF", *QUICK) == "MQIF: can't be read (Is a directory)"


def test_a_single_residue_is_refused_before_a_model_is_made(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise AssertionError("a model was made")

    monkeypatch.setattr(model, "random_model", fail)
    (tmp_path / "my.fasta").write_text(">one\nMQIF\n>two\nX\n")
    message = "a fold takes at least 2 residues; got"
    assert refusal("fold", "g", *QUICK) == f"sequence: {message} 'G'"
    assert refusal("fold", "my.fasta", *QUICK) == f"two: {message} 'X'"
    assert not Path("out").exists()


THREE = ">one\nMQIFVK\n>big\nMQIFV\n>three\nMQIF\n"


@pytest.fixture
def failing(tiny, monkeypatch):
    """failing(error): three proteins in a file, of which `big` fails with the error."""
    real = fold.fold

    def arrange(error):
        def fold_but_for_one(loaded, record, *others, **keywords):
            if record.name == "big":
                raise error
            return real(loaded, record, *others, **keywords)

        monkeypatch.setattr(fold, "fold", fold_but_for_one)
        Path("three.fasta").write_text(THREE)

    return arrange


FAILURES = [
    (UserError("big: does not fit"), 2, "big: does not fit"),
    (BrokenFoldError("big: not finite"), 1, "big: not finite"),
    (ZeroDivisionError("a bug\nand more"), 1, "big: the fold failed (ZeroDivisionError: a bug)"),
]


@pytest.mark.parametrize(("error", "status", "message"), FAILURES, ids=["memory", "NaN", "fault"])
@pytest.mark.parametrize("more", [[], ["--json"], ["--compare"]], ids=" ".join)
def test_a_protein_that_fails_costs_the_others_nothing(failing, error, status, message, more):
    failing(error)
    result = run("fold", "three.fasta", *QUICK, *more)
    assert result.exit_code == status
    assert result.stderr.endswith(f"error: {message}\n")
    # The traceback of a fault of our own is there, and of nothing else.
    assert result.stderr.startswith("Traceback" if status == 1 and "bug" in message else "error: ")
    assert sorted(path.stem for path in Path("out").glob("*.pdb")) == ["one", "three"]
    if more == ["--json"]:
        document = json.loads(result.stdout)
        assert [one["name"] for one in document["folds"]] == ["one", "three"]
        assert document["failures"] == [{"name": "big", "error": message}]
    else:
        assert "one, 6 residues" in result.stdout and "three, 4 residues" in result.stdout


def test_a_comparison_is_warmed_up_by_the_first_protein_that_folds(failing, monkeypatch):
    failing(UserError("big: does not fit"))
    Path("three.fasta").write_text(">big\nMQIFV\n>three\nMQIF\n")
    labels = []
    monkeypatch.setattr(ProgressBar, "__call__", lambda _, label, *__: labels.append(label))
    result = run("fold", "three.fasta", *QUICK, "--compare")
    assert result.exit_code == 2
    assert list(dict.fromkeys(labels)) == ["three, warming up", "three, ours", "three, stock path"]


def test_a_kernel_that_cant_be_had_is_said_once(failing, tmp_path):
    failing(UserError("big: does not fit"))
    root = write_kernel_repository(tmp_path / "kernel", STOCK_LAYER)
    (root / "build" / "torch-universal" / "__init__.py").write_text("class layers:\n    pass\n")
    message = refusal("fold", "three.fasta", *QUICK, "--kernel-root", root)
    assert message.startswith(f"the kernel build in {root} can't be used; ")


def test_a_file_that_cant_be_written_costs_the_others_nothing(tiny):
    Path("three.fasta").write_text(THREE)
    Path("out/big.pdb").mkdir(parents=True)
    result = run("fold", "three.fasta", *QUICK, "--json")
    message = "--out out/big.pdb: can't be written to (Is a directory)"
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")
    document = json.loads(result.stdout)
    assert [one["name"] for one in document["folds"]] == ["one", "three"]
    assert document["failures"] == [{"name": "big", "error": message}]


@pytest.mark.parametrize(
    "error", [ValueError("no such colour\nat all"), MemoryError(), "a folder"], ids=repr
)
def test_a_picture_that_cant_be_drawn_costs_no_result(tiny, monkeypatch, error):
    def fail(*_, **__):
        raise error

    if error == "a folder":
        Path("out/sequence.png").mkdir(parents=True)
    else:
        monkeypatch.setattr(plots, "plot_fold", fail)
    result = run("fold", "MQIF", *QUICK)
    assert result.exit_code == 1
    assert "Wrote out/sequence.pdb\n" in result.stdout and "Mean pLDDT" in result.stdout
    assert result.stderr.startswith("error: out/sequence.png: can't be drawn (")
    assert result.stderr.endswith("); out/sequence.pdb is whole\n")
    assert Path("out/sequence.pdb").stat().st_size > 0
    document = json.loads(run("fold", "MQIF", *QUICK, "--json").stdout)
    (one,) = document["folds"]
    assert (one["pdb"], one["png"]) == ("out/sequence.pdb", None)
    assert [failure["name"] for failure in document["failures"]] == ["sequence"]


def test_a_machine_without_matplotlib_folds(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "esmfold2_trimul_tools.folding.plots", None)
    result = run("fold", "MQIF", *QUICK)
    assert result.exit_code == 1
    assert "Wrote out/sequence.pdb\n" in result.stdout
    assert "error: out/sequence.png: can't be drawn (import of " in result.stderr


def test_names_are_printed_as_they_are(tiny, tmp_path):
    fasta = tmp_path / "brackets.fasta"
    fasta.write_text(">chain[bold]1\nMQIF\n")
    result = run("fold", "--fasta", fasta, *QUICK)
    assert "chain[bold]1, 4 residues" in result.stdout
    assert Path("out/chain_bold_1.pdb").is_file()


def test_fold_on_the_stock_path(tiny):
    result = run("fold", SHORT.sequence, *QUICK, "--kernel", "off", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["kernel"], document["path"]) == ("off", None)
    (record,) = document["folds"]
    assert record["sites"] == {"swapped": 0, "total": TINY_SITES}
    assert record["stock"] is record["differences"] is None


def test_fold_follows_the_seed_and_the_dtype(tiny):
    def mean_plddt(*options):
        result = run("fold", SHORT.sequence, *QUICK, "--json", *options)
        (record,) = json.loads(result.stdout)["folds"]
        return record["mean_plddt"]

    assert mean_plddt("--seed", 3) == mean_plddt("--seed", 3) != mean_plddt("--seed", 4)
    assert mean_plddt("--dtype", "bfloat16") != mean_plddt("--dtype", "float32")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "sees no such device here" in refusal("fold", "MQ", "--device", "cuda")


def test_a_hub_model_that_cant_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(model, "hub_answers", lambda: False)
    message = refusal("fold", "MQ", "--model", "biohub/no-such-model", "--device", "cpu")
    assert message.startswith("model biohub/no-such-model: not in the local cache, and the Hub")


def test_a_fold_that_breaks_is_a_failed_check_not_bad_input(tiny, tmp_path):
    root = write_kernel_repository(tmp_path / "kernel", "return pair_grid * float('nan')")
    result = run("fold", "MQIFVK", *QUICK, "--kernel-root", root)
    assert result.exit_code == 1
    assert result.stderr == "error: sequence: the fold gave numbers that are not finite\n"


@pytest.fixture
def short_proteins(tiny, monkeypatch):
    """validate folds two short peptides instead of ubiquitin and GB1."""
    records = [SHORT, Record("other", "GGMQWYPKDE")]
    monkeypatch.setattr(validate, "shipped_proteins", lambda: records)


def test_validate_passes_our_kernel(short_proteins):
    result = run("validate", *QUICK)
    assert result.exit_code == 0, result.output
    assert f"Sites swapped: {TINY_SITES} of {TINY_SITES} (ours" in result.stdout
    assert "short, 12 residues" in result.stdout and "other, 10 residues" in result.stdout
    assert "Passed" in result.stdout and "NO" not in result.stdout


def test_validate_json_has_every_number(short_proteins):
    result = run("validate", *QUICK, "--json", "--seed", 4)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["passed"] is True
    assert document["sites"] == {"swapped": TINY_SITES, "total": TINY_SITES}
    assert (document["seed"], document["kernel"]) == (4, "ours")
    assert [protein["name"] for protein in document["proteins"]] == ["short", "other"]
    for protein in document["proteins"]:
        assert protein["passed"] is True
        assert len(protein["differences"]) == len(protein["stock"]) == 2
        assert protein["spread"]["plddt_mean"] > protein["differences"][0]["plddt_mean"]


def test_validate_fails_a_wrong_kernel(short_proteins, tmp_path):
    root = write_kernel_repository(tmp_path / "kernel", ZERO_LAYER)
    result = run("validate", *QUICK, "--kernel-root", root)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout and "NO" in result.stdout
    result = run("validate", *QUICK, "--kernel-root", root, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["passed"] is False
