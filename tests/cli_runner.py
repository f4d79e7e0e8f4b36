"""Runs the command-line tool in this process."""

from esmfold2_trimul_tools import cli
from esmfold2_trimul_tools.options import read
from typer.testing import CliRunner


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def refusal(*arguments):
    """The one line that bad input gets; it leaves stdout alone."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    return result.stderr[len("error: ") : -1]


def ready(options, **given):
    """The dataclass of a command's options from their text, as on this machine."""
    return read(options, **given).on_this_machine()
