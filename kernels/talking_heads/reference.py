"""Talking-heads attention in plain PyTorch: the definition of right."""

from torch import Tensor
from torch.nn import functional as F


def talking_heads_attention_reference(
    qkv: Tensor, proj_l_weight: Tensor, proj_l_bias: Tensor | None, proj_w_weight: Tensor,
    proj_w_bias: Tensor | None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Talking-heads attention with its scores in memory, as timm computes CaiT's.

    Arguments and result as those of `talking_heads_attention`; the result may be non-contiguous.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = q * scale @ k.transpose(-2, -1)
    t = F.linear(s.permute(0, 2, 3, 1), proj_l_weight, proj_l_bias)
    p = t.permute(0, 3, 1, 2).softmax(-1)
    a = F.linear(p.permute(0, 2, 3, 1), proj_w_weight, proj_w_bias)
    return (a.permute(0, 3, 1, 2) @ v).transpose(1, 2)
