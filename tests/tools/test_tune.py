"""The search for launch settings: candidates, their check, the choice, the table, the command."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from esmfold2_trimul_tools import cli
from esmfold2_trimul_tools.errors import UserError
from esmfold2_trimul_tools.tune import search
from esmfold2_trimul_tools.tune.candidates import (
    SPLIT_STAGES,
    STAGES,
    WIDTHS,
    Job,
    candidates,
    split_candidates,
)
from esmfold2_trimul_tools.tune.table import fastest, table, text
from fresh_process import HUNG_SECONDS, ROOT
from typer.testing import CliRunner

CLASSES = ((96, (64,)), (None, (128, 200)))
PACKAGE_CONFIGS = ROOT / "torch-ext" / "esmfold2_trimul_kernel" / "triton_parts" / "configs"


def job(stage, width=32, **config):
    base = dict(block_m=32, block_n=16, block_k=32, num_warps=4, num_stages=2)
    return Job(stage, width, tuple(sorted((base | config).items())))


def row(milliseconds, length=64, width=128, stage="trimul_einsum", **config):
    one = job(stage, width, **config)
    return {
        "stage": stage, "width": width, "config": dict(one.config), "length": length,
        "milliseconds": milliseconds, "error": 1e-3,
    }  # fmt: skip


def results(*rows, failed=()):
    environment = {
        "device": "NVIDIA Test", "torch": "2.0", "triton": "3.0", "date": "2020-01-01",
    }  # fmt: skip
    return {"environment": environment, "kind": "2", "rows": list(rows), "failed": list(failed)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("descriptors", [False, True])
def test_candidates(kernel, stage, descriptors):
    for width in WIDTHS:
        found = candidates(stage, width, descriptors)
        assert len(found) == len(set(found)) >= 8
        configs = [one.launch_config(kernel) for one in found]
        assert not any(config.kernel for config in configs)
        assert any(config.descriptors for config in configs) == descriptors
        assert {config.num_warps for config in configs} <= {4, 8}


@pytest.mark.parametrize(("stage", "counts"), [
    ("fused_dual_gemm", {128: 3, 256: 3}), ("swiglu_hidden", {128: 3, 256: 3}),
    ("fused_ln_residual", {128: 3, 192: 2, 256: 2, 320: 2, 384: 2, 448: 2, 512: 1}),
    ("trimul_einsum", {}),
    ("row_linear", {128: 2, 192: 1, 256: 3}),
])  # fmt: skip
def test_candidates_of_variants(kernel, submodule, stage, counts):
    """Beside the others, and the shipped ones among them."""
    shipped = submodule("triton_parts.settings").settings_of("sm_90")[stage]["2"]
    for width in (64, *range(128, 513, 64)):
        plain, found = candidates(stage, width), candidates(stage, width, hopper=True)
        assert found[: len(plain)] == plain
        configs = [one.launch_config(kernel) for one in found[len(plain) :]]
        assert len(configs) == len(set(configs)) == counts.get(width, 0)
        for config in configs:
            assert (config.kernel, config.num_warps) == ("hopper", 4)
            assert config.block_m in (128, 192)
            assert config.block_k == (64 if stage == "row_linear" else width)
            if stage != "row_linear":
                least = 2 if stage == "fused_ln_residual" and width <= 256 else 1
                assert least <= config.split <= (3 if stage == "fused_ln_residual" else 1)
        for entry in shipped:
            of_width = entry.get("max_width") == width and width in counts
            if entry.get("kernel") == "hopper" and of_width:
                assert any(
                    all(
                        getattr(config, name) == entry[name]
                        for name in entry
                        if "max" not in name and name != "triton"
                    )
                    for config in configs
                )


@pytest.mark.parametrize(("stage", "module", "takes"), [
    ("fused_dual_gemm", "gated_rows", "takes_planes"),
    ("swiglu_hidden", "gated_rows", "takes_hidden"),
    ("fused_ln_residual", "ln_residual", "takes"),
    ("row_linear", "row_linear", "takes"),
])  # fmt: skip
def test_a_variants_candidate_is_for_the_calls_that_it_takes(
    kernel, submodule, monkeypatch, stage, module, takes
):
    one = candidates(stage, 128, hopper=True)[-1]
    inputs = search.StageInputs(kernel, 128, 21, "cpu")
    with pytest.raises(ValueError, match="must be of one of .*, which can run this call"):
        inputs.run(one)
    hopper = submodule("hopper")
    asked, launched = [], []

    def variants(*question):
        asked.append(question)
        return frozenset({"hopper"})

    class Variant:
        def __getattr__(self, name):
            def prepare(*arguments):
                launched.append((name, arguments[-1]))
                raise ZeroDivisionError

            return prepare

    monkeypatch.setattr(hopper, "variants", variants)
    monkeypatch.setattr(hopper, "kernels", lambda name: Variant())
    with pytest.raises(ZeroDivisionError):
        inputs.run(one)
    ((asked_module, asked_takes, x, *arguments),) = asked
    assert (asked_module, asked_takes) == (module, takes)
    assert getattr(submodule(f"hopper.{module}"), takes)(*arguments)
    ((name, config),) = launched
    assert name.startswith("prepare") and config == one.launch_config(kernel)


@pytest.mark.parametrize("one", [
    job("fused_dual_gemm", descriptors=True, held=True, maxnreg=128),
    job("fused_dual_gemm", split=2),
    job("trimul_einsum", descriptors=True, persistent=1),
    job("fused_ln_residual", block_n=32, descriptors=True, held=True),
    job("swiglu_hidden", descriptors=True, held=True, split=2),
    job("swiglu_hidden", block_k=16),
    job("row_linear", block_n=32, descriptors=True),
], ids=str)  # fmt: skip
def test_a_candidate_is_held_to_the_reference(kernel, on_triton, monkeypatch, one):
    inputs = search.StageInputs(kernel, one.width, 21, on_triton)
    assert 0 <= inputs.error(one) <= search.LARGEST_ERROR
    right = inputs.run(one)
    monkeypatch.setattr(inputs, "run", lambda _: right * 1.01)
    assert inputs.error(one) > search.LARGEST_ERROR


@pytest.mark.parametrize("stage", SPLIT_STAGES)
def test_split_candidates(kernel, submodule, on_triton, monkeypatch, stage):
    """The shipped ones are among them, and they are held to float64."""
    shipped = submodule("triton_parts.settings").settings_of("sm_90")[stage]["split"]
    for width in WIDTHS:
        found = split_candidates(stage, width)
        assert len(found) == len(set(found)) and {one.kind for one in found} == {"split"}
        configs = [one.launch_config(kernel) for one in found]
        for entry in shipped:
            names = entry.keys() - {"max_width", "max_length", "triton"}
            if entry.get("max_width", width) == width:
                assert any(
                    all(getattr(config, name) == entry[name] for name in names)
                    for config in configs
                ), entry
    inputs = search.SplitInputs(kernel, 32, 21, on_triton)
    one = job(stage)
    assert 0 <= inputs.error(one) <= search.LARGEST_SPLIT_ERROR
    right = inputs.run(one)
    monkeypatch.setattr(inputs, "run", lambda _: right * 1.01)
    assert not inputs.error(one) <= search.LARGEST_SPLIT_ERROR


def test_a_table_of_split_operands(submodule):
    base = json.loads((PACKAGE_CONFIGS / "sm_90.json").read_text())
    shipped = submodule("triton_parts.settings").settings_of("sm_90")
    measured = results(row(1.0), row(1.0, 128), row(2.0, 200)) | {"kind": "split"}
    tuned = table(measured, base, shipped, CLASSES)
    assert tuned["note"].startswith("Settings of float32's split operands of the forward measured")
    first = tuned["trimul_einsum"]["split"][0]
    assert (first["max_width"], first["block_m"]) == (128, 32)
    for stage in STAGES:
        assert tuned[stage]["2"] == base[stage]["2"], stage


def test_a_transitions_stages_get_the_rows_of_a_chunk(kernel, submodule, on_triton, monkeypatch):
    """As many as the forward computes at a time."""
    path = submodule("triton_path.transition")
    monkeypatch.setattr(path, "_FORWARD_CHUNK", (1e-9, 128 * 300, 128 * 300))
    inputs = search.StageInputs(kernel, 16, 21, on_triton)
    assert inputs.hidden.shape == (256, 64) and inputs.wanted["row_linear"].shape == (256, 16)
    for stage in ("swiglu_hidden", "row_linear"):
        assert 0 <= inputs.error(job(stage, 16)) <= search.LARGEST_ERROR


@pytest.mark.parametrize("stage", ["fused_ln_residual", "row_linear"])
def test_an_element_that_is_not_written_is_an_error(kernel, on_triton, monkeypatch, stage):
    one = job(stage)
    inputs = search.StageInputs(kernel, one.width, 21, on_triton)
    monkeypatch.setattr(inputs, "run", lambda _: torch.empty_like(inputs.wanted[one.stage]))
    assert not inputs.error(one) <= search.LARGEST_ERROR


def test_the_fastest_has_the_least_mean_over_all_lengths():
    rows = [
        row(1.0, 128, block_m=64), row(4.0, 200, block_m=64),  # mean 2
        row(1.5, 128), row(2.0, 200),  # mean 1.73
        row(0.1, 128, block_m=16),  # not measured at 200
        row(0.1, 128, stage="fused_dual_gemm"), row(0.1, 200, width=256),
    ]  # fmt: skip
    config, mean = fastest(rows, "trimul_einsum", 128, (128, 200))
    assert config["block_m"] == 32 and mean == pytest.approx(3**0.5)
    assert fastest(rows, "trimul_einsum", 64, (128, 200)) is None


VARIANT = {"kernel": "hopper", "block_m": 128}


def test_the_setting_of_a_variant_is_followed_by_one_that_takes_every_call(submodule, monkeypatch):
    base = json.loads((PACKAGE_CONFIGS / "sm_90.json").read_text())
    config = submodule("triton_parts.settings")
    shipped = config.settings_of("sm_90")
    stage, rows = "fused_dual_gemm", []
    # The variant is the fastest from 128 on; of the others, another for each class.
    for length, variant, small, large in ((64, 3.0, 1.0, 2.0), (128, 1.0, 3.0, 2.0)):
        rows += [
            row(variant, length, stage=stage, **VARIANT),
            row(small, length, stage=stage, block_m=16), row(large, length, stage=stage),
        ]  # fmt: skip
    measured = results(*rows)
    classes = ((96, (64,)), (None, (128,)))
    tuned = table(measured, base, shipped, classes)
    first, second, third = (
        e for e in tuned[stage]["2"] if e.get("max_width", 512) <= 128
    )
    assert (first["max_length"], first["block_m"], "kernel" in first) == (96, 16, False)
    assert (second["kernel"], second["block_m"], "max_length" in second) == ("hopper", 128, False)
    assert (third["block_m"], "kernel" in third) == (32, False)
    lines = text(measured, classes).splitlines()[1:]
    assert [line.partition("  ")[0] for line in lines[:3]] == [
        "fused_dual_gemm C = 128, L = 64: 1.0000", "fused_dual_gemm C = 128, L = 128: 1.0000",
        "fused_dual_gemm C = 128, L = 128: 2.0000",
    ]  # fmt: skip
    assert "kernel=hopper" in lines[1]
    # Settings that are the same in both classes are one entry each.
    alike = [row(one["milliseconds"], 64, stage=stage, **one["config"]) for one in rows[3:]]
    both = table(results(*rows[3:], *alike), base, shipped, classes)[stage]["2"]
    assert [entry.get("kernel") for entry in both if entry.get("max_width") == 128] == [
        "hopper", None
    ]  # fmt: skip

    monkeypatch.setattr(config, "_table", lambda name: tuned if name == "tuned" else None)
    config.pick_config.cache_clear()
    try:
        for length, variants, block_m in ((64, True, 16), (128, True, 128), (128, False, 32)):
            named = frozenset({"hopper"}) if variants else frozenset()
            shape = config.Shape(2, 128, length)
            picked = config.pick_config(stage, "tuned", "any", shape, "3.6.0", named)
            assert picked.block_m == block_m
    finally:
        config.pick_config.cache_clear()


def test_the_table_is_one_that_the_package_reads(submodule, monkeypatch):
    base = json.loads((PACKAGE_CONFIGS / "sm_90.json").read_text())
    shipped = submodule("triton_parts.settings").settings_of("sm_90")
    some = []
    for stage in STAGES:
        for width in (128, 256):
            for length in (64, 128, 200):
                same = 32 if width == 128 else 32 + 32 * (length > 64)
                some += [row(1.0, length, width, stage, block_m=same, maxnreg=None)]
                some += [row(2.0, length, width, stage, block_m=16)]
    tuned = table(results(*some), base, shipped, CLASSES)
    for words in ("NVIDIA Test", "torch 2.0", "Triton 3.0", "2020-01-01"):
        assert words in tuned["note"]
    untimed = [entry for entry in base["trimul_einsum"]["2"] if "kernel" in entry]
    ahead, entries = (tuned["trimul_einsum"]["2"][part] for part in (
        slice(len(untimed)), slice(len(untimed), None)
    ))  # fmt: skip
    assert ahead == untimed
    # 128: both classes have one setting, so one entry; 256: two.
    assert [(e["max_width"], e.get("max_length")) for e in entries[:3]] == [
        (128, None), (256, 96), (256, None),
    ]  # fmt: skip
    assert "maxnreg" not in entries[0] and "split" not in entries[0]
    assert entries[3:] == [
        e for e in base["trimul_einsum"]["2"] if "max_width" not in e and "kernel" not in e
    ]
    assert tuned["trimul_einsum"]["4"] == base["trimul_einsum"]["4"]

    config = submodule("triton_parts.settings")
    monkeypatch.setattr(config, "_table", lambda name: tuned if name == "tuned" else None)
    shape = config.Shape
    config.pick_config.cache_clear()
    try:
        for stage in STAGES:
            for width, length, block_m in ((128, 64, 32), (256, 64, 32), (256, 97, 64)):
                picked = config.pick_config(
                    stage, "tuned", "any", shape(2, width, length), "3.6.0"
                )
                assert picked.block_m == block_m
            config.pick_config(stage, "tuned", "any", shape(2, 512, 64), "3.6.0")
        for length, variant, kernel in (
            (64, "both", "both"), (500, "both", "both"), (64, "hopper", ""),
            (500, "hopper", "hopper"),
        ):  # fmt: skip
            picked = config.pick_config(
                "trimul_einsum", "tuned", "any", shape(2, 256, length), "3.6.0",
                frozenset({variant}),
            )  # fmt: skip
            assert picked.kernel == kernel
    finally:
        config.pick_config.cache_clear()


class FakeInputs:
    """Every candidate takes block_m milliseconds; block_m = 48 is wrong at the last length."""

    largest_error = search.LARGEST_ERROR

    def __init__(self, kernel, width, length):
        self.length = length

    def error(self, one):
        wrong = dict(one.config)["block_m"] == 48 and self.length == 200
        return 0.5 if wrong else 1e-3

    def milliseconds(self, one, flush):
        return float(dict(one.config)["block_m"])


class FakePool:
    def __init__(self, processes):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def apply_async(self, function, arguments):
        block_m = dict(arguments[1].config)["block_m"]

        def get(timeout):
            if block_m == 512:
                raise multiprocessing.TimeoutError
            return "too much shared memory" if block_m == 256 else None

        return types.SimpleNamespace(get=get)


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, device=None, **others: empty(*size, **others)
    )
    monkeypatch.setattr(
        search.multiprocessing, "get_context", lambda _: types.SimpleNamespace(Pool=FakePool)
    )
    monkeypatch.setattr(search, "StageInputs", FakeInputs)


def test_candidates_that_fail_are_named_and_never_chosen(fake_gpu, monkeypatch):
    jobs = [job("trimul_einsum", 128, block_m=m) for m in (48, 64, 128, 256, 512)]
    said, timed = [], []

    @contextlib.contextmanager
    def watched(what):
        timed.append(what)
        yield

    monkeypatch.setattr(search, "watched", watched)
    found = search.search(
        ROOT, ("trimul_einsum",), (128,), CLASSES, jobs=jobs, command="tune", commit="abc",
        progress=lambda *what: said.append(what),
    )  # fmt: skip
    assert {row["config"]["block_m"] for row in found["rows"]} == {64, 128}
    assert len(found["rows"]) == 2 * 3
    assert [(f["config"]["block_m"], f["why"]) for f in found["failed"]] == [
        (256, "too much shared memory"),
        (512, "no result after 600 s: it hangs, or its process died"),
        (48, "error 5.0e-01 at L = 200"),
    ]  # fmt: skip
    assert len(timed) == 3 * 3
    assert timed[-1] == f"{jobs[2]}, at L = 200,"
    config, mean = fastest(found["rows"], "trimul_einsum", 128, (128, 200))
    assert (config["block_m"], mean) == (64, pytest.approx(64))
    where = found["environment"]
    assert (where["device"], where["command"], where["commit"]) == ("NVIDIA Test", "tune", "abc")
    assert said[-1] == ("done", 8, 8) and [done for _, done, _ in said] == sorted(
        done for _, done, _ in said
    )


def test_a_process_that_hangs_is_ended_and_says_in_what():
    script = """
        import sys, time
        from esmfold2_trimul_tools.tune.watchdog import watched

        with watched("the first", 1000.0):
            pass
        with watched("the second", 0.01):
            time.sleep(float(sys.argv[1]))
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools" / "src")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(HUNG_SECONDS)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: the second hangs: no end after 0.01 s\n"


@pytest.mark.parametrize("capability, asked", [
    ((8, 0), (False, False)), ((9, 0), (True, True)), ((10, 0), (True, False)),
])  # fmt: skip
def test_variants_are_tried_on_the_gpu_that_has_them(fake_gpu, monkeypatch, capability, asked):
    def none(stage, width, *what):
        given.append(what)
        return []

    given = []
    monkeypatch.setattr(search, "candidates", none)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    search.search(ROOT, ("fused_dual_gemm",), (128,), CLASSES)
    assert given == [asked]


def test_split_operands_are_for_hopper_gpus(fake_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    with pytest.raises(UserError, match="split operands are for Hopper GPUs"):
        search.search(ROOT, classes=CLASSES, kind="split")


def test_the_command(fake_gpu, submodule, monkeypatch, tmp_path):
    def two(stage, width, descriptors, hopper):
        return [job(stage, width, block_m=m) for m in (64, 32)]

    monkeypatch.setattr(search, "candidates", two)
    device = submodule("triton_parts.device")
    monkeypatch.setattr(device, "device_target", lambda _: device.target_of("sm_90", ""))
    out, everything = tmp_path / "new" / "table.json", tmp_path / "all.json"
    arguments = ["--out", str(out), "--results", str(everything), "--width", "128"]
    result = CliRunner().invoke(cli.app, ["tune", *arguments])
    assert result.exit_code == 0, result.output
    assert "trimul_einsum C = 128, L = 64, 76: 32.0000  block_k=32 block_m=32" in result.stdout
    tuned = json.loads(out.read_text())
    assert tuned["fused_dual_gemm"]["2"][0]["block_m"] == 32
    written = json.loads(everything.read_text())["candidates"]
    assert len(written) == len(STAGES) * 2
    assert all(len(one["milliseconds"]) == 10 for one in written)
    result = CliRunner().invoke(
        cli.app, ["tune", *arguments, "--stage", "trimul_einsum", "--commit", "abc", "--json"]
    )
    measured = json.loads(result.stdout)
    assert {row["stage"] for row in measured["rows"]} == {"trimul_einsum"}
    assert measured["environment"]["commit"] == "abc"


@pytest.mark.parametrize("arguments, message", [
    (["--stage", "four"], f"stage must be one of {', '.join(STAGES)}; got 'four'"),
    (["--width", "8"], "width must be from 16 to 512; got 8"),
    ([], "tune needs an NVIDIA GPU: torch.cuda finds none"),
])  # fmt: skip
def test_refusals(monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(cli.app, ["tune", "--out", "table.json", *arguments])
    assert (result.exit_code, result.stderr) == (UserError.exit_status, f"error: {message}\n")
