"""The implementations under test: ours by every entry point, others as `bench.rivals` calls them.

An implementation is a line in IMPLEMENTATIONS. Ours lack no feature of the table. torch is imported
only to run one: options are checked against the table without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from ..bench import case as bench_case
from ..bench import rivals as bench_rivals
from ..bench.rivals import Absent, Sources, first_line
from .cases import TransitionCase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..bench import problem as bench_problem
    from .problem import Problem


@dataclass(frozen=True)
class Implementation:
    """One implementation of the triangle multiplication, of the transition or of both.

    run: its output for a problem on its device; raises `Absent` for one that it doesn't take.
    missing: why it can't run on a device here, or None if it can. lacks: features of `cases` that
    it doesn't have, and a reason for each. on_cpu: it takes CPU tensors, whatever device is asked
    for.
    """

    name: str
    run: Callable[[Problem, Sources], Tensor]
    missing: Callable[[torch.device, Sources], str | None]
    lacks: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False
    on_cpu: bool = False

    def device(self, asked_for: torch.device) -> torch.device:
        """The device of its tensors."""
        import torch

        return torch.device("cpu") if self.on_cpu else asked_for


def _ours(problem: Problem, sources: Sources) -> Tensor:
    """The public function; the one with a residual where the case needs that."""
    case = problem.case
    if isinstance(case, TransitionCase):
        return sources.kernel.swiglu_transition(
            problem.x, **problem.weights, **problem.biases, residual=problem.residual,
            eps=case.eps, precision=case.precision, lengths=problem.lengths,
            inplace=case.residual == "overwritten",
        )  # fmt: skip
    options = {
        "mask": problem.mask, "eps": case.eps, "precision": case.precision, "memory": case.memory,
    }  # fmt: skip
    if problem.lengths is not None:
        options["lengths"] = problem.lengths
    if not case.with_residual:
        update = sources.kernel.triangle_multiplicative_update
        return update(problem.x, case.direction, **problem.weights, **problem.biases, **options)
    return sources.kernel.triangle_multiplicative_update_with_residual(
        problem.x, case.direction, problem.residual, problem.drop_mask,
        **problem.weights, **options, inplace=case.residual == "overwritten",
    )  # fmt: skip


def _our_layer(problem: Problem, sources: Sources) -> Tensor:
    """The Hub layer's forward, in transformers' module."""
    call = bench_rivals.in_tree(_for_benchmark(problem), sources)
    forward = sources.kernel.layers.ESMFold2TriangleMultiplication.forward
    return forward(call.function, *call.args)


def _rival(make: bench_rivals.Maker, problem: Problem, sources: Sources) -> Tensor:
    return make(_for_benchmark(problem), sources)()


def _in_tree(problem: Problem, sources: Sources) -> Tensor:
    """transformers' module; a transition that adds another tensor than x is called by its parts."""
    if not isinstance(problem.case, TransitionCase):
        return _rival(bench_rivals.in_tree, problem, sources)
    case = problem.case
    module = bench_rivals.transition_module(case, problem.weights, case.eps)
    if case.residual == "pair" and case.rows:
        return module(problem.x)
    update = module.mlp(module.norm(problem.x))
    return update if problem.residual is None else problem.residual + update


def _published(problem: Problem, sources: Sources) -> Tensor:
    channels = problem.case.channels
    if channels < 64 or channels & (channels - 1):
        raise Absent("C must be a power of two and at least 64")
    return _rival(bench_rivals.published, problem, sources)


def _cuequivariance(norm_dtype: str, problem: Problem, sources: Sources) -> Tensor:
    if problem.case.channels % 32 or problem.case.hidden % 32:
        raise Absent("C and D are to be multiples of 32")
    make = partial(bench_rivals.cuequivariance, norm_dtype=norm_dtype)
    return _rival(make, problem, sources)


def _for_benchmark(problem: Problem) -> bench_problem.Problem:
    """The problem as the benchmark's makers of calls take it."""
    from ..bench import problem as bench_problem

    case = problem.case
    shape = bench_case.Case(case.channels, case.length, case.dtype, case.direction)
    return bench_problem.Problem(
        shape, problem.x, problem.weights, problem.mask, None, case.eps, problem.biases,
        problem.residual, problem.drop_mask, case.precision,
    )  # fmt: skip


def _not_on_path(path: str, device: torch.device, sources: Sources) -> str | None:
    """Why our calls on a device don't take this path."""
    import torch

    found = sources.kernel.paths.execution_path(device, torch.bfloat16)
    return None if found.name == path else found.reason


def _no_transformers(device: torch.device, sources: Sources) -> str | None:
    try:
        from transformers.models.esmfold2 import modeling_esmfold2  # noqa: F401
    except ImportError as error:
        return f"no transformers with ESMFold2 ({first_line(error)})"
    return None


def _no_published(device: torch.device, sources: Sources) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    found = sources.published_module()
    return found if isinstance(found, str) else None


def _no_cuequivariance(device: torch.device, sources: Sources) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    try:
        import cuequivariance_ops_torch  # noqa: F401
        import cuequivariance_torch  # noqa: F401
    except ImportError as error:
        return first_line(error)
    return None


_OURS_ALONE = {
    "lengths": "has no lengths",
    "lean memory": "has no lean mode",
    "result over the residual": "has no inplace",
    "fp16x3": "has no such word",
}
_ONE_BATCH = {
    "no leading dimension": "takes x [B, L, L, C]",
    "several leading dimensions": "takes x [B, L, L, C]",
    "broadcast mask": "takes a mask [B, L, L]",
    "x broadcast to the mask": "takes a mask [B, L, L]",
}
_NO_RESIDUAL = {"residual": "has no residual and no drop mask"}
_TRIANGLES_ALONE = {"transition": "is no transition"}
_MODULE_LACKS = {
    **_OURS_ALONE,
    **_ONE_BATCH,
    **_NO_RESIDUAL,
    "D != C": "has one width",
    "linear biases": "its projections have no biases",
    "absent norm weights": "its norms have parameters",
    "precision": "has no precision",
}
_IN_TREE_LACKS = {**_MODULE_LACKS, "16-bit norm weights": "keeps its norms in float32"}
_LAYER_LACKS = {**_MODULE_LACKS, **_TRIANGLES_ALONE}
_PUBLISHED_LACKS = {
    **_TRIANGLES_ALONE,
    **{feature: reason for feature, reason in _MODULE_LACKS.items() if feature != "residual"},
    "float16": "computes in bfloat16 alone",
    "float32": "computes in bfloat16 alone",
}
_CUEQUIVARIANCE_LACKS = {
    **_TRIANGLES_ALONE,
    **_OURS_ALONE,
    **_NO_RESIDUAL,
    "broadcast mask": "takes a mask [..., L, L]",
    "x broadcast to the mask": "takes a mask [..., L, L]",
}
_CUEQUIVARIANCE_16_LACKS = {
    **_CUEQUIVARIANCE_LACKS,
    "float16": "bfloat16 norms are for a bfloat16 pair",
    "float32": "bfloat16 norms are for a bfloat16 pair",
}

IMPLEMENTATIONS = (
    Implementation(
        "ours, ATen path", _ours, partial(_not_on_path, "aten"), ours=True, on_cpu=True
    ),
    Implementation("ours, Triton path", _ours, partial(_not_on_path, "triton"), ours=True),
    Implementation("ours, Hub layer", _our_layer, _no_transformers, _LAYER_LACKS, ours=True),
    Implementation("in-tree", _in_tree, _no_transformers, _IN_TREE_LACKS),
    Implementation("published", _published, _no_published, _PUBLISHED_LACKS),
    Implementation(
        "cuequivariance, fp32 norms", partial(_cuequivariance, "float32"), _no_cuequivariance,
        _CUEQUIVARIANCE_LACKS,
    ),
    Implementation(
        "cuequivariance, bf16 norms", partial(_cuequivariance, "bfloat16"), _no_cuequivariance,
        _CUEQUIVARIANCE_16_LACKS,
    ),
)  # fmt: skip
