"""The rivals: our kernel and others, each called as its own documentation says.

A rival is a line in RIVALS and a function that turns a problem into a call. `compiled` and
`captured` derive further rivals from such a function, and `plain` is where one of ours runs without
variants of stages. Preparation (parameters in the rival's dtype,
compilation, capture) is part of making the call, and never timed. torch is imported only then: the
options are checked against the table without it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..repository import submodule
from .case import PASSES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .problem import Problem

_PUBLISHED = "esmfold2_trimul"
_HUB_NAME = "EsmFold2TriangleMultiplication"  # transformers' name for the published layer
_PACKAGES = (
    "transformers", "kernels", "cuequivariance", "cuequivariance-torch",
    "cuequivariance-ops-torch-cu12", "cuequivariance-ops-torch-cu13",
)  # fmt: skip


class Absent(Exception):
    """The rival isn't available, or doesn't take the problem; the message says why."""


@dataclass(frozen=True)
class Call:
    """A function with its arguments; called without any.

    explained: for a call of ours, gives what `explain` tells of it.
    """

    function: Callable[..., Tensor]
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    explained: Callable[[], Any] | None = None

    def __call__(self) -> Tensor:
        return self.function(*self.args, **self.kwargs)

    def variants(self) -> dict[str, str] | None:
        """The stages of our forward that run a variant, and which; None if the call isn't ours."""
        if self.explained is None:
            return None
        stages = self.explained().stages
        return {
            name: stage.constants["VARIANT"]
            for name, stage in stages.items()
            if "VARIANT" in stage.constants
        }


@dataclass(frozen=True)
class Sources:
    """The sources of the packages that are measured.

    kernel: our loaded package. published: the folder that holds the published package, or None for
    the one that transformers would fetch. esm: the folder that holds biohub's package, if any.
    """

    kernel: ModuleType
    published: Path | None = None
    esm: Path | None = None

    def published_module(self) -> ModuleType | str:
        """The module of the published package that has the function, or why there is none."""
        module = find_published(self.published)
        if isinstance(module, ModuleType) and module.__package__ == self.kernel.__name__:
            return "LOCAL_KERNELS puts our own kernel in its place"
        return module

    def versions(self, with_published: bool) -> dict[str, str | None]:
        """The version of every rival's package; a hash for the published one."""
        found = {name: _version(name) for name in _PACKAGES}
        module = self.published_module() if with_published else None
        found["published"] = _sources_hash(module) if isinstance(module, ModuleType) else None
        return found


@dataclass(frozen=True)
class Rival:
    """One contestant.

    make: makes its call from a problem. option: the command's option that includes it; without one
    it always takes part. on_cpu: whether it runs on a CPU too. slow: it compiles for a while at
    each length, and --compile-lengths limits its lengths. in_capture: it replays a CUDA graph,
    whose memory is allocated at capture. first_call: its first call in a fresh process is worth
    timing. passes: those for which it is measured. plain: whether it is measured within `plain`.
    """

    name: str
    make: Callable[[Problem, Sources], Call]
    option: str | None = None
    on_cpu: bool = False
    slow: bool = False
    in_capture: bool = False
    first_call: bool = False
    passes: tuple[str, ...] = PASSES
    plain: bool = False


def ours(problem: Problem, sources: Sources, **options: str) -> Call:
    """The public function, without a residual."""
    function = sources.kernel.triangle_multiplicative_update_with_residual
    args = (problem.x, problem.case.direction, None, None)
    kwargs = {
        **problem.weights, "mask": problem.mask, "eps": problem.eps, "memory": "default", **options
    }  # fmt: skip
    return Call(function, args, kwargs, partial(sources.kernel.explain, function, *args, **kwargs))


def ours_in_tf32x3(problem: Problem, sources: Sources) -> Call:
    """The same, with three TF32 products for each float32 product; of a transition too."""
    if problem.case.dtype != "float32":
        raise Absent("products of 16 bits are exact")
    make = our_transition if problem.case.is_transition else ours
    return make(problem, sources, precision="TF32x3")


def in_tree(problem: Problem, sources: Sources, chunk_size: int | None = None) -> Call:
    """transformers' module with this problem's parameters: norms in float32, as its model has."""
    try:
        from transformers import EsmFold2Config
        from transformers.models.esmfold2.modeling_esmfold2 import (
            EsmFold2TriangleMultiplicativeUpdate,
        )
    except ImportError as error:
        raise Absent(f"no transformers with ESMFold2 ({first_line(error)})") from None
    import torch

    w = problem.weights
    config = EsmFold2Config(pairwise_hidden_size=problem.case.channels, chunk_size=chunk_size)
    outgoing = problem.case.direction == "outgoing"
    module = EsmFold2TriangleMultiplicativeUpdate(config, outgoing=outgoing)
    values = {
        "norm_start.weight": w["norm_in_weight"],
        "norm_start.bias": w["norm_in_bias"],
        "norm_mix.weight": w["norm_out_weight"],
        "norm_mix.bias": w["norm_out_bias"],
        "proj_bundle.weight": torch.cat([w["p_in_weight"], w["g_in_weight"]]),
        "proj_emit.weight": w["p_out_weight"],
        "proj_gate.weight": w["g_out_weight"],
    }
    # `assign` keeps each value's own dtype and device.
    module.load_state_dict(values, assign=True)
    module.norm_start.eps = module.norm_mix.eps = problem.eps
    return Call(module.requires_grad_(False).eval(), (problem.x, problem.mask))


def our_transition(problem: Problem, sources: Sources, precision: str | None = None) -> Call:
    """The public function with x for residual, as in the module."""

    function, x = sources.kernel.swiglu_transition, problem.x
    options = {"eps": problem.eps, "precision": precision}

    def transition(x: Tensor, **weights: Tensor) -> Tensor:
        return function(x, **weights, residual=x, **options)

    explained = partial(
        sources.kernel.explain, function, x, **problem.weights, residual=x, **options
    )
    return Call(transition, (x,), problem.weights, explained)


def in_tree_transition(
    problem: Problem, sources: Sources, chunk_size: int | None = None
) -> Call:
    """transformers' module with this problem's parameters: norms in float32, as its model has."""
    module = transition_module(problem.case, problem.weights, problem.eps, chunk_size)
    return Call(module.requires_grad_(False).eval(), (problem.x,))


def transition_module(
    case: Any, weights: dict[str, Any], eps: float, chunk_size: int | None = None
) -> Any:
    """transformers' `EsmFold2Transition` with these parameters, each in its own dtype.

    `case` has its channels and hidden channels.
    """
    try:
        from transformers.models.esmfold2.modeling_esmfold2 import EsmFold2Transition
    except ImportError as error:
        raise Absent(f"no transformers with ESMFold2 ({first_line(error)})") from None
    import torch

    module = EsmFold2Transition(case.channels, case.hidden, chunk_size)
    values = {
        "norm.weight": weights["norm_weight"],
        "norm.bias": weights["norm_bias"],
        "mlp.gate_up_proj.weight": torch.cat([weights["gate_weight"], weights["up_weight"]]),
        "mlp.down_proj.weight": weights["down_weight"],
    }
    module.load_state_dict(values, assign=True)
    module.norm.eps = eps
    return module


def published(problem: Problem, sources: Sources) -> Call:
    """The published package as its layer calls it: all in bfloat16, a residual of new zeros.

    The layer also casts the norms' parameters in every call; here that is done beforehand. If the
    problem has a residual, that one is used.
    """
    if problem.case.dtype != "bfloat16":
        raise Absent("computes in bfloat16 alone")
    module = sources.published_module()
    if isinstance(module, str):
        raise Absent(module)
    return _in_bfloat16(module.triangle_multiplicative_update_with_residual, problem)


def esm(problem: Problem, sources: Sources) -> Call:
    """The function that the pair-update block of biohub's esm calls with its "fused" backend.

    The block too casts all parameters in every call, and gives a residual: the pair itself.
    """
    if problem.case.dtype != "bfloat16":
        raise Absent("its fused kernels compute in bfloat16 alone")
    return _in_bfloat16(fused_esm(sources.esm)._fused_trimul_with_residual, problem)


def _in_bfloat16(function: Callable[..., Tensor], problem: Problem) -> Call:
    """The call of a function with the published one's arguments."""
    import torch

    weights = {name: value.bfloat16() for name, value in problem.weights.items()}

    def update(x: Tensor, **weights: Tensor) -> Tensor:
        residual = torch.zeros_like(x) if problem.residual is None else problem.residual
        direction, mask, drop_mask = problem.case.direction, problem.mask, problem.drop_mask
        return function(x, direction, residual, drop_mask, **weights, mask=mask, eps=problem.eps)

    return Call(update, (problem.x,), weights)


def cuequivariance(problem: Problem, sources: Sources, norm_dtype: str) -> Call:
    """NVIDIA's function with its default settings, the mask in the pair's dtype."""
    if norm_dtype == "bfloat16" and problem.case.dtype != "bfloat16":
        raise Absent("bfloat16 norms are for a bfloat16 pair")
    try:
        from cuequivariance_torch import triangle_multiplicative_update
    except ImportError as error:
        raise Absent(first_line(error)) from None
    import torch

    w, x, biases = problem.weights, problem.x, problem.biases
    norms = {
        name: None if value is None else value.to(getattr(torch, norm_dtype))
        for name, value in w.items()
        if name.startswith("norm_")
    }
    return Call(
        triangle_multiplicative_update,
        (
            x, problem.case.direction, None if problem.mask is None else problem.mask.to(x.dtype),
            norms["norm_in_weight"], norms["norm_in_bias"],
            w["p_in_weight"], biases.get("p_in_bias"), w["g_in_weight"], biases.get("g_in_bias"),
            norms["norm_out_weight"], norms["norm_out_bias"],
            w["p_out_weight"], biases.get("p_out_bias"),
            w["g_out_weight"], biases.get("g_out_bias"),
            problem.eps, problem.precision,
        ),
    )  # fmt: skip


Maker = Callable[["Problem", Sources], Call]


def compiled(make: Maker, **options: Any) -> Maker:
    """The call that `make` makes, under torch.compile with `options`, for this one shape."""

    def made(problem: Problem, sources: Sources) -> Call:
        import torch

        call = make(problem, sources)
        # Past a limit of compilations of one function, Dynamo runs it uncompiled.
        torch.compiler.reset()
        function = torch.compile(call.function, dynamic=False, **options)
        return replace(call, function=function)

    return made


def captured(make: Maker) -> Maker:
    """The replay of a CUDA graph of the call that `make` makes."""

    def made(problem: Problem, sources: Sources) -> Call:
        import torch

        call = make(problem, sources)
        # Warmed up on a stream of its own, as torch's documentation of CUDA graphs requires.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the stream even if the capture fails; `graph` may not.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            out = call()
        return Call(_replay, (graph, out, call), explained=call.explained)

    return made


def trained(call: Call, grad_out: Tensor) -> Call:
    """The call and the gradients of x and of all its parameters; returns the gradient of x."""
    import torch
    from torch import Tensor

    tensors = [*call.args, *call.kwargs.values()]
    # A mask is [B, L, L].
    leaves = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point() and t.ndim != 3]
    if isinstance(call.function, torch.nn.Module):
        leaves += call.function.parameters()
    for leaf in leaves:
        leaf.requires_grad_()

    def step() -> Tensor:
        return torch.autograd.grad(call(), leaves, grad_out)[0]

    return Call(step, explained=call.explained)


def _replay(graph: torch.cuda.CUDAGraph, out: Tensor, call: Call) -> Tensor:
    """`call` is only held: the graph reads the parameters that it was made with."""
    graph.replay()
    return out


def check_variants(problem: Problem, sources: Sources) -> None:
    """Raises Absent where our call runs no variant of a stage, so that without them it is alike."""
    make = our_transition if problem.case.is_transition else ours
    if not make(problem, sources).variants():
        raise Absent("no variant of a stage runs here")


@contextmanager
def plain(problem: Problem, sources: Sources) -> Iterator[None]:
    """A context in which every stage of ours runs its own kernel, not a variant for this GPU."""
    check_variants(problem, sources)
    with submodule(sources.kernel, "hopper").without_variants():
        yield


_in_tree_in_chunks = partial(in_tree, chunk_size=64)
_cuequivariance_16 = partial(cuequivariance, norm_dtype="bfloat16")
_cuequivariance_32 = partial(cuequivariance, norm_dtype="float32")
_ours_compiled = compiled(ours, fullgraph=True)
_in_tree_compiled = compiled(in_tree)
_in_tree_autotuned = compiled(in_tree, mode="max-autotune-no-cudagraphs")

FORWARD = ("forward",)
OURS = "ours"
RIVALS = (
    Rival(OURS, ours, on_cpu=True, first_call=True),
    Rival("ours, plain", ours, plain=True),
    Rival("ours, TF32x3", ours_in_tf32x3),
    Rival("ours, torch.compile", _ours_compiled, slow=True),
    Rival("ours, CUDA graph", captured(ours), in_capture=True, passes=FORWARD),
    Rival(
        "ours, plain, CUDA graph", captured(ours), "graphs", in_capture=True, passes=FORWARD,
        plain=True,
    ),  # fmt: skip
    Rival("ours, lean", partial(ours, memory="lean"), passes=FORWARD),
    Rival("ours, recompute all", partial(ours, recompute="all"), on_cpu=True, passes=("training",)),
    Rival("in-tree, chunk 64", _in_tree_in_chunks, on_cpu=True),
    Rival("in-tree, unchunked", in_tree, on_cpu=True),
    Rival("in-tree, torch.compile", _in_tree_compiled, "compile", on_cpu=True, slow=True),
    Rival("in-tree, max-autotune", _in_tree_autotuned, "max_autotune", slow=True),
    Rival("in-tree, CUDA graph", captured(in_tree), "graphs", in_capture=True, passes=FORWARD),
    Rival("published", published, first_call=True),
    Rival("published, CUDA graph", captured(published), "graphs", in_capture=True, passes=FORWARD),
    Rival("esm, fused", esm, "esm"),
    Rival("cuequivariance, bf16 norms", _cuequivariance_16),
    Rival("cuequivariance, fp32 norms", _cuequivariance_32),
    Rival(
        "cuequivariance, CUDA graph", captured(_cuequivariance_16), "graphs", in_capture=True,
        passes=FORWARD,
    ),  # fmt: skip
)
# The same for the transition, of which the published package and cuEquivariance have none.
TRANSITION_RIVALS = (
    Rival(OURS, our_transition, on_cpu=True),
    Rival("ours, plain", our_transition, plain=True),
    Rival("ours, TF32x3", ours_in_tf32x3),
    Rival("ours, torch.compile", compiled(our_transition, fullgraph=True), slow=True),
    Rival("ours, CUDA graph", captured(our_transition), in_capture=True, passes=FORWARD),
    Rival("ours, plain, CUDA graph", captured(our_transition), "graphs", in_capture=True,
          passes=FORWARD, plain=True),
    Rival("in-tree, chunk 64", partial(in_tree_transition, chunk_size=64), on_cpu=True),
    Rival("in-tree, unchunked", in_tree_transition, on_cpu=True),
    Rival(
        "in-tree, torch.compile", compiled(in_tree_transition), "compile", on_cpu=True, slow=True
    ),
    Rival("in-tree, CUDA graph", captured(in_tree_transition), "graphs", in_capture=True,
          passes=FORWARD),
)  # fmt: skip
# The rival that the others' times are compared with, where it was measured.
BASELINES = (
    "in-tree, chunk 64",
    "in-tree, unchunked",
    "published",
    "cuequivariance, bf16 norms",
    "cuequivariance, fp32 norms",
)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@functools.cache
def find_published(folder: Path | None) -> ModuleType | str:
    """The value of `Sources.published_module`, looked for once.

    Args:
        folder: the package's; None for the package that transformers would fetch.
    """
    try:
        with settings_kept():
            return _import_published(folder)
    except Exception as error:  # whatever the network or somebody's package raises
        return first_line(error)


def _import_published(folder: Path | None) -> ModuleType:
    if folder is not None:
        sys.path.insert(0, str(folder.resolve()))
        try:
            return importlib.import_module(f"{_PUBLISHED}.trimul_with_residual")
        finally:
            del sys.path[0]
    from kernels import Mode
    from transformers.integrations.hub_kernels import get_kernel_mapping_transformers

    layer = get_kernel_mapping_transformers()[_HUB_NAME]["cuda"][Mode.INFERENCE].load()
    package = layer.__module__.rpartition(".")[0]
    return importlib.import_module(f"{package}.trimul_with_residual")


@functools.cache
def find_esm(folder: Path | None) -> ModuleType | str:
    """The module of biohub's package that has the layers, or why there is none.

    Imported alone: the packages above it import all of the package, and so an older transformers.
    """
    if folder is None:
        return "not given: --esm names the folder that holds the package esm"
    packages = ("esm", "esm.models", "esm.models.esmc", "esm.models.esmfold2")
    with ExitStack() as undo:
        for name in packages:
            if name not in sys.modules:
                sys.modules[name] = ModuleType(name)
                sys.modules[name].__path__ = [str(folder.joinpath(*name.split(".")))]
                undo.callback(sys.modules.pop, name)
        try:
            with settings_kept():
                found = importlib.import_module("esm.models.esmfold2.layers")
        except Exception as error:  # whatever somebody's package raises
            return first_line(error)
        undo.pop_all()  # its kernels are imported by their names
    return found


def fused_esm(folder: Path | None) -> ModuleType:
    """`find_esm`'s module, with its fused kernels. Raises Absent where they are not to be had."""
    theirs = find_esm(folder)
    if isinstance(theirs, str):
        raise Absent(theirs)
    if not theirs.TRITON_KERNELS_AVAILABLE:
        raise Absent("its fused kernels can't be imported here")
    return theirs


def esm_version(folder: Path | None) -> str | None:
    """What the package in the folder says of itself."""
    if folder is None:
        return None
    text = (folder / "esm" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    return found and found[1]


@contextmanager
def settings_kept() -> Iterator[None]:
    """Restores the environment and the warning filters.

    Importing the published package changes both, and cuEquivariance reads its settings from the
    environment.
    """
    before = dict(os.environ)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sources_hash(module: ModuleType) -> str:
    """A hash of the Python files in a module's folder."""
    digest = hashlib.sha256()
    for path in sorted(Path(module.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"sha256 {digest.hexdigest()[:16]}"
