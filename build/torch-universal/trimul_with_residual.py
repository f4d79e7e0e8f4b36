"""Entry points: the two public functions, the registered ops, and which path runs.

CUDA, ROCm and XPU tensors run the Triton kernels, CPU tensors the ATen path (or, with
TRITON_INTERPRET=1 set before the import, the Triton kernels in Triton's interpreter), with
gradients as without. Forward-mode AD and the transforms of torch.func follow the formula in plain
PyTorch. An accelerator's call that does not run Triton says why, once, in the log.
"""

import contextlib
import enum
import functools
import importlib
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import aten, aten_backward, gradients
from ._ops import add_op_namespace_prefix, ops
from .validation import (
    COMPUTE_DTYPES,
    Weights,
    broadcast_leading,
    broadcast_lengths,
    broadcast_mask,
    check_direction,
    check_eps,
    check_inplace,
    check_memory,
    check_pair,
    check_recompute,
    check_residual,
    check_weights,
    default_projections,
    resolve_precision,
    torch_allows_tf32,
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
    precision: str | int | enum.Enum | None = None,
    memory: str = "auto",
    recompute: str = "product",
    inplace: bool = False,
    lengths: Tensor | None = None,
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
        precision: arithmetic of float32 inputs: "IEEE", "TF32x3", "TF32" or "bfloat16" operands, in
            upper or lower case, or a member or value of cuEquivariance's TriMulPrecision; None
            follows torch's own setting (torch.backends.cuda.matmul.allow_tf32, or
            torch.set_float32_matmul_precision, which is the same). It bounds the Triton kernels;
            the ATen path follows torch's own settings, which on a CPU are the more exact.
        memory: "default" is the fastest; it holds three tensors of the pair's size beyond its
            arguments. "lean" holds at most one and a half, its result included, and takes longer.
            "auto" is "default", and "lean" where an allocation of that fails, which the log says
            once. It is about the Triton kernels; the ATen path has one way.
        recompute: what a backward computes again. "product" keeps the product of a and b for it,
            one tensor of the pair's size beside the inputs, in the default mode whatever `memory`
            says; "all" keeps the inputs alone and takes longer. Without a gradient nothing is kept.
        inplace: write the result over residual and return residual, which must be contiguous, and
            be pair itself or share no memory with another argument. Not where a gradient is needed.
        lengths: [B], int32 or int64, on the device of pair: sequence b has lengths[b] residues, and
            the rest of its L is padding on the right. A pair with a padded residue is masked, and
            its update is zero: its output is the residual, or 0. Tiles of padding are skipped, in
            all kernels, forward and backward, without a look at the lengths from the host (the ATen
            path takes one). Lengths beyond [0, L] count as 0 or L.

    An enclosing torch.autocast changes nothing: the dtype of pair decides.

    Returns:
        [B, L, L, C] in the dtype of pair, contiguous. In lean mode it may be the beginning of a
        storage that is a few per cent longer.

    Raises:
        ValueError: a direction, shape, device, eps, precision, memory, recompute or inplace that
            doesn't fit.
        TypeError: an argument that is no tensor, or of a dtype that doesn't fit.
        NotImplementedError: L above 46,336.
    """
    weights = Weights(
        norm_in_weight, norm_in_bias, p_in_weight, None, g_in_weight, None,
        norm_out_weight, norm_out_bias, p_out_weight, None, g_out_weight, None,
    )  # fmt: skip
    return _update(
        request_with_residual(
            pair, direction, residual, drop_mask, weights, mask, eps, eps_out, precision, memory,
            recompute, inplace, lengths,
        )
    )  # fmt: skip


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
    precision: str | int | enum.Enum | None = None,
    *,
    memory: str = "auto",
    recompute: str = "product",
    lengths: Tensor | None = None,
) -> Tensor:
    """The triangle multiplication of x, with the signature of `cuequivariance_torch`'s function.

    AlphaFold 2, Supplementary Methods 1.6.5, Algorithm 11 (outgoing) and Algorithm 12 (incoming).

    Args:
        x: [..., L, L, C] with any number of leading dimensions; bfloat16, float16 or float32; any
            strides (it is copied if its leading dimensions, once they have been broadcast to those
            of mask, can't be merged into one as a view).
        direction: "outgoing" (sum over k of a[i, k] b[j, k]) or "incoming" (a[k, i] b[k, j]).
        mask: pair mask [..., L, L], bool or real; multiplies a and b. Its leading dimensions and
            those of x broadcast with each other, its residue axes to those of x.
        norm_in_weight, norm_in_bias: [C]; None means ones and zeros.
        p_in_weight, g_in_weight: [2D, C] in the dtype of x; rows [0, D) make a.
        norm_out_weight, norm_out_bias: [D]; None means ones and zeros.
        p_out_weight, g_out_weight: [C, D] and [C, C] in the dtype of x. A projection that is None
            is drawn at random in each call, for trials (see docs/cuequivariance.md).
        p_in_bias, g_in_bias, p_out_bias, g_out_bias: [2D], [2D], [C], [C], or None.
        eps: added to the variance by both LayerNorms.
        precision, memory, recompute: as for `triangle_multiplicative_update_with_residual`.
        lengths: as there, with the leading dimensions of the result, or a shape that broadcasts to
            them.

    Returns:
        [..., L, L, C] in the dtype of x, contiguous, the leading dimensions those of x and mask
        together: the update, without a residual.

    Raises:
        ValueError: a direction, shape, device, eps, precision, memory or recompute that doesn't
            fit.
        TypeError: an argument that is no tensor, or of a dtype that doesn't fit.
        NotImplementedError: L above 46,336.
    """
    weights = Weights(
        norm_in_weight, norm_in_bias, p_in_weight, p_in_bias, g_in_weight, g_in_bias,
        norm_out_weight, norm_out_bias, p_out_weight, p_out_bias, g_out_weight, g_out_bias,
    )  # fmt: skip
    request, shape = request_of_any_rank(
        x, direction, mask, weights, eps, precision, memory, recompute, lengths
    )
    return _update(request).view(shape)


class Request(NamedTuple):
    """A call of either public function, checked."""

    x: Tensor  # [B, L, L, C]
    direction: str
    mask: Tensor | None  # [B, L, L]
    residual: Tensor | None  # like x
    drop_mask: Tensor | None  # [B, L, C]
    weights: Weights
    eps_in: float
    eps_out: float
    precision: str  # a kernels' word, or "default"
    memory: str
    recompute: str
    inplace: bool
    lengths: Tensor | None  # [B] int32

    @property
    def needs_grad(self) -> bool:
        tensors = (self.x, self.mask, self.residual, self.drop_mask, *self.weights)
        return torch.is_grad_enabled() and any([
            tensor is not None and tensor.requires_grad for tensor in tensors
        ])


def request_with_residual(
    pair: Tensor,
    direction: str,
    residual: Tensor | None,
    drop_mask: Tensor | None,
    weights: Weights,
    mask: Tensor | None,
    eps: float,
    eps_out: float | None,
    precision: str | int | enum.Enum | None,
    memory: str,
    recompute: str,
    inplace: bool,
    lengths: Tensor | None,
) -> Request:
    """The arguments of `triangle_multiplicative_update_with_residual`, checked."""
    check_direction(direction)
    check_pair("pair", pair, leading="B")
    check_weights("pair", pair, weights)
    check_residual(residual, pair)
    check_eps("eps", eps)
    if eps_out is not None:
        check_eps("eps_out", eps_out)
    check_memory(memory)
    check_recompute(recompute)
    request = Request(
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
        recompute,
        inplace,
        broadcast_lengths(lengths, "pair", pair),
    )
    check_inplace(inplace, pair, residual, (mask, drop_mask, lengths, *weights))
    return request


def request_of_any_rank(
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    weights: Weights,
    eps: float,
    precision: str | int | enum.Enum | None,
    memory: str,
    recompute: str,
    lengths: Tensor | None,
) -> tuple[Request, torch.Size]:
    """The arguments of `triangle_multiplicative_update`, checked, and the shape of its result."""
    check_direction(direction)
    check_pair("x", x, leading="...")
    weights = default_projections(x, weights)
    check_weights("x", x, weights)
    check_eps("eps", eps)
    check_memory(memory)
    check_recompute(recompute)
    x, mask = broadcast_leading(mask, "x", x)
    batch = x.shape[:-3].numel()
    request = Request(
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
        recompute,
        False,
        broadcast_lengths(lengths, "x", x),
    )
    return request, x.shape


class ExecutionPath(NamedTuple):
    """Which implementation runs, "triton" or "aten", and why, in a sentence."""

    name: str
    reason: str


@functools.cache
def execution_path(device: torch.device, dtype: torch.dtype) -> ExecutionPath:
    """The path that a call takes for tensors of this device and dtype."""
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


def _update(request: Request) -> Tensor:
    """The result [B, L, L, C]."""
    by_formula = forward_ad._current_level >= 0
    if by_formula or request.needs_grad:
        if request.inplace:
            raise ValueError("inplace must be False where a gradient is needed; got True")
        return _differentiable(request, by_formula)
    op = ops.trimul_fwd_ if request.inplace else ops.trimul_fwd
    out = op(
        request.x, request.direction, request.mask, request.residual, request.drop_mask,
        *request.weights, request.eps_in, request.eps_out, request.precision, request.memory,
        request.lengths,
    )  # fmt: skip
    return request.residual if request.inplace else out


def _differentiable(request: Request, by_formula: bool) -> Tensor:
    """The result, by what autograd can follow."""
    x, direction, mask, residual, drop_mask, weights, eps_in, eps_out, *_ = request
    if not (by_formula or torch._C._are_functorch_transforms_active()):
        return ops.trimul_fwd_saving(
            x, direction, mask, residual, drop_mask, *weights, eps_in, eps_out, request.precision,
            request.memory, request.recompute, request.lengths,
        )[0]  # fmt: skip
    if x.device.type != "cpu":
        _say("torch.func or forward-mode AD goes through it, which takes the formula")
    with torch.autocast(x.device.type, enabled=False):
        if request.lengths is None:
            return aten.trimul_differentiable(
                x, direction, mask, residual, drop_mask, weights, eps_in, eps_out
            )
        x, mask, within = aten.masked_by_lengths(x, mask, request.lengths)
        out = aten.trimul_differentiable(
            x, direction, mask, residual, drop_mask, weights, eps_in, eps_out
        )
        return aten.with_padding_left(out, within, residual)


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


def _trimul_fwd_saving(x: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    """The op on real tensors for calls that need a gradient: the output, and what is kept for it.

    With recompute="product" the second and third are t and the moments of x (these of the Triton
    path alone), otherwise both are empty.
    """
    *arguments, recompute, lengths = others
    if x.numel() == 0 or recompute == "all":
        product, moments = _empty_saved(x, *others)
        return _run(x, *arguments, lengths, inplace=False), product, moments
    direction, mask, residual, drop_mask, *values, eps_in, eps_out, precision, _ = arguments
    weights = Weights(*values)
    path = execution_path(x.device, x.dtype)
    if path.name == "aten":
        if x.device.type != "cpu":
            _say(path.reason)
        within = None
        if lengths is not None:
            x, mask, within = aten.masked_by_lengths(x, mask, lengths)
        with torch.autocast(x.device.type, enabled=False):
            out, product = aten.trimul_saving(
                x, direction, mask, residual, drop_mask, weights, eps_in, eps_out
            )
        if within is not None:
            out = aten.with_padding_left(out, within, residual)
        return out, product, x.new_empty(0, dtype=torch.float32)
    call = triton_call(
        x, direction, mask, residual, drop_mask, weights, eps_in, eps_out, precision, False,
        lengths,
    )  # fmt: skip
    with current_device(x):
        return _triton_path().run_triton_saving(call)


def _trimul_bwd(
    grad_out: Tensor,
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    drop_mask: Tensor | None,
    *others,
) -> tuple[Tensor, ...]:
    """The op on real tensors: a tensor for each name of `DIFFERENTIABLE`, empty if not in `needs`.

    A fixed number of tensors rather than a list, because vmap can loop over such an op.
    """
    *values, eps_in, eps_out, precision, product, moments, needs, lengths = others
    if x.numel() == 0:
        leaves = (x, mask, drop_mask, *values)
        return tuple([grad.zero_() for grad in _empty_gradients(*leaves, needs)])
    named = zip(gradients.DIFFERENTIABLE, needs, strict=True)
    names = frozenset([name for name, needed in named if needed])
    settings = Weights(*values), eps_in, eps_out
    # A backward under autocast must not lower the precision of the products, the vendor's included.
    with torch.autocast(x.device.type, enabled=False):
        if execution_path(x.device, x.dtype).name == "aten":
            if lengths is not None:
                x, mask, within = aten.masked_by_lengths(x, mask, lengths)
                grad_out = grad_out.masked_fill(~within[..., None], 0)
            found = aten_backward.trimul_backward(
                grad_out, x, direction, mask, drop_mask, *settings, product, names
            )
        else:
            call = triton_call(
                x, direction, mask, None, drop_mask, *settings, precision, False, lengths
            )
            with current_device(x):
                found = _triton_backward().run_triton_backward(
                    call, grad_out, product, moments, names
                )
    # What was not computed is an empty tensor of its own: outputs of an op share no memory.
    return tuple([
        found[name] if name in names else x.new_empty(0) for name in gradients.DIFFERENTIABLE
    ])


def _run(
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    residual: Tensor | None,
    drop_mask: Tensor | None,
    *others,
    inplace: bool,
) -> Tensor:
    *values, eps_in, eps_out, precision, memory, lengths = others
    weights = Weights(*values)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    path = execution_path(x.device, x.dtype)
    if path.name == "aten":
        if x.device.type != "cpu":
            _say(path.reason)
        with torch.autocast(x.device.type, enabled=False):
            arguments = x, direction, mask, residual, drop_mask, weights, eps_in, eps_out
            if lengths is None:
                out = aten.trimul_inference(*arguments)
            else:
                out = aten.trimul_of_lengths(*arguments, lengths)
        return residual.copy_(out) if inplace else out

    triton_path = _triton_path()
    call = triton_call(
        x, direction, mask, residual, drop_mask, weights, eps_in, eps_out, precision, inplace,
        lengths,
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


def triton_call(
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    residual: Tensor | None,
    drop_mask: Tensor | None,
    weights: Weights,
    eps_in: float,
    eps_out: float,
    precision: str,
    inplace: bool = False,
    lengths: Tensor | None = None,
) -> "TritonCall":  # noqa: F821 (of triton_path, which imports Triton)
    """The op's arguments as the Triton path takes them."""
    # The kernels index a parameter's last axis by the channel. A stride there would cost more than
    # a copy, and from tiles that lie the other way ptxas 12.8 (Triton 3.6 to 3.7.1) made sm_90
    # code that read shared memory at the wrong addresses: see docs/fuzzing.md.
    if any([v is not None and v.stride(-1) != 1 for v in weights]):
        values = [v if v is None or v.stride(-1) == 1 else v.contiguous() for v in weights]
        weights = Weights(*values)
    return _triton_path().TritonCall(
        x, direction, mask, residual, drop_mask, weights, eps_in, eps_out,
        kernel_precision(precision), inplace, lengths,
    )  # fmt: skip


@functools.cache
def _triton_path() -> ModuleType:
    """The module, imported where Triton is there and needed."""
    return importlib.import_module(".triton_path", __package__)


@functools.cache
def _triton_backward() -> ModuleType:
    """The module, imported where Triton is there and a gradient needed."""
    return importlib.import_module(".triton_backward", __package__)


def kernel_precision(precision: str) -> str:
    """The kernels' word where `precision` leaves it to torch's setting."""
    if precision != "default":
        return precision
    return "tf32" if torch_allows_tf32() else "fp32"


def current_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Within it x's device is the current one, which Triton launches on."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, x.device.type).device_of(x)


def _empty_saved(x: Tensor, *others) -> tuple[Tensor, Tensor]:
    """The second and third output of `trimul_fwd_saving`, not yet written; `others` are its own."""
    _, _, _, _, *values, _, _, _, _, recompute, _ = others
    product_shape, moments_shape = (0,), (0,)
    if recompute == "product":
        product_shape = aten.saved_shape(x, Weights(*values))
        if execution_path(x.device, x.dtype).name == "triton":
            batch, hidden, length, _ = product_shape
            pitch = _triton_path().padded_pitch(length)
            product_shape = (batch, hidden, length, pitch)
            moments_shape = (batch, 2, length, pitch)
    return x.new_empty(product_shape), x.new_empty(moments_shape, dtype=torch.float32)


def _empty_gradients(x: Tensor, *others) -> tuple[Tensor, ...]:
    """The outputs of `trimul_bwd`, not yet written; `others` are its other leaves, and `needs`."""
    *leaves, needs = others
    return tuple([
        leaf.new_empty(leaf.shape) if needed else x.new_empty(0)
        for leaf, needed in zip((x, *leaves), needs, strict=True)
    ])


def _trimul_fwd_fake(x: Tensor, *others) -> Tensor:
    return x.new_empty(x.shape)


def _trimul_fwd__fake(x: Tensor, *others) -> None:
    return None


def _trimul_fwd_saving_fake(x: Tensor, *others) -> tuple[Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape), *_empty_saved(x, *others))


def _trimul_bwd_fake(
    grad_out: Tensor,
    x: Tensor,
    direction: str,
    mask: Tensor | None,
    drop_mask: Tensor | None,
    *others,
) -> tuple[Tensor, ...]:
    *values, _, _, _, _, _, needs, _ = others
    return _empty_gradients(x, mask, drop_mask, *values, needs)


_WEIGHTS = (
    "Tensor? norm_in_weight, Tensor? norm_in_bias, Tensor p_in_weight, Tensor? p_in_bias, "
    "Tensor g_in_weight, Tensor? g_in_bias, Tensor? norm_out_weight, Tensor? norm_out_bias, "
    "Tensor p_out_weight, Tensor? p_out_bias, Tensor g_out_weight, Tensor? g_out_bias, "
    "float eps_in, float eps_out, str precision"
)
_FORWARD = (
    "Tensor x, str direction, Tensor? mask, {residual} residual, Tensor? drop_mask, "
    f"{_WEIGHTS}, str memory{{others}}, Tensor? lengths"
)
_BACKWARD = (
    "Tensor grad_out, Tensor x, str direction, Tensor? mask, Tensor? drop_mask, "
    f"{_WEIGHTS}, Tensor? product, Tensor? moments, bool[] needs, Tensor? lengths"
)
# Library.define rather than custom_op: its call costs a tenth of the Python time. A call without a
# gradient has ops of its own, which autograd has no part in.
_library = torch.library.Library(add_op_namespace_prefix("trimul_fwd").split("::")[0], "FRAGMENT")
for _name, _arguments, _returns, _function, _fake in (
    (
        "trimul_fwd", _FORWARD.format(residual="Tensor?", others=""), "Tensor",
        _trimul_fwd, _trimul_fwd_fake,
    ),
    (
        "trimul_fwd_", _FORWARD.format(residual="Tensor(a!)", others=""), "()",
        _trimul_fwd_, _trimul_fwd__fake,
    ),
    (
        "trimul_fwd_saving", _FORWARD.format(residual="Tensor?", others=", str recompute"),
        "(Tensor, Tensor, Tensor)", _trimul_fwd_saving, _trimul_fwd_saving_fake,
    ),
    (
        "trimul_bwd", _BACKWARD, f"({', '.join(['Tensor'] * len(gradients.DIFFERENTIABLE))})",
        _trimul_bwd, _trimul_bwd_fake,
    ),
):  # fmt: skip
    _library.define(f"{_name}({_arguments}) -> {_returns}")
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(_name), _fake, lib=_library)
for _name, _autograd_function in (
    ("trimul_fwd_saving", gradients.TriangleMultiplication),
    ("trimul_bwd", gradients.TriangleMultiplicationGradients),
):
    _library.impl(_name, gradients.autograd_kernel(_autograd_function, _name), "Autograd")
