"""Measures whole folds: every way at every length, in one model that is made once.

With --passes training, `training` measures steps of one layer instead.

A row costs a fold of no loops in which each stack runs one layer, which compiles the kernels and
tells whether the memory is enough; a fold of no loops with hooks, for the time of each part; and
one or two timed folds without hooks. Every loop does the same work, so a fold that would take too
long is timed with fewer loops, and a loop's time is added for each that is missing.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...documents import write_document
from ...environment import check_same, describe_environment
from ...errors import UserError
from ...folding.fold import is_out_of_memory
from ...folding.full_size import full_size_model, weight_bytes
from ...folding.memory import PeakMemory, measure_peak_memory
from ...folding.model import random_model
from ...folding.options import Settings as FoldSettings
from ...repository import load_kernel
from ..rivals import Sources, esm_version, first_line
from ..run import DeviceLostError
from .findings import NOT_FINITE, findings, installing
from .longest import longest
from .parts import measured
from .results import FOLDS, LONGEST, ROW, STEPS, Results, Row, read_results
from .settings import TWICE_BELOW, Plan
from .training import described_layer, layer_config, step_jobs
from .ways import Bench, Installed, Way

if TYPE_CHECKING:
    from transformers import EsmFold2Model

Progress = Callable[[str, int, int], None]

_SAME_WHEN_RESUMED = (
    "device", "threads", "isa", "cpu_capability", "torch", "triton", "driver", "rivals", "kernel",
    "seed", "esm",
)  # fmt: skip
_TRUNK_SECONDS, _TRUNK_RUNS = 1.0, 3
_STEP = 64  # residues
_SHORT = 256


def run(
    plan: Plan,
    command: str,
    out: Path | None = None,
    resumed: bool = False,
    commit: str | None = None,
    progress: Progress | None = None,
) -> Results:
    """Start or resume, measure, and keep the results in the file `out`, if any.

    Args:
        command, commit: as for `environment.describe_environment`.
        progress: called with (what, done, total) before each row and at the end.

    Raises:
        UserError: `out` can't be read or written, or its results can't be added to, or are of the
            other kind; the model does not fit.
        DeviceLostError: a way broke the device for all later work.
    """
    if plan.device.type == "cuda":
        torch.cuda.set_device(plan.device)
    sources = Sources(load_kernel(plan.root), plan.published)
    environment = describe_environment(plan, sources, command, commit)
    environment["esm"] = esm_version(plan.esm)
    # Refused before a model is made.
    before = read_results(out) if resumed and out.exists() else None
    if before is not None:
        if before.keys() != (STEPS if plan.training else FOLDS):
            kind = "training steps" if plan.training else "whole folds"
            raise UserError(f"{out}: holds no results of {kind}")
        check_same(before["environment"], environment, _SAME_WHEN_RESUMED, out)
    model = _model(plan)
    model.requires_grad_(False)
    plan = replace(plan, fold=plan.fold.resolved(model.config))
    results: Results = {"environment": environment}
    if plan.training:
        results |= {"layer": described_layer(model, plan), "steps": []}
    else:
        results |= {"model": _described(model, plan), "rows": [], "longest": []}
    if before is not None:
        check_same(before, results, ("layer" if plan.training else "model",), out)
        results = before | {
            name: [row for row in rows if row["status"] != "absent"]
            for name, rows in before.items()
            if isinstance(rows, list)
        }
        results["environment"]["commands"].append(command)

    def save() -> None:
        if out is not None:
            write_document(results, out)

    save()
    bench = Bench(model, plan.device, plan.dtype, sources, plan.esm)
    jobs = list(_jobs(plan, bench, results))
    for number, (label, rows, make) in enumerate(jobs):
        if progress is not None:
            progress(label, number, len(jobs))
        rows.append(make())
        save()
        try:
            _release(plan.device)
        except Exception as error:
            raise DeviceLostError(f"{label} broke the device: {first_line(error)}") from None
    if progress is not None:
        progress("done", len(jobs), len(jobs))
    return results


def _jobs(
    plan: Plan, bench: Bench, results: Results
) -> Iterator[tuple[str, list[Row], Callable[[], Row]]]:
    """What is missing in the results: a label, the rows to add to, and what makes the row."""
    if plan.training:
        yield from step_jobs(plan, bench, results)
        return
    if plan.longest is not None:
        done = {(row["way"], row["gib"]) for row in results["longest"]}
        for way in plan.ways:
            if (way.name, plan.longest) not in done:
                label = f"longest in {plan.longest:g} GiB, {way.name}"
                yield label, results["longest"], lambda way=way: find_longest(way, bench, plan)
        return
    done = {(row["way"], row["L"]) for row in results["rows"]}
    for length in plan.lengths:
        for way in plan.ways:
            if (way.name, length) not in done:
                yield (
                    f"L = {length}, {way.name}",
                    results["rows"],
                    lambda way=way, length=length: measure(way, length, bench, plan),
                )


def _model(plan: Plan) -> EsmFold2Model:
    if plan.small:
        return random_model(plan.device, plan.dtype, plan.seed)
    if plan.training:
        return random_model(plan.device, plan.dtype, plan.seed, layer_config())
    return full_size_model(plan.device, plan.dtype, plan.seed)


def _described(model: EsmFold2Model, plan: Plan) -> dict[str, Any]:
    """The results' entry "model"."""
    schedule, _ = model._build_noise_schedule(plan.fold.steps, torch.device("cpu"))
    stacks = (model.folding_trunk, model.lm_encoder, model.msa_encoder)
    looped = sum(len(stack.layers) for stack in stacks if stack is not None)
    return {
        "architecture": "small" if plan.small else "transformers' default EsmFold2Config",
        "dtype": plan.dtypes[0],
        "parameters": sum(one.numel() for one in model.parameters()),
        "bytes": weight_bytes(model),
        "loops": plan.fold.loops,
        "samples": plan.fold.samples,
        "steps": plan.fold.steps,
        "denoiser_calls": len(schedule) - 1,
        "pair_layers_a_loop": looped,
        "pair_width": model.config.pairwise_hidden_size,
    }


def measure(way: Way, length: int, bench: Bench, plan: Plan) -> Row:
    """The row of one way at one length."""
    row = dict.fromkeys(ROW) | {"L": length, "way": way.name, "status": "measured"}
    row["loops"] = plan.fold.loops
    with findings(row), installing(way, bench) as installed:
        row["note"] = installed.note
        with findings(row):
            _measure_fold(row, installed, length, bench, plan)
        _release(bench.device)
        if row["status"] in ("measured", "does not fit"):
            _measure_trunk(row, length, bench, plan.fold_seconds)
    return row


def _measure_fold(row: Row, installed: Installed, length: int, bench: Bench, plan: Plan) -> None:
    """Fill in what a row has of the fold."""
    features = _features(length, bench, plan.seed)
    with _one_layer_a_stack(bench.model):
        _fold(bench, features, plan.fold, loops=0, steps=1)
    with measured(bench, installed) as spans:
        output = _fold(bench, features, plan.fold, loops=0)
    _synchronize(bench.device)  # a span's end must have been reached before it is read
    numbers = (output.plddt, output.ptm, output.sample_atom_coords)
    if not all(bool(one.isfinite().all()) for one in numbers):
        row |= {"status": "wrong", "note": NOT_FINITE}
        return
    row["mean_plddt"] = float(output.plddt.float().mean())
    del output, numbers
    loops = plan.fold.loops
    row["parts"] = spans.by_part(loops)
    a_loop = spans.loop()
    # At least one, where the model has any: the fold with hooks had none.
    missing = (sum(row["parts"].values()) - plan.fold_seconds) / a_loop
    affordable = loops - math.ceil(missing)
    timed = max(min(1, loops), min(loops, affordable))
    runs = []
    while not runs or (len(runs) < 2 and timed == loops and runs[0][0] < TWICE_BELOW):
        runs.append(_timed(bench.device, lambda: _fold(bench, features, plan.fold, timed)))
    seconds = [one for one, _ in runs]
    row |= {
        "loops_timed": timed,
        "seconds_timed": seconds,
        "seconds": statistics.median(seconds) + (loops - timed) * a_loop,
        "peak_bytes": max(memory.peak_bytes for _, memory in runs),
    }


@torch.no_grad()
def _measure_trunk(row: Row, length: int, bench: Bench, most_seconds: float) -> None:
    """Fill in what a row has of one pass of the folding trunk's layers."""
    stack, config = bench.model.folding_trunk, bench.model.config
    shape = (1, length, length)
    mask = torch.ones(shape, device=bench.device)

    def pass_of(layers: int) -> tuple[float, PeakMemory]:
        pair = torch.randn(
            *shape, config.pairwise_hidden_size, device=bench.device, dtype=bench.dtype
        )
        with _layers_of(stack, layers):
            return _timed(bench.device, lambda: stack(pair, pair_attention_mask=mask))

    pass_of(1)  # compiled already; this fills the allocator's cache
    one, _ = pass_of(1)
    total = len(stack.layers)
    layers = max(1, min(total, int(most_seconds / one)))
    runs = [pass_of(layers)]
    while len(runs) < _TRUNK_RUNS and sum(seconds for seconds, _ in runs) < _TRUNK_SECONDS:
        runs.append(pass_of(layers))
    pair_bytes = length**2 * config.pairwise_hidden_size * bench.dtype.itemsize
    row |= {
        "trunk_seconds": statistics.median(seconds for seconds, _ in runs) * total / layers,
        "trunk_layers_timed": layers,
        "trunk_peak_bytes": max(memory.peak_bytes for _, memory in runs),
        "trunk_pairs": max(memory.added_bytes for _, memory in runs) / pair_bytes,
    }


def find_longest(way: Way, bench: Bench, plan: Plan) -> Row:
    """The longest fold that fits into plan.longest GiB, on a device that has more.

    A fold of no loops and one step decides. Of the layers before the heads, the tries run one a
    stack; the length that is found is then folded with all layers.
    """
    device = bench.device
    row = dict.fromkeys(LONGEST) | {
        "way": way.name, "status": "measured", "gib": plan.longest, "step": _STEP,
    }  # fmt: skip
    limit = plan.longest * 2**30

    def fold(length: int, loops: int = 0) -> PeakMemory:
        features = _features(length, bench, plan.seed)
        call = lambda: _fold(bench, features, plan.fold, loops, steps=1)  # noqa: E731
        return _timed(device, call)[1]

    def fits(length: int, whole: bool = False) -> bool:
        try:
            if whole:
                fold(length)
            else:
                with _one_layer_a_stack(bench.model):
                    fold(length)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            _release(device)
        return True

    with findings(row), installing(way, bench) as installed:
        row["note"] = installed.note
        row["peak_by_loops"] = {str(loops): fold(_SHORT, loops).peak_bytes for loops in (0, 2)}
        weights = weight_bytes(bench.model)
        per_pair = (row["peak_by_loops"]["0"] - weights) / _SHORT**2
        guess = int(((limit - weights) / per_pair) ** 0.5)
        with _limited(device, limit):
            found, tried = longest(fits, guess, _STEP)
            while found:
                tried[found] = fits(found, whole=True)
                if tried[found]:
                    break
                found -= _STEP
            row |= {"L": found, "tried": {str(length): tried[length] for length in sorted(tried)}}
            if found:
                features = _features(found, bench, plan.seed)
                with measured(bench, installed) as spans:
                    _fold(bench, features, plan.fold, loops=0, steps=1)
                row["peak_bytes"], row["bound_by"] = spans.peak()
    return row


def _features(length: int, bench: Bench, seed: int) -> dict[str, Any]:
    """A random protein of this length."""
    from transformers.models.esmfold2.protein_utils import prepare_protein_features

    sequence = "".join(random.Random(seed).choices("ACDEFGHIKLMNPQRSTVWY", k=length))
    return prepare_protein_features(sequence, device=bench.device)


def _fold(
    bench: Bench,
    features: dict[str, Any],
    settings: FoldSettings,
    loops: int,
    steps: int | None = None,
) -> Any:
    """A fold from the seed: every way draws the same initial pair state, dropout and noise."""
    torch.manual_seed(settings.seed)
    return bench.model.fold(
        **features,
        num_loops=loops,
        num_diffusion_samples=settings.samples,
        num_sampling_steps=settings.steps if steps is None else steps,
    )


def _timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, PeakMemory]:
    """Seconds of the call, its work on the device included, and its peak of memory."""
    with measure_peak_memory(device) as memory:
        start = time.perf_counter()
        call()
        _synchronize(device)
        seconds = time.perf_counter() - start
    return seconds, memory


@contextmanager
def _one_layer_a_stack(model: EsmFold2Model) -> Iterator[None]:
    """Only the first layer of the stacks before the heads: the peak is theirs or the heads'."""
    with (
        _layers_of(model.folding_trunk, 1),
        _layers_of(model.lm_encoder, 1),
        _layers_of(model.parcae.output_stack, 1),
    ):
        yield


@contextmanager
def _layers_of(stack: torch.nn.Module, number: int) -> Iterator[None]:
    layers = stack.layers
    stack.layers = layers[:number]
    try:
        yield
    finally:
        stack.layers = layers


@contextmanager
def _limited(device: torch.device, limit: float) -> Iterator[None]:
    """torch's allocator can have no more than `limit` bytes of the device."""
    total = torch.cuda.get_device_properties(device).total_memory
    _release(device)
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    """Free what the last fold held, so that the next one can have it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
