"""Launches that compile and do nothing else, without a GPU: a driver takes the place of CUDA's."""

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction


class NoMatmuls(TorchDispatchMode):
    """Within it PyTorch's matmuls are empty tensors of the right shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            return args[0].new_empty(*args[0].shape[:-1], args[1].shape[-1])
        if func is torch.ops.aten.addmm.default:
            return args[1].new_empty(len(args[1]), args[2].shape[-1])
        return func(*args, **(kwargs or {}))


class _Driver:
    """What Triton asks while it compiles."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(capability: tuple[int, int]) -> None:
    """Make every launch of this process, from now on, a compilation for that compute capability.

    Of the kernel, and of the C code that launches it where this Triton writes some for each.
    """
    triton.runtime.driver.set_active(_Driver(capability))
    run, made = JITFunction.run, set()

    def compiled(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if hasattr(nvidia, "make_launcher") and kernel.hash not in made:
            made.add(kernel.hash)
            nvidia.CudaLauncher(kernel.src, kernel.metadata)
        return kernel

    JITFunction.run = compiled
