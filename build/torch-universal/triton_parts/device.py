"""The properties of a device that launches depend on."""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch

from .settings import settings_of


class DeviceTarget(NamedTuple):
    """A device as launch settings see it."""

    target: str  # "sm_90", "gfx942", "xpu", or "interpreter" for CPU tensors
    name: str  # as the driver names it, the key of tuned settings
    fast_reciprocal: bool  # rcp.approx exists
    fp32_dots: tuple[str, ...]  # its input precisions of fp32 dots, the fp32-accurate one first
    multiprocessors: int  # 1 where unknown


_NVIDIA_DOTS = ("tf32x3", "tf32", "ieee")


def target_of(target: str, name: str, multiprocessors: int = 1) -> DeviceTarget:
    """The properties of a target, by its name."""
    nvidia = target.startswith("sm_")
    dots = settings_of(target, name).get("fp32_dots", _NVIDIA_DOTS if nvidia else ("ieee",))
    return DeviceTarget(target, name, nvidia, tuple(dots), multiprocessors)


_stand_in: ContextVar[DeviceTarget] = ContextVar("the device that meta tensors stand for")


@contextlib.contextmanager
def standing_in(target: DeviceTarget) -> Iterator[None]:
    """A context in which meta tensors stand for tensors on a device of this target."""
    token = _stand_in.set(target)
    try:
        yield
    finally:
        _stand_in.reset(token)


def device_target(device: torch.device) -> DeviceTarget:
    """The target of `device`; the driver is asked once for each device."""
    return _stand_in.get() if device.type == "meta" else _target_of_real(device)


@functools.cache
def _target_of_real(device: torch.device) -> DeviceTarget:
    if device.type == "cpu":
        return target_of("interpreter", "cpu")
    if device.type == "xpu":
        return target_of("xpu", torch.xpu.get_device_name(device))
    properties = torch.cuda.get_device_properties(device)
    target = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        target = properties.gcnArchName.split(":")[0]
    return target_of(target, properties.name, properties.multi_processor_count)
