"""The tensors of a case.

They are drawn on the CPU, seeded by the case's name: the same numbers on every machine.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .cases import Case, TransitionCase

_OTHER_TENSORS = ("mask", "residual", "drop_mask", "lengths")  # of a problem: neither x nor weights
_HIDDEN_RESIDUES = 3
_LARGEST_INPUT = 65504.0  # float16's largest number, so that all dtypes get the same inputs


@dataclass(frozen=True)
class Problem:
    """A case's tensors.

    x: [..., L, L, C], or [..., C] of a transition. weights: the parameters by their public names,
    norms None where absent. biases: those of the linear layers that the case has. mask:
    broadcastable to the output without its channels.
    """

    case: Case | TransitionCase
    x: Tensor
    weights: dict[str, Tensor | None]
    biases: dict[str, Tensor]
    mask: Tensor | None
    residual: Tensor | None
    drop_mask: Tensor | None
    lengths: Tensor | None

    def laid_out_on(self, device: torch.device) -> Problem:
        """The same on a device, x and the mask with the strides that the case asks for."""
        case = self.case

        def move(group: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
            return {name: None if t is None else t.to(device) for name, t in group.items()}

        others = move({name: getattr(self, name) for name in _OTHER_TENSORS})
        x = LAYOUTS[case.layout](self.x.to(device, copy=True))
        if case.mask_expanded:
            others["mask"] = others["mask"].expand(x.shape[:-1])
        if case.residual == "pair":
            others["residual"] = x
        elif case.residual == "overwritten":
            others["residual"] = others["residual"].clone()
        return replace(self, x=x, weights=move(self.weights), biases=move(self.biases), **others)

    def without_constant_rows(self) -> Problem | None:
        """The same with zeros in the rows whose channels are all equal; None if there are none."""
        constant = (self.x == self.x[..., :1]).all(-1, keepdim=True)
        if not constant.any():
            return None
        return replace(self, x=self.x.masked_fill(constant, 0.0))


class _Draw:
    """Random tensors of one case, from one generator."""

    def __init__(self, case: Case | TransitionCase, seed: int) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) + seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator)


Values = Callable[[_Draw, tuple[int, ...]], Tensor]


def _trunk(draw: _Draw, shape: tuple[int, ...]) -> Tensor:
    """Rows as in a trained trunk, whose mean is not 0."""
    return draw.normal(*shape) * 1.5 + 0.3


def _cauchy(draw: _Draw, shape: tuple[int, ...]) -> Tensor:
    """Some values are thousands of times larger than most."""
    values = torch.tan(torch.pi * (draw.uniform(*shape) - 0.5))
    return values.clamp(-_LARGEST_INPUT, _LARGEST_INPUT)


def _constant(draw: _Draw, shape: tuple[int, ...], constants: tuple[float, ...]) -> Tensor:
    """Every second pair has one of the constants, in turn, in all its channels."""
    x = _trunk(draw, shape)
    rows = x.view(-1, shape[-1])
    for number, constant in enumerate(constants):
        rows[2 * number :: 2 * len(constants)] = constant
    return x


def _large_means(draw: _Draw, shape: tuple[int, ...], mean: float) -> Tensor:
    return draw.normal(*shape) + mean * (draw.uniform(*shape[:-1], 1) - 0.5).sign()


INPUTS: dict[str, Values] = {
    "trunk": _trunk,
    "cauchy": _cauchy,
    "constant rows": partial(_constant, constants=(1000.0, 999.9, 27182.818, 0.1, -12345.678)),
    "huge constant rows": partial(_constant, constants=(1e30, -3e38, 7e25)),
    "means of 25 deviations": partial(_large_means, mean=25.0),
    "means of 1000 deviations": partial(_large_means, mean=1000.0),
}


def _padding(draw: _Draw, shape: tuple[int, ...]) -> Tensor:
    """The last residues are hidden."""
    length = shape[-1]
    real = torch.arange(length) < max(1, length - _HIDDEN_RESIDUES)
    rows = real[:, None] if shape[-2] == length else real.new_ones(1, 1)
    return (rows & real).expand(shape).contiguous()


def _masked_rows(draw: _Draw, shape: tuple[int, ...]) -> Tensor:
    """A random mask that also hides all pairs of a third of the residues i, and of some j."""
    mask = draw.uniform(*shape) > 0.3
    mask[..., 1::3, :] = False
    mask[..., 2::5] = False
    return mask


MASKS: dict[str, Values] = {
    "bool": _padding,
    "random": lambda draw, shape: draw.uniform(*shape) > 0.3,
    "soft": lambda draw, shape: draw.uniform(*shape),
    "soft, dtype of x": lambda draw, shape: draw.uniform(*shape).to(draw.case.torch_dtype),
    "integers": lambda draw, shape: (draw.uniform(*shape) > 0.3).long(),
    "masked rows": _masked_rows,
    "all zero": lambda draw, shape: torch.zeros(shape, dtype=torch.bool),
    "all zero, float": lambda draw, shape: torch.zeros(shape),
}


def _sliced(x: Tensor) -> Tensor:
    """A slice of a wider tensor's channels, at an address that is no multiple of 16 bytes."""
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 5)
    wide[..., 5:] = x
    return wide[..., 5:]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels first": lambda x: x.movedim(-1, -3).contiguous().movedim(-3, -1),
    "residues swapped": lambda x: x.transpose(-2, -3).contiguous().transpose(-2, -3),
    "sliced channels": _sliced,
    "every second sequence": lambda x: torch.stack([x, x], dim=1)[:, 0],
}


def make_problem(case: Case | TransitionCase, seed: int = 0) -> Problem:
    """The case's tensors on the CPU, with x and the mask not yet in the case's strides."""
    draw = _Draw(case, seed)
    if isinstance(case, TransitionCase):
        return _transition_problem(case, draw)
    channels, hidden, length, dtype = case.channels, case.hidden, case.length, case.torch_dtype
    shape = (*case.leading, length, length, channels)
    x = (INPUTS[case.x](draw, shape) * case.scale).to(dtype)

    def projection(rows: int, columns: int, factor: float = 1.0) -> Tensor:
        return (draw.normal(rows, columns) * factor * columns**-0.5).to(dtype)

    wide = 8.0 if case.weights == "wide gates" else 1.0
    weights = {
        "norm_in_weight": 1 + 0.2 * draw.normal(channels),
        "norm_in_bias": 0.2 * draw.normal(channels),
        "p_in_weight": projection(2 * hidden, channels),
        "g_in_weight": projection(2 * hidden, channels, wide),
        "norm_out_weight": 1 + 0.2 * draw.normal(hidden),
        "norm_out_bias": 0.2 * draw.normal(hidden),
        "p_out_weight": projection(channels, hidden),
        "g_out_weight": projection(channels, channels, wide),
    }
    if case.weights == "fine norms":
        # The logit of the output gate is near -6, which multiplies a relative error of the norm by
        # six in the gate, in all channels alike. In bfloat16 1.0035 is 1, and 2.007 is 2.
        weights["norm_in_weight"] = torch.full((channels,), 1.0035)
        weights["norm_in_bias"] = torch.full((channels,), 2.007)
        weights["g_out_weight"] = (weights["g_out_weight"] * 0.1 - 3 / channels).to(dtype)
    _set_norms(case, weights)
    of_hidden = {"p_in_bias": 2 * hidden, "g_in_bias": 2 * hidden}
    biases = {
        name: (0.3 * draw.normal(of_hidden.get(name, channels))).to(dtype) for name in case.biases
    }
    mask = None if case.mask == "none" else MASKS[case.mask](draw, case.mask_shape)
    residual, drop_mask = _residual(case, draw, x), _drop_mask(case, draw, x)
    return Problem(case, x, weights, biases, mask, residual, drop_mask, _lengths(case))


def _transition_problem(case: TransitionCase, draw: _Draw) -> Problem:
    channels, hidden, dtype = case.channels, case.hidden, case.torch_dtype
    x = (INPUTS[case.x](draw, (*case.rows, channels)) * case.scale).to(dtype)
    wide = 8.0 if case.weights == "wide gates" else 1.0
    gate_and_up = draw.normal(2 * hidden, channels) * channels**-0.5
    weights = {
        "norm_weight": 1 + 0.2 * draw.normal(channels),
        "norm_bias": 0.2 * draw.normal(channels),
        "gate_weight": (gate_and_up[:hidden] * wide).to(dtype),
        "up_weight": gate_and_up[hidden:].to(dtype),
        "down_weight": (draw.normal(channels, hidden) * hidden**-0.5).to(dtype),
    }
    if case.weights == "fine norms":  # as for the triangle, here in the logits of all gates
        weights["norm_weight"] = torch.full((channels,), 1.0035)
        weights["norm_bias"] = torch.full((channels,), 2.007)
        weights["gate_weight"] = (weights["gate_weight"] * 0.1 - 3 / channels).to(dtype)
    _set_norms(case, weights)
    widths = {"gate_bias": hidden, "up_bias": hidden, "down_bias": channels}
    biases = {name: (0.3 * draw.normal(widths[name])).to(dtype) for name in case.biases}
    residual = _residual(case, draw, x)
    return Problem(case, x, weights, biases, None, residual, None, _lengths(case))


def _set_norms(case: Case | TransitionCase, weights: dict[str, Tensor | None]) -> None:
    """The norms' parameters in the case's dtype, or None where they are absent."""
    for name in [name for name in weights if name.startswith("norm_")]:
        if case.norms == "absent":
            weights[name] = None
        else:
            weights[name] = weights[name].to(getattr(torch, case.norms))


def _lengths(case: Case | TransitionCase) -> Tensor | None:
    if case.lengths is None:
        return None
    lengths = torch.tensor(case.lengths, dtype=getattr(torch, case.lengths_dtype))
    return lengths.view(case.leading)


def _residual(case: Case | TransitionCase, draw: _Draw, x: Tensor) -> Tensor | None:
    if case.residual == "none":
        return None
    return x if case.residual == "pair" else draw.normal(*x.shape).to(x.dtype)


def _drop_mask(case: Case, draw: _Draw, x: Tensor) -> Tensor | None:
    if case.drop_mask == "none":
        return None
    (batch,), length, channels = case.leading, case.length, case.channels
    kept = draw.uniform(batch, 1, length, channels) > 0.25
    if case.drop_mask == "bool":
        return kept
    drop_mask = (kept / 0.75).to(x.dtype)
    return drop_mask if case.drop_mask == "[B, 1, L, C]" else drop_mask.view(-1, channels)
