"""The time of each part of a fold, and the part within which memory is at its peak.

Hooks mark where a module's forward begins and ends: with CUDA events on a GPU, with a clock on a
CPU. A part's time is that of its calls without the parts inside them, so the parts add up to the
fold.

A pair-update layer is two triangle multiplications with their residual sums and a transition. Where
its own forward runs, hooks on its modules tell them apart. Where one forward has replaced the whole
layer, as `patch` does, its modules are never called, and patched modules take no hooks. There a
dispatch mode marks our registered ops, through which every call of ours goes, whoever makes it;
it is on within such layers only, where it costs the host some microseconds an op. That needs
nothing of the package, neither the names of its kernels nor a profiler, and works on a CPU too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .ways import TRIANGLES, Bench, Installed

TRIANGLE, TRANSITION, LAYER = "triangle", "transition", "pair layers"
MSA, DIFFUSION, CONFIDENCE = "MSA encoder", "diffusion", "confidence"
LANGUAGE_MODEL, REST = "language model", "rest"
# "pair layers" has what can't be told apart: layers that another compiler has made one.
PARTS = (TRIANGLE, TRANSITION, LAYER, MSA, DIFFUSION, CONFIDENCE, LANGUAGE_MODEL, REST)
_LOOPS = "loops"  # a span of `rest` that holds all that is done once a loop


@dataclass
class Span:
    """One call of a part. start and end: marks of the clock. peak: most bytes while it was the
    innermost, None where they can't be told."""

    part: str
    start: Any
    parent: Span | None = None
    end: Any = None
    peak: int | None = None
    children: list[Span] = field(default_factory=list)

    @property
    def attributed(self) -> str:
        """The part that has the time which no child has."""
        inside = {child.part for child in self.children}
        if self.part == LAYER and inside:
            # Residual sums are the triangles'; a transition inside one forward is what remains.
            return TRIANGLE if TRANSITION in inside else TRANSITION
        return REST if self.part == _LOOPS else self.part

    @property
    def path(self) -> str:
        """The part and those around it, as in "transition in confidence"."""
        names, span = [self.attributed], self.parent
        while span is not None:
            if span.part not in (LAYER, REST):
                names.append(span.part)
            span = span.parent
        return " in ".join(dict.fromkeys(names))


class Marks:
    """Marks of a device's time, and its peak of memory."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._device = device

    def now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; on a GPU the later must have been reached."""
        return start.elapsed_time(end) / 1e3 if self._on_gpu else end - start

    def peak_since(self) -> int | None:
        """Most allocated bytes since the last call; None on a CPU."""
        if not self._on_gpu:
            return None
        peak = torch.cuda.max_memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return peak


class Spans:
    """The calls within a block, as a tree."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self.all: list[Span] = []
        self._open: Span | None = None

    def begin(self, part: str) -> None:
        self._note_peak()
        span = Span(part, self._marks.now(), self._open)
        if self._open is not None:
            self._open.children.append(span)
        self.all.append(span)
        self._open = span

    def end(self) -> None:
        self._note_peak()
        self._open.end = self._marks.now()
        self._open = self._open.parent

    def _note_peak(self) -> None:
        peak = self._marks.peak_since()
        if self._open is not None and peak is not None:
            self._open.peak = max(self._open.peak or 0, peak)

    def seconds(self, span: Span) -> float:
        return self._marks.seconds(span.start, span.end)

    def by_part(self, loops: int) -> dict[str, float]:
        """Seconds of each part that was called, for a fold of `loops` loops, from one of none."""
        found = dict.fromkeys(PARTS, 0.0)
        for span in self.all:
            own = self.seconds(span) - sum(map(self.seconds, span.children))
            found[span.attributed] += own * (loops + 1 if _is_looped(span) else 1)
        return {part: seconds for part, seconds in found.items() if seconds}

    def loop(self) -> float:
        """Seconds of one pass through all that is looped."""
        return sum(self.seconds(span) for span in self.all if span.part == _LOOPS)

    def peak(self) -> tuple[int, str] | None:
        """The peak in bytes, and within which part it was reached."""
        known = [span for span in self.all if span.peak is not None]
        highest = max(known, key=lambda span: span.peak, default=None)
        return highest and (highest.peak, highest.path)


def _is_looped(span: Span | None) -> bool:
    return span is not None and (span.part == _LOOPS or _is_looped(span.parent))


@contextmanager
def measured(bench: Bench, installed: Installed) -> Iterator[Spans]:
    """Spans of the parts of the fold within the block."""
    model, spans = bench.model, Spans(Marks(bench.device))
    with ExitStack() as undo:

        def hook(module: nn.Module, part: str, inside: Callable = nullcontext) -> None:
            opened: list = []

            def before(*_: Any) -> None:
                spans.begin(part)
                opened.append(inside())
                opened[-1].__enter__()

            def after(*_: Any) -> None:
                opened.pop().__exit__(None, None, None)
                spans.end()

            for handle in (
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after, always_call=True),
            ):
                undo.callback(handle.remove)

        def wrap(name: str, part: str) -> None:
            """A method of the model, which has no hooks."""
            method = getattr(model, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                spans.begin(part)
                try:
                    return method(*args, **kwargs)
                finally:
                    spans.end()

            setattr(model, name, call)
            undo.callback(delattr, model, name)

        def our_ops() -> _OurOps:
            return _OurOps(bench, spans)

        wrap("_run_trunk_loops", _LOOPS)
        wrap("_sample_structure", DIFFUSION)
        hook(model.confidence_head, CONFIDENCE)
        hook(model.esmc, LANGUAGE_MODEL)
        hook(model.language_model, LANGUAGE_MODEL)
        if model.msa_encoder is not None:
            hook(model.msa_encoder, MSA)
        inside_msa = set(bench.msa_layers)
        for layer in bench.layers:
            part = MSA if layer in inside_msa else LAYER
            if "forward" in vars(layer):
                hook(layer, part, our_ops if installed.has_our_ops else nullcontext)
                continue
            hook(layer, part)
            hook(layer.pair_transition, TRANSITION)
            for name in TRIANGLES:
                hook(getattr(layer, name), TRIANGLE)
        for module in installed.transitions:
            hook(module, TRANSITION)
        spans.begin(REST)
        try:
            yield spans
        finally:
            spans.end()


class _OurOps(TorchDispatchMode):
    """Marks the kernel's registered ops."""

    def __init__(self, bench: Bench, spans: Spans) -> None:
        super().__init__()
        self._namespace = namespace_of(bench.sources.kernel)
        self._spans = spans

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(function, "namespace", None) != self._namespace:
            return function(*args, **kwargs or {})
        is_triangle = function.name().partition("::")[2].startswith("trimul")
        self._spans.begin(TRIANGLE if is_triangle else TRANSITION)
        try:
            return function(*args, **kwargs or {})
        finally:
            self._spans.end()


def namespace_of(kernel: Any) -> str:
    """The namespace of the ops of the loaded package."""
    from ...repository import submodule

    return submodule(kernel, "_ops").add_op_namespace_prefix("").partition("::")[0]
