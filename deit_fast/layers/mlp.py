"""fc1 -> GELU -> fc2; in a Block with the LayerNorm in front and the residual addition behind."""

from typing import Any

import timm.layers

from deit_fast import kernels

from ._base import Fast, class_name, is_exact_gelu, is_identity, weights, why_not_dropouts
from ._branch import layer_norm_linear, linear, residual_linear


def why_not_mlp(module: Any) -> str | None:
    """Why the activation or the dropouts of an MLP can't be fused; None: they can."""
    if not is_exact_gelu(module.act):
        return f"has activation {class_name(module.act)}, not the exact GELU"
    return why_not_dropouts(module, "drop1", "drop2")


class Mlp(Fast, timm.layers.Mlp):
    """timm's Mlp: (..., D) -> (..., D_out). With active dropout timm's own forward runs."""

    timm_class = timm.layers.Mlp
    linears = ("fc1", "fc2")
    fuses_around_linears = True

    @classmethod
    def why_not(cls, module):
        if not is_identity(module.norm):
            return "has a norm between fc1 and fc2"
        return why_not_mlp(module)

    def forward(self, x):
        if self.plan(x).unfused:
            return self.unfused(x)
        hidden = linear(x, self.fc1, self.backend, "gelu")
        return linear(hidden, self.fc2, self.backend)

    def branch(self, x, norm, **epilogue):
        """The MLP branch of a Block, LayerNorm included.

        Args:
            x: (..., D), the residual stream.
            norm: the `deit_fast.layers.LayerNorm` in front.
            epilogue: as `deit_fast.kernels.layer_norm_mlp` takes it.

        Returns:
            (..., D_out); a pair with `return_row_stats`.
        """
        norm_weight, norm_bias, eps = norm.operands
        return kernels.layer_norm_mlp(
            x, norm_weight, norm_bias, *weights(self.fc1), *weights(self.fc2), eps, **epilogue,
            implementation=self.backend,
        )  # fmt: skip

    def branch_around_linears(self, x, norm, layer_scale, drop_path):
        """As `deit_fast.layers.Attention.branch_around_linears`, for the MLP branch."""
        hidden = layer_norm_linear(x, norm, self.fc1, self.backend, "gelu")
        return residual_linear(hidden, self.fc2, x, layer_scale, drop_path, self.backend)
