"""Launches that keep their descriptors' encodings, beside Triton's own, with a launcher that notes
what it gets in place of the one in C."""

from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
nvidia = pytest.importorskip("triton.backends.nvidia.driver")
from triton import knobs  # noqa: E402
from triton.compiler.compiler import CompiledKernel  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

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
        self.encoded = 0
        self.utils = self

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return STREAM

    def allocate_default_profile_scratch(self, *_):
        return None

    def fill_tma_descriptor_tiled(self, address, *how):
        self.encoded += 1
        return (address, *[tuple(one) if isinstance(one, list) else one for one in how])

    fill_tma_descriptor = fill_tma_descriptor_tiled


@pytest.fixture
def active():
    try:
        previous = driver.active
    except RuntimeError:  # no GPU
        previous = None
    made = Driver()
    driver.set_active(made)
    yield made
    driver.set_active(previous)


@pytest.fixture
def subject(submodule):
    return submodule("triton_parts.direct")


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


def arguments_at(address):
    def descriptor(shape, strides, block, at):
        found = TensorDescriptor(torch.zeros(1024, dtype=torch.bfloat16), shape, strides, block)
        found.base = SimpleNamespace(data_ptr=lambda: at)
        return found

    wide = descriptor([32, 16], [16, 1], [16, 16], address)
    return [wide, 5, 1 << 20, descriptor([64], [1], [16], address + 64), 128]


def comparable(given):
    """What a launcher got, place by place: None for what hooks get, and for hooks; tuples."""
    of_hooks = "LazyDict", "HookChain"
    made = [None if type(one).__name__ in of_hooks else one for one in given]
    return [tuple(one) if isinstance(one, list) else one for one in made]


@pytest.mark.parametrize("signature", [SIGNATURE, {"n": "i32", "y": "*fp32", "C": "constexpr"}])
def test_the_launcher_gets_what_triton_gives_it(subject, active, signature):
    usual, seen = [], []
    arguments = arguments_at(1 << 40)
    if "x" not in signature:
        arguments = [arguments[place] for place in (1, 2, 4)]
    compiled_of(usual, signature)[GRID](*arguments)
    subject.direct(compiled_of(seen, signature), GRID)(*arguments)
    assert len(usual) == len(seen) == 1 and len(usual[0]) == len(seen[0])
    assert comparable(usual[0]) == comparable(seen[0])
    assert STREAM in seen[0] and FUNCTION in seen[0] and METADATA in seen[0]


def test_a_descriptor_is_encoded_once(subject, active):
    seen = []
    launch = subject.direct(compiled_of(seen), GRID)
    first, second = arguments_at(1 << 40), arguments_at(1 << 41)
    for arguments in (first, second, first, second):
        launch(*arguments)
    assert active.encoded == 4
    assert comparable(seen[0]) == comparable(seen[2]) != comparable(seen[1])


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called_by_tritons_own_launch(subject, active, monkeypatch, hook):
    seen = []
    launch = subject.direct(compiled_of(seen), GRID)
    monkeypatch.setattr(knobs.runtime, hook, lambda metadata: None)
    launch(*arguments_at(1 << 40))
    assert len(seen) == 1 and any(type(one).__name__ == "LazyDict" for one in seen[0])


def test_others_are_launched_by_triton(subject, active, monkeypatch):
    """A kernel with scratch memory, another vendor's, and all with a Triton that isn't known."""
    own = object()
    other = type("Kernel", (), {"run": object(), "__getitem__": lambda self, grid: own})()
    assert subject.direct(other, GRID) is own
    assert subject._parts_of(compiled_of([])) is not None
    assert subject._parts_of(compiled_of([], global_scratch_size=128)) is None
    assert subject._parts_of(compiled_of([], profile_scratch_size=128)) is None
    monkeypatch.setattr(subject.triton, "__version__", "3.10.0")
    assert subject._parts_of(compiled_of([])) is None
