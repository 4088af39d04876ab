"""Pictures of the report: what the model sees, and what its tokens attend to.

The maps are attention rollout of the class token and the distillation token (Abnar and Zuidema
2020); of models without it, such as CaiT, the last block's attention, its heads averaged.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from deit_fast.attention_weights import attention_maps, attention_rollout, token_maps
from deit_fast.distill.datasets import ImageSet
from deit_fast.engine import data_config
from deit_fast.images import Decoder, Unreadable

SIDE = 112  # pixels that a thumbnail has at least; larger images have at most 160
LARGEST = 160
AT_ONCE = 4  # images, for rollout holds every token's weights
# black, purple, orange, yellow: light where there is attention
_HEAT = np.array([
    (0, 0, 4), (27, 12, 65), (74, 12, 107), (120, 28, 109), (165, 44, 96), (207, 68, 70),
    (237, 105, 37), (251, 155, 6), (247, 209, 61), (252, 255, 164),
])  # fmt: skip


@dataclass
class Thumbnails:
    """Pictures of some images, and what they show.

    Attributes:
        uris: {number of an image: {"image": data URI, "class": ..., "distillation": ...}}; the
            last two where the model has such maps.
        kind: What the maps are; "" without any.
        why_not: Why there are none; "" with some.
    """

    uris: dict[int, dict[str, str]] = field(default_factory=dict)
    kind: str = ""
    why_not: str = ""


def draw(model: nn.Module, images: ImageSet, numbers: Sequence[int]) -> Thumbnails:
    """Draw some images, with the attention of the model's tokens.

    Args:
        model: In eval mode.
        images: As gray or colour as the model expects them.
        numbers: The images; one that can't be read any more is left out.
    """
    decoder, found = Decoder(data_config(model)), Thumbnails()
    pixels: dict[int, np.ndarray] = {}
    for i in numbers:
        try:
            pixels[i] = np.asarray(decoder.transform(images.image(i))).transpose(1, 2, 0)
        except Unreadable:
            continue
    places = list(pixels)
    for start in range(0, len(places), AT_ONCE):
        some = places[start : start + AT_ONCE]
        x = torch.from_numpy(np.stack([pixels[i] for i in some]))
        maps: dict[str, Tensor] = {}
        if not found.why_not:
            try:
                maps, found.kind = _maps(model, x)
            except ValueError as error:  # a model without such attention; the page says so
                found.why_not = str(error)
        for row, i in enumerate(some):
            found.uris[i] = {"image": uri(pixels[i])}
            for token, values in maps.items():
                found.uris[i][token] = uri(overlay(pixels[i], values[row].cpu().numpy()))
    return found


def _maps(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], str]:
    """{token: (B, h, w)} and what they are; ValueError for models without attention."""
    try:
        weights, kind = attention_rollout(model, images), "attention rollout"
    except ValueError:
        (last,) = attention_maps(model, images, -1).values()
        weights, kind = last.mean(1), "attention of the last block, mean of its heads"
    return token_maps(model, images, weights), kind


def overlay(pixels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Lay a map (h, w), from its least to its largest value, over an image in gray.

    Returns:
        uint8 (H, W, 3), of the image's size or, for small images, a multiple of it.
    """
    shown = np.asarray(_sized(pixels).convert("RGB")).mean(2, keepdims=True)
    spread = float(values.max() - values.min())
    scaled = (values - values.min()) / (spread or 1.0)
    size = shown.shape[1], shown.shape[0]
    smooth = Image.fromarray(scaled.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    at = np.clip(np.asarray(smooth), 0, 1) * (len(_HEAT) - 1)
    colours = np.stack([np.interp(at, range(len(_HEAT)), _HEAT[:, c]) for c in range(3)], -1)
    return (0.4 * shown + 0.6 * colours).round().astype(np.uint8)


def uri(pixels: np.ndarray) -> str:
    """Encode uint8 (H, W, C) as a data URI: JPEG, of small images PNG."""
    image, file = _sized(pixels), io.BytesIO()
    small = max(pixels.shape[:2]) < SIDE
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    image.save(file, "PNG" if small else "JPEG", **({"optimize": True} if small else {}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _sized(pixels: np.ndarray) -> Image.Image:
    """Enlarge a small image by a whole number, without smoothing; shrink a large one."""
    image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
    longest = max(image.size)
    if longest < SIDE:
        times = -(-SIDE // longest)
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    if longest > LARGEST:
        image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return image
