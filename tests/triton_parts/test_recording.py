"""Schedules that are recorded once and played back: the places of their tensors."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _add_kernel(out_ptr, x_ptr, y_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < N)
    if y_ptr is not None:
        x += tl.load(y_ptr + offs, mask=offs < N)
    tl.store(out_ptr + offs, x, mask=offs < N)


@pytest.fixture
def subject(submodule):
    return submodule("triton_parts.recording")


@pytest.fixture
def add(submodule):
    """add(launches, out, x, y=None): out = x + y of eight float32 each."""
    launch = submodule("triton_parts.launch")

    def prepare():
        return launch.PreparedLaunch(
            _add_kernel, 1, tensors=launch.pointers("out_ptr", "x_ptr", "y_ptr"), values={},
            constants={"N": 8, "BLOCK": 8}, options={"num_warps": 1},
        )  # fmt: skip

    def add(launches, out, x, y=None):
        launches.of(("add", y is None), prepare).launch(out_ptr=out, x_ptr=x, y_ptr=y)

    return add


@pytest.fixture
def schedule(add):
    """A schedule of x [16], a word, and y [8] or None: 2 x[8:] + y, and x[:8]."""
    runs = []

    def schedule(launches, arguments):
        x, word, y = arguments
        assert word == "word"
        runs.append(x.device.type)
        rows = x.view(2, 8)
        scratch = torch.empty(3, 8, dtype=x.dtype, device=x.device)
        add(launches, scratch[1], rows[1], rows[1])
        more = torch.empty_like(rows[0])
        add(launches, more, scratch[1], y)
        del scratch
        out, first = x.new_empty(8), x.new_empty(8)
        add(launches, out, more)
        add(launches, first, rows[0])
        return [out, first]

    schedule.runs = runs
    return schedule


def test_what_is_played_is_what_the_schedule_computes(subject, submodule, schedule, on_triton):
    """For other tensors each time, one of which shares its storage with another."""
    launches = submodule("triton_parts.launch").Launches()
    memory = torch.arange(64.0, device=on_triton)
    for first, second in ((0, 16), (24, 0), (8, 40)):
        x, y = memory[first : first + 16], memory[second : second + 8]
        out, rest = subject.run_recorded(launches, schedule, (x, "word", y))
        assert torch.equal(out, 2 * x[8:] + y) and torch.equal(rest, x[:8])
        assert out.untyped_storage().data_ptr() != rest.untyped_storage().data_ptr()
    assert schedule.runs == ["meta"]


def test_an_absent_tensor(subject, submodule, schedule, on_triton):
    launches = submodule("triton_parts.launch").Launches()
    x = torch.arange(16.0, device=on_triton)
    out, _ = subject.run_recorded(launches, schedule, (x, "word", None))
    assert torch.equal(out, 2 * x[8:])


@pytest.mark.parametrize("op", [torch.zeros_like, torch.neg, lambda x: x.fill_(1)])
def test_a_schedule_in_which_torch_computes_runs_as_it_is(subject, submodule, add, on_triton, op):
    launches, devices = submodule("triton_parts.launch").Launches(), []

    def schedule(launches, arguments):
        devices.append(arguments[0].device.type)
        out = torch.empty_like(arguments[0])
        add(launches, out, arguments[0], op(arguments[0].detach()))
        return [out]

    for _ in range(2):
        x = torch.arange(8.0, device=on_triton)
        (out,) = subject.run_recorded(launches, schedule, (x,))
        assert torch.equal(out, x + op(x.clone()))
    assert devices == ["meta", on_triton, on_triton]


def test_compiled_launches_get_the_addresses(subject, submodule, schedule, on_triton, monkeypatch):
    """Those that the tensors have, as in a launch by tensors."""
    launches, seen = submodule("triton_parts.launch").Launches(), []
    x, y = torch.arange(16.0, device=on_triton), torch.arange(8.0, device=on_triton)
    subject.run_recorded(launches, schedule, (x, "word", y))
    for step in launches.recording._steps:
        monkeypatch.setattr(step._prepared, "_run", lambda *arguments: seen.append(arguments))
    out, rest = launches.recording.play((x, "word", y))
    (scratch, *twice), (_, *sum_of), last, first = seen
    assert twice == [x[8:].data_ptr()] * 2 + [8, 8]
    assert sum_of == [scratch, y.data_ptr(), 8, 8]
    assert last[0] == out.data_ptr() and last[2] is None
    assert first == (rest.data_ptr(), x.data_ptr(), None, 8, 8)


@pytest.fixture
def direct_recording(subject, submodule, schedule, on_triton, monkeypatch):
    """(recording, play, arguments, driver): play(arguments(first)) is what its launchers get.

    Arguments are always of the same memory, as is what the recording allocates.
    """
    pytest.importorskip("triton.backends.nvidia.driver")
    from noting_launcher import GRID, active_driver, compiled_of

    memory, seen, allocated = torch.zeros(64, device=on_triton), [], {}

    def arguments(first=0):
        return memory[first : first + 16], "word", memory[16:24]

    launches = submodule("triton_parts.launch").Launches()
    subject.run_recorded(launches, schedule, arguments())
    direct = submodule("triton_parts.direct").direct
    signature = {"out_ptr": "*fp32", "x_ptr": "*fp32", "y_ptr": "*fp32", "N": "constexpr"}
    for step in launches.recording._steps:
        run = direct(compiled_of(seen, signature | {"BLOCK": "constexpr"}), GRID)
        monkeypatch.setattr(step._prepared, "_run", run)
    make, play, taken = torch.empty, launches.recording.play, []

    def empty(size, **options):
        taken.append(size)
        if len(taken) not in allocated:
            allocated[len(taken)] = make(size, **options)
        return allocated[len(taken)]

    def play_in_the_same_memory(given):
        taken.clear()
        seen.clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "empty", empty)
            play(given)
        return list(seen)

    with active_driver() as driver:
        yield launches.recording, play_in_the_same_memory, arguments, driver


def test_launches_are_kept_by_the_addresses_of_all_memory(direct_recording, monkeypatch):
    """What the launchers get is what they got the first time, on the stream of the call."""
    recording, play, arguments, driver = direct_recording
    first, other = play(arguments()), play(arguments(24))
    assert len(first) == len(other) == 4 and first != other
    for seen, at in ((first, 0), (other, 24)):
        upper = arguments(at)[0][8:].data_ptr()
        assert [upper in _arguments_in(launch) for launch in seen] == [True, False, False, False]
    driver.stream = 99
    on_another = play(arguments())
    assert all(launch[3] == 99 for launch in on_another)
    driver.stream = first[0][3]
    # By now nothing is made of arguments any more.
    for step in recording._steps:
        monkeypatch.setattr(step, "launch", None)
    assert play(arguments()) == first and play(arguments(24)) == other
    with pytest.raises(TypeError):
        play(arguments(40))


def test_few_launches_are_kept(direct_recording, subject, monkeypatch):
    recording, play, arguments, _ = direct_recording
    monkeypatch.setattr(subject, "_MOST_KEPT", 2)
    expected = {first: play(arguments(first)) for first in (0, 24, 32, 40)}
    assert len(recording._kept) <= 2
    assert all(play(arguments(first)) == seen for first, seen in expected.items())


def test_with_a_hook_triton_launches(direct_recording, monkeypatch):
    """Whether launches have been kept or not; none is kept then."""
    recording, play, arguments, _ = direct_recording
    play(arguments())
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    for first in (0, 24):
        for launch in play(arguments(first)):
            assert any(type(given).__name__ == "LazyDict" for given in launch)
    assert len(recording._kept) == 1


def _arguments_in(launch):
    """The kernel's arguments among a launcher's; from Triton 3.7 on they are its last."""
    return launch[-1] if isinstance(launch[-1], list) else launch


def test_launches_that_triton_makes_are_not_kept(subject, submodule, schedule, on_triton):
    launches = submodule("triton_parts.launch").Launches()
    x = torch.arange(16.0, device=on_triton)
    for _ in range(2):
        out, _ = subject.run_recorded(launches, schedule, (x, "word", None))
        assert torch.equal(out, 2 * x[8:])
    if on_triton == "cpu":
        assert not launches.recording._kept


def test_a_descriptor_is_based_on_an_address(submodule, monkeypatch):
    """And kept for it, among few."""
    launch = submodule("triton_parts.launch")
    monkeypatch.setattr(launch, "_MOST_BASED", 2)
    x = torch.zeros(64, 16)
    descriptor = launch.descriptor_of(x, [64, 16], [16, 1], [16, 16])

    @triton.jit
    def _kernel(x, N: tl.constexpr):
        pass

    prepared = launch.PreparedLaunch(
        _kernel, 1, tensors={"x": descriptor}, values={}, constants={"N": 1}, options={}
    )
    seen = []
    prepared._run = lambda *arguments: seen.append(arguments)
    place = launch.Place(1, 32, x.dtype, x.shape, x.stride())
    placed = launch.PlacedLaunch(prepared, {"x": place})
    addresses = [1 << 40, 1 << 41, 1 << 40, 1 << 42, 1 << 40]
    for address in addresses:
        placed.launch([None, x], [0, address])
    found = [based for based, _ in seen]
    assert [based.base.data_ptr() for based in found] == [address + 32 for address in addresses]
    assert found[2] is found[0] and found[4] is not found[0]
    assert all(type(one) is type(descriptor) and one.block_shape == [16, 16] for one in found)
    with pytest.raises(TypeError, match="tensors must be x; got y"):
        launch.PlacedLaunch(prepared, {"y": place})
    # And in a launch by tensors.
    seen.clear()
    one, other = torch.zeros(64, 16), torch.zeros(64, 16)
    for tensor in (one, other, one):
        prepared.launch(x=tensor)
    found = [based for based, _ in seen]
    assert [based.base.data_ptr() for based in found] == [
        tensor.data_ptr() for tensor in (one, other, one)
    ]
    assert found[2] is found[0] is not found[1] and descriptor.base is None


def test_buffers_that_live_together_lie_apart(subject):
    generator = torch.Generator().manual_seed(0)

    def draw(high):
        return int(torch.randint(high, (1,), generator=generator))

    for _ in range(50):
        events, live = [], []
        for number in range(30):
            events.append((number, draw(2000)))
            live.append(number)
            while live and draw(2):
                events.append((live.pop(draw(len(live))), None))
        without = {draw(30), draw(30)}
        offsets, total = subject.packed(events, without)
        assert set(offsets) == set(range(30)) - without
        sizes = {number: size for number, size in events if size is not None}
        taken, most = {}, 0
        for number, size in events:
            if number in without:
                continue
            if size is None:
                del taken[number]
                continue
            begin, end = offsets[number], offsets[number] + size
            assert begin % 256 == 0 and end <= total
            assert all(end <= b or e <= begin or b == e or begin == end for b, e in taken.values())
            taken[number] = begin, end
            most = max(most, sum(-(-sizes[n] // 256) * 256 for n in taken))
        assert most <= total


def test_memory_that_was_freed_is_taken_again(subject):
    events = [(0, 1000), (1, 256), (0, None), (2, 512), (3, 512)]
    assert subject.packed(events, set()) == ({0: 0, 2: 0, 3: 512, 1: 1024}, 1280)
