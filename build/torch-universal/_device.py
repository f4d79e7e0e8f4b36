"""What a device is to the launchers: its target, name, and two facts about its arithmetic."""

import functools
from typing import NamedTuple

import torch


class DeviceTarget(NamedTuple):
    """A device as launch settings see it."""

    target: str  # "sm_90", "gfx942", "xpu", or "interpreter" for CPU tensors
    name: str  # as the driver names it, the key of tuned settings
    fast_reciprocal: bool  # rcp.approx exists
    fp32_dots: tuple[str, ...]  # its input precisions of fp32 dots, the fp32-accurate one first


_NVIDIA_DOTS = ("tf32x3", "tf32", "ieee")
_AMD_DOTS = {"gfx942": ("ieee", "tf32")}  # other targets: "ieee" alone


def target_of(target: str, name: str) -> DeviceTarget:
    """The facts of a target by its word."""
    if target.startswith("sm_"):
        return DeviceTarget(target, name, fast_reciprocal=True, fp32_dots=_NVIDIA_DOTS)
    dots = _AMD_DOTS.get(target, ("ieee",))
    return DeviceTarget(target, name, fast_reciprocal=False, fp32_dots=dots)


@functools.cache
def device_target(device: torch.device) -> DeviceTarget:
    """The target of `device`; asks the driver once for each device."""
    if device.type == "cpu":
        return target_of("interpreter", "cpu")
    if device.type == "xpu":
        return target_of("xpu", torch.xpu.get_device_name(device))
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return target_of(properties.gcnArchName.split(":")[0], properties.name)
    return target_of(f"sm_{properties.major}{properties.minor}", properties.name)
