"""What a call would launch and allocate, said by the path that would run it."""

from typing import Any, NamedTuple

from torch import Tensor

from ._call import Call


class Plan(NamedTuple):
    """What a call launches and allocates."""

    memory: str | None  # "default" or "lean", of the Triton path
    precision: str | None  # of the products of float32 operands, on the Triton path
    launches: list[tuple[Any, dict[str, Tensor | None]]]  # PreparedLaunch, and tensors like its own
    buffers: dict[str, int]  # bytes
    peak: int  # bytes of them at once, at most
    kept: int  # bytes of them that stay for a backward
    notes: list[str]  # why not another way, one sentence each

    @property
    def stages(self) -> dict[str, Any]:
        """The first launch of each stage, in order."""
        found = {}
        for launch, _ in self.launches:
            found.setdefault(launch.stage, launch)
        return found


def note_on_gradients(call: Call) -> str:
    """What a backward would find."""
    if not call.needs_grad:
        return "no gradient is needed: nothing is kept"
    if call.recompute == "all":
        return "recompute='all': the backward computes everything again, nothing is kept"
    return "the product is kept for the backward, which computes the rest again"
