import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from esmfold2_trimul_tools import build, cli, commands, doctor, resources
from esmfold2_trimul_tools.bench import run as bench
from esmfold2_trimul_tools.folding import fold, model, validate
from esmfold2_trimul_tools.folding.sequences import Record
from folding import SHORT, TINY_SITES, ZERO_LAYER, tiny_config, write_kernel_repository
from fresh_process import HUNG_SECONDS, ROOT, python_output
from matplotlib.image import imread
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--random-weights", "--device", "cpu", "--steps", "2"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(monkeypatch):
    """--random-weights makes the tests' tiny model."""
    monkeypatch.setattr(model, "random_config", tiny_config)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refusal(*arguments):
    """The one line that bad input gets; it leaves stdout alone."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr[len("error: ") : -1]


def test_help_explains_every_command():
    text = run("--help").stdout
    commands = ("fold", "validate", "doctor", "resources", "bench", "conformance", "tune", "build")
    for command in commands:
        assert command in text
        assert run(command, "--help").exit_code == 0
    fold_help = run("fold", "--help").stdout
    for option in ("--fasta", "--random-weights", "--compare", "--kernel", "--loops", "--json"):
        assert option in fold_help


def test_short_help_and_version(monkeypatch):
    assert run("-h").stdout == run("--help").stdout
    assert run("fold", "-h").exit_code == 0
    result = run("--version")
    assert (result.exit_code, result.stderr) == (0, "")
    metadata = json.loads((ROOT / "build" / "torch-universal" / "metadata.json").read_text())
    assert f"version {metadata['version']}, build {metadata['id']}\n" in result.stdout
    monkeypatch.setattr(cli, "find_root", lambda: Path("nowhere"))
    assert refusal("--version").startswith("nowhere has no build/torch-universal")


@pytest.mark.parametrize(
    "arguments", [["--version"], ["fold", "--colour"], ["bench", "--seed", "x"]]
)
def test_the_parser_answers_without_torch(arguments):
    script = """
        import sys
        from esmfold2_trimul_tools.cli import main
        try:
            main()
        except SystemExit as ended:
            print(ended.code, "torch" in sys.modules)
    """
    printed = python_output(script, *arguments, PYTHONPATH=str(ROOT / "tools" / "src"))
    assert printed.splitlines()[-1] == f"{0 if arguments == ['--version'] else 2} False"


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fold"], "give either SEQUENCE or --fasta FILE"),
        (["fold", "MQ", "--fasta", "x"], "give either SEQUENCE or --fasta FILE"),
        (["fold", "MQZ", *QUICK], "sequence: unknown residue 'Z' at position 3; the residues"),
        (["fold", "", *QUICK], "sequence: the sequence is empty"),
        (["fold", "--fasta", "none.fasta"], "none.fasta: can't be read (No such file or dir"),
        (["fold", "--fasta", os.devnull], f"{os.devnull}: no sequence in this FASTA file"),
        (["fold", "MQ", "--loops", "-1"], "--loops must be at least 0; got -1"),
        (["fold", "MQ", "--samples", "0"], "--samples must be at least 1; got 0"),
        (["fold", "MQ", "--steps", "0"], "--steps must be at least 1; got 0"),
        (["fold", "MQ", "--seed", "-1"], "--seed must be at least 0; got -1"),
        (["fold", "MQ", "--loops", "many"], "Invalid value for '--loops'"),
        (["fold", "MQ", "--device", "abacus"], "--device must be cpu, cuda, cuda:N or xpu"),
        (["fold", "MQ", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16"),
        (["fold", "MQ", "--kernel", "x"], "--kernel must be one of ours, hub, off; got 'x'"),
        (["fold", "MQ", *QUICK, "--kernel", "hub"], "--kernel hub: transformers has biohub/esmf"),
        (["fold", "MQ", *QUICK, "--kernel", "off", "--compare"], "--compare needs a kernel"),
        (["fold", "MQ", *QUICK, "--model", "m"], "give either --model or --random-weights"),
        (["fold", "MQ", "--model", "./none"], "model folder ./none: no such folder"),
        (["fold", "MQ", "--model", "a b"], "model 'a b': neither a folder nor a Hub id"),
        (["fold", "MQ", *QUICK, "--kernel-root", "none"], "--kernel-root must name the kernel"),
        (["fold", "MQ", *QUICK, "--out", os.devnull], f"--out {os.devnull}: can't be written to"),
        (["fold", "MQ", "--colour"], "No such option: --colour"),
        (["fold", "MQ", "GG"], "Got unexpected extra argument"),
        (["validate", "--kernel", "off"], "validate needs a kernel beside the stock path"),
        (["validate", "--steps", "0"], "--steps must be at least 1"),
        (["resources", "--target", "sm_1"], "target must be one of "),
        (["bench", "--lengths", "long"], "--lengths must be whole numbers above 0, as in 128,"),
        (["bench", "--rival", "theirs"], "--rival must be one of ours; "),
        (["bench", "--device", "abacus"], "--device must be cpu, cuda, cuda:N or xpu"),
        (["bench", "--published", "none"], "--published none: holds no package esmfold2_trimul"),
        (["bench", "--resume"], "--resume needs --out, the file to add to"),
        (["bench", "--results", "none.json"], "none.json: can't be read (No such file or dir"),
        (["bench", "--results", os.devnull], f"{os.devnull}: not JSON"),
        (["bench", "--kernel-root", "none"], "--kernel-root must name the kernel repository"),
        (["build", "--kernel-root", "none"], "--kernel-root must name the kernel repository"),
        (["unfold"], "No such command 'unfold'"),
        (["--colour"], "No such option: --colour"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_line_and_exit_status_2(tiny, arguments, message):
    assert refusal(*arguments).startswith(message)


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


def test_a_fault_of_our_own_is_not_swallowed(monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(doctor, "examine", fail)
    assert isinstance(run("doctor").exception, ZeroDivisionError)


@pytest.mark.parametrize("command", [["fold", "MQIF", *QUICK], ["validate", *QUICK]])
def test_an_interrupt_exits_130_without_a_word(tiny, monkeypatch, command):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fold, "fold", interrupt)
    monkeypatch.setattr(validate, "fold", interrupt)
    result = run(*command)
    assert result.exit_code == 130
    assert result.output == ""


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


def test_doctor_exit_status_follows_its_findings(monkeypatch):
    findings = [
        doctor.Finding("Python", "ok", "3.12"),
        doctor.Finding("Triton", "warning", "too old", 'pip install "newer[extra]"'),
    ]
    monkeypatch.setattr(doctor, "examine", lambda _: findings)
    result = run("doctor")
    assert result.exit_code == 0
    assert '→ pip install "newer[extra]"' in result.stdout and "can work" in result.stdout
    findings.append(doctor.Finding("Kernel build", "problem", "missing", "build it"))
    result = run("doctor")
    assert result.exit_code == 1
    assert "→ build it" in result.stdout and "can't work" in result.stdout
    result = run("doctor", "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["can_fold"] is False
    assert document["findings"][2] == {
        "name": "Kernel build",
        "status": "problem",
        "value": "missing",
        "mend": "build it",
    }


def test_doctor_runs_on_this_machine():
    result = run("doctor", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == (0 if document["can_fold"] else 1)
    names = [finding["name"] for finding in document["findings"]]
    assert names[:3] == ["Python", "PyTorch", "Device"]
    assert "Path in bfloat16" in names


ROW = {
    "kernel": "stage",
    "target": "sm_90",
    "case": "bfloat16 C=16",
    "config": {"BLOCK_M": 64, "num_warps": 4},
    "registers": 99,
    "spill_bytes": 0,
    "shared_bytes": 4096,
}


def test_resources_prints_rows_and_problems(monkeypatch):
    asked = []

    def collect(targets, progress):
        asked.append(targets)
        progress(1, 1, "stage for sm_90")
        return [ROW]

    monkeypatch.setattr(resources, "collect", collect)
    monkeypatch.setattr(resources, "problems", lambda rows: [])
    result = run("resources")
    assert result.exit_code == 0, result.output
    for text in ("sm_90: registers", "stage", "bfloat16 C=16", "m=64 warps=4", "99", "4096"):
        assert text in result.stdout
    result = run("resources", "--json", "--target", "sm_90", "--target", "gfx942")
    assert json.loads(result.stdout) == [ROW]
    assert asked == [None, ["sm_90", "gfx942"]]

    monkeypatch.setattr(resources, "problems", lambda rows: ["stage spills in a loop"])
    result = run("resources", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == [ROW]
    assert result.stderr == "stage spills in a loop\n"


TINY_BENCH = ["bench", "--device", "cpu", "--widths", 16, "--lengths", 8, "--budget", 0.001]


@pytest.fixture
def quick_ceilings(monkeypatch):
    ceilings = {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e12, "copy": "c", "matrix": "m"}
    monkeypatch.setattr(bench, "measure_ceilings", lambda clock: ceilings)


def test_bench_measures_prints_and_keeps(quick_ceilings):
    result = run(*TINY_BENCH, "--masks", "bool,none", "--out", "new/results.json", "--plot", "new")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for text in ("float32, outgoing, bool mask", "float32, outgoing, no mask", "in-tree, chunk 64",
                 "in-tree, unchunked", "p10 to p90", "vs in-tree", "x GEMMs"):  # fmt: skip
        assert text in result.stdout
    kept = json.loads(Path("new/results.json").read_text())
    assert [row["rival"] for row in kept["rows"]] == 2 * [
        "ours", "in-tree, chunk 64", "in-tree, unchunked"
    ]  # fmt: skip
    assert {row["status"] for row in kept["rows"]} == {"measured"}
    assert imread("new/time_2.png").size > 0

    shown = run("bench", "--results", "new/results.json", "--json")
    assert json.loads(shown.stdout) == kept
    tables = run("bench", "--results", "new/results.json", "--markdown").stdout
    assert tables.count("| 16 | 8 |") == 4


def test_bench_json_is_all_there_is_on_stdout(quick_ceilings):
    result = run(*TINY_BENCH, "--json", "--directions", "incoming", "--commit", "abc")
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert document.keys() == {"environment", "ceilings", "rows"}
    assert document["environment"]["commit"] == "abc"
    assert {row["direction"] for row in document["rows"]} == {"incoming"}


def test_bench_fails_if_our_own_kernel_is_wrong(quick_ceilings, monkeypatch):
    monkeypatch.setitem(bench._WILD_ERROR, "float32", 0.0)
    result = run(*TINY_BENCH)
    assert result.exit_code == 1
    assert "ours, wrong at every shape: relative error" in result.stdout


def test_build_and_its_check(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "find_root", lambda _: tmp_path)
    done = build.BuildResult(tmp_path / build.VARIANT, "_id", ("a", "b"), ("a",), ())
    monkeypatch.setattr(build, "build_variant", lambda root: done)
    result = run("build")
    assert result.exit_code == 0
    assert result.stdout == "build/torch-universal: 2 files, 1 written, 0 removed (_id)\n"

    monkeypatch.setattr(build, "check_variant", lambda root: [])
    result = run("build", "--check")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "in line with its sources" in result.stdout

    monkeypatch.setattr(build, "check_variant", lambda root: ["a differs", "b is missing"])
    result = run("build", "--check")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        "a differs",
        "b is missing",
        "Mend it with: esmfold2-trimul build",
    ]

    def fail(root):
        raise ValueError("build.toml must have a [torch-noarch] section")

    monkeypatch.setattr(build, "check_variant", fail)
    assert refusal("build", "--check") == "build.toml must have a [torch-noarch] section"


def start(*arguments, **options):
    # In a process of its own the real entry point runs, on the ATen path.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", "esmfold2_trimul_tools", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
        **options,
    )


def test_the_real_command_folds_with_all_76_sites():
    process = start("fold", "MQIFVKTL", *QUICK, "--loops", "0", "--json")
    stdout, stderr = process.communicate(timeout=HUNG_SECONDS)
    assert (process.returncode, stderr) == (0, "")
    (record,) = json.loads(stdout)["folds"]
    assert record["sites"] == {"swapped": 76, "total": 76}
    assert Path(record["pdb"]).is_file()


def test_the_real_command_is_quiet_when_interrupted():
    # What a shell starts in the background ignores SIGINT, and so would what that starts.
    process = start(
        "fold", "MQIFVKTLTG" * 20, *QUICK, "--loops", "50",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        while not Path("out").exists() and process.poll() is None:  # just before the model
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=HUNG_SECONDS)
    finally:
        process.kill()
    assert (process.returncode, stdout, stderr) == (130, "", "")
