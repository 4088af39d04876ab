"""What the shortcuts of the kernels cost in accuracy, computed in PyTorch on any machine.

    python -m benchmarks.accuracy

Relative errors against fp64, of LayerNorm followed by a GEMM: separate (the normalised x rounded
before the GEMM), folded as the kernel does it, and folded wrongly, to see what the details are
for; then of GELU's forms; then of fp8 GEMMs whose sums keep 14 bits, as those of sm_90's
instruction are said to (DeepSeek-V3, section 3.3.2). Operands are rounded as the kernels round
them, other sums are fp32, and the result is not rounded, so that nothing hides behind its rounding.
"""

import torch
from rich.console import Console
from rich.table import Table

from deit_fast.kernels import dequantize, quantize_reference
from deit_fast.kernels.cases import layer_norm_linear_inputs

STREAMS = ("normal", "outliers", "offset")
ROWS = 2048


def relative(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in norm."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def layer_norm_gemm(stream: str, D: int, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of LN(x) @ W^T, W (3 D, D), by way of computing it.

    Args:
        stream: Kind of the residual stream x, one of `STREAMS`.
        D: Features.
        dtype: Of x and the parameters.
    """
    inputs = layer_norm_linear_inputs(M=ROWS, K=D, N=3 * D, distribution=stream)
    x, g, h, w = (inputs[k].to(dtype) for k in ("x", "norm_weight", "norm_bias", "weight"))
    wide = [t.double() for t in (x, g, h, w)]
    exact = torch.nn.functional.layer_norm(wide[0], (D,), wide[1], wide[2], 1e-6) @ wide[3].t()

    fp32 = x.float()
    var, mean = torch.var_mean(fp32, 1, correction=0, keepdim=True)
    rstd = torch.rsqrt(var + 1e-6)
    separate = ((fp32 - mean) * rstd * g.float() + h.float()).to(dtype)
    scaled = w.float() * g.float()
    folded, shift = scaled.to(dtype).float(), w.float() @ h.float()
    matmul = fp32 @ folded.t()

    def fold(sums):
        return relative((matmul - mean * sums) * rstd + shift, exact)

    return {
        "separate": relative(separate.float() @ w.float().t(), exact),
        "folded": fold(folded.sum(1)),
        "sums not rounded": fold(scaled.sum(1)),
        "fp32 residual, cast": _of_a_cast_stream(inputs, dtype),
    }


def _of_a_cast_stream(inputs, dtype):
    """The error of folding an fp32 residual stream that is rounded first."""
    x, g, h, w = (inputs[k].to(dtype) for k in ("x", "norm_weight", "norm_bias", "weight"))
    rest = [t.double() for t in (g, h, w)]

    def exact(x):
        y = torch.nn.functional.layer_norm(x.double(), x.shape[1:], *rest[:2], 1e-6)
        return y @ rest[2].t()

    return relative(exact(x), exact(inputs["x"]))


def gelu(z):
    """GELU as the kernels compute it in half precision, here in z's precision."""
    s = (z * z).clamp(max=30.25)
    p = torch.full_like(s, 4.96967374e-8)
    for c in (-3.23612039e-6, 6.32384836e-5, 6.43739593e-4, -0.106197506, -2.30119538):
        p = p * s + c
    return z / (1 + torch.exp2(z * p))


def gelu_forms() -> dict[str, tuple[float, float, float]]:
    """Errors of ways to compute GELU.

    Returns:
        Form -> (largest error for |x| < 4, relative error in norm for normal x, largest error in
        half units of bf16).
    """
    x = torch.linspace(-9, 9, 90_001, dtype=torch.float64)
    exact = torch.nn.functional.gelu(x)
    half_unit = 2.0 ** (exact.abs().clamp_min(2.0**-16).log2().floor() - 8)
    density = torch.exp(-x * x / 2)
    s = (x * x).clamp(max=64)
    quintic = x * (0.797502613 + s * (0.0370104418 - 0.000352295709 * s))
    forms = {
        "the kernels'": gelu(x),
        "sigmoid of a quintic": x * torch.sigmoid(2 * quintic),
        "the same by tanh.approx (error 2^-11)": 0.5 * x * (1 + torch.tanh(quintic) * (1 - 2**-11)),
        "tanh form": torch.nn.functional.gelu(x, approximate="tanh"),
        "erf, rounded to bf16": exact.bfloat16().double(),
    }

    def errors(y):
        error = (y - exact).abs()
        norm = ((error.square() * density).sum() / (exact.square() * density).sum()).sqrt()
        return error[x.abs() < 4].max().item(), norm.item(), (error / half_unit).max().item()

    return {name: errors(y) for name, y in forms.items()}


def short_sums(K: int, rows: int = 128) -> dict[str, float]:
    """Relative errors of x @ W^T in fp8 by cause: rounding the operands, sums of 14 bits.

    Emulated: 32 features at a time, each product cut off 13 bits below the largest of them and of
    the sum.

    Args:
        K: Features of x (rows, K) and W (rows, K).
        rows: Rows of both.
    """
    torch.manual_seed(0)
    x, w = torch.randn(rows, K), torch.randn(rows, K) / K**0.5
    exact = x.double() @ w.double().t()
    x, w = quantize_reference(x), quantize_reference(w)
    scales = (x.scales.t() * w.scales).double()
    rounded = dequantize(x).double() @ dequantize(w).double().t()
    total = torch.zeros(rows, rows)
    for k in range(0, K, 32):
        products = x.values[:, None, k : k + 32].float() * w.values[None, :, k : k + 32].float()
        largest = torch.maximum(products.abs().amax(2), total.abs()).clamp_min(1e-30)
        unit = torch.exp2(largest.log2().floor() - 13)
        total = ((products / unit[:, :, None]).trunc().sum(2) + (total / unit).trunc()) * unit
    return {
        "operands": relative(rounded, exact),
        "sums": relative(total.double() * scales, rounded),
        "both": relative(total.double() * scales, exact),
    }


def main() -> None:
    """Print the tables."""
    console = Console(width=120)
    names = ("separate", "folded", "sums not rounded", "fp32 residual, cast")
    table = Table("dtype", "D", "stream", *names, title="LayerNorm, then a GEMM")
    for dtype in (torch.bfloat16, torch.float16):
        for D in (192, 384, 768):
            for stream in STREAMS:
                found = layer_norm_gemm(stream, D, dtype)
                figures = [f"{found[name]:.2e}" for name in names]
                table.add_row(str(dtype)[6:], str(D), stream, *figures)
    console.print(table)
    columns = ("largest, |x| < 4", "relative, x normal", "in half units of bf16")
    table = Table("form", *columns, title="GELU")
    for name, (largest, norm, units) in gelu_forms().items():
        table.add_row(name, f"{largest:.1e}", f"{norm:.1e}", f"{units:.2f}")
    console.print(table)
    table = Table("K", "operands", "sums", "both", title="fp8 GEMMs, sums of 14 bits")
    for K in (192, 384, 768, 3072):
        table.add_row(str(K), *(f"{error:.1e}" for error in short_sums(K).values()))
    console.print(table)


if __name__ == "__main__":
    main()
