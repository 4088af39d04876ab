"""fc1 -> GELU -> fc2, with the preceding LayerNorm and the following residual when a Block asks."""

import timm.layers

from deit_fast import kernels

from ._base import Fast, is_exact_gelu, is_identity, is_linear, weights


def why_not_parts(module) -> str | None:
    """Why fc1, act, fc2 and the dropouts of a module are not those of a plain MLP, or None."""
    if not is_linear(module.fc1) or not is_linear(module.fc2):
        return "fc1 or fc2 is not an nn.Linear"
    if not is_exact_gelu(module.act):
        return f"activation {module.act} is not the exact GELU"
    if module.drop1.p > 0 or module.drop2.p > 0:
        return "has dropout"
    return None


class Mlp(Fast, timm.layers.Mlp):
    """timm's Mlp without dropout: (..., D) -> (..., D_out)."""

    timm_class = timm.layers.Mlp

    @classmethod
    def why_not(cls, module):
        if not is_identity(module.norm):
            return "has a norm between fc1 and fc2"
        return why_not_parts(module)

    def forward(self, x):
        hidden = kernels.linear(x, *weights(self.fc1), "gelu", implementation=self.backend)
        return kernels.linear(hidden, *weights(self.fc2), implementation=self.backend)

    def branch(self, x, norm, **epilogue):
        """The second half of a Block: `norm`, a LayerNorm module, comes first; `epilogue` as
        `deit_fast.kernels.layer_norm_mlp` takes it."""
        norm_weight, norm_bias, eps = norm.operands
        return kernels.layer_norm_mlp(
            x, norm_weight, norm_bias, *weights(self.fc1), *weights(self.fc2), eps, **epilogue,
            implementation=self.backend,
        )  # fmt: skip
