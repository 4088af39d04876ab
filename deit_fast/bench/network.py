"""A network with its random weights, which all its modes share."""

import copy
import functools
import importlib.util
import os

import timm
import torch
from timm.models import Cait, VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deit_fast
from deit_fast.models import NAMES

from .device import capability, has_bf16, why_no_quantized_matmul
from .modes import Mode, pick
from .weights import calibrate_batch_norms, random_images, randomize

DISTINCT = 8  # a batch has at most so many different images, each equally often
TRANSFORMERS = (VisionTransformer, Cait)


class Network:
    """A timm network at one image size, with random weights.

    Attributes:
        timm_name: timm's name of it.
        image_size: In pixels.
        label: Its name in tables and rows.
        device: Where it lies.
        model: timm's model, in eval mode; no mode changes it.
        images: The different images of a batch, fp32 (DISTINCT, 3, image_size, image_size).
        batch_norms: The model's batch norms.
        flops: FLOPs of one image's forward pass.
        blocks: How many Blocks of a ViT or DeiT `deit_fast` makes of it.
        why_not_fast: Why `deit_fast` has nothing for it, or None.
        expected: Outputs of eager fp32, computed once by `correctness`.
        eager_errors: Relative errors of eager modes, computed once by `correctness`.
    """

    def __init__(
        self, name: str, image_size: int | None, device: torch.device, label: str = "",
        options: dict | None = None,
    ):  # fmt: skip
        """Create the network on a device.

        Args:
            name: Ours or timm's.
            image_size: In pixels; None for the size that the network was made for.
            device: Where it computes.
            label: Its name in rows; by default `name`.
            options: Further arguments of `timm.create_model`.

        Raises:
            ValueError: The network is unknown, or the image size does not fit it; the message
                names the nearest valid ones. Or DEIT_FAST_BACKEND is set, with which deit_fast's
                modes would not run what their names say.
        """
        if os.environ.get("DEIT_FAST_BACKEND"):
            raise ValueError(
                "DEIT_FAST_BACKEND is set, expected it unset: a mode runs what it names"
            )
        self.device, self.label = device, label or name
        self.timm_name, self.image_size = check_network(name, image_size)
        self.images = random_images(DISTINCT, self.image_size, device)
        self.model = randomize(self._create(options or {})).eval().to(device)
        self.transformer = isinstance(self.model, TRANSFORMERS)
        self.batch_norms = [m for m in self.model.modules() if isinstance(m, nn.BatchNorm2d)]
        calibrate_batch_norms(self.model, self.image_size, device)
        self.expected: dict[tuple[bool, int], list[Tensor]] = {}
        self.eager_errors: dict[Mode, float] = {}
        meta = copy.deepcopy(self.model).to("meta")
        self.flops = count_flops(meta, self.image_size)
        self.why_not_fast = _why_not_fast(meta)
        self.blocks = sum(type(m) is deit_fast.layers.Block for m in meta.modules())

    def _create(self, options: dict) -> nn.Module:
        size = {"img_size": self.image_size} if _patch_size(self.timm_name) else {}
        # by default TinyViT has the 21,841 classes that it was distilled on
        return timm.create_model(self.timm_name, num_classes=1000, **size, **options)

    def why_not(self, mode: Mode) -> str | None:
        """Why the network has no such mode on its device, or None."""
        if mode.fast and self.why_not_fast:
            return self.why_not_fast
        if mode.quantized_format:
            missing = self._why_not_quantized(mode.quantized_format, mode.torchao)
            if missing:
                return missing
        if mode.tf32 and (self.device.type == "cpu" or capability(self.device) < (8, 0)):
            return "TF32 needs a GPU of compute capability 8.0"
        if mode.graph and self.device.type == "cpu":
            return "a CUDA graph needs a CUDA device"
        if mode.engine and self.device.type == "cpu":
            return "an engine has its graphs on a CUDA device"
        if torch.bfloat16 in (mode.dtype, mode.autocast) and not has_bf16(self.device):
            return "the GPU has no bf16 arithmetic"
        return None

    def _why_not_quantized(self, format: str, torchao: bool) -> str | None:
        if not self.blocks:
            return "it has no Block of a ViT or DeiT"
        if not torchao:
            of = None if self.device.type == "cpu" else capability(self.device)
            return why_no_quantized_matmul(format, of)
        if not importlib.util.find_spec("torchao"):
            return "torchao is not installed"
        if self.device.type == "cpu" or capability(self.device) < (8, 9):
            return "torchao's float8 needs a GPU of compute capability 8.9"
        return None

    def channels_last(self, mode: Mode) -> bool:
        """Whether the mode runs in channels_last: convolutional networks, on tensor cores."""
        return not self.transformer and mode.precision != "fp32"

    def batch(self, batch: int) -> Tensor:
        """Images of a batch, fp32 (batch, 3, image_size, image_size).

        A few different images are repeated, each equally often. So every image of a batch of any
        size can be checked against a small reference, also where batch norm mixes them.
        """
        return self.images[: distinct(batch)].repeat(batch // distinct(batch), 1, 1, 1)


def distinct(batch: int) -> int:
    """How many different images a batch has: its largest divisor up to DISTINCT."""
    return max(n for n in range(1, DISTINCT + 1) if batch % n == 0)


@functools.cache
def _patch_size(timm_name: str) -> int:
    """The side of a vision transformer's patches; 0 for networks of any image size."""
    if not timm.models.is_model_in_modules(timm_name, ("vision_transformer", "deit", "cait")):
        return 0  # and timm cannot build every network without memory
    with torch.device("meta"):
        model = timm.create_model(timm_name)
    return model.patch_embed.patch_size[0] if isinstance(model, TRANSFORMERS) else 0


def count_flops(model: nn.Module, image_size: int) -> int:
    """FLOPs of one image's forward pass: convolutions and matmuls, two for a multiply-add.

    Args:
        model: On the meta device; its parameters no longer require gradients afterwards.
        image_size: In pixels.
    """
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    model.requires_grad_(False)  # the counter trips over views of parameters: CaiT's class token
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(image)
    return counter.get_total_flops()


def _why_not_fast(model: nn.Module) -> str | None:
    try:
        deit_fast.accelerate(model)
    except ValueError:
        return "deit_fast has no modules for it"
    return None


def check_network(name: str, image_size: int | None) -> tuple[str, int]:
    """Resolve a network's name and image size.

    Args:
        name: Ours or timm's; a suffix such as ".in1k" is ignored.
        image_size: In pixels; None for the size that the network was made for.

    Returns:
        timm's name, and the image size in pixels.

    Raises:
        ValueError: timm has no such network, or the network cannot take that size.
    """
    known = {*NAMES, *timm.list_models()}
    (name,) = pick("network", [name.split(".")[0]], sorted(known))
    timm_name = NAMES.get(name, name)
    patch = _patch_size(timm_name)
    if image_size is None:
        size = timm.get_pretrained_cfg(timm_name).input_size[-1]
        return timm_name, size
    smallest = patch or 32
    if image_size < smallest or (patch and image_size % patch):
        near = max(smallest, image_size - image_size % (patch or 1))
        valid = f"{near} or {near + patch}" if patch else f"{smallest} or more"
        raise ValueError(f"image size: {image_size} for {timm_name}, nearest valid: {valid}")
    return timm_name, image_size
