"""The transition on the ATen path.

    z   = LayerNorm(x; g, b)                                            [B, I, J, C]
    h   = silu(p) * u,  p = z Wg^T + bg,  u = z Wu^T + bu               [B, I, J, H]
    out = residual + h Wd^T + bd

and backwards, with dy the gradient of the output:

    dh = dy Wd,  du = dh silu(p),  dp = dh u silu'(p)
    dz = dp Wg + du Wu,  dx = LayerNorm backward of dz

`forward` and `backward` go over blocks of rows that stay in a CPU's caches, with sums, norms and
gates in fp32, and with the GEMMs of `blocks.gemm_dtype`. Beside the arguments and the parameters
they hold their results and the blocks' buffers. With lengths, the blocks are those of each
sequence cut to its length: nothing else is read or computed.
"""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._call import TRANSITION_DIFFERENTIABLE, Transition, TransitionWeights
from .._plan import Plan, note_on_gradients
from ..validation import pairs_within
from .blocks import (
    LEAST_POSITIONS,
    LEAST_POSITIONS_A_THREAD,
    cast,
    gemm_dtype,
    layer_norm,
    layer_norm_of,
    shift_rows,
    sum_dtype,
)
from .region import for_each, region_threads

# Rows of a block. Measured from 256 to 2048 at C = 256, H = 1024 on two cores of an AMD EPYC with
# 1 MB of L2 each: 512 and 1024 were the fastest, by a tenth in all.
_BLOCK_POSITIONS = 1024
# On a device without such caches a block only bounds the memory, and operations should be few.
_BLOCK_POSITIONS_ELSEWHERE = 1 << 14
# A block of the backward has four fp32 buffers of its rows' hidden channels. With at least this
# many blocks they are less than three tensors like x of 16 bits, where H = 4 C. Smaller blocks than
# of 512 rows took longer, by a twentieth for half of it: each adds to the sums of all gradients of
# weights.
_LEAST_BLOCKS = 16
_LEAST_POSITIONS_BACKWARD = 512
_OF_NORM = frozenset(("x", "norm_weight", "norm_bias"))
# Gradients that take dh, and those that take z or dh.
_BEHIND_HIDDEN = _OF_NORM | {"gate_weight", "gate_bias", "up_weight", "up_bias"}
_BEHIND_DOWN = frozenset(TRANSITION_DIFFERENTIABLE) - {"down_bias"}


def forward(call: Transition) -> Tensor:
    """The output [B, I, J, C]. With lengths the host waits for them."""
    x, channels = call.x, call.x.shape[-1]
    dtype = gemm_dtype(x.dtype, x.device.type)
    p, blocks = _prepare(call.weights, dtype), _blocks_of(call)
    if call.inplace:
        out = call.residual
    elif call.lengths is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        if call.residual is not None:
            out.copy_(call.residual)

    def write(window: tuple[slice, ...]) -> None:
        rows = x[window]
        z = layer_norm(rows, p.norm_weight, p.norm_bias, call.eps).to(dtype).reshape(-1, channels)
        gate, up = _project(z, p)
        hidden = F.silu(gate, inplace=True).mul_(up).to(dtype)
        residual = None
        if call.residual is not None:
            residual = call.residual[window].reshape(-1, channels).to(dtype)
        if p.down_bias is None and residual is not None:
            # A sum within a GEMM is rounded once.
            update = torch.addmm(residual, hidden, p.down_weight.t())
        else:
            update = _linear(hidden, p.down_weight, p.down_bias)
            if residual is not None:
                update += residual
        out[window] = update.view(rows.shape)

    with torch.autocast(x.device.type, enabled=False):
        for_each(blocks.windows, write, blocks.threads)
    return out


def backward(call: Transition, grad_out: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    """The gradients that `needs` names. With lengths the host waits for them."""
    x, channels = call.x, call.x.shape[-1]
    dtype, wide = gemm_dtype(x.dtype, x.device.type), sum_dtype(x.dtype)
    p = _prepare(call.weights, dtype)
    blocks = _blocks_of(call, _LEAST_BLOCKS, _LEAST_POSITIONS_BACKWARD)
    leaves = {"x": x, **call.weights._asdict()}
    sums = {
        name: torch.zeros(leaves[name].shape, dtype=wide, device=x.device) for name in needs - {"x"}
    }
    wanted = [name in needs for name in ("x", "norm_weight", "norm_bias")]
    grad_x = None
    if "x" in needs:
        empty = torch.empty if call.lengths is None else torch.zeros
        grad_x = empty(x.shape, dtype=x.dtype, device=x.device)

    def gradients(window: tuple[slice, ...]) -> dict[str, Tensor]:
        """What a block adds to the sums."""
        found = {}
        grad = grad_out[window].reshape(-1, channels)
        if "down_bias" in needs:
            found["down_bias"] = grad.sum(0, dtype=wide)
        if needs.isdisjoint(_BEHIND_DOWN):
            return found
        shifted = shift_rows(x[window]).reshape(-1, channels)
        norm = (shifted.shape[-1:], p.norm_weight, p.norm_bias)
        z, mean, rstd = torch.native_layer_norm(shifted, *norm, call.eps)
        z, grad = z.to(dtype), grad.to(dtype)
        gate, up = _project(z, p)
        grad_up = F.silu(gate)
        if "down_weight" in needs:
            found["down_weight"] = grad.t() @ (grad_up * up).to(dtype)
        if needs.isdisjoint(_BEHIND_HIDDEN):
            return found
        grad_hidden = torch.mm(grad, p.down_weight).to(wide)
        grad_up *= grad_hidden
        grad_gate = grad_hidden.mul_(up)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        del gate, up
        grad_z = None
        for name, grad, weight in (
            ("gate", grad_gate, p.gate_weight), ("up", grad_up, p.up_weight),
        ):  # fmt: skip
            if f"{name}_bias" in needs:
                found[f"{name}_bias"] = grad.sum(0)
            operand = grad.to(dtype)
            if f"{name}_weight" in needs:
                found[f"{name}_weight"] = operand.t() @ z
            if any(wanted):
                through = torch.mm(operand, weight).to(wide)
                grad_z = through if grad_z is None else grad_z.add_(through)
        if any(wanted):
            grad_rows, *of_norm = torch.ops.aten.native_layer_norm_backward(
                grad_z, shifted, norm[0], mean, rstd, *norm[1:], wanted
            )
            if grad_x is not None:
                grad_x[window] = grad_rows.view(grad_x[window].shape)
            for name, total in zip(("norm_weight", "norm_bias"), of_norm, strict=True):
                if name in needs:
                    found[name] = total
        return found

    def add(found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            sums[name] += value

    with torch.autocast(x.device.type, enabled=False):
        for_each(blocks.windows, gradients, blocks.threads, add)
    grads = {name: total.to(leaves[name].dtype) for name, total in sums.items()}
    return grads if grad_x is None else grads | {"x": grad_x}


class _Blocks(NamedTuple):
    """The blocks into which a call is cut."""

    windows: list[tuple[slice, ...]]  # of the axes B, I and J
    threads: int  # that work on blocks of their own


def _blocks_of(call: Transition, parts: int = 1, least: int = LEAST_POSITIONS) -> _Blocks:
    """The blocks of a call; the threads together hold at most 1 / `parts` of many rows."""
    shape, device = call.x.shape[:-1], call.x.device
    boxes = [tuple(range(extent) for extent in shape)]
    if call.lengths is not None:
        lengths = call.lengths.clamp(0, shape[1]).tolist()
        boxes = [(range(b, b + 1), range(n), range(n)) for b, n in enumerate(lengths) if n]
    rows = sum([prod(map(len, box)) for box in boxes])

    def positions_of(threads: int) -> int:
        most = _BLOCK_POSITIONS_ELSEWHERE
        if device.type == "cpu":
            most = max(_BLOCK_POSITIONS, LEAST_POSITIONS_A_THREAD * threads)
        return min(most, max(least, -(-rows // (parts * threads))))

    threads = region_threads(device)
    positions = positions_of(threads)
    if positions < LEAST_POSITIONS_A_THREAD * threads:
        threads = 1
        positions = positions_of(threads)
    return _Blocks([window for box in boxes for window in _windows(box, positions)], threads)


def _windows(box: tuple[range, ...], positions: int) -> Iterator[tuple[slice, ...]]:
    """The box in parts of at most `positions` rows, and of nearly as many each."""
    cuts, inside = [], 1
    for axis in reversed(box):
        count = -(-len(axis) // max(1, positions // inside))
        step = -(-len(axis) // count)
        inside *= step
        cuts.append([
            slice(start, min(start + step, axis.stop))
            for start in range(axis.start, axis.stop, step)
        ])
    return product(*reversed(cuts))


def _prepare(w: TransitionWeights, dtype: torch.dtype) -> TransitionWeights:
    """The parameters in the dtypes of their use: matrices in the GEMMs', vectors in fp32."""
    wide = sum_dtype(dtype)
    return TransitionWeights(*[
        None if value is None else value.to(dtype if value.ndim == 2 else wide) for value in w
    ])


def _project(z: Tensor, p: TransitionWeights) -> tuple[Tensor, Tensor]:
    """p and u [rows, H] in fp32 of z [rows, C]."""
    return _linear(z, p.gate_weight, p.gate_bias), _linear(z, p.up_weight, p.up_bias)


def _linear(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """value @ weight.T + bias in fp32, which the bias must be in."""
    if bias is None or bias.dtype == value.dtype:
        return F.linear(value, weight, bias).to(sum_dtype(value.dtype))
    return F.linear(value, weight).to(bias.dtype).add_(bias)


def formula(call: Transition) -> Tensor:
    """The output, on any device, in operations that torch.func and forward-mode AD can follow."""
    w, dtype, within = call.weights, call.x.dtype, None
    if call.lengths is not None:
        within = pairs_within(call.lengths, call.x.shape[1])[..., None]

    def linear(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(value, weight, cast(bias, dtype))

    x = call.x if within is None else torch.where(within, call.x, 0)
    with torch.autocast(x.device.type, enabled=False):
        z = layer_norm_of(x, w.norm_weight, w.norm_bias, call.eps)
        hidden = F.silu(linear(z, w.gate_weight, w.gate_bias))
        hidden = hidden * linear(z, w.up_weight, w.up_bias)
        update = linear(hidden, w.down_weight, w.down_bias)
    if within is not None:
        update = torch.where(within, update, 0)
    return (update if call.residual is None else call.residual + update).contiguous()


def plan(call: Transition) -> Plan:
    """The buffers of `forward`. Those of a block, which stay within a CPU's caches, don't count."""
    notes = ["Triton is not for this call, for the reason above"]
    buffers = {} if call.inplace else {"output": call.x.nbytes}
    if call.inplace:
        notes.append("the output is written over the residual")
    notes.append("the hidden channels are those of some rows at a time")
    notes.append(note_on_gradients(call))
    if call.lengths is not None:
        notes.append("each sequence is cut to its length, which the host reads")
    return Plan(None, None, [], buffers, sum(buffers.values()), 0, notes)
