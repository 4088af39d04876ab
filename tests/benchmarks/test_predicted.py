"""What a kernel's row is predicted to take."""

import pytest
import torch

from benchmarks import bench_quantized_linear, operations
from benchmarks.kernel_rows import predicted_ms
from deit_fast.kernels import quantize_reference

BF16 = torch.bfloat16


@pytest.mark.parametrize("of", ["fp8", "int8"])
@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "quantized"])
def test_bytes_of_quantized_operands(of, narrow):
    """Each operand once, with its scales; `linear` in bf16 has its own."""
    out_scale = 0.1 if of == "fp8" else None
    made = {"M": 6, "S": 1, "K": 32, "N": 64, "of": of}
    made |= {"format": of, "out_scale": out_scale} if narrow else {"dtype": BF16}
    first = operations.cast(bench_quantized_linear.inputs(**made), BF16)
    plain = bench_quantized_linear.reference(**first)
    read = first | {"wide_x": None, "wide_weight": None}
    operands, scales, bias = 6 * 32 + 64 * 32, 4 * (6 + 64), 2 * 64
    out = 2 * 6 * 64
    own = 4 if narrow and out_scale else 0  # the result's scale, which is given
    moved = operands + scales + bias + own
    moved += 6 * 64 + 4 * plain.scales.numel() if narrow else out
    assert operations.traffic(read, plain, first, BF16, "fused") == (moved, of)
    assert operations.traffic(read, plain, first, BF16, "bf16") == (
        2 * operands + bias + own + out, "bf16",
    )  # fmt: skip


def test_the_operands_decide_the_peak_rate():
    """Not the format of the result."""
    x = torch.zeros(4, 32, dtype=BF16)
    fp8, int8 = (quantize_reference(x, format) for format in ("fp8", "int8"))
    for inputs, precision in (
        ({"x": x, "format": "fp8"}, "bf16"), ({"q": x, "format": "fp8"}, "bf16"),
        ({"x": int8}, "int8"), ({"qkv": fp8, "format": "int8"}, "fp8"), ({"image": x}, "bf16"),
    ):  # fmt: skip
        assert operations.traffic(inputs, fp8, inputs, BF16, "fused")[1] == precision
    limits = {"copy_tb_per_s": 1.0, "bf16_tflops": 1.0, "fp8_tflops": 1.9}
    for precision, expected in (("bf16", 38.0), ("fp8", 20.0), ("int8", 2.0)):  # that not measured
        assert predicted_ms(2e9, 38e9, precision, limits) == pytest.approx(expected)
