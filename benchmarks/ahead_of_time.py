"""What the compiler makes of every shipped kernel configuration, for chips that are not here.

    python benchmarks/ahead_of_time.py                    a table
    python benchmarks/ahead_of_time.py --json --arch 90   one JSON object a line

Needs no GPU and no driver. Per configuration: registers and spills (ptxas -v), shared memory, CTAs
per multiprocessor, whether the matrix instructions are asynchronous, and the bytes and FLOPs of
one DeiT call at batch 256 that it serves. tests/benchmarks/test_ahead_of_time.py asserts on the same rows.
"""

import argparse
import importlib
import io
import json
import os
import pkgutil
import re
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from types import ModuleType, SimpleNamespace

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def _operation(name):
    """The module of an operation; of a package, one namespace of its submodules."""
    module = importlib.import_module(f"deit_fast.kernels.{name}")
    if not hasattr(module, "__path__"):
        return module
    parts = [
        importlib.import_module(f"{module.__name__}.{part.name}")
        for part in pkgutil.iter_modules(module.__path__)
    ]
    found = [pair for part in parts for pair in vars(part).items()]
    return SimpleNamespace(**{k: v for k, v in found if not isinstance(v, ModuleType)})


OPS = {  # the modules: the functions of the same names hide them as attributes of the package
    name: _operation(name)
    for name in (
        "layer_norm",
        "linear",
        "quantize",
        "quantized_linear",
        "layer_norm_linear",
        "layer_norm_mlp",
        "attention",
        "patch_embed",
        "classifier",
        "distillation_loss",
        "window_attention",
        "conv_norm",
        "sparse_cross_entropy",
        "talking_heads",
    )
}
BATCH, TOKENS = 256, 198
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
FP8, INT8 = torch.float8_e4m3fn, torch.int8
TRITON_TYPE = {FP32: "fp32", FP16: "fp16", BF16: "bf16", torch.uint8: "u8"}
TRITON_TYPE |= {torch.int32: "i32", torch.int64: "i64", FP8: "fp8e4nv", INT8: "i8"}
FORMAT = {FP8: "fp8", INT8: "int8"}
SHARED_MEMORY_LIMIT = {70: 98_304, 75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
THREADS_LIMIT = {70: 2048, 75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048}
ARCHS, DOT_ARCHS = (70, 80, 89, 90), (80, 90)
EIGHT_BITS = {80: (INT8,), 89: (FP8, INT8), 90: (FP8, INT8)}
PROCESSORS = {80: 108, 90: 132}
ALIGNED = ("N", "K", "D", "C")  # multiples of 16 in every DeiT


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration. `signature` maps the pointers to dtypes, tensor descriptors
    to (dtype, *block), and the integers and floats to "i32" and "fp32"; a pointer of None is an
    argument left out."""

    op: str
    label: str
    kernel: str
    arch: int
    signature: dict
    constexprs: dict
    meta: dict
    bytes: int  # that must move, once each
    flops: int
    asynchronous: bool  # the products must overlap their loads


@dataclass(frozen=True)
class Row:
    op: str
    label: str
    arch: int
    triton: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    ctas_per_sm: int
    wgmma: int  # asynchronous matrix instructions (sm_90)
    operands: tuple[str, ...]  # types that matrix instructions multiply, as PTX names them
    waits_for_all: int  # dots that wait for every outstanding one
    serialized: tuple[str, ...]  # ptxas C75xx
    asynchronous: bool
    megabytes: float
    gflop: float


def cases(archs):
    for arch in archs:
        for dtype in EIGHT_BITS.get(arch, ()):
            yield from _quantize(arch, dtype)
            yield from _layer_norm_quantized(arch, dtype)
            yield from _quantized_linear(arch, dtype)
            yield from _attention_quantized(arch, dtype)
        if arch == 89:
            continue  # all else is as on sm_80
        yield from _layer_norm(arch)
        yield from _distillation_loss(arch)
        yield from _sparse_cross_entropy(arch)
        yield from _layer_norm_backward(arch)
        yield from _epilogue(arch)
        yield from _linear_backward(arch)
        yield from _conv_norm(arch)
        if arch in DOT_ARCHS:
            yield from _linear(arch)
            yield from _one_row(arch)
            yield from _layer_norm_linear(arch)
            yield from _layer_norm_mlp(arch)
            yield from _attention(arch)
            yield from _attention_backward(arch)
            yield from _talking_heads(arch)
            yield from _patch_embed(arch)
            yield from _patch_embed_fold(arch)
            yield from _classifier(arch)
            yield from _window_attention(arch)


def _layer_norm(arch):
    for D in (192, 384, 768, OPS["layer_norm"].MAX_N):
        for dtype in (BF16, FP32):  # fp16 as bf16
            for residual in (False, True) if D == 768 else (True,):
                M = BATCH * TOKENS
                half = {"x_ptr": dtype, "w_ptr": dtype, "b_ptr": dtype, "y_ptr": dtype}
                extra = dict.fromkeys(("res_ptr", "h_ptr"), dtype if residual else None)
                sizes = {"M": "i32", "N": "i32", "eps": "fp32"}
                meta = OPS["layer_norm"].meta(D)
                moved = M * D * dtype.itemsize * (4 if residual else 2)
                label = f"{'add, ' if residual else ''}D = {D}, {TRITON_TYPE[dtype]}"
                yield Case(
                    "layer_norm", label, "_layer_norm_kernel", arch, half | extra | sizes, {}, meta,
                    moved, 0, False,
                )  # fmt: skip


def _quantize(arch, dtype):
    """Parts as a head or a tile of GELU's results has them, and whole rows."""
    for K, parts in ((768, 12), (OPS["quantize"].MAX_WIDTH, 1))[: 1 if arch == 89 else 2]:
        M = BATCH * TOKENS
        signature = {"x_ptr": BF16, "q_ptr": dtype, "scales_ptr": FP32, "M": "i32", "WIDTH": "i32"}
        constexprs = {"INT8": dtype == INT8} | ({"P": 1} if parts == 1 else {})
        yield Case(
            "quantize", f"{parts} x {K // parts}, {FORMAT[dtype]}", "_quantize_kernel", arch,
            signature | ({"P": "i32"} if parts > 1 else {}), constexprs,
            OPS["quantize"].meta(K // parts), M * (3 * K + 4 * parts), 0, False,
        )  # fmt: skip


def _layer_norm_quantized(arch, dtype):
    for D in (768,) if arch == 89 else (192, 768, OPS["layer_norm"].MAX_N):
        M = BATCH * TOKENS
        signature = dict.fromkeys(("x_ptr", "w_ptr", "b_ptr"), BF16) | {"y_ptr": dtype}
        signature |= {"scales_ptr": FP32, "M": "i32", "N": "i32", "eps": "fp32"}
        yield Case(
            "layer_norm", f"quantized, D = {D}, {FORMAT[dtype]}", "_layer_norm_kernel", arch,
            signature, {}, OPS["layer_norm"].meta(D), M * (3 * D + 4), 0, False,
        )  # fmt: skip


# name -> (features of x that share a scale: all of a row's, a part's, or every row's; activation;
# optional pointers; whether y is in eight bits)
QUANTIZED_EPILOGUES = {
    "bias": ("row", "none", ("b_ptr",), False),
    "bias+gelu+quantized": ("row", "gelu", ("b_ptr",), True),  # by one scale: fp8 only
    "bias+gelu+quantized+own_scales": ("row", "gelu", ("b_ptr",), True),
    "one scale, bias+residual": ("all", "none", ("b_ptr", "res_ptr"), False),  # fp8 only
    "parts+bias+residual": ("part", "none", ("b_ptr", "res_ptr"), False),
    "parts+bias+gelu+scales+residual, fp32": (
        "part", "gelu", ("b_ptr", "res_ptr", "ls_ptr", "rs_ptr"), False,
    ),
}  # fmt: skip
HEAVIEST_QUANTIZED = ("bias+gelu+quantized+own_scales", "parts+bias+gelu+scales+residual, fp32")


def _quantized_linear(arch, dtype):
    """Every configuration that a tuned table may name, with every epilogue that it may get; on
    sm_89, whose list is sm_80's, the heaviest. And one row of odd length: Triton makes a size of 1
    a constant."""
    module = OPS["quantized_linear"]
    chip = (arch // 10, arch % 10)
    M, D = BATCH * TOKENS, 384
    rule = module.configs(chip)[:3]
    for config in module.configs(chip) if arch != 89 else rule:
        for name, (shared, activation, present, quantized) in QUANTIZED_EPILOGUES.items():
            own_scales = "own_scales" in name
            static = quantized and not own_scales
            if (config not in rule or arch == 89) and name not in HEAVIEST_QUANTIZED:
                continue  # what takes fewer registers
            if dtype == INT8 and (static or shared == "all"):
                continue  # never asked of it
            shape = {"epilogue": name, "N": D}
            if module.why_not(shape, {"implementation": "triton", **config}, chip):
                continue
            around = FP32 if "fp32" in name else BF16
            K, N = {"bias": (D, 3 * D), "parts+bias+residual": (4 * D, D)}.get(name, (D, D))
            N = 4 * D if quantized else N
            meta = dict(config)
            parts = K // 64 if shared == "part" else 1
            if parts > 1:
                meta["BLOCK_K"] = module.block_k(config, 64)
            pointers = {"x_ptr": dtype, "w_ptr": dtype, "y_ptr": dtype if quantized else around}
            if meta["TMA"]:
                pointers |= {
                    "x_ptr": (dtype, meta["BLOCK_M"], meta["BLOCK_K"]),
                    "w_ptr": (dtype, meta["BLOCK_N"], meta["BLOCK_K"]),
                }
            scales = ("xs_ptr", "ws_ptr", "ys_ptr") if quantized else ("xs_ptr", "ws_ptr")
            pointers |= dict.fromkeys(scales, FP32) | dict.fromkeys(present, around)
            sizes = dict.fromkeys(("M", "N", "K", "rows_per_sample"), "i32")
            constexprs = {
                "ACTIVATION": activation, "EXACT": around == FP32, "GROUPS": parts,
                "PER_ROW": shared != "all", "OWN_SCALE": own_scales, "EVEN_K": True,
                "INT8": dtype == INT8,
            }  # fmt: skip
            width = 1 if quantized else around.itemsize * (1 + ("res_ptr" in present))
            yield Case(
                "quantized_linear", f"{name}, {_tile(config)}, {FORMAT[dtype]}",
                "_quantized_linear_kernel", arch, pointers | sizes, constexprs, meta,
                M * K + N * K + M * N * width + 4 * M * parts * (shared != "all"), 2 * M * N * K,
                True,
            )  # fmt: skip
            if config == rule[1] and name == HEAVIEST_QUANTIZED[0]:
                pointers = pointers | {"x_ptr": dtype, "w_ptr": dtype, "N": "i32", "K": "i32"}
                one_row = {"M": 1, "rows_per_sample": 1, "EVEN_K": False, "GROUPS": 3}
                yield Case(
                    "quantized_linear", f"one row, parts, {name}, {FORMAT[dtype]}",
                    "_quantized_linear_kernel", arch, pointers, constexprs | one_row,
                    meta | {"TMA": False, "BLOCK_K": 32}, N * 96, 2 * N * 96, False,
                )  # fmt: skip


def _distillation_loss(arch):
    """With both gradients, as in training; 21,841 classes make a loop over blocks."""
    for C, dtype, distillation, soft_target in (
        (1000, BF16, "none", False), (1000, BF16, "hard", False), (1000, FP32, "hard", False),
        (1000, BF16, "soft", True), (1000, FP32, "soft", True), (21_841, BF16, "soft", True),
    ):  # fmt: skip
        taught = distillation != "none"
        signature = {"z_ptr": dtype, "y_ptr": dtype if soft_target else torch.int64}
        signature |= dict.fromkeys(("d_ptr", "t_ptr"), dtype if taught else None)
        signature |= {"loss_ptr": FP32, "dz_ptr": FP32}
        signature |= {"dd_ptr": FP32 if taught else None}
        floats = ("smoothing", "z_scale", "t_scale", "d_scale", "inv_tau", "inv_B")
        signature |= dict.fromkeys(floats, "fp32")
        strides = {"Z_ROW": C, "D_ROW": C, "T_ROW": C, "Y_ROW": C if soft_target else 1}
        constexprs = {"C": C, **strides}
        constexprs |= {"SOFT_TARGET": soft_target, "DISTILLATION": distillation}
        read, written = 1 + 2 * taught + soft_target, 1 + taught
        moved = BATCH * C * (read * dtype.itemsize + written * 4)
        label = f"{distillation}, {'Mixup' if soft_target else 'labels'}, C = {C}"
        yield Case(
            "distillation_loss", f"{label}, {TRITON_TYPE[dtype]}", "_distillation_loss_kernel",
            arch, signature, constexprs, OPS["distillation_loss"].meta(C), moved, 0, False,
        )  # fmt: skip


def _sparse_cross_entropy(arch):
    """With the gradient, as in training; 21,841 classes make a loop over blocks, 1500 pairs too."""
    for C, K, dtype, indices, probs in (
        (1000, 10, BF16, torch.int64, FP16), (1000, 10, FP16, torch.int64, FP16),
        (1000, 10, FP32, torch.int64, FP16), (1000, 10, BF16, torch.int32, FP32),
        (21_841, 100, BF16, torch.int64, FP16), (21_841, 1500, BF16, torch.int64, FP16),
        (2048, 100, FP32, torch.int64, FP16),
    ):  # fmt: skip
        signature = {"z_ptr": dtype, "i_ptr": indices, "q_ptr": probs}
        signature |= {"loss_ptr": FP32, "dz_ptr": FP32, "inv_B": "fp32"}
        constexprs = {"C": C, "K": K, "Z_ROW": C, "I_ROW": K, "Q_ROW": K}
        moved = BATCH * (C * (dtype.itemsize + 4) + K * (indices.itemsize + probs.itemsize))
        types = ", ".join(TRITON_TYPE[kind] for kind in (dtype, indices, probs))
        yield Case(
            "sparse_cross_entropy", f"C = {C}, K = {K}, {types}", "_sparse_cross_entropy_kernel",
            arch, signature, constexprs, OPS["sparse_cross_entropy"].meta(C, K), moved, 0, False,
        )  # fmt: skip


def _layer_norm_backward(arch):
    """With the gradient that is added; fp32 beside half precision is a stream under autocast."""
    M = BATCH * TOKENS
    for D in (192, 384, 768, OPS["layer_norm"].MAX_N):
        for stream, dtype in ((BF16, BF16), (FP32, BF16)):
            signature = dict.fromkeys(("h_ptr", "dx_ptr", "w_ptr", "dh_ptr"), stream)
            signature |= {"dy_ptr": dtype, "sums_ptr": FP32, "M": "i32", "N": "i32", "eps": "fp32"}
            types = " and ".join(dict.fromkeys((TRITON_TYPE[stream], TRITON_TYPE[dtype])))
            yield Case(
                "layer_norm", f"backward, D = {D}, {types}", "_layer_norm_backward_kernel", arch,
                signature, {}, OPS["layer_norm"].meta(D),
                M * D * (3 * stream.itemsize + dtype.itemsize), 0, False,
            )  # fmt: skip


def _linear_backward(arch):
    """The pass from dy to dz where no product does it on the way."""
    M, N = BATCH * TOKENS, 768
    for dy, dtype in ((BF16, BF16), (FP32, FP32), (FP32, BF16)):
        for name, activation, present in (
            ("sums", "none", ("db_ptr",)),
            ("gelu", "gelu", ("z_ptr", "dz_ptr", "a_ptr", "db_ptr")),
            ("scales", "none", ("z_ptr", "ls_ptr", "rs_ptr", "dz_ptr", "db_ptr", "dls_ptr")),
        ):
            pointers = {"z_ptr": dtype, "dz_ptr": dtype, "a_ptr": dtype, "ls_ptr": dy, "rs_ptr": dy}
            pointers |= {"db_ptr": FP32, "dls_ptr": FP32}
            if dy != dtype:  # rounded on the way
                present = (*present, "dz_ptr")
            signature = {"dy_ptr": dy} | {k: v for k, v in pointers.items() if k in present}
            signature |= dict.fromkeys(("M", "N", "rows_per_sample"), "i32")
            wide = [k for k in ("z_ptr", "dz_ptr", "a_ptr") if k in present]
            types = " and ".join(dict.fromkeys((TRITON_TYPE[dy], TRITON_TYPE[dtype])))
            yield Case(
                "linear", f"backward: {name}, {types}", "_linear_backward_kernel", arch, signature,
                {"ACTIVATION": activation, "EXACT": dtype == FP32}, OPS["linear"].BACKWARD_META,
                M * N * (dy.itemsize + len(wide) * dtype.itemsize), 0, False,
            )  # fmt: skip


# name -> (activation, which optional pointers, fp32 pointers of the LayerNorm)
EPILOGUES = {
    "bias": ("none", ("b_ptr",)),
    "bias+gelu": ("gelu", ("b_ptr",)),
    "bias+residual": ("none", ("b_ptr", "res_ptr")),
    "bias+residual+row_stats": ("none", ("b_ptr", "res_ptr", "row_stats_out_ptr")),
    "folded+bias": ("none", ("b_ptr", "row_stats_ptr", "sums_ptr")),
    "folded+bias+gelu": ("gelu", ("b_ptr", "row_stats_ptr", "sums_ptr")),
    "bias+scales+residual": ("none", ("b_ptr", "res_ptr", "ls_ptr", "rs_ptr")),
    "bias+gelu_last+residual": ("gelu_last", ("b_ptr", "res_ptr")),  # of conv_norm
    "bias+gelu, z": ("gelu", ("b_ptr", "z_ptr")),  # in training
    "bias+scales+residual, z": ("none", ("b_ptr", "res_ptr", "ls_ptr", "rs_ptr", "z_ptr")),
    "bias+residual, fp32 stream": ("none", ("b_ptr", "res_ptr")),  # under autocast
    "bias+scales+residual, z, fp32 stream": (
        "none",
        ("b_ptr", "res_ptr", "ls_ptr", "rs_ptr", "z_ptr"),
    ),
    "gelu_backward": ("gelu_backward", ("z_ptr", "a_ptr", "col_sums_ptr")),
}
# Every epilogue in the rule's configurations; these in the others, and the first three in fp16.
HEAVIEST = (
    "folded+bias+gelu", "bias+residual+row_stats", "gelu_backward", "bias+scales+residual",
)  # fmt: skip
OPTIONAL = ("b_ptr", "res_ptr", "ls_ptr", "rs_ptr", "z_ptr", "a_ptr")
ROW_STATS = ("row_stats_ptr", "sums_ptr", "row_stats_out_ptr", "col_sums_ptr")


def _optional(present, dtype):
    pointers = {name: dtype if name in present else None for name in OPTIONAL}
    pointers |= {name: FP32 if name in present else None for name in ROW_STATS}
    if "sums_ptr" in present:
        pointers["b_ptr"] = FP32  # the folded bias
    return pointers


def _epilogue(arch):
    meta = OPS["linear"].EPILOGUE_META
    for name in ("bias+gelu, z", "bias+residual+row_stats", "bias+scales+residual"):
        activation, present = EPILOGUES[name]
        for dtype in (BF16, FP32):
            pointers = _optional(present, dtype)
            signature = {"xw_ptr": dtype, "y_ptr": dtype, "M": "i32", "N": "i32"}
            signature |= pointers | {"rows_per_sample": "i32"}
            N = 1536 if activation == "gelu" else 384
            passes = 2 + (pointers["res_ptr"] is not None)
            yield Case(
                "linear", f"behind cuBLAS: {name}, {TRITON_TYPE[dtype]}",
                "_linear_epilogue_kernel", arch, signature, {"ACTIVATION": activation}, meta,
                BATCH * TOKENS * N * dtype.itemsize * passes, 0, False,
            )  # fmt: skip


def _linear(arch):
    """Every configuration that a tuned table may name, with every epilogue that it may get."""
    chip = (arch // 10, arch % 10)
    M = BATCH * TOKENS
    for dtype in (FP16, BF16, FP32):
        rule = OPS["linear"].configs(dtype, chip)[:3]
        forward, backward = (OPS["linear"].configs(dtype, chip, back) for back in (False, True))
        for config, behind in [(c, False) for c in forward] + [(c, True) for c in backward]:
            K = N = 384 if config["BLOCK_N"] % 128 == 0 else 192
            for name, (activation, present) in EPILOGUES.items():
                if behind != (activation == "gelu_backward"):
                    continue
                if "row_stats" in name and config["BLOCK_N"] < 64 or "scales" in name and N == 192:
                    continue  # never asked of it
                if dtype == FP32 and any(w in name for w in ("row_stats", "folded", "stream")):
                    continue
                if config not in rule and name not in HEAVIEST:
                    continue  # what takes fewer registers
                ruled = config in (rule[0], OPS["linear"].backward_config(rule[0]))
                if dtype == FP16 and not (ruled and name in HEAVIEST[:3]):
                    continue  # as bf16: enough of them to see that
                pointers = {"x_ptr": dtype, "w_ptr": dtype, "y_ptr": dtype}
                if config["TMA"]:
                    pointers |= {
                        "x_ptr": (dtype, config["BLOCK_M"], config["BLOCK_K"]),
                        "w_ptr": (dtype, config["BLOCK_N"], config["BLOCK_K"]),
                    }
                pointers |= _optional(present, dtype)
                if "stream" in name:
                    stream = {"b_ptr", "res_ptr", "ls_ptr", "rs_ptr"} & set(present)
                    pointers |= dict.fromkeys(stream | {"y_ptr"}, FP32)
                sizes = dict.fromkeys(("M", "N", "K", "rows_per_sample"), "i32") | {"eps": "fp32"}
                constexprs = {"ACTIVATION": activation, "EVEN_K": True, "PARTS": K // 64}
                tiles = {"y_ptr", "res_ptr", "z_ptr", "a_ptr"} & {"y_ptr", *present}
                moved = (M * K + N * K) * dtype.itemsize
                moved += M * N * sum(pointers[name].itemsize for name in tiles)
                yield Case(
                    "linear", f"{name}, {_tile(config)}, {TRITON_TYPE[dtype]}", "_linear_kernel",
                    arch, pointers | sizes, constexprs, config, moved, 2 * M * N * K, dtype != FP32,
                )  # fmt: skip


def _one_row(arch):
    """Triton makes a size of 1 a constant."""
    config = OPS["linear"].configs(BF16, (arch // 10, arch % 10))[0]
    present = ("b_ptr", "res_ptr", "row_stats_ptr", "sums_ptr", "row_stats_out_ptr")
    signature = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), BF16) | _optional(present, BF16)
    signature |= dict.fromkeys(("N", "K", "rows_per_sample"), "i32") | {"eps": "fp32"}
    constexprs = {"M": 1, "ACTIVATION": "gelu", "EVEN_K": True, "PARTS": 3, "EXACT": False}
    yield Case(
        "linear", "one row, everything, bf16", "_linear_kernel", arch, signature,
        constexprs, config | {"TMA": False}, 2 * 384 * 384, 2 * 384 * 384, False,
    )  # fmt: skip


def _tile(config):
    """ "128x256x64 w8 s3 tma persistent"."""
    sizes = "x".join(str(config[f"BLOCK_{d}"]) for d in "MNK")
    kinds = [kind.lower() for kind in ("TMA", "PERSISTENT", "SPLIT") if config.get(kind)]
    return " ".join((sizes, f"w{config['num_warps']}", f"s{config['num_stages']}", *kinds))


def _layer_norm_linear(arch):
    """What the folding costs apart from the product: the weights, and row statistics from nowhere."""
    for D in (192, 384, 768):
        dtype = BF16
        meta = OPS["layer_norm_linear"].meta(D)
        names = ("w_ptr", "b_ptr", "g_ptr", "h_ptr", "w_out_ptr")
        signature = dict.fromkeys(names, dtype) | dict.fromkeys(("b_out_ptr", "s_ptr"), FP32)
        yield Case(
            "layer_norm_linear", f"fold, D = {D}, {TRITON_TYPE[dtype]}",
            "_fold_layer_norm_kernel", arch, signature | {"N": "i32", "K": "i32"}, {}, meta,
            2 * 3 * D * D * dtype.itemsize, 0, False,
        )  # fmt: skip
        signature = {"x_ptr": dtype, "row_stats_ptr": FP32, "M": "i32", "K": "i32"}
        yield Case(
            "layer_norm_linear", f"row_stats, D = {D}, {TRITON_TYPE[dtype]}", "_row_stats_kernel",
            arch, signature, {}, meta, BATCH * TOKENS * (D * dtype.itemsize + 8), 0, False,
        )  # fmt: skip


def _layer_norm_mlp(arch):
    names = "x_ptr g_ptr h_ptr w1_ptr b1_ptr w2_ptr b2_ptr res_ptr y_ptr".split()
    M = BATCH * TOKENS
    for dtype in (FP16, BF16):
        for D, (D0, D1) in OPS["layer_norm_mlp"].FUSED_D.items():
            for config in OPS["layer_norm_mlp"].configs((arch // 10, arch % 10)):
                signature = dict.fromkeys(names, dtype) | {"row_stats_out_ptr": FP32}
                signature |= {"M": "i32", "eps": "fp32"}
                tile = f"{config['BLOCK_M']}x{config['BLOCK_H']} w{config['num_warps']}"
                yield Case(
                    "layer_norm_mlp",
                    f"fused, D = {D}, {tile} s{config['num_stages']}, {TRITON_TYPE[dtype]}",
                    "_layer_norm_mlp_kernel", arch, signature,
                    {"HIDDEN": 4 * D, "D0": D0, "D1": D1}, config,
                    (3 * M * D + 8 * D * D) * dtype.itemsize, 2 * 2 * M * D * 4 * D, False,
                )  # fmt: skip


def _attention(arch):
    """Every configuration that a tuned table may name, for DeiT's shapes and a TinyViT window."""
    module, H = OPS["attention"], 6
    for dtype in (FP16, BF16, FP32):
        for N, L, d, bias in (
            (198, 198, 64, False), (578, 578, 64, False), (2, 198, 64, False), (49, 49, 32, True),
            (257, 257, 80, False), (197, 197, 48, False), (1, 197, 48, False),
        ):  # fmt: skip
            rule = module.meta(N, L, d, dtype, bias)
            ways = [(config, False) for config in module.configs(dtype, N, L, d, bias)]
            if dtype == FP16 and d != 64:
                continue  # as bf16
            trained = not bias and d in module.TRAINED_HEAD_DIMS and dtype != FP16
            ways += [(rule, True)] if trained else []
            for config, training in ways:  # which keeps the sums' logarithms
                if config != rule and (d != 64 or dtype == FP16):
                    continue
                signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), dtype)
                signature |= {"lse_ptr": FP32 if training else None}
                signature |= {"bias_ptr": dtype if bias else None}
                of = f"{', training' * training}, {TRITON_TYPE[dtype]}"
                yield _attention_case(
                    arch, config, (N, L, H, d), signature, of,
                    BATCH * H * d * 2 * (N + L) * dtype.itemsize,
                )  # fmt: skip


def _attention_case(arch, config, shape, signature, of, moved, per_head=False):
    N, L, H, d = shape
    module = OPS["attention"]
    strides = [f"{t}_{s}" for t in "qkv" for s in ("batch", "row", "head")]
    signature = signature | {"scale": "fp32"} | dict.fromkeys((*strides, "B", "N", "H"), "i32")
    kind, constexprs = "", {"L": L, "HEAD_DIM": d, "PER_HEAD": per_head}
    meta = {k: config[k] for k in ("BLOCK_M", "num_warps", "num_stages")}
    least = module.LEAST_KEYS[signature["q_ptr"].itemsize]
    if config["RESIDENT"]:
        kind = "resident_"
        meta |= zip(("KEYS_0", "KEYS_1", "KEYS_2"), module.pieces(L, least), strict=True)
    else:
        block = config["BLOCK_N"]
        meta |= {"BLOCK_N": block, "BLOCK_TAIL": module.tail(L, block, least)}
    sizes = f"{config['BLOCK_M']} w{config['num_warps']} s{config['num_stages']}"
    return Case(
        "attention", f"{kind[:-1]} N = {N}, L = {L}, {sizes}{of}".strip(),
        f"_attention_{kind}kernel", arch, signature, constexprs, meta, moved,
        4 * BATCH * H * N * L * d, False,
    )  # fmt: skip


def _attention_quantized(arch, dtype):
    """With the result in eight bits: by one scale in fp8, by row and head in int8, which takes more
    registers and so goes through all that a table may name for 198 tokens."""
    module, H, d = OPS["attention"], 6, 64
    for N, L in ((198, 198), (578, 578), (2, 198)):
        for config in module.configs(BF16, N, L, d):
            ruled = config == module.meta(N, L, d, BF16)
            if not ruled and (dtype == FP8 or arch == 89 or L != 198):
                continue
            if arch == 89 and N == 2:
                continue
            signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), BF16)
            signature |= {"o_ptr": dtype, "scales_ptr": FP32}
            yield _attention_case(
                arch, config, (N, L, H, d), signature, f", quantized, {FORMAT[dtype]}",
                BATCH * H * (d * (4 * L + 3 * N) + 4 * N), dtype == INT8,
            )  # fmt: skip
    if dtype == INT8:
        return
    # and with its operands so
    for N, L, d in ((198, 198, 64), (578, 578, 64), (2, 198, 64), (257, 257, 80), (50, 50, 32)):
        signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), dtype)
        signature |= dict.fromkeys(("scales_ptr", "in_scale_ptr"), FP32)
        yield _attention_case(
            arch, module.meta(N, L, d, dtype), (N, L, H, d), signature, f", d = {d}, all in fp8",
            BATCH * H * d * 2 * (N + L),
        )  # fmt: skip


def _attention_backward(arch):
    module, H = OPS["attention"], 6
    strides = [f"{t}_{s}" for t in "qkv" for s in ("batch", "row", "head")]
    for dtype in (BF16, FP32):
        for N, L, d in (
            (198, 198, 64), (578, 578, 64), (2, 198, 64), (49, 49, 32), (197, 197, 48),
            (1, 197, 48),
        ):  # fmt: skip
            names = "q_ptr k_ptr v_ptr o_ptr do_ptr dq_ptr dk_ptr dv_ptr".split()
            signature = dict.fromkeys(names, dtype) | {"lse_ptr": FP32, "scale": "fp32"}
            signature |= dict.fromkeys(("q_sums_ptr", "kv_sums_ptr"), FP32 if N == L else None)
            signature |= dict.fromkeys((*strides, "dq_row", "dk_row", "H"), "i32")
            yield Case(
                "attention", f"backward, N = {N}, L = {L}, d = {d}, {TRITON_TYPE[dtype]}",
                "_attention_backward_kernel", arch, signature, {"N": N, "L": L, "HEAD_DIM": d},
                module.meta_backward(N, L, dtype, (arch // 10, arch % 10)),
                BATCH * H * d * 4 * (N + L) * dtype.itemsize, 10 * BATCH * H * N * L * d, False,
            )  # fmt: skip


def _talking_heads(arch):
    """CaiT's head counts, in fp32 those that fit; fp32 weights, as under autocast."""
    module, N, d = OPS["talking_heads"], 196, 48
    for H, dtype in ((4, BF16), (6, BF16), (8, BF16), (16, BF16), (4, FP32), (8, FP32)):
        rows = BATCH * N * H * d * dtype.itemsize
        for name, config, moved, flops in zip(
            ("", "dq_", "dkv_"), module.configs(H, dtype), (4, 5, 6), (2, 3, 4), strict=True
        ):
            half = ("qkv_ptr", "o_ptr", "do_ptr", "dqkv_ptr")
            full = ("wl_ptr", "ww_ptr", "bw_ptr", "lse_ptr", "delta_ptr", "dwl_ptr", "dww_ptr")
            signature = dict.fromkeys(half, dtype) | dict.fromkeys(full, FP32)
            tile = f"{config['BLOCK_M']}x{config['BLOCK_N']} w{config['num_warps']}"
            label = f"{name.rstrip('_') or 'forward'}, H = {H}, {tile} s{config['num_stages']}"
            yield Case(
                "talking_heads", f"{label}, {TRITON_TYPE[dtype]}", f"_talking_heads_{name}kernel",
                arch, signature | {"N": "i32", "scale": "fp32"}, module.sizes(H, d), config,
                moved * rows, flops * 2 * BATCH * N * N * H * (d + H), False,
            )  # fmt: skip
    # Triton makes a size of 1 a constant
    signature = {"qkv_ptr": BF16, "wl_ptr": BF16, "ww_ptr": BF16, "o_ptr": BF16, "scale": "fp32"}
    yield Case(
        "talking_heads", "one token, no bias, bf16", "_talking_heads_kernel", arch, signature,
        {"N": 1} | module.sizes(4, d), module.configs(4, BF16)[0], 0, 0, False,
    )  # fmt: skip


def _patch_embed(arch):
    for dtype in (BF16, FP32):
        for D in (192, 384):
            for nhwc in (False, True):
                signature = dict.fromkeys(("w_ptr", "pos_ptr", "prefix_ptr", "y_ptr"), dtype)
                signature |= {"image_ptr": torch.uint8 if nhwc else dtype}
                signature |= {"b_ptr": FP32 if nhwc else dtype}
                signature |= dict.fromkeys(("B", "D", "GH", "GW"), "i32")
                constexprs = {"C": 3, "PH": 16, "PW": 16, "T": 2, "POS_T": 2, "NHWC": nhwc}
                pixels, out = BATCH * 224 * 224 * 3, BATCH * TOKENS * D
                label = f"D = {D}, {'uint8 NHWC' if nhwc else 'NCHW'}, {TRITON_TYPE[dtype]}"
                yield Case(
                    "patch_embed", label, "_patch_embed_kernel", arch, signature, constexprs,
                    OPS["patch_embed"].meta(D, dtype, nhwc),
                    pixels * (1 if nhwc else dtype.itemsize) + (out + 768 * D) * dtype.itemsize,
                    2 * BATCH * 196 * D * 768, dtype != FP32,
                )  # fmt: skip


def _patch_embed_fold(arch):
    dtype = BF16
    floats = [f"{name}_{c}" for name in ("mean", "std") for c in range(4)]
    signature = dict.fromkeys(("w_ptr", "b_ptr", "folded_ptr"), dtype)
    signature |= {"shift_ptr": FP32} | dict.fromkeys(floats, "fp32")
    yield Case(
        "patch_embed", f"fold, {TRITON_TYPE[dtype]}", "_fold_pixels_kernel", arch, signature,
        {"C": 3, "PIXELS": 256}, {"BLOCK": 256, "num_warps": 4},
        2 * 768 * 768 * dtype.itemsize, 0, False,
    )  # fmt: skip


def _classifier(arch):
    for dtype in (BF16, FP32):
        for D, fusion in ((192, "joint"), (768, "joint"), (768, "joint_softmax")):
            separate = fusion == "joint_softmax"
            names = ("x_ptr", "nw_ptr", "nb_ptr", "w0_ptr", "b0_ptr", "w1_ptr", "b1_ptr")
            signature = dict.fromkeys(names, dtype) | {"y_ptr": FP32 if separate else dtype}
            signature |= {"B": "i32", "C": "i32", "x_batch": "i32", "eps": "fp32", "factor": "fp32"}
            constexprs = {"D": D, "FIRST": 0, "LAST": 2, "SEPARATE": separate}
            yield Case(
                "classifier", f"D = {D}, {fusion}, {TRITON_TYPE[dtype]}",
                "_classifier_kernel", arch, signature, constexprs, OPS["classifier"].meta(dtype),
                (2 * BATCH * D + 2 * 1000 * D + 1000 * BATCH) * dtype.itemsize,
                4 * BATCH * 1000 * D, False,
            )  # fmt: skip


def _conv_norm(arch):
    """TinyViT-11M's depthwise convolutions, and the folding of a norm into the other weights."""
    module = OPS["conv_norm"]
    norm = ("w_ptr", "weight_ptr", "bias_ptr", "mean_ptr", "var_ptr")
    for dtype in (BF16, FP32):
        for C, side, stride, residual in (
            (256, 56, 1, False),
            (128, 56, 2, False),
            (128, 28, 1, True),
        ):
            pointers = dict.fromkeys((*norm, "x_ptr", "y_ptr"), dtype)
            pointers |= {"res_ptr": dtype if residual else None}
            sizes = dict.fromkeys(("C", "Y", "X", "Y_OUT", "X_OUT"), "i32") | {"eps": "fp32"}
            constexprs = {"STRIDE": stride, "GELU": True, "EXACT": dtype == FP32}
            outputs = BATCH * C * (side // stride) ** 2
            moved = (BATCH * C * side**2 + outputs * (1 + residual)) * dtype.itemsize
            yield Case(
                "conv_norm", f"depthwise, C = {C}, stride {stride}, {TRITON_TYPE[dtype]}",
                "_depthwise_conv_kernel", arch, pointers | sizes, constexprs, module.DEPTHWISE_META,
                moved, 18 * outputs, False,
            )  # fmt: skip
        pointers = dict.fromkeys((*norm, "folded_ptr"), dtype) | {"shift_ptr": FP32}
        yield Case(
            "conv_norm", f"fold, {TRITON_TYPE[dtype]}", "_fold_batch_norm_kernel", arch,
            pointers | {"K": "i32", "eps": "fp32"}, {}, module.FOLD_META,
            2 * 256 * 1024 * dtype.itemsize, 0, False,
        )  # fmt: skip


def _window_attention(arch):
    """TinyViT-11M's second and third stage at 224 pixels, its third at 384; both passes."""
    module = OPS["window_attention"]
    for dtype in (FP16, BF16, FP32):
        for side, window, H in ((28, 7, 4), (14, 14, 8), (24, 24, 8)):
            if dtype != BF16 and window != 14:
                continue
            L, tokens, d = window**2, BATCH * side**2, module.HEAD_DIM
            saved = dict.fromkeys(("qkv_ptr", "o_ptr", "do_ptr", "dqkv_ptr"), dtype)
            # autocast leaves the biases in fp32
            biases = FP32 if window == 24 else dtype
            saved |= {"bias_ptr": biases, "lse_ptr": FP32, "scale": "fp32"}
            saved |= dict.fromkeys(("Y", "X", "H", "windows", "chunks"), "i32") | {"ds_ptr": FP32}
            constexprs = {"WINDOW": window, "HEAD_DIM": d}
            flops, row = 4 * tokens * L * H * d, tokens * H * d * dtype.itemsize
            of = f"{side} x {side} in {window}, {TRITON_TYPE[dtype]}"
            forward, capability = module.meta(dtype), (arch // 10, arch % 10)
            backward, scores = (module.meta_backward(dtype, capability, s) for s in (False, True))
            for label, kernel, left_out, config, moved, work in (
                ("", "", {"lse_ptr": None}, forward, 4 * row, flops),
                ("training, ", "", {}, forward, 4 * row, flops),
                ("backward, ", "backward_", {}, backward, 8 * row, flops * 5 // 2),
                ("scores, ", "scores_", {}, scores, 5 * row, flops),
            ):  # fmt: skip
                yield Case(
                    "window_attention", label + of, f"_window_attention_{kernel}kernel", arch,
                    saved | left_out, constexprs, config, moved, work, False,
                )  # fmt: skip
            if dtype == BF16:
                yield Case(
                    "window_attention", f"biases, {window}", "_window_attention_biases_kernel",
                    arch, {"ds_ptr": FP32, "dbias_ptr": FP32}, {"WINDOW": window},
                    module.BIASES_META, 4 * H * L * L, 0, False,
                )  # fmt: skip


def compile_case(case: Case) -> Row:
    kernel = getattr(OPS[case.op], case.kernel)
    meta = dict(case.meta)
    options = {k: meta.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in meta}
    constexprs = case.constexprs | meta
    signature = {}
    for name in kernel.arg_names:
        kind = case.signature.get(name)
        if kind is None:
            signature[name] = "constexpr"
            if name not in constexprs:
                constexprs[name] = None  # an optional pointer left out
        elif isinstance(kind, tuple):  # a tensor descriptor of a block
            dtype, *block = kind
            signature[name] = f"tensordesc<{TRITON_TYPE[dtype]}{block}>".replace(" ", "")
        else:
            signature[name] = kind if isinstance(kind, str) else f"*{TRITON_TYPE[kind]}"
    # torch's pointers, and the sizes of these shapes, are multiples of 16
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*")
        or kind == "i32"
        and (name in ALIGNED or name.endswith(("_batch", "_row", "_head")))
        and (case.op, name) not in (("attention", "N"), ("talking_heads", "N"))
    }  # fmt: skip
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=aligned)
    said = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(said):
        knobs.compilation.always_compile = True  # a cached kernel has no log
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    log = said.getvalue()
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    shared, threads = compiled.metadata.shared, 32 * compiled.metadata.num_warps
    limit = SHARED_MEMORY_LIMIT[case.arch]
    ctas = min(65_536 // (registers * threads), limit // max(shared, 1), 32)
    ctas = 0 if shared > limit else min(ctas, THREADS_LIMIT[case.arch] // threads)
    ttgir = compiled.asm["ttgir"]
    return Row(
        case.op, case.label, case.arch, triton.__version__, registers,
        sum(map(int, re.findall(r"(\d+) bytes spill", log))), shared, ctas,
        compiled.asm["ptx"].count("wgmma.mma_async"),
        tuple(sorted(set(re.findall(r"mma\S*\.sync\.\S*?\.(\w+)\.\1\b", compiled.asm["ptx"])))),
        len(re.findall(r"warp_group_dot_wait.*pendings = 0", ttgir)),
        tuple(sorted(set(re.findall(r"C75\d\d", log)))),
        case.asynchronous, case.bytes / 1e6, case.flops / 1e9,
    )  # fmt: skip


def rows(archs, ops=None, every=1, in_turn=False):
    """every: that many cases of a kernel on a chip in turn are represented by the first; in_turn:
    a kernel is compiled for one chip only, the next kernel for the next chip."""
    wanted, seen = [], Counter()
    for case in cases(archs):
        kind = case.kernel, case.arch
        if (not ops or case.op in ops) and seen[kind] % every == 0:
            wanted.append(case)
        seen[kind] += 1
    if in_turn:
        chips = {kernel: sorted({arch for k, arch in seen if k == kernel}) for kernel, _ in seen}
        turns = {kernel: chips[kernel][i % len(chips[kernel])] for i, kernel in enumerate(chips)}
        wanted = [case for case in wanted if case.arch == turns[case.kernel]]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(compile_case, wanted, chunksize=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=ARCHS, choices=sorted(SHARED_MEMORY_LIMIT)
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail where something is spilled, serialised or too large for the chip",
    )
    parser.add_argument("--op", nargs="+", choices=OPS, help="only these operations")
    parser.add_argument("--every", type=int, default=1, help="so many of a kernel's cases as one")
    parser.add_argument("--in-turn", action="store_true", help="each kernel for one of the chips")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    heading = "sm op configuration regs spill smem CTAs wgmma waits MB GFLOP".split()
    line = "{:>3} {:<16} {:<66} {:>4} {:>5} {:>7} {:>4} {:>5} {:>5} {:>7} {:>7}"
    if not args.json:
        print(f"triton {triton.__version__}; MB and GFLOP of one call at batch {BATCH}")
        print(line.format(*heading))
    bad = 0
    for row in rows(args.arch, args.op, args.every, args.in_turn):
        bad += bool(row.spill_bytes or row.serialized or row.ctas_per_sm < 1)
        if args.json:
            print(json.dumps(asdict(row)), flush=True)
            continue
        waits = f"{row.waits_for_all}{'!' if row.serialized else ''}"
        print(line.format(
            row.arch, row.op, row.label, row.registers, row.spill_bytes, row.shared_bytes,
            row.ctas_per_sm, row.wgmma, waits, f"{row.megabytes:.1f}", f"{row.gflop:.1f}",
        ), flush=True)  # fmt: skip
    if args.check and bad:
        raise SystemExit(f"{bad} configurations spill, serialise or do not fit")


if __name__ == "__main__":
    main()
