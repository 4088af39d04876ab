"""What each token takes from each other one: the softmax of attention, and its rollout.

    p = softmax(scale q k^T)            ViT and DeiT, and CaiT's class attention
    p = softmax(Wl (scale q k^T) + bl)  CaiT's talking heads, Wl over the heads

The product of q and k and the softmax are computed in fp32, of an fp64 model in fp64, from q and k
as the model itself makes them. Kernels keep no such matrix: it costs N^2 numbers for each head.

The model runs once, as a stand-in: a module that shares everything with the one it stands for but
the children that are watched. The model itself is never touched, so others may use it meanwhile.
"""

import operator
from collections.abc import Callable, Iterable

import timm.layers
import timm.models.cait as timm_cait
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn

from . import layers
from .engine import data_config
from .kernels.patch_embed import normalize_reference
from .kernels.quantize import dequantize, quantize_statically_reference
from .layers._base import Fast, attention_scale
from .layers._bypass import acknowledge
from .layers.quantized import QuantizedAttention
from .layers.vision_transformer import FastTransformer

HEAD_FUSIONS = {
    "mean": lambda p: p.mean(1), "max": lambda p: p.amax(1), "min": lambda p: p.amin(1),
}  # fmt: skip

_ATTENTION = (timm.layers.Attention, layers.Attention, QuantizedAttention)
_TALKING = (timm_cait.TalkingHeadAttn, layers.TalkingHeadAttn)
_CLASS = (timm_cait.ClassAttn, layers.ClassAttn)
# class of a block -> what its attention may be
_BLOCKS = {
    timm_vit.Block: _ATTENTION,
    layers.Block: _ATTENTION,
    timm_cait.LayerScaleBlock: _TALKING,
    layers.LayerScaleBlock: _TALKING,
    timm_cait.LayerScaleBlockClassAttn: _CLASS,
    layers.LayerScaleBlockClassAttn: _CLASS,
}


def attention_maps(
    model: nn.Module, images: Tensor, blocks: int | Iterable[int] | None = None
) -> dict[str, Tensor]:
    """Softmax weights of attention, {name of a block: (B, heads, N, N)}, in the order in which the
    blocks run: row i is what token i takes from all N tokens, and sums to 1.

    model: timm's VisionTransformer (ViT, DeiT), VisionTransformerDistilled or Cait, as it is or
    accelerated, in eight bits too, in eval mode. images: (B, C, H, W), normalised, or uint8
    (B, H, W, C), not yet. blocks: numbers in the order in which they run, -1 the last; None: all.

    Tokens are the class token, the distillation token and registers, as far as there are any, then
    the patches, row by row. The weights are in fp32 (an fp64 model's in fp64), on the model's
    device, and B heads N^2 numbers a block: choose blocks where memory is short.

    CaiT's "blocks.0", ... have patches alone. Of talking heads this is the softmax between the two
    mixings of heads; behind it the heads are mixed once more, and what v is multiplied by is no
    softmax. In "blocks_token_only.0", ..., which run last, the class token alone asks:
    (B, heads, 1, N + 1). Layers in eight bits: the softmax of q and k as these layers give them,
    before anything rounds it.

    The model is not changed, nor is its mode. Hooks fire as in one forward pass; one on the model,
    on `blocks`, or on a block or an attention of timm's gets a stand-in for its module. Raises
    ValueError for models in train mode, other kinds of models and blocks, numbers that no block
    has, and images that are no batch; TypeError for images of another type; RuntimeError where a
    part of the model has a forward of its own, put on the instance.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper off
    maps = {}
    _run(model, images, _chosen(model, blocks), maps.__setitem__)
    return maps


def attention_rollout(
    model: nn.Module, images: Tensor, head_fusion: str = "mean", discard_ratio: float = 0.0
) -> Tensor:
    """Attention followed through all blocks, (B, N, N): row i is what token i at the end has of all
    N tokens at the input, and sums to 1. The class token's is row 0, a distillation token's row 1;
    `token_maps` lays these out as the patches lie.

        A = (F + I) / 2 of each block, its rows divided by their sums          A_L ... A_2 A_1

    head_fusion: F is the "mean", "max" or "min" of the heads' weights. discard_ratio: the share,
    from 0 to below 1, of F's numbers that are set to 0, each image's lowest, but never the class
    token's own, [0, 0]. The rest, and errors, as `attention_maps`; ValueError for Cait too, whose
    heads are mixed behind the softmax.

    Source: Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers, section 3.1; other
    fusions and the ratio as in vit-explain (J. Gildenblat), which divides columns instead of rows.
    """
    model = getattr(model, "_orig_mod", model)
    if head_fusion not in HEAD_FUSIONS:
        raise ValueError(f"head_fusion: {head_fusion!r}, expected one of {tuple(HEAD_FUSIONS)}")
    if not 0 <= discard_ratio < 1:
        raise ValueError(f"discard_ratio: {discard_ratio}, expected 0 or more, and less than 1")
    chosen = _chosen(model, None)
    if isinstance(model, timm_cait.Cait):
        raise ValueError(
            f"model: {type(model).__name__} mixes its heads behind the softmax, expected a ViT or DeiT"
        )
    product = None

    def follow(name, p):
        nonlocal product
        fused = _without_lowest(HEAD_FUSIONS[head_fusion](p), discard_ratio)
        step = (fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)) / 2
        step = step / step.sum(-1, keepdim=True)
        product = step if product is None else step @ product

    _run(model, images, chosen, follow)
    return product


def _without_lowest(fused, ratio):
    """(B, N, N) with that share of each matrix, the lowest, set to 0, but [0, 0]."""
    flat = fused.flatten(1)
    lowest = flat.topk(int(ratio * flat.shape[1]), largest=False).indices
    rest = flat.scatter(1, lowest, 0.0)
    rest[:, 0] = flat[:, 0]
    return rest.view_as(fused)


def token_maps(model: nn.Module, images: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What the class token, and the distillation token where there is one, take from the patches:
    {"class": (..., h, w), "distillation": (..., h, w)}, h x w patches.

    model, images: those that `weights` (..., N, N), or (..., 1, N) of class attention, came from:
    one block's of `attention_maps`, its heads fused or not, or `attention_rollout`'s. Raises
    ValueError where there is no class token among the N, as in CaiT's trunk.
    """
    model = getattr(model, "_orig_mod", model)
    first = 1 if images.dtype == torch.uint8 else 2
    h, w = model.patch_embed.dynamic_feat_size(tuple(images.shape[first : first + 2]))
    prefix = model.num_prefix_tokens
    if model.cls_token is None or weights.shape[-1] != prefix + h * w:
        raise ValueError(
            f"weights: {weights.shape[-1]} tokens in {type(model).__name__}, expected {h} x {w} patches"
            " behind a class token"
        )
    names = ["class"] + ["distillation"] * (getattr(model, "dist_token", None) is not None)
    return {
        name: weights[..., row, prefix:].unflatten(-1, (h, w)) for row, name in enumerate(names)
    }


# Running a stand-in


class _Beside(nn.Module):
    """Calls `module`, and shows `look` what came out and what went in. In the place of an Identity
    or a Linear it is a layer that has to be called."""

    def __init__(self, module, look):
        super().__init__()
        self.module, self.look = module, look

    def forward(self, *args, **kwargs):
        result = self.module(*args, **kwargs)
        self.look(result, *args)
        return result


def _stand_in(module, children):
    """`module` with these children, and not compiled; all else is shared, its hooks too."""
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    for name in ("_compiled_call_impl", "_rule"):
        made.__dict__.pop(name, None)
    made.__dict__["_modules"] = module._modules | children
    return made


@torch.no_grad()
def _run(model, images, chosen, show: Callable[[str, Tensor], None]):
    """`show(name, weights)` for each of the chosen blocks, as they run."""
    if model.training:
        raise ValueError("model: in train mode, expected model.eval()")
    seen, watched = set(), {}
    for name, block in chosen.items():

        def look(p, name=name):
            seen.add(name)
            with torch.autocast(p.device.type, enabled=False):
                show(name, p)

        parent, _, number = name.rpartition(".")
        watched.setdefault(parent, {})[number] = _watched(block, look)
    parents = {
        name: _stand_in(getattr(model, name), children) for name, children in watched.items()
    }
    _stand_in(model, parents)(_as_taken(model, images))
    if missed := chosen.keys() - seen:
        raise RuntimeError(
            f"model: {sorted(missed)[0]} was not seen: it, or what it is in, has a forward put on "
            "the instance, expected that of its class"
        )


def _chosen(model, numbers) -> dict[str, nn.Module]:
    """{name: block} in the order in which they run."""
    if not isinstance(model, timm_vit.VisionTransformer | timm_cait.Cait):
        raise ValueError(
            f"model: {type(model).__name__}, expected timm's VisionTransformer (ViT, DeiT), "
            "VisionTransformerDistilled or Cait, accelerated or not"
        )
    blocks = {
        f"{parent}.{number}": block
        for parent in ("blocks", "blocks_token_only")
        for number, block in (getattr(model, parent, None) or nn.Sequential()).named_children()
    }
    if numbers is not None:
        asked = [numbers] if not isinstance(numbers, Iterable) else list(numbers)
        blocks = _pick(blocks, asked)
    for name, block in blocks.items():
        if type(block) not in _BLOCKS:
            kinds = ", ".join(dict.fromkeys(kind.__name__ for kind in _BLOCKS))
            raise ValueError(f"model: {name} is a {type(block).__name__}, expected one of {kinds}")
        if type(block.attn) not in _BLOCKS[type(block)]:
            kind = _BLOCKS[type(block)][0].__name__
            raise ValueError(
                f"model: {name}.attn is a {type(block.attn).__name__}, expected {kind}"
            )
    return blocks


def _pick(blocks, numbers):
    L, places = len(blocks), set()
    if not numbers:
        raise ValueError("blocks: none, expected a number at least, or None for all")
    for number in numbers:
        try:
            place = operator.index(number)
        except TypeError:
            raise TypeError(f"blocks: {number!r}, expected whole numbers") from None
        if not -L <= place < L:
            raise ValueError(f"blocks: {number}, expected {-L} to {L - 1} for {L} blocks")
        places.add(place % L)
    return {name: block for i, (name, block) in enumerate(blocks.items()) if i in places}


def _as_taken(model, images):
    """The images as the model takes them, in its dtype and on its device."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: a {type(images).__name__}, expected a tensor")
    as_bytes = images.dtype == torch.uint8
    if not as_bytes and not images.is_floating_point():
        raise TypeError(f"images: {images.dtype}, expected floats, normalised, or uint8")
    if images.dim() != 4:
        wanted = "(B, H, W, C) of uint8" if as_bytes else "(B, C, H, W)"
        raise ValueError(f"images: shape {tuple(images.shape)}, expected {wanted}")
    like = next(model.parameters())
    if not as_bytes:
        return images.to(like.device, like.dtype)
    images = images.to(like.device)
    if isinstance(model, FastTransformer):
        return images
    config = data_config(model)
    return normalize_reference(images, config["mean"], config["std"], like.dtype)


# What a block computes


def _watched(block, look):
    """A stand-in for the block that hands its weights to `look`. With layers of other kinds inside,
    which are called, an accelerated block runs timm's own forward."""
    attn = block.attn
    if isinstance(attn, timm_cait.TalkingHeadAttn):
        parts = {"proj_l": lambda t, s: look(_wide(t).permute(0, 3, 1, 2).softmax(-1))}
    else:
        q_name, k_name = (
            ("q", "k") if isinstance(attn, timm_cait.ClassAttn) else ("q_norm", "k_norm")
        )
        made = []  # timm makes q before k
        parts = {
            q_name: lambda q, x: made.append(_by_head(q, attn)),
            k_name: lambda k, x: look(_softmax(made.pop(), _by_head(k, attn), attn)),
        }
    children = {part: _Beside(getattr(attn, part), of) for part, of in parts.items()}
    made_attn = _stand_in(attn, children)
    made_block = _stand_in(block, {"attn": made_attn})
    for made_module in (made_attn, made_block):
        if isinstance(made_module, Fast):
            acknowledge(made_module)
    return made_block


def _by_head(t, attn):
    """(B, N, H d), or (B, H d) of one token -> (B, H, N, d), which may be what t is; in the eight
    bits in which attention reads it, where qkv writes such."""
    scale = getattr(getattr(attn, "qkv", None), "output_scale", None)
    if scale is not None:
        t = dequantize(quantize_statically_reference(t, scale))
    if t.dim() == 4:
        return t
    return t.reshape(len(t), -1, attn.num_heads, t.shape[-1] // attn.num_heads).transpose(1, 2)


def _softmax(q, k, attn):
    """(B, H, N, d) each -> (B, H, N, N)."""
    q, k = _wide(q), _wide(k)
    with torch.autocast(q.device.type, enabled=False):
        return (q * attention_scale(attn, q.shape[-1]) @ k.transpose(-2, -1)).softmax(-1)


def _wide(t):
    return t.to(torch.promote_types(t.dtype, torch.float32))
