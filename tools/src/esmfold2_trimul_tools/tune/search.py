"""Searches launch settings on a GPU and writes them as the kernel package reads them.

Every candidate of a stage is compiled (in processes of its own, several at a time), its result is
held to float32 PyTorch, and it is timed at the lengths of each class; the fastest of a class is
kept. Needs torch, Triton and one NVIDIA GPU; no other package.

    esmfold2-trimul tune --out sm_90.json --results tune.json

A table written to torch-ext/esmfold2_trimul_kernel/configs is taken by devices of that target, or,
where it is named after one device (NVIDIA_H200.json), by that device alone.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from ..documents import write_document
from ..environment import checkout_commit, driver_version
from ..errors import UserError
from ..repository import find_root, load_kernel, submodule

STAGES = ("fused_dual_gemm", "trimul_einsum", "fused_ln_residual")
WIDTHS = (128, 256)
# Upper bound of a class of lengths, and the lengths that stand for it; ragged ones among them.
CLASSES = ((96, (64, 76)), (160, (128,)), (320, (256, 286)), (None, (384, 511, 512, 769, 1024)))
# Relative L2 error of one stage in 16 bits; see docs/numerics.md.
LARGEST_ERROR = 3.5e-3
_SHARED_OF_TWO_BLOCKS = 113 * 1024  # bytes of shared memory if a multiprocessor is to hold two
_FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU there is
_REPEATS = 11


@dataclass(frozen=True)
class Job:
    """One setting of one stage for one width; `config` is a LaunchConfig's fields, sorted."""

    stage: str
    width: int
    config: tuple[tuple[str, object], ...]

    def launch_config(self, kernel: ModuleType):
        return submodule(kernel, "triton_parts.settings").LaunchConfig(**dict(self.config))


def candidates(stage: str, width: int, descriptors: bool = True) -> list[Job]:
    """The settings to try for 16-bit tensors of C = D = width.

    Pruned by what was found on sm_90 (docs/performance.md): operands held in registers, at least
    two blocks a multiprocessor in stages 1 and 3, no more registers than that allows. Without
    `descriptors`, for GPUs that have none in hardware, the same shapes through pointers.
    """
    grid = {
        "fused_dual_gemm": _dual_gemm_settings,
        "trimul_einsum": _einsum_settings,
        "fused_ln_residual": _ln_residual_settings,
    }[stage]
    settings = list(grid(width))
    if not descriptors:
        settings = [config | {"descriptors": False} for config in settings]
    jobs = [Job(stage, width, tuple(sorted(config.items()))) for config in settings]
    return list(dict.fromkeys(jobs))


def _dual_gemm_settings(width: int) -> Iterator[dict]:
    block_k = 1 << (width - 1).bit_length()
    for (block_m, warps), block_n, stages, maxnreg, split, descriptors in itertools.product(
        ((64, 4), (128, 8)), (16, 32, 64), (3, 4), (None, 128, 168), (1, 2, 4, 8), (True, False)
    ):
        shared = 2 * block_n * block_k * 2 * stages + block_n * block_m * 2
        # Splitting and pointers are for short sequences.
        if (
            shared > _SHARED_OF_TWO_BLOCKS
            or (maxnreg == 168 and warps == 8)
            or (split > 1 and maxnreg)
            or (not descriptors and (split == 1 or stages > 3 or warps == 8))
            or (block_m == 128 and maxnreg is None)
        ):
            continue
        yield {
            "block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps,
            "num_stages": stages, "descriptors": descriptors, "held": True, "maxnreg": maxnreg,
            "split": split,
        }  # fmt: skip


def _einsum_settings(width: int) -> Iterator[dict]:
    for block_m, block_n, block_k, warps, stages, descriptors, persistent in (
        (128, 256, 64, 8, 4, True, 1), (128, 256, 64, 8, 3, True, 1), (256, 128, 64, 8, 4, True, 1),
        (128, 128, 64, 8, 4, True, 1), (128, 128, 64, 4, 3, True, 2), (128, 128, 64, 4, 3, True, 0),
        (128, 64, 64, 4, 4, True, 2), (64, 128, 64, 4, 4, True, 2), (64, 64, 64, 4, 4, True, 3),
        (64, 64, 64, 4, 3, True, 0), (64, 64, 64, 4, 3, False, 0), (64, 64, 32, 4, 4, False, 0),
        (64, 128, 64, 4, 3, False, 0), (128, 128, 64, 8, 3, False, 0),
        (64, 256, 64, 4, 3, True, 1), (64, 256, 64, 4, 2, True, 2), (128, 128, 128, 8, 2, True, 1),
        (128, 256, 128, 8, 2, True, 1), (128, 128, 64, 4, 2, True, 2),
    ):  # fmt: skip
        yield {
            "block_m": block_m, "block_n": block_n, "block_k": block_k, "num_warps": warps,
            "num_stages": stages, "descriptors": descriptors, "persistent": persistent,
        }  # fmt: skip


def _ln_residual_settings(width: int) -> Iterator[dict]:
    for split, block_k, stages, maxnreg, descriptors in itertools.product(
        (1, 2, 4), (32, 64), (3, 4), (None, 128, 168), (True, False)
    ):
        block_n = max(16, (1 << (width - 1).bit_length()) // split)
        registers = block_n // 2 + block_n // 4  # the accumulators and the packed gate
        if (maxnreg is not None and registers > maxnreg - 32) or (
            not descriptors and (stages > 3 or maxnreg)
        ):
            continue
        yield {
            "block_m": 64, "block_n": block_n, "block_k": block_k, "num_warps": 4,
            "num_stages": stages, "descriptors": descriptors, "held": True, "maxnreg": maxnreg,
            "split": split,
        }  # fmt: skip


class StageInputs:
    """Random operands of all three stages for one width and length, and the stages' results."""

    def __init__(self, kernel: ModuleType, width: int, length: int, device: str = "cuda"):
        self.kernel, self.length = kernel, length
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device) * scale

        norms = [1 + randn(width, scale=0.2), randn(width, scale=0.2)] * 2
        projections = [randn(4 * width, width, scale=width**-0.5).bfloat16()]
        projections += [randn(width, width, scale=width**-0.5).bfloat16() for _ in range(2)]
        bundle, emit, gate = projections
        self.x = (randn(1, length, length, width) + 0.3).bfloat16()
        real = torch.arange(length, device=device) < length - 3
        self.mask = (real[:, None] & real[None, :]).unsqueeze(0)
        weights = submodule(kernel, "_call").Weights
        self.weights = weights(
            *norms[:2], bundle[: 2 * width], None, bundle[2 * width :], None,
            *norms[2:], emit, None, gate, None,
        )  # fmt: skip
        self._make_references(bundle, emit, gate, norms)

    def _make_references(self, bundle, emit, gate, norms) -> None:
        """Each stage's result in float32 from the operands that the stage is given."""
        x, length = self.x, self.length
        width = x.shape[-1:]
        pitch = submodule(self.kernel, "triton_parts.tiles").padded_pitch(length)
        rows = x.float()
        z = torch.nn.functional.layer_norm(rows, width, *norms[:2])
        value, gated = (z @ bundle.float().mT).chunk(2, dim=-1)
        planes = (value * gated.sigmoid() * self.mask.unsqueeze(-1)).movedim(-1, 1)
        del value, gated
        planes = planes.bfloat16().contiguous()
        self.planes = torch.nn.functional.pad(planes, (0, pitch - length))
        left, right = self.planes[..., :length].chunk(2, dim=1)
        product = left @ right.mT
        self.product = torch.nn.functional.pad(product, (0, pitch - length))
        moments = [rows.mean(-1), (rows.var(-1, unbiased=False) + 1e-5).rsqrt()]
        self.moments = torch.nn.functional.pad(torch.stack(moments, dim=1), (0, pitch - length))
        t = torch.nn.functional.layer_norm(product.float().movedim(1, -1), width, *norms[2:])
        out = (t @ emit.float().mT) * (z @ gate.float().mT).sigmoid()
        self.wanted = {
            "fused_dual_gemm": self.planes,
            "trimul_einsum": self.product,
            "fused_ln_residual": out.bfloat16(),
        }

    def run(self, job: Job) -> torch.Tensor:
        config = job.launch_config(self.kernel)
        if job.stage == "fused_dual_gemm":
            stage = submodule(self.kernel, "fused_dual_gemm").fused_dual_gemm_fwd
            planes = torch.empty_like(self.planes)
            stage(
                self.x, "outgoing", self.mask, self.weights, 1e-5, "fp32", config,
                planes=planes.chunk(2, dim=1),
            )  # fmt: skip
            return planes
        if job.stage == "trimul_einsum":
            stage = submodule(self.kernel, "trimul_einsum_triton").trimul_einsum_fwd
            return stage(*self.planes.chunk(2, dim=1), "fp32", config)
        stage = submodule(self.kernel, "fused_ln_residual").fused_ln_residual_fwd
        return stage(
            self.product, self.x, self.moments, None, None, self.weights, 1e-5, "fp32", config
        )

    def error(self, job: Job) -> float:
        """Relative L2 error of the job's result, NaN where an element was not written."""
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            got = self.run(job)
        finally:
            torch.use_deterministic_algorithms(False)
        wanted = self.wanted[job.stage]
        if job.stage == "trimul_einsum":  # the pads have no meaning
            got, wanted = got[..., : self.length], wanted[..., : self.length]
        return float((got.float() - wanted.float()).norm() / wanted.float().norm())

    def milliseconds(self, job: Job, flush: torch.Tensor) -> float:
        """Median device time of a captured launch, L2 flushed before each."""
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.run(job)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run(job)
        times = []
        for _ in range(_REPEATS):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in times)


def _compile(root: str, job: Job) -> tuple[Job, str | None]:
    """Compiles a job into Triton's cache on disk, by running it once; or the reason why not."""
    # ptxas' complaints about settings that don't fit are no news here.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        StageInputs(load_kernel(Path(root)), job.width, 64).run(job)
        torch.cuda.synchronize()
    except Exception as error:
        return job, f"{type(error).__name__}: {str(error)[:200]}"
    return job, None


def tune(
    root: Path,
    stages: tuple[str, ...] = STAGES,
    widths: tuple[int, ...] = WIDTHS,
    classes: tuple[tuple[int | None, tuple[int, ...]], ...] = CLASSES,
    processes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    jobs: list[Job] | None = None,
    command: str = "",
    commit: str | None = None,
) -> dict:
    """Times the candidates on the first CUDA device.

    Args:
        root: the kernel repository.
        stages, widths: what to tune.
        classes: (largest length, lengths to time) pairs, in order; the last has no largest length.
        processes: compilations at a time; by default as many as there are cores.
        progress: called with (what, done, total).
        jobs: candidates to use in place of `candidates`.
        command, commit: to be recorded; without `commit`, git is asked.

    Returns:
        {"environment": ..., "rows": [{stage, width, length, config, milliseconds, error}, ...],
        "failed": [{stage, width, config, why}, ...]}; a candidate that could not be compiled or
        was wrong is in "failed", with no time.

    Raises:
        UserError: there is no NVIDIA GPU.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise UserError("tune needs an NVIDIA GPU: torch.cuda finds none")
    if jobs is None:
        descriptors = torch.cuda.get_device_capability(0) >= (9, 0)
        jobs = [
            job
            for stage in stages
            for width in widths
            for job in candidates(stage, width, descriptors)
        ]
    lengths = sorted({length for _, some in classes for length in some})
    steps = len(jobs) + len(widths) * len(lengths)
    done = 0

    def say(what: str) -> None:
        if progress is not None:
            progress(what, done, steps)

    failed, good = [], []
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes or os.cpu_count()) as pool:
        calls = [pool.apply_async(_compile, (str(root), job)) for job in jobs]
        for call in calls:
            job, why = call.get()
            done += 1
            say(f"compiling {job.stage}")
            if why is None:
                good.append(job)
            else:
                failed.append({**_named(job), "why": why})
    kernel = load_kernel(root)
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    rows = []
    wrong: set[Job] = set()
    for width in widths:
        for length in lengths:
            say(f"timing C = {width}, L = {length}")
            inputs = StageInputs(kernel, width, length)
            for job in good:
                if job.width != width or job in wrong:
                    continue
                error = inputs.error(job)
                if not error <= LARGEST_ERROR:
                    wrong.add(job)
                    failed.append({**_named(job), "why": f"error {error:.1e} at L = {length}"})
                    continue
                measured = {"milliseconds": inputs.milliseconds(job, flush), "error": error}
                rows.append({**_named(job), "length": length, **measured})
            del inputs
            torch.cuda.empty_cache()
            done += 1
    say("done")
    rows = [row for row in rows if not any(_is(row, job) for job in wrong)]
    where = environment(command, commit or checkout_commit(root))
    return {"environment": where, "rows": rows, "failed": failed}


def _named(job: Job) -> dict:
    return {"stage": job.stage, "width": job.width, "config": dict(job.config)}


def _is(row: dict, job: Job) -> bool:
    return all(row[name] == value for name, value in _named(job).items())


def environment(command: str, commit: str | None) -> dict:
    """Where and with what the times were taken."""
    import triton

    return {
        "device": torch.cuda.get_device_name(0),
        "driver": driver_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def fastest(
    rows: list[dict], stage: str, width: int, lengths: tuple[int, ...]
) -> tuple[dict, float] | None:
    """The setting with the least geometric mean of its times at `lengths`, and that mean in ms."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["stage"] == stage and row["width"] == width and row["length"] in lengths:
            key = json.dumps(row["config"], sort_keys=True)
            times.setdefault(key, {})[row["length"]] = row["milliseconds"]
    means = {
        key: math.exp(statistics.fmean(map(math.log, some.values())))
        for key, some in times.items()
        if len(some) == len(lengths)
    }
    if not means:
        return None
    key = min(means, key=means.__getitem__)
    return json.loads(key), means[key]


def table(
    results: dict,
    base: dict,
    shipped: dict,
    classes: tuple[tuple[int | None, tuple[int, ...]], ...] = CLASSES,
) -> dict:
    """A settings table: `base` with the 16-bit settings that were fastest in `results`.

    Of two neighbouring classes of one width that have the same setting only the longer is written;
    the `shipped` settings for widths beyond those tuned stay, and so do those of the backward.
    """
    environment_ = results["environment"]
    tuned = {
        "note": (
            f"16-bit settings of the forward measured on one {environment_['device']} (torch "
            f"{environment_['torch']}, Triton {environment_['triton']}, {environment_['date']}) "
            "by `esmfold2-trimul tune`; see docs/performance.md."
        )
    }
    for stage in STAGES:
        widths = sorted({row["width"] for row in results["rows"] if row["stage"] == stage})
        entries = []
        for width in widths:
            of_width: list[tuple[int | None, dict]] = []
            for longest, lengths in classes:
                best = fastest(results["rows"], stage, width, lengths)
                if best is None:
                    continue
                setting = _shortest(best[0])
                if of_width and of_width[-1][1] == setting:
                    of_width.pop()
                of_width.append((longest, setting))
            for longest, setting in of_width:
                length = {} if longest is None else {"max_length": longest}
                entries.append({"max_width": width, **length, **setting})
        widest = max(widths, default=0)
        kept = [e for e in shipped[stage]["2"] if e.get("max_width", math.inf) > widest]
        tuned[stage] = {**base.get(stage, {}), "2": entries + kept}
    return base | tuned


def _shortest(config: dict) -> dict:
    """The fields that differ from a LaunchConfig's defaults."""
    defaults = {
        "descriptors": False, "held": False, "maxnreg": None,
        "persistent": 0, "split": 1,
    }  # fmt: skip
    return {k: v for k, v in config.items() if k not in defaults or v != defaults[k]}


def write(root: Path, results: dict, out: Path | None, everything: Path | None) -> dict:
    """Writes the table of `results` over the package's own for this target; returns the table."""
    kernel = load_kernel(root)
    target = submodule(kernel, "triton_parts.device").device_target(torch.device("cuda", 0)).target
    configs = root / "torch-ext" / "esmfold2_trimul_kernel" / "triton_parts" / "configs"
    path = configs / f"{target}.json"
    base = json.loads(path.read_text()) if path.is_file() else {"like": "default"}
    settings = table(results, base, submodule(kernel, "triton_parts.settings").settings_of(target))
    for path, document in ((out, settings), (everything, timings(results))):
        if path is not None:
            write_document(document, path)
    return settings


def timings(results: dict) -> dict:
    """The results with a row for each candidate, its times and errors by length."""
    candidates_: dict[str, dict] = {}
    for row in results["rows"]:
        named = {name: row[name] for name in ("stage", "width", "config")}
        key = json.dumps(named, sort_keys=True)
        entry = candidates_.setdefault(key, {**named, "milliseconds": {}, "error": {}})
        for name, digits in (("milliseconds", 5), ("error", 3)):
            entry[name][str(row["length"])] = float(f"{row[name]:.{digits}g}")
    return {
        "environment": results["environment"],
        "candidates": list(candidates_.values()),
        "failed": results["failed"],
    }


def text(results: dict, classes: tuple = CLASSES) -> str:
    """The fastest setting of each stage, width and class, a line each."""
    lines = [f"{results['environment']['device']}: milliseconds, geometric mean of the lengths"]
    for stage, width in sorted({(row["stage"], row["width"]) for row in results["rows"]}):
        for _, lengths in classes:
            best = fastest(results["rows"], stage, width, lengths)
            if best is not None:
                some = ", ".join(map(str, lengths))
                setting = " ".join(f"{k}={v}" for k, v in _shortest(best[0]).items())
                lines.append(f"{stage} C = {width}, L = {some}: {best[1]:.4f}  {setting}")
    lines.append(f"{len(results['failed'])} candidates failed")
    return "\n".join(lines)


def run(
    out: Path,
    results: Path | None,
    stages: list[str] | None,
    widths: list[int] | None,
    kernel_root: Path | None,
    commit: str | None,
    command: str,
    progress: Callable[[str, int, int], None],
) -> dict:
    """Tunes, writes the files and returns the results.

    Raises:
        UserError: no GPU, no kernel repository, or an unknown stage or width.
    """
    for stage in stages or ():
        if stage not in STAGES:
            raise UserError(f"stage must be one of {', '.join(STAGES)}; got {stage!r}")
    for width in widths or ():
        if not 16 <= width <= 512:
            raise UserError(f"width must be from 16 to 512; got {width}")
    root = find_root(kernel_root)
    measured = tune(
        root, tuple(stages or STAGES), tuple(widths or WIDTHS),
        progress=progress, command=command, commit=commit,
    )  # fmt: skip
    write(root, measured, out, results)
    return measured
