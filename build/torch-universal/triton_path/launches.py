"""The launches of each kind of call: prepared once, and found again by what they depend on."""

from .._call import Call
from ..triton_parts.launch import Launches

_MOST_KINDS = 1024
_launches: dict[tuple, Launches] = {}


def launches_of(call: Call, *what: object) -> Launches:
    """The launches for `what` of calls of this kind."""
    kind = (what, *_kind(call))
    found = _launches.get(kind)
    if found is None:
        if len(_launches) >= _MOST_KINDS:
            _launches.clear()
        found = _launches[kind] = Launches()
    return found


def _kind(call: Call) -> tuple:
    """Everything of a call that its launches depend on besides the addresses of its tensors.

    Of the addresses: whether they are multiples of 16, and how far the input projections are apart.
    """
    x, weights = call.x, call.weights
    return (
        x.shape,
        x.device,
        call.direction,
        call.eps_in,
        call.eps_out,
        call.precision,
        call.inplace,
        call.lengths is None,
        weights.p_in_weight.shape[0],
        weights.g_in_weight.data_ptr() - weights.p_in_weight.data_ptr(),
        *[
            None if t is None else (t.dtype, t.stride(), t.data_ptr() % 16)
            for t in (x, call.mask, call.residual, call.drop_mask, *weights)
        ],
    )
