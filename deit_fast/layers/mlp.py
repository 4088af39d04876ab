"""fc1 -> GELU -> fc2, with the preceding LayerNorm and the following residual when a Block asks."""

import timm.layers

from deit_fast import kernels

from ._base import Fast, is_exact_gelu, is_identity, weights, why_not_dropouts
from ._bypass import class_name
from ._parts import linear, normalized_linear, residual_linear


def why_not_mlp(module) -> str | None:
    """Why act and the dropouts of a module are not those of a plain MLP, or None."""
    if not is_exact_gelu(module.act):
        return f"has activation {class_name(module.act)}, not the exact GELU"
    return why_not_dropouts(module, "drop1", "drop2")


class Mlp(Fast, timm.layers.Mlp):
    """timm's Mlp: (..., D) -> (..., D_out). With active dropout timm's own forward runs."""

    timm_class = timm.layers.Mlp
    linears = ("fc1", "fc2")
    calls_linears = True

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

    def in_parts(self, x, norm, layer_scale, drop_path):
        """`branch` around Linears that have to be called: x and the second half of a Block."""
        hidden = normalized_linear(x, norm, self.fc1, self.backend, "gelu")
        return residual_linear(hidden, self.fc2, x, layer_scale, drop_path, self.backend)

    def branch(self, x, norm, **epilogue):
        """The second half of a Block: `norm`, a LayerNorm module, comes first; `epilogue` as
        `deit_fast.kernels.layer_norm_mlp` takes it."""
        norm_weight, norm_bias, eps = norm.operands
        return kernels.layer_norm_mlp(
            x, norm_weight, norm_bias, *weights(self.fc1), *weights(self.fc2), eps, **epilogue,
            implementation=self.backend,
        )  # fmt: skip
