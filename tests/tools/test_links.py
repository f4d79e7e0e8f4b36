"""What the doctor asks of several devices, between two processes of a CPU."""

from esmfold2_trimul_tools.links import measure
from fresh_process import HUNG_SECONDS


def test_processes_measure_their_messages(monkeypatch):
    monkeypatch.setenv("RANK", "7")  # of somebody else's launch
    found = measure("cpu", 2, HUNG_SECONDS)
    assert found.fault == "" and found.rate > 0
    assert found.symmetric_fault == "it is for GPUs"


def test_what_does_not_end_is_ended():
    found = measure("cpu", 2, 0.0)
    assert found.rate is None
    assert found.fault == found.symmetric_fault == "not done after 0 s"


def test_a_rank_that_fails_says_why():
    found = measure("abacus", 2, HUNG_SECONDS)
    assert found.rate is None
    assert found.fault.startswith("rank ") and "ended with status 1: RuntimeError: " in found.fault
