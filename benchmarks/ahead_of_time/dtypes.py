"""The batch that is counted, dtypes, and what Triton calls them."""

import torch

BATCH, TOKENS = 256, 198
ROWS = BATCH * TOKENS
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
FP8, INT8 = torch.float8_e4m3fn, torch.int8
TRITON_TYPE = {
    FP32: "fp32", FP16: "fp16", BF16: "bf16", FP8: "fp8e4nv", INT8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
FORMAT = {FP8: "fp8", INT8: "int8"}
