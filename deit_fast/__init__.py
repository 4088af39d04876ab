"""DeiT on NVIDIA GPUs with fused kernels, computing what timm computes.

Importing this package imports neither torch nor timm: the names below do, at their first use. The
kernels' operators (`torch.ops.deit_fast`) are there as soon as both torch and deit_fast were
imported, in either order.
"""

import importlib
from typing import TYPE_CHECKING

from . import _lazy

if TYPE_CHECKING:  # where each name comes from: the same as in _lazy.attach below
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

__version__ = "0.2.0"
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

_lazy.attach(
    __name__,
    {
        "attention_weights": ("attention_maps", "attention_rollout"),
        "engine": ("InferenceEngine",),
        "export": ("Exported", "export"),
        "heads": ("set_heads",),
        "models": (
            "NAMES",
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
        ),
        "pretrained": ("from_pretrained", "save_pretrained"),
        "quantization": ("QuantizationReport", "quantize"),
        "swap": ("Report", "Skipped", "accelerate", "report", "restore"),
    },
)
_lazy.when_imported("torch", lambda: importlib.import_module(f"{__name__}.kernels"))
