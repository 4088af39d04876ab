"""Which implementation "auto" takes for given inputs, by table or by rule."""

from typing import Any

from deit_fast.kernels.attention.configs import choose as choose_attention
from deit_fast.kernels.linear.configs import choose as choose_linear
from deit_fast.kernels.linear.configs import epilogue_name


def served_by(op: str, inputs: dict[str, Any]) -> str:
    """The implementation that "auto" takes.

    Args:
        op: "linear" or "attention".
        inputs: Keyword arguments of its public function.
    """
    if op == "attention":
        bias = inputs.get("bias") is not None
        return choose_attention(inputs["q"], inputs["k"].shape[1], bias, "auto")[0]
    x, weight = inputs["x"], inputs["weight"]
    bias, residual, layer_scale, row_scale = (
        inputs.get(name) is not None for name in ("bias", "residual", "layer_scale", "row_scale")
    )
    epilogue = epilogue_name(
        inputs["activation"], bias, residual, layer_scale or row_scale, False, False
    )
    return choose_linear(x.flatten(0, -2), weight.shape[0], epilogue, False, "auto")[0]
