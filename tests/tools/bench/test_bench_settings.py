"""The benchmark's options: which are refused, and which rivals they choose."""

from pathlib import Path

import pytest
from bench_fakes import TINY
from cli_runner import ready
from esmfold2_trimul_tools.bench.case import Case
from esmfold2_trimul_tools.bench.rivals import RIVALS, TRANSITION_RIVALS
from esmfold2_trimul_tools.bench.settings import Settings
from esmfold2_trimul_tools.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": "8,x"}, "--lengths must be whole numbers above 0, as in 128,256; got '8,x'"),
        ({"widths": "0"}, "--widths must be whole numbers above 0"),
        ({"compile_lengths": ","}, "--compile-lengths must be whole numbers"),
        ({"dtypes": "int8"}, "--dtypes must be of float32, bfloat16, float16; got 'int8'"),
        ({"directions": "up"}, "--directions must be of outgoing, incoming; got 'up'"),
        ({"masks": "soft"}, "--masks must be of bool, float, none; got 'soft'"),
        ({"rivals": ["theirs"]}, "--rival must be one of ours; .*; got 'theirs'"),
        ({"budget": 0.0}, "--budget must be above 0 seconds; got 0.0"),
        ({"seed": -1}, "--seed must be at least 0; got -1"),
        ({"busy": -1}, "--busy must be at least 0; got -1"),
        ({"device": "xpu"}, "--device"),
        ({"published": Path("none")}, "--published none: holds no package esmfold2_trimul"),
        ({"transition": True, "rivals": ["published"]}, "--rival must be one of ours; .*; got 'p"),
        ({"transition": True, "directions": "incoming"}, "--directions is not for --transition"),
        ({"transition": True, "masks": "bool,none"}, "--masks is not for --transition"),
        ({"transition": True, "first_call": True}, "--first-call is not for --transition"),
        ({"transition": True, "quick": True}, "--quick is not for --transition"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ready(Settings, **options)


def test_dtypes_have_short_names():
    settings = ready(Settings, **TINY, dtypes="bf16,bfloat16,fp16,fp32")
    assert settings.dtypes == ("bfloat16", "float16", "float32")


def test_options_choose_the_rivals(monkeypatch, tmp_path):
    def names(**options):
        return [rival.name for rival in ready(Settings, **options).rivals]

    basic = ["ours", "in-tree, chunk 64", "in-tree, unchunked"]
    assert names(device="cpu") == basic
    assert names(device="cpu", graphs=True, max_autotune=True) == basic
    assert names(device="cpu", compile=True) == [*basic, "in-tree, torch.compile"]
    assert names(device="cpu", rivals=["published"]) == ["ours", "published"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert names(device="cuda") == [
        "ours", "ours, plain", "ours, TF32x3", "ours, torch.compile", "ours, CUDA graph",
        "ours, lean", *basic[1:], "published", "cuequivariance, bf16 norms",
        "cuequivariance, fp32 norms",
    ]  # fmt: skip
    (tmp_path / "esm" / "models" / "esmfold2").mkdir(parents=True)
    (tmp_path / "esm" / "models" / "esmfold2" / "layers.py").write_text("")
    everything = dict(
        compile=True, max_autotune=True, graphs=True, esm=tmp_path, passes="training,forward"
    )
    assert len(names(device="cuda", **everything)) == len(RIVALS)
    assert names(device="cuda", passes="training") == [
        "ours", "ours, plain", "ours, TF32x3", "ours, torch.compile", "ours, recompute all",
        *basic[1:],
        "published", "cuequivariance, bf16 norms", "cuequivariance, fp32 norms",
    ]  # fmt: skip
    settings = ready(Settings, device="cuda", compile_lengths="384")
    assert settings.dtypes == ("bfloat16",) and len(settings.cases()) == 30
    at = {length: settings.rivals_at(Case(128, length, "bfloat16")) for length in (384, 512)}
    assert len(at[384]) - len(at[512]) == 1 and "ours, torch.compile" in str(at[384])
    assert ready(Settings, device="cuda", quick=True).lengths == (76, 256, 512, 1024)


def test_transitions(monkeypatch):
    both = "forward,training"
    settings = ready(Settings, device="cpu", transition=True, widths="16", passes=both)
    assert [str(case) for case in settings.cases()] == [
        "C=16 L=64 float32 transition", "C=16 L=128 float32 transition",
        "C=16 L=64 float32 transition training", "C=16 L=128 float32 transition training",
    ]  # fmt: skip
    names = [rival.name for rival in settings.rivals]
    assert names == ["ours", "in-tree, chunk 64", "in-tree, unchunked"]
    assert all(rival in TRANSITION_RIVALS for rival in settings.rivals)
    chosen = ready(Settings, device="cpu", transition=True, rivals=["in-tree, chunk 64"]).rivals
    assert [rival.name for rival in chosen] == ["ours", "in-tree, chunk 64"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    settings = ready(Settings, device="cuda", transition=True, compile=True, graphs=True)
    assert settings.rivals == TRANSITION_RIVALS and settings.lengths == (256, 512, 1024)
