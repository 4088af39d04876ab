"""Attention maps, the softmax weights of each block, and attention rollout.

    p = softmax(scale q k^T)            ViT and DeiT, and CaiT's class attention
    p = softmax(Wl (scale q k^T) + bl)  CaiT's talking heads, Wl over the heads

The matmul of q and k and the softmax are computed in fp32, of an fp64 model in fp64, from q and k
as the model itself makes them. The kernels never write this matrix: it has N^2 elements per head.

The forward pass runs on shallow copies. A copy shares everything with its module except the
children on the way to q and k, which are wrapped so that their outputs can be read. The model
itself is never touched, so other threads may use it meanwhile.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
from .layers._fusion import suppress_warning
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
    """The softmax weights of attention, for each block.

    Tokens are the class token, the distillation token and registers, if there are any, then the
    patches, row by row.

    CaiT's "blocks.0", ... have patch tokens only. Of talking heads this is the softmax between the
    two mixings of heads; after it the heads are mixed once more, and the result, which multiplies
    v, is no softmax. In "blocks_token_only.0", ..., which run last, the class token is the only
    query: (B, heads, 1, N + 1). With quantized layers it is the softmax of q and k as these layers
    give them, before the softmax itself is rounded.

    The model and its mode are not changed. Hooks fire as in one forward pass; a hook on the model,
    on `blocks`, or on a block or an attention of timm's gets a copy of its module.

    Args:
        model: timm's VisionTransformer (ViT, DeiT), VisionTransformerDistilled or Cait, as it is,
            accelerated or quantized, in eval mode.
        images: (B, C, H, W), normalised, or uint8 (B, H, W, C), not normalised.
        blocks: numbers in the order in which the blocks run, -1 the last; None: all.

    Returns:
        {name of a block: (B, heads, N, N)} in the order in which they run, in fp32 (fp64 of an fp64
        model) on the model's device. Row i has the weights of query i over all N tokens and sums to
        1. Where memory is short, choose blocks.

    Raises:
        ValueError: for a model in train mode, models and blocks of other kinds, numbers that no
            block has, and images that are no batch.
        TypeError: for images or numbers of another type.
        RuntimeError: where a part of the model has a forward that was set on the instance.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    maps: dict[str, Tensor] = {}
    _run(model, images, _chosen(model, blocks), maps.__setitem__)
    return maps


def attention_rollout(
    model: nn.Module, images: Tensor, head_fusion: str = "mean", discard_ratio: float = 0.0
) -> Tensor:
    """Attention followed through all blocks by multiplying their attention matrices.

        A = (F + I) / 2 of each block, its rows divided by their sums          A_L ... A_2 A_1

    Source: Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers, section 3.1; other
    fusions and the ratio as in vit-explain (J. Gildenblat), which divides columns instead of rows.

    Args:
        model: as for `attention_maps`, but not Cait, which mixes its heads after the softmax.
        images: as for `attention_maps`.
        head_fusion: F is the "mean", "max" or "min" of the weights over the heads.
        discard_ratio: the share of the elements of F, from 0 to below 1, that are set to 0: the
            lowest of each image, but never the class token's own, [0, 0].

    Returns:
        (B, N, N). Row i has the share of each input token in token i after the last block, and sums
        to 1. Row 0 is the class token's, row 1 a distillation token's; `token_maps` arranges these
        as maps of the patches.

    Raises:
        ValueError: for options that do not fit, for Cait, and as `attention_maps`.
        TypeError: as `attention_maps`.
        RuntimeError: as `attention_maps`.
    """
    model = getattr(model, "_orig_mod", model)
    if head_fusion not in HEAD_FUSIONS:
        raise ValueError(f"head_fusion: {head_fusion!r}, expected one of {tuple(HEAD_FUSIONS)}")
    if not 0 <= discard_ratio < 1:
        raise ValueError(f"discard_ratio: {discard_ratio}, expected 0 or more, and less than 1")
    chosen = _chosen(model, None)
    if isinstance(model, timm_cait.Cait):
        raise ValueError(
            f"model: {type(model).__name__} mixes its heads behind the softmax, "
            "expected a ViT or DeiT"
        )
    rollout: Any = None

    def accumulate(name, p):
        nonlocal rollout
        fused = _discard_lowest(HEAD_FUSIONS[head_fusion](p), discard_ratio)
        step = (fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)) / 2
        step = step / step.sum(-1, keepdim=True)
        rollout = step if rollout is None else step @ rollout

    _run(model, images, chosen, accumulate)
    return rollout


def _discard_lowest(fused, ratio):
    """(B, N, N) with this share of the elements of each matrix, the lowest, set to 0."""
    flat = fused.flatten(1)
    lowest = flat.topk(int(ratio * flat.shape[1]), largest=False).indices
    rest = flat.scatter(1, lowest, 0.0)
    rest[:, 0] = flat[:, 0]  # the class token's own stays
    return rest.view_as(fused)


def token_maps(model: nn.Module, images: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The attention of the class and the distillation token to the patches, as maps.

    Args:
        model: the one that the weights came from.
        images: those that the weights came from.
        weights: (..., N, N), or (..., 1, N) of class attention: one block of `attention_maps`, with
            its heads fused or not, or `attention_rollout`.

    Returns:
        {"class": (..., h, w)} for h x w patches, and "distillation" alike if the model has such a
        token.

    Raises:
        ValueError: if there is no class token among the N, as in CaiT's trunk.
    """
    model = getattr(model, "_orig_mod", model)
    patch_embed: Any = model.patch_embed
    first = 1 if images.dtype == torch.uint8 else 2
    h, w = patch_embed.dynamic_feat_size(tuple(images.shape[first : first + 2]))
    prefix = model.num_prefix_tokens
    if model.cls_token is None or weights.shape[-1] != prefix + h * w:
        raise ValueError(
            f"weights: {weights.shape[-1]} tokens in {type(model).__name__}, expected {h} x {w} "
            "patches behind a class token"
        )
    names = ["class"] + ["distillation"] * (getattr(model, "dist_token", None) is not None)
    return {
        name: weights[..., row, prefix:].unflatten(-1, (h, w)) for row, name in enumerate(names)
    }


# Running a copy of the model


class _Recorder(nn.Module):
    """Calls `module` and passes its output and inputs to `record`.

    In the place of an Identity or a Linear it is a layer that has to be called, so that nothing
    fused bypasses it.
    """

    def __init__(self, module: nn.Module, record: Callable[..., None]) -> None:
        super().__init__()
        self.module, self.record = module, record

    def forward(self, *args, **kwargs):
        result = self.module(*args, **kwargs)
        self.record(result, *args)
        return result


def _copy_with(module: nn.Module, children: dict[str, Any]) -> Any:
    """A shallow copy of `module` with these children, not compiled; hooks are shared too."""
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    for name in ("_compiled_call_impl", "_plan_cache", "_plans"):
        copied.__dict__.pop(name, None)
    copied.__dict__["_modules"] = module._modules | children
    return copied


@torch.no_grad()
def _run(
    model: nn.Module,
    images: Tensor,
    chosen: dict[str, nn.Module],
    receive: Callable[[str, Tensor], None],
) -> None:
    """Run the model once, and call `receive(name, weights)` when each of the chosen blocks runs."""
    if model.training:
        raise ValueError("model: in train mode, expected model.eval()")
    seen: set[str] = set()
    recorded: dict[str, dict[str, nn.Module]] = {}
    for name, block in chosen.items():

        def record(p, name=name):
            seen.add(name)
            with torch.autocast(p.device.type, enabled=False):
                receive(name, p)

        parent, _, number = name.rpartition(".")
        recorded.setdefault(parent, {})[number] = _recorded(block, record)
    parents = {
        name: _copy_with(getattr(model, name), children) for name, children in recorded.items()
    }
    _copy_with(model, parents)(_model_input(model, images))
    if missed := chosen.keys() - seen:
        raise RuntimeError(
            f"model: {sorted(missed)[0]} was not seen: it, or what it is in, has a forward put on "
            "the instance, expected that of its class"
        )


def _chosen(model: Any, numbers: int | Iterable[int] | None) -> dict[str, nn.Module]:
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


def _pick(blocks: dict[str, nn.Module], numbers: Sequence[int]) -> dict[str, nn.Module]:
    L = len(blocks)
    places: set[int] = set()
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


def _model_input(model: nn.Module, images: Any) -> Tensor:
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


def _recorded(block: Any, record: Callable[[Tensor], None]) -> Any:
    """A copy of the block that passes its softmax weights to `record`.

    With a `_Recorder` inside an accelerated block runs timm's own forward.
    """
    attn = block.attn
    parts: dict[str, Callable[..., None]]
    if isinstance(attn, timm_cait.TalkingHeadAttn):
        parts = {"proj_l": lambda t, s: record(_wide(t).permute(0, 3, 1, 2).softmax(-1))}
    else:
        q_name, k_name = (
            ("q", "k") if isinstance(attn, timm_cait.ClassAttn) else ("q_norm", "k_norm")
        )
        queries: list[Tensor] = []  # timm computes q before k
        parts = {
            q_name: lambda q, x: queries.append(_by_head(q, attn)),
            k_name: lambda k, x: record(_softmax(queries.pop(), _by_head(k, attn), attn)),
        }
    children = {part: _Recorder(getattr(attn, part), of) for part, of in parts.items()}
    copied_attn = _copy_with(attn, children)
    copied_block = _copy_with(block, {"attn": copied_attn})
    for copied in (copied_attn, copied_block):
        if isinstance(copied, Fast):
            suppress_warning(copied)
    return copied_block


def _by_head(t, attn):
    """(B, N, H d), (B, H d) of one token or (B, H, N, d) -> (B, H, N, d).

    Rounded to the quantized values that attention reads, where qkv writes such.
    """
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
