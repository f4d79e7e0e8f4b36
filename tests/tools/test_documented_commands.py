"""Every command that the documents name exists, with the options that they give it.

The parser reads them; what they do is tested where the commands are.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer
from esmfold2_trimul_tools import cli
from fresh_process import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
RUNS_THE_TOOLS = ("esmfold2-trimul", ".venv/bin/esmfold2-trimul")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:esmfold2-trimul|make|python|tools/\w+\.sh)[^`]*)`")
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


def commands_in(path: Path) -> list[tuple[list[str], bool]]:
    """The words of its commands, and whether a command is whole, and not named in a sentence."""
    text = path.read_text()
    found = [(" ".join(line.split()), False) for line in INLINE.findall(BLOCK.sub("", text))]
    for language, block in BLOCK.findall(text):
        if language == "python":
            continue
        lines = block.replace("\\\n", " ").splitlines()
        variables = dict(re.findall(r'^(\w+)="(.*)"$', "\n".join(lines), re.MULTILINE))
        for line in lines:
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            found.append((line, True))
    return [(words_of(line), whole) for line, whole in found if words_of(line)]


def words_of(line: str) -> list[str]:
    """What a shell makes of it, but for variables; nothing where it is no command of ours."""
    line = re.sub(r"^(\w+=\S+\s+)+", "", line)
    if not re.match(r"(\.venv/bin/)?(esmfold2-trimul|make|python|tools/\w+\.sh)( |$)", line):
        return []
    return shlex.split(line, comments=True)


def check(words: list[str], whole: bool = True) -> None:
    """Raises where there is no such command, option, target or file."""
    program, *arguments = words
    if arguments[:2] == ["-m", "esmfold2_trimul_tools"]:
        program, arguments = "esmfold2-trimul", arguments[2:]
    if program in RUNS_THE_TOOLS:
        parse(arguments, whole)
    elif program == "make":
        targets = [word for word in arguments if "=" not in word]
        assert targets and set(targets) <= {*TARGETS}, words
    elif program.endswith("python"):
        assert arguments[0] == "-m" or (ROOT / arguments[0]).is_file(), words
    else:
        assert (ROOT / program).is_file(), words


def parse(arguments: list[str], whole: bool) -> None:
    """The parser's part of a whole command; of another its name and those of its options."""
    group = typer.main.get_command(cli.app)
    if arguments:
        name, *rest = arguments
        if name == "--version":
            return
        command = group.get_command(typer.Context(group), name)
        assert command is not None, arguments
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= known | {"--help"}, arguments
        if whole and rest != ["--help"]:
            command.make_context(name, rest)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_is_one(path):
    for words, whole in commands_in(path):
        check(words, whole)


def test_the_commands_are_found():
    found = [" ".join(words) for path in DOCUMENTS for words, _ in commands_in(path)]
    assert len(found) > 60
    for command in (
        "make fold", "esmfold2-trimul fold my.fasta --model biohub/ESMFold2 --out results",
        "python tests/error_table.py", "esmfold2-trimul build --check",
        "python -m esmfold2_trimul_tools tune --out sm_90.json "
        "--results benchmarks/results/nvidia_h200_tune.json",
    ):  # fmt: skip
        assert command in found
    assert any(command.endswith("--lengths 5632,5888 --rival published") for command in found)


@pytest.mark.parametrize("line", [
    "esmfold2-trimul fold my.fasta --colour", "esmfold2-trimul refold", "make coffee",
    "esmfold2-trimul bench --seed x", "python benchmarks/none.py", "tools/none.sh",
])  # fmt: skip
def test_a_wrong_one_is_seen(line):
    with pytest.raises(Exception, match="."):
        check(words_of(line))
