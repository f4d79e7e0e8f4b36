"""Triton's interpreter: its bf16 arithmetic and stores repaired, and its types computed once.

TRITON_INTERPRET is for Triton's import, so this is imported after it is set.
"""

import copy
import dataclasses
import functools

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def repair() -> None:
    """Triton 3.6 to 3.9: `tl.dot` multiplies bf16 bit patterns, and casts to bf16 truncate.

    Casts of integers and bools even keep the number as the bit pattern. A GPU stores a block of a
    tensor descriptor in units of 16 bytes, also where a row ends within one.
    """

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.view(np.uint16).astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def round_to_bf16(data):
        tensor = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return tensor.view(torch.uint16).numpy()

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    store = InterpreterBuilder.create_descriptor_store

    def repaired_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return create_dot(self, widen(a), widen(b), d, input_precision, max_num_imprecise_acc)

    def repaired_cast(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and (
            src.dtype.scalar == tl.float32 or src.dtype.scalar.is_int()
        ):
            return TensorHandle(round_to_bf16(src.data.astype(np.float32)), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    def store_units(self, desc, value, indices):
        *outer, size = desc.shape
        unit = 16 * 8 // value.dtype.scalar.primitive_bitwidth
        whole = copy.copy(desc)
        whole.shape = [*outer, TensorHandle(-(-size.data // unit) * unit, size.dtype)]
        return store(self, whole, value, indices)

    InterpreterBuilder.create_descriptor_store = store_units
    InterpreterBuilder.create_dot = repaired_dot
    InterpreterBuilder.cast_impl = repaired_cast


def quicken() -> None:
    """The same results in half of the time, which nearly all goes to the bookkeeping of types."""
    # A kernel patches the language, and so does each function that it calls.
    patch = interpreter._patch_lang

    @functools.cache
    def languages_of(fn):
        return [value for value in fn.__globals__.values() if value in (tl, tl.core)]

    def patch_once(fn):
        if any(tl.core.is_builtin(language.load) for language in languages_of(fn)):
            return patch(fn)

    interpreter._patch_lang = patch_once

    # Whether an integer overflowed is computed, and then asserted by a debugging interpreter alone.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)

    # What follows depends on names and shapes, of which there are few.
    numpy_type, block_type, tensor, broadcast = (
        interpreter._get_np_dtype, tl.block_type.__init__, tl.tensor.__init__,
        TritonSemantic.broadcast_impl_value,
    )  # fmt: skip
    numpy_types, block_types, shapes, of_tensors = {}, {}, {}, {}

    def known_numpy_type(dtype):
        name = dtype.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(dtype)
        return numpy_types[name]

    def known_block_type(self, element_ty, shape):
        sizes = tuple(getattr(size, "value", size) for size in shape)
        key = element_ty.name, sizes
        if key not in block_types:
            block_type(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            block_types[key] = dict(vars(self))
        vars(self).update(block_types[key], element_ty=element_ty)

    def known_tensor(self, handle, type):
        shape = type.shape if type.is_block() else None
        if id(shape) not in of_tensors:
            tensor(self, handle, type)
            of_tensors[id(shape)] = self.numel, self.shape, shape  # as long as this lives, so named
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape, _ = of_tensors[id(shape)]

    def needed_broadcast(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    interpreter._get_np_dtype = known_numpy_type
    tl.block_type.__init__ = known_block_type
    tl.tensor.__init__ = known_tensor
    TritonSemantic.broadcast_impl_value = needed_broadcast
