"""Stage 1's whole backward on a CPU, by the Hopper kernel's steps: see `gluon_emulator`.

`main` runs in a process where the emulator is installed.
"""

import json
import sys

import gluon_emulator
import torch
from esmfold2_trimul_tools.repository import find_root, load_kernel, submodule
from helpers import as_call, make_problem, relative_error, seeded
from torch import Tensor
from torch.nn.functional import linear

_PACKAGE = load_kernel(find_root())
_WHOLE = submodule(_PACKAGE, "hopper.gated_input_backward")
_CHANGED = "a tile and a pair"  # the case that changed kernels run


def _nan(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan, dtype=torch.bfloat16)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(len(shape))).bfloat16()


def errors_of(
    length, channels, beyond=0, parameters=True, stages=8, split=3, programs=1, zero_norm=False,
    overflow=False, outlier=0.0, module=_WHOLE, **others,
) -> dict[str, float]:  # fmt: skip
    """Relative errors of what the kernel makes of some rows of a problem, by name."""
    problem = make_problem(length, channels, dtype=torch.bfloat16, **others)
    if zero_norm:
        problem.weights["norm_in_weight"][::5] = 0.0
    if overflow:
        problem.x[:, :, ::3] = -3e38  # so far from the mean that fp32 has no number for it
        problem.x[:, :, ::3, 7] = 3e38
    if outlier:
        problem.x[..., 7] = (problem.x[..., 7].float() * 0.05 + 1.0).mul(outlier).bfloat16()
    call = as_call(submodule(_PACKAGE, "_call"), problem)
    rows = slice(length // 3, length - length // 4)
    x, mask = call.x[0, rows], None if call.mask is None else call.mask[0, rows]
    exact = {name: of.double() for name, of in (problem.weights | problem.biases).items()}
    mean = x.double().mean(-1)
    rstd = (x.double().var(-1, unbiased=False).float() + 1e-5).rsqrt().double()
    grad, gate = _random(2, channels, len(x), length), _random(len(x) * length, channels)
    pitch = submodule(_PACKAGE, "triton_parts.tiles").padded_pitch(length)
    planes = _nan(2, channels + beyond, len(x), pitch)  # of a and b, not one behind the other
    planes[:, :channels, :, :length] = grad
    planes = planes.flatten(0, 1)
    constants = torch.stack([
        linear(exact["norm_in_bias"], exact[f"{name}_weight"], exact.get(f"{name}_bias"))
        for name in ("p_in", "g_in")
    ])
    moments = torch.stack([mean, rstd]).float()
    settings, device = (
        submodule(_PACKAGE, f"triton_parts.{name}") for name in ("settings", "device")
    )
    config = settings.LaunchConfig(128, 64, 64, 4, stages, split=split, kernel="whole")
    with device.standing_in(device.target_of("sm_90", "any", 132)):
        prepared = module.prepare(
            call, x, mask, moments, planes, channels + beyond, parameters, config
        )
    prepared.launch = lambda **given: gluon_emulator.run(prepared, programs, **given)
    made, normals = (None, None)
    if parameters:
        made, normals = _nan(len(gate), 5 * channels), _nan(len(gate), channels)
    grad_x = gate.clone().view(x.shape)  # in the memory of dq
    given = x, mask, moments, planes, grad_x.view(gate.shape)
    module.launch(prepared, call, given, (made, normals, grad_x), constants.float())

    hat = (x.double() - mean[..., None]) * rstd[..., None]
    normal = hat * exact["norm_in_weight"]
    p = linear(normal, exact["p_in_weight"]) + constants[0]
    s = (linear(normal, exact["g_in_weight"]) + constants[1]).sigmoid()
    dp = grad.double().permute(2, 3, 0, 1).flatten(2) * s
    if mask is not None:
        dp = dp * mask.double()[..., None]
    dg = dp * p * (1 - s)
    dz = dp @ exact["p_in_weight"] + dg @ exact["g_in_weight"]
    dz = (dz + gate.double().view(x.shape) @ exact["g_out_weight"]) * exact["norm_in_weight"]
    means = dz.mean(-1, keepdim=True) + hat * (dz * hat).mean(-1, keepdim=True)
    wanted_x, of_dz = rstd[..., None] * (dz - means), rstd[..., None] * dz
    found = {"x": relative_error(grad_x, wanted_x)}
    # Of each channel, beside the larger of its dx and what dx is a small difference of.
    sizes = [of.flatten(0, 1).norm(dim=0) for of in (grad_x - wanted_x, wanted_x, of_dz)]
    found["channels"] = float((sizes[0] / sizes[1].maximum(sizes[2])).max())
    if parameters:
        columns = made.double().split([2 * channels, 2 * channels, channels], 1)
        wanted = dp.flatten(0, 1), dg.flatten(0, 1), gate.double()
        for name, mine, its in zip(("dp", "dg", "dq"), columns, wanted, strict=True):
            found[name] = relative_error(mine, its)
        found["normal"] = relative_error(normals, normal.flatten(0, 1))
    return found


def main() -> None:
    """Prints the errors of the cases of the first argument, and of changed kernels of the second.

    The latter are each one's sum, or what was raised.
    """
    cases, changes = (json.loads(argument) for argument in sys.argv[1:])
    found = {name: errors_of(**case) for name, case in cases.items()}
    seen = {}
    for name, (before, after) in changes.items():
        module = gluon_emulator.changed(_WHOLE, before, after)
        try:
            errors = errors_of(module=module, **cases[_CHANGED])
            seen[name] = sum(errors.values())  # NaN, if one is
        except (AssertionError, gluon_emulator.Deadlock) as error:
            seen[name] = str(error)
    print(json.dumps([found, seen]))
