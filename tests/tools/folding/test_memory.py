import json
from types import SimpleNamespace

import pytest
import torch
from esmfold2_trimul_tools.folding import memory
from esmfold2_trimul_tools.folding.fold import Settings, fold
from esmfold2_trimul_tools.folding.model import random_config, random_model
from esmfold2_trimul_tools.folding.sequences import Record
from folding import CPU, tiny_model
from fresh_process import ROOT


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


@pytest.mark.parametrize("samples", [1, 4])
def test_the_estimate_is_near_what_a_fold_takes(samples):
    config = random_config(pair_width=128, trunk_layers=1, side_layers=1, coda_layers=1)
    model = random_model(CPU, torch.float32, 0, config)
    folded = fold(model, Record("one", "A" * 96), Settings(loops=0, samples=samples, steps=1))
    ratio = memory.fold_bytes(model, 96, samples, "off") / folded.memory.added_bytes
    assert 0.5 < ratio < 2


def test_the_estimate_grows_with_length_samples_and_dtype():
    model, half = tiny_model(), tiny_model(dtype=torch.bfloat16)
    one = memory.fold_bytes(model, 50, 1, "ours")
    assert memory.fold_bytes(model, 100, 1, "ours") == 4 * one
    assert memory.fold_bytes(model, 50, 2, "ours") > one > memory.fold_bytes(half, 50, 1, "ours")


def test_the_estimate_for_a_gpu_is_what_was_measured():
    results = json.loads((ROOT / "benchmarks/results/nvidia_h200_whole.json").read_text())
    about = results["model"]
    model = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16,
        config=SimpleNamespace(pairwise_hidden_size=about["pair_width"]),
    )  # fmt: skip
    kernels = {"ours": "ours", "published": "hub", "stock": "off"}
    rows = [row for row in results["rows"] if row["way"] in kernels and row["peak_bytes"]]
    assert len(rows) == 10
    for row in rows:
        estimate = memory.fold_bytes(model, row["L"], about["samples"], kernels[row["way"]])
        assert estimate == pytest.approx(row["peak_bytes"] - about["bytes"], rel=0.06)
