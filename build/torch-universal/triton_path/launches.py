"""A cache of prepared launches, by all that the launches of a call depend on."""

from .._call import Call
from ..triton_parts.launch import Launches

_MOST_KINDS = 1024
_launches: dict[tuple, Launches] = {}


def launches_of(call: Call, *what: object) -> Launches:
    """The launches for calls of this kind; `what` is the rest of the cache key."""
    key = (what, *_kind(call))
    found = _launches.get(key)
    if found is None:
        if len(_launches) >= _MOST_KINDS:
            _launches.clear()
        found = _launches[key] = Launches()
    return found


def _kind(call: Call) -> tuple:
    """The cache key of a call: everything that its launches depend on.

    Of the addresses these are the remainders modulo 16 and the input projections' distance.
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
