"""Attention and Mlp of a Block with layers in eight bits.

What produces an operand writes it in eight bits: LayerNorm for qkv and fc1, attention for proj,
fc1's GELU for fc2. Any of the four may have stayed an nn.Linear.
"""

from torch import nn

from deit_fast import kernels
from deit_fast.kernels.quantize import MAX_WIDTH, Quantized
from deit_fast.kernels.quantized_linear import GROUP_SIZE

from ._base import attention_scale, weights
from ._bypass import is_plain, why_watched
from .attention import Attention
from .mlp import Mlp
from .quantized_linear import is_quantized


def why_not(block, name: str, format: str) -> str | None:
    """Why `name`, "qkv", "proj", "fc1" or "fc2", of a Block can't be served in eight bits, or
    None."""
    part = block.attn if name in ("qkv", "proj") else block.mlp
    linear = getattr(part, name)
    if not is_plain(linear) or why_watched(linear):
        return f"is a {type(linear).__name__}, or a changed one, not an nn.Linear"
    if linear.in_features > MAX_WIDTH:
        return f"{linear.in_features} input features, more than {MAX_WIDTH}"
    if format == "int8" and name == "proj" and block.attn.head_dim % 32:
        return f"heads of {block.attn.head_dim} features, int8 wants a multiple of 32"
    if format == "int8" and name == "fc2" and linear.in_features % GROUP_SIZE:
        return f"{linear.in_features} hidden features, int8 wants a multiple of {GROUP_SIZE}"
    return None


def _normalized_linear(
    x, norm, linear, backend, rows=slice(None), row_stats=None, activation="none", **output
):
    """`activation(linear(norm(x)))` for these rows of the weight. `output`: of a layer in eight
    bits, the format and scale of its result."""
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


def _operand(x, linear, backend):
    """x as `linear` reads it, quantised in a pass of its own where nothing did before."""
    if not is_quantized(linear) or isinstance(x, Quantized):
        return x
    return kernels.quantize(x, linear.format, implementation=backend)


def _values(x):
    return x.values if isinstance(x, Quantized) else x


def _output(consumer) -> dict:
    """What the producer of a layer's operand is asked for."""
    if not is_quantized(consumer):
        return {}
    return {"format": consumer.format, "out_scale": consumer.input_scale}


def _project(operand, linear, backend, x, return_row_stats=False, recompute=True, **epilogue):
    """The product that ends a branch, of x's kind. Eight bits leave no row statistics."""
    if is_quantized(linear):
        y = linear.project(operand, x, backend=backend, **epilogue)
        return (y, None) if return_row_stats else y
    return kernels.linear(
        operand, *weights(linear), **epilogue, implementation=backend,
        return_row_stats=return_row_stats,
    )  # fmt: skip


class _InEightBits:
    """Where timm's own forward runs, each layer in eight bits quantises what it gets in a pass of
    its own. One that has to be called leaves nothing fused."""

    calls_linears = False

    @classmethod
    def why_not_linear(cls, linear):
        return None if is_quantized(linear) else super().why_not_linear(linear)


class QuantizedAttention(_InEightBits, Attention):
    """Attention with qkv, proj or both in eight bits. What lies between is computed as ever, or of
    q, k and v in fp8, where qkv has an `output_scale`."""

    stands_for = Attention

    def forward(self, x, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal or self.plan(x).unfused:
            return self.unfused(x, attn_mask=attn_mask, is_causal=is_causal)
        operand = _operand(x, self.qkv, self.backend)
        qkv = _values(_project(operand, self.qkv, self.backend, x, **self._output()))
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return _project(self._attended(q, k, v), self.proj, self.backend, x)

    def branch(self, x, norm, first=None, row_stats=None, **epilogue):
        def project(x, rows, row_stats=None):
            made = _normalized_linear(
                x, norm, self.qkv, self.backend, rows, row_stats, **self._output()
            )
            return _values(made).unflatten(2, (-1, self.num_heads, self.head_dim)).unbind(2)

        rows = self.num_heads * self.head_dim
        if first is None:
            q, k, v = project(x, slice(None), row_stats)
        else:
            (q,), (k, v) = project(first, slice(rows)), project(x, slice(rows, None), row_stats)
        return _project(self._attended(q, k, v), self.proj, self.backend, x, **epilogue)

    def _output(self):
        """What qkv is asked for."""
        if not is_quantized(self.qkv) or not is_quantized(self.proj):
            return {}
        if self.qkv.output_scale is None:
            return {}
        return {"format": self.qkv.format, "out_scale": self.qkv.output_scale}

    def _attended(self, q, k, v):
        if not is_quantized(self.proj):
            return self._attend(q, k, v)
        return kernels.attention_quantized(
            q, k, v, attention_scale(self, self.head_dim), **_output(self.proj),
            in_scale=self._output().get("out_scale"), implementation=self.backend,
        )  # fmt: skip


class QuantizedMlp(_InEightBits, Mlp):
    """Mlp with fc1, fc2 or both in eight bits."""

    stands_for = Mlp

    def forward(self, x):
        if self.plan(x).unfused:
            return self.unfused(x)
        operand = _operand(x, self.fc1, self.backend)
        hidden = _project(operand, self.fc1, self.backend, x, activation="gelu", **self._output())
        return _project(_operand(hidden, self.fc2, self.backend), self.fc2, self.backend, x)

    def branch(self, x, norm, row_stats=None, **epilogue):
        hidden = _normalized_linear(
            x,
            norm,
            self.fc1,
            self.backend,
            row_stats=row_stats,
            activation="gelu",
            **self._output(),
        )
        # only behind an fc1 that stayed as it was there is something to quantise
        operand = _operand(hidden, self.fc2, self.backend)
        return _project(operand, self.fc2, self.backend, x, **epilogue)

    def _output(self):
        return _output(self.fc2) if is_quantized(self.fc1) else {}


def undo(model: nn.Module) -> nn.Module:
    """Undo `deit_fast.quantize`: every layer in eight bits becomes an nn.Linear again, in a model
    that stays accelerated."""
    for module in model.modules():
        if is_quantized(module):
            module.restore()
        for fast, quantized in ((Attention, QuantizedAttention), (Mlp, QuantizedMlp)):
            if type(module) is quantized:
                module.__class__ = fast
    return model
