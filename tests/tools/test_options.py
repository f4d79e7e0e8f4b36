"""The options that are refused, without waiting for torch, which takes seconds to import."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from esmfold2_trimul_tools import cli
from esmfold2_trimul_tools.errors import UserError
from esmfold2_trimul_tools.options import at_least, read, writable_file, writable_folder
from fresh_process import python_output
from typer.testing import CliRunner

SMALL = ["--random-weights", "--device", "cpu", "--steps", "2"]
BAD_INPUT = [
    (["fold"], "give either SEQUENCE or --fasta FILE"),
    (["fold", "MQ", "--fasta", "x"], "give either SEQUENCE or --fasta FILE"),
    (["fold", "MQZ", *SMALL], "sequence: unknown residue 'Z' at position 3; the residues"),
    (["fold", "", *SMALL], "sequence: the sequence is empty"),
    (["fold", "--fasta", "none.fasta"], "none.fasta: can't be read (No such file or dir"),
    (["fold", "--fasta", os.devnull], f"{os.devnull}: no sequence in this FASTA file"),
    (["fold", "MQ", "--loops", "-1"], "--loops must be at least 0; got -1"),
    (["fold", "MQ", "--samples", "0"], "--samples must be at least 1; got 0"),
    (["fold", "MQ", "--steps", "0"], "--steps must be at least 1; got 0"),
    (["fold", "MQ", "--seed", "-1"], "--seed must be at least 0; got -1"),
    (["fold", "MQ", "--loops", "many"], "Invalid value for '--loops'"),
    (["fold", "MQ", "--device", "abacus"], "--device must be cpu, cuda, cuda:N or xpu; got 'aba"),
    (["fold", "MQ", "--device", "cuda:01"], "--device must be cpu, cuda, cuda:N or xpu; got 'cu"),
    (["fold", "MQ", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16; got"),
    (["fold", "MQ", "--kernel", "x"], "--kernel must be one of ours, hub, off; got 'x'"),
    (["fold", "MQ", *SMALL, "--kernel", "off", "--compare"], "--compare needs a kernel"),
    (["fold", "MQ", *SMALL, "--model", "m"], "give either --model or --random-weights"),
    (["fold", "MQ", "--model", "./none"], "model folder ./none: no such folder"),
    (["fold", "MQ", "--model", "a b"], "model 'a b': neither a folder nor a Hub id"),
    (["fold", "MQ", *SMALL, "--kernel-root", "none"], "--kernel-root must name the kernel"),
    (["fold", "MQ", *SMALL, "--out", os.devnull], f"--out {os.devnull}: can't be written to"),
    (["fold", "MQ", "--max-length", "1"], "--max-length must be at least 2; got 1"),
    (["fold", "MQI", "--max-length", "2"], "sequence: 3 residues, more than --max-length 2"),
    (["fold", "MQ", "--memory", "small"], "--memory must be one of auto, default, lean; got 'sm"),
    (["fold", "MQ", "--memory", "lean", "--kernel", "off"], "--memory is for --kernel ours"),
    (["fold", "MQ", "--chunk-size", "0"], "--chunk-size must be at least 1; got 0"),
    (["fold", "MQ:", *SMALL], "sequence: chain B of 2 is empty"),
    (["fold", "MQ", "--colour"], "No such option: --colour"),
    (["fold", "MQ", "GG"], "Got unexpected extra argument"),
    (["validate", "--kernel", "off"], "validate needs a kernel beside the stock path"),
    (["validate", "--steps", "0"], "--steps must be at least 1"),
    (["doctor", "--kernel-root", "none"], "--kernel-root must name the kernel repository"),
    (["resources", "--target", "sm_1"], "target must be one of gfx942, "),
    (["bench", "--lengths", "long"], "--lengths must be whole numbers above 0, as in 128,"),
    (["bench", "--widths", "0"], "--widths must be whole numbers above 0, as in 128,256; got '0"),
    (["bench", "--dtypes", "int8"], "--dtypes must be of float32, bfloat16, float16; got 'int8'"),
    (["bench", "--masks", "soft"], "--masks must be of bool, float, none; got 'soft'"),
    (["bench", "--rival", "theirs"], "--rival must be one of ours; "),
    (["bench", "--device", "abacus"], "--device must be cpu, cuda, cuda:N or xpu"),
    (["bench", "--device", "xpu"], "--device must be cpu or cuda here; got 'xpu'"),
    (["bench", "--budget", "nan"], "--budget must be above 0 seconds; got nan"),
    (["bench", "--seed", "-1"], "--seed must be at least 0; got -1"),
    (["bench", "--seed", "x"], "Invalid value for '--seed'"),
    (["bench", "--published", "none"], "--published none: holds no package esmfold2_trimul"),
    (["bench", "--resume"], "--resume needs --out, the file to add to"),
    (["bench", "--out", f"{os.devnull}/x"], f"--out {os.devnull}: can't be written to"),
    (["bench", "--out", "/"], "--out /: can't be written to (Is a directory)"),
    (["bench", "--results", "none.json"], "none.json: can't be read (No such file or dir"),
    (["bench", "--results", os.devnull], f"{os.devnull}: not JSON"),
    (["bench", "--whole", "--ways", "theirs"], "--ways must be of stock, stock-unchunked, "),
    (["bench", "--whole", "--rival", "published"], "--rival is not for --whole"),
    (["bench", "--esm", "none"], "--esm none: holds no package esm with models/esmfold2/layers"),
    (["bench", "--longest", "80"], "--longest is for --whole"),
    (["fold", "MQIF", "--full-size"], "--full-size is for --random-weights; a checkpoint has its"),
    (["bench", "--kernel-root", "none"], "--kernel-root must name the kernel repository"),
    (["conformance", "--implementation", "nobody"], "--implementation must be one of ours, ATen"),
    (["conformance", "--case", "none such"], "--case must be a part of a case's name; got 'none"),
    (["conformance", "--device", "abacus"], "--device must be cpu, cuda, cuda:N or xpu"),
    (["conformance", "--seed", "-1"], "--seed must be at least 0; got -1"),
    (["conformance", "--results", "none.json"], "none.json: can't be read"),
    (["tune", "--out", "table.json", "--stage", "four"], "stage must be one of fused_dual_gemm, "),
    (["tune", "--out", "table.json", "--width", "8"], "width must be from 16 to 512; got 8"),
    (["tune", "--out", "table.json", "--kernel-root", "none"], "--kernel-root must name the kern"),
    (["build", "--kernel-root", "none"], "--kernel-root must name the kernel repository"),
    (["unfold"], "No such command 'unfold'"),
    (["--colour"], "No such option: --colour"),
]


@pytest.fixture(scope="module")
def answers():
    """The answer to each bad input, in one process: status, stdout, stderr, and torch or not."""
    script = """
        import contextlib, io, json, sys
        from esmfold2_trimul_tools.cli import main

        answers = []
        for arguments in json.loads(sys.argv[1]):
            sys.argv[1:] = arguments
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                try:
                    main()
                except SystemExit as ended:
                    status = ended.code
            answers.append([status, out.getvalue(), err.getvalue(), "torch" in sys.modules])
        print(json.dumps(answers))
    """
    inputs = [arguments for arguments, _ in BAD_INPUT]
    return json.loads(python_output(script, json.dumps(inputs)))


@pytest.mark.parametrize("number", range(len(BAD_INPUT)), ids=lambda n: " ".join(BAD_INPUT[n][0]))
def test_bad_input_gets_one_line_and_exit_status_2_without_torch(answers, number):
    status, stdout, stderr, with_torch = answers[number]
    assert (status, stdout, with_torch) == (2, "", False)
    assert stderr.startswith(f"error: {BAD_INPUT[number][1]}") and stderr.count("\n") == 1


def test_targets_are_those_of_the_kernel(submodule):
    known = ", ".join(submodule("triton_parts.settings").targets())
    result = CliRunner().invoke(cli.app, ["resources", "--target", "sm_1"])
    assert result.stderr == f"error: target must be one of {known}; got 'sm_1'\n"


@dataclass(frozen=True)
class Options:
    count: Annotated[int | None, typer.Option(), at_least(2)] = None
    least_size: Annotated[int, typer.Option(), at_least(2), lambda option, value: -value] = 3
    name: str = "none"


def test_options_are_read_through_their_checks():
    assert read(Options) == Options(None, -3, "none")
    assert read(Options, count=2, name="one") == Options(2, -3, "one")
    with pytest.raises(UserError, match="^--least-size must be at least 2; got 1$"):
        read(Options, least_size=1)


def test_what_can_be_written(tmp_path, monkeypatch):
    for path in (tmp_path / "new" / "newer", tmp_path, Path("here")):
        assert writable_folder("--out", path) == path
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "new" / "file", Path("here.json")):
        assert writable_file("--out", path) == path
    for wrong in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(UserError, match="^--out .*: can't be written to"):
            writable_folder("--out", wrong)
    for wrong in (tmp_path, tmp_path / "file" / "new"):
        with pytest.raises(UserError, match="^--out .*: can't be written to"):
            writable_file("--out", wrong)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="can't be written to"):
        writable_file("--out", tmp_path / "file")
