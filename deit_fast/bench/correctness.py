"""Whether a step computes what the network computes in eager fp32 PyTorch."""

import torch
from torch import Tensor

from .modes import MODES, REFERENCE, TRAIN, Mode
from .network import DISTINCT, Network, distinct
from .step import LEARNING_RATE, Step

# Relative errors that PyTorch's own lower precisions may have against fp32, on these weights (seen
# over Table 5: fp16 6e-3, bf16 5e-2); more for gradients through batch norm, where rounding flips
# many a ReLU (seen: fp16 0.1, bf16 0.3)
TOLERANCE = {"fp32": 1e-4, "tf32": 0.02, "fp16": 0.02, "bf16": 0.1}
# PyTorch has no eager mode with quantized matmuls to compare with. So the bound is twice the
# largest error seen on a CPU: DeiT-Ti, S, B and B-384, ViT-B and DeiT-III-S, with weights and
# residual stream in bf16, gave 0.053 to 0.065 in fp8, by deit_fast as by torchao, and 0.016 to
# 0.020 in int8. Both libraries have the same bound.
TOLERANCE |= {"fp8": 0.13, "int8": 0.04}
MARGIN = 1e-4  # over twice the error of the eager mode of the same precision


class Mismatch(RuntimeError):
    """A mode's outputs are not the network's."""


def relative_error(network: Network, step: Step, batch: int) -> float:
    """The relative error of a step against eager fp32.

    It is over all logits of a batch, or over the gradients of all parameters where the step trains.

    Args:
        network: Of the step.
        step: Compared within its mode's settings.
        batch: Images.
    """
    got = step.outputs(step.cast(network.batch(batch)))
    expected = _expected(network, step.mode.train, batch)
    if not step.mode.train:
        expected = [w.repeat(batch // len(w), 1) for w in expected]
    total = sum((w.double().norm() ** 2).item() for w in expected)
    difference = sum(
        ((g.double() - w.double()).norm() ** 2).item() for g, w in zip(got, expected, strict=True)
    )
    return (difference / total) ** 0.5


def check(network: Network, step: Step, batch: int) -> float:
    """Check a step's outputs against eager fp32.

    The error may be twice that of the eager mode of the same precision. The eager modes themselves
    and the quantized ones are held to TOLERANCE.

    Returns:
        The relative error.

    Raises:
        Mismatch: The error is larger, or not a number.
    """
    mode = step.mode
    error = relative_error(network, step, batch)
    allowed = TOLERANCE[mode.precision] * (8 if mode.train and network.batch_norms else 1)
    if mode.eager != mode and not mode.quantized_format and allowed > MARGIN:
        allowed = min(allowed, 2 * _eager_error(network, mode.eager) + MARGIN)
    if not error <= allowed:  # NaN too
        raise Mismatch(f"relative error {error:.1e} against eager fp32, allowed {allowed:.1e}")
    return error


def check_update(network: Network, step: Step, images: Tensor) -> None:
    """Check that the first update of a full step moves every parameter against its gradient.

    Whether the gradients are right is for `check`. AdamW's first update is the sign of the
    gradients: rounding turns elements near zero about, so updated weights cannot be compared.

    The step is left as it was made: with the network's weights, which gradients can be compared on,
    and no optimizer state.

    Args:
        network: Of the step.
        step: A full step.
        images: As `step.cast` makes them.

    Raises:
        Mismatch: The message names the parameters that did not move so.
        ValueError: The step has no optimizer.
    """
    if step.optimizer is None:
        raise ValueError("step: has no optimizer, expected one made with optimize=True")
    _reset(network, step.model, step.optimizer)
    (group,) = step.optimizer.param_groups
    group["lr"] = 0.1  # enough for weights in bf16
    step(images)
    group["lr"] = LEARNING_RATE
    pairs = zip(step.model.named_parameters(), network.model.parameters(), strict=True)
    with torch.no_grad():
        wrong = [
            name
            for (name, p), old in pairs
            if p.grad is None or not ((old.to(p) - p).float() * p.grad.float()).sum() > 0
        ]
    if wrong:
        raise Mismatch(f"the optimizer did not move {', '.join(wrong)} against their gradients")
    _reset(network, step.model, step.optimizer)


def _reset(network: Network, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()
    with torch.no_grad():
        for p, old in zip(model.parameters(), network.model.parameters(), strict=True):
            p.copy_(old)


def _expected(network: Network, train: bool, batch: int) -> list[Tensor]:
    """Outputs of eager fp32, computed once.

    They are the logits of the different images of a batch; or the gradients of the whole batch,
    whose upstream gradients are summed over the copies of each image.
    """
    different = distinct(batch)
    key = (train, batch if train else different)
    if key not in network.expected:
        step = Step(network, MODES[REFERENCE.name + TRAIN * train])
        with step.mode.settings():
            expected = step.outputs(network.batch(different), batch // different)
        network.expected[key] = [w.cpu() for w in expected]
    return [w.to(network.device) for w in network.expected[key]]


def _eager_error(network: Network, mode: Mode) -> float:
    if mode not in network.eager_errors:
        with mode.settings():
            network.eager_errors[mode] = relative_error(network, Step(network, mode), DISTINCT)
    return network.eager_errors[mode]
