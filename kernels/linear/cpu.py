"""`linear` on a CPU in fp32 inference: one oneDNN call, with bias, GELU and residual in it.

F.linear copies the bias into its result, lets the BLAS library accumulate onto it, and leaves GELU
and residual to one more pass over memory each. oneDNN's matmul does all of it at once. The weight
is read as it lies, at each call, so that a change in place is seen; packing it beforehand would
save another 4 to 7% of the matmul. docs/results/cpu.md has the measurements.

The operator that PyTorch has for this is its compiler's own, which calls it with packed weights
only. So torch.compile sees an operator of ours. It has no autograd: in training F.linear serves.
"""

import torch
from torch import Tensor

from .. import _checks, _dispatch

# A call costs the host 15 us more than F.linear's, which fewer rows do not win back.
ROWS = 64
# oneDNN adds in longer chains than F.linear's BLAS library: its rounding error, beside fp64, is 1.4
# times as large at K = 384 and 2.1 times at 1536, which is more than this package allows itself.
LARGEST_K = 1024


def serves(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether `run` can and should compute `linear` of these tensors.

    Args:
        x: (..., K).
        weight: (N, K).
        *others: The other operands.
    """
    tensors = [t for t in (x, weight, *others) if t is not None]
    if x.device.type != "cpu" or not all(t.dtype == torch.float32 for t in tensors):
        return False
    K = x.shape[-1]
    if K > LARGEST_K or not _dispatch.at_least(x.numel(), ROWS * max(1, K)) or not weight.numel():
        return False
    if _checks.autocast_dtype(x) is not None or not torch.backends.mkldnn.enabled:
        return False
    if _dispatch.is_transformed() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False  # forward-mode differentiation would lose the tangents
    if torch.compiler.is_compiling():
        return not (_dispatch.wants_grad(*tensors) or _dispatch.is_exporting())
    return not _dispatch.needs_dispatcher(*tensors)


@_dispatch.custom_op("deit_fast::linear_cpu")
def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    # Of matrices: with more dimensions the operator takes 70 us more.
    if residual is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


@_fwd.register_fake
def _(x, weight, bias, residual, activation):
    return x.new_empty(x.shape[0], weight.shape[0])


@_fwd.register_flops
def _(x, weight, *args, **kwargs):
    (M, K), N = x, weight[0]
    return 2 * M * N * K


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None,
    layer_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """`residual + layer_scale * activation(x @ weight.T + bias)`, as `linear` has it.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,).
        activation: "none" or "gelu".
        residual: (..., N).
        layer_scale: (N,).

    Returns:
        (..., N).
    """
    N, K = weight.shape
    bias = None if bias is None else bias.contiguous()
    added = None
    if residual is not None and activation == "none" and layer_scale is None:
        added = residual.reshape(-1, N).contiguous()
    y = _fwd(x.reshape(-1, K).contiguous(), weight.contiguous(), bias, added, activation)
    y = y.view(*x.shape[:-1], N)
    if layer_scale is not None:
        y = y * layer_scale
    return y if residual is None or added is not None else residual + y
