"""What the drop-in modules share."""

import timm.layers
from torch import nn

BACKENDS = ("auto", "triton", "torch")


class Fast:
    """Mixin of every drop-in module.

    `backend` is handed to each operation as its `implementation`: "auto" (Triton on a CUDA device,
    as `deit_fast.kernels._runtime.choose` says; PyTorch on a CPU), "triton" or "torch".
    """

    backend = "auto"
    timm_class: type  # what the module was, and becomes again

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why `module`, of exactly timm's type, can't be computed exactly here; None: it can."""
        return None


def is_identity(module: nn.Module | None) -> bool:
    return module is None or type(module) is nn.Identity


def is_linear(module: nn.Module) -> bool:
    """A plain Linear whose weight is a parameter, and not recomputed by a hook (pruning)."""
    return type(module) is nn.Linear and "weight" in module._parameters


def is_watched(*modules: nn.Module) -> bool:
    """Whether one of these modules has to be called: it has a hook, a forward of its own, or is
    compiled."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        or "forward" in m.__dict__ or m._compiled_call_impl is not None
        for m in modules
    )  # fmt: skip


def is_exact_gelu(module: nn.Module) -> bool:
    exact = type(module) is nn.GELU and module.approximate == "none"
    return exact or type(module) is timm.layers.GELU


def weights(module: nn.Module):
    """weight and bias of a Linear that a fused operation reads without calling the module. Anything
    put in its place after the swap (an adapter, a quantised or pruned layer) would be skipped:
    refuse it."""
    if not is_linear(module):
        raise TypeError(
            "a fused operation reads the parameters of an nn.Linear and found a changed "
            f"{type(module).__name__}: call deit_fast.restore(model) before replacing its layers, "
            "and accelerate it afterwards"
        )
    return module.weight, module.bias
