"""Copies and signals among the GPUs of one host by CUDA's driver, which need no multiprocessor.

Stage 2 has persistent programs on all multiprocessors: a kernel that copies or waits would wait for
them. Copy engines move planes meanwhile, and a stream that waits for a word of memory, or writes
one, does so without a kernel.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

_DEVICE_MEMORY = 2  # CU_MEMORYTYPE_DEVICE
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ: the difference, of 32 bits with a sign, is not negative
_MOST_PITCH = 2**31 - 1  # CU_DEVICE_ATTRIBUTE_MAX_PITCH of all GPUs


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        (end + name, kind)
        for end in ("src", "dst")
        for name, kind in (
            ("XInBytes", ctypes.c_size_t), ("Y", ctypes.c_size_t), ("MemoryType", ctypes.c_int),
            ("Host", ctypes.c_void_p), ("Device", ctypes.c_uint64), ("Array", ctypes.c_void_p),
            ("Pitch", ctypes.c_size_t),
        )
    ] + [("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]  # fmt: skip


class _Driver:
    """The functions of libcuda that torch has no names for."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        word, stream, size = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t
        value = ctypes.c_uint32
        for name, types in {
            "cuMemcpy2DAsync_v2": (ctypes.POINTER(_Copy2D), stream),
            "cuMemcpyDtoDAsync_v2": (word, word, size, stream),
            "cuStreamWriteValue32_v2": (stream, word, value, ctypes.c_uint),
            "cuStreamWaitValue32_v2": (stream, word, value, ctypes.c_uint),
            "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
        }.items():
            getattr(self._library, name).argtypes = types

    def call(self, name: str, *arguments: object) -> None:
        """
        Raises:
            RuntimeError: the driver refuses.
        """
        code = getattr(self._library, name)(*arguments)
        if code:
            words = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(words))
            reason = words.value.decode() if words.value else "unknown"
            raise RuntimeError(f"{name} failed: error {code}, {reason}")


@functools.cache
def driver() -> _Driver:
    """
    Raises:
        OSError, AttributeError: there is no driver, or it lacks a function.
    """
    return _Driver()


class Queue:
    """A CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._handle = stream, ctypes.c_void_p(stream.cuda_stream)
        self._driver = driver()

    def mark(self) -> torch.cuda.Event:
        """What has been queued so far, for `follow`."""
        return self._stream.record_event()

    def follow(self, mark: torch.cuda.Event) -> None:
        """All that is queued from now on comes after the mark of another queue."""
        self._stream.wait_event(mark)

    def copy(self, to: Tensor, of: Tensor) -> None:
        """Copies planes [G, R, pitch] of any GPUs; in each plane the rows are contiguous."""
        count, rows, pitch = to.shape
        size = to.element_size()
        width = rows * pitch * size
        if not count * width:
            return
        steps = to.stride(0) * size, of.stride(0) * size
        if max(steps) > _MOST_PITCH:
            for target, source in zip(to, of, strict=True):
                self._copy_bytes(target.data_ptr(), source.data_ptr(), width)
            return
        shape = _Copy2D(WidthInBytes=width, Height=count)
        shape.srcMemoryType = shape.dstMemoryType = _DEVICE_MEMORY
        shape.dstDevice, shape.srcDevice = to.data_ptr(), of.data_ptr()
        shape.dstPitch, shape.srcPitch = steps
        self._driver.call("cuMemcpy2DAsync_v2", ctypes.byref(shape), self._handle)

    def signal(self, words: list[Tensor], value: int, own: Tensor) -> None:
        """Sets int32 words of other GPUs once all before is done; `own` is a word of this one."""
        self._driver.call("cuStreamWriteValue32_v2", self._handle, own.data_ptr(), value, 0)
        for word in words:
            self._copy_bytes(word.data_ptr(), own.data_ptr(), 4)

    def await_words(self, words: list[Tensor], value: int) -> None:
        """What comes after waits until the words of this GPU have reached the value."""
        for word in words:
            self._driver.call(
                "cuStreamWaitValue32_v2", self._handle, word.data_ptr(), value, _AT_LEAST
            )

    def _copy_bytes(self, to: int, of: int, count: int) -> None:
        self._driver.call("cuMemcpyDtoDAsync_v2", to, of, count, self._handle)
