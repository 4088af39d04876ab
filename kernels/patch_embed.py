"""Image -> tokens: patches, projection, bias, position embedding and prefix tokens in one kernel.

    tokens[b, t]     = prefix[t] [+ pos[t]]                        t < T: class, distillation token
    tokens[b, T + n] = W . patch(b, n) + bias + pos[T + n or n]

Patches are read straight from the image: no im2col tensor, no transposed copy, no concatenation.
uint8 images are NHWC. Their normalisation is folded into the weights: with u the byte,
W' = W / (255 std) and

    W . (u / 255 - mean) / std  =  W' . (u - 128)  +  W . (128 / 255 - mean) / std

where u - 128 is exact in every dtype and centred enough to cost no accuracy.

Backward, with X (B, T + n, K) the patches after T rows of zeros:
    dW = dtokens^T @ X      dtokens summed over the batch, in fp32, is dprefix and dpos, and
                            summed over the patches too dbias
    dpatches = dtokens @ W  for a float image that wants its gradient
The rows of zeros cost 1% of the GEMM and save a copy of dtokens. The GEMMs and the sum are
PyTorch's: there is nothing to fuse with them.

B images of C channels in a grid of GH x GW patches of PH x PW pixels, D features, T prefix tokens;
M = B * GH * GW rows, K = C * PH * PW. Sums are fp32, rounded once, to the promoted dtype of weight,
positions and prefix. Saved tensors: image and weight.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from . import _checks, _dispatch, _plans, _policy


def _channels(values, like):
    """(C,) fp32 on like's device, by fills: a copy from the host would break a CUDA graph."""
    fills = [torch.full((), v, dtype=torch.float32, device=like.device) for v in values]
    return torch.stack(fills)


def normalize_reference(
    image: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normalise images: `(image / 255 - mean) / std`, computed in fp32 or better.

    Args:
        image: uint8 (B, H, W, C).
        mean: C values, in units of [0, 1] images.
        std: C values, in units of [0, 1] images.
        dtype: Of the result.

    Returns:
        (B, C, H, W).
    """
    wide = torch.promote_types(dtype, torch.float32)
    shift, scale = _channels(mean, image), _channels(std, image)
    return ((image.to(wide) / 255 - shift) / scale).permute(0, 3, 1, 2).to(dtype)


def patch_embed_reference(
    image: Tensor, weight: Tensor, bias: Tensor | None = None, pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:  # fmt: skip
    """`patch_embed` in PyTorch's operations: the definition of right."""
    if image.dtype == torch.uint8:
        # a uint8 image comes with both
        image = normalize_reference(image, mean, std, weight.dtype)  # type: ignore[arg-type]
    tokens = F.conv2d(image, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    T = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    covers_prefix = pos_embed is not None and pos_embed.shape[0] == T + tokens.shape[1]
    if pos_embed is not None and not covers_prefix:
        tokens = tokens + pos_embed
    if prefix_tokens is not None and T:
        tokens = torch.cat((prefix_tokens.expand(image.shape[0], -1, -1), tokens), dim=1)
    return tokens + pos_embed if pos_embed is not None and covers_prefix else tokens


@triton.jit
def _patch_embed_kernel(
    image_ptr, w_ptr, b_ptr, pos_ptr, prefix_ptr,  # in; the last three may be None
    y_ptr,  # out: (B, T + GH * GW, D)
    B, D, GH, GW,
    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, T: tl.constexpr, POS_T: tl.constexpr,
    NHWC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = C * PH * PW
    patches = GH * GW
    tiles_n = tl.cdiv(D, BLOCK_N)
    first_row = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M
    cols = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Samples are counted from the tile's first one. Only that one needs int64 (image and output may
    # exceed 2**31 elements); 32-bit offsets inside the tile take half the registers.
    first_sample = first_row // patches
    rows = (first_row % patches).to(tl.int32) + tl.arange(0, BLOCK_M)
    sample, patch = rows // patches, rows % patches
    in_rows = first_sample + sample < B
    safe_sample = tl.where(in_rows, sample, 0)
    safe_cols = tl.where(cols < D, cols, 0)
    image_ptr += first_sample * (C * PH * PW) * patches
    y_ptr += first_sample * (T + patches) * D

    # RUN consecutive elements of k are consecutive in memory, and the image is GW runs wide. The
    # compiler sees the alignment, and loads 16 bytes at a time, only in the form (...) * RUN.
    RUN: tl.constexpr = PW * C if NHWC else PW
    PLANES: tl.constexpr = 1 if NHWC else C
    first = (safe_sample * PLANES * GH * PH + patch // GW * PH) * GW + patch % GW
    ks = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + safe_cols[None, :] * K + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + ks
        line = k // RUN  # (plane, ky)
        line = line // PH * (GH * PH) + line % PH
        offs = (first[:, None] + (line * GW)[None, :]) * RUN + (k % RUN)[None, :]
        if K % BLOCK_K == 0:
            x, w = tl.load(image_ptr + offs), tl.load(w_ptrs)
        else:
            x = tl.load(image_ptr + offs, mask=(k < K)[None, :], other=0)
            w = tl.load(w_ptrs, mask=(k < K)[:, None], other=0.0)
        if NHWC:
            x = (x.to(tl.int16) - 128).to(w.dtype)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        w_ptrs += BLOCK_K

    in_cols = cols < D
    mask = in_rows[:, None] & in_cols[None, :]
    if b_ptr is not None:
        acc += tl.load(b_ptr + cols, mask=in_cols, other=0.0).to(tl.float32)[None, :]
    if pos_ptr is not None:
        pos_offs = (POS_T + patch)[:, None] * D + cols[None, :]
        acc += tl.load(pos_ptr + pos_offs, mask=mask, other=0.0).to(tl.float32)
    y_rows = sample * (T + patches) + T + patch
    tl.store(y_ptr + y_rows[:, None] * D + cols[None, :], acc, mask=mask)

    # The program that holds an image's first patch writes its prefix rows.
    first_rows = mask & (patch == 0)[:, None]
    for t in tl.static_range(T):
        value = tl.load(prefix_ptr + t * D + cols, mask=in_cols, other=0.0).to(tl.float32)
        if POS_T > 0:
            value += tl.load(pos_ptr + t * D + cols, mask=in_cols, other=0.0).to(tl.float32)
        y_offs = (y_rows - T + t)[:, None] * D + cols[None, :]
        tl.store(y_ptr + y_offs, tl.broadcast_to(value[None, :], (BLOCK_M, BLOCK_N)), first_rows)


@triton.jit
def _fold_pixels_kernel(
    w_ptr, b_ptr,  # in: (D, C, PIXELS) (D,) or None
    mean_0, mean_1, mean_2, mean_3, std_0, std_1, std_2, std_3,
    folded_ptr, shift_ptr,  # out: (D, PIXELS, C) (D,)
    C: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fold the normalisation of bytes into the weights of one feature."""
    d = tl.program_id(0)
    means, stds = (mean_0, mean_1, mean_2, mean_3), (std_0, std_1, std_2, std_3)
    pixels = tl.arange(0, BLOCK)
    inside = pixels < PIXELS
    shift = tl.zeros((BLOCK,), tl.float32)
    for c in tl.static_range(C):
        w = tl.load(w_ptr + (d * C + c) * PIXELS + pixels, mask=inside, other=0.0).to(tl.float32)
        w /= stds[c]
        shift += w * (128 / 255 - means[c])
        tl.store(folded_ptr + (d * PIXELS + pixels) * C + c, w / 255, mask=inside)
    bias = tl.sum(shift, axis=0)
    if b_ptr is not None:
        bias += tl.load(b_ptr + d).to(tl.float32)
    tl.store(shift_ptr + d, bias)


def meta(D: int, dtype: torch.dtype, nhwc: bool) -> dict:
    """Tiles by rule: 128 x 128 in 8 warps; half as wide where D does not fill such tiles."""
    if dtype == torch.float32:  # FMA units: registers hold the operands too
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    wide = D % 128 == 0
    return {
        "BLOCK_M": 128, "BLOCK_N": 128 if wide else 64, "BLOCK_K": 64,
        "num_warps": 8, "num_stages": 3,
    }  # fmt: skip


def _sizes(image, weight, prefix_tokens):
    """B, C, GH, GW, T."""
    PH, PW = weight.shape[2:]
    if image.dtype == torch.uint8:
        B, height, width, C = image.shape
    else:
        B, C, height, width = image.shape
    return B, C, height // PH, width // PW, 0 if prefix_tokens is None else prefix_tokens.shape[0]


def _alloc(image, weight, pos_embed, prefix_tokens):
    """What forward returns; also its fake, so the two cannot differ."""
    B, _, GH, GW, T = _sizes(image, weight, prefix_tokens)
    dtype = weight.dtype
    for added in (pos_embed, prefix_tokens):
        if added is not None:
            dtype = torch.promote_types(dtype, added.dtype)
    return weight.new_empty((B, T + GH * GW, weight.shape[0]), dtype=dtype)


def _fold(weight, bias, mean, std):
    """W' (D, PH, PW, C) for bytes minus 128, and its bias (D,) in fp32."""
    D, C, PH, PW = weight.shape
    folded, shift = weight.new_empty(D, PH, PW, C), weight.new_empty(D, dtype=torch.float32)
    mean, std = (tuple(t) + (0.0,) * (4 - C) for t in (mean, std))
    BLOCK = triton.next_power_of_2(PH * PW)
    with torch.cuda.device_of(weight):
        _plans.launch(
            _fold_pixels_kernel, (D,),
            weight, bias, *mean, *std, folded, shift, C=C, PIXELS=PH * PW, BLOCK=BLOCK,
        )  # fmt: skip
    return folded, shift


@_dispatch.custom_op("deit_fast::patch_embed")
def _fwd(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    prefix_tokens: Tensor | None,
    mean: list[float],
    std: list[float],
) -> Tensor:
    y = _alloc(image, weight, pos_embed, prefix_tokens)
    B, C, GH, GW, T = _sizes(image, weight, prefix_tokens)
    D, _, PH, PW = weight.shape
    if y.numel() == 0:
        return y
    nhwc = image.dtype == torch.uint8
    if nhwc:
        weight, bias = _fold(weight, bias, mean, std)
    pos_t = 0 if pos_embed is None else pos_embed.shape[0] - GH * GW
    config = meta(D, weight.dtype, nhwc)
    tiles = _dispatch.cdiv(B * GH * GW, config["BLOCK_M"]) * _dispatch.cdiv(D, config["BLOCK_N"])
    with torch.cuda.device_of(image):
        _plans.launch(_patch_embed_kernel, (tiles,),
            image, weight, bias, pos_embed, prefix_tokens, y, B, D, GH, GW,
            C=C, PH=PH, PW=PW, T=T, POS_T=pos_t, NHWC=nhwc, **config,
        )  # fmt: skip
    return y


@_fwd.register_fake
def _(image, weight, bias, pos_embed, prefix_tokens, mean, std):
    return _alloc(image, weight, pos_embed, prefix_tokens)


@_fwd.register_flops
def _(image, weight, bias, pos_embed, prefix_tokens, *args, out_shape):
    (B, rows, D), T = out_shape, 0 if prefix_tokens is None else prefix_tokens[0]
    return 2 * B * (rows - T) * D * math.prod(weight[1:])


def _save(ctx, inputs, output):
    image, weight, bias, pos_embed, prefix_tokens, ctx.mean, ctx.std = inputs
    ctx.save_for_backward(image, weight)
    ctx.T = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    ctx.pos = None if pos_embed is None else (pos_embed.shape[0], pos_embed.dtype)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.prefix_dtype = None if prefix_tokens is None else prefix_tokens.dtype


def _patches(image, weight, T):
    """X of the docstring, (B, T + n, C * PH * PW): an image's patches after T rows of zeros."""
    B, C, GH, GW, _ = _sizes(image, weight, None)
    PH, PW = weight.shape[2:]
    patches = image.new_zeros(B, T + GH * GW, C, PH, PW)
    grid = patches[:, T:].unflatten(1, (GH, GW)).permute(0, 3, 1, 4, 2, 5)
    grid.copy_(image.view(B, C, GH, PH, GW, PW))
    return patches.flatten(2)


def _backward(ctx, dy):
    image, weight = ctx.saved_tensors
    B, C, GH, GW, _ = _sizes(image, weight, None)
    (D, *_), T = weight.shape, ctx.T
    PH, PW = weight.shape[2:]
    over_batch = dy.sum(0, dtype=torch.float32)
    dy = dy.to(weight.dtype)
    dimage = dweight = dbias = dpos = dprefix = None
    if ctx.needs_input_grad[0]:
        dpatches = (dy[:, T:] @ weight.flatten(1)).view(B, GH, GW, C, PH, PW)
        dimage = dpatches.permute(0, 3, 1, 4, 2, 5).reshape(image.shape)
    if ctx.needs_input_grad[1]:
        if image.dtype == torch.uint8:
            image = normalize_reference(image, ctx.mean, ctx.std, weight.dtype).contiguous()
        patches = _patches(image, weight, T)
        dweight = (dy.reshape(-1, D).t() @ patches.flatten(0, 1)).view(weight.shape)
    if ctx.bias_dtype is not None:
        dbias = over_batch[T:].sum(0).to(ctx.bias_dtype)
    if ctx.pos is not None:
        length, dtype = ctx.pos
        dpos = over_batch[-length:].to(dtype)
    if ctx.prefix_dtype is not None:
        dprefix = over_batch[:T].to(ctx.prefix_dtype)
    return dimage, dweight, dbias, dpos, dprefix, None, None


_fwd.register_autograd(_backward, setup_context=_save)


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pos_embed: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Tokens of a batch of images, prefix rows included (DeiT paper, section 3; ViT, equation 1).

    n = H W / (PH PW) patches per image.

    Args:
        image: Float (B, C, H, W) in weight's dtype (under autocast both are cast); or uint8 (B, H,
            W, C), which `mean` and `std` normalise. H and W are multiples of PH and PW.
        weight: (D, C, PH, PW), 1 <= C <= 4.
        bias: (D,).
        pos_embed: (T + n, D), or (n, D) where the prefix tokens have no position.
        prefix_tokens: (T, D): class token, distillation token.
        mean: C values, in units of [0, 1] images; for uint8 images only, and required there.
        std: As `mean`.
        implementation: "auto" | "triton" | "torch".

    Returns:
        (B, T + n, D) in the promoted dtype of weight, pos_embed and prefix_tokens.

    Raises:
        ValueError: For shapes and devices that do not fit, and for a missing mean or std.
        TypeError: For dtypes that do not fit.
        RuntimeError: For "triton" where no kernel can run.
    """
    if image.dtype == torch.uint8:
        layout, channel_dim = "uint8 (B, H, W, C)", 3
    else:
        layout, channel_dim = "float (B, C, H, W)", 1
    if weight.dim() != 4 or not 1 <= weight.shape[1] <= 4:
        raise ValueError(
            f"patch_embed: weight has shape {tuple(weight.shape)}, "
            "expected (D, C, PH, PW) with 1 to 4 channels"
        )
    D, C, PH, PW = weight.shape
    if image.dim() != 4 or image.shape[channel_dim] != C:
        raise ValueError(
            f"patch_embed: image has shape {tuple(image.shape)}, expected {layout}, C = {C}"
        )
    height, width = (s for i, s in enumerate(image.shape[1:], 1) if i != channel_dim)
    if height % PH or width % PW or not height or not width:
        raise ValueError(
            f"patch_embed: image is {height} x {width}, expected positive multiples of {PH} x {PW}"
        )
    if image.dtype == torch.uint8:
        for name, value in (("mean", mean), ("std", std)):
            if value is None or len(value) != C:
                raise ValueError(
                    f"patch_embed: {name} is {value}, expected {C} values for a uint8 image"
                )
    elif not image.is_floating_point():
        raise TypeError(
            f"patch_embed: image has dtype {image.dtype}, expected floating point or uint8"
        )
    chosen = _policy.resolve("patch_embed", weight, implementation)
    dtype = _checks.autocast_dtype(image)
    if dtype is None and image.dtype not in (torch.uint8, weight.dtype):
        raise TypeError(
            f"patch_embed: image has dtype {image.dtype}, expected weight's {weight.dtype} or uint8"
        )
    n = (height // PH) * (width // PW)
    T = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    rows = n if pos_embed is not None and pos_embed.shape[0] == n else T + n
    _checks.expect(
        "patch_embed", image, weight=(weight, weight.shape), bias=(bias, (D,)),
        pos_embed=(pos_embed, (rows, D)), prefix_tokens=(prefix_tokens, (T, D)),
    )  # fmt: skip
    if chosen == "torch":
        return patch_embed_reference(image, weight, bias, pos_embed, prefix_tokens, mean, std)
    weight, bias = _checks.cast(dtype, weight, bias)
    if image.dtype != torch.uint8:
        image = image.to(weight.dtype)
    image = image.contiguous()
    tensors = (t if t is None else t.contiguous() for t in (weight, bias, pos_embed, prefix_tokens))
    return _fwd(image, *tensors, list(mean or ()), list(std or ()))
