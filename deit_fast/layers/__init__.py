"""Drop-in modules for timm's, with a forward that calls `deit_fast.kernels`.

Each is a subclass of the timm module of the same name, with the same constructor, parameters and
`state_dict`. Build them as timm builds its own (`block_fn=deit_fast.layers.Block`), or let
`deit_fast.accelerate` turn the modules of an existing model into them. Those of TinyViT are in
`tiny_vit`, since some have the names of others.

`_fusion` explains how a module decides at each call what of it runs fused.
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
