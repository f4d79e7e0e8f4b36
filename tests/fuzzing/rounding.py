"""The formula, exact or with a random error wherever plain PyTorch would round."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import PROJECTIONS, Case, TransitionCase, pairs_within

# Beyond it float16 overflows, a little early as the values are not the kernels' own.
HALF_RANGE = 6e4
HALF_LEAST = 2.0**-25  # half of the least number of float16
FLOAT32_UNIT = 2.0**-21  # relative error of a float32 sum: eight roundings


class Rounding:
    """Random errors such as plain PyTorch makes in a dtype, in values and in their gradients.

    Stored values, and their gradients, have relative errors up to `unit`; where that is less than
    the dtype can hold (a subnormal that may be flushed, or in float16 half of the least one), up to
    that. Norms and sigmoids are in float32, whose errors stand out where terms cancel.
    """

    def __init__(self, dtype: torch.dtype, unit: float, seed: int) -> None:
        self.dtype, self.unit = dtype, unit
        self.least = HALF_LEAST if dtype == torch.float16 else torch.finfo(dtype).tiny
        self.gates_least = HALF_LEAST if dtype.itemsize == 2 else self.least
        self.float32 = FLOAT32_UNIT
        self._largest = 0.0
        self._others: dict[torch.dtype, Rounding] = {}
        self._seed, self._random = seed, random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, value: Tensor) -> Tensor:
        return _Rounded.apply(value, self, self.least)

    def sums(self, value: Tensor) -> Tensor:
        """Results of float32 sums as they are stored.

        Equal ones may have been summed in different orders, and then are not alike.
        """
        noise = 2 * torch.rand(value.shape, generator=self._generator, dtype=value.dtype) - 1
        return self(value) + self.float32 * value.detach().abs() * noise

    def gate(self, value: Tensor) -> Tensor:
        """The output's gate, which the kernels hold as float16 where the dtype has 16 bits."""
        return _Rounded.apply(value, self, self.gates_least)

    def of(self, value: Tensor, least: float) -> Tensor:
        """The value with an error."""
        self._see(value)
        size = (self.unit * value.abs()).clamp_min(least)
        return value + self.error(value, torch.where(value == 0, 0.0, size))

    def _see(self, value: Tensor) -> None:
        if value.numel():
            self._largest = max(self._largest, float(value.abs().max()))

    def to(self, dtype: torch.dtype) -> Rounding | Exact:
        """Random errors of one rounding to nearest in a leaf's own dtype."""
        if not dtype.is_floating_point:
            return Exact()
        if dtype not in self._others:
            self._others[dtype] = Rounding(dtype, torch.finfo(dtype).eps / 2, self._seed)
        return self._others[dtype]

    @property
    def overflows(self) -> bool:
        """Whether a value was beyond the range of float16, if that is the dtype."""
        own = self.dtype == torch.float16 and self._largest > HALF_RANGE
        return own or any(other.overflows for other in self._others.values())

    def error(self, value: Tensor, size: Tensor) -> Tensor:
        """Errors of up to these sizes; where values are alike they are alike, as roundings are."""
        spread = 1e6 * (1 + self._random.random())
        return size * (2 * (torch.frexp(value).mantissa * spread).frac().abs() - 1)


class Exact:
    """No errors, in any dtype."""

    unit = float32 = 0.0

    def __call__(self, value: Tensor) -> Tensor:
        return value

    gate = sums = __call__

    def to(self, dtype: torch.dtype) -> Exact:
        return self

    def error(self, value: Tensor, size: Tensor) -> Tensor:
        return torch.zeros_like(size)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, rounding: Rounding, least: float) -> Tensor:
        ctx.rounding = rounding
        return rounding.of(value, least)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.rounding.of(grad, ctx.rounding.least), None, None


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, rounding: Rounding | Exact) -> Tensor:
        ctx.rounding = rounding
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.rounding(grad), None


class _Normalised(torch.autograd.Function):
    """LayerNorm without parameters; the means have errors of a float32 sum."""

    @staticmethod
    def forward(
        ctx, value: Tensor, eps: float, rounding: Rounding | Exact, rounds_behind: bool
    ) -> Tensor:
        def mean(terms: Tensor) -> Tensor:
            mean = terms.mean(-1, keepdim=True)
            size = rounding.float32 * terms.abs().mean(-1, keepdim=True)
            return mean + rounding.error(mean, size)

        # A norm does not see a shift, and nothing is left of a constant row that could be rounded.
        centred = value - value[..., :1]
        centred = centred - mean(centred)
        rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
        out = centred * rstd
        # The mean behind it may be one of the values as they were rounded for the next product.
        ctx.save_for_backward(out, rounding(out) if rounds_behind else out, rstd)
        ctx.mean = mean
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out, rounded, rstd = ctx.saved_tensors
        return rstd * (grad - ctx.mean(grad) - out * ctx.mean(grad * rounded)), None, None, None


class _Sigmoid(torch.autograd.Function):
    """The derivative s (1 - s) is that of a rounded s."""

    @staticmethod
    def forward(ctx, value: Tensor, rounding: Rounding | Exact) -> Tensor:
        out = torch.sigmoid(value)
        out = out + rounding.error(out, rounding.float32 * out)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return grad * out * (1 - out), None


def _steps(
    values: dict[str, Tensor],
    names: tuple[str, ...],
    rounding: Rounding | Exact,
    weights: Rounding | Exact,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """linear(value, kind) and layer_norm(value, kind, eps), by the parameters' names."""
    projections = {name: weights(values[name]) for name in names}

    def linear(value: Tensor, kind: str) -> Tensor:
        bias = values.get(f"{kind}_bias")
        return rounding.sums(F.linear(value, projections[f"{kind}_weight"], bias))

    def layer_norm(value: Tensor, kind: str, eps: float) -> Tensor:
        value = _Normalised.apply(value, eps, rounding, kind == "norm_out")
        weight, bias = (values.get(f"{kind}_{part}") for part in ("weight", "bias"))
        value = value if weight is None else value * weight
        return rounding(value if bias is None else value + bias)

    return linear, layer_norm


def formula(
    case: Case, values: dict[str, Tensor], rounding: Rounding | Exact, weights: Rounding | Exact
) -> tuple[Tensor, Tensor]:
    """The result and t [..., L, L, D] in the values' dtype; `weights` rounds the matrices."""
    x, v, within = values["x"], values.get, None
    linear, layer_norm = _steps(values, PROJECTIONS, rounding, weights)
    z = layer_norm(x, "norm_in", case.eps)
    ab = linear(z, "p_in") * _Sigmoid.apply(linear(z, "g_in"), rounding)
    if "mask" in values:
        # Autograd sums a shared mask's gradient over pairs that each have theirs in its dtype.
        mask = v("mask").expand(*case.result_leading, *x.shape[-3:-1])
        ab = ab * _RoundedGradient.apply(mask, rounding.to(case.mask.dtype)).unsqueeze(-1)
    if case.lengths is not None:
        lengths = v("lengths").expand(case.result_leading)
        within = pairs_within(lengths, case.length).unsqueeze(-1)
        ab = ab * within
    a, b = rounding(ab).chunk(2, dim=-1)
    if case.direction == "outgoing":
        t = torch.einsum("...ikd,...jkd->...ijd", a, b)
    else:
        t = torch.einsum("...kid,...kjd->...ijd", a, b)
    t = rounding.sums(t)
    mixed = layer_norm(t, "norm_out", case.eps if case.eps_out is None else case.eps_out)
    gate = rounding.gate(_Sigmoid.apply(linear(z, "g_out"), rounding))
    delta = linear(mixed, "p_out") * gate
    if "drop_mask" in values:
        delta = delta * v("drop_mask").reshape(-1 if x.numel() else 0, 1, *x.shape[-2:])
    if within is not None:
        delta = torch.where(within, delta, 0.0)
    if case.residual is not None:
        delta = (x if case.residual == "pair" else values["residual"]) + delta
    return rounding(delta), t


def transition(
    case: TransitionCase,
    values: dict[str, Tensor],
    rounding: Rounding | Exact,
    weights: Rounding | Exact,
) -> Tensor:
    """The result in the values' dtype; `weights` rounds the matrices."""
    x = values["x"]
    linear, layer_norm = _steps(values, case.projections, rounding, weights)
    z = layer_norm(x, "norm", case.eps)
    gate = linear(z, "gate")
    hidden = rounding(gate * _Sigmoid.apply(gate, rounding)) * linear(z, "up")
    delta = linear(rounding(hidden), "down")
    if case.lengths is not None:
        lengths = values["lengths"].expand(case.result_leading)
        delta = torch.where(pairs_within(lengths, case.length).unsqueeze(-1), delta, 0.0)
    if case.residual is not None:
        delta = (x if case.residual == "pair" else values["residual"]) + delta
    return rounding(delta)
