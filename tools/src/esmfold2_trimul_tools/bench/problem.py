"""The benchmark's problems: the random inputs of one shape, and its float64 answer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import oracle
from .case import EPS, Case

_HIDDEN_RESIDUES = 3
_CHANNELS_AT_ONCE = 16  # of float64 planes: 0.5 GB each at L = 2048
_ROWS_AT_ONCE = 64
_SAMPLED = 16


class Problem(NamedTuple):
    """x [B, L, L, C], the parameters by their public names (norms in float32), the mask.

    grad_out is the gradient of the output, where gradients are asked for. The other fields are for
    the conformance suite, which also varies eps, absent norms, biases of the linear layers (by
    their public names), and so on.
    """

    case: Case
    x: Tensor
    weights: dict[str, Tensor | None]
    mask: Tensor | None
    grad_out: Tensor | None = None
    eps: float = EPS
    biases: Mapping[str, Tensor] = MappingProxyType({})
    residual: Tensor | None = None
    drop_mask: Tensor | None = None
    precision: str | None = None


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Random inputs as in a trained trunk: rows of mean 0.3, uneven norm weights, padding.

    The mask hides the last three residues.
    """
    generator = torch.Generator(device).manual_seed(seed)
    channels, hidden, length = case.channels, case.hidden, case.length

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def projection(rows: int, columns: int) -> Tensor:
        return randn(rows, columns).mul_(columns**-0.5).to(case.torch_dtype)

    x = torch.empty(case.batch, length, length, channels, dtype=case.torch_dtype, device=device)
    for rows in x.split(_ROWS_AT_ONCE, dim=1):  # in float32 it may not fit
        rows.copy_(randn(*rows.shape).mul_(1.5).add_(0.3))
    grad_out = None
    if case.is_transition:
        gate_and_up = projection(2 * hidden, channels)  # halves of one matrix, as in ESMFold2
        weights = {
            "norm_weight": 1 + 0.2 * randn(channels),
            "norm_bias": 0.2 * randn(channels),
            "gate_weight": gate_and_up[:hidden],
            "up_weight": gate_and_up[hidden:],
            "down_weight": projection(channels, hidden),
        }
        if case.passes == "training":
            grad_out = randn(*x.shape).to(case.torch_dtype)
        return Problem(case, x, weights, None, grad_out)
    weights = {
        "norm_in_weight": 1 + 0.2 * randn(channels),
        "norm_in_bias": 0.2 * randn(channels),
        "p_in_weight": projection(2 * hidden, channels),
        "g_in_weight": projection(2 * hidden, channels),
        "norm_out_weight": 1 + 0.2 * randn(hidden),
        "norm_out_bias": 0.2 * randn(hidden),
        "p_out_weight": projection(channels, hidden),
        "g_out_weight": projection(channels, channels),
    }
    mask = None
    if case.mask != "none":
        real = torch.arange(length, device=device) < max(1, length - _HIDDEN_RESIDUES)
        mask = (real[:, None] & real[None, :]).expand(case.batch, -1, -1).contiguous()
        mask = mask.float() if case.mask == "float" else mask
    if case.passes == "training":
        grad_out = randn(*x.shape).to(case.torch_dtype)
    return Problem(case, x, weights, mask, grad_out)


def reference(problem: Problem) -> Tensor:
    """The output [B, L, L, C] in float64, on the problem's device, in the steps of the oracle.

    Never holds more than two float64 tensors of the pair's size: a and b exist for a few channels
    at a time, and the answer overwrites their product, a few rows at a time. So do a transition's.
    """
    case, w = problem.case, problem.weights
    z = problem.x.double()
    if case.is_transition:
        for rows in z.split(_ROWS_AT_ONCE, dim=1):
            rows.copy_(oracle.transition(rows, w, residual=rows, eps=EPS))
        return z
    for rows in z.split(_ROWS_AT_ONCE, dim=1):
        rows.copy_(oracle.norm(rows, w, "norm_in", EPS))
    t = z.new_empty(*z.shape[:-1], case.hidden)
    for group in torch.arange(case.hidden).split(_CHANNELS_AT_ONCE):
        both = torch.cat([group, case.hidden + group])
        part = w | {name: w[name][both] for name in ("p_in_weight", "g_in_weight")}
        a, b = oracle.operands(z, part, problem.mask)
        t[..., group] = oracle.product(a, b, case.direction)
        del a, b

    # D = C, so the answer fits where the product was.
    for t_rows, z_rows in zip(t.split(_ROWS_AT_ONCE, 1), z.split(_ROWS_AT_ONCE, 1), strict=True):
        t_rows.copy_(oracle.update(t_rows, z_rows, w, EPS))
    return t


def reference_gradient(problem: Problem) -> Tensor:
    """The gradient of x [B, L, L, C] in float64, by autograd of the oracle.

    A transition's rows are independent of each other.
    """
    if problem.case.is_transition:
        gradient = problem.grad_out.double()
        for start in range(0, problem.case.length, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            x = problem.x[:, rows].double().requires_grad_()
            with torch.enable_grad():
                out = oracle.transition(x, problem.weights, residual=x, eps=EPS)
            gradient[:, rows] = torch.autograd.grad(out, x, gradient[:, rows])[0]
        return gradient
    x = problem.x.double().requires_grad_()
    with torch.enable_grad():
        out = oracle.triangle_multiplication(
            x, problem.case.direction, problem.weights, mask=problem.mask, eps=EPS
        )
    return torch.autograd.grad(out, x, problem.grad_out.double())[0]


class Sample(NamedTuple):
    """The float64 answer [B, R, R, C] at the pairs of residues i [R] with residues j [R]."""

    i: Tensor
    j: Tensor
    wanted: Tensor

    def of(self, out: Tensor) -> Tensor:
        """The same pairs of an output [B, L, L, C]."""
        return out[:, self.i[:, None], self.j]


def sample(problem: Problem) -> Sample:
    """The reference at the pairs of 16 residues i with 16 residues j, for any L.

    Both are the first, the last and random ones. Of x only their pairs with all residues are read.
    """
    case = problem.case
    generator = torch.Generator().manual_seed(0)

    def residues() -> Tensor:
        inner = 1 + torch.randperm(max(0, case.length - 2), generator=generator)[: _SAMPLED - 2]
        ends = torch.tensor([0, case.length - 1])
        return torch.cat([ends, inner]).unique().to(problem.x.device)

    w, sides = problem.weights, []
    i, j = residues(), residues()
    for number, sampled in enumerate((i, j)):
        # All pairs of a residue: its row where outgoing, its column where incoming.
        side = 1 if case.direction == "outgoing" else 2
        rows = problem.x.index_select(side, sampled)
        mask = None if problem.mask is None else problem.mask.index_select(side, sampled)
        if case.direction == "incoming":
            rows, mask = rows.transpose(1, 2), None if mask is None else mask.mT
        z = oracle.norm(rows.double(), w, "norm_in", EPS)
        sides.append(oracle.operands(z, w, mask)[number])  # [B, R, L, D]
    t = oracle.product(*sides, "outgoing")
    z = oracle.norm(problem.x[:, i[:, None], j].double(), w, "norm_in", EPS)
    return Sample(i, j, oracle.update(t, z, w, EPS))


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """||got - wanted|| / ||wanted|| over the whole of [B, L, L, C], in float64; NaN if any is."""
    off = wanted.new_zeros(())
    size = wanted.new_zeros(())
    pieces = zip(got.split(_ROWS_AT_ONCE, 1), wanted.split(_ROWS_AT_ONCE, 1), strict=True)
    for got_rows, wanted_rows in pieces:
        off += (got_rows.double() - wanted_rows).square().sum()
        size += wanted_rows.square().sum()
    return float((off / size).sqrt())
