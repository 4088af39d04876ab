"""Drop-in modules: each is a subclass of the timm module whose name it bears, with the same
constructor, parameters and `state_dict`, and a forward that calls `deit_fast.kernels`.

Build them as timm builds its own (`block_fn=deit_fast.layers.Block`), or let `deit_fast.accelerate`
turn the modules of an existing model into them. `tiny_vit` has those of TinyViT, some of which have
the names of others.
"""

from . import tiny_vit
from .attention import Attention
from .block import Block
from .cait import Cait, ClassAttn, LayerScaleBlock, LayerScaleBlockClassAttn, TalkingHeadAttn
from .layer_norm import LayerNorm
from .mlp import Mlp
from .patch_embed import PatchEmbed
from .vision_transformer import VisionTransformer, VisionTransformerDistilled

__all__ = [
    "Attention",
    "Block",
    "Cait",
    "ClassAttn",
    "LayerNorm",
    "LayerScaleBlock",
    "LayerScaleBlockClassAttn",
    "Mlp",
    "PatchEmbed",
    "TalkingHeadAttn",
    "VisionTransformer",
    "VisionTransformerDistilled",
    "tiny_vit",
]
