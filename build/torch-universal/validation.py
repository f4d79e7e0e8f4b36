"""Every check of the public functions' arguments, and every message that a caller can get.

A wrong shape, value or device is a ValueError, a wrong dtype or type is a TypeError; each names the
argument, what was expected and what came.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_LENGTH = 46_336  # the largest L whose padded plane has fewer than 2^31 elements
DIRECTIONS = ("outgoing", "incoming")
MEMORY_MODES = ("auto", "default", "lean")
RECOMPUTE_MODES = ("product", "all")
# The public words for `precision`, and what the kernels call them.
PRECISIONS = {"IEEE": "ieee", "TF32": "tf32", "TF32x3": "tf32x3", "bfloat16": "bf16"}


class Weights(NamedTuple):
    """The parameters of one triangle multiplication; C pair channels, D hidden channels."""

    norm_in_weight: Tensor | None  # [C]
    norm_in_bias: Tensor | None  # [C]
    p_in_weight: Tensor  # [2D, C], rows [0, D) make a, rows [D, 2D) make b
    p_in_bias: Tensor | None  # [2D]
    g_in_weight: Tensor  # [2D, C]
    g_in_bias: Tensor | None  # [2D]
    norm_out_weight: Tensor | None  # [D]
    norm_out_bias: Tensor | None  # [D]
    p_out_weight: Tensor  # [C, D]
    p_out_bias: Tensor | None  # [C]
    g_out_weight: Tensor  # [C, C]
    g_out_bias: Tensor | None  # [C]


def check_direction(direction: str) -> None:
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be 'outgoing' or 'incoming'; got {direction!r}")


def check_pair(name: str, pair: Tensor, leading: str) -> None:
    """The pair tensor itself: `leading` is "B" where exactly one leading dimension is wanted."""
    _check_is_tensor(name, pair)
    fits = pair.ndim == 4 if leading == "B" else pair.ndim >= 3
    if not fits or pair.shape[-3] != pair.shape[-2] or pair.shape[-1] == 0:
        raise ValueError(
            f"{name} must be [{leading}, L, L, C] with C of at least 1; got {tuple(pair.shape)}"
        )
    if pair.shape[-2] > MAX_LENGTH:
        raise NotImplementedError(
            f"{name} may have at most {MAX_LENGTH} residues, as one plane of L * L elements is "
            f"indexed in 32 bits; got L = {pair.shape[-2]}"
        )
    if pair.dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"{name} must be torch.bfloat16, torch.float16 or torch.float32; got {pair.dtype}"
        )


# Of each parameter, in the order of Weights: its axes, whether it is required, and whether it is a
# vector, whose dtype is free. One table, because the checks are a good part of a short call.
_PARAMETERS = (
    ("norm_in_weight", "[C]", False, True),
    ("norm_in_bias", "[C]", False, True),
    ("p_in_weight", "[2D, C]", True, False),
    ("p_in_bias", "[2D]", False, True),
    ("g_in_weight", "[2D, C]", True, False),
    ("g_in_bias", "[2D]", False, True),
    ("norm_out_weight", "[D]", False, True),
    ("norm_out_bias", "[D]", False, True),
    ("p_out_weight", "[C, D]", True, False),
    ("p_out_bias", "[C]", False, True),
    ("g_out_weight", "[C, C]", True, False),
    ("g_out_bias", "[C]", False, True),
)


def check_weights(pair_name: str, pair: Tensor, weights: Weights) -> None:
    """Shapes, dtypes and devices of all parameters against the pair tensor."""
    channels, dtype, device = pair.shape[-1], pair.dtype, pair.device
    p_in = weights.p_in_weight
    _check_is_tensor("p_in_weight", p_in)
    if p_in.ndim != 2 or p_in.shape[0] % 2 or p_in.shape[0] == 0 or p_in.shape[1] != channels:
        raise ValueError(
            f"p_in_weight must be [2D, C] with C = {channels}, the channels of {pair_name}; "
            f"got {tuple(p_in.shape)}"
        )
    hidden = p_in.shape[0] // 2
    shapes = {
        "[C]": (channels,),
        "[D]": (hidden,),
        "[2D]": (2 * hidden,),
        "[2D, C]": (2 * hidden, channels),
        "[C, D]": (channels, hidden),
        "[C, C]": (channels, channels),
    }
    for (name, axes, required, is_vector), value in zip(_PARAMETERS, weights, strict=True):
        if value is None and not required:
            continue
        _check_is_tensor(name, value)
        shape = shapes[axes]
        if value.shape != shape:
            raise ValueError(f"{name} must be {axes} = {list(shape)}; got {tuple(value.shape)}")
        if is_vector:
            if value.dtype not in COMPUTE_DTYPES:
                raise TypeError(
                    f"{name} must be torch.bfloat16, torch.float16 or torch.float32; "
                    f"got {value.dtype}"
                )
        elif value.dtype != dtype:
            raise TypeError(
                f"{name} must have the dtype of {pair_name}, {dtype}; got {value.dtype}"
            )
        if value.device != device:
            _refuse_device(name, value, pair_name, pair)


def broadcast_mask(mask: Tensor | None, pair_name: str, pair: Tensor) -> Tensor | None:
    """The pair mask as a [..., L, L] view over the pair tensor's leading dimensions."""
    if mask is None:
        return None
    _check_is_tensor("mask", mask)
    wanted = pair.shape[:-1]
    aligned = mask.shape == wanted or mask.ndim <= len(wanted) and all(
        have in (1, want)
        for have, want in zip(reversed(mask.shape), reversed(wanted), strict=False)
    )
    if not aligned:
        raise ValueError(
            f"mask must broadcast to {list(wanted)}, {pair_name} without its channels; "
            f"got {tuple(mask.shape)}"
        )
    if mask.dtype.is_complex:
        raise TypeError(f"mask must be bool or real; got {mask.dtype}")
    _check_device("mask", mask, pair_name, pair)
    return mask if mask.shape == wanted else mask.expand(wanted)


def check_residual(residual: Tensor | None, pair: Tensor) -> None:
    if residual is None:
        return
    _check_is_tensor("residual", residual)
    if residual.shape != pair.shape:
        raise ValueError(
            f"residual must have the shape of pair, {list(pair.shape)}; got {tuple(residual.shape)}"
        )
    if residual.dtype != pair.dtype:
        raise TypeError(f"residual must have the dtype of pair, {pair.dtype}; got {residual.dtype}")
    _check_device("residual", residual, "pair", pair)


def view_drop_mask(drop_mask: Tensor | None, pair: Tensor) -> Tensor | None:
    """drop_mask, [B, 1, L, C] or [B*L, C], as a [B, L, C] view."""
    if drop_mask is None:
        return None
    _check_is_tensor("drop_mask", drop_mask)
    batch, length, _, channels = pair.shape
    if tuple(drop_mask.shape) not in ((batch, 1, length, channels), (batch * length, channels)):
        raise ValueError(
            f"drop_mask must be [B, 1, L, C] = {[batch, 1, length, channels]} or "
            f"[B*L, C] = {[batch * length, channels]}; got {tuple(drop_mask.shape)}"
        )
    if drop_mask.dtype.is_complex:
        raise TypeError(f"drop_mask must be bool or real; got {drop_mask.dtype}")
    _check_device("drop_mask", drop_mask, "pair", pair)
    if drop_mask.ndim == 4:
        return drop_mask.squeeze(1)
    return drop_mask.reshape(batch, length, channels)


def check_memory(memory: str, name: str = "memory") -> None:
    if memory not in MEMORY_MODES:
        raise ValueError(f"{name} must be 'auto', 'default' or 'lean'; got {memory!r}")


def check_recompute(recompute: str, name: str = "recompute") -> None:
    if recompute not in RECOMPUTE_MODES:
        raise ValueError(f"{name} must be 'product' or 'all'; got {recompute!r}")


def check_inplace(inplace: bool, pair: Tensor, residual: Tensor | None, others: tuple) -> None:
    """Whether the result may be written over `residual`; `others` are the call's other tensors."""
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be a bool; got {type(inplace).__name__}")
    if not inplace:
        return
    if residual is None:
        raise ValueError("inplace writes the result over residual, which must be given; got None")
    if not residual.is_contiguous():
        raise ValueError(
            f"residual must be contiguous with inplace=True; got strides {residual.stride()}"
        )
    same = residual.data_ptr() == pair.data_ptr() and residual.stride() == pair.stride()
    memory = residual.untyped_storage().data_ptr()
    if (not same and pair.untyped_storage().data_ptr() == memory) or any(
        other is not None and other.untyped_storage().data_ptr() == memory for other in others
    ):
        raise ValueError(
            "residual must be pair itself, or share no memory with another argument, with "
            "inplace=True"
        )


def check_eps(name: str, eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < math.inf:
        raise ValueError(f"{name} must be a positive finite number; got {eps!r}")


def resolve_precision(precision: str | None, pair_name: str, pair: Tensor) -> str:
    """The kernels' word for `precision`; "default" follows torch's float32 matmul precision.

    Products of 16-bit operands are exact in the float32 accumulators, so for 16-bit inputs every
    word that applies to them means the same arithmetic.
    """
    if precision is None:
        return "default"
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision must be None, 'IEEE', 'TF32', 'TF32x3' or 'bfloat16'; got {precision!r}"
        )
    if precision == "bfloat16" and pair.dtype == torch.float16:
        raise ValueError(
            f"precision 'bfloat16' is for float32 and bfloat16 inputs; {pair_name} is {pair.dtype}"
        )
    return PRECISIONS[precision]


def _check_is_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")


def _check_device(name: str, value: Tensor, pair_name: str, pair: Tensor) -> None:
    if value.device != pair.device:
        _refuse_device(name, value, pair_name, pair)


def _refuse_device(name: str, value: Tensor, pair_name: str, pair: Tensor) -> None:
    raise ValueError(
        f"{name} must be on the device of {pair_name}, {pair.device}; got {value.device}"
    )
