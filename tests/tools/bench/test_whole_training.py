"""Training steps of a pair layer from the options to the file, on the tests' tiny model."""

import copy
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_runner import refusal, run
from esmfold2_trimul_tools.bench.clock import CpuClock
from esmfold2_trimul_tools.bench.options import Options
from esmfold2_trimul_tools.bench.whole import training as subject
from esmfold2_trimul_tools.bench.whole.results import STEP, read_results
from esmfold2_trimul_tools.bench.whole.settings import plan_of
from esmfold2_trimul_tools.bench.whole.ways import TRIANGLES, Installed, Way, _replaced
from esmfold2_trimul_tools.documents import write_document
from esmfold2_trimul_tools.folding import model
from esmfold2_trimul_tools.options import read
from folding import CPU, tiny_config
from whole_fakes import BY_NAME, LENGTH, step_results, tiny_bench, whole_results

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = ["bench", "--whole", "--passes", "training", "--small", "--device", "cpu", "--budget", 0.01]


@pytest.fixture(autouse=True)
def _tiny_models_in_a_folder_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "random_config", tiny_config)


def test_it_measures_prints_keeps_and_adds(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    result = run(*STEPS, "--lengths", 12, "--compile-lengths", 9, "--out", "r.json")
    assert result.exit_code == 0, result.output
    for text in (
        "Training steps of a pair layer", "p10 to p90", "steps a second", "peak, pairs",
        "published, absent at L = 12: needs a GPU", "modules swapped by patch",
    ):  # fmt: skip
        assert text in result.stdout
    kept = read_results(Path("r.json"))
    rows = {row["way"]: row for row in kept["steps"]}
    measured = ["stock", "stock-unchunked", "ours-layer", "ours", "ours-recompute"]
    assert [way for way, row in rows.items() if row["status"] == "measured"] == measured
    assert rows.keys() - measured == {"published", "esm", "ours-plain"}
    assert kept["layer"] | {"parameters": 0, "bytes": 0} == {
        "architecture": "small", "dtype": "float32", "parameters": 0, "bytes": 0,
        "pair_width": 16, "transition_width": 32,
    }  # fmt: skip
    for way in measured:
        row = rows[way]
        assert set(row) == set(STEP)
        # Sums of some hundred terms in float32; a term left out is an error of 1e-2 and more.
        assert 0 < row["error"] < 1e-5 and row["checked_pairs"] == 144
        assert 0 < row["device_ms"]["p10"] <= row["device_ms"]["median"] <= row["device_ms"]["p90"]
        assert row["steps_per_s"] == 1e3 / row["device_ms"]["median"]
        assert row["wall_ms"] is row["host_ms"] is None and row["peak_pairs"] >= 0
    assert rows["stock"]["note"] is None
    triangles, transition = "2 trimul_fwd_saving", "1 swiglu_fwd_saving, 1 swiglu_bwd"
    assert rows["ours-layer"]["note"] == f"our ops in a step: {triangles}, 2 trimul_bwd"
    assert rows["ours"]["note"].endswith(
        f"swapped by patch; our ops in a step: {triangles}, {transition}, 2 trimul_bwd"
    )

    more = ["--ways", "stock,stock-compiled", "--check-up-to", 8, "--compile-lengths", 9]
    again = run(*STEPS, "--lengths", "12,9", *more, "--out", "r.json", "--resume")
    assert again.exit_code == 0, again.output
    added = read_results(Path("r.json"))
    assert [(row["L"], row["way"]) for row in added["steps"]] == [
        *((12, way) for way in measured), (9, "stock"), (9, "stock-compiled")
    ]  # fmt: skip
    assert added["steps"][0] == rows["stock"] and len(added["environment"]["commands"]) == 2
    unchecked = added["steps"][-1]
    assert unchecked["status"] == "measured" and unchecked["error"] is None

    shown = run("bench", "--whole", "--results", "r.json", "--json")
    assert json.loads(shown.stdout) == added
    assert "| 12 | ours |" in run("bench", "--whole", "--results", "r.json", "--markdown").stdout


def test_results_of_one_kind_take_none_of_the_other():
    write_document(step_results(), Path("steps.json"))
    write_document(whole_results(), Path("folds.json"))
    message = refusal("bench", "--whole", "--results", "steps.json", "--readme")
    assert message == "--readme: steps.json holds no whole folds"
    message = refusal(*STEPS, "--out", "folds.json", "--resume")
    assert message == "folds.json: holds no results of training steps"
    message = refusal("bench", "--whole", "--small", "--out", "steps.json", "--resume")
    assert message == "steps.json: holds no results of whole folds"


@pytest.fixture(scope="module")
def bench(kernel):
    return tiny_bench(kernel)


@pytest.fixture(scope="module")
def step(bench):
    plan = plan_of(read(Options, whole=True, passes="training", small=True, device="cpu"))
    return subject.make_step(LENGTH, bench, plan)


def planted(forward):
    """A way whose trunk's first layer is `forward(own, pair, mask)`."""

    @contextmanager
    def install(bench):
        layer = subject.layer_of(bench.model)
        own = type(layer).forward

        def replaced(pair, mask=None):
            return forward(lambda pair, mask: own(layer, pair, mask), pair, mask)

        with _replaced([layer], lambda _: replaced):
            yield Installed("a note")

    return Way("ours", install)


def measure(way, step, bench):
    row = subject.measure(way, step, bench, CpuClock(CPU), 0.01)
    layer = subject.layer_of(bench.model)
    assert "forward" not in vars(layer) and not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    return row


def test_a_wrong_gradient_a_missing_one_and_a_full_memory(bench, step):
    def full(own, pair, mask):
        raise torch.OutOfMemoryError("full")

    assert measure(planted(lambda own, *call: own(*call)), step, bench)["status"] == "measured"
    row = measure(planted(lambda own, pair, mask: 1.05 * own(pair, mask)), step, bench)
    assert (row["status"], row["device_ms"]) == ("wrong", None)
    assert row["note"] == "a note; relative error 5.0e-02"
    row = measure(planted(lambda own, pair, mask: own(pair, None)), step, bench)
    assert row["status"] == "wrong"  # the last residues are masked
    for cut in (lambda own, pair, mask: 2 * pair, lambda own, *call: own(*call).detach()):
        row = measure(planted(cut), step, bench)
        assert row["status"] == "failed" and row["note"].startswith("a note; RuntimeError: ")
    row = measure(planted(full), step, bench)
    assert (row["status"], row["note"]) == ("does not fit", "a note; OutOfMemoryError: full")
    assert row["device_ms"] is row["peak_pairs"] is None


def test_the_layer_is_in_training_mode_and_every_parameter_gets_a_gradient(bench, step):
    seen = set()

    def watched(own, pair, mask):
        layer = subject.layer_of(bench.model)
        assert layer.training and pair.requires_grad
        seen.update(name for name, value in layer.named_parameters() if value.requires_grad)
        return own(pair, mask)

    assert measure(planted(watched), step, bench)["status"] == "measured"
    assert seen == {name for name, _ in subject.layer_of(bench.model).named_parameters()}
    assert len(seen) == 2 * 7 + 4  # of two triangles and a transition


def test_a_block_in_place_of_the_layer_is_trained_in_its_own_parameters(bench, step):
    block = copy.deepcopy(subject.layer_of(bench.model))

    @contextmanager
    def install(bench):
        layer = subject.layer_of(bench.model)
        with _replaced([layer], lambda _: block.forward):
            yield Installed("a block", blocks={layer: dict(block.named_parameters())})

    row = measure(Way("block", install), step, bench)
    assert row["status"] == "measured" and 0 < row["error"] < 1e-5
    assert row["note"].startswith("a block; gradients of the parameters that its own")
    assert all(parameter.requires_grad for parameter in block.parameters())


def test_in_bfloat16_the_gradient_is_held_to_the_same_float64(kernel):
    """The stock layer is about as far from float64 as its 8 bits of mantissa make it."""
    bench = tiny_bench(kernel, torch.bfloat16)
    options = {"whole": True, "passes": "training", "device": "cpu", "dtypes": "bf16"}
    plan = plan_of(read(Options, small=True, **options))
    step = subject.make_step(LENGTH, bench, plan)
    assert (step.problem.x.dtype, step.wanted.dtype) == (torch.bfloat16, torch.float64)
    errors = [measure(BY_NAME[way], step, bench)["error"] for way in ("stock", "ours")]
    assert errors[1] < 1.5 * errors[0] < 2e-2
    assert subject.make_step(LENGTH, bench, replace(plan, check_up_to=LENGTH - 1)).wanted is None


def test_the_full_size_layer_has_the_widths_of_the_default_architecture(monkeypatch):
    from transformers import EsmFold2Config

    monkeypatch.undo()
    config, full = subject.layer_config(), EsmFold2Config()
    for name in ("pairwise_hidden_size", "pair_transition_intermediate_size", "chunk_size"):
        assert getattr(config, name) == getattr(full, name)
    with torch.device("meta"):
        layer = subject.layer_of(model.esmfold2_model_class()(config))
    width = full.pairwise_hidden_size
    assert all(getattr(layer, name).dim == width for name in TRIANGLES)
    transition = layer.pair_transition
    assert transition.mlp.down_proj.weight.shape == (width, full.pair_transition_intermediate_size)
    assert transition.chunk_size == full.chunk_size
