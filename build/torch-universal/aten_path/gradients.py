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


class _Sequence(NamedTuple):
    """One sequence of the batch."""

    x: Tensor  # [R, L, C]
    grad_out: Tensor  # [R, L, C]
    product: Tensor  # [D, R, L]
    mask: Tensor | None  # [R, L]
    drop_mask: Tensor | None  # [L, C], or [R, 1, C]
    grads: dict[str, Tensor]  # of "x", "mask" and "drop_mask", each in its shape


def trimul_backward(
    call: Call, grad_out: Tensor, saved: Tensor | None, needs: frozenset[str]
) -> dict[str, Tensor]:
    """The gradients that `needs` names, out of `DIFFERENTIABLE`, each like its leaf.

    grad_out is [B, L, L, C]; saved is the second result of `trimul_saving`, or None, and then t is
    recomputed. The residual's gradient is grad_out itself.
    """
    x, weights = call.x, call.weights
    leaves = {name: getattr(call, name) for name in ("x", "mask", "drop_mask") if name in needs}
    grads = {
        name: torch.empty(leaf.shape, dtype=leaf.dtype, device=x.device)
        for name, leaf in leaves.items()
    }
    steps = Steps(call, needs, grads)
    hidden, channels = call.hidden, x.shape[-1]
    others_in_grad_x = "x" in needs and hidden <= channels
    product = empty_planes(x, weights)[0] if saved is None else None
    planes = empty_planes(x, weights)[0] if steps.behind_product or saved is None else None
    others = None
    if steps.behind_product and not others_in_grad_x:
        others = empty_planes(x, weights)[0]
    for index in range(x.shape[0]):
        if saved is None:
            steps.multiply_again(index, product, planes)
        seq = steps.of_entry(index, grad_out[index], product if saved is None else saved[index])
        if not steps.behind_product:
            through_emission(steps, seq, None)
            if steps.behind_gate:
                through_inputs(steps, seq, None, None)
            continue
        if others_in_grad_x:
            others = _planes_within(seq.grads["x"], hidden)
        through_emission(steps, seq, planes)
        _through_product(steps, seq, planes, others)
        through_inputs(steps, seq, planes, others)
    leaves = weights._asdict()
    return grads | {
        name: grad.to(leaves[name].dtype) for name, grad in steps.of_parameters().items()
    }


class Steps:
    """What the steps of a call's backward share, whose sequences x are [R, L, C], planes [D, R, L].

    R may be some of the L rows, except in `multiply_again` and `_through_product`.

    Args:
        grads: of "x" [B, R, L, C], "mask" [B, R, L] and "drop_mask", those of `needs`, to be
            written; the last may be of a wider dtype.
    """

    def __init__(self, call: Call, needs: frozenset[str], grads: dict[str, Tensor]) -> None:
        dtype = gemm_dtype(call.x.dtype, call.x.device.type)
        self.call, self.needs, self._grads = call, needs, grads
        self.parameters = prepare(call.weights, dtype)
        self.blocks = blocks_of(call.x, _LEAST_BLOCKS)
        # Over positions: gradients of the input's and the gate's parameters, by name; "delta" [C],
        # of de; "delta_mixed" [C, D], of de^T mhat.
        self.sums = _zero_sums(call.weights, needs, sum_dtype(dtype))
        self.behind_product = not needs.isdisjoint(_BEHIND_PRODUCT)
        self.behind_gate = not needs.isdisjoint(_BEHIND_GATE)

    def of_entry(self, index: int, grad_out: Tensor, product: Tensor) -> _Sequence:
        """The sequence `index`, with its grad_out [R, L, C] and product [D, R, L]."""
        call = self.call
        return _Sequence(
            call.x[index],
            grad_out,
            product,
            None if call.mask is None else call.mask[index],
            None if call.drop_mask is None else call.drop_mask[index],
            {name: gradient[index] for name, gradient in self._grads.items()},
        )

    def multiply_again(self, index: int, product: Tensor, planes: Tensor) -> None:
        """Fills the product [D, L, L] of a sequence, with planes [D, L, L] as scratch."""
        call, p = self.call, self.parameters
        mask = None if call.mask is None else call.mask[index]
        write_planes(product, planes, call.x[index], mask, p, self.blocks, call.eps_in)
        multiply_planes(product, planes, call.direction, p.in_weight.dtype, self.blocks)

    def of_parameters(self) -> dict[str, Tensor]:
        """The parameters' gradients after all sequences, in the dtype of the sums."""
        return _parameter_gradients(self.call.weights, self.needs, self.sums)


def _zero_sums(
    weights: Weights, needs: frozenset[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The sums of `Steps`, before the first block."""
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


def _add_up(steps: Steps, sums: dict[str, Tensor], work: Callable[[slice], dict]) -> None:
    """sums[name] += work(window)[name] over the windows of a sequence, in their order."""

    def add(found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            sums[name] += value

    for_each(steps.blocks.windows, work, steps.blocks.threads, add)


def through_emission(steps: Steps, seq: _Sequence, planes: Tensor | None) -> None:
    """Writes dt to `planes` [D, R, L], unless None, and adds to the sums of the emission."""
    p, sums = steps.parameters, dict(steps.sums)
    shared = seq.drop_mask is not None and seq.drop_mask.ndim == 2
    if "drop_mask" in steps.needs and shared:
        wide = sum_dtype(seq.x.dtype)
        sums["drop_mask"] = torch.zeros_like(seq.drop_mask, dtype=wide)

    def emission(window: slice) -> dict[str, Tensor]:
        found = {}
        z = normalize_rows(seq.x[window], p, steps.call.eps_in)
        mixed, rstd = normalize_columns(seq.product[:, window], steps.call.eps_out)
        delta, gate = emit(mixed, z, p)
        grad = seq.grad_out[window].reshape(delta.shape).to(delta.dtype)
        if "drop_mask" in steps.needs:
            of_pairs = (grad * delta).mul_(gate).view(seq.x[window].shape)
            if shared:
                found["drop_mask"] = of_pairs.sum(0)
            else:
                seq.grads["drop_mask"][window] = of_pairs.sum(1, keepdim=True)
        grad_delta = gate.mul_(_times_drop_mask(grad, seq, window))
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

    _add_up(steps, sums, emission)
    if "drop_mask" in sums:
        seq.grads["drop_mask"].copy_(sums["drop_mask"])


def _times_drop_mask(grad: Tensor, seq: _Sequence, window: slice) -> Tensor:
    """dy [positions, C] of a block of whole rows; grad itself where there is no drop mask."""
    drop_mask = seq.drop_mask
    if drop_mask is None:
        return grad
    if drop_mask.ndim == 3:
        drop_mask = drop_mask[window]
    return (grad.view(seq.x[window].shape) * drop_mask).view(grad.shape)


def _through_columns(grad: Tensor, mixed: Tensor, rstd: Tensor) -> Tensor:
    """The backward of `normalize_columns`, written over `grad` [D, positions]."""
    slope = (grad * mixed).mean(0)
    grad -= grad.mean(0)
    return grad.addcmul_(mixed, slope, value=-1).mul_(rstd)


def _through_product(steps: Steps, seq: _Sequence, planes: Tensor, others: Tensor) -> None:
    """Overwrites dt in `planes` [D, L, L] with da, and fills `others` [D, L, L] with db."""
    hidden, length, _ = planes.shape
    count = hidden if len(steps.blocks.windows) == 1 else -(-hidden // _PARTS)
    right = torch.empty(count, length, length, dtype=planes.dtype, device=planes.device)
    for first in range(0, hidden, count):
        part = slice(first, first + count)
        parameters = steps.parameters.of_channels(part)
        grad, a = planes[part], others[part]
        b = right[: len(grad)]
        write_planes(a, b, seq.x, seq.mask, parameters, steps.blocks, steps.call.eps_in)
        multiply_gradients(steps, grad, a, b, grad, a)


def multiply_gradients(
    steps: Steps, grad: Tensor, a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor
) -> None:
    """da and db of some channels from dt, a and b, which they may overwrite; all [G, L, L]."""
    dtype = steps.parameters.in_weight.dtype

    def multiply(group: slice) -> None:
        dt, of_a, of_b = grad[group].to(dtype), a[group].to(dtype), b[group].to(dtype)
        if steps.call.direction == "outgoing":
            grad_a[group], grad_b[group] = torch.bmm(dt, of_b), torch.bmm(dt.mT, of_a)
        else:
            grad_a[group], grad_b[group] = torch.bmm(of_b, dt.mT), torch.bmm(of_a, dt)

    for_each(channel_groups(*grad.shape[:2], steps.blocks), multiply, steps.blocks.threads)


def through_inputs(
    steps: Steps, seq: _Sequence, grad_a: Tensor | None, grad_b: Tensor | None
) -> None:
    """The inputs' gradients from da and db [D, R, L], which are None if nothing needs them."""
    p, needs = steps.parameters, steps.needs
    wanted = ["x" in needs, "norm_in_weight" in needs, "norm_in_bias" in needs]

    def inputs(window: slice) -> dict[str, Tensor]:
        found = {}
        shifted = shift_rows(seq.x[window].flatten(0, 1))
        norm = (shifted.shape[-1:], p.norm_weight, p.norm_bias)
        z, mean, rstd = torch.native_layer_norm(shifted, *norm, steps.call.eps_in)
        z = z.to(p.in_weight.dtype)
        grad_z = _through_gate(steps, seq, window, z, found)
        if grad_a is not None:
            grads = torch.cat([grad_a[:, window], grad_b[:, window]])
            through = _through_projections(steps, seq, window, z, grads.flatten(1), found)
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

    _add_up(steps, steps.sums, inputs)


def _through_gate(
    steps: Steps, seq: _Sequence, window: slice, z: Tensor, found: dict[str, Tensor]
) -> Tensor | None:
    """dq Wo [positions, C] of a block in fp32, or None if nothing before the gate needs it.

    `found` gets what the block adds to the sums.
    """
    if steps.needs.isdisjoint(_BEHIND_GATE):
        return None
    p, sums = steps.parameters, steps.sums
    delta, gate = emit(normalize_columns(seq.product[:, window], steps.call.eps_out)[0], z, p)
    grad = seq.grad_out[window].reshape(delta.shape).to(delta.dtype)
    grad = delta.mul_(_times_drop_mask(grad, seq, window)).mul_(gate)
    grad.addcmul_(grad, gate, value=-1)
    if "g_out_bias" in sums:
        found["g_out_bias"] = grad.sum(0)
    operand = grad.to(z.dtype)
    if "g_out_weight" in sums:
        found["g_out_weight"] = operand.t() @ z
    if steps.needs.isdisjoint(_OF_NORM_IN):
        return None
    return torch.mm(operand, p.gate_weight).to(grad.dtype)


def _through_projections(
    steps: Steps,
    seq: _Sequence,
    window: slice,
    z: Tensor,
    grads: Tensor,
    found: dict[str, Tensor],
) -> Tensor | None:
    """dp Wp + dg Wg [positions, C] of a block in fp32, or None if nothing before them needs it.

    `grads` is da and db of the block, [2D, positions]; `found` gets what it adds to the sums.
    """
    p, sums = steps.parameters, steps.sums
    double = grads.shape[0]
    projected = empty_columns(2 * double, z)
    project(p.in_weight, p.in_bias, z, out=projected)
    projected = projected.to(sum_dtype(z.dtype))
    values, gates = projected[:double], projected[double:].sigmoid_()
    if "mask" in steps.needs:
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
        if not steps.needs.isdisjoint(_OF_NORM_IN):
            through = torch.mm(operand.t(), weight).to(grad.dtype)
            grad_z = through if grad_z is None else grad_z.add_(through)
    return grad_z


def _parameter_gradients(
    w: Weights, needs: frozenset[str], sums: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters' gradients in the dtype of the sums.

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
    return grads
