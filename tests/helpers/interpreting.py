"""Triton's interpreter, quicker and right as soon as this is imported; and `refused()`.

It searches triton.language for what to patch once per launch, not for each function that a kernel
calls: that was half the time of most kernels. Sums of integers are not recomputed in int64, which
compiled code does not do either: that was half of the rest.

Its bf16 is corrected: tl.dot multiplies bf16 operands as the integers that hold their bits
(triton issue 11584), and rounds fp32 to bf16 towards zero. And its conversion to e4m3 loses the
carry into the exponent (127 becomes 64), subnormal numbers and NaN: PyTorch's replaces it.
"""

import functools
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_exchange = interpreter._patch_lang
_exchanged = set()  # the modules whose functions are the interpreter's, while a kernel runs


@functools.cache
def _modules(fn):
    seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
    return {module.__name__ for module in seen}


def _exchange_once(fn):
    if _modules(fn) <= _exchanged:
        return None  # called by a kernel: only a launch restores
    scope = _exchange(fn)
    _exchanged.update(_modules(fn))
    restore = scope.restore

    def restore_all():
        _exchanged.clear()
        restore()

    scope.restore = restore_all
    return scope


interpreter._patch_lang = _exchange_once


_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor, scope):
    """numpy from 2.4 on makes no integer of an array of one dimension, as Triton 3.6.0 has it."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_np_dtype_of_scalar = functools.cache(interpreter._get_np_dtype)


def _np_dtype(dtype):
    """Without a new dictionary of all of them."""
    pointer = isinstance(dtype.scalar, tl.pointer_type)
    return np.dtype(np.uint64) if pointer else _np_dtype_of_scalar(dtype.scalar)


_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot
_cast_once = interpreter.InterpreterBuilder.cast_impl


def _bf16_to_fp32(data):
    return (data.astype(np.uint32) << 16).view(np.float32)


def _fp32_to_bf16(data):
    """To the nearest, to the even one of two; as the bits."""
    bits = data.view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    return (np.where(np.isnan(data), bits | 0x400000, nearest) >> 16).astype(np.uint16)


def _convert_float(data, source, target, rounding):
    data = np.array(data)  # whole and in order
    if (source, target) == (tl.bfloat16, tl.float32):
        return _bf16_to_fp32(data).view(np.uint32)
    if (source, target) == (tl.float32, tl.bfloat16):
        return _fp32_to_bf16(data)
    if tl.float8e4nv not in (source, target):
        return _convert(data, source, target, rounding)
    data = torch.from_numpy(data)
    data = data.view(torch.float8_e4m3fn) if source == tl.float8e4nv else data
    if target == tl.float8e4nv:
        return data.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    data = data.to({tl.float32: torch.float32, tl.float16: torch.float16}[target]).numpy()
    return data.view(f"uint{8 * data.itemsize}")


def _cast(self, source, target):
    """Its casts between bf16 and what is not fp32 take the bits for integers."""
    if tl.bfloat16 in (source.dtype.scalar, target.scalar) and source.dtype.scalar != target.scalar:
        if source.dtype.scalar != tl.float32:
            source = _cast_once(self, source, tl.float32)
        if target.scalar == tl.float32:
            return source
    return _cast_once(self, source, target)


def _create_dot(self, a, b, *args, **kwargs):
    a, b = (
        interpreter.TensorHandle(_bf16_to_fp32(t.data), tl.float32)
        if t.dtype.scalar == tl.bfloat16
        else t
        for t in (a, b)
    )
    return _dot(self, a, b, *args, **kwargs)


interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter._get_np_dtype = _np_dtype
interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpreterBuilder.cast_impl = _cast


@contextmanager
def refused():
    """Within it launching a kernel raises, as it would for CPU tensors beside a GPU."""

    def refuse(self, *args, **kwargs):
        raise RuntimeError(
            f"{self.fn.__name__} got CPU tensors: a machine with a GPU interprets nothing. Ask for "
            'the fixture `device` and put them there, or mark the test cpu("why")'
        )

    with mock.patch.object(interpreter.GridExecutor, "__call__", refuse):
        yield
