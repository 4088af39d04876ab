"""Triton's interpreter, quicker: it looks through triton.language for what to exchange once a
launch, not for each function that a kernel calls. That was half the time of most kernels.

Imported for that alone. What is computed is what it was.
"""

import functools

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
