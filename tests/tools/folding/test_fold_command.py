"""The commands `esmfold2-trimul fold` and `validate`."""

import csv
import importlib.util
import json
import os
import re
import shlex
import sys
import threading
from pathlib import Path

import pytest
from cli_runner import refusal, run
from esmfold2_trimul_tools import cli
from esmfold2_trimul_tools.console import ProgressBar
from esmfold2_trimul_tools.errors import BrokenFoldError, UserError
from esmfold2_trimul_tools.folding import (
    fold,
    memory,
    model,
    model_setup,
    pages,
    plots,
    validate,
)
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
from fresh_process import ROOT
from matplotlib.image import imread
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")

PLOT_FOLD = plots.plot_fold


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(monkeypatch):
    """--random-weights makes a tiny model, and pictures, which take a second each, are blank."""
    monkeypatch.setattr(model, "random_config", tiny_config)
    monkeypatch.setattr(plots, "plot_fold", lambda _, path, *note: path.write_bytes(b"a picture"))


@pytest.fixture
def drawn(tiny, monkeypatch):
    """As `tiny`, with the true pictures."""
    monkeypatch.setattr(plots, "plot_fold", PLOT_FOLD)


def test_fold_takes_a_file_for_a_sequence(tiny):
    Path("my.fasta").write_text(">one\nMQIF\n>two\nTLTG\n")
    result = run("fold", "my.fasta", *QUICK, "--dtype", "fp32", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [Path(one["files"]["pdb"]).stem for one in document["folds"]] == ["one", "two"]
    assert document["dtype"] == "float32"


def test_fold_writes_its_files_and_says_what_it_did(drawn):
    result = run("fold", SHORT.sequence.lower(), *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert f"Sites swapped: {TINY_SITES} of {TINY_SITES} (ours, aten path" in result.stdout
    assert "as biology this fold is meaningless" in result.stdout
    for word in ("Seconds", "Peak memory", "Mean pLDDT", "pTM"):
        assert word in result.stdout
    wrote = "out/sequence.pdb, .cif, _summary_confidences.json, _confidences.json, .png, .html"
    assert f"Wrote {wrote}\n" in result.stdout
    assert "stock" not in result.stdout and "ipTM" not in result.stdout
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
    for record, stem in ((one, "a_b"), (other, "A_B-2")):
        assert record["files"]["pdb"] == f"new/folder/{stem}.pdb"
        assert all(Path(file).is_file() for file in record["files"].values())
    assert document["failures"] == []


def test_a_cuda_graph_needs_a_gpu(tiny):
    message = "--cuda-graph needs a CUDA device, and this fold runs on cpu"
    assert refusal("fold", "MQIF", *QUICK, "--cuda-graph") == message


def test_why_a_denoiser_does_not_replay_is_said_once(tiny, monkeypatch):
    resolved = model_setup.Setup.__init__

    def setup(self, *arguments):
        resolved(self, *arguments[:-1])
        self.cuda_graph = arguments[-1]

    monkeypatch.setattr(model_setup.Setup, "__init__", setup)
    Path("my.fasta").write_text(">one\nMQIF\n>two\nTLTG\n")
    result = run("fold", "my.fasta", *QUICK, "--cuda-graph", "--json")
    assert result.exit_code == 0, result.output
    words = "warning: the denoiser runs without a CUDA graph: it runs on cpu\n"
    assert result.stderr == words
    document = json.loads(result.stdout)
    assert document["cuda_graph"] is True
    assert [one["replayed_steps"] for one in document["folds"]] == [0, 0]


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
    (tmp_path / "my.fasta").write_text(">one\nG\n>two\nMQIFV\n")
    message = "a fold takes at least 2 residues; got"
    assert refusal("fold", "g", *QUICK) == f"sequence: {message} 'G'"
    result = run("fold", "my.fasta", *QUICK, "--max-length", 4)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        f"error: one: {message} 'G'",
        "error: two: 5 residues, more than --max-length 4",
    ]
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
    (UserError("big: does not fit"), "big: does not fit"),
    (BrokenFoldError("big: not finite"), "big: not finite"),
    (ZeroDivisionError("a bug\nand more"), "big: the fold failed (ZeroDivisionError: a bug)"),
]


@pytest.mark.parametrize(("error", "message"), FAILURES, ids=["memory", "NaN", "fault"])
@pytest.mark.parametrize("more", [[], ["--json"], ["--compare"]], ids=" ".join)
def test_a_protein_that_fails_costs_the_others_nothing(failing, error, message, more):
    failing(error)
    result = run("fold", "three.fasta", *QUICK, *more)
    assert result.exit_code == 1
    listed = f"1 of 3 with errors:\n  {message}\n"
    assert result.stderr.endswith(f"error: {message}\n{listed}")
    # The traceback of a fault of our own is there, and of nothing else.
    assert result.stderr.startswith("Traceback" if "bug" in message else "error: ")
    assert sorted(path.stem for path in Path("out").glob("*.pdb")) == ["one", "three"]
    if more == ["--json"]:
        document = json.loads(result.stdout)
        assert [one["name"] for one in document["folds"]] == ["one", "three"]
        assert document["failures"] == [{"name": "big", "error": message}]
    else:
        assert "one, 6 residues" in result.stdout and "three, 4 residues" in result.stdout


def test_a_comparison_is_warmed_up_by_the_first_protein_that_folds(failing, monkeypatch):
    failing(UserError("big: does not fit"))
    Path("three.fasta").write_text(">big\nMQI\n>three\nMQIF\n")
    labels = []
    monkeypatch.setattr(ProgressBar, "__call__", lambda _, label, *__: labels.append(label))
    result = run("fold", "three.fasta", *QUICK, "--compare")
    assert result.exit_code == 1
    assert list(dict.fromkeys(labels)) == ["three, warming up", "three, ours", "three, stock path"]


def test_a_kernel_that_cant_be_had_is_said_once(failing, tmp_path):
    failing(UserError("big: does not fit"))
    root = write_kernel_repository(tmp_path / "kernel", STOCK_LAYER)
    (root / "build" / "torch-universal" / "__init__.py").write_text("class layers:\n    pass\n")
    result = run("fold", "three.fasta", *QUICK, "--kernel-root", root)
    assert result.exit_code == 2
    (message,) = result.stderr.removeprefix("error: ").splitlines()
    assert message.startswith(f"the kernel build in {root} can't be used; ")


def test_a_file_that_cant_be_written_costs_the_others_nothing(tiny):
    Path("three.fasta").write_text(THREE)
    Path("out/big.pdb").mkdir(parents=True)
    result = run("fold", "three.fasta", *QUICK, "--json")
    message = "--out out/big.pdb: can't be written to (Is a directory)"
    assert result.exit_code == 1
    assert result.stderr == f"error: {message}\n1 of 3 with errors:\n  {message}\n"
    document = json.loads(result.stdout)
    assert [one["name"] for one in document["folds"]] == ["one", "three"]
    assert document["failures"] == [{"name": "big", "error": message}]


def test_pages_can_be_left_out(tiny):
    Path("two.fasta").write_text(">one\nMQIF\n>two\nMQIFV\n")
    result = run("fold", "two.fasta", *QUICK, "--no-pages")
    assert result.exit_code == 0
    assert result.stdout.endswith("; out/two.pdb\n2 of 2 folded: out/summary.csv\n")
    assert not list(Path("out").glob("*.html"))


def test_a_machine_without_the_viewer_folds(tiny, monkeypatch):
    pages._viewer.cache_clear()
    find = importlib.util.find_spec
    without = lambda name: None if name == "dash_molstar" else find(name)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", without)
    result = run("fold", "MQIF", *QUICK)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: out/sequence.html: can't be drawn (no Mol* here: pip install dash-molstar); "
        "out/sequence.pdb is whole\n"
    )
    assert Path("out/sequence.png").is_file() and not Path("out/sequence.html").exists()


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
    assert "Wrote out/sequence.pdb, .cif" in result.stdout and "Mean pLDDT" in result.stdout
    assert ".png" not in result.stdout
    assert result.stderr.startswith("error: out/sequence.png: can't be drawn (")
    assert result.stderr.endswith("); out/sequence.pdb is whole\n")
    assert Path("out/sequence.pdb").stat().st_size > 0
    # What is missing is said again where the fold is not made again.
    for more, done_before in (["--force"], False), ([], True):
        again = run("fold", "MQIF", *QUICK, "--json", *more)
        assert again.exit_code == 1 and again.stderr == result.stderr
        document = json.loads(again.stdout)
        (one,) = document["folds"]
        assert one["files"]["pdb"] == "out/sequence.pdb" and "png" not in one["files"]
        assert one["done_before"] is done_before
        assert [failure["name"] for failure in document["failures"]] == ["sequence"]


def test_a_machine_without_matplotlib_folds(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "esmfold2_trimul_tools.folding.plots", None)
    result = run("fold", "MQIF", *QUICK)
    assert result.exit_code == 1
    assert "Wrote out/sequence.pdb, " in result.stdout
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
        result = run("fold", SHORT.sequence, *QUICK, "--json", "--force", *options)
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


def test_a_complex_folds_as_chains(drawn):
    for sequence in ("MQIF:TLTGK:MQIF", "mqif : tltgk*: mqif"):
        result = run("fold", sequence, *QUICK, "--compare", "--force")
        assert result.exit_code == 0, result.output
        assert "sequence, 13 residues" in result.stdout and "ipTM" in result.stdout
    carbons = [line for line in Path("out/sequence.pdb").read_text().splitlines() if " CA " in line]
    assert "".join(line[21] for line in carbons) == "AAAABBBBBCCCC"
    (one,) = json.loads(run("fold", sequence, *QUICK, "--compare", "--json").stdout)["folds"]
    assert (one["chains"], one["residues"]) == (3, 13) and 0 < one["iptm"] < 1
    summary = json.loads(Path(one["files"]["summary"]).read_text())
    assert summary["iptm"] == pytest.approx(one["iptm"], abs=1e-4)
    assert len(summary["chain_pair_iptm"]) == 3


def test_every_sample_is_written_by_its_rank(drawn):
    result = run("fold", "MQIFVK", *QUICK, "--samples", 3)
    assert "; lower ranks as sequence_rank_2 and so on\n" in result.stdout
    scores, structures = [], set()
    for rank, stem in enumerate(["sequence", "sequence_rank_2", "sequence_rank_3"], start=1):
        assert Path(f"out/{stem}.cif").is_file()
        structures.add(Path(f"out/{stem}.pdb").read_text())
        summary = json.loads(Path(f"out/{stem}_summary_confidences.json").read_text())
        assert summary["rank"] == rank
        scores.append(summary["ranking_score"])
    assert scores == sorted(scores, reverse=True) and len(structures) == 3
    # Fewer samples leave none of those that are not theirs.
    run("fold", "MQIFVK", *QUICK, "--samples", 2)
    assert {path.name for path in Path("out").glob("*_rank_*")} == {
        f"sequence_rank_2{ending}" for ending in (".pdb", ".cif", "_summary_confidences.json")
    }


MANY = ">one\nMQIFVK\n>bad\nMQJ\n>three\nMQIF\n>long\nMQIFVKTLTGK\n>cx\nMQI:FV\n"


def rows():
    with open("out/summary.csv", newline="") as table:
        return {row["name"]: row for row in csv.DictReader(table)}


def test_many_proteins_are_folded_by_length_and_what_cant_be_is_listed(tiny, monkeypatch):
    Path("many.fasta").write_text(MANY)
    whole = []
    monkeypatch.setattr(ProgressBar, "overall", lambda _, done, total: whole.append((done, total)))
    result = run("fold", "many.fasta", *QUICK, "--max-length", 6)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith("To fold: 3. The longest, one, has 6 residues and takes about ")
    assert [line.split(",")[0] for line in lines[1:4]] == ["three", "cx", "one"]
    assert lines[4:] == ["3 of 5 folded: out/summary.csv and out/index.html"]
    assert "ipTM" in lines[2] and lines[2].endswith("; out/cx.html")
    bad, long = (
        "bad: unknown residue 'J' at position 3; the residues are ACDEFGHIKLMNPQRSTVWY, and X for "
        "any other",
        "long: 11 residues, more than --max-length 6",
    )
    assert result.stderr.splitlines() == [
        f"error: {bad}", f"error: {long}", "2 of 5 with errors:", f"  {bad}", f"  {long}",
    ]  # fmt: skip
    assert whole == [(0, 3), (1, 3), (2, 3), (3, 3)]
    table = rows()
    assert list(table) == ["bad", "long", "three", "cx", "one"]
    assert [row["status"] for row in table.values()] == ["failed"] * 2 + ["folded"] * 3
    assert table["bad"]["error"] == bad
    assert (table["cx"]["chains"], table["cx"]["residues"], table["cx"]["structure"]) == (
        "2", "5", "cx.cif",
    )  # fmt: skip
    assert 0 < float(table["one"]["mean_plddt"]) < 100 and table["one"]["iptm"] == ""


@pytest.fixture
def folds(tiny, monkeypatch):
    """The names of the proteins as they are folded; `stop` in it is interrupted, once."""
    real, names = fold.fold, []

    def noting(loaded, record, *others, **keywords):
        names.append(record.name)
        if record.name == "stop" and names.count("stop") == 1:
            raise KeyboardInterrupt
        return real(loaded, record, *others, **keywords)

    monkeypatch.setattr(fold, "fold", noting)
    return names


def test_what_is_done_is_skipped_and_other_settings_fold_again(folds, monkeypatch):
    Path("two.fasta").write_text(">one\nMQIF\n>two\nMQIFV\n")
    first = json.loads(run("fold", "two.fasta", *QUICK, "--json").stdout)
    assert folds == ["one", "two"]
    # Not even a model is made where all is done.
    with monkeypatch.context() as patch:
        patch.setattr(model, "random_model", lambda *_: pytest.fail("a model was made"))
        result = run("fold", "two.fasta", *QUICK)
        assert result.exit_code == 0 and result.stderr == ""
        assert result.stdout == (
            "one: done before, in out; --force folds it again\n"
            "two: done before, in out; --force folds it again\n"
            "2 of 2 folded: out/summary.csv and out/index.html\n"
        )
        again = json.loads(run("fold", "two.fasta", *QUICK, "--json").stdout)
    for one, same in zip(first["folds"], again["folds"], strict=True):
        assert (one.pop("done_before"), same.pop("done_before")) == (False, True)
        assert one == same
    for more in (["--seed", 1], ["--loops", 2], ["--dtype", "bf16"], ["--kernel", "off"]):
        folds.clear()
        run("fold", "two.fasta", *QUICK, *more)
        assert folds == ["one", "two"], more
    folds.clear()
    run("fold", "two.fasta", *QUICK, *more, "--force")
    assert folds == ["one", "two"]
    # A file that is gone, and a protein that has changed.
    folds.clear()
    Path("out/two.cif").unlink()
    run("fold", "two.fasta", *QUICK, *more)
    assert folds == ["two"]
    folds.clear()
    Path("two.fasta").write_text(">one\nMQIK\n>two\nMQIFV\n>new\nMQ\n")
    run("fold", "two.fasta", *QUICK, *more)
    assert folds == ["new", "one"]
    assert [row["residues"] for row in rows().values()] == ["5", "2", "4"]


def test_an_interruption_loses_nothing_that_was_done(folds):
    Path("three.fasta").write_text(">last\nMQIFVK\n>stop\nMQIFV\n>first\nMQIF\n")
    result = run("fold", "three.fasta", *QUICK)
    assert result.exit_code == 130
    assert result.stderr == "interrupted: 2 of 3 not folded; the same command goes on from here\n"
    assert list(rows()) == ["first"] and not Path("out/index.html").exists()
    result = run("fold", "three.fasta", *QUICK)
    assert result.exit_code == 0, result.output
    assert folds == ["first", "stop", "stop", "last"]
    assert list(rows()) == ["first", "stop", "last"]
    assert "3 of 3 proteins folded" in Path("out/index.html").read_text()


def test_a_fold_that_may_not_fit_takes_the_lean_mode(tiny, monkeypatch):
    modes = []
    real = fold.fold

    def noting(*arguments, **keywords):
        modes.append(os.environ.get("ESMFOLD2_TRIMUL_MEMORY"))
        return real(*arguments, **keywords)

    monkeypatch.setattr(fold, "fold", noting)
    monkeypatch.delenv("ESMFOLD2_TRIMUL_MEMORY", raising=False)
    assert run("fold", "MQIF", *QUICK).stderr == ""
    assert run("fold", "MQIF", *QUICK, "--memory", "lean", "--force").stderr == ""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**10)
    result = run("fold", "MQIF", *QUICK, "--force")
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: sequence (4 residues) may not fit: a fold takes about 0 MiB, and 0 MiB are free; "
        "fewer --samples need less\n"
    )
    run("fold", "MQIF", *QUICK, "--force", "--memory", "default")
    assert modes == [None, "lean", "lean", "default"]
    assert "ESMFOLD2_TRIMUL_MEMORY" not in os.environ


def test_the_chunk_size_reaches_the_model(tiny, monkeypatch):
    made = []
    real = model.random_model
    monkeypatch.setattr(model, "random_model", lambda *a: made.append(real(*a)) or made[-1])
    assert run("fold", "MQIFVK", *QUICK, "--chunk-size", 3).exit_code == 0
    sizes = [part.chunk_size for part in made[0].modules() if hasattr(part, "chunk_size")]
    assert set(sizes) == {3, None} and sizes.count(3) == 15


def test_dna_is_folded_as_a_protein_with_a_warning(tiny):
    result = run("fold", "MQIF:ACGTACGTACGT", *QUICK)
    assert result.exit_code == 0
    assert result.stderr == (
        "warning: sequence: folded as a protein, but it looks like DNA; biohub's esm package folds "
        "it (docs/folding.md)\n"
    )
    message = "sequence: RNA of chain B, and ESMFold2 folds proteins here; biohub's esm package"
    assert refusal("fold", "MQIF:ACGUACGU", *QUICK).startswith(message)


def test_the_commands_of_the_document_run(drawn):
    text = (ROOT / "docs" / "folding.md").read_text()
    lines = text.split("```")[1].strip().splitlines()
    assert len(lines) == 4
    Path("my.fasta").write_text(">one\nMQIFVK\n>cx\nMQI:FV\n")
    for line in lines:
        command, *arguments = shlex.split(line, comments=True)
        result = run(*arguments, *QUICK)
        assert command == "esmfold2-trimul" and result.exit_code == 0, result.output
    for kind in re.findall(r"^\| `NAME(\S+)`", text, flags=re.MULTILINE):
        assert Path(f"results/one{kind}").is_file() or kind == "_rank_2.cif"
    (named,) = re.findall(r"^\| `(index.*)` \|", text, flags=re.MULTILINE)
    assert all(Path("results", name).is_file() for name in named.split("`, `"))


def test_validate_runs_in_bfloat16(short_proteins):
    result = run("validate", *QUICK, "--dtype", "bf16", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["dtype"] == "bfloat16" and document["passed"] is True


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
