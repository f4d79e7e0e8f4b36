"""A transition's projections as split numbers, for its products in float32: see `split_operands`.

Its rows that no norm bounds, h and the gradients, are split where they are multiplied: see
`split_rows`. Their channels may differ in size: so in a forward a hidden channel's value is
multiplied by a power of two, by which the down projection's column is divided.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._call import Transition
from ..triton_parts.launch import Launches, PreparedLaunch, pointers
from ..triton_parts.split_operands import FP16X3, split_projection, store_norm

_BLOCK_N = 16
_PROJECTIONS = ("gate_weight", "up_weight", "down_weight")


@triton.jit
def _split_transition_kernel(
    norm_weight_ptr, norm_bias_ptr, gate_weight_ptr, gate_bias_ptr, up_weight_ptr, up_bias_ptr,
    down_weight_ptr, down_bias_ptr, split_ptr, scales_ptr, norms_ptr, first,
    stride_gate_weight, stride_up_weight, stride_down_weight,
    C: tl.constexpr, H: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one of the three projections, `first` on: split, their scales and constants.

    C and H are multiples of BLOCK_N. The last projection is [N, K], of rows that no norm makes; if
    they are SCALED, K = H, by what the rows of the up projection before have left.
    """
    start = first + tl.program_id(0) * BLOCK_N  # of the rows of all three
    TOTAL: tl.constexpr = 2 * H + N
    if start < H:
        split_projection(
            gate_weight_ptr, stride_gate_weight, norm_weight_ptr, norm_bias_ptr, gate_bias_ptr,
            None, split_ptr + 2 * H * C, scales_ptr, start, 0,
            H, C, TOTAL, BLOCK_N, BLOCK_C, True, False,
        )  # fmt: skip
    elif start < 2 * H:
        split_projection(
            up_weight_ptr, stride_up_weight, norm_weight_ptr, norm_bias_ptr, up_bias_ptr,
            None, split_ptr, scales_ptr, start, H,
            H, C, TOTAL, BLOCK_N, BLOCK_C, True, SCALED,
        )  # fmt: skip
    else:
        columns_ptr = None
        if SCALED:
            columns_ptr = scales_ptr + 2 * TOTAL + H
        split_projection(
            down_weight_ptr, stride_down_weight, None, None, down_bias_ptr,
            columns_ptr, split_ptr + 4 * H * C, scales_ptr, start, 2 * H,
            N, K, TOTAL, BLOCK_N, BLOCK_K, False, False,
        )  # fmt: skip
    if start == 0:
        store_norm(norm_weight_ptr, norm_bias_ptr, norms_ptr, C, BLOCK_C)


class SplitTransition(NamedTuple):
    """A transition's parameters as split numbers."""

    call: Transition  # its norm is scaled, gate and up projection are split; no biases
    down: Tensor  # the last projection [N, K], split
    # [4, 2H + N] in fp32 as in `split_operands.Scales`, of the rows of the gate's, of the up and of
    # the last projection; the biases are among them.
    scales: Tensor

    @property
    def factors(self) -> Tensor:
        """Of the split rows of all projections, [2H + N]."""
        return self.scales[3]


def split_transition(
    call: Transition, down: Tensor, down_bias: Tensor | None, launches: Launches, turned: bool
) -> SplitTransition | None:
    """The split parameters; None unless the call's precision is "fp16x3".

    Of a projection [N, K] high [N, K] and low [N, K] lie one behind the other. `down` [N, K] is the
    down projection of a forward, whose hidden channels then have powers of two of their own, by the
    bounds of the up projection's values; or it is `turned`, transposed for a backward.
    """
    if call.precision != FP16X3:
        return None
    weights, device, channels, hidden = call.weights, call.x.device, call.x.shape[-1], call.hidden
    rows, width = down.shape
    sizes = [2 * hidden * channels, 2 * hidden * channels, 2 * rows * width]
    memory = launches.empty("split weights", (sum(sizes),), torch.float16, device)
    scales = launches.empty("scales", (4, 2 * hidden + rows), torch.float32, device)
    norms = launches.empty("scaled norm", (2, channels), torch.float32, device)
    given = weights._replace(down_weight=down, down_bias=down_bias)._asdict()
    # The last projection's columns wait for the values' powers of two.
    spans = [(0, 2 * hidden + rows)] if turned else [(0, 2 * hidden), (2 * hidden, rows)]
    for span in spans:
        launches.of(("split_transition", *span), _prepare, call, given, span, turned).launch(
            **{f"{name}_ptr": value for name, value in given.items()},
            split_ptr=memory,
            scales_ptr=scales,
            norms_ptr=norms,
        )
    up, gate, split_down = memory.split(sizes)
    weights = weights._replace(
        norm_weight=norms[0], norm_bias=norms[1], gate_bias=None, up_bias=None,
        gate_weight=gate.view(-1, channels), up_weight=up.view(-1, channels),
    )  # fmt: skip
    return SplitTransition(call._replace(weights=weights), split_down.view(-1, width), scales)


def _prepare(
    call: Transition, given: dict[str, Tensor | None], span: tuple[int, int], turned: bool
) -> PreparedLaunch:
    """The launch of `split_transition` for a span of the rows of parameters like those `given`."""
    channels, hidden, (rows, width) = call.x.shape[-1], call.hidden, given["down_weight"].shape
    return PreparedLaunch(
        _split_transition_kernel,
        span[1] // _BLOCK_N,
        tensors=pointers(
            *[f"{name}_ptr" for name in given], "split_ptr", "scales_ptr", "norms_ptr"
        ),
        values=dict(first=span[0])
        | {f"stride_{name}": given[name].stride(0) for name in _PROJECTIONS},
        constants=dict(
            C=channels, H=hidden, N=rows, K=width, BLOCK_N=_BLOCK_N,
            BLOCK_C=triton.next_power_of_2(channels), BLOCK_K=triton.next_power_of_2(width),
            SCALED=not turned,
        ),
        options=dict(num_warps=8, num_stages=2),
    )  # fmt: skip
