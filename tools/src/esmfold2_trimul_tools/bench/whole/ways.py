"""The ways to run a fold: transformers' own, others', and ours, each put into the same model.

A way is a line in WAYS and a context manager that changes a `Bench`'s model and takes the change
back. torch is imported only then: the options are checked against the table without it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from ...repository import submodule
from ..case import PASSES, Case
from ..rivals import (
    FORWARD,
    Absent,
    Sources,
    check_variants,
    esm_version,
    first_line,
    fused_esm,
    settings_kept,
)

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import EsmFold2Model


@dataclass(frozen=True)
class Bench:
    """A model and the packages that may change it. esm: the folder that holds biohub's package."""

    model: EsmFold2Model
    device: torch.device
    dtype: torch.dtype
    sources: Sources
    esm: Path | None = None

    @property
    def layers(self) -> list[nn.Module]:
        """The pair-update layers: those of the trunk, the encoders, the coda and the heads."""
        from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2PairUpdateLayer

        return [part for part in self.model.modules() if isinstance(part, EsmFold2PairUpdateLayer)]

    @property
    def plain_layers(self) -> list[nn.Module]:
        """The layers without those of the MSA encoder, which do more."""
        inside = set(self.msa_layers)
        return [layer for layer in self.layers if layer not in inside]

    @property
    def msa_layers(self) -> list[nn.Module]:
        return [] if self.model.msa_encoder is None else [*self.model.msa_encoder.layers]

    @property
    def triangles(self) -> list[nn.Module]:
        return [getattr(layer, name) for layer in self.layers for name in TRIANGLES]


TRIANGLES = ("tri_mul_out", "tri_mul_in")


@dataclass(frozen=True)
class Installed:
    """What a way did to the model.

    note: what the row says of it. transitions: modules of its own that are pair transitions.
    has_our_ops: whether layers whose forward was replaced call the ops of our package. blocks: the
    parameters, by their names, of what runs in place of a layer and doesn't read the layer's own.
    """

    note: str | None = None
    transitions: list[nn.Module] = field(default_factory=list)
    has_our_ops: bool = False
    blocks: dict[nn.Module, dict[str, nn.Parameter]] = field(default_factory=dict)


@dataclass(frozen=True)
class Way:
    """install: puts it into the model for the length of a block. on_cpu: whether a CPU can run it.
    passes: "forward" for folds, "training" for steps of one layer. compiles: it compiles for a
    while at each length, and --compile-lengths limits the lengths of its steps.

    For the printed estimate, on one H200 with torch 2.11.0, Triton 3.6.0 and commit 21c4e42, in
    bfloat16; what was not measured has the numbers of the stock path without chunks:
    layer_ms: of one pair-update layer at L = 512 and 1024. gib: a fold's peak at L = 1024.
    """

    name: str
    install: Callable[[Bench], AbstractContextManager[Installed]]
    on_cpu: bool = True
    passes: tuple[str, ...] = PASSES
    compiles: bool = False
    layer_ms: tuple[float, float] = (12.9, 73.3)
    gib: float = 90.6


@contextmanager
def stock(bench: Bench) -> Iterator[Installed]:
    """The model as it is loaded: chunks of 64."""
    yield Installed()


@contextmanager
def unchunked(bench: Bench) -> Iterator[Installed]:
    """chunk_size None wherever a module reads it. The configuration's is only read when made."""
    chunked = [part for part in bench.model.modules() if getattr(part, "chunk_size", None)]
    before = [part.chunk_size for part in chunked]
    for part in chunked:
        part.chunk_size = None
    try:
        yield Installed()
    finally:
        for part, chunk_size in zip(chunked, before, strict=True):
            part.chunk_size = chunk_size


@contextmanager
def compiled(bench: Bench) -> Iterator[Installed]:
    """torch.compile of the forward of the layers that run in every loop on [1, L, L, C]."""
    import torch

    model = bench.model
    stacks = (model.folding_trunk, model.lm_encoder, model.parcae.output_stack)
    layers = [layer for stack in stacks for layer in stack.layers]
    # Past a limit of compilations of one function, Dynamo runs it uncompiled.
    torch.compiler.reset()
    forward = torch.compile(type(layers[0]).forward, dynamic=False)
    with unchunked(bench), _replaced(layers, lambda layer: MethodType(forward, layer)):
        yield Installed(
            f"torch.compile of the forward of {len(layers)} pair-update layers (trunk, language-"
            "model encoder, coda), unchunked, for each length anew; all else is stock, unchunked"
        )


@contextmanager
def published(bench: Bench) -> Iterator[Installed]:
    """The published layer's forward at every triangle, as kernelize binds it."""
    import torch

    if bench.dtype != torch.bfloat16:
        raise Absent("computes in bfloat16 alone")
    module = bench.sources.published_module()
    if isinstance(module, str):
        raise Absent(module)
    try:
        with settings_kept():
            layers = importlib.import_module(f"{module.__package__}.layers")
    except Exception as error:  # whatever somebody's package raises
        raise Absent(first_line(error)) from None
    forward = layers.ESMFold2TriangleMultiplication.forward
    with _replaced(bench.triangles, lambda site: MethodType(forward, site)):
        yield Installed()


@contextmanager
def esm(bench: Bench) -> Iterator[Installed]:
    """biohub's pair-update layers with their "fused" backend, on the model's own weights.

    As in their model, the MSA encoder's layers do not take the backend.
    """
    import torch

    if bench.dtype != torch.bfloat16:
        raise Absent("its fused kernels compute in bfloat16 alone")
    theirs = fused_esm(bench.esm)
    config = bench.model.config
    ratio = config.pair_transition_intermediate_size // config.pairwise_hidden_size
    blocks = {}
    for layer in bench.plain_layers:
        with torch.device("meta"):
            block = theirs.PairUpdateBlock(config.pairwise_hidden_size, ratio)
        for name in TRIANGLES:
            engine = getattr(block, name)._engine
            engine.load_state_dict(getattr(layer, name).state_dict(), assign=True)
        own = {
            re.sub("^mlp.gate_up_proj", "ffn.w12", re.sub("^mlp.down_proj", "ffn.w3", name)): value
            for name, value in layer.pair_transition.state_dict().items()
        }
        block.pair_transition.load_state_dict(own, assign=True)
        block.set_kernel_backend("fused")
        blocks[layer] = block.eval().requires_grad_(False)

    def forward_of(layer: nn.Module) -> Callable:
        block = blocks[layer]
        return lambda pair_states, pair_attention_mask=None: block(pair_states, pair_attention_mask)

    with _replaced([*blocks], forward_of):
        yield Installed(
            f"{len(blocks)} pair-update layers of esm {esm_version(bench.esm)} with the fused "
            "backend; the MSA encoder's are stock",
            [block.pair_transition for block in blocks.values()],
            blocks={layer: _parameters_read(block) for layer, block in blocks.items()},
        )


def _parameters_read(block: nn.Module) -> dict[str, nn.Parameter]:
    """Those of a block of esm's: its fused transition reads copies that it has made of some."""
    copied = ("pair_transition.norm.", "pair_transition.ffn.w12.")
    is_fused = getattr(block.pair_transition, "_fused_swiglu", None) is not None
    return {
        name: value
        for name, value in block.named_parameters()
        if not (is_fused and name.startswith(copied))
    }


@contextmanager
def our_layer(bench: Bench) -> Iterator[Installed]:
    """The Hub layer's forward at every triangle, as kernelize binds it."""
    forward = bench.sources.kernel.ESMFold2TriangleMultiplication.forward
    with _replaced(bench.triangles, lambda site: MethodType(forward, site)):
        yield Installed()


@contextmanager
def ours(bench: Bench, **options: str) -> Iterator[Installed]:
    """`patch`, with its defaults but for the options."""
    with bench.sources.kernel.patch(bench.model, **options) as report:
        if not report.swapped:
            raise RuntimeError(str(report))
        left = f"; left: {', '.join(report.left)}" if report.left else ""
        note = f"{len(report.swapped)} modules swapped by patch{left}"
        yield Installed(note, has_our_ops=True)


@contextmanager
def ours_plain(bench: Bench) -> Iterator[Installed]:
    """`patch`, and every stage with its own kernel.

    Absent where a triangle of 512 residues runs no variant of a stage.
    """
    from ..problem import make_problem

    width, dtype = bench.model.config.pairwise_hidden_size, str(bench.dtype).removeprefix("torch.")
    check_variants(make_problem(Case(width, 512, dtype), bench.device), bench.sources)
    plain = submodule(bench.sources.kernel, "hopper").without_variants()
    with ours(bench) as installed, plain:
        yield replace(installed, note=f"{installed.note}; no variants of stages")


@contextmanager
def ours_unchunked(bench: Bench) -> Iterator[Installed]:
    with unchunked(bench), ours(bench) as installed:
        yield installed


@contextmanager
def ours_graph(bench: Bench) -> Iterator[Installed]:
    """`patch`, and the denoiser as a CUDA graph; a step that can't be captured is a failure."""
    from ...folding.denoiser import graphed_denoiser

    left: list[str] = []
    with ours(bench) as installed, graphed_denoiser(bench.model, left.append):
        yield replace(installed, note=f"{installed.note}; the denoiser as a CUDA graph")
    if left:
        raise RuntimeError("; ".join(left))


STOCK, OURS = "stock", "ours"
WAYS = (
    Way(STOCK, stock, layer_ms=(21.5, 264), gib=70.7),
    Way("stock-unchunked", unchunked),
    Way("stock-compiled", compiled, compiles=True),
    Way("published", published, on_cpu=False),
    Way("esm", esm, on_cpu=False, layer_ms=(4.88, 16.0)),
    Way("ours-layer", our_layer),
    Way(OURS, ours, layer_ms=(4.87, 19.1), gib=34.7),
    Way("ours-plain", ours_plain, on_cpu=False, layer_ms=(4.87, 19.1), gib=34.7),
    Way("ours-recompute", partial(ours, recompute="all"), passes=("training",)),
    Way("ours-unchunked", ours_unchunked, passes=FORWARD, layer_ms=(4.62, 18.5)),
    Way("ours-graph", ours_graph, on_cpu=False, passes=FORWARD, layer_ms=(4.87, 19.1), gib=34.7),
)


@contextmanager
def _replaced(
    modules: list[nn.Module], forward_of: Callable[[nn.Module], Callable[..., Any]]
) -> Iterator[None]:
    """Each module with another forward, as the kernels library sets it: on the instance."""
    try:
        for module in modules:
            module.forward = forward_of(module)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)
