"""The names that options and arguments take, each list once, without an import of torch.

`tests/cli/test_parsers.py` compares those that `deit_fast.kernels` has too: it knows torch and
Triton alone.
"""

MODELS = {  # ours: timm's
    "deit_tiny": "deit_tiny_patch16_224",
    "deit_small": "deit_small_patch16_224",
    "deit_base": "deit_base_patch16_224",
    "deit_base_384": "deit_base_patch16_384",
    "deit_tiny_distilled": "deit_tiny_distilled_patch16_224",
    "deit_small_distilled": "deit_small_distilled_patch16_224",
    "deit_base_distilled": "deit_base_distilled_patch16_224",
    "deit_base_distilled_384": "deit_base_distilled_patch16_384",
}
NANO = "deit_nano_fashion"  # the model whose weights are part of this package

HEADS = ("joint", "joint_softmax", "class", "distill")  # kernels.classifier's FUSIONS
DISTILLATIONS = ("none", "soft", "hard")  # kernels.distillation_loss's
QUANTIZED_FORMATS = ("fp8", "int8")  # kernels.quantize's
UNKNOWN_SCORES = ("max_logit", "energy")  # calibration's

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # short: torch's
AMP = ("none", "bf16", "fp16")
BACKENDS = ("auto", "triton", "torch")
EXPORT_FORMATS = {"torch-export": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}  # format: suffix
EXPORT_BACKENDS = ("auto", "torch")
PROTOCOLS = ("batch", "paper", "latency", "host", "step")  # of benchmarks
