"""The launches and buffers that a call would have on its path."""

from typing import Any, NamedTuple

from torch import Tensor

from ._call import Call, Transition


class Plan(NamedTuple):
    """The launches and buffers of a call."""

    memory: str | None  # "default" or "lean", of the Triton path
    precision: str | None  # of the products of float32 operands, on the Triton path
    launches: list[tuple[Any, dict[str, Tensor | None]]]  # PreparedLaunch, and tensors like its own
    buffers: dict[str, int]  # bytes
    peak: int  # the most bytes of buffers at once
    kept: int  # bytes of buffers kept for a backward
    notes: list[str]  # why no other way was taken, one sentence each

    @property
    def stages(self) -> dict[str, Any]:
        """The first launch of each stage, in order."""
        found = {}
        for launch, _ in self.launches:
            found.setdefault(launch.stage, launch)
        return found


def note_on_gradients(call: Call | Transition, planes: bool = False) -> str:
    """A sentence on what is kept for a backward; `planes` says whether a and b are."""
    if not call.needs_grad:
        return "no gradient is needed: nothing is kept"
    if isinstance(call, Transition):
        return "the backward computes everything again, nothing is kept"
    if call.recompute == "all":
        return "recompute='all': the backward computes everything again, nothing is kept"
    kept = "a, b and the product are" if planes else "the product is"
    return f"{kept} kept for the backward, which computes the rest again"
