"""The command-line tool as a whole, and its commands that neither fold nor measure."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_runner import refusal, run
from esmfold2_trimul_tools import build, cli, commands, doctor, resources
from esmfold2_trimul_tools.folding import fold, model, validate
from folding import QUICK, tiny_config
from fresh_process import HUNG_SECONDS, ROOT, python_output

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny(monkeypatch):
    """--random-weights makes the tests' tiny model."""
    monkeypatch.setattr(model, "random_config", tiny_config)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fold"], "give either SEQUENCE or --fasta FILE"),
        (["fold", "MQ", "--fasta", "x"], "give either SEQUENCE or --fasta FILE"),
        (["fold", "MQZ", *QUICK], "sequence: unknown residue 'Z' at position 3; the residues"),
        (["fold", "", *QUICK], "sequence: the sequence is empty"),
        (["fold", "G", *QUICK], "sequence: a fold takes at least 2 residues; got 'G'"),
        (["fold", "MQ-I", *QUICK], "sequence: a gap '-' at position 3, as aligned sequences have"),
        (["fold", "my.fasta", *QUICK], "my.fasta: no such file, and not a sequence either"),
        (["fold", "./", *QUICK], ".: can't be read (Is a directory)"),
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

    def collect(targets, progress, check_descriptors):
        asked.append((targets, check_descriptors))
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
    assert run("resources", "--check-descriptors").exit_code == 0
    assert asked == [(None, False), (["sm_90", "gfx942"], False), (None, True)]

    monkeypatch.setattr(resources, "problems", lambda rows: ["stage spills in a loop"])
    result = run("resources", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == [ROW]
    assert result.stderr == "stage spills in a loop\n"


def test_build_and_its_check(monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "find_checkout", lambda _: tmp_path)
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
    assert Path(record["files"]["page"]).is_file()


@pytest.mark.parametrize(
    ("encoding", "text", "mend"),
    [
        ("ascii", "1.0 A of ?", "-> do this"),
        ("cp1252", "1.0 Å of ?", "-> do this"),
        ("utf-8", "1.0 Å of 蛋", "→ do this"),
    ],
)
def test_the_command_prints_in_any_encoding(encoding, text, mend):
    script = """
from esmfold2_trimul_tools import cli, doctor
doctor.examine = lambda _: [doctor.Finding("Triton", "warning", "1.0 Å of 蛋", "do this")]
cli.main()
"""
    environment = {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT / "tools" / "src")}
    done = subprocess.run(
        [sys.executable, "-c", script, "doctor"], capture_output=True,
        env={**os.environ, **environment, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    printed = done.stdout.decode(encoding)
    assert text in printed and mend in printed


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
    # Where the signal came while a library's C code ran Python text, as in an import, Python ends
    # by the signal itself, which a shell reports as 130 too.
    assert process.returncode in (130, -signal.SIGINT) and (stdout, stderr) == ("", "")
