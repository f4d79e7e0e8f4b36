"""Launches that keep their descriptors' encodings, beside Triton's own, with a launcher that notes
what it gets in place of the one in C."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.backends.nvidia.driver")
from noting_launcher import (  # noqa: E402
    FUNCTION,
    GRID,
    METADATA,
    SIGNATURE,
    STREAM,
    active_driver,
    compiled_of,
)
from triton import knobs  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402


@pytest.fixture
def active():
    with active_driver() as made:
        yield made


@pytest.fixture
def subject(submodule):
    return submodule("triton_parts.direct")


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


def test_what_was_encoded_launches_again(subject, active):
    seen = []
    launch, arguments = subject.direct(compiled_of(seen), GRID), arguments_at(1 << 40)
    launch(*arguments)
    launch.again(launch.encoded(arguments), subject.current_stream())
    active.stream += 1
    launch.again(launch.encoded(arguments), subject.current_stream())
    first, second, third = [comparable(given) for given in seen]
    assert first == second and active.encoded == 2
    at = len(GRID)
    assert third == [*first[:at], STREAM + 1, *first[at + 1 :]]


def test_a_descriptor_is_encoded_once(subject, active):
    seen = []
    launch = subject.direct(compiled_of(seen), GRID)
    first, second = arguments_at(1 << 40), arguments_at(1 << 41)
    for arguments in (first, second, first, second):
        launch(*arguments)
    assert active.encoded == 4
    assert comparable(seen[0]) == comparable(seen[2]) != comparable(seen[1])


class Kernel:
    """Triton's, before it is compiled."""

    __name__, arg_names = "kernel", list(SIGNATURE)

    def __init__(self):
        self._compiled = compiled_of([])

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self._compiled[grid](*arguments, *constants.values())
            return self._compiled

        return launch


@pytest.mark.parametrize("way", ["direct", "hooked", "unknown"])
def test_a_thread_has_a_context_before_it_encodes(submodule, active, monkeypatch, way):
    """Once for each thread and device, whoever encodes."""
    launch, kernel, bound, current = submodule("triton_parts.launch"), Kernel(), [], []
    event = SimpleNamespace(record=lambda: bound.append((active.encoded, current[-1])))
    for name, function in (
        ("is_initialized", lambda: True), ("current_device", lambda: current[-1]),
        ("Event", lambda: event),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, function)
    if way == "hooked":
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", lambda metadata: None)
    elif way == "unknown":
        monkeypatch.setattr(submodule("triton_parts.direct").triton, "__version__", "3.10.0")
    wide, n, _, other, constant = arguments_at(1 << 40)
    prepared = launch.PreparedLaunch(
        kernel, 1,
        tensors={"x": wide, "y": None, "z": other}, values={"n": n}, constants={"C": constant},
        options={},
    )  # fmt: skip
    places = {
        name: launch.Place(memory, 0, torch.bfloat16, (1024,), (1,))
        for memory, name in enumerate("xyz")
    }
    placed, addresses = launch.PlacedLaunch(prepared, places), iter(range(1 << 40, 1 << 41, 4096))

    def launched(by):
        given = [SimpleNamespace(data_ptr=partial(int, next(addresses))) for _ in "xyz"]
        if by is prepared:
            prepared.launch(**dict(zip("xyz", given, strict=True)))
        else:
            placed.launch(given, [one.data_ptr() for one in given])

    for by, devices in ((prepared, (0, 0, 1, 0)), (placed, (1, 1)), (placed, (2, 2))):
        with ThreadPoolExecutor(1) as thread:
            for device in devices:
                current.append(device)
                thread.submit(launched, by).result()
    assert bound == [(0, 0), (4, 1), (8, 1), (12, 2)]  # (descriptors encoded before, device)


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
