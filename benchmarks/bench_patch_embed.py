"""patch_embed."""

from deit_fast.kernels import patch_embed, patch_embed_reference
from deit_fast.kernels.cases import patch_embed_inputs


def test_patch_embed(compare):
    compare(patch_embed, patch_embed_reference, patch_embed_inputs)
