"""Which implementation a call runs, and why.

CUDA, ROCm and XPU tensors run the Triton kernels, CPU tensors the ATen path (or, with
TRITON_INTERPRET=1 set before the import, the Triton kernels in Triton's interpreter), with
gradients as without. If an accelerator's call cannot use Triton, the reason is logged once.

A path is a module with five functions, which take a `Call` whose x is not empty:

    forward(call)                                           the output
    forward_saving(call)                                    (output, product, moments, planes)
    backward(call, grad_out, product, moments, planes, needs)   gradients by name
    saved_shapes(call)                                      the shapes of the last three
    plan(call)                                              the launches and buffers

and two for `sharded`, whose call has some rows of x, contexts with the three stages, and with their
backward too:

    stages(call, first_row)
    gradient_stages(call, first_row, needs, grads)

`planes` are a and b, which recompute="none" keeps on the Triton path, in the dtype of x even if
they are split numbers. Of what a path doesn't keep, `forward_saving` and `backward` have None, and
`saved_shapes` has (0,).

Its submodule `transition` has three for a `Transition`: forward(call), plan(call), and
backward(call, grad_out, needs).
"""

import functools
import importlib
import logging
import os
import re
from types import ModuleType
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from ._call import Call, Transition
from .validation import COMPUTE_DTYPES

_logger = logging.getLogger(__name__)

# As Triton reads it; the kernels are interpreted only if it was set before Triton was imported.
_INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
TRITON_DEVICES = ("cuda", "xpu")  # ROCm tensors are "cuda" to torch
_MIN_TRITON = (3, 6)
_MIN_CAPABILITY = (8, 0)


class ExecutionPath(NamedTuple):
    """Which implementation runs, "triton" or "aten", and why, in a sentence."""

    name: str
    reason: str


@functools.cache
def execution_path(device: torch.device, dtype: torch.dtype) -> ExecutionPath:
    """The path that a call takes for tensors of this device and dtype."""
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(
            f"dtype must be torch.bfloat16, torch.float16 or torch.float32; got {dtype}"
        )
    if device.type == "cpu":
        if _INTERPRET:
            return ExecutionPath("triton", "TRITON_INTERPRET is set: Triton's interpreter")
        return ExecutionPath("aten", "CPU tensors run the ATen path")
    if device.type not in TRITON_DEVICES:
        return ExecutionPath("aten", f"there are no Triton kernels for {device.type} tensors")
    try:
        from triton import __version__ as version
    except ImportError as error:
        return ExecutionPath("aten", f"Triton can't be imported ({error})")
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])  # 3, 9 of "3.9rc1"
    if release < _MIN_TRITON:
        return ExecutionPath(
            "aten", f"Triton {version} is older than {'.'.join(map(str, _MIN_TRITON))}"
        )
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            return ExecutionPath(
                "aten",
                f"{name} has compute capability {capability[0]}.{capability[1]}; "
                f"the kernels need {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}",
            )
    return ExecutionPath("triton", f"Triton {version} on {device.type}")


def path_of(call: Call | Transition) -> ModuleType:
    """The module that runs `call`."""
    x = call.x
    path = execution_path(x.device, x.dtype)
    if path.name == "aten" and x.device.type != "cpu":
        say_plain(path.reason)
    return module_for(call, path.name)


def module_for(call: Call | Transition, path: str) -> ModuleType:
    """The part of a path, by its name, that takes calls of this kind."""
    module = path_module(path)
    return module.transition if isinstance(call, Transition) else module


def is_transformed() -> bool:
    """Whether forward-mode AD or a transform of torch.func is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@functools.cache
def path_module(name: str) -> ModuleType:
    """`triton_path` or `aten_path`, imported on demand: Triton may not be installed."""
    return importlib.import_module(f".{name}_path", __package__)


def say_plain(reason: str) -> None:
    """Logs each reason once; a compiled caller logs it while it is compiled."""
    say_once(f"runs in plain PyTorch: {reason}")


def say_own(reason: str) -> None:
    """As `say_plain`, where the module that was swapped runs its own forward."""
    say_once(f"runs the module's own forward: {reason}")


# As torch.compiler.assume_constant_result does, without its import of Dynamo and Triton.
say_plain._dynamo_marked_constant = say_own._dynamo_marked_constant = True


@functools.cache
def say_once(what: str) -> None:
    _logger.warning("The triangle multiplication %s.", what)
