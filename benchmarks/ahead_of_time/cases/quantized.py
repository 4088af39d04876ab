"""Quantization, LayerNorm with a quantized result, and the FP8 and INT8 GEMMs."""

from collections.abc import Iterator

import torch

from ..case import Case, capability, floats, integers, pointers, tile_name
from ..dtypes import BF16, FORMAT, FP32, INT8, ROWS
from ..kernel_modules import kernel_module

# name -> (granularity of x's scales; activation; optional pointers; whether y is quantized). The
# names are the epilogues of tuned tables, where those have one
EPILOGUES = {
    "bias": ("row", "none", ("b_ptr",), False),
    "bias+gelu+quantized": ("row", "gelu", ("b_ptr",), True),  # static scale: fp8 only
    "bias+gelu+quantized+own_scales": ("row", "gelu", ("b_ptr",), True),
    "per-tensor, bias+residual": ("tensor", "none", ("b_ptr", "res_ptr"), False),  # fp8 only
    "parts+bias+residual": ("group", "none", ("b_ptr", "res_ptr"), False),
    "parts+bias+gelu+scales+residual, fp32": (
        "group", "gelu", ("b_ptr", "res_ptr", "ls_ptr", "rs_ptr"), False,
    ),
}  # fmt: skip
HEAVIEST = ("bias+gelu+quantized+own_scales", "parts+bias+gelu+scales+residual, fp32")
GROUP = 64  # features that share a per-group scale


def quantize(arch: int, dtype: torch.dtype) -> Iterator[Case]:
    """Per-group scales, a group for each head or tile of GELU's result, and per-row scales."""
    module = kernel_module("quantize")
    for K, groups in ((768, 12), (module.MAX_WIDTH, 1))[: 1 if arch == 89 else 2]:
        signature = {"x_ptr": BF16, "q_ptr": dtype, "scales_ptr": FP32} | integers("M WIDTH")
        constexprs = {"INT8": dtype == INT8}
        yield Case(
            op="quantize", kernel="_quantize_kernel", arch=arch,
            label=f"{groups} x {K // groups}, {FORMAT[dtype]}",
            signature=signature | (integers("P") if groups > 1 else {}),
            constexprs=constexprs | ({"P": 1} if groups == 1 else {}),
            meta=module.meta(K // groups), bytes=ROWS * (3 * K + 4 * groups),
        )  # fmt: skip


def layer_norm(arch: int, dtype: torch.dtype) -> Iterator[Case]:
    """LayerNorm that quantizes its result with per-row scales."""
    module = kernel_module("layer_norm")
    for D in (768,) if arch == 89 else (192, 768, module.MAX_N):
        yield Case(
            op="layer_norm", kernel="_layer_norm_kernel", arch=arch,
            label=f"quantized, D = {D}, {FORMAT[dtype]}",
            signature=pointers("x_ptr w_ptr b_ptr", BF16) | {"y_ptr": dtype, "scales_ptr": FP32}
            | integers("M N") | floats("eps"),
            meta=module.meta(D), bytes=ROWS * (3 * D + 4),
        )  # fmt: skip


def quantized_linear(arch: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every configuration that a tuned table may name, with every epilogue that it may get.

    On sm_89, whose list is sm_80's, the heaviest. And one row of odd length: Triton makes a size of
    1 a constant.
    """
    module, chip = kernel_module("quantized_linear"), capability(arch)
    rule = module.configs(chip)[:3]
    for config in module.configs(chip) if arch != 89 else rule:
        for name in EPILOGUES:
            if (config not in rule or arch == 89) and name not in HEAVIEST:
                continue  # fewer registers than these
            if dtype == INT8 and name in ("bias+gelu+quantized", "per-tensor, bias+residual"):
                continue  # static scales are fp8's
            shape = {"epilogue": name, "N": 384}
            if module.why_not(shape, {"implementation": "triton", **config}, chip):
                continue
            case = _gemm(arch, dtype, config, name)
            yield case
            if config == rule[1] and name == HEAVIEST[0]:
                yield _one_row(case, name, dtype)


def _gemm(arch, dtype, config, name):
    granularity, activation, present, quantized = EPILOGUES[name]
    dtype_around = FP32 if "fp32" in name else BF16
    M, D = ROWS, 384
    K, N = {"bias": (D, 3 * D), "parts+bias+residual": (4 * D, D)}.get(name, (D, D))
    N = 4 * D if quantized else N
    groups, meta = 1, dict(config)
    if granularity == "group":
        groups = K // GROUP
        meta["BLOCK_K"] = kernel_module("quantized_linear").block_k(config, GROUP)
    signature = {"x_ptr": dtype, "w_ptr": dtype, "y_ptr": dtype if quantized else dtype_around}
    if meta["TMA"]:
        signature |= {
            "x_ptr": (dtype, meta["BLOCK_M"], meta["BLOCK_K"]),
            "w_ptr": (dtype, meta["BLOCK_N"], meta["BLOCK_K"]),
        }
    signature |= pointers("xs_ptr ws_ptr" + " ys_ptr" * quantized, FP32)
    signature |= dict.fromkeys(present, dtype_around)
    width = 1 if quantized else dtype_around.itemsize * (1 + ("res_ptr" in present))
    scales = 4 * M * groups * (granularity != "tensor")
    return Case(
        op="quantized_linear", kernel="_quantized_linear_kernel", arch=arch,
        label=f"{name}, {tile_name(config)}, {FORMAT[dtype]}",
        signature=signature | integers("M N K rows_per_sample"),
        constexprs={
            "ACTIVATION": activation, "EXACT": dtype_around == FP32, "GROUPS": groups,
            "PER_ROW": granularity != "tensor", "OWN_SCALE": "own_scales" in name, "EVEN_K": True,
            "INT8": dtype == INT8,
        },
        meta=meta, bytes=M * K + N * K + M * N * width + scales, flops=2 * M * N * K,
        asynchronous=True,
    )  # fmt: skip


def _one_row(case, name, dtype):
    """The same with per-group scales, 96 features and without tensor descriptors."""
    N = 4 * 384
    sizes = ("M", "rows_per_sample")
    signature = {k: v for k, v in case.signature.items() if k not in sizes}
    return Case(
        op=case.op, kernel=case.kernel, arch=case.arch,
        label=f"one row, parts, {name}, {FORMAT[dtype]}",
        signature=signature | {"x_ptr": dtype, "w_ptr": dtype},
        constexprs=case.constexprs | dict.fromkeys(sizes, 1) | {"EVEN_K": False, "GROUPS": 3},
        meta=case.meta | {"TMA": False, "BLOCK_K": 32}, bytes=N * 96, flops=2 * N * 96,
    )  # fmt: skip
