"""Attention and Mlp of a Block with quantized layers (FP8 or INT8).

Whatever produces the input of a quantized layer writes it quantized: LayerNorm for qkv and fc1,
attention for proj, the GELU epilogue of fc1 for fc2. Any of the four may have stayed an nn.Linear.
"""

from typing import Any

from torch import Tensor, nn

from deit_fast import kernels
from deit_fast.kernels.quantize import MAX_WIDTH, Quantized
from deit_fast.kernels.quantized_linear import GROUP_SIZE

from ._base import Fast, attention_scale, is_plain_linear, weights
from ._hooks import why_intercepted
from .attention import Attention
from .mlp import Mlp
from .quantized_linear import is_quantized


def why_not(block: Any, name: str, format: str) -> str | None:
    """Why a layer of a Block can't be quantized.

    Args:
        block: a `deit_fast.layers.Block`.
        name: "qkv", "proj", "fc1" or "fc2".
        format: "fp8" or "int8".

    Returns:
        The reason, or None if it can.
    """
    part = block.attn if name in ("qkv", "proj") else block.mlp
    linear = getattr(part, name)
    if not is_plain_linear(linear) or why_intercepted(linear):
        return f"is a {type(linear).__name__}, or a changed one, not an nn.Linear"
    if linear.in_features > MAX_WIDTH:
        return f"{linear.in_features} input features, more than {MAX_WIDTH}"
    if format == "int8" and name == "proj" and block.attn.head_dim % 32:
        return f"heads of {block.attn.head_dim} features, int8 needs a multiple of 32"
    if format == "int8" and name == "fc2" and linear.in_features % GROUP_SIZE:
        return f"{linear.in_features} hidden features, int8 needs a multiple of {GROUP_SIZE}"
    return None


def undo(model: nn.Module) -> nn.Module:
    """Undo `deit_fast.quantize`, in place, in a model that stays accelerated.

    Args:
        model: any model; quantized layers become nn.Linears again.

    Returns:
        The model.
    """
    for module in model.modules():
        if is_quantized(module):
            module.restore()
        for fast, quantized in ((Attention, QuantizedAttention), (Mlp, QuantizedMlp)):
            if type(module) is quantized:
                module.__class__ = fast
    return model


class _QuantizedPart(Fast):
    """Mixin of Attention and Mlp with quantized layers.

    Where timm's own forward runs, each quantized layer quantizes its input with a kernel of its
    own. A layer that has to be called leaves nothing fused.
    """

    fuses_around_linears = False

    @classmethod
    def why_not_linear(cls, linear):
        return None if is_quantized(linear) else super().why_not_linear(linear)


class QuantizedAttention(_QuantizedPart, Attention):
    """Attention with quantized qkv, proj or both.

    Attention itself is computed as before, or from q, k and v in FP8 if qkv has an `output_scale`.
    """

    stands_for = Attention

    def forward(self, x, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal or self.plan(x).unfused:
            return self.unfused(x, attn_mask=attn_mask, is_causal=is_causal)
        operand = _operand(x, self.qkv, self.backend)
        qkv = _values(_linear(operand, self.qkv, self.backend, x, **self._qkv_output()))
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return _linear(self._attend_for_proj(q, k, v), self.proj, self.backend, x)

    def branch(self, x, norm, row_stats=None, queries=None, **epilogue):
        """As `Attention.branch`."""

        def project(x, rows, row_stats=None):
            y = _layer_norm_linear(
                x, norm, self.qkv, self.backend, rows, row_stats, **self._qkv_output()
            )
            return _values(y).unflatten(2, (-1, self.num_heads, self.head_dim)).unbind(2)

        rows = self.num_heads * self.head_dim
        if queries is None:
            q, k, v = project(x, slice(None), row_stats)
        else:  # the residual is x
            epilogue["residual"] = first = x[:, :queries].contiguous()
            (q,), (k, v) = project(first, slice(rows)), project(x, slice(rows, None), row_stats)
        return _linear(self._attend_for_proj(q, k, v), self.proj, self.backend, x, **epilogue)

    def _qkv_output(self):
        """Format and scale in which qkv shall write its output; empty: not quantized."""
        if not is_quantized(self.qkv) or not is_quantized(self.proj):
            return {}
        if self.qkv.output_scale is None:
            return {}
        return {"format": self.qkv.format, "out_scale": self.qkv.output_scale}

    def _attend_for_proj(self, q, k, v):
        """The output of attention, quantized if proj is."""
        if not is_quantized(self.proj):
            return self._attend(q, k, v)
        return kernels.attention_quantized(
            q, k, v, attention_scale(self, self.head_dim), **_output_for(self.proj),
            in_scale=self._qkv_output().get("out_scale"), implementation=self.backend,
        )  # fmt: skip


class QuantizedMlp(_QuantizedPart, Mlp):
    """Mlp with quantized fc1, fc2 or both."""

    stands_for = Mlp

    def forward(self, x):
        if self.plan(x).unfused:
            return self.unfused(x)
        operand = _operand(x, self.fc1, self.backend)
        hidden = _linear(
            operand, self.fc1, self.backend, x, activation="gelu", **self._fc1_output()
        )
        return _linear(_operand(hidden, self.fc2, self.backend), self.fc2, self.backend, x)

    def branch(self, x, norm, row_stats=None, **epilogue):
        """As `Mlp.branch`."""
        hidden = _layer_norm_linear(
            x, norm, self.fc1, self.backend, row_stats=row_stats, activation="gelu",
            **self._fc1_output(),
        )  # fmt: skip
        # only behind an fc1 that stayed an nn.Linear there is something to quantize
        operand = _operand(hidden, self.fc2, self.backend)
        return _linear(operand, self.fc2, self.backend, x, **epilogue)

    def _fc1_output(self):
        """Format and scale in which fc1 shall write its output; empty: not quantized."""
        return _output_for(self.fc2) if is_quantized(self.fc1) else {}


# The steps of a branch, for layers that are quantized or not


def _layer_norm_linear(
    x, norm, linear, backend, rows=slice(None), row_stats=None, activation="none", **output
):
    """`activation(linear(norm(x)))` for these rows of the weight.

    `output`: format and scale of the result, of a quantized layer only.
    """
    norm_weight, norm_bias, eps = norm.operands
    if is_quantized(linear):
        operand = kernels.layer_norm_quantized(
            x, norm_weight, norm_bias, eps, linear.format, backend
        )
        return linear.project(operand, x, rows, backend, activation=activation, **output)
    weight, bias = weights(linear)
    bias = None if bias is None else bias[rows]
    return kernels.layer_norm_linear(
        x, norm_weight, norm_bias, weight[rows], bias, eps, activation, row_stats, backend
    )


def _linear(operand, linear, backend, x, return_row_stats=False, recompute=True, **epilogue):
    """The GEMM of a layer with its epilogue, in x's dtype; quantized ones make no row statistics.

    `recompute` is an argument of unquantized branches, for their backward; it is dropped.
    """
    if is_quantized(linear):
        y = linear.project(operand, x, backend=backend, **epilogue)
        return (y, None) if return_row_stats else y
    return kernels.linear(
        operand, *weights(linear), **epilogue, implementation=backend,
        return_row_stats=return_row_stats,
    )  # fmt: skip


def _operand(x: Tensor | Quantized, linear: Any, backend: str) -> Tensor | Quantized:
    """The input as `linear` reads it: quantized here if its producer did not do it."""
    if not is_quantized(linear) or isinstance(x, Quantized):
        return x
    return kernels.quantize(x, linear.format, implementation=backend)


def _values(x: Tensor | Quantized) -> Tensor:
    return x.values if isinstance(x, Quantized) else x


def _output_for(consumer: Any) -> dict[str, Any]:
    """Format and scale in which a producer writes what `consumer` reads."""
    if not is_quantized(consumer):
        return {}
    return {"format": consumer.format, "out_scale": consumer.input_scale}
