"""What a backward must leave alone: the settings of the whole process, and torch's own products."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WORDS = ("precision", "tf32", "determin")


@contextlib.contextmanager
def settings_untouched(monkeypatch, reads: tuple[str, ...] = ()):
    """A context in which torch's settings of products raise when written, and when read.

    `reads` are the names of getters of `torch._C` that may be called.
    """

    def refuse(name):
        def call(*arguments, **named):
            raise AssertionError(f"torch._C.{name} was called with {arguments}")

        return call

    with monkeypatch.context() as patch:
        for name in dir(torch._C):
            if (
                name.startswith(("_set_", "_get_"))
                and any(word in name for word in _WORDS)
                # torch.empty's memory, which is torch's own affair.
                and not name.endswith("fill_uninitialized_memory")
                and name not in reads
            ):
                patch.setattr(torch._C, name, refuse(name))
        yield


class NoProducts(TorchDispatchMode):
    """A context in which no matrix product of torch may run."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        products = ("mm", "mv", "addmv", "bmm", "baddbmm", "dot", "linear", "matmul", "einsum")
        assert name.removesuffix("_") not in (*products, "addmm", "addbmm", "_scaled_mm"), name
        return function(*args, **(kwargs or {}))
