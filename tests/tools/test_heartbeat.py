import threading

import pytest
from esmfold2_trimul_tools.console import ProgressBar
from esmfold2_trimul_tools.heartbeat import heartbeat
from fresh_process import HUNG_SECONDS


def test_says_how_long_until_it_is_over():
    before = threading.active_count()
    said, enough = [], threading.Event()

    def say(elapsed):
        said.append(elapsed)
        if len(said) == 3:
            enough.set()

    with heartbeat(say, seconds=0.001):
        assert enough.wait(timeout=HUNG_SECONDS)
    count = len(said)
    assert set(said) == {"0 min"} and count >= 3
    assert threading.active_count() == before


def test_is_over_after_an_exception():
    before = threading.active_count()
    with pytest.raises(KeyError), heartbeat(print):
        raise KeyError
    assert threading.active_count() == before


def test_a_command_that_writes_to_no_terminal_says_where_it_is(capsys):
    with ProgressBar() as report:
        report._say("1 min")
        report("ubiquitin, stock", 1, 2)
        report._say("2 min")
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err == "1 min: Starting\n2 min: ubiquitin, stock (1 of 2 done)\n"
