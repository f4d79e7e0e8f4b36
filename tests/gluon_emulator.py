"""Runs Gluon kernels of the package on the CPU, for what a compiler doesn't see.

Nothing of Triton's interprets Gluon. `install` puts modules of its own in the place of Triton's
Gluon, in a process that has not imported the package, and `run` runs a prepared launch with them:
tensors are torch's, without layouts, and the partitions of a program are threads that meet at the
barriers, one at a time: whoever frees memory lets the others run first. What runs asynchronously on
a GPU runs at the worst time that a kernel allows: a load by TMA takes its memory at once, and fills
it when it is waited for, as stores by TMA and products run when they are waited for. So memory that
is freed or read too early is NaN, as is what nobody wrote, and a barrier that nobody arrives at is
an error.

What it can't see: layouts, registers, and the proxies' order within a warp.
"""

import inspect
import sys
import threading
import types

import torch
from torch import Tensor


class Scalar(int):
    """An integer of a kernel."""

    def to(self, dtype):
        return self

    @property
    def value(self):
        return int(self)


def _scalar_operator(name):
    operator = getattr(int, name)

    def apply(self, other):
        found = operator(self, other)
        return Scalar(found) if type(found) is int else found

    return apply


for _name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor"):
    for _side in (f"__{_name}__", f"__r{_name}__"):
        setattr(Scalar, _side, _scalar_operator(_side))


def constexpr(value):
    return Scalar(value) if type(value) is int else value


class Layout:
    """Only a layout's parent is looked at."""

    def __init__(self, *arguments, **_):
        self.parent = arguments[1] if len(arguments) == 2 else None

    @classmethod
    def get_default_for(cls, block, dtype):
        return cls(block)


class Values:
    """A tensor in registers."""

    def __init__(self, data: Tensor, layout=None):
        self.data, self.layout = data, layout
        self.type = types.SimpleNamespace(layout=layout)

    @property
    def shape(self):
        return [Scalar(size) for size in self.data.shape]

    def to(self, dtype):
        return Values(self.data.to(dtype), self.layout)

    def expand_dims(self, axis):
        return Values(self.data.unsqueeze(axis))

    def reshape(self, shape):
        return Values(self.data.reshape([int(size) for size in shape]))

    def permute(self, order):
        return Values(self.data.permute(order))

    def split(self):
        return tuple(Values(half) for half in self.data.unbind(-1))


def _operator(name):
    def apply(self, other):
        found = getattr(self.data, name)(getattr(other, "data", other))
        return Values(found, self.layout or getattr(other, "layout", None))

    return apply


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "mod", "and", "or", "xor", "lt", "le",
    "gt", "ge", "eq",
):  # fmt: skip
    setattr(Values, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Elements of a tensor's memory."""

    def __init__(self, memory: Tensor, offset=0):
        self.memory, self.offset = memory, offset

    def __add__(self, offset):
        return Pointer(self.memory, offset + self.offset)

    def places(self):
        return self.offset.data if isinstance(self.offset, Values) else torch.tensor(self.offset)


def load(pointer, mask=None, other=0):
    places, layout = pointer.places(), getattr(pointer.offset, "layout", None)
    mask = torch.ones_like(places, dtype=torch.bool) if mask is None else mask.data
    mask = mask.expand_as(places)
    found = torch.full(places.shape, other, dtype=pointer.memory.dtype)
    found[mask] = pointer.memory[places[mask]]
    return Values(found, layout)


class Memory:
    """Shared memory."""

    def __init__(self, data: Tensor, layout=None):
        self.data, self.layout, self.dtype = data, layout, data.dtype

    @property
    def shape(self):
        return [Scalar(size) for size in self.data.shape]

    def index(self, place):
        return Memory(self.data[int(place)], self.layout)

    def slice(self, start, length, dim=0):
        return Memory(self.data.narrow(dim, int(start), int(length)), self.layout)

    def permute(self, order):
        return Memory(self.data.permute(order), self.layout)

    def reinterpret(self, dtype, shape, layout):
        return Memory(self.data.view([int(size) for size in shape]), layout)

    def load(self, layout=None):
        return Values(self.data.clone(), layout)

    def store(self, value):
        assert self.data.shape == value.data.shape and self.dtype == value.data.dtype
        self.data.copy_(value.data)


class Deadlock(Exception):
    """All partitions wait."""


class Schedule:
    """The threads of a program, of which one runs; it goes on until it waits or frees memory."""

    def __init__(self):
        self.condition = threading.Condition()
        # By thread: whether it can go on, and whether others come first.
        self.ready, self.running, self.error = {}, None, None

    def run(self, partitions):
        threads = [threading.Thread(target=self._work, args=one) for one in partitions]
        self.ready = {thread: (lambda: True, False) for thread in threads}
        for thread in threads:
            thread.start()
        self._go_on(threads[0])
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _work(self, function, arguments):
        try:
            self._wait_for_turn()
            function(*arguments)
            assert not _work.stores and not _work.products, "left without a wait"
        except BaseException as error:
            self.error = self.error or error
        del self.ready[threading.current_thread()]
        if self.ready:
            self._go_on(self._next() or next(iter(self.ready)))

    def _next(self):
        """Another thread that can go on."""
        others = [one for one in self.ready if one is not threading.current_thread()]
        others.sort(key=lambda one: self.ready[one][1])
        return next((one for one in others if self.ready[one][0]()), None)

    def _go_on(self, thread):
        with self.condition:
            self.running = thread
            self.condition.notify_all()

    def _wait_for_turn(self):
        with self.condition:
            self.condition.wait_for(lambda: self.running is threading.current_thread())
        if self.error is not None:
            raise self.error

    def let_others(self, ready, last=False):
        """Lets others run until this one is `ready`, or, as the last, until they all wait."""
        self.ready[threading.current_thread()] = ready, last
        other = self._next()
        if other is None and not ready():
            raise Deadlock("nobody arrives at a barrier")
        if other is not None:
            self._go_on(other)
            self._wait_for_turn()


class Barrier:
    def __init__(self):
        self.wanted = self.missing = self.bytes = self.phase = 0
        self.loads = []  # of slots, that have not arrived

    def change(self, arrivals=0, more_bytes=0):
        self.missing -= arrivals
        self.bytes += more_bytes
        assert self.missing >= 0, "more arrivals than a barrier waits for"
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.wanted, self.phase ^ 1

    def load(self, slot, data):
        slot.data.fill_(torch.nan)
        self.loads.append((slot, data))

    def wait(self, parity):
        if not self._completed(parity):
            _place.schedule.let_others(lambda: self._completed(parity))

    def _completed(self, parity):
        if self.phase == parity:
            while self.loads:
                slot, data = self.loads.pop()
                slot.data.copy_(data)
                self.change(more_bytes=-data.nbytes)
        return self.phase != parity


class Barriers:
    def __init__(self, count):
        self.all = [Barrier() for _ in range(count)]

    def index(self, place):
        return self.all[int(place)]


def _init(barrier, count):
    barrier.wanted = barrier.missing = int(count)


def _arrive(barrier, count=1, pred=True):
    if pred:
        barrier.change(arrivals=int(count))
        if _place.schedule.running is not None:
            _place.schedule.let_others(lambda: True, last=True)


class Descriptor:
    """Of a tensor in memory, for TMA."""

    def __init__(self, base, shape, strides, block_shape, layout):
        self.base, self.dtype, self.layout, self.memory = base, base.dtype, layout, None
        self.shape, self.strides, self.block_shape = shape, strides, block_shape

    def of(self, tensor):
        made = Descriptor(tensor, self.shape, self.strides, self.block_shape, self.layout)
        made.memory = flat(tensor)
        return made

    def places(self, at, unit=1):
        """The places of a block's elements, and which of them exist, in whole units of a row."""
        places, exist = torch.zeros(()), torch.ones((), dtype=torch.bool)
        places = places.long()
        sizes = [*self.shape[:-1], -(-self.shape[-1] // unit) * unit]
        for start, size, stride, block in zip(
            at, sizes, self.strides, self.block_shape, strict=True
        ):
            along = int(start) + torch.arange(block)
            places = places.unsqueeze(-1) + along * stride
            exist = exist.unsqueeze(-1) & (along >= 0) & (along < size)
        return places, exist


def _load_tile(descriptor, at, barrier, slot):
    places, exist = descriptor.places(at)
    assert list(slot.data.shape) == list(places.shape)
    found = torch.zeros(places.shape, dtype=slot.dtype)
    found[exist] = descriptor.memory[places[exist]]
    barrier.load(slot, found)


class Work(threading.local):
    """What a partition has begun."""

    def __init__(self):
        self.stores, self.products = [], []


_work = Work()


def _store_tile(descriptor, at, slot):
    _work.stores.append((descriptor, list(map(int, at)), slot))


def _store_wait(outstanding):
    while len(_work.stores) > outstanding:
        descriptor, at, slot = _work.stores.pop(0)
        # 16 bytes, also where a row ends within them; a load gives zeros there.
        places, exist = descriptor.places(at, 16 // slot.dtype.itemsize)
        assert list(slot.data.shape) == list(places.shape)
        descriptor.memory[places[exist]] = slot.data[exist]


class Accumulator:
    """A product that may not have been computed."""

    def __init__(self, left, right, before):
        self.left, self.right, self.before, self.data = left, right, before, None

    def compute(self):
        self.data = self.left.data.float() @ self.right.data.float()
        if self.before is not None:
            self.data += self.before.data


def _multiply(left, right, acc, use_acc=True, is_async=False):
    made = Accumulator(left, right, acc if use_acc else None)
    _work.products.append(made)
    if not is_async:
        _multiply_wait(0)
    return made


def _multiply_wait(outstanding, deps):
    while len(_work.products) > outstanding:
        _work.products.pop(0).compute()
    found = tuple(
        Values(one.data) if isinstance(one, Accumulator) and one.data is not None else one
        for one in deps
    )
    return found[0] if len(found) == 1 else found


def _specialise(partitions, warps, registers):
    _place.schedule.run(partitions)


class Kernel:
    """What `gluon.jit` makes of a function."""

    def __init__(self, function):
        self.fn, self.__name__ = function, function.__name__
        self.arg_names = list(inspect.signature(function).parameters)

    def __call__(self, *arguments, **named):
        return self.fn(*arguments, **named)


def _jit(function=None, **_):
    return Kernel if function is None else Kernel(function)


def _assembly(text, constraints, arguments, dtype, is_pure, pack):
    assert text.startswith("rcp.approx"), text
    return Values(1.0 / arguments[0].data)


def _where(condition, one, other):
    if isinstance(condition, Values):
        one, other = (getattr(value, "data", value) for value in (one, other))
        return Values(torch.where(condition.data, one, other))
    return one if condition else other


def _assume(condition):
    assert condition, "what a kernel assumes is false"


def _allocate(dtype, shape, layout=None):
    if layout == "barriers":
        return Barriers(int(shape[0]))
    return Memory(torch.full([int(size) for size in shape], torch.nan, dtype=dtype), layout)


_place = types.SimpleNamespace(program=0, programs=1, schedule=None)


def _language():
    language = types.ModuleType("triton.experimental.gluon.language")
    language.constexpr, language.tensor = constexpr, Values
    language.int16, language.int32, language.int64 = torch.int16, torch.int32, torch.int64
    language.float16, language.float32 = torch.float16, torch.float32
    language.bfloat16 = torch.bfloat16
    for name in (
        "NVMMASharedLayout", "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout",
        "BlockedLayout", "SwizzledSharedLayout", "DistributedLinearLayout",
    ):  # fmt: skip
        setattr(language, name, type(name, (Layout,), {}))
    language.shared_memory_descriptor = Memory
    language.allocate_shared_memory, language.warp_specialize = _allocate, _specialise
    language.load, language.where, language.assume = load, _where, _assume
    language.static_range = range
    language.program_id = lambda axis: Scalar(_place.program)
    language.num_programs = lambda axis: Scalar(_place.programs)
    language.arange = lambda first, end, layout=None: Values(torch.arange(first, end), layout)
    language.zeros = lambda shape, dtype, layout=None: Values(
        torch.zeros([int(size) for size in shape], dtype=dtype), layout
    )
    language.full = lambda shape, value, dtype, layout=None: Values(
        torch.full([int(size) for size in shape], value, dtype=dtype), layout
    )
    language.convert_layout = lambda value, layout, assert_trivial=False: Values(value.data, layout)
    language.sum = lambda value, axis: Values(value.data.sum(axis))
    language.exp2 = lambda value: Values(torch.exp2(value.data))
    language.abs = lambda value: Values(value.data.abs())
    language.minimum = lambda one, other: Scalar(min(one, other))
    language.maximum = lambda one, other: Scalar(max(one, other))
    language.inline_asm_elementwise = _assembly
    return language


def install():
    """Puts Gluon's modules of this file in the place of Triton's."""
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.language = _jit, _language()
    hopper = types.ModuleType("triton.experimental.gluon.language.nvidia.hopper")
    hopper.fence_async_shared = lambda: None
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _multiply, _multiply_wait
    hopper.mbarrier = types.SimpleNamespace(
        MBarrierLayout=lambda: "barriers", init=_init, arrive=_arrive,
        wait=lambda barrier, parity: barrier.wait(parity),
        expect=lambda barrier, size: barrier.change(arrivals=1, more_bytes=int(size)),
    )  # fmt: skip
    hopper.tma = types.SimpleNamespace(
        async_load=_load_tile, async_store=_store_tile, store_wait=_store_wait
    )
    host = types.ModuleType("triton.experimental.gluon.nvidia.hopper")
    host.TensorDescriptor = Descriptor
    sys.modules |= {
        module.__name__: module for module in (gluon, gluon.language, hopper, host)
    } | {
        f"triton.experimental.gluon.{name}": types.ModuleType(name)
        for name in ("language.nvidia", "nvidia")
    }  # fmt: skip


def changed(
    module: types.ModuleType, before: str, after: str, count: int = 1
) -> types.ModuleType:
    """A module of the package with another text in the place of `before`, which it has so often."""
    with open(module.__file__) as file:
        text = file.read()
    assert text.count(before) == count, before
    made = types.ModuleType(module.__name__)
    made.__package__ = module.__package__
    exec(text.replace(before, after), made.__dict__)
    return made


def flat(tensor: Tensor) -> Tensor:
    """The memory from a tensor's first element on."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((size,), (1,))


def run(prepared, programs: int, **tensors) -> None:
    """A `PreparedLaunch` on CPU tensors, by so many programs, one after the other."""
    names = list(prepared._arguments)
    given = {name: constexpr(value) for name, value in prepared._arguments.items()}
    described = {names[place]: descriptor for place, descriptor in prepared._descriptors}
    for name, tensor in tensors.items():
        if tensor is not None:
            descriptor = described.get(name)
            given[name] = descriptor.of(tensor) if descriptor else Pointer(flat(tensor))
        else:
            given[name] = None
    given |= {name: constexpr(value) for name, value in prepared.constants.items()}
    _place.programs = programs
    for program in range(programs):
        _place.program, _place.schedule = program, Schedule()
        prepared.kernel(**given)
