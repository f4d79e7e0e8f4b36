"""The formulas behind every check: AlphaFold 2, Supplementary 1.6.5, Algorithms 11 and 12, and the
transition beside them, Supplementary 1.6.7, with AlphaFold 3's gated unit.

Plain PyTorch, line by line. Every result has the dtype of its operands, but norms run in float32 at
least. With float64 operands it is the definition; with 16-bit operands it is what a model without
the kernel computes. It shares no code with the kernel package.

Parameters have the names of the public functions' arguments, in any dtype. Norms' parameters and
biases may be absent. Each step is a function of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = Mapping[str, Tensor | None]


def triangle_multiplication(
    x: Tensor,
    direction: str,
    parameters: Parameters,
    *,
    mask: Tensor | None = None,
    residual: Tensor | None = None,
    drop_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The update [..., L, L, C] of x, every operation's result in `dtype`.

    The drop mask, [B, 1, L, C] or flat, and the residual are applied last. A pair with a residue
    beyond its sequence's length contributes nothing and gets no update.
    """
    real = None if lengths is None else _real_pairs(lengths, x.shape[-2])
    z = norm(x.to(dtype), parameters, "norm_in", eps)
    a, b = operands(z, parameters, mask, real)
    out = update(product(a, b, direction), z, parameters, eps)
    if real is not None:
        out = out * real.to(dtype).unsqueeze(-1)
    if drop_mask is not None:
        out = out * drop_mask.to(dtype).reshape(x.shape[0], 1, *x.shape[-2:])
    return out if residual is None else residual.to(dtype) + out


def transition(
    x: Tensor,
    parameters: Parameters,
    *,
    residual: Tensor | None = None,
    lengths: Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The transition [..., C] of x, every operation's result in `dtype`.

    With lengths x is [..., L, L, C], and a pair with a residue beyond its sequence's length gets no
    update.
    """
    z = norm(x.to(dtype), parameters, "norm", eps)
    out = _linear(gated(z, parameters), parameters, "down")
    if lengths is not None:
        out = out * _real_pairs(lengths, x.shape[-2]).to(dtype).unsqueeze(-1)
    return out if residual is None else residual.to(dtype) + out


def norm(value: Tensor, parameters: Parameters, name: str, eps: float) -> Tensor:
    """LayerNorm over the channels; `name` is "norm_in", "norm_out" or a transition's "norm"."""
    wide = torch.promote_types(value.dtype, torch.float32)
    weight, bias = (_cast(parameters.get(f"{name}_{part}"), wide) for part in ("weight", "bias"))
    return F.layer_norm(value.to(wide), value.shape[-1:], weight, bias, eps).to(value.dtype)


def gated(z: Tensor, parameters: Parameters) -> Tensor:
    """A transition's hidden channels [..., H] of the normed z [..., C]."""
    return F.silu(_linear(z, parameters, "gate")) * _linear(z, parameters, "up")


def operands(z: Tensor, parameters: Parameters, *masks: Tensor | None) -> tuple[Tensor, Tensor]:
    """a and b [..., L, L, D] of the normed z [..., L, L, C]; masks [..., L, L] hide pairs."""
    ab = _linear(z, parameters, "p_in") * _linear(z, parameters, "g_in").sigmoid()
    for mask in masks:
        ab = ab if mask is None else ab * mask.to(z.dtype).unsqueeze(-1)
    a, b = ab.chunk(2, dim=-1)
    return a, b


def product(a: Tensor, b: Tensor, direction: str) -> Tensor:
    """The triangular product t [..., L, L, D], channel by channel."""
    if direction == "outgoing":
        return torch.einsum("...ikd,...jkd->...ijd", a, b)
    return torch.einsum("...kid,...kjd->...ijd", a, b)


def update(t: Tensor, z: Tensor, parameters: Parameters, eps: float) -> Tensor:
    """The update [..., L, L, C] from the product and the normed input."""
    mixed = norm(t, parameters, "norm_out", eps)
    return _linear(mixed, parameters, "p_out") * _linear(z, parameters, "g_out").sigmoid()


def _linear(value: Tensor, parameters: Parameters, name: str) -> Tensor:
    weight = parameters[f"{name}_weight"].to(value.dtype)
    return F.linear(value, weight, _cast(parameters.get(f"{name}_bias"), value.dtype))


def _cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _real_pairs(lengths: Tensor, length: int) -> Tensor:
    """[..., L, L] bool: pairs of residues that are both within their sequence's length."""
    real = torch.arange(length, device=lengths.device) < lengths.unsqueeze(-1)
    return real.unsqueeze(-1) & real.unsqueeze(-2)
