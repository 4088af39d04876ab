"""A quantized Linear: its weight in FP8 (e4m3) or INT8."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from deit_fast import kernels
from deit_fast.kernels import _checks
from deit_fast.kernels.quantize import FORMATS, Quantized, dequantize


class QuantizedLinear(nn.Linear):
    """A Linear (..., K) -> (..., N) whose weight is quantized, made of an nn.Linear by `quantize_`.

    Called, it quantizes its input with a kernel of its own before the GEMM. Inside a fused Block
    the producer of the input writes it quantized. Inference only: backward raises.

    Its buffers keep their dtypes when the model changes its own:

        weight        (N, K)  float8_e4m3fn or int8
        weight_scale  (N,)    fp32, per-row scale of the weight
        input_scale   (1, 1)  fp32, static per-tensor scale of the input, or None
        output_scale  (1, 1)  fp32, of a qkv whose output attention reads in FP8, or None
    """

    backend = "auto"
    weight: Any  # a buffer; that of nn.Linear is a Parameter
    weight_scale: Tensor
    input_scale: Tensor | None
    output_scale: Tensor | None
    _dtype: torch.dtype  # of the weight before it was quantized, and of the restored one
    _BUFFERS = ("weight", "weight_scale", "input_scale", "output_scale")

    @property
    def format(self) -> str:
        """The name of the weight's format, "fp8" or "int8"."""
        return next(name for name, dtype in FORMATS.items() if dtype == self.weight.dtype)

    @property
    def operand(self) -> Quantized:
        """The weight as `deit_fast.kernels.quantized_linear` takes it."""
        return Quantized(self.weight, self.weight_scale[None])

    def forward(self, x):
        operand = kernels.quantize(x, self.format, implementation=self.backend)
        return self.project(operand, x, backend=self.backend)

    def project(
        self, operand: Quantized, like: Tensor, rows: slice = slice(None), backend: str = "auto",
        **options: Any,
    ) -> Tensor | Quantized:  # fmt: skip
        """The GEMM of a quantized input with the weight, or with some of its rows.

        Args:
            operand: the input (..., K), quantized.
            like: a tensor; the output has the dtype that an nn.Linear would give it.
            rows: of the weight.
            backend: "auto", "triton" or "torch".
            options: epilogue, and output format, as `deit_fast.kernels.quantized_linear` takes
                them. With a `format` the output is quantized.

        Returns:
            (..., N).
        """
        weight = self.operand
        bias: Tensor | None = self.bias
        if rows != slice(None):
            weight = Quantized(weight.values[rows], weight.scales[:, rows])
            bias = None if bias is None else bias[rows]
        if options.get("format") is None:
            options["dtype"] = _checks.autocast_dtype(like) or like.dtype
        return kernels.quantized_linear(operand, weight, bias, **options, implementation=backend)

    def extra_repr(self):
        return f"{super().extra_repr()}, format={self.format}"

    def restore(self) -> None:
        """Become an nn.Linear again.

        Its weight is the one it was made of or, if a quantized one was loaded since, that one
        dequantized to the model's dtype.
        """
        original = self.__dict__.pop("_original", None)
        device, dtype = self.weight.device, self._dtype
        if original is None:
            weight = nn.Parameter(dequantize(self.operand).to(dtype))
        elif original.device == device and original.dtype == dtype:
            weight = original
        else:
            weight = nn.Parameter(original.detach().to(device, dtype), original.requires_grad)
        for name in self._BUFFERS:
            del self._buffers[name]
        for name in ("backend", "_dtype"):
            self.__dict__.pop(name, None)
        self.__class__ = nn.Linear  # type: ignore[assignment]  # no subclass: its own base
        # in front of the bias, where it was
        bias = self._parameters.pop("bias")
        self.weight, self._parameters["bias"] = weight, bias

    def forget(self) -> None:
        """Drop the weight it was made of, after another quantized weight was loaded."""
        self.__dict__.pop("_original", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move the buffers without a cast: `fn` sees integers.

        Raises TypeError if `fn` casts integers too, as Module.type does.
        """
        kept = {name: self._buffers[name] for name in self._BUFFERS}
        moved: dict[str, Tensor] = {}
        for name, t in kept.items():
            if t is None:
                continue
            as_integers = torch.uint8 if t.itemsize == 1 else torch.int32
            moved[name] = fn(t.view(as_integers))
            if moved[name].dtype != as_integers:
                raise TypeError(
                    f"model: quantized {name} would become {moved[name].dtype}, expected "
                    "model.to(dtype), which leaves it"
                )
            moved[name] = moved[name].view(t.dtype)
        self._buffers |= dict.fromkeys(self._BUFFERS)
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers |= kept
        self._buffers |= moved
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype  # the weight's, once restored
        return self

    def __getstate__(self):
        """The state for pickle and deepcopy: PyTorch pickles e4m3 tensors and can't read them."""
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
        names = {prefix + name: self._buffers[name] for name in self._BUFFERS}
        wrong = [
            f"{name} has {state_dict[name].dtype}, expected {own.dtype}: "
            "deit_fast.restore(model) takes other weights"
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
    """Turn an nn.Linear into a QuantizedLinear, in place.

    Its weight stays in host memory for `restore`.

    Args:
        linear: the layer, with a weight (N, K).
        format: "fp8" or "int8".
        input_scale: (1, 1) in fp32, static scale of the input; None: its producer makes one.
        output_scale: (1, 1) in fp32, static scale of the output, for FP8 attention.
    """
    values, scales = kernels.quantize_reference(linear.weight.detach(), format)
    original: Any = linear._parameters.pop("weight")
    if original.device.type == "cuda":
        original = nn.Parameter(original.detach().cpu(), original.requires_grad)
    linear.__dict__["_original"] = original  # no parameter any more
    linear.__dict__["_dtype"] = original.dtype
    linear.register_buffer("weight", values)
    linear.register_buffer("weight_scale", scales[0])
    linear.register_buffer("input_scale", input_scale)
    linear.register_buffer("output_scale", output_scale)
    linear.__class__ = QuantizedLinear


def is_quantized(module: object) -> TypeGuard[QuantizedLinear]:
    """Whether a module is a QuantizedLinear."""
    return type(module) is QuantizedLinear
