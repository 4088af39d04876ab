"""The shapes that tests and benchmarks share, and the inputs made of them.

Each list holds dicts of keyword arguments for the operation's `<op>_inputs`: DeiT's shapes cut
down, and awkward ones. `deit_cases` gives DeiT's own, at any batch size. Inputs are random, by
SEED, in fp32; keys are the operation's argument names.
D features, H heads, N tokens, C channels, B images.
"""

from typing import NamedTuple

import torch

from .quantize import quantize_reference, quantize_statically_reference

SEED = 0  # of all draws; tests try others
MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)

LAYER_NORM = [
    {"shape": (1, 192)},
    {"shape": (7, 384)},
    {"shape": (5, 768)},
    {"shape": (30, 768)},  # several rows for a program of backward
    {"shape": (13, 100)},
    {"shape": (2, 3, 33)},
    {"shape": (3, 1)},
    {"shape": (2, 3000)},
    {"shape": (0, 64)},
]

# M rows in S samples, K -> N features
LINEAR = [
    {"M": 2 * 198, "S": 2, "K": 192, "N": 576},  # DeiT-Ti qkv
    {"M": 130, "S": 2, "K": 192, "N": 192},
    {"M": 6, "S": 3, "K": 384, "N": 1536},
    {"M": 1, "S": 1, "K": 33, "N": 7},
    {"M": 65, "S": 5, "K": 100, "N": 130},
    {"M": 0, "S": 1, "K": 64, "N": 32},
]

# (..., K) in equal parts
QUANTIZE = [
    {"shape": (2, 99, 192)},
    {"shape": (7, 768), "parts": 12},  # as attention's heads and GELU's results have them
    {"shape": (1, 100)},
    {"shape": (13, 99), "parts": 3},
    {"shape": (3, 1)},
    {"shape": (40,)},
    {"shape": (2, 6000), "parts": 2},
    {"shape": (0, 64), "parts": 2},
]

# M rows in S samples, K -> N features; x's in `parts`
QUANTIZED_LINEAR = [
    {"M": 2 * 99, "S": 2, "K": 192, "N": 576},  # DeiT-Ti qkv
    {"M": 130, "S": 2, "K": 192, "N": 192, "parts": 3},
    {"M": 6, "S": 3, "K": 384, "N": 320, "parts": 6},
    {"M": 65, "S": 5, "K": 96, "N": 130, "parts": 3},
    {"M": 9, "S": 1, "K": 100, "N": 33},
    {"M": 1, "S": 1, "K": 33, "N": 7},
    {"M": 1, "S": 1, "K": 64, "N": 64, "parts": 2},
    {"M": 0, "S": 1, "K": 64, "N": 64},
]

# N queries, L keys
ATTENTION = [
    {"B": 2, "H": 3, "N": 198, "L": 198, "d": 64},  # DeiT-Ti distilled
    {"B": 1, "H": 1, "N": 578, "L": 578, "d": 64},  # DeiT-B-384 distilled
    {"B": 3, "H": 2, "N": 49, "L": 49, "d": 32},  # a TinyViT window
    {"B": 1, "H": 2, "N": 197, "L": 197, "d": 64},
    {"B": 2, "H": 6, "N": 2, "L": 198, "d": 64},  # prefix tokens of the last block
    {"B": 1, "H": 1, "N": 1, "L": 1, "d": 32},
    {"B": 1, "H": 2, "N": 65, "L": 128, "d": 32},
    {"B": 1, "H": 2, "N": 70, "L": 70, "d": 80},  # ViT-H
    {"B": 2, "H": 3, "N": 1, "L": 50, "d": 48},  # CaiT's class token
    {"B": 1, "H": 1, "N": 20, "L": 260, "d": 48},
    {"B": 0, "H": 2, "N": 5, "L": 5, "d": 32},
]

# a map of Y x X tokens in windows
WINDOW_ATTENTION = [
    {"B": 2, "Y": 14, "X": 7, "H": 2, "window": 7},
    {"B": 1, "Y": 14, "X": 14, "H": 1, "window": 14},  # the whole map
    {"B": 1, "Y": 12, "X": 12, "H": 1, "window": 12},
    {"B": 1, "Y": 9, "X": 9, "H": 1, "window": 9},
    {"B": 2, "Y": 8, "X": 12, "H": 2, "window": 4},
    {"B": 1, "Y": 3, "X": 6, "H": 2, "window": 3},
    {"B": 0, "Y": 7, "X": 7, "H": 2, "window": 7},
]

# image size, patch size, channels, features, prefix tokens; positions for the prefix tokens too?
PATCH_EMBED = [
    {"B": 2, "size": (64, 96), "patch": (16, 16), "C": 3, "D": 192, "T": 2, "prefix_pos": True},
    {"B": 1, "size": (48, 48), "patch": (16, 16), "C": 1, "D": 100, "T": 1, "prefix_pos": False},
    {"B": 3, "size": (28, 42), "patch": (14, 14), "C": 4, "D": 64, "T": 0, "prefix_pos": False},
    {"B": 2, "size": (32, 64), "patch": (32, 32), "C": 2, "D": 33, "T": 2, "prefix_pos": True},
    {"B": 5, "size": (8, 12), "patch": (4, 3), "C": 3, "D": 48, "T": 5, "prefix_pos": True},
    {"B": 0, "size": (16, 16), "patch": (16, 16), "C": 3, "D": 32, "T": 1, "prefix_pos": True},
]

LAYER_NORM_LINEAR = [
    {"M": 2 * 198, "K": 192, "N": 576},  # DeiT-Ti qkv
    {"M": 70, "K": 384, "N": 128, "activation": "gelu"},
    {"M": 3, "K": 100, "N": 33},
    {"M": 0, "K": 64, "N": 32},
]

LAYER_NORM_MLP = [
    {"M": 2 * 66, "S": 2, "D": 192, "hidden": 768},
    {"M": 7, "S": 7, "D": 100, "hidden": 40},
    {"M": 1, "S": 1, "D": 33, "hidden": 50},
]

# B samples, H heads, N tokens, d features a head
LAYER_NORM_ATTENTION = [
    {"B": 2, "H": 3, "N": 70, "D": 192, "d": 64},
    {"B": 3, "H": 2, "N": 5, "D": 100, "d": 32},
    {"B": 1, "H": 1, "N": 3, "D": 33, "d": 32},
]

# B samples, H heads, N tokens, d features a head
TALKING_HEADS = [
    {"B": 2, "H": 4, "N": 37, "d": 48},  # CaiT-XXS's heads
    {"B": 1, "H": 8, "N": 49, "d": 48},  # CaiT-S's
    {"B": 1, "H": 6, "N": 20, "d": 48},  # CaiT-XS's
    {"B": 1, "H": 16, "N": 33, "d": 48},  # CaiT-M's
    {"B": 3, "H": 3, "N": 5, "d": 32},
    {"B": 2, "H": 2, "N": 65, "d": 32},
    {"B": 2, "H": 5, "N": 1, "d": 48},
    {"B": 0, "H": 4, "N": 5, "d": 48},
]

CLASSIFIER = [
    {"B": 3, "N": 198, "D": 192, "classes": 1000},
    {"B": 17, "N": 2, "D": 100, "classes": 10},
    {"B": 1, "N": 5, "D": 384, "classes": 65},
    {"B": 0, "N": 2, "D": 64, "classes": 10},
]

# B images of C channels, D output channels, k x k taps
CONV_NORM = [
    {"B": 2, "C": 64, "D": 96, "Y": 14, "X": 9, "k": 1},
    {"B": 1, "C": 40, "D": 24, "Y": 5, "X": 5, "k": 1, "activation": "gelu", "residual": True},
    {"B": 2, "C": 48, "D": 48, "Y": 14, "X": 11, "k": 3, "padding": 1, "groups": 48},
    {"B": 1, "C": 33, "D": 33, "Y": 9, "X": 17, "k": 3, "padding": 1, "groups": 33, "stride": 2,
     "activation": "gelu"},
    {"B": 1, "C": 8, "D": 8, "Y": 1, "X": 2, "k": 3, "padding": 1, "groups": 8, "residual": True,
     "activation": "gelu"},
    {"B": 2, "C": 3, "D": 32, "Y": 16, "X": 12, "k": 3, "padding": 1, "stride": 2,
     "activation": "gelu"},
    {"B": 1, "C": 12, "D": 24, "Y": 7, "X": 7, "k": 3, "padding": 1, "groups": 3, "residual": True},
    {"B": 0, "C": 32, "D": 32, "Y": 7, "X": 7, "k": 3, "padding": 1, "groups": 32},
]  # fmt: skip

DISTILLATION_LOSS = [
    {"B": 5, "C": 1000},
    {"B": 3, "C": 33},
    {"B": 1, "C": 10},
    {"B": 2, "C": 1},
    {"B": 2, "C": 21841},  # ImageNet-21k
    {"B": 2, "C": 8192},
]

SPARSE_CROSS_ENTROPY = [
    {"B": 5, "C": 1000, "K": 10},  # TinyViT's for ImageNet-1k
    {"B": 2, "C": 21841, "K": 100},  # and for ImageNet-21k
    {"B": 3, "C": 33, "K": 7},
    {"B": 1, "C": 10, "K": 1},
    {"B": 3, "C": 10, "K": 10},  # no other class is left
    {"B": 2, "C": 1, "K": 1},
    {"B": 2, "C": 5000, "K": 1500},
]


def attention_inputs(B, H, N, L, d, bias=False, packed=False, device="cpu"):
    """packed: q, k, v as views of one (B, L, 3, H, d) product, q the first N rows."""
    torch.manual_seed(SEED)
    if packed:
        q, k, v = torch.randn(B, L, 3, H, d, device=device).unbind(2)
        inputs = {"q": q[:, :N], "k": k, "v": v}
    else:
        inputs = {
            name: torch.randn(B, n, H, d, device=device)
            for name, n in zip("qkv", (N, L, L), strict=True)
        }
    if bias:
        inputs["bias"] = torch.randn(H, N, L, device=device)
    return inputs


def attention_quantized_inputs(B, H, N, d, format, operands=False, device="cpu"):
    """operands: qkv, (B, N, 3, H, d), in fp8 with one scale, instead of q, k and v."""
    made = attention_inputs(B, H, N, N, d, packed=True, device=device)
    one = torch.full((1, 1), 0.02, device=device)
    if operands:
        made = {"qkv": quantize_statically_reference(torch.stack(tuple(made.values()), 2), one)}
    return made | {"format": format, "out_scale": one if format == "fp8" else None}


def classifier_inputs(B, N, D, classes, distilled=True, device="cpu"):
    torch.manual_seed(SEED)
    inputs = {
        "x": torch.randn(B, N, D, device=device) + 2,
        "norm_weight": torch.randn(D, device=device),
        "norm_bias": torch.randn(D, device=device),
    }
    for head in ("head", "dist") if distilled else ("head",):
        inputs[f"{head}_weight"] = torch.randn(classes, D, device=device) / D**0.5
        inputs[f"{head}_bias"] = torch.randn(classes, device=device)
    return inputs


def conv_norm_inputs(
    B, C, D, Y, X, k, stride=1, padding=0, groups=1, activation="none", residual=False,
    device="cpu",
):  # fmt: skip
    torch.manual_seed(SEED)
    made = {
        "x": torch.randn(B, C, Y, X, device=device).contiguous(memory_format=torch.channels_last),
        "weight": torch.randn(D, C // groups, k, k, device=device) * (groups / (C * k * k)) ** 0.5,
        "norm_weight": torch.randn(D, device=device),
        "norm_bias": torch.randn(D, device=device),
        "mean": torch.randn(D, device=device) / 4,
        "var": torch.rand(D, device=device) + 0.5,
        "stride": stride, "padding": padding, "groups": groups, "activation": activation,
    }  # fmt: skip
    if residual:
        Y, X = ((n + 2 * padding - k) // stride + 1 for n in (Y, X))
        residual = torch.randn(B, D, Y, X, device=device)
        made["residual"] = residual.contiguous(memory_format=torch.channels_last)
    return made


def distillation_loss_inputs(B, C, distillation="hard", soft_target=False, device="cpu"):
    torch.manual_seed(SEED)
    inputs = {
        "class_logits": 2 * torch.randn(B, C, device=device),
        "dist_logits": 2 * torch.randn(B, C, device=device) + 5,
        "target": torch.randint(C, (B,), device=device),
        "teacher_logits": 3 * torch.randn(B, C, device=device),
        "distillation": distillation,
    }
    if soft_target:  # as Mixup makes them: two labels, smoothed
        rows, mixed = torch.arange(B, device=device), torch.full((B, C), 0.1 / C, device=device)
        mixed[rows, inputs["target"]] += 0.63
        mixed[rows, inputs["target"].flip(0)] += 0.27
        inputs["target"] = mixed
    if distillation == "none":
        inputs |= {"dist_logits": None, "teacher_logits": None}
    return inputs


def sparse_cross_entropy_inputs(B, C, K, device="cpu"):
    """probs as a store has them: the largest of a softmax, in descending order."""
    torch.manual_seed(SEED)
    logits = 2 * torch.randn(B, C, device=device)
    probs, indices = (3 * torch.randn(B, C, device=device)).softmax(1).topk(K)
    return {"logits": logits, "indices": indices, "probs": probs}


def layer_norm_inputs(shape, device="cpu"):
    torch.manual_seed(SEED)
    x = torch.randn(shape, device=device) + 3  # a mean far from zero
    weight, bias = torch.randn(2, shape[-1], device=device)
    return {"x": x, "weight": weight, "bias": bias}


def layer_norm_linear_inputs(M, K, N, activation="none", stream="normal", device="cpu"):
    """stream: "normal", "outliers" (some channels 50 times the others) or "offset" (a mean of ten
    deviations)."""
    torch.manual_seed(SEED)
    x = torch.randn(M, K, device=device)
    if stream == "outliers":
        x[:, ::37] *= 50
    if stream == "offset":
        x += 10
    return {
        "x": x,
        "norm_weight": 1 + torch.randn(K, device=device) / 4,
        "norm_bias": torch.randn(K, device=device),
        "weight": torch.randn(N, K, device=device) / K**0.5,
        "bias": torch.randn(N, device=device),
        "activation": activation,
    }


def layer_norm_attention_inputs(B, H, N, D, d, scales=True, device="cpu"):
    """The residual is x."""
    torch.manual_seed(SEED)
    inputs = {
        "x": torch.randn(B, N, D, device=device) + 1,
        "norm_weight": torch.randn(D, device=device),
        "norm_bias": torch.randn(D, device=device),
        "qkv_weight": torch.randn(3 * H * d, D, device=device) / D**0.5,
        "qkv_bias": torch.randn(3 * H * d, device=device),
        "proj_weight": torch.randn(D, H * d, device=device) / D**0.5,
        "proj_bias": torch.randn(D, device=device),
        "num_heads": H,
    }
    if scales:
        inputs["layer_scale"] = torch.randn(D, device=device)
        inputs["row_scale"] = torch.randint(0, 2, (B,), device=device) / 0.75
    return inputs


def layer_norm_mlp_inputs(M, S, D, hidden, scales=True, device="cpu"):
    torch.manual_seed(SEED)
    inputs = {
        "x": torch.randn(S, M // S, D, device=device) + 1,
        "norm_weight": torch.randn(D, device=device),
        "norm_bias": torch.randn(D, device=device),
        "fc1_weight": torch.randn(hidden, D, device=device) / D**0.5,
        "fc1_bias": torch.randn(hidden, device=device),
        "fc2_weight": torch.randn(D, hidden, device=device) / hidden**0.5,
        "fc2_bias": torch.randn(D, device=device),
        "residual": torch.randn(S, M // S, D, device=device),
    }
    if scales:
        inputs["layer_scale"] = torch.randn(D, device=device)
        inputs["row_scale"] = torch.randint(0, 2, (S,), device=device) / 0.75
    return inputs


def linear_inputs(
    M, S, K, N, bias=True, activation="none", residual=False, layer_scale=False, row_scale=False,
    device="cpu",
):  # fmt: skip
    torch.manual_seed(SEED)
    shape = (S, M // S)
    inputs = {
        "x": torch.randn(*shape, K, device=device),
        "weight": torch.randn(N, K, device=device) / K**0.5,
        "activation": activation,
    }
    if bias:
        inputs["bias"] = torch.randn(N, device=device)
    if residual:
        inputs["residual"] = torch.randn(*shape, N, device=device)
    if layer_scale:
        inputs["layer_scale"] = torch.randn(N, device=device)
    if row_scale:
        inputs["row_scale"] = torch.randint(0, 2, (S,), device=device) / 0.75
    return inputs


def quantize_inputs(shape, parts=1, format="fp8", device="cpu"):
    torch.manual_seed(SEED)
    return {"x": torch.randn(shape, device=device), "format": format, "parts": parts}


def quantized_linear_inputs(
    M, S, K, N, parts=1, of="fp8", scale=None, bias=True, activation="none", residual=False,
    layer_scale=False, row_scale=False, dtype=None, format=None, out_scale=None, device="cpu",
):  # fmt: skip
    """of: the operands' format. scale: of all of x, instead of one a row and part; out_scale: of
    all of the result."""
    made = linear_inputs(M, S, K, N, bias, activation, residual, layer_scale, row_scale, device)

    def one(scale):
        return None if scale is None else torch.full((1, 1), scale, device=device)

    made["weight"] = quantize_reference(made["weight"], of)
    if scale is None:
        made["x"] = quantize_reference(made["x"], of, parts)
    else:
        made["x"] = quantize_statically_reference(made["x"], one(scale))
    made |= {"dtype": dtype} if format is None else {"format": format, "out_scale": one(out_scale)}
    return made


def talking_heads_inputs(B, H, N, d, device="cpu"):
    torch.manual_seed(SEED)
    return {
        "qkv": torch.randn(B, N, 3, H, d, device=device),
        "proj_l_weight": torch.randn(H, H, device=device),
        "proj_l_bias": torch.randn(H, device=device),
        "proj_w_weight": torch.randn(H, H, device=device) / H**0.5,
        "proj_w_bias": torch.randn(H, device=device) / max(N, 1),
    }


def patch_embed_inputs(B, size, patch, C, D, T, prefix_pos, uint8=False, device="cpu"):
    torch.manual_seed(SEED)
    n = size[0] // patch[0] * (size[1] // patch[1])
    inputs = {
        "image": torch.randn(B, C, *size, device=device),
        "weight": torch.randn(D, C, *patch, device=device) / (C * patch[0] * patch[1]) ** 0.5,
        "bias": torch.randn(D, device=device),
        "pos_embed": torch.randn(n + T * prefix_pos, D, device=device),
    }
    if T:
        inputs["prefix_tokens"] = torch.randn(T, D, device=device)
    if uint8:
        inputs["image"] = torch.randint(0, 256, (B, *size, C), dtype=torch.uint8, device=device)
        inputs |= {"mean": MEAN[:C], "std": STD[:C]}
    return inputs


def window_attention_inputs(B, Y, X, H, window, d=32, device="cpu"):
    torch.manual_seed(SEED)
    return {
        "qkv": torch.randn(B, Y, X, H, 3, d, device=device),
        "biases": torch.randn(H, window**2, device=device),
        "window": window,
    }


class Network(NamedTuple):
    D: int
    H: int
    N: int
    image_size: int


DEIT = {  # with class and distillation token
    "Ti": Network(192, 3, 198, 224),
    "S": Network(384, 6, 198, 224),
    "B": Network(768, 12, 198, 224),
    "B-384": Network(768, 12, 578, 384),
}


class TinyViT(NamedTuple):
    image_size: int
    dims: tuple[int, ...]  # of the four stages
    heads: tuple[int, ...]  # of the last three
    windows: tuple[int, ...]


# beside the DeiT of about its size
TINY_VIT = {
    "Ti": TinyViT(224, (64, 128, 160, 320), (4, 5, 10), (7, 14, 7)),  # 5M
    "S": TinyViT(224, (64, 128, 256, 448), (4, 8, 14), (7, 14, 7)),  # 11M
    "B": TinyViT(224, (96, 192, 384, 576), (6, 12, 18), (7, 14, 7)),  # 21M
    "B-384": TinyViT(384, (96, 192, 384, 576), (6, 12, 18), (12, 24, 12)),
}


def _tiny_vit_cases(network, batch):
    size, dims, heads, windows = TINY_VIT[network]
    first, second = ({"B": batch, "Y": size // s, "X": size // s} for s in (4, 8))
    C, depthwise = dims[0], {"k": 3, "padding": 1}
    return {
        "window_attention": {
            f"stage {stage}": {
                "B": batch, "Y": size // (2 << stage), "X": size // (2 << stage), "H": H,
                "window": window,
            }
            for stage, H, window in zip((2, 3, 4), heads, windows, strict=True)
        },
        "conv_norm": {
            "expand": {**first, "C": C, "D": 4 * C, "k": 1, "activation": "gelu"},
            "depthwise": {
                **first, **depthwise, "C": 4 * C, "D": 4 * C, "groups": 4 * C, "activation": "gelu",
            },
            "project": {
                **first, "C": 4 * C, "D": C, "k": 1, "residual": True, "activation": "gelu",
            },
            "local_conv": {**second, **depthwise, "C": dims[1], "D": dims[1], "groups": dims[1]},
        },
    }  # fmt: skip


def _eight_bits(rows, D, H):
    """A block's products. fp8: what attention and GELU leave has one scale, known beforehand. int8:
    a scale for each row and head, or 64 features."""
    bf16 = {"dtype": torch.bfloat16}
    fp8 = {
        "qkv": {**rows, **bf16, "K": D, "N": 3 * D},
        "proj": {**rows, **bf16, "K": D, "N": D, "scale": 0.02, "residual": True},
        "fc1": {**rows, "K": D, "N": 4 * D, "activation": "gelu", "format": "fp8",
                "out_scale": 0.02},
        "fc2": {**rows, **bf16, "K": 4 * D, "N": D, "scale": 0.02, "residual": True},
    }  # fmt: skip
    int8 = {
        "qkv": fp8["qkv"],
        "proj": {**rows, **bf16, "K": D, "N": D, "parts": H, "residual": True},
        "fc1": {**rows, "K": D, "N": 4 * D, "activation": "gelu", "format": "int8"},
        "fc2": {**rows, **bf16, "K": 4 * D, "N": D, "parts": 4 * D // 64, "residual": True},
    }
    return {"fp8": fp8, "int8": int8}


def deit_cases(op: str, network: str, batch: int) -> dict[str, dict]:
    """What one forward pass of DEIT[network], or of its like where DeiT has no such operation, asks
    of `op`: label -> arguments of `<op>_inputs`."""
    tiny_vit = _tiny_vit_cases(network, batch)
    if op in tiny_vit:
        return tiny_vit[op]
    D, H, N, size = DEIT[network]
    rows = {"M": batch * N, "S": batch}
    image = {"size": (size, size), "patch": (16, 16), "C": 3, "D": D, "T": 2, "prefix_pos": True}
    eight_bits = _eight_bits(rows, D, H)
    return {
        "layer_norm": {"": {"shape": (batch, N, D)}},
        "layer_norm_quantized": {of: {"shape": (batch, N, D), "format": of} for of in eight_bits},
        "quantize": {of: {"shape": (batch, N, D), "format": of} for of in eight_bits},
        "quantized_linear": {
            f"{of} {name}": {"of": of, **case}
            for of, products in eight_bits.items()
            for name, case in products.items()
        },
        "linear": {
            "qkv": {**rows, "K": D, "N": 3 * D},
            "proj": {**rows, "K": D, "N": D, "residual": True},
            "fc1": {**rows, "K": D, "N": 4 * D, "activation": "gelu"},
            "fc2": {**rows, "K": 4 * D, "N": D, "residual": True},
        },
        "layer_norm_linear": {
            "qkv": {"M": batch * N, "K": D, "N": 3 * D},
            "fc1": {"M": batch * N, "K": D, "N": 4 * D, "activation": "gelu"},
        },
        "attention": {
            "": {"B": batch, "H": H, "N": N, "L": N, "d": 64, "packed": True},
            "last block": {"B": batch, "H": H, "N": 2, "L": N, "d": 64, "packed": True},
        },
        "attention_quantized": {
            of: {
                "B": batch,
                "H": H,
                "N": N,
                "d": 64,
                "format": of.split()[0],
                "operands": "operands" in of,
            }
            for of in ("fp8", "int8", "fp8 operands")
        },
        # of the CaiT that is as wide: no prefix token in the trunk
        "talking_heads": {"": {"B": batch, "H": D // 48, "N": N - 2, "d": 48}},
        "patch_embed": {
            "float NCHW": {"B": batch, **image},
            "uint8 NHWC": {"B": batch, **image, "uint8": True},
        },
        "layer_norm_attention": {
            "": {"B": batch, "H": H, "N": N, "D": D, "d": 64, "scales": False}
        },
        "layer_norm_mlp": {"": {**rows, "D": D, "hidden": 4 * D, "scales": False}},
        "classifier": {"": {"B": batch, "N": N, "D": D, "classes": 1000}},
        "distillation_loss": {  # of training
            "hard": {"B": batch, "C": 1000, "soft_target": True},
            "soft": {"B": batch, "C": 1000, "distillation": "soft", "soft_target": True},
        },
        "sparse_cross_entropy": {  # of training from a store
            "K = 10": {"B": batch, "C": 1000, "K": 10},
            "21k, K = 100": {"B": batch, "C": 21841, "K": 100},
        },
    }[op]
