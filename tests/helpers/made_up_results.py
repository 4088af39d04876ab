"""Made-up results, for temporary folders only."""

from deit_fast.bench.results import KernelRow, ModelRow, Results

COMMIT, BUILD = "a" * 40, "b" * 12
HARDWARE = {
    "gpu": "NVIDIA Imaginary", "driver": "1.2", "cuda": "13.0", "cpu": "none", "threads": 2,
    "python": "3.11", "torch": "2.11.0", "triton": "3.6.0", "timm": "1.0.26",
    "torchao": None,
}  # fmt: skip
PEAK_RATES = {
    "copy_tb_per_s": 4.0, "fp32_tflops": 50.0, "fp16_tflops": 790.0, "bf16_tflops": 780.0,
    "fp8_tflops": 1500.0, "int8_tflops": 1500.0,
}  # fmt: skip


TIMES = ("ms_median", "ms_mean", "ms_p20", "ms_p80")


def model_row(entry, mode="eager_fp32", images_per_s=100.0, **changes) -> ModelRow:
    values = {
        "network": entry.network, "timm_name": entry.timm_name, "image_size": entry.image_size,
        "mode": mode, "protocol": "batch", "asked_batch": 256, "batch": 256, "runs": 30,
        "channels_last": False, "commit": COMMIT, "build": BUILD,
        "peak_memory_gb": None if "status" in changes else 2.0,
    } | changes  # fmt: skip
    if "status" not in values:
        values |= dict.fromkeys(TIMES, 1e3 * values["batch"] / images_per_s)
        values |= {"images_per_s": images_per_s, "relative_error": 1e-3}
        values |= {"tflops": 1.0, "fraction_of_peak_rate": 0.5}
    return ModelRow(**values)


def kernel_row(op="linear", mode="fused", flops=10**12, ms=2.0, **changes) -> KernelRow:
    values = {
        "op": op, "mode": mode, "network": "B", "case": "fc1", "batch": 256, "dtype": "bf16",
        "served_by": "triton", "bytes": 10**9, "flops": flops, "predicted_ms": 1.5, "runs": 30,
        "relative_error": 1e-3, "commit": COMMIT, "build": BUILD,
    } | changes  # fmt: skip
    if values.get("status") != "failed":
        values |= dict.fromkeys(TIMES, ms)
        values |= {
            "tflops": flops / ms / 1e9,
            "tb_per_s": 1 / ms,
            "fraction_of_peak_rate": 1.5 / ms,
        }
    return KernelRow(**values)


def results_of(*rows, **hardware) -> Results:
    protocol = {"runs": 30, "warmup": 10, "timer": "cuda events"}
    return Results(
        HARDWARE | hardware, COMMIT, BUILD, "2026-11-21", protocol, dict(PEAK_RATES), list(rows)
    )  # fmt: skip
