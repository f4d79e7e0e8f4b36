"""The transition on the ATen path.

    z   = LayerNorm(x; g, b)                                            [B, I, J, C]
    h   = silu(z Wg^T + bg) * (z Wu^T + bu)                             [B, I, J, H]
    out = residual + h Wd^T + bd
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._call import Transition
from .._plan import Plan
from ..validation import pairs_within
from .blocks import _cast, _layer_norm_of, shift_rows, sum_dtype


def forward(call: Transition) -> Tensor:
    """The output [B, I, J, C]."""
    out = formula(call)
    return call.residual.copy_(out) if call.inplace else out


def backward(call: Transition, grad_out: Tensor, needs: frozenset[str]) -> dict[str, Tensor]:
    """The gradients that `needs` names."""
    w, channels, wide = call.weights, call.x.shape[-1], sum_dtype(call.x.dtype)
    x = call.x
    if call.lengths is not None:
        within = pairs_within(call.lengths, call.x.shape[1])[..., None]
        x, grad_out = torch.where(within, x, 0), torch.where(within, grad_out, 0)
    gate_weight, up_weight, down_weight = (
        weight.to(wide) for weight in (w.gate_weight, w.up_weight, w.down_weight)
    )
    centred = shift_rows(x).reshape(-1, channels)
    centred -= centred.mean(-1, keepdim=True)
    rstd = centred.square().mean(-1, keepdim=True).add_(call.eps).rsqrt_()
    normal = centred * rstd
    z = normal if w.norm_weight is None else normal * w.norm_weight.to(wide)
    z = z if w.norm_bias is None else z + w.norm_bias.to(wide)
    gate = F.linear(z, gate_weight, _cast(w.gate_bias, wide))
    up = F.linear(z, up_weight, _cast(w.up_bias, wide))
    share = torch.sigmoid(gate)
    grad = grad_out.reshape(-1, channels).to(wide)
    grad_hidden = grad @ down_weight
    grad_up = grad_hidden * share * gate
    grad_gate = grad_hidden * up * share * (1 + gate * (1 - share))
    grad_z = grad_gate @ gate_weight + grad_up @ up_weight
    scaled = grad_z if w.norm_weight is None else grad_z * w.norm_weight.to(wide)
    found = {
        "gate_weight": grad_gate.T @ z, "gate_bias": grad_gate.sum(0),
        "up_weight": grad_up.T @ z, "up_bias": grad_up.sum(0),
        "down_weight": grad.T @ (share * gate * up), "down_bias": grad.sum(0),
        "norm_weight": (grad_z * normal).sum(0), "norm_bias": grad_z.sum(0),
        "x": rstd * (
            scaled - scaled.mean(-1, keepdim=True)
            - normal * (scaled * normal).mean(-1, keepdim=True)
        ),
    }  # fmt: skip
    likes = {"x": call.x, **w._asdict()}
    return {name: found[name].view(likes[name].shape).to(likes[name].dtype) for name in needs}


def formula(call: Transition) -> Tensor:
    """The output, on any device, in operations that torch.func and forward-mode AD can follow."""
    w, dtype, within = call.weights, call.x.dtype, None
    if call.lengths is not None:
        within = pairs_within(call.lengths, call.x.shape[1])[..., None]

    def linear(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(value, weight, None if bias is None else bias.to(dtype))

    x = call.x if within is None else torch.where(within, call.x, 0)
    with torch.autocast(x.device.type, enabled=False):
        z = _layer_norm_of(x, w.norm_weight, w.norm_bias, call.eps)
        hidden = F.silu(linear(z, w.gate_weight, w.gate_bias))
        hidden = hidden * linear(z, w.up_weight, w.up_bias)
        update = linear(hidden, w.down_weight, w.down_bias)
    if within is not None:
        update = torch.where(within, update, 0)
    return (update if call.residual is None else call.residual + update).contiguous()


def plan(call: Transition) -> Plan:
    """The buffers of `forward`."""
    notes = ["Triton is not for this call, for the reason above"]
    return Plan(None, None, [], {"output": call.x.nbytes}, call.x.nbytes, 0, notes)
