"""Attention, with a quantized result, and its backward pass."""

from collections.abc import Iterator

import torch

from ..case import Case, capability, floats, integers, pointers
from ..dtypes import BATCH, BF16, FORMAT, FP8, FP16, FP32, INT8, TRITON_TYPE
from ..kernel_modules import kernel_module

HEADS = 6
STRIDES = " ".join(f"{t}_{s}" for t in "qkv" for s in ("batch", "row", "head"))
# N queries, L keys, d features of a head, whether scores have a bias: DeiT's shapes and a window of
# TinyViT
SHAPES = (
    (198, 198, 64, False), (578, 578, 64, False), (2, 198, 64, False), (49, 49, 32, True),
    (257, 257, 80, False), (197, 197, 48, False), (1, 197, 48, False),
)  # fmt: skip


def forward(arch: int) -> Iterator[Case]:
    """Every configuration that a tuned table may name, and the rule's in training.

    In training the log-sum-exp of each row is written too.
    """
    module, H = kernel_module("attention"), HEADS
    for dtype in (FP16, BF16, FP32):
        for N, L, d, bias in SHAPES:
            if dtype == FP16 and d != 64:
                continue  # as bf16
            rule = module.meta(N, L, d, dtype, bias)
            ways = [(config, False) for config in module.configs(dtype, N, L, d, bias)]
            if not bias and d in module.TRAINED_HEAD_DIMS and dtype != FP16:
                ways.append((rule, True))
            for config, training in ways:
                if config != rule and (d != 64 or dtype == FP16):
                    continue
                signature = pointers("q_ptr k_ptr v_ptr o_ptr", dtype)
                signature |= {"lse_ptr": FP32 if training else None}
                signature |= {"bias_ptr": dtype if bias else None}
                yield _attention(
                    arch, config, (N, L, H, d), signature,
                    f"{', training' * training}, {TRITON_TYPE[dtype]}",
                    BATCH * H * d * 2 * (N + L) * dtype.itemsize,
                )  # fmt: skip


def quantized(arch: int, dtype: torch.dtype) -> Iterator[Case]:
    """With a quantized result, and in fp8 with quantized operands too.

    In fp8 the result has a per-tensor scale. In int8 it has a scale for each row and head, which
    takes more registers: all that a table may name for 198 tokens are compiled.
    """
    module, H, d = kernel_module("attention"), HEADS, 64
    for N, L in ((198, 198), (578, 578), (2, 198)):
        for config in module.configs(BF16, N, L, d):
            by_rule = config == module.meta(N, L, d, BF16)
            if not by_rule and (dtype == FP8 or arch == 89 or L != 198):
                continue
            if arch == 89 and N == 2:
                continue
            signature = pointers("q_ptr k_ptr v_ptr", BF16) | {"o_ptr": dtype, "scales_ptr": FP32}
            yield _attention(
                arch, config, (N, L, H, d), signature, f", quantized, {FORMAT[dtype]}",
                BATCH * H * (d * (4 * L + 3 * N) + 4 * N), dtype == INT8,
            )  # fmt: skip
    if dtype == INT8:
        return
    for N, L, d in ((198, 198, 64), (578, 578, 64), (2, 198, 64), (257, 257, 80), (50, 50, 32)):
        signature = pointers("q_ptr k_ptr v_ptr o_ptr", dtype)
        signature |= pointers("scales_ptr in_scale_ptr", FP32)
        yield _attention(
            arch, module.meta(N, L, d, dtype), (N, L, H, d), signature, f", d = {d}, all in fp8",
            BATCH * H * d * 2 * (N + L),
        )  # fmt: skip


def _attention(arch, config, shape, signature, suffix, moved, per_head=False):
    N, L, H, d = shape
    module = kernel_module("attention")
    kind = ""
    meta = {k: config[k] for k in ("BLOCK_M", "num_warps", "num_stages")}
    fewest_keys = module.LEAST_KEYS[signature["q_ptr"].itemsize]
    if config["RESIDENT"]:
        kind = "resident_"
        pieces = module.pieces(L, fewest_keys)
        meta |= zip(("KEYS_0", "KEYS_1", "KEYS_2"), pieces, strict=True)
    else:
        block = config["BLOCK_N"]
        meta |= {"BLOCK_N": block, "BLOCK_TAIL": module.tail(L, block, fewest_keys)}
    tile = f"{config['BLOCK_M']} w{config['num_warps']} s{config['num_stages']}"
    return Case(
        op="attention", kernel=f"_attention_{kind}kernel", arch=arch,
        label=f"{kind[:-1]} N = {N}, L = {L}, {tile}{suffix}".strip(),
        signature=signature | floats("scale") | integers(f"{STRIDES} B N H"),
        constexprs={"L": L, "HEAD_DIM": d, "PER_HEAD": per_head}, meta=meta,
        bytes=moved, flops=4 * BATCH * H * N * L * d,
    )  # fmt: skip


def backward(arch: int) -> Iterator[Case]:
    """dq, dk and dv in one launch, with the sums for the bias gradients where N = L."""
    module, H = kernel_module("attention"), HEADS
    names = "q_ptr k_ptr v_ptr o_ptr do_ptr dq_ptr dk_ptr dv_ptr"
    for dtype in (BF16, FP32):
        for N, L, d in (
            (198, 198, 64), (578, 578, 64), (2, 198, 64), (49, 49, 32), (197, 197, 48),
            (1, 197, 48),
        ):  # fmt: skip
            yield Case(
                op="attention", kernel="_attention_backward_kernel", arch=arch,
                label=f"backward, N = {N}, L = {L}, d = {d}, {TRITON_TYPE[dtype]}",
                signature=pointers(names, dtype) | {"lse_ptr": FP32} | floats("scale")
                | pointers("q_sums_ptr kv_sums_ptr", FP32 if N == L else None)
                | integers(f"{STRIDES} dq_row dk_row H"),
                constexprs={"N": N, "L": L, "HEAD_DIM": d},
                meta=module.meta_backward(N, L, dtype, capability(arch)),
                bytes=BATCH * H * d * 4 * (N + L) * dtype.itemsize,
                flops=10 * BATCH * H * N * L * d,
            )  # fmt: skip
