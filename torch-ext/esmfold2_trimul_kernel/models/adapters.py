"""Other models' triangle multiplications and transitions as arguments of our functions.

    update = triangle_multiplicative_update(pair, mask=mask, **from_boltz(triangle))
    update = swiglu_transition(pair, **transition_from_boltz(transition))

Each function reads one module of a family by the names of its parameters and gives eps, every
weight and bias, None where the module has none, and a triangle's direction. The tensors are the
module's parameters themselves, or are put together from them anew in each call: gradients reach the
parameters, and nothing goes stale when they change. A module whose parts are not those of its
family (a layer that is quantised or has a hook, an adapter other than LoRA, a part more or less) is
refused, because its weights alone would not say what it computes: see parts.py. With `dtype` the
projections are cast to it, as a call under torch.autocast needs it; biases and norms stay as they
are.

`patch` of patching.py calls these for every module of a model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..validation import DIRECTIONS
from .parts import (
    Linear,
    Norm,
    describe,
    fault_of_call,
    fault_of_linear,
    fault_of_norm,
    fault_of_replicated_linear,
    fault_of_replicated_norm,
    linear_of,
    norm_of,
    replicated_linear_of,
    replicated_norm_of,
)

_NAMES_SHOWN = 8  # in an error: a whole model has thousands
# Parts that a module may have besides, by the names of their classes.
_ACTIVATIONS = {
    "sigmoid": ("Sigmoid",),
    "silu": ("SiLU",),
    "swish": ("SiLU",),
    "activation_fn": ("SiLU", "SiLUActivation"),
    # The copy of its weights that esm's "fused" backend runs; None once that was chosen and left.
    "_fused_swiglu": ("FusedLNLinearSwiGLU", "NoneType"),
}


def from_openfold(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The arguments that say what a triangle multiplication of the OpenFold family computes.

    That is OpenFold's, with `linear_a_p` and the like or fused into `linear_ab_p` and
    `linear_ab_g`, and with the same names those of OpenFold 3, of Protenix, and of ESMFold in
    transformers. `_outgoing` says the direction.

    Args:
        module: the triangle multiplication, not the block around it.
        dtype: the projections' weights are cast to it; None leaves them as they are.

    Returns:
        Keyword arguments of `triangle_multiplicative_update`.

    Raises:
        TypeError: a module without the family's parts, or with a part that is not understood.
        ValueError: shapes that don't fit each other, or two norms that differ in eps.
    """
    shared = ("layer_norm_in", "layer_norm_out", "linear_g", "linear_z")
    if "linear_ab_p" in getattr(module, "_modules", ()):
        _check_parts(module, (*shared, "linear_ab_p", "linear_ab_g"))
        p_in, g_in = _linear(module, "linear_ab_p"), _linear(module, "linear_ab_g")
    else:
        halves = ("linear_a_p", "linear_b_p", "linear_a_g", "linear_b_g")
        _check_parts(module, (*shared, *halves))
        p_in, g_in = _stacked(module, *halves[:2]), _stacked(module, *halves[2:])
    outgoing = getattr(module, "_outgoing", None)
    if not isinstance(outgoing, bool):
        raise TypeError(f"module._outgoing must be a bool; got {outgoing!r}")
    return _arguments(
        "outgoing" if outgoing else "incoming",
        _norm(module, "layer_norm_in"),
        p_in,
        g_in,
        _norm(module, "layer_norm_out"),
        _linear(module, "linear_z"),
        _linear(module, "linear_g"),
        dtype,
    )


# The same parameters under the same names: these are there to be found.
from_openfold3 = from_protenix = from_openfold


def from_boltz(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """As `from_openfold`, of a `TriangleMultiplicationOutgoing` or `...Incoming` of Boltz 1 or 2.

    The class says the direction. Both of Boltz's norms have an eps of 1e-5.
    """
    _check_parts(module, ("norm_in", "p_in", "g_in", "norm_out", "p_out", "g_out"))
    endings = {"Outgoing": "outgoing", "Incoming": "incoming"}
    direction = None
    for kind in type(module).__mro__:
        direction = direction or endings.get(kind.__name__[-len("Outgoing") :])
    if direction is None:
        raise TypeError(
            "module must be of a class named ...Outgoing or ...Incoming, which is its direction; "
            f"got {describe(module)}"
        )
    return _arguments(
        direction,
        _norm(module, "norm_in"),
        _linear(module, "p_in"),
        _linear(module, "g_in"),
        _norm(module, "norm_out"),
        _linear(module, "p_out"),
        _linear(module, "g_out"),
        dtype,
    )


def from_esmfold2(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """As `from_openfold`, of transformers' `EsmFold2TriangleMultiplicativeUpdate`."""
    _check_parts(module, ("norm_start", "norm_mix", "proj_bundle", "proj_emit", "proj_gate"))
    flow = getattr(module, "flow", None)
    if flow not in DIRECTIONS:
        raise TypeError(f"module.flow must be 'outgoing' or 'incoming'; got {flow!r}")
    p_in, g_in = _halves(_linear(module, "proj_bundle"))
    return _arguments(
        flow,
        _norm(module, "norm_start"),
        p_in,
        g_in,
        _norm(module, "norm_mix"),
        _linear(module, "proj_emit"),
        _linear(module, "proj_gate"),
        dtype,
    )


# The same parameters under the same names, with a width of the product of their own: D is
# `latent_channels`. The module is a `TriangleMultiplicativeBlock`, not the wrapper around it.
from_esm = from_esmfold2


def from_boltz_distributed(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """As `from_openfold`, of a `TriangleMultiplication` of Fold-CP, over a mesh of ranks.

    The tensors are a rank's own, which are the same on all. Without a gradient.
    """
    return _from_replicated(
        module, ("norm_in", "norm_out"), ("p_in", "g_in", "p_out", "g_out"), dtype
    )


def from_esm_distributed(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """As `from_boltz_distributed`, of esm's `TriangleMultiplicativeBlockDistributed`."""
    return _from_replicated(
        module, ("norm_start", "norm_mix"), ("proj_bundle", "proj_emit", "proj_gate"), dtype
    )


def _from_replicated(
    module: nn.Module, norms: tuple[str, str], linears: tuple[str, ...], dtype: torch.dtype | None
) -> dict[str, Any]:
    """Of parts that every rank has: of three linear layers the first is p_in above g_in."""
    _check_parts(module, (*norms, *linears))
    named = getattr(module, "_direction", None)
    direction = str(getattr(named, "name", None)).lower()
    if direction not in DIRECTIONS:
        raise TypeError(f"module._direction must be named Outgoing or Incoming; got {named!r}")
    parts = module._modules
    for names, fault_of in (
        (norms, fault_of_replicated_norm), (linears, fault_of_replicated_linear)
    ):  # fmt: skip
        for name in names:
            if (fault := fault_of(name, parts[name])) is not None:
                raise TypeError(fault)
    norm_in, norm_out = [replicated_norm_of(parts[name]) for name in norms]
    *inner, p_out, g_out = [replicated_linear_of(parts[name]) for name in linears]
    p_in, g_in = _halves(inner[0]) if len(inner) == 1 else inner
    return _arguments(direction, norm_in, p_in, g_in, norm_out, p_out, g_out, dtype)


def from_chai(
    source: nn.Module | Mapping[str, Tensor],
    prefix: str = "",
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Chai-1's block, which is both directions in one, as the arguments of two calls.

    Chai-1 computes gate * linear_z_out(LayerNorm(outgoing) + LayerNorm(incoming)). The projection
    is linear and the gate is shared, so the block is the sum of two calls. It masks the factors of
    the incoming product with the transposed mask:

        outgoing, incoming = from_chai(block)
        update = triangle_multiplicative_update(pair, mask=mask, **outgoing)
        update += triangle_multiplicative_update(pair, mask=mask.transpose(-1, -2), **incoming)

    Args:
        source: the block, which may be of TorchScript, or tensors by name as in a state dict, with
            layernorm_z_in.weight and .bias [C], merged_linear_p.weight [4D, C] (rows a and b of
            the outgoing product, a and b of the incoming), merged_linear_g.weight [4D + C, C] (the
            gates of these, then that of the output) and linear_z_out.weight [C, D].
        prefix: what comes before these names in `source`, "blocks.0.triangle_multiplication." say.
        dtype: as for `from_openfold`.

    Returns:
        The keyword arguments of the outgoing and of the incoming call. Chai-1's eps is 1e-5, and
        its norms of the products have neither weights nor biases.

    Raises:
        TypeError: a name too many or too few below the prefix, or what is no tensor.
        ValueError: shapes that don't fit each other.
    """
    if isinstance(source, nn.Module):
        source = dict(source.named_parameters()) | dict(source.named_buffers())
    elif not isinstance(source, Mapping):
        raise TypeError(
            f"source must be a torch.nn.Module or a mapping of tensors; got {type(source).__name__}"
        )
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in source.items()
        if name.startswith(prefix)
    }
    wanted = (
        "layernorm_z_in.weight", "layernorm_z_in.bias", "merged_linear_p.weight",
        "merged_linear_g.weight", "linear_z_out.weight",
    )  # fmt: skip
    if tensors.keys() != set(wanted):
        got = [*tensors][:_NAMES_SHOWN]
        if len(tensors) > len(got):
            got.append(f"and {len(tensors) - len(got)} more")
        raise TypeError(
            f"source must have exactly {', '.join(wanted)} below the prefix {prefix!r}; "
            f"got {', '.join(got) or 'nothing'}"
        )
    for name in wanted:
        if not isinstance(tensors[name], Tensor):
            raise TypeError(f"{name} must be a torch.Tensor; got {type(tensors[name]).__name__}")
    norm_weight, norm_bias, values, gates, output = (tensors[name] for name in wanted)
    if output.ndim != 2:
        raise ValueError(f"linear_z_out.weight must be [C, D]; got {tuple(output.shape)}")
    channels, hidden = output.shape
    if values.shape != (4 * hidden, channels) or gates.shape != (4 * hidden + channels, channels):
        raise ValueError(
            f"merged_linear_p.weight and merged_linear_g.weight must be [4D, C] and [4D + C, C] "
            f"with [C, D] = {[channels, hidden]}, the shape of linear_z_out.weight; "
            f"got {tuple(values.shape)} and {tuple(gates.shape)}"
        )
    outgoing, incoming = (
        _arguments(
            direction,
            Norm(norm_weight, norm_bias, 1e-5),
            Linear(values[start : start + 2 * hidden], None),
            Linear(gates[start : start + 2 * hidden], None),
            Norm(None, None, 1e-5),
            Linear(output, None),
            Linear(gates[4 * hidden :], None),
            dtype,
        )
        for direction, start in (("outgoing", 0), ("incoming", 2 * hidden))
    )
    return outgoing, incoming


def transition_from_openfold3(
    module: nn.Module, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """The arguments that say what a `SwiGLUTransition` of OpenFold 3 computes.

    Args:
        module: the transition, not the block around it. A mask of its forward multiplies the
            update and is no argument of ours.
        dtype: the projections' weights are cast to it; None leaves them as they are.

    Returns:
        Keyword arguments of `swiglu_transition`.

    Raises:
        TypeError: a module without the family's parts, or with a part that is not understood.
        ValueError: shapes that don't fit each other.
    """
    _check_parts(module, ("layer_norm", "swiglu", "linear_out"))
    swiglu = _block(module, "swiglu", "SwiGLU", ("linear_a", "linear_b"))
    return _transition_arguments(
        _norm(module, "layer_norm"),
        _linear(swiglu, "linear_a"),
        _linear(swiglu, "linear_b"),
        _linear(module, "linear_out"),
        dtype,
    )


def transition_from_protenix(
    module: nn.Module, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """As `transition_from_openfold3`, of a `Transition` of Protenix."""
    _check_parts(
        module, ("layernorm1", "linear_no_bias_a", "linear_no_bias_b", "linear_no_bias")
    )
    return _transition_arguments(
        _norm(module, "layernorm1"),
        _linear(module, "linear_no_bias_a"),
        _linear(module, "linear_no_bias_b"),
        _linear(module, "linear_no_bias"),
        dtype,
    )


def transition_from_boltz(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """As `transition_from_openfold3`, of a `Transition` of Boltz 1 or 2."""
    _check_parts(module, ("norm", "fc1", "fc2", "fc3"))
    return _transition_arguments(
        _norm(module, "norm"),
        _linear(module, "fc1"),
        _linear(module, "fc2"),
        _linear(module, "fc3"),
        dtype,
    )


def transition_from_esmfold2(
    module: nn.Module, dtype: torch.dtype | None = None
) -> dict[str, Any]:
    """As `transition_from_openfold3`, of transformers' `EsmFold2Transition`.

    That module's forward adds the residual: ours does with `residual=x`.
    """
    _check_parts(module, ("norm", "mlp"))
    mlp = _block(module, "mlp", "EsmFold2SwiGLU", ("gate_up_proj", "down_proj"))
    gate, up = _halves(_linear(mlp, "gate_up_proj"))
    return _transition_arguments(
        _norm(module, "norm"), gate, up, _linear(mlp, "down_proj"), dtype
    )


def transition_from_esm(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """As `transition_from_openfold3`, of a `Transition` and the like of biohub's esm.

    That is also `PairTransition`, `TransitionLayer`, and the one in the experimental model's MSA
    encoder. The forward of `Transition` alone adds the residual: ours does with `residual=x`.
    """
    if "a_proj" in getattr(module, "_modules", ()):
        _check_parts(module, ("norm", "a_proj", "b_proj", "out_proj"))
        gate, up = _linear(module, "a_proj"), _linear(module, "b_proj")
        down = _linear(module, "out_proj")
    else:
        _check_parts(module, ("norm", "ffn"))
        ffn = _block(module, "ffn", "SwiGLUMLP", ("w12", "w3"))
        gate, up = _halves(_linear(ffn, "w12"))
        down = _linear(ffn, "w3")
    return _transition_arguments(_norm(module, "norm"), gate, up, down, dtype)


def _check_parts(module: nn.Module, wanted: tuple[str, ...]) -> None:
    """The module has these parts and no other but its activation and the like."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")
    parts = module._modules
    missing = [name for name in wanted if name not in parts]
    if missing:
        raise TypeError(
            f"module must have {', '.join(wanted)}; got {describe(module)} "
            f"without {', '.join(missing)}"
        )
    others = [
        name
        for name, part in parts.items()
        if name not in wanted and type(part).__name__ not in _ACTIVATIONS.get(name, ())
    ]
    if others or module._parameters or module._buffers:
        raise TypeError(
            f"module must have no part but {', '.join(wanted)}; got {describe(module)} with "
            f"{', '.join([*others, *module._parameters, *module._buffers])}"
        )


def _linear(module: nn.Module, name: str) -> Linear:
    part = module._modules[name]
    if (fault := fault_of_linear(name, part)) is not None:
        raise TypeError(fault)
    return linear_of(part)


def _norm(module: nn.Module, name: str) -> Norm:
    part = module._modules[name]
    if (fault := fault_of_norm(name, part)) is not None:
        raise TypeError(fault)
    return norm_of(part)


def _block(module: nn.Module, name: str, kind: str, wanted: tuple[str, ...]) -> nn.Module:
    """A part of the class named `kind`, which has parts of its own."""
    part = module._modules[name]
    if type(part).__name__ != kind:
        raise TypeError(f"{name} must be of a class named {kind}; got {describe(part)}")
    if (fault := fault_of_call(name, part)) is not None:
        raise TypeError(fault)
    _check_parts(part, wanted)
    return part


def _halves(both: Linear) -> tuple[Linear, Linear]:
    """Two layers whose rows lie after each other in one, as views."""
    weights = both.weight.chunk(2)
    biases = (None, None) if both.bias is None else both.bias.chunk(2)
    first, second = map(Linear, weights, biases)
    return first, second


def _stacked(module: nn.Module, name_a: str, name_b: str) -> Linear:
    """The layers that make a and b as one, of rows [0, D) and [D, 2D)."""
    a, b = _linear(module, name_a), _linear(module, name_b)
    if a.weight.shape != b.weight.shape or (a.bias is None) != (b.bias is None):
        raise ValueError(
            f"{name_a} and {name_b} must be alike; got weights {tuple(a.weight.shape)} and "
            f"{tuple(b.weight.shape)}, biases {a.bias is not None} and {b.bias is not None}"
        )
    bias = None if a.bias is None else torch.cat([a.bias, b.bias])
    return Linear(torch.cat([a.weight, b.weight]), bias)


def _arguments(
    direction: str,
    norm_in: Norm,
    p_in: Linear,
    g_in: Linear,
    norm_out: Norm,
    p_out: Linear,
    g_out: Linear,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    if norm_in.eps != norm_out.eps:
        raise ValueError(
            "both norms must have the same eps, as triangle_multiplicative_update has one; "
            f"got {norm_in.eps} and {norm_out.eps}"
        )
    channels, hidden = p_out.weight.shape
    shapes = [tuple(layer.weight.shape) for layer in (p_in, g_in, g_out)]
    if shapes != [(2 * hidden, channels)] * 2 + [(channels, channels)]:
        raise ValueError(
            "the weights of values, gates and output gate must be [2D, C], [2D, C] and [C, C] with "
            f"[C, D] = {[channels, hidden]}, the shape of the output projection; got {shapes}"
        )

    return {
        "direction": direction,
        "norm_in_weight": norm_in.weight,
        "norm_in_bias": norm_in.bias,
        "p_in_weight": _cast(p_in.weight, dtype),
        "p_in_bias": p_in.bias,
        "g_in_weight": _cast(g_in.weight, dtype),
        "g_in_bias": g_in.bias,
        "norm_out_weight": norm_out.weight,
        "norm_out_bias": norm_out.bias,
        "p_out_weight": _cast(p_out.weight, dtype),
        "p_out_bias": p_out.bias,
        "g_out_weight": _cast(g_out.weight, dtype),
        "g_out_bias": g_out.bias,
        "eps": norm_in.eps,
    }


def _transition_arguments(
    norm: Norm, gate: Linear, up: Linear, down: Linear, dtype: torch.dtype | None
) -> dict[str, Any]:
    channels, hidden = down.weight.shape
    shapes = [tuple(layer.weight.shape) for layer in (gate, up)]
    if shapes != [(hidden, channels)] * 2:
        raise ValueError(
            "the weights of the gate and of what it multiplies must be [H, C] with [C, H] = "
            f"{[channels, hidden]}, the shape of the output projection; got {shapes}"
        )
    return {
        "norm_weight": norm.weight,
        "norm_bias": norm.bias,
        "gate_weight": _cast(gate.weight, dtype),
        "gate_bias": gate.bias,
        "up_weight": _cast(up.weight, dtype),
        "up_bias": up.bias,
        "down_weight": _cast(down.weight, dtype),
        "down_bias": down.bias,
        "eps": norm.eps,
    }


def _cast(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    return weight if dtype is None else weight.to(dtype)
