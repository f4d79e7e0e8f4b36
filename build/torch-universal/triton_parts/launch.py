"""A launch that is prepared once: the second call of its kind skips Triton's dispatch.

Triton's own dispatch looks at each argument of each call to find the compiled kernel. On the host
that takes longer than a small protein takes on the GPU. A `PreparedLaunch` holds all arguments of a
launch but the tensors. It may be launched again only with tensors of the first ones' dtypes,
strides and 16-byte alignment.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import device_target
from .direct import DirectLaunch, bind_context, current_stream, direct, is_hooked
from .settings import LaunchConfig, pick_config, shape_of

_MOST_BASED = 512  # descriptors that a launch keeps: several for each layer of a model


class PreparedLaunch:
    """A kernel, its grid, and its arguments by the names of the kernel's parameters.

    Args:
        kernel: a @triton.jit function.
        programs: the size of the one-dimensional grid.
        tensors: the parameters for which `launch` takes a tensor or None, each with its descriptor
            from `descriptor_of`, or None where the kernel takes a pointer.
        values: the other run-time parameters.
        constants: the constexprs.
        options: num_warps and the like, for Triton.
        stage, variant: the stage, if the kernel is a variant of it, and which.

    Raises:
        TypeError: a name that the kernel lacks, or a parameter without a value.
    """

    def __init__(
        self,
        kernel: Callable,
        programs: int,
        *,
        tensors: dict[str, TensorDescriptor | None],
        values: dict[str, Any],
        constants: dict[str, Any],
        options: dict[str, int],
        stage: str = "",
        variant: str = "",
    ) -> None:
        self.kernel, self.programs, self.options = kernel, programs, options
        self.variant = variant
        # By the kernel's name: "trimul_einsum", "input_bwd".
        self.stage = stage or (
            kernel.__name__.strip("_").removesuffix("_kernel").removesuffix("_fwd")
        )
        given, names = {**tensors, **values, **constants}, kernel.arg_names
        unknown = [name for name in given if name not in names]
        missing = [name for name in names if name not in given]
        if unknown or missing:
            raise TypeError(
                f"{kernel.fn.__name__} must get its own parameters; got without a value "
                f"{', '.join(missing) or 'none'}, and unknown {', '.join(unknown) or 'none'}"
            )
        self.constants = {name: constants[name] for name in names if name in constants}
        # In the kernel's order; None in place of tensors.
        self._arguments = {name: values.get(name) for name in names if name not in constants}
        places = {name: place for place, name in enumerate(self._arguments)}
        self._tensors = tuple(tensors)
        self._pointers = [places[name] for name, kind in tensors.items() if kind is None]
        self._descriptors = [
            (places[name], descriptor)
            for name, descriptor in tensors.items()
            if descriptor is not None
        ]
        self._run: Callable[..., None] | None = None  # launches what is compiled
        self._based = _BasedDescriptors()

    def launch(self, **tensors: Tensor | None) -> None:
        """Launches on the current device and stream; takes every tensor by its parameter's name.

        Raises:
            TypeError: a tensor that the kernel lacks, or a missing one.
        """
        if self._descriptors:
            bind_context()
        if self._run is None:
            grid = (self.programs, 1, 1)
            arguments = self._with(tensors)
            compiled = self.kernel[grid](*arguments, **self.constants, **self.options)
            # The interpreter returns None, so that every launch takes this branch.
            self._run = None if compiled is None else direct(compiled, grid)
        else:
            # As addresses: of a tensor Triton asks the driver, which takes longer.
            arguments = self._named(tensors)
            for place in self._pointers:
                if arguments[place] is not None:
                    arguments[place] = arguments[place].data_ptr()
            for place, descriptor in self._descriptors:
                address = arguments[place].data_ptr()
                arguments[place] = self._based.at(place, descriptor, address)
            self._run(*arguments, *self.constants.values())

    def compile(self, **tensors: Tensor | None) -> Any:
        """Compiles for tensors like these, which may be meta tensors, without a launch.

        Returns:
            Triton's compiled kernel; None in the interpreter, which compiles nothing.
        """
        if not hasattr(self.kernel, "warmup"):
            return None
        return self.kernel.warmup(
            *self._with(tensors), grid=(self.programs, 1, 1), **self.constants, **self.options
        )

    def value_of(self, name: str) -> Any:
        """A run-time parameter that is no tensor."""
        return self._arguments[name]

    def _with(self, tensors: dict[str, Tensor | None]) -> list[Any]:
        """The run-time arguments, in the kernel's order."""
        arguments = self._named(tensors)
        for place, descriptor in self._descriptors:
            arguments[place] = _based(descriptor, arguments[place])
        return arguments

    def _named(self, tensors: dict[str, Tensor | None]) -> list[Any]:
        """The same, with tensors in place of descriptors."""
        named = {**self._arguments, **tensors}  # an unknown name makes it longer
        if len(tensors) != len(self._tensors) or len(named) != len(self._arguments):
            wanted = ", ".join(self._tensors)
            raise TypeError(f"tensors must be {wanted}; got {', '.join(tensors)}")
        return list(named.values())


def _based(descriptor: TensorDescriptor, tensor: "Tensor | _Address") -> TensorDescriptor:
    """A copy of the descriptor for another tensor; copy.copy takes five times as long."""
    based = object.__new__(type(descriptor))
    based.__dict__.update(descriptor.__dict__, base=tensor)
    return based


class _Address:
    """All that a launch asks of a descriptor's tensor."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


class _BasedDescriptors(dict[tuple[int, int], TensorDescriptor]):
    """Descriptors by parameter and address: an allocator gives the same memory again and again."""

    def at(self, place: int, descriptor: TensorDescriptor, address: int) -> TensorDescriptor:
        """The descriptor of a parameter, for a tensor at this address."""
        based = self.get((place, address))
        if based is None:
            if len(self) >= _MOST_BASED:
                self.clear()
            based = self[place, address] = _based(descriptor, _Address(address))
        return based


class Place(NamedTuple):
    """A tensor by where it lies: so many bytes behind the beginning of one of some memories."""

    memory: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def tensor(self, memories: Sequence[Any]) -> Tensor:
        """The tensor, where `memories` has the tensors that begin the memories."""
        memory = memories[self.memory]
        if memory.dtype != self.dtype:
            memory = memory.view(self.dtype)
        first = memory.storage_offset() + self.offset // memory.element_size()
        return memory.as_strided(self.shape, self.strides, first)


class PlacedLaunch:
    """A prepared launch whose tensors have places.

    Raises:
        TypeError: a tensor that the launch doesn't take, or a missing one.
    """

    def __init__(self, prepared: PreparedLaunch, places: dict[str, Place | None]) -> None:
        self._prepared, self._places = prepared, places
        # In the kernel's order; the places of pointers are replaced, those of descriptors kept.
        given = prepared._with(places)
        self._arguments = [*given, *prepared.constants.values()]
        self._pointers = [
            (at, given[at].memory, given[at].offset)
            for at in prepared._pointers
            if given[at] is not None
        ]
        self._descriptors = [
            (at, descriptor, given[at].base.memory, given[at].base.offset)
            for at, descriptor in prepared._descriptors
        ]
        self._based = _BasedDescriptors()

    def launch(
        self, memories: Sequence[Any], addresses: Sequence[int]
    ) -> tuple[DirectLaunch, tuple[Any, ...]] | None:
        """Launches with tensors of these memories, which begin at these addresses.

        Returns what launches with the same addresses again, and its encoded arguments; None if that
        can't be told beforehand.
        """
        run = self._prepared._run
        if run is None:
            places = self._places.items()
            tensors = {n: None if place is None else place.tensor(memories) for n, place in places}
            self._prepared.launch(**tensors)
            return None
        arguments = self._arguments.copy()
        for at, memory, offset in self._pointers:
            arguments[at] = addresses[memory] + offset
        for at, descriptor, memory, offset in self._descriptors:
            arguments[at] = self._based.at(at, descriptor, addresses[memory] + offset)
        if self._descriptors:
            bind_context()
        if not isinstance(run, DirectLaunch) or is_hooked():
            run(*arguments)
            return None
        encoded = run.encoded(arguments)
        run.again(encoded, current_stream())
        return run, encoded


class Launches(dict[tuple, PreparedLaunch]):
    """The launches of all calls of one kind, by key; it also allocates a call's buffers."""

    recording: Any = None  # of `recording`, if one was asked for

    def __init__(self) -> None:
        super().__init__()
        self._settings: dict[str, LaunchConfig | None] = {}

    def setting(
        self, stage: str, choose: Callable[..., LaunchConfig | None], *arguments: Any
    ) -> LaunchConfig | None:
        """What a schedule chose for a stage; the first time, `choose(*arguments)`."""
        if stage not in self._settings:
            self._settings[stage] = choose(*arguments)
        return self._settings[stage]

    def of(
        self, key: tuple, prepare: Callable[..., PreparedLaunch], *arguments: Any
    ) -> PreparedLaunch:
        """The launch of this key; the first time, `prepare(*arguments)`."""
        found = self.get(key)
        if found is None:
            found = self[key] = prepare(*arguments)
        return found

    def empty(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Uninitialised memory for the buffer `name`."""
        return torch.empty(shape, dtype=dtype, device=device)


def setting_of(
    stage: str,
    tensor: Tensor,
    width: int,
    length: int,
    batch: int = 1,
    variants: frozenset[str] = frozenset(),
    split: bool = False,
) -> LaunchConfig:
    """The setting of a stage for a call on tensors like this one: see `settings.Shape`.

    `variants` are the stage's variants that can run the call; `split` tells of its operands.
    """
    device = device_target(tensor.device)
    shape = shape_of(tensor.element_size(), width, length, batch, split)
    return pick_config(stage, device.target, device.name, shape, triton.__version__, variants)


def sequences_in(rows: int, length: int) -> int:
    """How many sequences of `length` residues have so many rows, for `setting_of`; at least 1."""
    return max(1, rows // length)


def block_of(block: int, size: int) -> int:
    """A setting's block, cut to an axis of `size`, but not below 16, the least of a dot."""
    return min(block, max(16, triton.next_power_of_2(size)))


def pointers(*names: str) -> dict[str, None]:
    """The `tensors` of a launch that the kernel takes as pointers."""
    return dict.fromkeys(names)


def named_strides(tensor: str, axes: Iterable[str], strides: Iterable[int]) -> dict[str, int]:
    """Strides by their parameters' names: stride_x_b, stride_x_i, ... for "x" and "bi..."."""
    return {
        f"stride_{tensor}_{axis}": stride for axis, stride in zip(axes, strides, strict=True)
    }


def descriptor_of(
    tensor: Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int]
) -> TensorDescriptor:
    """A descriptor for tensors like this one; each launch gives it its tensor."""
    descriptor = TensorDescriptor(tensor, list(shape), steps_between(shape, strides), block)
    descriptor.base = None  # or it would keep the tensor alive
    return descriptor


def steps_between(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """A descriptor's strides: an axis of length 1 may have any, of which TMA allows few."""
    outer = zip(shape[:-1], strides[:-1], strict=True)
    return [*[16 if size == 1 else stride for size, stride in outer], strides[-1]]


def dot_precision(precision: str, fp32_dots: tuple[str, ...], fastest: str = "") -> str:
    """Triton's word for an fp32 dot on a target that has `fp32_dots`, its fp32-accurate one first.

    "fp32", and a word that the target lacks, give the first, or `fastest`, the setting's own.
    "bf16" and "fp16x3" are not Triton's.
    """
    if precision in fp32_dots or precision in ("bf16", "fp16x3"):
        return precision
    return fastest or fp32_dots[0]


def shared_by(programs: int, blocks: int) -> int:
    """The most programs, at most `programs`, that can share `blocks` equally."""
    return max(n for n in range(1, min(programs, blocks) + 1) if blocks % n == 0)


def strides(tensor: Tensor) -> list[int]:
    """The strides, with 0 for axes of length 1, so that equal layouts give equal cache keys."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [0 if size == 1 else stride for size, stride in pairs]


def has_descriptor(tensor: Tensor, stored: bool = False) -> bool:
    """Whether a tensor descriptor may describe the tensor: aligned, and not expanded.

    TMA documents no behaviour for a stride of 0. What is stored needs rows of whole units of 16
    bytes: TMA stores no less, and would write beyond the end of another (seen on an H200). Planes
    have room for that up to their pitch.
    """
    if stored and tensor.shape[-1] * tensor.element_size() % 16:
        return False
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return is_aligned(tensor) and all([size == 1 or stride > 0 for size, stride in pairs])


def is_aligned(tensor: Tensor) -> bool:
    """Whether every row is contiguous and begins at a multiple of 16 bytes."""
    *outer, inner = strides(tensor)
    if inner != 1 or tensor.data_ptr() % 16:
        return False
    elements = 16 // tensor.element_size()
    return not any([stride % elements for stride in outer])
