"""The longest length that fits, found with few tries."""

from collections.abc import Callable


def longest(fits: Callable[[int], bool], guess: int, step: int) -> tuple[int, dict[int, bool]]:
    """The largest multiple of `step` for which `fits`, 0 if none does, and every try.

    Args:
        fits: true up to some length, false above.
        guess: where it is expected to be; a good one costs two or three tries.
    """
    tried: dict[int, bool] = {}

    def try_out(length: int) -> bool:
        if length not in tried:
            tried[length] = fits(length)
        return tried[length]

    low, stride = max(step, guess // step * step), step
    if try_out(low):
        while try_out(low + stride):
            low, stride = low + stride, 2 * stride
        high = low + stride
    else:
        high = low
        low = max(0, high - stride)
        while low and not try_out(low):
            stride *= 2
            low, high = max(0, low - stride), low
    while high - low > step:
        middle = (low + high) // 2 // step * step
        low, high = (middle, high) if try_out(middle) else (low, middle)
    return low, tried
