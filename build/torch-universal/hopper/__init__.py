"""Variants of stages for Hopper GPUs, written in Triton's Gluon dialect.

    gated_rows              stage 1, and the first stage of the transition
    row_linear              the second stage of the transition
    transition              both in one
    swiglu_backward         the transition's backward as far as dp, du
    gated_rows_backward     stage 1's backward, from the planes' gradients to dp, dg
    input_backward          and from there to dx; the transition's too
    gated_input_backward    both in one
    ln_residual             stage 3
    wide_ln_residual        with more than 256 channels
    padding                 the tiles that stage 3's and the transition's kernels leave out
    ln_residual_backward    its backward, to de and dq
    norm_backward           and from de to dt
    plane_products          stage 2, and both products of its backward in one
    row_products            sums over pairs of the gradients' products with normalised rows

A stage asks for its variant while it prepares a launch. The settings of sm_90 name it where it is
the faster one ("kernel": "hopper"). What it doesn't take, and any other GPU, has the stage's own
kernel.
"""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from ..paths import say_once
from ..triton_parts.device import device_target
from ..triton_parts.launch import has_descriptor
from ..triton_parts.settings import LaunchConfig, release

_KNOWN = ((3, 6), (3, 9))  # the first and the last Triton whose Gluon these kernels are written for
_BFLOAT16 = (torch.bfloat16,)
_16_BITS = (torch.bfloat16, torch.float16)
# The dtypes and widths of rows that a module takes: of those that a consumer holds in registers, as
# many as fit. None are all.
_TAKEN = {
    "gated_rows": (_16_BITS, range(128, 513, 64)),
    "gated_rows_backward": (_BFLOAT16, (128, 256)),
    "input_backward": (_BFLOAT16, (128, 256)),
    "gated_input_backward": (_BFLOAT16, (128, 256)),
    "ln_residual_backward": (_BFLOAT16, (128, 256)),
    "ln_residual": (_16_BITS, (128, 192, 256)),
    "wide_ln_residual": (_16_BITS, (320, 384, 448, 512)),
    "norm_backward": (_BFLOAT16, (128, 256)),
    "plane_products": (_16_BITS, None),
    "row_products": (_16_BITS, range(128, 2049, 128)),
    "row_linear": (_16_BITS, range(64, 8193, 64)),
    "transition": (_16_BITS, (128, 192, 256)),
    "swiglu_backward": (_16_BITS, (128, 192, 256)),
}
_plain_only = False


@functools.cache
def kernels(name: str) -> ModuleType | None:
    """A module of this package; None, with a warning, where Triton has no Gluon that it knows."""
    reason = f"Triton {triton.__version__} is none of 3.6 to 3.9"
    if _KNOWN[0] <= release(triton.__version__) <= _KNOWN[1]:
        try:
            return importlib.import_module(f".{name}", __name__)
        except (ImportError, AttributeError) as error:
            reason = f"Triton's Gluon can't be imported ({error})"
    say_once(f"runs the kernels that every GPU has, not those for Hopper: {reason}")
    return None


def variants(name: str, takes: str, x: Tensor, *arguments: Any) -> frozenset[str]:
    """The variants, for `setting_of`, of a stage that may run on rows like x [..., C].

    Args:
        name: the module of this package.
        takes: its function that tells, of `arguments`, whether it can run the stage.
    """
    dtypes, widths = _TAKEN[name]
    if (
        _plain_only
        or x.dtype not in dtypes
        or (widths is not None and x.shape[-1] not in widths)
        or device_target(x.device).target != "sm_90"
        or not has_descriptor(x)
        or (module := kernels(name)) is None
        or not getattr(module, takes)(*arguments)
    ):
        return frozenset()
    return frozenset({"hopper"})


def is_variant(config: LaunchConfig, variants: frozenset[str]) -> bool:
    """Whether a setting is one of a variant, which must be among those that can run the call.

    Raises:
        ValueError: the setting of a variant that can't.
    """
    if config.kernel not in variants | {""}:
        raise ValueError(
            f"the setting must be of one of {sorted(variants | {''})}, which can run this call; "
            f"got {config}"
        )
    return config.kernel != ""


def plain_only() -> bool:
    """Whether the variants are left out, see `without_variants`."""
    return _plain_only


@contextlib.contextmanager
def without_variants() -> Iterator[None]:
    """A context in which every stage runs its own kernel, to compare; for the whole process."""
    global _plain_only
    previous, _plain_only = _plain_only, True
    try:
        yield
    finally:
        _plain_only = previous
