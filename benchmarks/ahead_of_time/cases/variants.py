"""Attention of DeiT's relatives, forward and backward: CaiT's talking heads, TinyViT's windows."""

from collections.abc import Iterator

from ..case import Case, capability, floats, integers, pointers
from ..dtypes import BATCH, BF16, FP16, FP32, TRITON_TYPE
from ..kernel_modules import kernel_module


def talking_heads(arch: int) -> Iterator[Case]:
    """CaiT's head counts, in fp32 those that fit; fp32 weights, as under autocast."""
    module, N, d = kernel_module("talking_heads"), 196, 48
    for H, dtype in ((4, BF16), (6, BF16), (8, BF16), (16, BF16), (4, FP32), (8, FP32)):
        rows = BATCH * N * H * d * dtype.itemsize
        signature = pointers("qkv_ptr o_ptr do_ptr dqkv_ptr", dtype) | floats("scale")
        signature |= pointers(
            "wl_ptr ww_ptr bw_ptr lse_ptr delta_ptr dwl_ptr dww_ptr", FP32
        ) | integers("N")
        for name, config, moved, flops in zip(
            ("", "dq_", "dkv_"), module.configs(H, dtype), (4, 5, 6), (2, 3, 4), strict=True
        ):
            tile = f"{config['BLOCK_M']}x{config['BLOCK_N']} w{config['num_warps']}"
            label = f"{name.rstrip('_') or 'forward'}, H = {H}, {tile} s{config['num_stages']}"
            yield Case(
                op="talking_heads", kernel=f"_talking_heads_{name}kernel", arch=arch,
                label=f"{label}, {TRITON_TYPE[dtype]}", signature=signature,
                constexprs=module.sizes(H, d), meta=config, bytes=moved * rows,
                flops=flops * 2 * BATCH * N * N * H * (d + H),
            )  # fmt: skip
    yield Case(  # Triton makes a size of 1 a constant
        op="talking_heads", label="one token, no bias, bf16", kernel="_talking_heads_kernel",
        arch=arch, signature=pointers("qkv_ptr wl_ptr ww_ptr o_ptr", BF16) | floats("scale"),
        constexprs={"N": 1} | module.sizes(4, d), meta=module.configs(4, BF16)[0], bytes=0,
    )  # fmt: skip


def window_attention(arch: int) -> Iterator[Case]:
    """TinyViT-11M's second and third stage at 224 pixels, its third at 384."""
    module = kernel_module("window_attention")
    for dtype in (FP16, BF16, FP32):
        for side, window, H in ((28, 7, 4), (14, 14, 8), (24, 24, 8)):
            if dtype != BF16 and window != 14:
                continue
            yield from _windows(module, arch, dtype, side, window, H)
            if dtype == BF16:
                yield Case(
                    op="window_attention", label=f"biases, {window}",
                    kernel="_window_attention_biases_kernel", arch=arch,
                    signature=pointers("ds_ptr dbias_ptr", FP32), constexprs={"WINDOW": window},
                    meta=module.BIASES_META, bytes=4 * H * window**4,
                )  # fmt: skip


def _windows(module, arch, dtype, side, window, H):
    tokens, d = BATCH * side**2, module.HEAD_DIM
    flops, row = 4 * tokens * window**2 * H * d, tokens * H * d * dtype.itemsize
    # autocast leaves the biases in fp32
    signature = pointers("qkv_ptr o_ptr do_ptr dqkv_ptr", dtype) | pointers("lse_ptr ds_ptr", FP32)
    signature |= {"bias_ptr": FP32 if window == 24 else dtype}
    signature |= floats("scale") | integers("Y X H windows chunks")
    forward, chip = module.meta(dtype), capability(arch)
    backward, scores = (module.meta_backward(dtype, chip, s) for s in (False, True))
    for label, kernel, left_out, config, moved, work in (
        ("", "", {"lse_ptr": None}, forward, 4 * row, flops),
        ("training, ", "", {}, forward, 4 * row, flops),
        ("backward, ", "backward_", {}, backward, 8 * row, flops * 5 // 2),
        ("scores, ", "scores_", {}, scores, 5 * row, flops),
    ):
        yield Case(
            op="window_attention", kernel=f"_window_attention_{kernel}kernel", arch=arch,
            label=f"{label}{side} x {side} in {window}, {TRITON_TYPE[dtype]}",
            signature=signature | left_out, constexprs={"WINDOW": window, "HEAD_DIM": d},
            meta=config, bytes=moved, flops=work,
        )  # fmt: skip
