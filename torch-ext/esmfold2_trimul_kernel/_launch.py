"""A launch that is prepared once: the second call of its kind skips Triton's dispatch.

Triton's own dispatch looks at each argument of each call to find the compiled kernel, which takes
longer on the host than a small protein takes on the GPU. A `PreparedLaunch` holds everything of a
launch but its tensors; who keeps one promises that the tensors to come are like the first ones in
dtype, strides, and whether their addresses are multiples of 16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass
class PreparedLaunch:
    """A kernel, its grid and arguments in the kernel's order, tensors missing."""

    kernel: Callable  # a @triton.jit function
    programs: int
    arguments: list[Any]  # a tensor's place holds None, a descriptor's one without its tensor
    places: tuple[int, ...]  # of the tensors, in the order that `launch` takes them
    constants: dict[str, Any]  # the kernel's constexprs, in the kernel's order, its last arguments
    options: dict[str, int]
    _compiled: Any = field(default=None, init=False)

    def launch(self, *tensors: Tensor | None) -> None:
        """Launches on the current device and stream."""
        arguments = self.arguments.copy()
        for place, tensor in zip(self.places, tensors, strict=True):
            descriptor = arguments[place]
            if descriptor is None:
                arguments[place] = tensor
            else:
                arguments[place] = _based(descriptor, tensor)
        grid = (self.programs, 1, 1)
        if self._compiled is None:
            # None too in the interpreter: then every launch comes this way.
            self._compiled = self.kernel[grid](*arguments, **self.constants, **self.options)
        else:
            self._compiled[grid](*arguments, *self.constants.values())


def _based(descriptor: TensorDescriptor, tensor: Tensor) -> TensorDescriptor:
    """The same descriptor of another tensor; copy.copy takes five times as long."""
    based = object.__new__(TensorDescriptor)
    based.__dict__.update(descriptor.__dict__, base=tensor)
    return based


class Launches(dict[tuple, PreparedLaunch]):
    """The launches of all calls of one kind, by what each of them is for."""

    def of(
        self, what: tuple, prepare: Callable[..., PreparedLaunch], *arguments: Any
    ) -> PreparedLaunch:
        """The launch for `what`; the first time, `prepare(*arguments)`."""
        found = self.get(what)
        if found is None:
            found = self[what] = prepare(*arguments)
        return found


def descriptor_of(
    tensor: Tensor, shape: Sequence[int], strides: Sequence[int], block: list[int]
) -> TensorDescriptor:
    """A descriptor of a tensor with the dtype of this one, whose place it keeps in `arguments`."""
    descriptor = TensorDescriptor(tensor, list(shape), list(strides), block)
    descriptor.base = None  # or it would keep the tensor alive
    return descriptor
