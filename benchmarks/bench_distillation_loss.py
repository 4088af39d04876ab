"""distillation_loss, with the gradients of both heads' logits: what a step of training asks for."""

import torch

from deit_fast.kernels import distillation_loss, distillation_loss_reference
from deit_fast.kernels.cases import distillation_loss_inputs


def with_gradients(loss_function):
    def step(class_logits, dist_logits, **rest):
        if torch.compiler.is_compiling():  # it makes one graph of this, and several of autograd's
            gradients = torch.func.grad_and_value(
                lambda z, d: loss_function(z, d, **rest), argnums=(0, 1)
            )
            (dz, dd), loss = gradients(class_logits, dist_logits)
            return loss, dz, dd
        with torch.enable_grad():
            logits = [t.detach().requires_grad_() for t in (class_logits, dist_logits)]
            loss = loss_function(*logits, **rest)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    return step


def test_distillation_loss(compare):
    compare(
        with_gradients(distillation_loss),
        with_gradients(distillation_loss_reference),
        distillation_loss_inputs,
    )
