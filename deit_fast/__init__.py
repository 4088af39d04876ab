"""DeiT on NVIDIA GPUs with fused kernels, computing what timm computes."""

from .attention_weights import attention_maps, attention_rollout
from .engine import InferenceEngine
from .export import Exported, export
from .heads import set_heads
from .models import (
    NAMES,
    create_model,
    deit_base,
    deit_base_384,
    deit_base_distilled,
    deit_base_distilled_384,
    deit_nano_fashion,
    deit_small,
    deit_small_distilled,
    deit_tiny,
    deit_tiny_distilled,
)
from .pretrained import from_pretrained, save_pretrained
from .quantization import QuantizationReport, quantize
from .swap import Report, Skipped, accelerate, report, restore

__version__ = "0.1.0"
__all__ = [
    "Exported",
    "InferenceEngine",
    "NAMES",
    "QuantizationReport",
    "Report",
    "Skipped",
    "accelerate",
    "attention_maps",
    "attention_rollout",
    "create_model",
    "deit_base",
    "deit_base_384",
    "deit_base_distilled",
    "deit_base_distilled_384",
    "deit_nano_fashion",
    "deit_small",
    "deit_small_distilled",
    "deit_tiny",
    "deit_tiny_distilled",
    "export",
    "from_pretrained",
    "quantize",
    "report",
    "restore",
    "save_pretrained",
    "set_heads",
]
