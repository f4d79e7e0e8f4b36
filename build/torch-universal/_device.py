"""What a device is to the launchers: its target, name, and two facts about its arithmetic."""

import functools
from typing import NamedTuple

import torch


class DeviceTarget(NamedTuple):
    """A device as launch settings see it."""

    target: str  # "sm_90", "gfx942", "xpu", or "interpreter" for CPU tensors
    name: str  # as the driver names it, the key of tuned settings
    fast_reciprocal: bool  # rcp.approx exists
    ieee_dot: bool  # fp32 dots run in fp32 matrix units (or in the interpreter), not by TF32 thrice


@functools.cache
def device_target(device: torch.device) -> DeviceTarget:
    """The target of `device`; asks the driver once for each device."""
    if device.type == "cpu":
        return DeviceTarget("interpreter", "cpu", fast_reciprocal=False, ieee_dot=True)
    if device.type == "xpu":
        name = torch.xpu.get_device_name(device)
        return DeviceTarget("xpu", name, fast_reciprocal=False, ieee_dot=True)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        target = properties.gcnArchName.split(":")[0]
        return DeviceTarget(target, properties.name, fast_reciprocal=False, ieee_dot=True)
    target = f"sm_{properties.major}{properties.minor}"
    return DeviceTarget(target, properties.name, fast_reciprocal=True, ieee_dot=False)
