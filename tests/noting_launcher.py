"""A launcher that notes what it gets, in place of the one in C, and a driver, for any machine."""

from contextlib import contextmanager
from types import SimpleNamespace

import triton
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

SIGNATURE = {
    "x": "tensordesc<bf16[16, 16]>", "n": "i32", "y": "*fp32", "z": "tensordesc<bf16[16]>",
    "C": "constexpr",
}  # fmt: skip
META = dict(swizzle=3, elem_size=2, elem_type=10, block_size=[16, 16], fp4_padded=False)
GRID = (7, 1, 1)
STREAM, FUNCTION, METADATA = 11, 12, ("metadata",)


class Driver:
    """Encodes descriptors as tuples, and counts them."""

    def __init__(self):
        self.encoded, self.stream = 0, STREAM
        self.utils = self

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return self.stream

    def allocate_default_profile_scratch(self, *_):
        return None

    def fill_tma_descriptor_tiled(self, address, *how):
        self.encoded += 1
        return (address, *[tuple(one) if isinstance(one, list) else one for one in how])

    fill_tma_descriptor = fill_tma_descriptor_tiled


@contextmanager
def active_driver():
    """A `Driver` that Triton launches with meanwhile."""
    try:
        previous = driver.active
    except RuntimeError:  # no GPU
        previous = None
    made = Driver()
    driver.set_active(made)
    try:
        yield made
    finally:
        driver.set_active(previous)


def compiled_of(seen, signature=SIGNATURE, **others):
    """A kernel whose launcher appends its arguments to `seen`."""
    run = object.__new__(nvidia.CudaLauncher)
    metas = [META, META | {"block_size": [16]}] if "x" in signature else []
    attributes = dict(
        launch=nvidia.wrap_handle_tensordesc(lambda *given: seen.append(given), signature, metas),
        num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0,
        profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=True,
    )  # fmt: skip
    if triton.__version__ >= "3.7":
        attributes |= dict(arg_annotations="annotations", kernel_signature="signature")
    if triton.__version__ >= "3.8":
        attributes |= dict(gsan_enabled=False)
    vars(run).update(attributes | others)
    kernel = object.__new__(CompiledKernel)
    vars(kernel).update(
        _run=run, module=1, function=FUNCTION, packed_metadata=METADATA, name="kernel",
        src=SimpleNamespace(signature=signature),
    )  # fmt: skip
    return kernel
