"""The first call of a rival, timed in a new process."""

import pytest
from bench_fakes import CASE, CPU
from esmfold2_trimul_tools.bench.first_call import first_call_seconds
from fresh_process import ROOT


def test_first_call_is_timed_in_a_process_of_its_own():
    assert 0 < first_call_seconds("ours", CASE, CPU, ROOT, None) < 100


def test_a_first_call_that_fails_says_why(monkeypatch):
    monkeypatch.setenv("ESMFOLD2_TRIMUL_ROOT", "")
    with pytest.raises(RuntimeError, match="UserError: .*no build/torch-universal"):
        first_call_seconds("ours", CASE, CPU, ROOT / "docs", None)
