"""DeiT's operations as single GPU kernels, each with its plain PyTorch reference beside it.

`explain(model, images)` lists which implementation served each operation of a call, and why;
`exclude("attention")` leaves an operation to PyTorch.
"""

# Where a checkout's root is on sys.path, another package's `import kernels` finds this folder
# (transformers asks for one). It gets an empty module: a second registration of the operators would
# leave those in use with freed schemas, and their calls would fail at random.
if __name__ == "deit_fast.kernels":
    from ._explain import Decision, explain
    from ._policy import Choice, exclude, excluded
    from .attention import (
        attention,
        attention_quantized,
        attention_quantized_reference,
        attention_reference,
    )
    from .classifier import classifier, classifier_reference
    from .conv_norm import conv_norm, conv_norm_reference
    from .distillation_loss import distillation_loss, distillation_loss_reference
    from .layer_norm import (
        add_layer_norm,
        add_layer_norm_reference,
        layer_norm,
        layer_norm_reference,
    )
    from .layer_norm_attention import layer_norm_attention, layer_norm_attention_reference
    from .layer_norm_linear import layer_norm_linear, layer_norm_linear_reference
    from .layer_norm_mlp import layer_norm_mlp, layer_norm_mlp_reference
    from .layer_norm_quantized import layer_norm_quantized, layer_norm_quantized_reference
    from .linear import linear, linear_reference
    from .patch_embed import patch_embed, patch_embed_reference
    from .quantize import Quantized, dequantize, quantize, quantize_reference
    from .quantized_linear import quantized_linear, quantized_linear_reference
    from .sparse_cross_entropy import sparse_cross_entropy, sparse_cross_entropy_reference
    from .talking_heads import talking_heads_attention, talking_heads_attention_reference
    from .window_attention import window_attention, window_attention_reference

__all__ = [
    "Choice",
    "Decision",
    "Quantized",
    "add_layer_norm",
    "add_layer_norm_reference",
    "attention",
    "attention_quantized",
    "attention_quantized_reference",
    "attention_reference",
    "classifier",
    "classifier_reference",
    "conv_norm",
    "conv_norm_reference",
    "dequantize",
    "distillation_loss",
    "distillation_loss_reference",
    "exclude",
    "excluded",
    "explain",
    "layer_norm",
    "layer_norm_attention",
    "layer_norm_attention_reference",
    "layer_norm_linear",
    "layer_norm_linear_reference",
    "layer_norm_mlp",
    "layer_norm_mlp_reference",
    "layer_norm_quantized",
    "layer_norm_quantized_reference",
    "layer_norm_reference",
    "linear",
    "linear_reference",
    "patch_embed",
    "patch_embed_reference",
    "quantize",
    "quantize_reference",
    "quantized_linear",
    "quantized_linear_reference",
    "sparse_cross_entropy",
    "sparse_cross_entropy_reference",
    "talking_heads_attention",
    "talking_heads_attention_reference",
    "window_attention",
    "window_attention_reference",
]
