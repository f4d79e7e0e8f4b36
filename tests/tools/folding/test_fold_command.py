"""The commands `esmfold2-trimul fold` and `validate`."""

import json
from pathlib import Path

import pytest
from cli_runner import refusal, run
from esmfold2_trimul_tools.folding import model, validate
from esmfold2_trimul_tools.folding.sequences import Record
from folding import QUICK, SHORT, TINY_SITES, ZERO_LAYER, tiny_config, write_kernel_repository
from matplotlib.image import imread

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
    assert refusal("fold", "MQIF", *QUICK) == "--out out: can't be written to (Is a directory)"


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
    monkeypatch.setattr(model, "_hub_answers", lambda: False)
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
