"""Entry points: the two public functions, the registered op, and which path runs.

CUDA, ROCm and XPU tensors run the Triton kernels, CPU tensors the ATen path (or, with
TRITON_INTERPRET=1 set before the import, the Triton kernels in Triton's interpreter). A call that
needs gradients runs the ATen formula, which autograd follows. An accelerator's call that does not
run Triton says why, once, in the log.
"""

import contextlib
import functools
import importlib
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import aten
from ._ops import add_op_namespace_prefix, ops
from .validation import (
    COMPUTE_DTYPES,
    Weights,
    broadcast_mask,
    check_direction,
    check_eps,
    check_inplace,
    check_memory,
    check_pair,
    check_residual,
    check_weights,
    resolve_precision,
    view_drop_mask,
)

_logger = logging.getLogger(__name__)

# As Triton reads it; the kernels are interpreted only if it was set before Triton was imported.
_INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
_TRITON_DEVICES = ("cuda", "xpu")  # ROCm tensors are "cuda" to torch
_MIN_TRITON = (3, 6)
_MIN_CAPABILITY = (8, 0)


def triangle_multiplicative_update_with_residual(
    pair: Tensor,
    direction: str,
    residual: Tensor | None,
    drop_mask: Tensor | None,
    *,
    norm_in_weight: Tensor | None,
    norm_in_bias: Tensor | None,
    p_in_weight: Tensor,
    g_in_weight: Tensor,
    norm_out_weight: Tensor | None,
    norm_out_bias: Tensor | None,
    p_out_weight: Tensor,
    g_out_weight: Tensor,
    mask: Tensor | None = None,
    eps: float = 1e-5,
    eps_out: float | None = None,
    precision: str | None = None,
    memory: str = "auto",
    inplace: bool = False,
) -> Tensor:
    """`residual + drop_mask * TriangleMultiplication(pair)`, the update and the sum in one pass.

    AlphaFold 2, Supplementary Methods 1.6.5, Algorithm 11 (outgoing) and Algorithm 12 (incoming).

    Args:
        pair: [B, L, L, C], bfloat16, float16 or float32; any strides.
        direction: "outgoing" (sum over k of a[i, k] b[j, k]) or "incoming" (a[k, i] b[k, j]).
        residual: [B, L, L, C] in the dtype of pair, and may be pair itself; None gives the update
            alone, and then nothing is allocated or read for it.
        drop_mask: [B, 1, L, C] or [B*L, C], bool or real, shared over the first residue axis; or
            None.
        norm_in_weight, norm_in_bias: [C], any of the three dtypes (float32 beside bfloat16 tensors
            is used as it is); None means ones and zeros.
        p_in_weight, g_in_weight: [2D, C] in the dtype of pair; rows [0, D) make a, [D, 2D) make b.
        norm_out_weight, norm_out_bias: [D], as norm_in_*.
        p_out_weight, g_out_weight: [C, D] and [C, C] in the dtype of pair.
        mask: pair mask, bool or real, broadcastable to [B, L, L], or None; multiplies a and b.
        eps: added to the variance by the LayerNorm of pair, and by that of the product too unless
            eps_out is given.
        eps_out: the second LayerNorm's own eps.
        precision: arithmetic of float32 inputs: "IEEE", "TF32x3", "TF32" or "bfloat16" operands;
            None follows torch.get_float32_matmul_precision(). It bounds the Triton kernels; the
            ATen path follows torch's own settings, which on a CPU are the more exact.
        memory: "default" is the fastest; it holds three tensors of the pair's size beyond its
            arguments. "lean" holds at most one and a half, its result included, and takes longer.
            "auto" is "default", and "lean" where an allocation of that fails, which the log says
            once. It is about the Triton kernels; the ATen path has one way.
        inplace: write the result over residual and return residual, which must be contiguous, and
            be pair itself or share no memory with another argument. Not where a gradient is needed.

    An enclosing torch.autocast changes nothing: the dtype of pair decides.

    Returns:
        [B, L, L, C] in the dtype of pair, contiguous. In lean mode it may be the beginning of a
        storage that is a few per cent longer.

    Raises:
        ValueError: a direction, shape, device, eps, precision, memory or inplace that doesn't fit.
        TypeError: an argument that is no tensor, or of a dtype that doesn't fit.
    """
    check_direction(direction)
    check_pair("pair", pair, leading="B")
    weights = Weights(
        norm_in_weight, norm_in_bias, p_in_weight, None, g_in_weight, None,
        norm_out_weight, norm_out_bias, p_out_weight, None, g_out_weight, None,
    )  # fmt: skip
    check_weights("pair", pair, weights)
    check_residual(residual, pair)
    check_eps("eps", eps)
    if eps_out is not None:
        check_eps("eps_out", eps_out)
    check_memory(memory)
    check_inplace(inplace, pair, residual, (mask, drop_mask, *weights))
    return _update(
        pair,
        direction,
        broadcast_mask(mask, "pair", pair),
        residual,
        view_drop_mask(drop_mask, pair),
        weights,
        eps,
        eps if eps_out is None else eps_out,
        resolve_precision(precision, "pair", pair),
        memory,
        inplace,
    )


def triangle_multiplicative_update(
    x: Tensor,
    direction: str = "outgoing",
    mask: Tensor | None = None,
    norm_in_weight: Tensor | None = None,
    norm_in_bias: Tensor | None = None,
    p_in_weight: Tensor | None = None,
    p_in_bias: Tensor | None = None,
    g_in_weight: Tensor | None = None,
    g_in_bias: Tensor | None = None,
    norm_out_weight: Tensor | None = None,
    norm_out_bias: Tensor | None = None,
    p_out_weight: Tensor | None = None,
    p_out_bias: Tensor | None = None,
    g_out_weight: Tensor | None = None,
    g_out_bias: Tensor | None = None,
    eps: float = 1e-5,
    precision: str | None = None,
    *,
    memory: str = "auto",
) -> Tensor:
    """The triangle multiplication of x, with the signature of `cuequivariance_torch`'s function.

    AlphaFold 2, Supplementary Methods 1.6.5, Algorithm 11 (outgoing) and Algorithm 12 (incoming).

    Args:
        x: [..., L, L, C] with any number of leading dimensions; bfloat16, float16 or float32; any
            strides (it is copied if its leading dimensions can't be merged into one as a view).
        direction: "outgoing" (sum over k of a[i, k] b[j, k]) or "incoming" (a[k, i] b[k, j]).
        mask: pair mask, bool or real, broadcastable to [..., L, L]; multiplies a and b.
        norm_in_weight, norm_in_bias: [C]; None means ones and zeros.
        p_in_weight, g_in_weight: [2D, C] in the dtype of x, required; rows [0, D) make a.
        norm_out_weight, norm_out_bias: [D]; None means ones and zeros.
        p_out_weight, g_out_weight: [C, D] and [C, C] in the dtype of x, required.
        p_in_bias, g_in_bias, p_out_bias, g_out_bias: [2D], [2D], [C], [C], or None.
        eps: added to the variance by both LayerNorms.
        precision: arithmetic of float32 inputs: "IEEE", "TF32x3", "TF32" or "bfloat16" operands;
            None follows torch.get_float32_matmul_precision(). It bounds the Triton kernels; the
            ATen path follows torch's own settings, which on a CPU are the more exact.
        memory: "auto", "default" or "lean", as for `triangle_multiplicative_update_with_residual`.

    Returns:
        [..., L, L, C] in the dtype of x, contiguous: the update, without a residual.

    Raises:
        ValueError: a direction, shape, device, eps, precision or memory that doesn't fit.
        TypeError: an argument that is no tensor, or of a dtype that doesn't fit.
    """
    check_direction(direction)
    check_pair("x", x, leading="...")
    weights = Weights(
        norm_in_weight, norm_in_bias, p_in_weight, p_in_bias, g_in_weight, g_in_bias,
        norm_out_weight, norm_out_bias, p_out_weight, p_out_bias, g_out_weight, g_out_bias,
    )  # fmt: skip
    check_weights("x", x, weights)
    check_eps("eps", eps)
    check_memory(memory)
    mask = broadcast_mask(mask, "x", x)
    leading = x.shape[:-3]
    batch = leading.numel()
    out = _update(
        x.reshape(batch, *x.shape[-3:]),
        direction,
        None if mask is None else mask.reshape(batch, *mask.shape[-2:]),
        None,
        None,
        weights,
        eps,
        eps,
        resolve_precision(precision, "x", x),
        memory,
        inplace=False,
    )
    return out.view(x.shape)


class ExecutionPath(NamedTuple):
    """Which implementation runs, "triton" or "aten", and why, in a sentence."""

    name: str
    reason: str


@functools.cache
def execution_path(device: torch.device, dtype: torch.dtype) -> ExecutionPath:
    """The path that a call without gradients takes for tensors of this device and dtype."""
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"dtype must be torch.bfloat16, torch.float16 or torch.float32; got {dtype}"
        )
    if device.type == "cpu":
        if _INTERPRET:
            return ExecutionPath("triton", "TRITON_INTERPRET is set: Triton's interpreter")
        return ExecutionPath("aten", "CPU tensors run the ATen path")
    if device.type not in _TRITON_DEVICES:
        return ExecutionPath("aten", f"there are no Triton kernels for {device.type} tensors")
    try:
        import triton
    except ImportError as error:
        return ExecutionPath("aten", f"Triton can't be imported ({error})")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _MIN_TRITON:
        return ExecutionPath(
            "aten", f"Triton {triton.__version__} is older than {'.'.join(map(str, _MIN_TRITON))}"
        )
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return ExecutionPath(
                "aten",
                f"{name} has compute capability {capability[0]}.{capability[1]}; "
                f"the kernels need {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}",
            )
    return ExecutionPath("triton", f"Triton {triton.__version__} on {device.type}")


def _update(
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    residual: Tensor | None,
    drop_mask: Tensor | None,
    weights: Weights,
    eps_in: float,
    eps_out: float,
    precision: str,
    memory: str,
    inplace: bool,
) -> Tensor:
    """x [B, L, L, C], mask [B, L, L], residual like x, drop_mask [B, L, C], all of them checked."""
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (x, mask, residual, drop_mask, *weights)
    )
    if needs_grad or forward_ad._current_level >= 0:
        if inplace:
            raise ValueError("inplace must be False where a gradient is needed; got True")
        if x.device.type != "cpu":
            _say("a gradient is needed, and the Triton kernels have no backward")
        with torch.autocast(x.device.type, enabled=False):
            return aten.trimul_differentiable(
                x, direction, mask, residual, drop_mask, weights, eps_in, eps_out
            )
    if inplace:
        ops.trimul_fwd_(
            x, direction, mask, residual, drop_mask, *weights, eps_in, eps_out, precision, memory
        )
        return residual
    return ops.trimul_fwd(
        x, direction, mask, residual, drop_mask, *weights, eps_in, eps_out, precision, memory
    )


def _say(reason: str) -> None:
    """Once for each reason; a compiled caller says it while it is compiled."""
    _say_once(f"runs in plain PyTorch: {reason}")


# What torch.compiler.assume_constant_result does, without its import of Dynamo and Triton.
_say._dynamo_marked_constant = True


@functools.cache
def _say_once(what: str) -> None:
    _logger.warning("The triangle multiplication %s.", what)


def _trimul_fwd(x: Tensor, *others) -> Tensor:
    """The op on real tensors: three Triton launches, or ATen."""
    return _run(x, *others, inplace=False)


def _trimul_fwd_(x: Tensor, *others) -> None:
    """The op on real tensors that writes its result over the residual."""
    _run(x, *others, inplace=True)


def _run(
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    residual: Tensor | None,
    drop_mask: Tensor | None,
    *others,
    inplace: bool,
) -> Tensor:
    *values, eps_in, eps_out, precision, memory = others
    weights = Weights(*values)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    path = execution_path(x.device, x.dtype)
    if path.name == "aten":
        if x.device.type != "cpu":
            _say(path.reason)
        with torch.autocast(x.device.type, enabled=False):
            out = aten.trimul_inference(
                x, direction, mask, residual, drop_mask, weights, eps_in, eps_out
            )
        return residual.copy_(out) if inplace else out

    triton_path = _triton_path()
    # The kernels index a vector of parameters by its channel; the projections bring their strides.
    if any([v is not None and v.ndim == 1 and not v.is_contiguous() for v in values]):
        values = [v.contiguous() if v is not None and v.ndim == 1 else v for v in values]
        weights = Weights(*values)
    call = triton_path.TritonCall(
        x, direction, mask, residual, drop_mask, weights, eps_in, eps_out,
        kernel_precision(precision), inplace,
    )  # fmt: skip
    with current_device(x):
        if memory != "lean":
            try:
                return triton_path.run_triton(call)
            except torch.OutOfMemoryError:
                # Stage 3 allocates before it writes, so an inplace call has not begun to.
                if memory == "default":
                    raise
            _say_once("runs in lean mode: an allocation of the default mode failed")
        return triton_path.run_triton_lean(call)


@functools.cache
def _triton_path() -> ModuleType:
    """The module, imported where Triton is there and needed."""
    return importlib.import_module(".triton_path", __package__)


def kernel_precision(precision: str) -> str:
    """The kernels' word where `precision` leaves it to torch's setting."""
    if precision != "default":
        return precision
    return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def current_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Within it x's device is the current one, which Triton launches on."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, x.device.type).device_of(x)


def _trimul_fwd_fake(x: Tensor, *others) -> Tensor:
    return x.new_empty(x.shape)


def _trimul_fwd__fake(x: Tensor, *others) -> None:
    return None


_ARGUMENTS = (
    "Tensor x, str direction, Tensor? mask, {residual} residual, Tensor? drop_mask, "
    "Tensor? norm_in_weight, Tensor? norm_in_bias, Tensor p_in_weight, Tensor? p_in_bias, "
    "Tensor g_in_weight, Tensor? g_in_bias, Tensor? norm_out_weight, Tensor? norm_out_bias, "
    "Tensor p_out_weight, Tensor? p_out_bias, Tensor g_out_weight, Tensor? g_out_bias, "
    "float eps_in, float eps_out, str precision, str memory"
)
# Library.define rather than custom_op: its call costs a tenth of the Python time.
_library = torch.library.Library(add_op_namespace_prefix("trimul_fwd").split("::")[0], "FRAGMENT")
for _name, _residual, _returns, _function, _fake in (
    ("trimul_fwd", "Tensor?", "Tensor", _trimul_fwd, _trimul_fwd_fake),
    ("trimul_fwd_", "Tensor(a!)", "()", _trimul_fwd_, _trimul_fwd__fake),
):
    _library.define(f"{_name}({_ARGUMENTS.format(residual=_residual)}) -> {_returns}")
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(_name), _fake, lib=_library)
