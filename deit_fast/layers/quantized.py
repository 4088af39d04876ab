"""Attention and Mlp of a Block with layers in eight bits, and the layers themselves.

What produces an operand writes it in eight bits: LayerNorm for qkv and fc1, attention for proj,
fc1's GELU for fc2. Any of the four may have stayed an nn.Linear.
"""

import torch
from torch import Tensor, nn

from deit_fast import kernels
from deit_fast.kernels import _runtime
from deit_fast.kernels.quantize import FORMATS, MAX_WIDTH, Quantized, dequantize
from deit_fast.kernels.quantized_linear import PART

from ._base import is_linear, weights
from .attention import Attention
from .mlp import Mlp


class QuantizedLinear(nn.Linear):
    """A Linear whose weight (N, K) is a buffer in float8_e4m3fn or int8, beside `weight_scale`
    (N,) and, where its operand has one scale for all, `input_scale` (1, 1), in fp32: they keep
    their dtypes when the model changes its own. A qkv whose result attention reads in fp8 has
    `output_scale` (1, 1) too. Made of an nn.Linear by `quantize_`.

    By itself (..., K) -> (..., N), it quantises what it gets in a pass before the product; inside a
    Block nothing does. Inference only: backward raises.
    """

    backend = "auto"
    _KEPT = ("weight", "weight_scale", "input_scale", "output_scale")

    @property
    def format(self) -> str:
        return next(name for name, dtype in FORMATS.items() if dtype == self.weight.dtype)

    @property
    def operand(self) -> Quantized:
        """The weight as `kernels.quantized_linear` takes it."""
        return Quantized(self.weight, self.weight_scale[None])

    def forward(self, x):
        operand = kernels.quantize(x, self.format, implementation=self.backend)
        return self.project(operand, x, backend=self.backend)

    def project(
        self, operand: Quantized, like: Tensor, rows: slice = slice(None), backend: str = "auto",
        **options,
    ):  # fmt: skip
        """The product of an operand in eight bits with these rows of the weight; its dtype, unless
        `options` have a format, is that of a product of `like`."""
        weight, bias = self.operand, self.bias
        if rows != slice(None):
            weight = Quantized(weight.values[rows], weight.scales[:, rows])
            bias = None if bias is None else bias[rows]
        if options.get("format") is None:
            options["dtype"] = _runtime.autocast_dtype(like) or like.dtype
        return kernels.quantized_linear(operand, weight, bias, **options, implementation=backend)

    def extra_repr(self):
        return f"{super().extra_repr()}, format={self.format}"

    def restore(self) -> None:
        """Become an nn.Linear again, with the weight it was made of; where eight bits were loaded
        since, with those as numbers of the model's dtype."""
        original = self.__dict__.pop("_original", None)
        device, dtype = self.weight.device, self._dtype
        if original is None:
            weight = nn.Parameter(dequantize(self.operand).to(dtype))
        elif original.device == device and original.dtype == dtype:
            weight = original
        else:
            weight = nn.Parameter(original.detach().to(device, dtype), original.requires_grad)
        for name in self._KEPT:
            del self._buffers[name]
        for name in ("backend", "_dtype"):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear
        # in front of the bias, where it was
        bias = self._parameters.pop("bias")
        self.weight, self._parameters["bias"] = weight, bias

    def forget(self) -> None:
        """The weight it was made of is not the one in eight bits."""
        self.__dict__.pop("_original", None)

    def _apply(self, fn, recurse=True):
        """Moved as any buffer is, but never cast: `fn` sees integers. Raises TypeError where it
        casts those too, as Module.type does."""
        kept, moved = {name: self._buffers[name] for name in self._KEPT}, {}
        for name, t in kept.items():
            as_integers = None if t is None else torch.uint8 if t.itemsize == 1 else torch.int32
            moved[name] = t if t is None else fn(t.view(as_integers))
            if t is not None and moved[name].dtype != as_integers:
                raise TypeError(
                    f"model: {name} in eight bits would become {moved[name].dtype}, want "
                    "model.to(dtype), which leaves it"
                )
        self._buffers |= dict.fromkeys(self._KEPT)
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers |= kept
        self._buffers |= {k: t if t is None else t.view(kept[k].dtype) for k, t in moved.items()}
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype  # the weight's, once restored
        return self

    def __getstate__(self):
        """For pickle and deepcopy; of e4m3 PyTorch's tensors are pickled, but not read again."""
        state = self.__dict__ | {"_buffers": dict(self._buffers)}
        if self.weight.dtype == torch.float8_e4m3fn:
            state["_buffers"]["weight"] = self.weight.view(torch.uint8)
        return state

    def __setstate__(self, state):
        weight = state["_buffers"]["weight"]
        if weight.dtype == torch.uint8:
            state["_buffers"]["weight"] = weight.view(torch.float8_e4m3fn)
        super().__setstate__(state)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, *lists):
        names = {prefix + name: self._buffers[name] for name in self._KEPT}
        wrong = [
            f"{name} has {state_dict[name].dtype}, want {own.dtype}: deit_fast.restore(model) takes"
            " other weights"
            for name, own in names.items()
            if own is not None and name in state_dict and state_dict[name].dtype != own.dtype
        ]
        for name in names:
            t = state_dict.get(name)
            if name.endswith("_scale") and t is not None and not t.is_meta:
                if not (t.isfinite() & (t > 0)).all():
                    wrong.append(f"{name} has values that are not positive and finite")
        errors = lists[-1]
        if wrong:
            errors.extend(wrong)
            return
        before = len(errors)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *lists)
        if len(errors) == before and names.keys() & state_dict.keys():
            self.forget()


def quantize_(
    linear: nn.Linear, format: str, input_scale: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Turn an nn.Linear into a QuantizedLinear, in place. Its weight stays, in the memory of the
    host, for `restore`."""
    values, scales = kernels.quantize_reference(linear.weight.detach(), format)
    original = linear._parameters.pop("weight")
    if original.device.type == "cuda":
        original = nn.Parameter(original.detach().cpu(), original.requires_grad)
    linear.__dict__["_original"] = original  # no parameter any more
    linear._dtype = original.dtype
    linear.register_buffer("weight", values)
    linear.register_buffer("weight_scale", scales[0])
    linear.register_buffer("input_scale", input_scale)
    linear.register_buffer("output_scale", output_scale)
    linear.__class__ = QuantizedLinear


def why_not(block, name: str, format: str) -> str | None:
    """Why `name`, "qkv", "proj", "fc1" or "fc2", of a Block can't be served in eight bits, or
    None."""
    part = block.attn if name in ("qkv", "proj") else block.mlp
    linear = getattr(part, name)
    if not is_linear(linear):
        return f"is a {type(linear).__name__}, or a changed one, not an nn.Linear"
    if linear.in_features > MAX_WIDTH:
        return f"{linear.in_features} input features, more than {MAX_WIDTH}"
    if format == "int8" and name == "proj" and block.attn.head_dim % 32:
        return f"heads of {block.attn.head_dim} features, int8 wants a multiple of 32"
    if format == "int8" and name == "fc2" and linear.in_features % PART:
        return f"{linear.in_features} hidden features, int8 wants a multiple of {PART}"
    return None


def is_quantized(module: nn.Module) -> bool:
    return type(module) is QuantizedLinear


def _normalized_linear(
    x, norm, linear, backend, rows=slice(None), moments=None, activation="none", **output
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
        x, norm_weight, norm_bias, weight[rows], bias, eps, activation, moments, backend
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


def _project(operand, linear, backend, x, return_moments=False, recompute=True, **epilogue):
    """The product that ends a branch, of x's kind. Eight bits leave no moments."""
    if is_quantized(linear):
        y = linear.project(operand, x, backend=backend, **epilogue)
        return (y, None) if return_moments else y
    return kernels.linear(
        operand, *weights(linear), **epilogue, implementation=backend,
        return_moments=return_moments,
    )  # fmt: skip


class QuantizedAttention(Attention):
    """Attention with qkv, proj or both in eight bits. What lies between is computed as ever, or of
    q, k and v in fp8, where qkv has an `output_scale`."""

    def forward(self, x, attn_mask=None, is_causal=False):
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        operand = _operand(x, self.qkv, self.backend)
        qkv = _values(_project(operand, self.qkv, self.backend, x, **self._output()))
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).unbind(2)
        return _project(self._attended(q, k, v), self.proj, self.backend, x)

    def branch(self, x, norm, first=None, moments=None, **epilogue):
        def project(x, rows, moments=None):
            made = _normalized_linear(
                x, norm, self.qkv, self.backend, rows, moments, **self._output()
            )
            return _values(made).unflatten(2, (-1, self.num_heads, self.head_dim)).unbind(2)

        rows = self.num_heads * self.head_dim
        if first is None:
            q, k, v = project(x, slice(None), moments)
        else:
            (q,), (k, v) = project(first, slice(rows)), project(x, slice(rows, None), moments)
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
            q, k, v, self.scale, **_output(self.proj), in_scale=self._output().get("out_scale"),
            implementation=self.backend,
        )  # fmt: skip


class QuantizedMlp(Mlp):
    """Mlp with fc1, fc2 or both in eight bits."""

    def forward(self, x):
        operand = _operand(x, self.fc1, self.backend)
        hidden = _project(operand, self.fc1, self.backend, x, activation="gelu", **self._output())
        return _project(_operand(hidden, self.fc2, self.backend), self.fc2, self.backend, x)

    def branch(self, x, norm, moments=None, **epilogue):
        hidden = _normalized_linear(
            x, norm, self.fc1, self.backend, moments=moments, activation="gelu", **self._output()
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
