"""Networks, and the arguments with which each calls an operation in one forward pass."""

from typing import Any, NamedTuple, TypeAlias

import torch

Arguments: TypeAlias = dict[str, Any]  # of `<op>_inputs`


class Network(NamedTuple):
    """A DeiT: D features, H heads, N tokens, image size in pixels."""

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
    """A TinyViT, by its stages."""

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


def _tiny_vit_cases(network: str, batch: int) -> dict[str, dict[str, Arguments]]:
    size, dims, heads, windows = TINY_VIT[network]
    first, second = ({"B": batch, "Y": size // s, "X": size // s} for s in (4, 8))
    C = dims[0]
    depthwise: Arguments = {"k": 3, "padding": 1}
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


def _quantized_gemms(rows: Arguments, D: int, H: int) -> dict[str, dict[str, Arguments]]:
    """The GEMMs of a block, by format.

    The outputs of attention and GELU have a static per-tensor scale in fp8; in int8 they have a
    per-group scale, for each row and head or 64 features.
    """
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


def deit_cases(op: str, network: str, batch: int) -> dict[str, Arguments]:
    """What one forward pass asks of an operation.

    Args:
        op: The operation.
        network: A key of `DEIT`; where DeiT has no such operation, its counterpart in `TINY_VIT`
            (or the CaiT as wide) is meant.
        batch: Images per batch.

    Returns:
        Label -> arguments of `<op>_inputs`.
    """
    tiny_vit = _tiny_vit_cases(network, batch)
    if op in tiny_vit:
        return tiny_vit[op]
    D, H, N, size = DEIT[network]
    rows = {"M": batch * N, "S": batch}
    image: Arguments = {
        "size": (size, size),
        "patch": (16, 16),
        "C": 3,
        "D": D,
        "T": 2,
        "prefix_pos": True,
    }
    quantized = _quantized_gemms(rows, D, H)
    cases: dict[str, dict[str, Arguments]] = {
        "layer_norm": {"": {"shape": (batch, N, D)}},
        "layer_norm_quantized": {of: {"shape": (batch, N, D), "format": of} for of in quantized},
        "quantize": {of: {"shape": (batch, N, D), "format": of} for of in quantized},
        "quantized_linear": {
            f"{of} {name}": {"of": of, **case}
            for of, gemms in quantized.items()
            for name, case in gemms.items()
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
        "sparse_cross_entropy": {  # of training from a soft-label store
            "K = 10": {"B": batch, "C": 1000, "K": 10},
            "21k, K = 100": {"B": batch, "C": 21841, "K": 100},
        },
    }
    return cases[op]
