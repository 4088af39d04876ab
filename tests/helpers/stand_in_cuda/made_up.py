"""Kernels whose parameters and launch options are of every kind that a plan can repeat."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from deit_fast.kernels import _plans


@triton.jit
def _numbers_kernel(
    x_ptr, none_ptr, flag, small, negative, wide, unsigned, number, one, pair, y_ptr,
    N: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    if none_ptr is not None:
        x += tl.load(none_ptr + at)
    x += flag + small + negative + wide + unsigned + number + one + pair[0] + pair[1]
    tl.store(y_ptr + at, x.to(y_ptr.dtype.element_ty))


@triton.jit
def _nullable_kernel(x_ptr, maybe_ptr, y_ptr, has: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    if has:
        x += tl.load(maybe_ptr + at)
    tl.store(y_ptr + at, x)


@triton.jit
def _copy_kernel(x_desc, y_desc, scale, M: tl.constexpr, N: tl.constexpr):
    m = tl.program_id(0)
    x = x_desc.load([m * M, 0])
    y_desc.store([m * M, 0], (x.to(tl.float32) * scale).to(y_desc.dtype))


def numbers(x, **options):
    y = torch.empty_like(x)
    _plans.launch(
        _numbers_kernel, (3, 2), x, None, True, 7, -(2**31), 2**40, 2**63 + 5, 0.1, 1,
        (x.shape[0], 2.5), y, N=128, **options,
    )  # fmt: skip
    return y


def nullable(x, **options):
    y = torch.empty_like(x)
    _plans.launch(_nullable_kernel, (1,), x, x[1:], y, has=False, N=64, **options)
    _plans.launch(_nullable_kernel, (2,), x[16:], x, y[32:], has=True, N=16, num_warps=1)
    return y


def descriptors(x, padding="zero", **options):
    y = torch.empty_like(x)
    one = TensorDescriptor(x, list(x.shape), list(x.stride()), [16, 64], padding)
    part = y[:, 64:]
    other = TensorDescriptor(part, list(part.shape), list(part.stride()), [16, 64])
    _plans.launch(_copy_kernel, (4, 1, 1), one, other, 0.5, M=16, N=64, **options)
    return y


def calls(capability: tuple[int, int]) -> Iterator[tuple[str, Callable, dict]]:
    """Name, function and arguments of each."""
    x = torch.randn(128)
    yield "numbers", numbers, {"x": x}
    yield "numbers, 8 warps", numbers, {"x": x, "num_warps": 8}
    yield "nullable", nullable, {"x": x}
    yield "cooperative", numbers, {"x": x, "launch_cooperative_grid": True}
    if capability >= (9, 0):
        yield "dependent", numbers, {"x": x, "launch_pdl": True}
        yield "cluster of 2", numbers, {"x": x, "num_ctas": 2}
        yield "cluster of 4, all", numbers, {
            "x": x, "num_ctas": 4, "launch_pdl": True, "launch_cooperative_grid": True,
        }  # fmt: skip
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            wide = torch.randn(64, 128).to(dtype)
            yield f"descriptors {str(dtype)[6:]}", descriptors, {"x": wide}
        yield "descriptors nan", descriptors, {"x": torch.randn(60, 128), "padding": "nan"}
        yield "descriptors int8", descriptors, {"x": torch.zeros(64, 256, dtype=torch.int8)}
        yield "descriptors fp8", descriptors, {"x": torch.zeros(64, 256).to(torch.float8_e4m3fn)}
