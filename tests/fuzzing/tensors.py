"""The tensors of a case: their values, and where they lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import (
    BIASES,
    NORMS,
    PROJECTIONS,
    TRANSITION,
    TRANSITION_BIASES,
    TRANSITION_NORMS,
    TRANSITION_PROJECTIONS,
    WITH_RESIDUAL,
    Case,
    Layout,
    Mask,
    TransitionCase,
    pairs_within,
    shapes_of,
)


@dataclass
class Call:
    """A case with its tensors."""

    function: str
    arguments: dict[str, object]  # by the names of the function's arguments
    tensors: dict[str, Tensor]  # those given, by the names of `shapes_of`
    values: dict[str, Tensor]  # the same and the made projections on the CPU in float64
    buffers: dict[str, Tensor]  # the memory that each lies in


_VECTORS = (*NORMS, *BIASES, *TRANSITION_NORMS, *TRANSITION_BIASES)


def make(case: Case | TransitionCase, device: str, projection: Callable[..., Tensor]) -> Call:
    """The call on `device`; `projection(shape, dtype)` draws one of those that are None."""
    generator = torch.Generator().manual_seed(case.seed)
    shapes = shapes_of(case)
    values = {name: _values(case, name, shape, generator) for name, shape in shapes.items()}
    for name, layout in case.layouts.items():
        if layout.shared is not None:
            first = values[name][(slice(None),) * layout.shared + (slice(1),)]
            values[name] = first.expand(values[name].shape)
    if case.lengths is not None and case.lengths.poisoned:
        within = pairs_within(values["lengths"].expand(case.result_leading), case.length)
        values["x"] = torch.where(within[..., None], values["x"], torch.nan)
    tensors, buffers = {}, {}
    for name, value in values.items():
        tensors[name], buffers[name] = place(value, case.layouts.get(name), device)
    if case.bundled:
        both = torch.cat([values[name] for name in case.halves]).to(device)
        tensors |= dict(zip(case.halves, both.chunk(2), strict=True))
        buffers |= dict.fromkeys(case.halves, both)
    arguments = dict.fromkeys((*case.norms, *case.projections)) | tensors
    arguments |= {"eps": case.eps, "precision": case.precision}
    residual = tensors["x"] if case.residual == "pair" else tensors.get("residual")
    if case.function == TRANSITION:
        arguments |= {"residual": residual, "inplace": case.inplace}
    else:
        arguments |= {
            "direction": case.direction, "memory": case.memory, "recompute": case.recompute
        }  # fmt: skip
    if case.function == WITH_RESIDUAL:
        arguments["pair"] = arguments.pop("x")
        arguments |= {"residual": residual, "drop_mask": tensors.get("drop_mask")}
        arguments |= {"eps_out": case.eps_out, "inplace": case.inplace}
    if case.made:
        torch.manual_seed(case.seed)
        wanted = dict(zip(PROJECTIONS, _projection_shapes(case), strict=True))
        made = (name for name in PROJECTIONS if name in case.made)
        values |= {name: projection(wanted[name], case.dtype, device) for name in made}
        torch.manual_seed(case.seed)
    wide = {name: value.detach().cpu().double() for name, value in values.items()}
    wide["x"] = wide["x"].nan_to_num(0.0)
    return Call(case.function, arguments, tensors, wide, buffers)


def _projection_shapes(case: Case) -> tuple[tuple[int, int], ...]:
    inner = (2 * case.hidden, case.channels)
    return inner, inner, (case.channels, case.hidden), (case.channels, case.channels)


def lecun(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    """A projection as docs/cuequivariance.md says that one is made: see `make`."""
    within = math.erf(2**0.5)  # the share of a normal distribution within two deviations
    drawn = torch.rand(shape, dtype=torch.float32, device=device)
    normal = torch.erfinv((2 * drawn - 1) * within) * 2**0.5
    return (normal * (shape[1] ** -0.5 / 0.87962566103423978)).to(dtype)


def _values(
    case: Case, name: str, shape: tuple[int, ...], generator: torch.Generator
) -> Tensor:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if name == "lengths":
        return torch.tensor(case.lengths.values, dtype=case.lengths.dtype).reshape(shape)
    if name in ("mask", "drop_mask"):
        return _mask_values(getattr(case, name), generator)
    scale = case.scales.get(name, 1.0)
    if name in _VECTORS:
        value = 1 + 0.2 * randn(*shape) if name.endswith("weight") else 0.3 * randn(*shape)
        return _between(value * scale, case.dtype).to(case.vectors[name])
    if name in PROJECTIONS or name in TRANSITION_PROJECTIONS:
        return (randn(*shape) * (scale * shape[1] ** -0.5)).to(case.dtype)
    value = (1.5 * randn(*shape) + 0.3) * scale
    if name == "x":
        means = 100 * scale * randn(*shape[:-1], 1)
        if case.rows == "large means":
            value = value + means
        elif case.rows == "some constant":
            value = torch.where(randn(*shape[:-1], 1) > 0.5, means, value)
        elif case.rows == "constant":
            value = means.expand(shape)
    if case.dtype == torch.float16:
        value = value.clamp(-3e4, 3e4)
    return value.to(case.dtype)


def _between(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers like these that rounding to 16 bits would change most, and all towards zero."""
    if dtype == torch.float32:
        return value
    unit = torch.finfo(dtype).eps * torch.exp2(torch.frexp(value).exponent - 1)
    return value.to(dtype) + 0.45 * unit * value.sign()


def _mask_values(mask: Mask, generator: torch.Generator) -> Tensor:
    if mask.kind == "soft":
        value = torch.rand(mask.shape, generator=generator)
    elif mask.kind == "signed":
        value = 3 * torch.rand(mask.shape, generator=generator) - 1
    elif mask.kind == "zeros":
        value = torch.zeros(mask.shape)
    elif mask.kind == "random":
        most = 2 if mask.dtype == torch.bool else 3
        value = torch.randint(most, mask.shape, generator=generator)
    else:
        value = torch.ones(mask.shape)
        for axis in range(-min(2, len(mask.shape)), 0):
            extent = mask.shape[axis]
            value.narrow(axis, extent - extent // 3, extent // 3).zero_()
    return value.to(mask.dtype)


def place(value: Tensor, layout: Layout | None, device: str) -> tuple[Tensor, Tensor]:
    """The value where the layout says, and the memory around it."""
    if layout is None:
        layout = Layout(tuple(range(value.ndim)))
    shape = list(value.shape)
    if layout.shared is not None:
        shape[layout.shared] = min(1, shape[layout.shared])
    steps = [2 if axis == layout.gap else 1 for axis in range(value.ndim)]
    extents = [shape[axis] * steps[axis] for axis in layout.order]
    filler = math.nan if value.is_floating_point() else 99
    size = math.prod(extents)
    buffer = torch.full((layout.offset + size + 8,), filler).to(device, value.dtype)
    whole = buffer[layout.offset : layout.offset + size].view(extents)
    inverse = sorted(range(value.ndim), key=layout.order.__getitem__)
    view = whole.permute(inverse)[tuple([slice(None, None, step) for step in steps])]
    view.copy_(value[tuple([slice(extent) for extent in shape])])
    return view.expand(value.shape), buffer
