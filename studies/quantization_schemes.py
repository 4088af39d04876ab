"""Quantization simulated in plain PyTorch: other scales, and attention's own matmuls in FP8."""

import copy
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

import deit_fast
from deit_fast.kernels.quantize import (
    FORMATS,
    LIMITS,
    dequantize,
    quantize_reference,
    round_reference,
)
from deit_fast.kernels.quantized_linear import GROUP_SIZE
from deit_fast.quantization_report import compare

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SCHEMES = {  # scales of the outputs of attention and GELU
    "row": "per-row", "group": "per-group: each row and head, or 64 features",
    "calibrated": "per-tensor, calibrated", "bound": "per-tensor, bound-derived",
}  # fmt: skip
ATTENTION = {  # which matmuls read e4m3, with which scales
    "q k^T, per-row and head": ("qk", "row"),
    "p v, v per-head": ("pv", "head"),
    "both": ("qkpv", "row"), "both, q and k per-head": ("qkpv", "head"),
}  # fmt: skip


class Subject(NamedTuple):
    """A model, the images it is judged by, and those its scales are calibrated on.

    labels: of the images, or None. compared: how many images the simulated models are compared on.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor | None
    compared: int
    calibration: Tensor

    def batches(self, count=None):
        images = self.images[:count].split(50)
        if self.labels is None:
            return images
        return zip(images, self.labels[:count].split(50), strict=True)


class CachedOutputs(nn.Module):
    """A model that runs once for each batch of the same tensor."""

    def __init__(self, model):
        super().__init__()
        self.model, self.outputs = model, {}

    def forward(self, x):
        key = x.data_ptr()
        if key not in self.outputs:
            self.outputs[key] = self.model(x)
        return self.outputs[key]


def scales(subject: Subject) -> list[dict]:
    """Attention's and GELU's outputs by each scheme, weights and LayerNorm's output as served."""
    restored = deit_fast.restore(copy.deepcopy(subject.model))
    reference, rows = CachedOutputs(restored).eval(), []
    for format in FORMATS:
        for scheme in SCHEMES:
            model = simulated(subject, format, scheme)
            found = compare(reference, model, subject.batches(subject.compared))
            rows.append({"format": format, "scheme": scheme, "comparison": asdict(found)})
    return rows


def simulated(subject, format, scheme):
    """timm's model with weights and activations quantized and dequantized, multiplied in fp32."""
    model = deit_fast.restore(copy.deepcopy(subject.model))
    ranges = None
    if scheme in ("calibrated", "bound"):  # as of the fp8 that is served
        ours = copy.deepcopy(subject.model)
        calibration = subject.calibration if scheme == "calibrated" else None
        deit_fast.quantize(ours, "fp8", calibration)
        ranges = {n: m.input_scale for n, m in ours.named_modules() if hasattr(m, "input_scale")}
    for name, module in model.named_modules():
        if not name.endswith(LAYERS):
            continue
        module.weight.data = rounded(module.weight.data, format)
        scale, groups = None, 1
        if name.endswith(("attn.proj", "mlp.fc2")):
            if ranges is not None:
                scale = ranges[name] * LIMITS[torch.float8_e4m3fn] / LIMITS[FORMATS[format]]
            elif scheme == "group":
                heads = model.blocks[0].attn.num_heads
                groups = heads if name.endswith("proj") else module.in_features // GROUP_SIZE

        def hook(module, args, scale=scale, groups=groups):
            if scale is None:
                return rounded(args[0], format, groups)
            return round_reference(args[0] / scale, FORMATS[format]).float() * scale

        module.register_forward_pre_hook(hook)
    return model


def rounded(x: Tensor, format: str = "fp8", groups: int = 1) -> Tensor:
    return dequantize(quantize_reference(x, format, groups))


def attention(subject: Subject) -> list[dict]:
    """q, k, p and v in e4m3 as well, the rest in fp32; and in the fp8 that is served."""
    restored = deit_fast.restore(copy.deepcopy(subject.model))
    reference, rows = CachedOutputs(restored).eval(), []
    plain = {name: (copy.deepcopy(restored), how) for name, how in ATTENTION.items()}
    matmuls = simulated(subject, "fp8", "bound")
    plain["the four matmuls of the block"] = copy.deepcopy(matmuls), ("", "")
    plain["the four matmuls, and both"] = matmuls, ATTENTION["both"]
    for name, (model, (which, how)) in plain.items():
        for block in model.blocks:
            round_attention(block.attn, which, how)
        found = compare(reference, model, subject.batches(subject.compared))
        rows.append({"name": name, "comparison": asdict(found)})
    served = copy.deepcopy(subject.model)
    deit_fast.quantize(served, "fp8", attention=True)
    found = compare(reference, served, subject.batches(subject.compared))
    rows.append(
        {"name": "as served: attention=True, bound-derived scales", "comparison": asdict(found)}
    )
    return rows


def round_attention(attn, which, how):
    """Round q, k, p and v to e4m3.

    p has per-row scales, which is as if the largest probability were 1. v's rows are summed over,
    so its scales can't be per-row.
    """

    def round_qkv(module, args, y):
        q, k, v = y.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # (B, N, H, d)
        if "qk" in which:
            q, k = (rounded(t) if how == "row" else _by_head(t) for t in (q, k))
        if "pv" in which:
            v = _by_head(v)
        return torch.stack((q, k, v), 2).flatten(2)

    attn.qkv.register_forward_hook(round_qkv)
    if "pv" in which:
        attn.fused_attn = False
        attn.attn_drop = _Rounded()


class _Rounded(nn.Module):
    def forward(self, p):
        return rounded(p)


def _by_head(t):
    """(B, N, H, d), with one scale for each image and head."""
    rows = t.transpose(1, 2)
    return rounded(rows.flatten(2)).view(rows.shape).transpose(1, 2)
