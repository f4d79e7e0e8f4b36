"""What binds a fold beside its pair layers: diffusion steps, the confidence head, the MSA.

    python benchmarks/fold_profile.py --device cuda --out results.json

Random weights, `patch` with its defaults, no loops. Three tables for each length:

- parts: a call of a module, milliseconds between marks on the device, and the peak of memory above
  the level at its start, for all samples and for one. A pair tensor is [L, L, C] in the dtype.
- steps: a call within the sampler by itself. Host: until the call returns, with an idle device;
  wall: until the device is done; kernels and their busy time, from torch.profiler.
- sampling: all steps of a fold, as the model runs them and with the denoiser as a CUDA graph.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from esmfold2_trimul_tools.bench.report import origin
from esmfold2_trimul_tools.bench.rivals import Sources
from esmfold2_trimul_tools.bench.whole.parts import Marks
from esmfold2_trimul_tools.documents import write_document
from esmfold2_trimul_tools.environment import ScriptSettings, describe_environment
from esmfold2_trimul_tools.folding.complexes import features_of
from esmfold2_trimul_tools.folding.denoiser import graphed_denoiser
from esmfold2_trimul_tools.folding.full_size import full_size_model
from esmfold2_trimul_tools.folding.model import random_model, resolve_device, resolve_dtype
from esmfold2_trimul_tools.folding.sequences import Record
from esmfold2_trimul_tools.repository import find_root, load_kernel
from torch import nn
from transformers.models.esmfold2 import generation_esmfold2 as sampler

RUNS = 5
TOP = 8  # kernels that are named


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fold(model: Any, length: int, samples: int, steps: int) -> Any:
    torch.manual_seed(0)
    record = Record("profiled", ("ACDEFGHIKLMNPQRSTVWY" * (length // 20 + 1))[:length])
    return model.fold(
        **features_of(record, model.device),
        num_loops=0,
        num_diffusion_samples=samples,
        num_sampling_steps=steps,
    )


def parts_of(model: Any) -> dict[str, nn.Module]:
    """The modules that are timed, of the MSA encoder's layers the first; none that `patch` swaps.

    A swapped module with hooks would run its own forward.
    """
    layer, confidence = model.msa_encoder.layers[0], model.confidence_head
    return {
        "MSA encoder": model.msa_encoder,
        "outer product mean, a layer": layer.outer_product_mean,
        "pair-weighted averaging, a layer": layer.msa_pair_weighted_averaging,
        "confidence head": confidence,
        "confidence: input embedder": confidence.input_embedder,
        "confidence: pair layers": confidence.folding_trunk,
        "confidence: row pooling": confidence.row_attention_pooling,
        "confidence: PAE logits": confidence.pae_head,
        "confidence: PDE logits": confidence.pde_head,
    }


class Watch:
    """Milliseconds, and bytes above the start, of each part's calls within the block."""

    def __init__(self, model: Any) -> None:
        self._device, self._marks = model.device, Marks(model.device)
        self._on_gpu = model.device.type == "cuda"
        self._open: list[list] = []
        self._calls: list[tuple[str, Any, Any, int | None]] = []
        self._handles = []
        for name, module in parts_of(model).items():
            self._handles += [
                module.register_forward_pre_hook(self._begin),
                module.register_forward_hook(lambda *_, name=name: self._end(name)),
            ]

    def _peak(self) -> None:
        """A peak within a part is one of those around it too."""
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated(self._device)
            for one in self._open:
                one[2] = max(one[2], peak)
            torch.cuda.reset_peak_memory_stats(self._device)

    def _begin(self, *_: Any) -> None:
        self._peak()
        level = torch.cuda.memory_allocated(self._device) if self._on_gpu else 0
        self._open.append([self._marks.now(), level, level])

    def _end(self, name: str) -> None:
        self._peak()
        start, level, peak = self._open.pop()
        added = peak - level if self._on_gpu else None
        self._calls.append((name, start, self._marks.now(), added))

    def found(self) -> dict[str, dict[str, Any]]:
        for handle in self._handles:
            handle.remove()
        synchronize(self._device)
        return {
            name: {"ms": 1e3 * self._marks.seconds(start, end), "added_bytes": added}
            for name, start, end, added in self._calls
        }


@contextmanager
def kept(model: Any) -> Iterator[dict[str, Any]]:
    """The arguments of the sampler and of a step's calls in a fold within the block."""
    found: dict[str, Any] = {}

    def keeping(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[name] = (function, args, kwargs)
            return function(*args, **kwargs)

        return call

    sample, denoise = model._sample_structure, model.structure_head.forward
    model._sample_structure = keeping("sampling", sample)
    model.structure_head.forward = keeping("denoiser", denoise)
    names = {"_center_random_augmentation": "augmentation", "_weighted_rigid_align": "alignment"}
    with mock.patch.multiple(
        sampler, **{own: keeping(name, getattr(sampler, own)) for own, name in names.items()}
    ):
        try:
            yield found
        finally:
            del model._sample_structure, model.structure_head.forward


def timed_call(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Medians of a call by itself: milliseconds of the host, and until the device is done."""
    call()
    host, wall = [], []
    for _ in range(RUNS):
        synchronize(device)
        start = time.perf_counter()
        call()
        host.append(time.perf_counter() - start)
        synchronize(device)
        wall.append(time.perf_counter() - start)
    row = {"host_ms": 1e3 * statistics.median(host), "wall_ms": 1e3 * statistics.median(wall)}
    return row | kernels_of(call, device)


def kernels_of(call: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """What the call runs on a GPU: how many kernels and copies, busy time, those that take most."""
    if device.type != "cuda":
        return {"kernels": None, "busy_ms": None, "most": []}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        call()
        synchronize(device)
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.time_range.elapsed_us()
            counts[event.name] += 1
    return {
        "kernels": counts.total(),
        "busy_ms": times.total() / 1e3,
        "most": [
            {"kernel": name, "ms": us / 1e3, "launches": counts[name]}
            for name, us in times.most_common(TOP)
        ],
    }


def steps_of(calls: dict[str, Any], model: Any) -> dict[str, dict[str, Any]]:
    device, rows = model.device, {}
    for name in ("augmentation", "denoiser", "alignment"):
        function, args, kwargs = calls[name]
        rows[name] = timed_call(lambda f=function, a=args, k=kwargs: f(*a, **k), device)
    _, args, kwargs = calls["denoiser"]
    with graphed_denoiser(model, note_on_stderr) as denoiser:
        model.structure_head(*args, **kwargs)
        synchronize(device)
        start = time.perf_counter()
        model.structure_head(*args, **kwargs)
        synchronize(device)
        captured = time.perf_counter() - start
        rows["denoiser, a CUDA graph"] = timed_call(
            lambda: model.structure_head(*args, **kwargs), device
        )
    rows["denoiser, a CUDA graph"] |= {
        "capture_ms": 1e3 * captured if denoiser.captures else None,
        "replays": denoiser.replays,
    }
    return rows


def note_on_stderr(words: str) -> None:
    print(words, file=sys.stderr)


def sampling_of(calls: dict[str, Any], model: Any, steps: int | None) -> dict[str, Any]:
    """Seconds of the whole sampler, its conditioning included."""
    sample, args, kwargs = calls["sampling"]
    kwargs = {**kwargs, "num_sampling_steps": steps}

    def seconds() -> float:
        synchronize(model.device)
        start = time.perf_counter()
        sample(*args, **kwargs)
        synchronize(model.device)
        return time.perf_counter() - start

    row = {"seconds": seconds()}
    with graphed_denoiser(model, note_on_stderr) as denoiser:
        row |= {"graph_seconds": seconds(), "replays": denoiser.replays}
    return row


def profile(model: Any, length: int, samples: int, steps: int | None) -> dict[str, Any]:
    config = model.config
    pair = length**2 * config.pairwise_hidden_size * model.dtype.itemsize
    parts: dict[str, dict[str, Any]] = {}
    for count in (samples, 1):
        fold(model, length, count, 2)
        watch = Watch(model)
        fold(model, length, count, 2)
        for name, row in watch.found().items():
            row["pairs"] = None if row["added_bytes"] is None else row["added_bytes"] / pair
            parts.setdefault(name, {})[str(count)] = row
        gc.collect()
    with kept(model) as calls:
        fold(model, length, samples, 2)
    return {
        "L": length,
        "samples": samples,
        "pair_bytes": pair,
        "parts": parts,
        "steps": steps_of(calls, model),
        "sampling": sampling_of(calls, model, steps),
    }


def show(row: dict[str, Any]) -> None:
    samples = str(row["samples"])
    print(f"\nL = {row['L']}, {samples} samples\n")
    print(f"| part | ms, {samples} samples | ms, 1 | pair tensors, {samples} | pair tensors, 1 |")
    print("|---|---|---|---|---|")
    for name, found in row["parts"].items():
        cells = [number(found[count][key]) for key in ("ms", "pairs") for count in (samples, "1")]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| a step's call | host, ms | wall, ms | busy, ms | kernels | us a kernel |")
    print("|---|---|---|---|---|---|")
    for name, found in row["steps"].items():
        mean = found["kernels"] and 1e3 * found["busy_ms"] / found["kernels"]
        cells = [found["host_ms"], found["wall_ms"], found["busy_ms"], found["kernels"], mean]
        print(f"| {name} | {' | '.join(map(number, cells))} |")
    sampling, graph = row["sampling"], row["steps"]["denoiser, a CUDA graph"]
    print(f"\nAll steps: {sampling['seconds']:.3g} s; with a CUDA graph "
          f"{sampling['graph_seconds']:.3g} s, {sampling['replays']} steps replayed; a capture "
          f"takes {number(graph['capture_ms'])} ms", flush=True)  # fmt: skip


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--samples", type=int, help="default: the model's own")
    parser.add_argument("--steps", type=int, help="of the whole sampler; default: the model's own")
    parser.add_argument("--dtype")
    parser.add_argument("--small", action="store_true", help="the small architecture, for trials")
    parser.add_argument("--commit", help="what to record; git's answer unless given")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = resolve_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dtype = resolve_dtype(options.dtype, device)
    settings = ScriptSettings(device, find_root(), (str(dtype).removeprefix("torch."),))
    sources = Sources(load_kernel(settings.root))
    command = shlex.join(["python", "benchmarks/fold_profile.py", *sys.argv[1:]])
    environment = describe_environment(settings, sources, command, options.commit)
    print(origin(environment), flush=True)
    model = (random_model if options.small else full_size_model)(device, dtype)
    samples = options.samples or model.config.structure_head.num_diffusion_samples
    results = {"environment": environment, "rows": []}
    with sources.kernel.patch(model) as report:
        results["patch"] = str(report)
        for length in options.lengths:
            results["rows"].append(profile(model, length, samples, options.steps))
            show(results["rows"][-1])
            if options.out is not None:
                write_document(results, options.out)


if __name__ == "__main__":
    main()
