"""A Linear in eight bits."""

import torch
from torch import Tensor, nn

from deit_fast import kernels
from deit_fast.kernels import _checks
from deit_fast.kernels.quantize import FORMATS, Quantized, dequantize


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
            options["dtype"] = _checks.autocast_dtype(like) or like.dtype
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
                    f"model: {name} in eight bits would become {moved[name].dtype}, expected "
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
            f"{name} has {state_dict[name].dtype}, expected {own.dtype}: deit_fast.restore(model) takes"
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


def is_quantized(module: nn.Module) -> bool:
    return type(module) is QuantizedLinear
