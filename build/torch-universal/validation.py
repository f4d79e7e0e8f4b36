"""Every check of the public functions' arguments, and every message that a caller can get.

A wrong shape, value or device is a ValueError, a wrong dtype or type is a TypeError. Each names the
argument, the expected value and the actual one.
"""

import enum
import math
from itertools import zip_longest

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ._call import TransitionWeights, Weights

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_LENGTH = 46_336  # the largest L whose padded plane has fewer than 2^31 elements
DIRECTIONS = ("outgoing", "incoming")
MEMORY_MODES = ("auto", "default", "lean")
RECOMPUTE_MODES = ("none", "product", "all")
PARAMETER_GRADS = ("sum", "local")
LENGTHS_DTYPES = (torch.int32, torch.int64)
# The kernels take eps in float32, where a subnormal number may be flushed to 0.
_EPS_RANGE = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)
# The public words for `precision` in lower case, and the kernels' words; the kernels' "default"
# follows torch's setting. The public "DEFAULT" is cuEquivariance's word for Triton's own default.
PRECISIONS = {
    "none": "default", "default": "tf32", "tf32": "tf32", "tf32x3": "tf32x3", "ieee": "ieee",
    "fp16x3": "fp16x3", "bfloat16": "bf16", "bf16": "bf16",
}  # fmt: skip
# The values of cuEquivariance's enum `TriMulPrecision`.
_PRECISION_VALUES = {
    -1: "NONE", 0: "DEFAULT", 1: "TF32", 2: "TF32x3", 3: "IEEE", 4: "MXFP8", 5: "BFLOAT16",
}  # fmt: skip
# A normal distribution cut off at two standard deviations keeps this part of its standard
# deviation, and this share of its values: erf(2 / sqrt(2)).
_TRUNCATED_STD = 0.87962566103423978
_TRUNCATED_SHARE = math.erf(math.sqrt(2))


def check_direction(direction: str) -> None:
    if not _is_word(direction, DIRECTIONS):
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
    _check_dtype(name, pair)


def check_division(dim: int, length: int) -> None:
    """How a pair tensor is divided among ranks: L = `length` residues along the axis `dim`."""
    if not isinstance(dim, int) or isinstance(dim, bool) or dim not in (1, 2):
        raise ValueError(f"dim must be 1 or 2, an axis of residues; got {dim!r}")
    if isinstance(length, bool) or not isinstance(length, int) or length < 0:
        raise ValueError(f"length must be L, an integer of at least 0; got {length!r}")
    if length > MAX_LENGTH:
        raise NotImplementedError(
            f"length may be at most {MAX_LENGTH}, as one plane of L * L elements is indexed in 32 "
            f"bits; got {length}"
        )


def check_pair_local(
    name: str, pair: Tensor, leading: str, dim: int, length: int, rows: slice
) -> None:
    """A rank's part of a pair tensor: the residues `rows` of L = `length` along `dim`."""
    _check_is_tensor(name, pair)
    wanted = [rows.stop - rows.start, length][:: 1 if dim == 1 else -1]
    fits = pair.ndim == 4 if leading == "B" else pair.ndim >= 3
    if not fits or list(pair.shape[-3:-1]) != wanted or pair.shape[-1] == 0:
        axes = ", ".join(map(str, wanted))
        raise ValueError(
            f"{name} must be [{leading}, {axes}, C] with C of at least 1, residues {rows.start} to "
            f"{rows.stop} of L = {length} along dim {dim}, as torch.chunk divides them; "
            f"got {tuple(pair.shape)}"
        )
    _check_dtype(name, pair)


def check_rows(x: Tensor, of_pairs: bool) -> None:
    """The rows x [..., C] of a transition, which must be [..., L, L, C] if they are `of_pairs`."""
    if of_pairs:
        check_pair("x", x, leading="...")
        return
    _check_is_tensor("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., C] with C of at least 1; got {tuple(x.shape)}")
    _check_dtype("x", x)


# Each parameter in the order of Weights: its axes, whether it is required, and whether it is a
# vector, whose dtype is free. One table, because the checks take a good part of a short call.
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
    channels, p_in = pair.shape[-1], weights.p_in_weight
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
    _check_parameters(_PARAMETERS, weights, shapes, pair_name, pair)


_TRANSITION_PARAMETERS = (
    ("norm_weight", "[C]", False, True),
    ("norm_bias", "[C]", False, True),
    ("gate_weight", "[H, C]", True, False),
    ("gate_bias", "[H]", False, True),
    ("up_weight", "[H, C]", True, False),
    ("up_bias", "[H]", False, True),
    ("down_weight", "[C, H]", True, False),
    ("down_bias", "[C]", False, True),
)


def check_transition_weights(x: Tensor, weights: TransitionWeights) -> None:
    """Shapes, dtypes and devices of all parameters of a transition against x."""
    channels, gate = x.shape[-1], weights.gate_weight
    _check_is_tensor("gate_weight", gate)
    if gate.ndim != 2 or gate.shape[0] == 0 or gate.shape[1] != channels:
        raise ValueError(
            f"gate_weight must be [H, C] with C = {channels}, the channels of x; "
            f"got {tuple(gate.shape)}"
        )
    hidden = gate.shape[0]
    shapes = {
        "[C]": (channels,),
        "[H]": (hidden,),
        "[H, C]": (hidden, channels),
        "[C, H]": (channels, hidden),
    }
    _check_parameters(_TRANSITION_PARAMETERS, weights, shapes, "x", x)


def _check_parameters(
    table: tuple, weights: tuple, shapes: dict[str, tuple[int, ...]], name_of_x: str, x: Tensor
) -> None:
    """The weights against a table like `_PARAMETERS`, with the shapes of its axes."""
    dtype, device = x.dtype, x.device
    for (name, axes, required, is_vector), value in zip(table, weights, strict=True):
        if value is None and not required:
            continue
        if not isinstance(value, Tensor):
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
                f"{name} must have the dtype of {name_of_x}, {dtype}; got {value.dtype}"
            )
        if value.device != device:
            _refuse_device(name, value, name_of_x, x)


def default_projections(pair: Tensor, weights: Weights) -> Weights:
    """`weights` with random projections where they are None, as cuEquivariance makes them.

    LeCun's initialisation: a normal distribution of variance 1 / (input channels), cut off at two
    standard deviations, from torch's generator of the pair tensor's device. D comes from a given
    projection; without one it is C.
    """
    value, gate, emit = weights.p_in_weight, weights.g_in_weight, weights.p_out_weight
    if not (value is None or gate is None or emit is None or weights.g_out_weight is None):
        return weights
    channels = hidden = pair.shape[-1]
    for name, given, axes, axis, per_channel in (
        ("p_in_weight", value, "[2D, C]", 0, 2),
        ("g_in_weight", gate, "[2D, C]", 0, 2),
        ("p_out_weight", emit, "[C, D]", 1, 1),
    ):
        if given is not None:
            # Otherwise a correct parameter would be blamed for not having the D of a wrong one.
            _check_is_tensor(name, given)
            if given.ndim != 2 or given.shape[axis] < per_channel:
                raise ValueError(
                    f"{name} must be {axes} with C = {channels}; got {tuple(given.shape)}"
                )
            hidden = given.shape[axis] // per_channel
            break
    shapes = {
        "p_in_weight": (2 * hidden, channels),
        "g_in_weight": (2 * hidden, channels),
        "p_out_weight": (channels, hidden),
        "g_out_weight": (channels, channels),
    }
    made = {}
    for name, shape in shapes.items():
        if getattr(weights, name) is None:
            # By the inverse of the cumulative distribution: torch.nn.init.trunc_normal_ redraws the
            # values outside, for which it waits for the device, and which can't be compiled.
            drawn = torch.rand(shape, dtype=torch.float32, device=pair.device)
            std = shape[1] ** -0.5 / _TRUNCATED_STD
            normal = torch.erfinv((2 * drawn - 1) * _TRUNCATED_SHARE) * math.sqrt(2)
            made[name] = (normal * std).to(pair.dtype)
    return weights._replace(**made)


def broadcast_leading(
    mask: Tensor | None, pair_name: str, pair: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The pair tensor and its mask [..., L, L], with the same leading dimensions, as views."""
    leading = pair.shape[:-3]
    if isinstance(mask, Tensor) and mask.ndim > 2 and mask.shape[:-2] != leading:
        axes = [*zip_longest(reversed(leading), reversed(mask.shape[:-2]), fillvalue=1)]
        # If they don't broadcast, `broadcast_mask` raises.
        if all(have == other or have == 1 or other == 1 for have, other in axes):
            wanted = [other if have == 1 else have for have, other in reversed(axes)]
            pair = pair.expand(*wanted, *pair.shape[-3:])
    return pair, broadcast_mask(mask, pair_name, pair)


def broadcast_mask(mask: Tensor | None, pair_name: str, pair: Tensor) -> Tensor | None:
    """The pair mask as a [..., L, L] view over the pair tensor's leading dimensions."""
    if mask is None:
        return None
    _check_is_tensor("mask", mask)
    wanted = pair.shape[:-1]
    if mask.ndim < 2 or mask.shape[-2:] != wanted[-2:]:
        rows, length = wanted[-2:]
        if rows != length:
            raise ValueError(
                f"mask must be [..., {rows}, {length}], a number for each pair of {pair_name}; "
                f"got {tuple(mask.shape)}"
            )
        raise ValueError(
            f"mask must be [..., L, L] with L = {length}, a number for each pair of residues; "
            f"got {tuple(mask.shape)}. A mask of residues? Use m[..., :, None] * m[..., None, :], "
            "or lengths="
        )
    if mask.shape != wanted and not broadcasts_to(mask.shape, wanted):
        raise ValueError(
            f"mask must broadcast to {list(wanted)}, {pair_name} without its channels; "
            f"got {tuple(mask.shape)}"
        )
    _check_mask_dtype("mask", mask)
    _check_device("mask", mask, pair_name, pair)
    return mask if mask.shape == wanted else mask.expand(wanted)


def broadcast_lengths(lengths: Tensor | None, pair_name: str, pair: Tensor) -> Tensor | None:
    """The lengths as int32 [B], B the number of sequences; their values are not read."""
    if lengths is None:
        return None
    leading = pair.shape[:-3]
    if not isinstance(lengths, Tensor):
        raise TypeError(
            f"lengths must be a torch.Tensor on {pair.device}, made once for many calls; "
            f"got {type(lengths).__name__}"
        )
    if lengths.dtype not in LENGTHS_DTYPES:
        raise TypeError(f"lengths must be torch.int32 or torch.int64; got {lengths.dtype}")
    if not broadcasts_to(lengths.shape, leading):
        wanted = f"be one number, as {pair_name} is one sequence"
        if leading:
            wanted = f"broadcast to {list(leading)}, one for each sequence of {pair_name}"
        raise ValueError(f"lengths must {wanted}; got {tuple(lengths.shape)}")
    _check_device("lengths", lengths, pair_name, pair)
    if lengths.dtype == torch.int64:  # a large length would wrap around in 32 bits
        lengths = lengths.clamp(0, max(pair.shape[-3:-1]))
    return lengths.to(torch.int32).expand(leading).reshape(leading.numel()).contiguous()


def lengths_from_mask(mask: Tensor) -> Tensor:
    """The argument `lengths` that is equivalent to a right-padded pair mask.

    It reads the mask, for which it waits for the device: call it once for many calls.

    Args:
        mask: [..., L, L], bool or real, whose entry (i, j) is 1 where both i and j are less than
            the sequence's length, and 0 elsewhere.

    Returns:
        [...] int32, on the device of mask.

    Raises:
        ValueError: a mask of another form.
        TypeError: a mask that is no tensor, or complex.
    """
    _check_is_tensor("mask", mask)
    if mask.ndim < 2 or mask.shape[-1] != mask.shape[-2]:
        raise ValueError(f"mask must be [..., L, L]; got {tuple(mask.shape)}")
    _check_mask_dtype("mask", mask)
    if mask.is_meta:
        raise ValueError("mask must be on a device that has numbers; got meta")
    length = mask.shape[-1]
    lengths = (mask.diagonal(dim1=-2, dim2=-1) != 0).sum(-1).to(torch.int32)
    wanted = pairs_within(lengths, length).to(mask.dtype)
    if not torch.equal(mask, wanted):
        where = (mask != wanted).nonzero()[0].tolist()
        raise ValueError(
            "mask must be 1 where both residues are within a sequence's length and 0 elsewhere; "
            f"got {mask[tuple(where)].item()} at {where}"
        )
    return lengths


def pairs_within(lengths: Tensor, length: int) -> Tensor:
    """[..., L, L] bool: where both residues of a pair are within their sequence's length [...]."""
    within = torch.arange(length, device=lengths.device) < lengths[..., None]
    return within[..., :, None] & within[..., None, :]


def check_residual(residual: Tensor | None, name: str, x: Tensor) -> None:
    """The residual against the tensor `name`, whose update is added to it."""
    if residual is None:
        return
    _check_is_tensor("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have the shape of {name}, {list(x.shape)}; got {tuple(residual.shape)}"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have the dtype of {name}, {x.dtype}; got {residual.dtype}")
    _check_device("residual", residual, name, x)


def view_drop_mask(drop_mask: Tensor | None, pair: Tensor) -> Tensor | None:
    """drop_mask, [B, 1, L, C] or [B*L, C], as a [B, L, C] view; L is the second axis of pairs."""
    if drop_mask is None:
        return None
    _check_is_tensor("drop_mask", drop_mask)
    batch, _, length, channels = pair.shape
    if tuple(drop_mask.shape) not in ((batch, 1, length, channels), (batch * length, channels)):
        raise ValueError(
            f"drop_mask must be [B, 1, L, C] = {[batch, 1, length, channels]} or "
            f"[B*L, C] = {[batch * length, channels]}; got {tuple(drop_mask.shape)}"
        )
    _check_mask_dtype("drop_mask", drop_mask)
    _check_device("drop_mask", drop_mask, "pair", pair)
    if drop_mask.ndim == 4:
        return drop_mask.squeeze(1)
    return drop_mask.reshape(batch, length, channels)


def check_memory(memory: str, name: str = "memory") -> None:
    if not _is_word(memory, MEMORY_MODES):
        raise ValueError(f"{name} must be 'auto', 'default' or 'lean'; got {memory!r}")


def check_recompute(recompute: str, name: str = "recompute") -> None:
    if not _is_word(recompute, RECOMPUTE_MODES):
        raise ValueError(f"{name} must be 'none', 'product' or 'all'; got {recompute!r}")


def check_parameter_grads(parameter_grads: str) -> None:
    if not _is_word(parameter_grads, PARAMETER_GRADS):
        raise ValueError(f"parameter_grads must be 'sum' or 'local'; got {parameter_grads!r}")


def check_inplace(
    inplace: bool, name: str, x: Tensor, residual: Tensor | None, others: dict[str, Tensor | None]
) -> None:
    """Raises if the result can't be written over `residual`, with x, called `name`, and others."""
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be a bool; got {type(inplace).__name__}")
    if not inplace:
        return
    if torch._C._are_functorch_transforms_active():
        raise ValueError("inplace must be False under the transforms of torch.func; got True")
    if residual is None:
        raise ValueError("inplace writes the result over residual, which must be given; got None")
    if not residual.is_contiguous():
        raise ValueError(
            f"residual must be contiguous with inplace=True; got strides {residual.stride()}"
        )
    if residual.numel() == 0:
        return
    if _is_traced(residual):
        return  # tensors without addresses; the traced op writes over the residual all the same
    same = residual.data_ptr() == x.data_ptr() and residual.stride() == x.stride()
    memory = residual.untyped_storage().data_ptr()
    for other_name, other in ((name, None if same else x), *others.items()):
        # Other types are refused by their own checks.
        if isinstance(other, Tensor) and other.untyped_storage().data_ptr() == memory:
            raise ValueError(
                f"residual must be {name} itself, or share no memory with another argument, with "
                f"inplace=True; got memory of {other_name}"
            )


def check_eps(name: str, eps: float) -> None:
    least, most = _EPS_RANGE
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not least <= eps <= most:
        raise ValueError(f"{name} must be a positive finite number, in float32 too; got {eps!r}")


def resolve_precision(
    precision: str | int | enum.Enum | None, pair_name: str, pair: Tensor
) -> str:
    """The kernels' word for `precision`; "default", of float32 inputs, follows torch's setting.

    Products of 16-bit operands are exact in the float32 accumulators, so for 16-bit inputs every
    word that applies to them means the same arithmetic.
    """
    if precision is None:
        return "default" if pair.dtype == torch.float32 else "fp32"
    word = precision.name if isinstance(precision, enum.Enum) else precision
    if isinstance(word, int) and not isinstance(word, bool):
        word = _PRECISION_VALUES.get(word)
    kernel_word = PRECISIONS.get(word.lower()) if isinstance(word, str) else None
    if kernel_word is None:
        raise ValueError(
            "precision must be None, 'IEEE', 'TF32', 'TF32x3', 'fp16x3' or 'bfloat16', or a member "
            f"of cuEquivariance's TriMulPrecision other than MXFP8; got {precision!r}"
        )
    if kernel_word == "bf16" and pair.dtype == torch.float16:
        raise ValueError(
            "precision must be another word than 'bfloat16' where "
            f"{pair_name} is torch.float16; got {precision!r}"
        )
    of_float32 = kernel_word in ("default", "fp16x3")
    return "fp32" if of_float32 and pair.dtype != torch.float32 else kernel_word


def torch_allows_tf32() -> bool:
    """Whether torch's own float32 GEMMs on a GPU may take TF32, by whichever setting was used."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to answer once torch 2.9's setting was used
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _is_word(value: str, words: tuple[str, ...]) -> bool:
    return isinstance(value, str) and value in words


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"{name} must be torch.bfloat16, torch.float16 or torch.float32; got {x.dtype}"
        )


def _check_is_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")


def _is_traced(tensor: Tensor) -> bool:
    """Whether the tensor has no memory of its own: under tracers, and fake tensors."""
    return tensor.is_meta or isinstance(tensor, (FakeTensor, FunctionalTensor)) or (
        torch.compiler.is_compiling()
    )


def broadcasts_to(shape: torch.Size, wanted: torch.Size) -> bool:
    return len(shape) <= len(wanted) and all(
        have in (1, want) for have, want in zip(reversed(shape), reversed(wanted), strict=False)
    )


def _check_mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype.is_complex:
        raise TypeError(f"{name} must be bool or real; got {mask.dtype}")


def _check_device(name: str, value: Tensor, pair_name: str, pair: Tensor) -> None:
    if value.device != pair.device:
        _refuse_device(name, value, pair_name, pair)


def _refuse_device(name: str, value: Tensor, pair_name: str, pair: Tensor) -> None:
    raise ValueError(
        f"{name} must be on the device of {pair_name}, {pair.device}; got {value.device}"
    )
