"""Counts the memory that operations take, for tests of what a path needs at its peak."""

from types import ModuleType
from typing import Any

import pytest
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The most bytes that the operations within had allocated at once, `inputs` not counted."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._inputs = {value.untyped_storage()._cdata for value in inputs}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._inputs:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def bytes_of_parts(monkeypatch: pytest.MonkeyPatch, subject: ModuleType) -> list[int]:
    """The sizes of the parameters' sums that a backward of `subject` is going to make.

    Their number depends on the GPU, and from some length on they are small beside the rest.
    """
    sizes, row_products = [], subject.row_products

    def recorded(left: Tensor, right: Tensor, prepared: Any, parts: Any, *others: Any) -> Any:
        made = row_products(left, right, prepared, parts, *others)
        if parts is None:
            both = made.products, made.sums
            sizes.extend([sums.nbytes for sums in both if sums is not None])
        return made

    monkeypatch.setattr(subject, "row_products", recorded)
    return sizes
