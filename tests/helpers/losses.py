"""Losses with their gradients, in mixed dtypes, against PyTorch in the same dtypes and in fp64."""

import torch
from checking import assert_as_accurate


def loss_and_gradients(fn, inputs, upstream=1.0, logits=("logits",)):
    """fn(**inputs), and the gradients of those `logits` that are not None."""
    leaves = {k: inputs[k].detach().requires_grad_() for k in logits if inputs[k] is not None}
    loss = fn(**inputs | leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()), torch.full_like(loss, upstream))
    return loss.detach(), *grads


def in_dtype(inputs, dtype):
    """The inputs with their floating-point tensors in `dtype`."""
    return {
        k: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for k, t in inputs.items()
    }


def assert_accurate(fn, reference, inputs, upstream=1.0, logits=("logits",)):
    """Loss and gradients of `fn`, of any mixture of dtypes."""
    found = loss_and_gradients(fn, inputs, upstream, logits)
    torchs = loss_and_gradients(reference, inputs, upstream, logits)
    truth = loss_and_gradients(reference, in_dtype(inputs, torch.float64), upstream, logits)
    names = "loss", *(name for name in logits if inputs[name] is not None)
    for name, got, same_dtype, true in zip(names, found, torchs, truth, strict=True):
        assert got.dtype == same_dtype.dtype, name
        assert_as_accurate(got, same_dtype, true, name)
