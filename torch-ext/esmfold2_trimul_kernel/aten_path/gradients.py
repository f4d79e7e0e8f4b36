"""The ATen path's backward: gradients in plain PyTorch operations, in the forward's arithmetic.

With the names of `blocks`, dy = drop_mask * grad_out, m = LayerNorm(t), mhat the same without its
weights, p, s the values and the sigmoids of their gates, [a, b] = p s mask, and dab = [da, db]:

    de = dy o,  dm = de We,  dt = LayerNorm backward of dm                             (emission)
    outgoing: da = dt b,    db = dt^T a     incoming: da = b dt^T,  db = a dt          (product)
    dp = dab s mask,  dg = dab p s (1 - s) mask,  dq = dy e o (1 - o)
    dz = dp Wp + dg Wg + dq Wo,  dx = LayerNorm backward of dz                         (inputs)

Each of the three steps goes over blocks of positions and recomputes what it needs of the forward.
Beside the arguments, a block's buffers and the parameters, it holds 3.25 tensors of the pair's size
where D <= C:

    1     t, saved by the forward or recomputed
    1     dt, which da overwrites
    1     dx; its memory holds a, then db, row by row, until a row's dx overwrites them
    0.25  b, of a quarter of the channels at a time

In a batch, dt, b and a recomputed t are those of one sequence. Where D > C, or x needs no gradient,
a and db have memory of their own, D / C of a pair tensor for one sequence.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._call import Call, Weights
from .blocks import (
    Blocks,
    Parameters,
    blocks_of,
    channel_groups,
    emit,
    empty_columns,
    empty_planes,
    gemm_dtype,
    multiply_planes,
    normalize_columns,
    normalize_rows,
    prepare,
    project,
    shift_rows,
    sum_dtype,
    write_planes,
)
from .region import for_each

# b is recomputed in this many parts of its channels. Each part reads and normalises x again, and
# only one part of b is in memory.
_PARTS = 4
# A block has about eleven fp32 buffers of the size of its part of x. With at least this many blocks
# they are less than a pair tensor of fp32, or one and a half of 16 bits.
_LEAST_BLOCKS = 16
_OF_NORM_IN = frozenset(("x", "norm_in_weight", "norm_in_bias"))
# Gradients for which the backward must go through the triangular product.
_BEHIND_PRODUCT = _OF_NORM_IN | {"mask", "p_in_weight", "p_in_bias", "g_in_weight", "g_in_bias"}
# Those that take the gradient of the output gate before its sigmoid.
_BEHIND_GATE = _OF_NORM_IN | {"g_out_weight", "g_out_bias"}
# Sums of de over positions give these: by itself, and times mhat.
_OF_DELTA = frozenset(("p_out_weight", "p_out_bias", "norm_out_bias"))
_OF_DELTA_MIXED = frozenset(("p_out_weight", "norm_out_weight"))


class _Step(NamedTuple):
    """The values that all sequences and steps of a backward share."""

    direction: str
    parameters: Parameters
    eps_in: float
    eps_out: float
    blocks: Blocks
    needs: frozenset[str]
    # In fp32, over positions: gradients of the input's and the gate's parameters, by name; "delta"
    # [C], of de; "delta_mixed" [C, D], of de^T mhat.
    sums: dict[str, Tensor]


class _Sequence(NamedTuple):
    """One sequence of the batch."""

    x: Tensor  # [L, L, C]
    grad_out: Tensor  # [L, L, C]
    product: Tensor  # [D, L, L]
    mask: Tensor | None  # [L, L]
    drop_mask: Tensor | None  # [L, C]
    grads: dict[str, Tensor]  # of "x" [L, L, C], "mask" [L, L] and "drop_mask" [L, C]


def trimul_backward(
    call: Call, grad_out: Tensor, saved: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients that `needs` names, out of `DIFFERENTIABLE`, each like its leaf.

    grad_out is [B, L, L, C]; saved is the second result of `trimul_saving`, or None, and then t is
    recomputed. The residual's gradient is grad_out itself.
    """
    x, weights = call.x, call.weights
    dtype = gemm_dtype(x.dtype, x.device.type)
    blocks = blocks_of(x, _LEAST_BLOCKS)
    parameters = prepare(weights, dtype)
    sums = _zero_sums(weights, needs, sum_dtype(dtype))
    step = _Step(call.direction, parameters, call.eps_in, call.eps_out, blocks, needs, sums)
    leaves = {name: getattr(call, name) for name in ("x", "mask", "drop_mask") if name in needs}
    grads = {
        name: torch.empty(leaf.shape, dtype=leaf.dtype, device=x.device)
        for name, leaf in leaves.items()
    }
    behind_product = not needs.isdisjoint(_BEHIND_PRODUCT)
    hidden, channels = weights.p_out_weight.shape[1], x.shape[-1]
    others_in_grad_x = "x" in needs and hidden <= channels
    product = empty_planes(x, weights)[0] if saved is None else None
    planes = empty_planes(x, weights)[0] if behind_product or saved is None else None
    others = None
    if behind_product and not others_in_grad_x:
        others = empty_planes(x, weights)[0]
    for index in range(x.shape[0]):
        seq = _Sequence(
            x[index],
            grad_out[index],
            product if saved is None else saved[index],
            None if call.mask is None else call.mask[index],
            None if call.drop_mask is None else call.drop_mask[index],
            {name: gradient[index] for name, gradient in grads.items()},
        )
        if saved is None:
            write_planes(product, planes, seq.x, seq.mask, parameters, blocks, call.eps_in)
            multiply_planes(product, planes, call.direction, dtype, blocks)
        if not behind_product:
            _through_emission(step, seq, None)
            if not needs.isdisjoint(_BEHIND_GATE):
                _through_inputs(step, seq, None, None)
            continue
        if others_in_grad_x:
            others = _planes_within(seq.grads["x"], hidden)
        _through_emission(step, seq, planes)
        _through_product(step, seq, planes, others)
        _through_inputs(step, seq, planes, others)
    return grads | _parameter_gradients(weights, needs, sums)


def _zero_sums(
    weights: Weights, needs: frozenset[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The sums of a `_Step`, before the first block."""
    leaves = weights._asdict()
    sums = {
        name: torch.zeros(leaf.shape, dtype=dtype, device=leaf.device)
        for name, leaf in leaves.items()
        if name in needs - _OF_DELTA - _OF_DELTA_MIXED
    }
    projection = weights.p_out_weight
    if not needs.isdisjoint(_OF_DELTA):
        sums["delta"] = torch.zeros(projection.shape[0], dtype=dtype, device=projection.device)
    if not needs.isdisjoint(_OF_DELTA_MIXED):
        sums["delta_mixed"] = torch.zeros(projection.shape, dtype=dtype, device=projection.device)
    return sums


def _planes_within(grad_x: Tensor, hidden: int) -> Tensor:
    """Planes [D, L, L] in the memory of grad_x [L, L, C], D <= C.

    Row i of grad_x holds row i of every plane, and can be written once these have been read.
    """
    length, _, channels = grad_x.shape
    rows = grad_x.view(length, length * channels)[:, : length * hidden]
    return rows.view(length, hidden, length).transpose(0, 1)


def _add_up(step: _Step, sums: dict[str, Tensor], work: Callable[[slice], dict]) -> None:
    """sums[name] += work(window)[name] over the windows of a sequence, in their order."""

    def add(found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            sums[name] += value

    for_each(step.blocks.windows, work, step.blocks.threads, add)


def _through_emission(step: _Step, seq: _Sequence, planes: Tensor | None) -> None:
    """Writes dt to `planes` [D, L, L], unless None, and adds to the sums of the emission."""
    p, sums = step.parameters, dict(step.sums)
    if "drop_mask" in step.needs:
        wide = sum_dtype(seq.x.dtype)
        sums["drop_mask"] = torch.zeros_like(seq.drop_mask, dtype=wide)

    def emission(window: slice) -> dict[str, Tensor]:
        found = {}
        z = normalize_rows(seq.x[window], p, step.eps_in)
        mixed, rstd = normalize_columns(seq.product[:, window], step.eps_out)
        delta, gate = emit(mixed, z, p)
        grad = seq.grad_out[window].reshape(delta.shape).to(delta.dtype)
        if "drop_mask" in sums:
            of_pairs = (grad * delta).mul_(gate)
            found["drop_mask"] = of_pairs.view(-1, *seq.drop_mask.shape).sum(0)
        grad_delta = gate.mul_(_times_drop_mask(grad, seq.drop_mask))
        if "delta" in sums:
            found["delta"] = grad_delta.sum(0)
        if "delta_mixed" in sums:
            found["delta_mixed"] = grad_delta.t() @ mixed.t()
        if planes is not None:
            grad_mixed = torch.mm(p.out_weight.t(), grad_delta.t())
            planes[:, window] = _through_columns(grad_mixed, mixed, rstd).view(
                planes[:, window].shape
            )
        return found

    _add_up(step, sums, emission)
    if "drop_mask" in sums:
        seq.grads["drop_mask"].copy_(sums["drop_mask"])


def _times_drop_mask(grad: Tensor, drop_mask: Tensor | None) -> Tensor:
    """dy [positions, C] of a block of whole rows; grad itself where there is no drop mask."""
    if drop_mask is None:
        return grad
    return (grad.view(-1, *drop_mask.shape) * drop_mask).view(grad.shape)


def _through_columns(grad: Tensor, mixed: Tensor, rstd: Tensor) -> Tensor:
    """The backward of `normalize_columns`, written over `grad` [D, positions]."""
    slope = (grad * mixed).mean(0)
    grad -= grad.mean(0)
    return grad.addcmul_(mixed, slope, value=-1).mul_(rstd)


def _through_product(step: _Step, seq: _Sequence, planes: Tensor, others: Tensor) -> None:
    """Overwrites dt in `planes` [D, L, L] with da, and fills `others` [D, L, L] with db."""
    hidden, length, _ = planes.shape
    count = hidden if len(step.blocks.windows) == 1 else -(-hidden // _PARTS)
    right = torch.empty(count, length, length, dtype=planes.dtype, device=planes.device)
    for first in range(0, hidden, count):
        part = slice(first, first + count)
        parameters = step.parameters.of_channels(part)
        grad, a = planes[part], others[part]
        b = right[: len(grad)]
        write_planes(a, b, seq.x, seq.mask, parameters, step.blocks, step.eps_in)
        _multiply_gradients(step, grad, a, b, parameters.in_weight.dtype)


def _multiply_gradients(step: _Step, grad: Tensor, a: Tensor, b: Tensor, dtype) -> None:
    """Overwrites dt with da, and a with db, of some channels; grad, a and b are [D, L, L]."""

    def multiply(group: slice) -> None:
        dt, of_a, of_b = grad[group].to(dtype), a[group].to(dtype), b[group].to(dtype)
        if step.direction == "outgoing":
            grad_a, grad_b = torch.bmm(dt, of_b), torch.bmm(dt.mT, of_a)
        else:
            grad_a, grad_b = torch.bmm(of_b, dt.mT), torch.bmm(of_a, dt)
        grad[group], a[group] = grad_a, grad_b

    for_each(channel_groups(*grad.shape[:2], step.blocks), multiply, step.blocks.threads)


def _through_inputs(
    step: _Step, seq: _Sequence, grad_a: Tensor | None, grad_b: Tensor | None
) -> None:
    """The inputs' gradients from da and db [D, L, L], which are None if nothing needs them."""
    p, needs = step.parameters, step.needs
    wanted = ["x" in needs, "norm_in_weight" in needs, "norm_in_bias" in needs]

    def inputs(window: slice) -> dict[str, Tensor]:
        found = {}
        shifted = shift_rows(seq.x[window].flatten(0, 1))
        norm = (shifted.shape[-1:], p.norm_weight, p.norm_bias)
        z, mean, rstd = torch.native_layer_norm(shifted, *norm, step.eps_in)
        z = z.to(p.in_weight.dtype)
        grad_z = _through_gate(step, seq, window, z, found)
        if grad_a is not None:
            grads = torch.cat([grad_a[:, window], grad_b[:, window]])
            through = _through_projections(step, seq, window, z, grads.flatten(1), found)
            grad_z = grad_z if through is None else grad_z.add_(through)
        if any(wanted):
            shape, weight, bias = norm
            grad_x, *of_norm = torch.ops.aten.native_layer_norm_backward(
                grad_z, shifted, shape, mean, rstd, weight, bias, wanted
            )
            if "x" in needs:
                seq.grads["x"][window] = grad_x.view(seq.x[window].shape)
            for name, grad in zip(("norm_in_weight", "norm_in_bias"), of_norm, strict=True):
                if name in needs:
                    found[name] = grad
        return found

    _add_up(step, step.sums, inputs)


def _through_gate(
    step: _Step, seq: _Sequence, window: slice, z: Tensor, found: dict[str, Tensor]
) -> Tensor | None:
    """dq Wo [positions, C] of a block in fp32, or None if nothing before the gate needs it.

    `found` gets what the block adds to the sums.
    """
    if step.needs.isdisjoint(_BEHIND_GATE):
        return None
    p, sums = step.parameters, step.sums
    delta, gate = emit(normalize_columns(seq.product[:, window], step.eps_out)[0], z, p)
    grad = seq.grad_out[window].reshape(delta.shape).to(delta.dtype)
    grad = delta.mul_(_times_drop_mask(grad, seq.drop_mask)).mul_(gate)
    grad.addcmul_(grad, gate, value=-1)
    if "g_out_bias" in sums:
        found["g_out_bias"] = grad.sum(0)
    operand = grad.to(z.dtype)
    if "g_out_weight" in sums:
        found["g_out_weight"] = operand.t() @ z
    if step.needs.isdisjoint(_OF_NORM_IN):
        return None
    return torch.mm(operand, p.gate_weight).to(grad.dtype)


def _through_projections(
    step: _Step,
    seq: _Sequence,
    window: slice,
    z: Tensor,
    grads: Tensor,
    found: dict[str, Tensor],
) -> Tensor | None:
    """dp Wp + dg Wg [positions, C] of a block in fp32, or None if nothing before them needs it.

    `grads` is da and db of the block, [2D, positions]; `found` gets what it adds to the sums.
    """
    p, sums = step.parameters, step.sums
    double = grads.shape[0]
    projected = empty_columns(2 * double, z)
    project(p.in_weight, p.in_bias, z, out=projected)
    projected = projected.to(sum_dtype(z.dtype))
    values, gates = projected[:double], projected[double:].sigmoid_()
    if "mask" in step.needs:
        of_mask = (values * gates).mul_(grads).sum(0)
        seq.grads["mask"][window] = of_mask.view(seq.mask[window].shape)
    values.addcmul_(values, gates, value=-1)  # p (1 - s)
    gates *= grads
    if seq.mask is not None:
        gates *= seq.mask[window].reshape(1, -1)  # dp
    values *= gates  # dg
    grad_z = None
    for name, grad, weight in (
        ("p_in", gates, p.in_weight[:double]),
        ("g_in", values, p.in_weight[double:]),
    ):
        if f"{name}_bias" in sums:
            found[f"{name}_bias"] = grad.sum(1)
        operand = grad.to(z.dtype)
        if f"{name}_weight" in sums:
            found[f"{name}_weight"] = operand @ z
        if not step.needs.isdisjoint(_OF_NORM_IN):
            through = torch.mm(operand.t(), weight).to(grad.dtype)
            grad_z = through if grad_z is None else grad_z.add_(through)
    return grad_z


def _parameter_gradients(
    w: Weights, needs: frozenset[str], sums: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters' gradients in their dtypes.

    As m = mhat g2 + b2, those of g2, b2, We and be follow from the sums of de and of de^T mhat.
    """
    grads = {name: total for name, total in sums.items() if name in needs}
    if "p_out_bias" in needs:
        grads["p_out_bias"] = sums["delta"]
    if "norm_out_bias" in needs:
        grads["norm_out_bias"] = sums["delta"] @ w.p_out_weight.to(sums["delta"].dtype)
    if "norm_out_weight" in needs:
        grads["norm_out_weight"] = (sums["delta_mixed"] * w.p_out_weight).sum(0)
    if "p_out_weight" in needs:
        grad = sums["delta_mixed"]
        if w.norm_out_weight is not None:
            grad = grad * w.norm_out_weight
        if w.norm_out_bias is not None:
            grad = torch.addr(grad, sums["delta"], w.norm_out_bias.to(grad.dtype))
        grads["p_out_weight"] = grad
    leaves = w._asdict()
    return {name: grad.to(leaves[name].dtype) for name, grad in grads.items()}
