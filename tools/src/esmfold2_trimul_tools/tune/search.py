"""The search: every candidate is compiled, compared with float32 PyTorch, and timed.

Candidates are compiled in processes of their own, several at a time. One that hangs there has
failed; one that hangs while it is timed is named and ends the search. Needs torch, Triton and one
NVIDIA GPU; no other package.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from .. import oracle
from ..environment import checkout_commit, driver_version
from ..errors import UserError
from ..repository import load_kernel, submodule
from ..triton_cache import check_cache
from .candidates import (
    CLASSES,
    SPLIT_STAGES,
    STAGES,
    WIDTHS,
    Job,
    candidates,
    split_candidates,
)
from .watchdog import HUNG_SECONDS, watched

# Relative L2 error of one stage in 16 bits; see docs/numerics.md.
LARGEST_ERROR = 3.5e-3
LARGEST_SPLIT_ERROR = 1e-6  # in float32
_FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU there is
_REPEATS = 11


class StageInputs:
    """Random operands of all stages for one width and length, and the stages' results."""

    largest_error = LARGEST_ERROR

    def __init__(self, kernel: ModuleType, width: int, length: int, device: str = "cuda"):
        self.kernel, self.length = kernel, length
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device) * scale

        norms = [1 + randn(width, scale=0.2), randn(width, scale=0.2)] * 2
        projections = [randn(4 * width, width, scale=width**-0.5).bfloat16()]
        projections += [randn(width, width, scale=width**-0.5).bfloat16() for _ in range(2)]
        bundle, emit, gate = projections
        x = (randn(1, length, length, width) + 0.3).bfloat16()
        real = torch.arange(length, device=device) < length - 3
        module = submodule(kernel, "_call")
        weights = module.Weights(
            *norms[:2], bundle[: 2 * width], None, bundle[2 * width :], None,
            *norms[2:], emit, None, gate, None,
        )  # fmt: skip
        self.call = module.Call(
            x=x, direction="outgoing", mask=(real[:, None] & real[None, :]).unsqueeze(0),
            residual=None, drop_mask=None, weights=weights, eps_in=1e-5, eps_out=1e-5,
            precision="fp32", memory="default", recompute="none", inplace=False, lengths=None,
        )  # fmt: skip
        gate, up = randn(8 * width, width, scale=width**-0.5).bfloat16().chunk(2)
        down = randn(width, 4 * width, scale=(4 * width) ** -0.5).bfloat16()
        self.transition = module.Transition(
            x=x, residual=x, weights=module.TransitionWeights(
                *norms[:2], gate, None, up, None, down, None
            ), eps=1e-5, precision="fp32", inplace=False, lengths=None,
        )  # fmt: skip
        self._make_references()
        self._make_transitions_references()

    def _make_references(self) -> None:
        """Each stage's result in float32 from that stage's own operands."""
        x, length, parameters = self.call.x, self.length, self.call.weights._asdict()
        pitch = submodule(self.kernel, "triton_parts.tiles").padded_pitch(length)
        rows = x.float()
        z = oracle.norm(rows, parameters, "norm_in", 1e-5)
        planes = torch.cat(oracle.operands(z, parameters, self.call.mask), dim=-1).movedim(-1, 1)
        planes = planes.bfloat16().contiguous()
        self.planes = torch.nn.functional.pad(planes, (0, pitch - length))
        a, b = planes.movedim(1, -1).chunk(2, dim=-1)
        product = oracle.product(a, b, "outgoing")
        planes = product.movedim(-1, 1).contiguous()
        self.product = torch.nn.functional.pad(planes, (0, pitch - length))
        moments = [rows.mean(-1), (rows.var(-1, unbiased=False) + 1e-5).rsqrt()]
        self.moments = torch.nn.functional.pad(torch.stack(moments, dim=1), (0, pitch - length))
        self.wanted = {
            "fused_dual_gemm": self.planes,
            "trimul_einsum": self.product,
            "fused_ln_residual": oracle.update(product.float(), z, parameters, 1e-5).bfloat16(),
        }

    def _make_transitions_references(self) -> None:
        """The same for the transition, on as many rows as the forward computes at a time."""
        path = submodule(self.kernel, "triton_path.transition")
        call = path._merged(self.transition)
        chunk = next(path._chunks(call, call.hidden, *path._FORWARD_CHUNK))
        self.transition = path._part(call, *chunk)
        x, parameters = self.transition.x.flatten(0, 2), self.transition.weights._asdict()
        hidden = oracle.gated(oracle.norm(x.float(), parameters, "norm", 1e-5), parameters)
        self.hidden = hidden.bfloat16()
        out = x.float() + self.hidden.float() @ parameters["down_weight"].float().t()
        self.wanted |= {"swiglu_hidden": hidden, "row_linear": out}

    def run(self, job: Job) -> torch.Tensor:
        config = job.launch_config(self.kernel)
        call, launches = self.call, submodule(self.kernel, "triton_parts.launch").Launches()
        if job.stage == "fused_dual_gemm":
            out = torch.empty_like(self.planes)
            planes = out.chunk(2, dim=1)
            stage = submodule(self.kernel, "fused_dual_gemm").fused_dual_gemm_fwd
            stage(call, launches, planes, config=config)
        elif job.stage == "trimul_einsum":
            out = torch.empty_like(self.product)
            stage = submodule(self.kernel, "trimul_einsum_triton").trimul_einsum_fwd
            stage(call, launches, *self.planes.chunk(2, dim=1), out, config=config)
        elif job.stage == "swiglu_hidden":
            out = torch.empty_like(self.hidden)
            stage = submodule(self.kernel, "triton_path.swiglu_hidden").swiglu_hidden
            stage(self.transition, launches, out, config=config)
        elif job.stage == "row_linear":
            out = torch.empty_like(self.transition.x).flatten(0, 2)
            stage = submodule(self.kernel, "triton_path.row_linear")
            x, weight = self.transition.x, self.transition.weights.down_weight
            prepared = stage.prepare_row_linear(
                self.hidden, weight, x, x.shape[1:3], "fp32", config=config
            )
            stage.row_linear(self.hidden, weight, None, x, None, out, prepared)
        else:
            out = torch.empty_like(call.x)
            stage = submodule(self.kernel, "fused_ln_residual").fused_ln_residual_fwd
            stage(call, launches, self.product, self.moments, out, config=config)
        return out

    def error(self, job: Job) -> float:
        """Relative L2 error of the job's result, NaN where an element was not written."""
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            got = self.run(job)
        finally:
            torch.use_deterministic_algorithms(False)
        wanted = self.wanted[job.stage]
        if job.stage == "trimul_einsum":  # the padding is arbitrary
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


class SplitInputs(StageInputs):
    """The same for float32 whose operands are split: of the triangle multiplication alone."""

    largest_error = LARGEST_SPLIT_ERROR

    def __init__(self, kernel: ModuleType, width: int, length: int, device: str = "cuda"):
        super().__init__(kernel, width, length, device)
        split, call = submodule(kernel, "triton_parts.split_operands"), self.call
        weights = [None if value is None else value.float() for value in call.weights]
        call = call._replace(x=call.x.float(), weights=type(call.weights)(*weights))
        z = oracle.norm(call.x.double(), call.weights._asdict(), "norm_in", 1e-5)
        planes = oracle.operands(z, call.weights._asdict(), call.mask)
        self.wanted = {"fused_dual_gemm": torch.cat(planes, -1).movedim(-1, 1)}
        product = oracle.product(*planes, "outgoing")
        self.wanted["trimul_einsum"] = product.movedim(-1, 1)
        out = oracle.update(product, z, call.weights._asdict(), 1e-5)
        self.wanted["fused_ln_residual"] = out
        padding = self.product.shape[-1] - length
        self.product = torch.nn.functional.pad(self.wanted["trimul_einsum"].float(), (0, padding))
        self.planes = self.product.repeat(1, 2, 1, 1)
        launches = submodule(kernel, "triton_parts.launch").Launches()
        call = call._replace(precision=split.FP16X3)
        self.call, self.scales = split.split_weights(call, launches)
        stage = submodule(kernel, "fused_dual_gemm").fused_dual_gemm_fwd
        self.moments = stage(
            self.call, launches, self.planes.chunk(2, dim=1), scales=self.scales
        )

    def run(self, job: Job) -> torch.Tensor:
        config, call, scales = job.launch_config(self.kernel), self.call, self.scales
        launches = submodule(self.kernel, "triton_parts.launch").Launches()
        if job.stage == "fused_dual_gemm":
            out = torch.empty_like(self.planes)
            stage = submodule(self.kernel, "fused_dual_gemm").fused_dual_gemm_fwd
            stage(call, launches, out.chunk(2, dim=1), config=config, scales=scales)
        elif job.stage == "trimul_einsum":
            out = torch.empty_like(self.product)
            stage = submodule(self.kernel, "trimul_einsum_triton").trimul_einsum_fwd
            of_planes = scales.of_planes(call.hidden)
            a, b = self.planes.chunk(2, dim=1)
            stage(call, launches, a, b, out, config=config, scales=of_planes)
        else:
            out = torch.empty_like(call.x)
            stage = submodule(self.kernel, "fused_ln_residual").fused_ln_residual_fwd
            stage(call, launches, self.product, self.moments, out, config=config, scales=scales)
        return out

    def error(self, job: Job) -> float:
        torch.use_deterministic_algorithms(True)
        try:
            got = self.run(job)
        finally:
            torch.use_deterministic_algorithms(False)
        if job.stage == "fused_dual_gemm":
            high, low = got.view(torch.float16).double().unflatten(-1, (2, -1)).unbind(-2)
            exponents = self.scales.of_planes(self.call.hidden).exponents.double()
            got = (high + low / 2**11) * 2 ** -exponents.reshape(1, -1, 1, 1)
        wanted = self.wanted[job.stage]
        if job.stage != "fused_ln_residual":
            got = got[..., : self.length]
        return float((got.double() - wanted).norm() / wanted.norm())


def inputs_of(kind: str) -> type[StageInputs]:
    """The inputs for settings of a list."""
    return SplitInputs if kind == "split" else StageInputs


def _compile(root: str, job: Job) -> str | None:
    """Compiles a job into Triton's cache on disk by running it once; returns any failure."""
    # ptxas' complaints about settings that don't fit are expected here.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    try:
        with watched(str(job)):
            inputs_of(job.kind)(load_kernel(Path(root)), job.width, 64).run(job)
            torch.cuda.synchronize()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def search(
    root: Path,
    stages: tuple[str, ...] = STAGES,
    widths: tuple[int, ...] = WIDTHS,
    classes: tuple[tuple[int | None, tuple[int, ...]], ...] = CLASSES,
    processes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    jobs: list[Job] | None = None,
    command: str = "",
    commit: str | None = None,
    kind: str = "2",
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
        kind: of the settings, "2" for 16 bits or "split" for float32 whose operands are split.

    Returns:
        {"environment": ..., "kind": ...,
        "rows": [{stage, width, length, config, milliseconds, error}, ...],
        "failed": [{stage, width, config, why}, ...]}; a candidate that could not be compiled, hung
        or was wrong is in "failed", with no time.

    Raises:
        UserError: there is no NVIDIA GPU, or Triton can't write to its cache.
    """
    if not torch.cuda.is_available() or torch.version.hip is not None:
        raise UserError("tune needs an NVIDIA GPU: torch.cuda finds none")
    check_cache()
    capability = torch.cuda.get_device_capability(0)
    if kind == "split":
        if capability != (9, 0):
            raise UserError("split operands are for Hopper GPUs (sm_90)")
        stages = tuple([stage for stage in stages if stage in SPLIT_STAGES])
    if jobs is None and kind == "split":
        jobs = [
            job
            for stage in stages
            for width in widths
            for job in split_candidates(stage, width)
        ]
    elif jobs is None:
        jobs = [
            job
            for stage in stages
            for width in widths
            for job in candidates(stage, width, capability >= (9, 0), capability == (9, 0))
        ]
    lengths = sorted({length for _, timed in classes for length in timed})
    steps = len(jobs) + len(widths) * len(lengths)
    done = 0

    def say(what: str) -> None:
        if progress is not None:
            progress(what, done, steps)

    failed, good = [], []
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes or os.cpu_count()) as pool:
        calls = [pool.apply_async(_compile, (str(root), job)) for job in jobs]
        for job, call in zip(jobs, calls, strict=True):
            try:
                # The process of a job that hangs ends itself, see `_compile`. The time is that of
                # this job alone: it was begun when all before it were done.
                why = call.get(2 * HUNG_SECONDS)
            except multiprocessing.TimeoutError:
                why = f"no result after {2 * HUNG_SECONDS} s: it hangs, or its process died"
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
            inputs = inputs_of(kind)(kernel, width, length)
            for job in good:
                if job.width != width or job in wrong:
                    continue
                with watched(f"{job}, at L = {length},"):
                    error = inputs.error(job)
                    right = error <= inputs.largest_error
                    milliseconds = inputs.milliseconds(job, flush) if right else None
                if not right:
                    wrong.add(job)
                    failed.append({**_named(job), "why": f"error {error:.1e} at L = {length}"})
                    continue
                measured = {"milliseconds": milliseconds, "error": error}
                rows.append({**_named(job), "length": length, **measured})
            del inputs
            torch.cuda.empty_cache()
            done += 1
    say("done")
    rows = [row for row in rows if not any(_is(row, job) for job in wrong)]
    where = environment(command, commit or checkout_commit(root))
    return {"environment": where, "kind": kind, "rows": rows, "failed": failed}


def _named(job: Job) -> dict:
    return {"stage": job.stage, "width": job.width, "config": dict(job.config)}


def _is(row: dict, job: Job) -> bool:
    return all(row[name] == value for name, value in _named(job).items())


def environment(command: str, commit: str | None) -> dict:
    """The machine and versions with which the times were taken."""
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
