"""GEMMs with their epilogues, the folding of LayerNorm into their weights, the fused MLP."""

from collections.abc import Iterator

from ..case import Case, capability, floats, integers, pointers, tile_name, type_names
from ..dtypes import BF16, FP16, FP32, ROWS, TOKENS, TRITON_TYPE
from ..kernel_modules import kernel_module

# name -> (activation, which optional pointers)
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
    "bias+residual, fp32 residual stream": ("none", ("b_ptr", "res_ptr")),  # under autocast
    "bias+scales+residual, z, fp32 residual stream": (
        "none",
        ("b_ptr", "res_ptr", "ls_ptr", "rs_ptr", "z_ptr"),
    ),
    "gelu_backward": ("gelu_backward", ("z_ptr", "a_ptr", "col_sums_ptr")),
}
# Every epilogue in the rule's configurations; these in the others, and the first three in fp16
HEAVIEST = (
    "folded+bias+gelu", "bias+residual+row_stats", "gelu_backward", "bias+scales+residual",
)  # fmt: skip
OPTIONAL = ("b_ptr", "res_ptr", "ls_ptr", "rs_ptr", "z_ptr", "a_ptr")
ROW_STATS = ("row_stats_ptr", "sums_ptr", "row_stats_out_ptr", "col_sums_ptr")


def _optional(present, dtype):
    found = {name: dtype if name in present else None for name in OPTIONAL}
    found |= {name: FP32 if name in present else None for name in ROW_STATS}
    if "sums_ptr" in present:
        found["b_ptr"] = FP32  # the folded bias
    return found


def epilogue(arch: int) -> Iterator[Case]:
    """The elementwise kernel that follows a GEMM of cuBLAS."""
    for name in ("bias+gelu, z", "bias+residual+row_stats", "bias+scales+residual"):
        activation, present = EPILOGUES[name]
        for dtype in (BF16, FP32):
            optional = _optional(present, dtype)
            N = 1536 if activation == "gelu" else 384
            tensors = 2 + (optional["res_ptr"] is not None)
            yield Case(
                op="linear", kernel="_linear_epilogue_kernel", arch=arch,
                label=f"after cuBLAS: {name}, {TRITON_TYPE[dtype]}",
                signature=pointers("xw_ptr y_ptr", dtype) | optional
                | integers("M N rows_per_sample"),
                constexprs={"ACTIVATION": activation},
                meta=kernel_module("linear").EPILOGUE_META,
                bytes=ROWS * N * dtype.itemsize * tensors,
            )  # fmt: skip


def backward(arch: int) -> Iterator[Case]:
    """The kernel from dy to dz where no GEMM computes dz in its epilogue."""
    N = 768
    for dy, dtype in ((BF16, BF16), (FP32, FP32), (FP32, BF16)):
        for name, activation, present in (
            ("sums", "none", ("db_ptr",)),
            ("gelu", "gelu", ("z_ptr", "dz_ptr", "a_ptr", "db_ptr")),
            ("scales", "none", ("z_ptr", "ls_ptr", "rs_ptr", "dz_ptr", "db_ptr", "dls_ptr")),
        ):
            optional = pointers("z_ptr dz_ptr a_ptr", dtype) | pointers("ls_ptr rs_ptr", dy)
            optional |= pointers("db_ptr dls_ptr", FP32)
            if dy != dtype:  # dz is dy rounded
                present = (*present, "dz_ptr")
            wide = [k for k in ("z_ptr", "dz_ptr", "a_ptr") if k in present]
            yield Case(
                op="linear", kernel="_linear_backward_kernel", arch=arch,
                label=f"backward: {name}, {type_names(dy, dtype)}",
                signature={"dy_ptr": dy} | {k: v for k, v in optional.items() if k in present}
                | integers("M N rows_per_sample"),
                constexprs={"ACTIVATION": activation, "EXACT": dtype == FP32},
                meta=kernel_module("linear").BACKWARD_META,
                bytes=ROWS * N * (dy.itemsize + len(wide) * dtype.itemsize),
            )  # fmt: skip


def forward(arch: int) -> Iterator[Case]:
    """Every configuration that a tuned table may name, with every epilogue that it may get."""
    module, chip = kernel_module("linear"), capability(arch)
    for dtype in (FP16, BF16, FP32):
        rule = module.configs(dtype, chip)[:3]
        ways = [(config, back) for back in (False, True)
                for config in module.configs(dtype, chip, back)]  # fmt: skip
        for config, back in ways:
            for name, (activation, _) in EPILOGUES.items():
                if back != (activation == "gelu_backward") or _never(name, config, dtype):
                    continue
                if config not in rule and name not in HEAVIEST:
                    continue  # fewer registers than these
                first = config in (rule[0], module.backward_config(rule[0]))
                if dtype == FP16 and not (first and name in HEAVIEST[:3]):
                    continue  # as bf16: enough of them to see that
                yield _gemm(arch, config, name, dtype)


def _width(config):
    return 384 if config["BLOCK_N"] % 128 == 0 else 192


def _never(name, config, dtype):
    """Whether no call asks for that epilogue in that configuration."""
    if "row_stats" in name and config["BLOCK_N"] < 64 or "scales" in name and _width(config) == 192:
        return True
    return dtype == FP32 and any(word in name for word in ("row_stats", "folded", "stream"))


def _gemm(arch, config, name, dtype):
    M, (activation, present) = ROWS, EPILOGUES[name]
    K = N = _width(config)
    signature = pointers("x_ptr w_ptr y_ptr", dtype)
    if config["TMA"]:
        signature |= {
            "x_ptr": (dtype, config["BLOCK_M"], config["BLOCK_K"]),
            "w_ptr": (dtype, config["BLOCK_N"], config["BLOCK_K"]),
        }
    signature |= _optional(present, dtype)
    if "stream" in name:
        stream = {"b_ptr", "res_ptr", "ls_ptr", "rs_ptr"} & set(present)
        signature |= dict.fromkeys(stream | {"y_ptr"}, FP32)
    tiles = {"y_ptr", "res_ptr", "z_ptr", "a_ptr"} & {"y_ptr", *present}
    return Case(
        op="linear", kernel="_linear_kernel", arch=arch,
        label=f"{name}, {tile_name(config)}, {TRITON_TYPE[dtype]}",
        signature=signature | integers("M N K rows_per_sample") | floats("eps"),
        constexprs={"ACTIVATION": activation, "EVEN_K": True, "PARTS": K // 64}, meta=config,
        bytes=(M * K + N * K) * dtype.itemsize
        + M * N * sum(signature[tile].itemsize for tile in tiles),
        flops=2 * M * N * K, asynchronous=dtype != FP32,
    )  # fmt: skip


def one_row(arch: int) -> Iterator[Case]:
    """M = 1: Triton makes a size of 1 a constant."""
    present = ("b_ptr", "res_ptr", "row_stats_ptr", "sums_ptr", "row_stats_out_ptr")
    config = kernel_module("linear").configs(BF16, capability(arch))[0]
    yield Case(
        op="linear", label="one row, everything, bf16", kernel="_linear_kernel", arch=arch,
        signature=pointers("x_ptr w_ptr y_ptr", BF16) | _optional(present, BF16)
        | integers("N K rows_per_sample") | floats("eps"),
        constexprs={"M": 1, "ACTIVATION": "gelu", "EVEN_K": True, "PARTS": 3, "EXACT": False},
        meta=config | {"TMA": False}, bytes=2 * 384 * 384, flops=2 * 384 * 384,
    )  # fmt: skip


def layer_norm_linear(arch: int) -> Iterator[Case]:
    """What folding costs beside the GEMM.

    The weights, and row statistics that no epilogue left.
    """
    dtype = BF16
    for D in (192, 384, 768):
        meta = kernel_module("layer_norm_linear").meta(D)
        yield Case(
            op="layer_norm_linear", kernel="_fold_layer_norm_kernel", arch=arch,
            label=f"fold, D = {D}, {TRITON_TYPE[dtype]}",
            signature=pointers("w_ptr b_ptr g_ptr h_ptr w_out_ptr", dtype)
            | pointers("b_out_ptr s_ptr", FP32) | integers("N K"),
            meta=meta, bytes=2 * 3 * D * D * dtype.itemsize,
        )  # fmt: skip
        yield Case(
            op="layer_norm_linear", kernel="_row_stats_kernel", arch=arch,
            label=f"row_stats, D = {D}, {TRITON_TYPE[dtype]}",
            signature={"x_ptr": dtype, "row_stats_ptr": FP32} | integers("M K"),
            meta=meta, bytes=ROWS * (D * dtype.itemsize + 8),
        )  # fmt: skip


def layer_norm_prologue(arch: int) -> Iterator[Case]:
    """LayerNorm in the prologue of the GEMM.

    Statistics from the rows or from the GEMM before.
    """
    for config in kernel_module("layer_norm_linear").configs(capability(arch)):
        for name, activation, row_stats in (
            ("bias", "none", None),
            ("bias+gelu", "gelu", None),
            ("bias, row_stats", "none", FP32),
            ("bias+gelu, row_stats", "gelu", FP32),
            ("bias, odd K", "none", None),
        ):
            for dtype in (BF16, FP16) if name == "bias+gelu" else (BF16,):
                yield _prologue(arch, config, name, activation, row_stats, dtype)


def _prologue(arch, config, name, activation, row_stats, dtype):
    M, K, N = TOKENS, 192, 576
    signature = pointers("x_ptr g_ptr h_ptr w_ptr b_ptr y_ptr", dtype)
    if config["TMA"]:
        signature["w_ptr"] = (dtype, config["BLOCK_N"], config["BLOCK_K"])
    return Case(
        op="layer_norm_linear", kernel="_layer_norm_linear_kernel", arch=arch,
        label=f"prologue: {name}, {tile_name(config)}, {TRITON_TYPE[dtype]}",
        signature=signature | {"row_stats_ptr": row_stats} | integers("M N K") | floats("eps"),
        constexprs={"ACTIVATION": activation, "EVEN_K": "odd" not in name, "PARTS": K // 64},
        meta=config, bytes=(M * K + N * K + M * N) * dtype.itemsize, flops=2 * M * N * K,
    )  # fmt: skip


def layer_norm_mlp(arch: int) -> Iterator[Case]:
    """LayerNorm, both GEMMs and GELU in one kernel."""
    module, M = kernel_module("layer_norm_mlp"), ROWS
    names = "x_ptr g_ptr h_ptr w1_ptr b1_ptr w2_ptr b2_ptr res_ptr y_ptr"
    for dtype in (FP16, BF16):
        for D, (D0, D1) in module.FUSED_D.items():
            for config in module.configs(capability(arch)):
                tile = f"{config['BLOCK_M']}x{config['BLOCK_H']} w{config['num_warps']}"
                yield Case(
                    op="layer_norm_mlp", kernel="_layer_norm_mlp_kernel", arch=arch,
                    label=f"fused, D = {D}, {tile} s{config['num_stages']}, {TRITON_TYPE[dtype]}",
                    signature=pointers(names, dtype) | {"row_stats_out_ptr": FP32}
                    | integers("M") | floats("eps"),
                    constexprs={"HIDDEN": 4 * D, "D0": D0, "D1": D1}, meta=config,
                    bytes=(3 * M * D + 8 * D * D) * dtype.itemsize, flops=2 * 2 * M * D * 4 * D,
                )  # fmt: skip
