"""Random weights and images, so that nothing needs a network connection.

Speed does not depend on the weights. They are drawn so that every part of a network matters for its
output, because the output is what correctness is checked on.
"""

import torch
from torch import Tensor, nn


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter: no zero bias and no unit LayerNorm that would hide a mistake.

    Args:
        model: Changed in place.
        seed: Of the random numbers.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise, leaf = torch.randn(p.shape, generator=generator), name.rpartition(".")[2]
        if p.dim() < 2 and (leaf == "weight" or leaf.startswith("gamma")):
            p.data.copy_(1 + 0.2 * noise)
        elif p.dim() > 1 and "token" not in leaf and "pos" not in leaf:
            p.data.copy_(noise / p[0].numel() ** 0.5)
        else:
            p.data.copy_(0.3 * noise)
    return model


def random_images(batch: int, size: int, device: torch.device, seed: int = 1) -> Tensor:
    """Normalized images, fp32 (batch, 3, size, size)."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator, device=device)


def calibrate_batch_norms(model: nn.Module, image_size: int, device: torch.device) -> None:
    """Keep the activations of a convolutional network in range; others are left as they are.

    Batch norms get the statistics of random images. Residual branches get a small gain: with a gain
    of 1, a deep random network amplifies rounding a hundredfold, and no two precisions agree.

    Args:
        model: Changed in place; in eval mode afterwards where it has batch norms.
        image_size: Of the network's images, in pixels.
        device: Where the model lies.
    """
    for m in model.modules():
        zero_last_gain = getattr(m, "zero_init_last", None)
        if zero_last_gain is not None:  # ResNet, RegNet
            zero_last_gain()
        elif getattr(m, "has_skip", False):  # EfficientNet
            last = m.get_submodule("bn3" if hasattr(m, "bn3") else "bn2")
            nn.init.zeros_(last.get_parameter("weight"))
    batch_norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in batch_norms:
        if not m.weight.any():
            nn.init.constant_(m.weight, 0.2)
        m.reset_running_stats()
        m.momentum = None  # the mean over what it sees
    if batch_norms:
        with torch.no_grad():
            model.train()(random_images(4, min(image_size, 224), device, 2))
        model.eval()
    for m in batch_norms:
        m.momentum = 0.1
