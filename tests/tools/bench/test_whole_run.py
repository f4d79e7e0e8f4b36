"""A run of whole folds from its options to its file, on the tests' tiny model."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_runner import refusal, run
from esmfold2_trimul_tools.bench.options import Options
from esmfold2_trimul_tools.bench.whole import run as subject
from esmfold2_trimul_tools.bench.whole import settings, ways
from esmfold2_trimul_tools.bench.whole.longest import longest
from esmfold2_trimul_tools.bench.whole.parts import Marks
from esmfold2_trimul_tools.bench.whole.results import LONGEST, ROW, ours_is_right, read_results
from esmfold2_trimul_tools.bench.whole.settings import plan_of
from esmfold2_trimul_tools.bench.whole.ways import Installed, Way
from esmfold2_trimul_tools.errors import UserError
from esmfold2_trimul_tools.folding import model
from esmfold2_trimul_tools.folding.memory import PeakMemory
from esmfold2_trimul_tools.options import read
from folding import CPU, tiny_config
from whole_fakes import BY_NAME, tiny_bench, whole_results

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["bench", "--whole", "--small", "--device", "cpu", "--steps", 2]


@pytest.fixture(autouse=True)
def _tiny_models_in_a_folder_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "random_config", tiny_config)


def test_it_measures_prints_keeps_and_adds():
    result = run(*SMALL, "--lengths", 16, "--ways", "stock,published,esm,ours", "--out", "r.json")
    assert result.exit_code == 0, result.output
    for text in (
        "Whole folds, by part", "fold, s", "x stock", "triangle", "trunk, pairs",
        "published, absent at L = 16: needs a GPU", "modules swapped by patch",
    ):  # fmt: skip
        assert text in result.stdout
    kept = json.loads(Path("r.json").read_text())
    assert [(row["way"], row["status"]) for row in kept["rows"]] == [
        ("stock", "measured"), ("published", "absent"), ("esm", "absent"), ("ours", "measured")
    ]  # fmt: skip
    assert {tuple(row) for row in kept["rows"]} == {tuple(kept["rows"][0])}
    assert set(kept["rows"][0]) == set(ROW)
    stock, ours = kept["rows"][0], kept["rows"][3]
    assert ours["mean_plddt"] == pytest.approx(stock["mean_plddt"], abs=1e-4)
    for row in (stock, ours):
        assert row["loops"] == row["loops_timed"] == 1 and row["trunk_layers_timed"] == 1
        assert row["seconds"] > 0 and row["trunk_seconds"] > 0 and row["trunk_pairs"] >= 0
        assert row["peak_bytes"] > kept["model"]["bytes"] > 0
        assert min(row["parts"].values()) > 0
    assert kept["model"] | {"parameters": 0, "bytes": 0} == {
        "architecture": "small", "dtype": "float32", "parameters": 0, "bytes": 0, "loops": 1,
        "samples": 1, "steps": 2, "denoiser_calls": 2, "pair_layers_a_loop": 3, "pair_width": 16,
    }  # fmt: skip

    again = run(*SMALL, "--lengths", "16,20", "--ways", "stock,ours", "--out", "r.json", "--resume")
    assert again.exit_code == 0, again.output
    added = read_results(Path("r.json"))
    assert [(row["L"], row["way"]) for row in added["rows"]] == [
        (16, "stock"), (16, "ours"), (20, "stock"), (20, "ours")
    ]  # fmt: skip
    assert added["rows"][:2] == [stock, ours] and len(added["environment"]["commands"]) == 2

    shown = run("bench", "--whole", "--results", "r.json", "--json")
    assert json.loads(shown.stdout) == added
    assert "| 20 | ours |" in run("bench", "--whole", "--results", "r.json", "--markdown").stdout
    assert "| 20 | " in run("bench", "--whole", "--results", "r.json", "--readme").stdout
    message = refusal(*SMALL, "--loops", 3, "--out", "r.json", "--resume")
    assert message.startswith("--resume: model was {") and "measure into another file" in message
    message = refusal(*SMALL, "--seed", 3, "--out", "r.json", "--resume")
    assert message.startswith("--resume: seed was 0 in r.json and is 3 here")


BAD = [
    (["--whole", "--rival", "published"], "--rival is not for --whole"),
    (["--whole", "--widths", "128"], "--widths is not for --whole"),
    (["--ways", "ours"], "--ways is for --whole"),
    (["--longest", 80], "--longest is for --whole"),
    (["--readme"], "--readme is for --whole"),
    (["--whole", "--budget", 1], "--budget is not for --whole"),
    (["--whole", "--dtypes", "bf16,fp32"], "--dtypes must be one with --whole; got bfloat16, flo"),
    (
        ["--whole", "--passes", "forward,training"],
        "--passes must be one with --whole; got forward, training",
    ),
    (
        ["--whole", "--passes", "training", "--loops", 1],
        "--loops is not for --whole --passes training",
    ),
    (
        ["--whole", "--passes", "training", "--widths", 64],
        "--widths is not for --whole --passes training",
    ),
    (
        ["--whole", "--passes", "training", "--ways", "ours,ours-graph"],
        "--ways: ours-graph is not for --passes training",
    ),
    (["--whole", "--ways", "ours-recompute"], "--ways: ours-recompute is not for --passes forward"),
    (["--whole", "--ways", "theirs"], "--ways must be of stock, stock-unchunked, "),
    (["--whole", "--esm", "none"], "--esm none: holds no package esm with models/esmfold2/layers"),
    (["--whole", "--longest", 0], "--longest must be above 0; got 0.0"),
    (["--whole", "--fold-seconds", "nan"], "--fold-seconds must be above 0; got nan"),
    (["--whole", "--loops", -1], "--loops must be at least 0; got -1"),
    (["--whole", "--resume"], "--resume needs --out, the file to add to"),
    (["--whole", "--device", "xpu"], "--device must be cpu or cuda here"),
    (["--whole", "--longest", 80, "--device", "cpu"], "--longest needs a CUDA device"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_options_that_do_not_fit_are_refused(arguments, message):
    assert refusal("bench", *arguments).startswith(message)


def test_results_of_single_calls_are_no_results_of_folds(tmp_path):
    (tmp_path / "calls.json").write_text('{"environment": {}, "ceilings": {}, "rows": []}')
    message = "calls.json: holds no results of whole folds"
    assert refusal("bench", "--whole", "--results", "calls.json") == message


def test_a_device_with_less_than_is_asked_for_is_refused(monkeypatch):
    class Small:
        total_memory = 24 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Small)
    cuda = torch.device("cuda", 0)
    settings._check_longest(24, cuda)
    with pytest.raises(UserError, match="--longest must be at most the 24.0 GiB of cuda:0; got 80"):
        settings._check_longest(80, cuda)


def test_defaults_on_a_gpu_and_for_the_longest(monkeypatch):
    monkeypatch.setattr(model, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(settings, "check_cache", lambda: None)
    monkeypatch.setattr(settings, "_check_longest", lambda *_: None)
    plan = plan_of(read(Options, whole=True))
    assert plan.lengths == (256, 512, 1024, 2048) and plan.dtypes == ("bfloat16",)
    assert plan.ways == tuple(way for way in ways.WAYS if "forward" in way.passes)
    steps = plan_of(read(Options, whole=True, passes="training"))
    assert (steps.lengths, steps.check_up_to) == ((256, 512, 1024), 1024)
    left_out = {way.name for way in ways.WAYS} - {way.name for way in steps.ways}
    assert left_out == {"ours-unchunked", "ours-graph"}
    assert [way.name for way in plan_of(read(Options, longest=80)).ways] == ["stock", "ours"]


@pytest.fixture
def bench(kernel):
    return tiny_bench(kernel)


@pytest.fixture
def plan(bench):
    options = dict(small=True, device="cpu", steps=2, samples=1, loops=2)
    plan = plan_of(read(Options, whole=True, **options))
    return replace(plan, fold=plan.fold.resolved(bench.model.config))


def doing(forward):
    """A way whose triangles do this instead."""

    @contextmanager
    def install(bench):
        with ways._replaced(bench.triangles, lambda _: forward):
            yield Installed("a note")

    return Way("planted", install)


def raising(error):
    def forward(*_, **__):
        raise error

    return doing(forward)


def test_out_of_memory_is_a_result_and_anything_else_a_failure(bench, plan):
    row = subject.measure(raising(torch.OutOfMemoryError("full\nand more")), 16, bench, plan)
    assert (row["status"], row["seconds"], row["trunk_seconds"]) == ("does not fit", None, None)
    assert row["note"].startswith("a note; OutOfMemoryError: full")
    row = subject.measure(raising(ZeroDivisionError("a bug")), 16, bench, plan)
    assert (row["status"], row["note"]) == ("failed", "a note; ZeroDivisionError: a bug")
    assert subject.measure(BY_NAME["stock"], 16, bench, plan)["status"] == "measured"


def test_a_trunk_that_fits_is_measured_where_the_fold_does_not(bench, plan, monkeypatch):
    def full(*_, **__):
        raise MemoryError("full")

    monkeypatch.setattr(bench.model.confidence_head, "forward", full)
    row = subject.measure(BY_NAME["stock"], 16, bench, plan)
    assert (row["status"], row["seconds"], row["note"]) == (
        "does not fit", None, "MemoryError: full"
    )  # fmt: skip
    assert row["trunk_seconds"] > 0


def test_numbers_that_are_not_finite_are_wrong(bench, plan):
    way = doing(lambda pair_grid, visibility=None: pair_grid * float("nan"))
    row = subject.measure(way, 16, bench, plan)
    assert (row["status"], row["note"]) == ("wrong", "gave numbers that are not finite")
    assert row["seconds"] is row["trunk_seconds"] is None
    results = whole_results(row)
    assert ours_is_right(results)
    row["way"] = "ours"
    assert not ours_is_right(results)
    row["status"] = "absent"
    assert ours_is_right(results)


def test_a_long_fold_is_timed_with_fewer_loops_and_the_row_says_so(bench, plan, monkeypatch):
    asked = []
    fold = subject._fold

    def counted(bench, features, settings, loops, steps=None):
        asked.append((loops, steps))
        return fold(bench, features, settings, loops, steps)

    monkeypatch.setattr(subject, "_fold", counted)
    plan = replace(plan, fold_seconds=1e-9)
    row = subject.measure(BY_NAME["stock"], 16, bench, plan)
    assert asked == [(0, 1), (0, None), (1, None)]
    assert (row["loops"], row["loops_timed"], row["trunk_layers_timed"]) == (2, 1, 1)
    (timed,) = row["seconds_timed"]
    assert timed < row["seconds"]

    asked.clear()
    row = subject.measure(BY_NAME["stock"], 16, bench, replace(plan, fold_seconds=1e9))
    assert asked == [(0, 1), (0, None), (2, None), (2, None)]
    assert row["loops_timed"] == 2 and min(row["seconds_timed"]) <= row["seconds"]


def test_a_device_that_a_way_broke_ends_the_run_with_its_rows_kept(monkeypatch):
    def fail(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(subject, "measure", lambda *_: {"way": "stock", "L": 16})
    monkeypatch.setattr(subject, "_release", fail)
    result = run(*SMALL, "--lengths", 16, "--out", "r.json")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: L = 16, stock broke the device: RuntimeError: CUDA err")
    assert len(read_results(Path("r.json"))["rows"]) == 1


@pytest.mark.parametrize("limit", [0, 63, 64, 100, 640, 1000, 1024, 5000])
@pytest.mark.parametrize("guess", [1, 64, 500, 1024, 3000])
def test_the_longest_length_is_found(limit, guess):
    found, tried = longest(lambda length: length <= limit, guess, 64)
    assert found == limit // 64 * 64
    assert all(length % 64 == 0 and fitted == (length <= limit) for length, fitted in tried.items())
    if abs(guess - limit) < 64 and limit >= 64:
        assert len(tried) <= 3


@pytest.mark.parametrize("whole_fits_to", [1000, 300])
def test_the_longest_fold_is_bound_by_the_part_with_the_peak(
    bench, plan, monkeypatch, whole_fits_to
):
    folded = []

    def timed(device, call):
        """As if a fold took 1 KiB a pair beyond the weights, and lengths to 400 fitted."""
        call()
        length, short = folded[-1]
        if length > 400 or (length > whole_fits_to and not short):
            raise torch.OutOfMemoryError("full")
        return 0.0, PeakMemory(weights + 1024 * length**2)

    def fold(bench, features, settings, loops, steps=None):
        folded.append((features, len(bench.model.folding_trunk.layers) == short_stack))

    peaks = iter([1, 2, 7])
    monkeypatch.setattr(Marks, "peak_since", lambda self: next(peaks, 0))
    weights, short_stack = subject.weight_bytes(bench.model), 1
    monkeypatch.setattr(subject, "_timed", timed)
    monkeypatch.setattr(subject, "_fold", fold)
    monkeypatch.setattr(subject, "_features", lambda length, *_: length)
    monkeypatch.setattr(subject, "_limited", lambda *_: nullcontext())
    bench.model.folding_trunk.layers.append(bench.model.folding_trunk.layers[0])
    try:
        row = subject.find_longest(
            BY_NAME["stock"], bench, replace(plan, longest=(weights + 1024 * 390**2) / 2**30)
        )
    finally:
        del bench.model.folding_trunk.layers[-1]
    assert set(row) == set(LONGEST)
    found = 384 if whole_fits_to == 1000 else 256
    assert (row["status"], row["L"], row["step"]) == ("measured", found, 64)
    assert row["tried"]["448"] is False and row["tried"][str(found)] is True
    assert row["peak_by_loops"] == {"0": weights + 2**26, "2": weights + 2**26}
    assert (row["peak_bytes"], row["bound_by"]) == (2, "rest")


def test_the_limit_is_given_back(monkeypatch):
    class Large:
        total_memory = 160 * 2**30

    fractions = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Large)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share)
    )
    with pytest.raises(ZeroDivisionError), subject._limited(CPU, 80 * 2**30):
        raise ZeroDivisionError
    assert fractions == [0.5, 1.0]
