import torch
from esmfold2_trimul_tools.folding import memory

CPU = torch.device("cpu")


def test_peak_counts_what_was_freed_before_the_end():
    with memory.measure_peak_memory(CPU) as peak:
        block = torch.ones(16 << 20)  # 64 MiB
        block.sum()
        del block
    assert 60 << 20 < peak.added_bytes < 200 << 20
    assert peak.peak_bytes > peak.added_bytes
    assert "sampled" in peak.meaning


def test_an_idle_block_adds_next_to_nothing():
    with memory.measure_peak_memory(CPU) as peak:
        pass
    assert peak.added_bytes < 8 << 20


def test_without_proc_the_peak_of_the_process_is_named_as_such(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATM", tmp_path / "none")
    with memory.measure_peak_memory(CPU) as peak:
        torch.ones(1 << 20).sum()
    assert peak.peak_bytes > 1 << 20
    assert "since the process began" in peak.meaning
