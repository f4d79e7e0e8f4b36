"""What each schedule needs: prepared launches by kind of call, calls as kernels take them."""

import contextlib

import torch
from torch import Tensor

from .. import hopper
from .._call import Call, Transition
from .._plan import Plan
from ..triton_parts.launch import Launches
from ..triton_parts.rehearsal import twin
from ..triton_parts.split_operands import FP16X3, is_default, refusal
from ..triton_parts.tiles import padded_pitch
from ..validation import torch_allows_tf32

_MOST_KINDS = 1024
# The pairs of the sequences that are run at once, if a batch has more.
_FILLING_PAIRS = 2**18
# The bytes of D planes below which a training step has them small: it takes more memory then, for
# fewer launches.
SMALL_PLANES = 192 << 20
_launches: dict[tuple, Launches] = {}


def launches_of(call: Call | Transition, *what: object) -> Launches:
    """The launches for calls of this kind; `what` is the rest of the cache key."""
    key = (what, *_kind(call))
    found = _launches.get(key)
    if found is None:
        if len(_launches) >= _MOST_KINDS:
            _launches.clear()
        found = _launches[key] = Launches()
    return found


def _kind(call: Call | Transition) -> tuple:
    """The cache key of a call: everything that its launches depend on.

    Of the addresses these are the remainders modulo 16 and the paired projections' distance.
    """
    x, weights = call.x, call.weights
    if isinstance(call, Call):
        own = call.direction, call.eps_in, call.eps_out, weights.p_in_weight.shape[0]
        pair = weights.p_in_weight, weights.g_in_weight
        tensors = x, call.mask, call.residual, call.drop_mask, *weights
    else:
        own = call.eps, weights.down_weight.shape[1]
        pair = weights.up_weight, weights.gate_weight
        tensors = x, call.residual, *weights
    return (
        x.shape,
        x.device,
        call.precision,
        call.inplace,
        call.lengths is None,
        hopper.plain_only(),
        pair[1].data_ptr() - pair[0].data_ptr(),
        *own,
        *[None if t is None else (t.dtype, t.stride(), t.data_ptr() % 16) for t in tensors],
    )


def twin_of(call: Call | Transition) -> Call | Transition:
    """The call on the meta device, for a rehearsal."""
    return call.of(tuple([twin(v) if isinstance(v, Tensor) else v for v in call.flat()]))


def notes_on_precision(given: Call | Transition, call: Call | Transition) -> list[str]:
    """Which float32 products a call has, as it was given, where they are not those asked for."""
    if call.x.dtype != torch.float32:
        return []
    wanted, reason, notes = wants_split(call._replace(precision=given.precision)), refusal(call), []
    if given.precision == FP16X3 and reason is not None:
        notes.append(f"precision 'fp16x3' is run as TF32x3: {reason}")
    elif wanted and reason is not None:
        notes.append(f"products are not the default's, 'fp16x3': {reason}")
    elif wanted and given.precision == "default":
        notes.append("products are those of float32, in three of float16: TF32 takes longer")
    if call.precision == "fp32":
        notes.append("products are those of float32, as nothing allowed TF32")
    return notes


def with_precision(found: Plan, stage: str, call: Call | Transition) -> Plan:
    """A plan with the precision of float32 products, from `stage`, of a call for kernels."""
    if call.x.dtype != torch.float32:
        return found
    return found._replace(precision=found.stages[stage].constants["PRECISION"])


def for_kernels(call: Call | Transition) -> Call | Transition:
    """The call with one of the kernels' precisions, and parameters with unit last stride.

    The precision is "fp16x3" if the call `splits` its operands.
    """
    made = for_unsplit_kernels(call)
    return made._replace(precision=FP16X3) if splits(call) else made


def for_unsplit_kernels(call: Call | Transition) -> Call | Transition:
    """As `for_kernels`, with "tf32x3" for "fp16x3"."""
    weights, precision = call.weights, call.precision
    if precision == "default":
        precision = "tf32" if torch_allows_tf32() else "fp32"
    elif precision == FP16X3:
        precision = "tf32x3"
    # The kernels have no stride for a parameter's last axis. It would cost more than a copy, and
    # for transposed tiles ptxas 12.8 (Triton 3.6 to 3.7.1) generated sm_90 code that read shared
    # memory at the wrong addresses: see docs/fuzzing.md.
    if not all([v is None or v.is_contiguous() for v in weights]):
        values = [v if v is None or v.stride(-1) == 1 else v.contiguous() for v in weights]
        weights = type(weights)(*values)
    elif precision == call.precision:
        return call
    return call._replace(weights=weights, precision=precision)


def wants_split(call: Call | Transition) -> bool:
    """Whether "fp16x3" is asked for, or is what the target does where nothing is."""
    if call.precision == "default":
        return is_default(call.x.device)
    return call.precision == FP16X3


def splits(call: Call | Transition) -> bool:
    """Whether "fp16x3" is wanted and can be had."""
    return wants_split(call) and refusal(call) is None


def sequences_at_once(call: Call) -> int:
    """Few sequences of the batch, but enough to fill a GPU: a divisor of the batch."""
    batch, length = call.x.shape[:2]
    return _divisor(batch, _FILLING_PAIRS // length**2)


def sequences_merged(call: Call) -> int:
    """How many sequences a training step runs as one that has all their rows.

    It is the same in forward and backward: their planes are small together. With lengths, drop
    masks, split numbers beside a mask that is not bool, or a and b made again, each sequence is run
    alone.
    """
    batch, length = call.x.shape[:2]
    if batch < 2 or not call.keeps_planes:
        return 1
    if call.lengths is not None or call.drop_mask is not None:
        return 1
    if call.mask is not None and call.mask.dtype != torch.bool and splits(call):
        return 1
    of_one = call.hidden * length * padded_pitch(length) * call.x.element_size()
    return _divisor(batch, (SMALL_PLANES - 1) // of_one)


def mergeable(call: Call) -> Call:
    """The call, whose tensors can be viewed with merged rows if `sequences_merged` of it are.

    A schedule that copied them could not be recorded.
    """
    if sequences_merged(call) == 1:
        return call
    return call._replace(
        x=rows_alike(call.x), mask=rows_alike(call.mask), residual=rows_alike(call.residual)
    )


def rows_alike(tensor: Tensor | None) -> Tensor | None:
    """The tensor [B, L, ...], or a copy if its rows are not one stride apart in the whole batch."""
    if tensor is None or tensor.stride(0) == tensor.shape[1] * tensor.stride(1):
        return tensor
    return tensor.contiguous()


def _divisor(batch: int, most: int) -> int:
    """The largest divisor of `batch` up to `most`, or 1."""
    sizes = range(1, min(batch, most) + 1)
    return max([size for size in sizes if batch % size == 0], default=1)


def current_device(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which x's device is the current one, on which Triton launches."""
    if x.device.type == "cpu":
        return contextlib.nullcontext()
    return getattr(torch, x.device.type).device_of(x)
