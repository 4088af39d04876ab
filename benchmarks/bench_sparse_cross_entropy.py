"""sparse_cross_entropy with its gradient: what a training step from a soft-label store computes.

The reference writes the dense target.
"""

import torch

from deit_fast.kernels import sparse_cross_entropy, sparse_cross_entropy_reference
from deit_fast.kernels.cases import sparse_cross_entropy_inputs


def with_gradient(loss_function):
    def step(logits, **rest):
        if torch.compiler.is_compiling():  # it makes one graph of this, and several of autograd's
            dz, loss = torch.func.grad_and_value(lambda z: loss_function(z, **rest))(logits)
            return loss, dz
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            loss = loss_function(logits, **rest)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    return step


def test_sparse_cross_entropy(race):
    race(
        with_gradient(sparse_cross_entropy),
        with_gradient(sparse_cross_entropy_reference),
        sparse_cross_entropy_inputs,
    )
