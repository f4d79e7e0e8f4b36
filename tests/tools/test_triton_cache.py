"""A folder for Triton's cache that can't be written to is named, by every command that compiles."""

import os
from pathlib import Path

import pytest
import torch
from cli_runner import ready, refusal
from esmfold2_trimul_tools import triton_cache
from esmfold2_trimul_tools.bench.settings import Settings as BenchSettings
from esmfold2_trimul_tools.conformance.settings import Settings as ConformanceSettings
from esmfold2_trimul_tools.folding.command import Setup

pytest.importorskip("triton")


@pytest.fixture
def barred(monkeypatch, tmp_path):
    """The cache would be below a file; nobody, root included, can write there."""
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "hip", None)


def test_the_folder_is_the_one_that_triton_takes(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert triton_cache.cache_folder() == tmp_path / ".triton" / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    assert triton_cache.cache_folder() == tmp_path / "mine"


def test_a_folder_is_tried_without_a_trace(tmp_path):
    assert triton_cache.cache_fault(tmp_path) == ""
    assert triton_cache.cache_fault(tmp_path / "to" / "be" / "made") == ""
    assert list(tmp_path.iterdir()) == []


def test_why_a_folder_cant_be_written_to_is_said(barred):
    assert triton_cache.cache_fault(barred.parent) == "can't be written to (Not a directory)"
    assert triton_cache.cache_fault(barred) == "can't be written to (Not a directory)"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")
def test_what_root_may_write_by_its_mode_alone_is_no_folder_for_a_cache():
    fault = triton_cache.cache_fault(Path("/proc/none/.triton/cache"))
    assert fault.startswith("can't be written to (")


@pytest.mark.parametrize(
    "command",
    [
        ["resources", "--target", "sm_90"],
        ["fold", "MQIF", "--random-weights", "--device", "cuda"],
        ["fold", "MQIF", "--random-weights", "--device", "cuda", "--kernel", "hub"],
        ["validate", "--random-weights", "--device", "cuda"],
        ["bench", "--device", "cuda"],
        ["conformance", "--device", "cuda"],
        ["tune", "--out", "table.json"],
    ],
    ids=" ".join,
)
def test_a_command_that_compiles_names_the_folder(gpu, barred, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Setup, "path", lambda setup: ("triton", "a test"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert refusal(*command) == (
        f"Triton's cache folder {barred} can't be written to (Not a directory); "
        "set TRITON_CACHE_DIR to a folder that can be written to"
    )


def test_what_compiles_nothing_needs_no_cache(gpu, barred, monkeypatch):
    assert ready(BenchSettings, device="cpu").device.type == "cpu"
    assert ready(ConformanceSettings, device="cpu").device.type == "cpu"
    monkeypatch.setattr(triton_cache, "cache_folder", lambda: None)  # Triton is not installed
    triton_cache.check_cache()
    assert ready(BenchSettings, device="cuda").device.type == "cuda"
