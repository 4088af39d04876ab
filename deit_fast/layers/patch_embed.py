"""Image -> patch tokens."""

import timm.layers
import torch
from timm.layers.format import nchw_to
from torch import nn

from deit_fast import kernels

from ._base import Fast, is_identity


class PatchEmbed(Fast, timm.layers.PatchEmbed):
    """timm's PatchEmbed: float (B, C, H, W) -> (B, n, D), or the feature map its options ask for.

    A VisionTransformer here also adds positions and prefix tokens in the same kernel, through
    `embed`.
    """

    timm_class = timm.layers.PatchEmbed
    rechecks_why_not = True

    @classmethod
    def why_not(cls, module):
        proj = module.proj
        if type(proj) is not nn.Conv2d or "weight" not in proj._parameters:
            return "proj is not a plain nn.Conv2d"
        if proj.kernel_size != proj.stride or proj.groups != 1:
            return "proj is not a convolution of disjoint patches"
        if proj.padding != (0, 0) or proj.dilation != (1, 1):
            return "proj pads or is dilated"
        if proj.in_channels > 4:
            return f"{proj.in_channels} input channels, the kernel takes 1 to 4"
        if not is_identity(module.norm):
            return "has a norm"
        if module.dynamic_img_pad:
            return "pads images"
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.plan(x).unfused:
            return self.unfused(x)
        tokens = self.embed(x)
        if self.flatten:
            return tokens
        rows = x.shape[2] // self.patch_size[0]
        return nchw_to(tokens.unflatten(1, (rows, -1)).permute(0, 3, 1, 2), self.output_fmt)

    def embed(self, image, pos_embed=None, prefix_tokens=None, mean=None, std=None):
        """Tokens with positions and prefix tokens, in one kernel.

        Args:
            image: float (B, C, H, W), or uint8 (B, H, W, C).
            pos_embed: as `deit_fast.kernels.patch_embed` takes it, like the arguments after it.
            prefix_tokens: (T, D), or None.
            mean: of each channel, for uint8 images.
            std: of each channel, for uint8 images.

        Returns:
            (B, T + n, D).

        Raises:
            ValueError: for an image size that the model was not built for.
        """
        # a batch whose layout is wrong altogether is for the kernel's own checks to name
        first, channels = (1, 3) if image.dtype == torch.uint8 else (2, 1)
        strict = self.img_size is not None and self.strict_img_size
        well_formed = image.dim() == 4 and image.shape[channels] == self.proj.in_channels
        if well_formed and strict:
            size = tuple(image.shape[first : first + 2])
            if size != tuple(self.img_size):
                got, expected = (" x ".join(map(str, s)) for s in (size, self.img_size))
                raise ValueError(f"image is {got}, the model was built for {expected}")
        if well_formed and (strict or self.img_size is None):
            for dim, patch in zip((first, first + 1), self.patch_size, strict=True):
                # as the convolution: a margin that fills no patch is left out
                image = image.narrow(dim, 0, image.shape[dim] // patch * patch)
        return kernels.patch_embed(
            image, self.proj.weight, self.proj.bias, pos_embed, prefix_tokens, mean, std,
            implementation=self.backend,
        )  # fmt: skip
