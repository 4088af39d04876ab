"""Random inputs of each operation, in fp32, by `cases.SEED`.

Keys are the operation's argument names. B images or samples, H heads, N tokens (L keys), d features
per head, D features, M rows in S samples, K -> N features of a linear layer, C channels or classes.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from .. import cases
from ..quantize import quantize_reference, quantize_statically_reference

Device: TypeAlias = torch.device | str
Inputs: TypeAlias = dict[str, Any]  # tensors and options, by argument name

MEAN, STD = (0.485, 0.456, 0.406, 0.5), (0.229, 0.224, 0.225, 0.25)


def _seed() -> None:
    torch.manual_seed(cases.SEED)  # looked up at each call: tests change it


def attention_inputs(
    B: int, H: int, N: int, L: int, d: int, bias: bool = False, packed: bool = False,
    device: Device = "cpu",
) -> Inputs:  # fmt: skip
    """Of `attention`; packed: q, k, v as views of one (B, L, 3, H, d), q its first N rows."""
    _seed()
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


def attention_quantized_inputs(
    B: int, H: int, N: int, d: int, format: str, operands: bool = False, device: Device = "cpu"
) -> Inputs:
    """Of `attention_quantized`; operands: a qkv in fp8 with a per-tensor scale, not q, k and v."""
    made = attention_inputs(B, H, N, N, d, packed=True, device=device)
    scale = torch.full((1, 1), 0.02, device=device)
    if operands:
        made = {"qkv": quantize_statically_reference(torch.stack(tuple(made.values()), 2), scale)}
    return made | {"format": format, "out_scale": scale if format == "fp8" else None}


def classifier_inputs(
    B: int, N: int, D: int, classes: int, distilled: bool = True, device: Device = "cpu"
) -> Inputs:
    """Of `classifier`, with two heads or one."""
    _seed()
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
    B: int, C: int, D: int, Y: int, X: int, k: int, stride: int = 1, padding: int = 0,
    groups: int = 1, activation: str = "none", residual: bool = False, device: Device = "cpu",
) -> Inputs:  # fmt: skip
    """Of `conv_norm`: B maps of C channels and Y x X pixels to D channels, k x k taps."""
    _seed()
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
        added = torch.randn(B, D, Y, X, device=device)
        made["residual"] = added.contiguous(memory_format=torch.channels_last)
    return made


def distillation_loss_inputs(
    B: int, C: int, distillation: str = "hard", soft_target: bool = False, device: Device = "cpu"
) -> Inputs:
    """Of `distillation_loss`: B samples, C classes."""
    _seed()
    inputs: Inputs = {
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


def sparse_cross_entropy_inputs(B: int, C: int, K: int, device: Device = "cpu") -> Inputs:
    """Of `sparse_cross_entropy`; probs as a soft-label store has them: the top K, descending."""
    _seed()
    logits = 2 * torch.randn(B, C, device=device)
    probs, indices = (3 * torch.randn(B, C, device=device)).softmax(1).topk(K)
    return {"logits": logits, "indices": indices, "probs": probs}


def layer_norm_inputs(shape: Sequence[int], device: Device = "cpu") -> Inputs:
    """Of `layer_norm`, rows along the last dimension."""
    _seed()
    x = torch.randn(shape, device=device) + 3  # a mean far from zero
    weight, bias = torch.randn(2, shape[-1], device=device)
    return {"x": x, "weight": weight, "bias": bias}


def layer_norm_linear_inputs(
    M: int, K: int, N: int, activation: str = "none", distribution: str = "normal",
    device: Device = "cpu",
) -> Inputs:  # fmt: skip
    """Of `layer_norm_linear`.

    `distribution` of x: "normal", "outliers" (some channels 50 times the others) or "offset" (a
    mean of ten standard deviations).
    """
    _seed()
    x = torch.randn(M, K, device=device)
    if distribution == "outliers":
        x[:, ::37] *= 50
    if distribution == "offset":
        x += 10
    return {
        "x": x,
        "norm_weight": 1 + torch.randn(K, device=device) / 4,
        "norm_bias": torch.randn(K, device=device),
        "weight": torch.randn(N, K, device=device) / K**0.5,
        "bias": torch.randn(N, device=device),
        "activation": activation,
    }


def layer_norm_attention_inputs(
    B: int, H: int, N: int, D: int, d: int, scales: bool = True, device: Device = "cpu"
) -> Inputs:
    """Of `layer_norm_attention`, whose residual is x; scales: layer_scale and row_scale."""
    _seed()
    inputs: Inputs = {
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


def layer_norm_mlp_inputs(
    M: int, S: int, D: int, hidden: int, scales: bool = True, device: Device = "cpu"
) -> Inputs:
    """Of `layer_norm_mlp`; scales: layer_scale and row_scale."""
    _seed()
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
    M: int, S: int, K: int, N: int, bias: bool = True, activation: str = "none",
    residual: bool = False, layer_scale: bool = False, row_scale: bool = False,
    device: Device = "cpu",
) -> Inputs:  # fmt: skip
    """Of `linear`, with the parts of the epilogue that are asked for."""
    _seed()
    shape = (S, M // S)
    inputs: Inputs = {
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


def quantize_inputs(
    shape: Sequence[int], parts: int = 1, format: str = "fp8", device: Device = "cpu"
) -> Inputs:
    """Of `quantize`; parts: the groups of a row."""
    _seed()
    return {"x": torch.randn(shape, device=device), "format": format, "parts": parts}


def quantized_linear_inputs(
    M: int, S: int, K: int, N: int, parts: int = 1, of: str = "fp8", scale: float | None = None,
    bias: bool = True, activation: str = "none", residual: bool = False, layer_scale: bool = False,
    row_scale: bool = False, dtype: torch.dtype | None = None, format: str | None = None,
    out_scale: float | None = None, device: Device = "cpu",
) -> Inputs:  # fmt: skip
    """Of `quantized_linear`.

    of: the operands' format. scale: a per-tensor scale of x, instead of one per row and group.
    out_scale: a per-tensor scale of the result.
    """
    made = linear_inputs(M, S, K, N, bias, activation, residual, layer_scale, row_scale, device)

    def per_tensor(scale):
        return None if scale is None else torch.full((1, 1), scale, device=device)

    made["weight"] = quantize_reference(made["weight"], of)
    if scale is None:
        made["x"] = quantize_reference(made["x"], of, parts)
    else:
        made["x"] = quantize_statically_reference(made["x"], per_tensor(scale))
    if format is None:
        return made | {"dtype": dtype}
    return made | {"format": format, "out_scale": per_tensor(out_scale)}


def talking_heads_inputs(B: int, H: int, N: int, d: int, device: Device = "cpu") -> Inputs:
    """Of `talking_heads_attention`."""
    _seed()
    return {
        "qkv": torch.randn(B, N, 3, H, d, device=device),
        "proj_l_weight": torch.randn(H, H, device=device),
        "proj_l_bias": torch.randn(H, device=device),
        "proj_w_weight": torch.randn(H, H, device=device) / H**0.5,
        "proj_w_bias": torch.randn(H, device=device) / max(N, 1),
    }


def patch_embed_inputs(
    B: int, size: tuple[int, int], patch: tuple[int, int], C: int, D: int, T: int,
    prefix_pos: bool, uint8: bool = False, device: Device = "cpu",
) -> Inputs:  # fmt: skip
    """Of `patch_embed`: T prefix tokens, which have positions of their own with `prefix_pos`."""
    _seed()
    n = size[0] // patch[0] * (size[1] // patch[1])
    inputs: Inputs = {
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


def window_attention_inputs(
    B: int, Y: int, X: int, H: int, window: int, d: int = 32, device: Device = "cpu"
) -> Inputs:
    """Of `window_attention`: maps of Y x X tokens in square windows."""
    _seed()
    return {
        "qkv": torch.randn(B, Y, X, H, 3, d, device=device),
        "biases": torch.randn(H, window**2, device=device),
        "window": window,
    }
