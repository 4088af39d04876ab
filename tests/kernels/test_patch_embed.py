"""patch_embed against fp64: float NCHW and uint8 NHWC, any patch, grid, channels and prefix."""

from functools import partial

import pytest
import torch
from checking import DOT_DTYPES, FP16, FP32, assert_as_accurate, assert_close, check, check_compiles

from deit_fast.kernels import cases, patch_embed, patch_embed_reference
from deit_fast.kernels.cases import MEAN, STD
from deit_fast.kernels.cases import patch_embed_inputs as make_inputs
from deit_fast.kernels.patch_embed import _fwd, normalize_reference

triton_patch_embed = partial(patch_embed, implementation="triton")


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("case", cases.PATCH_EMBED, ids=str)
def test_no_less_accurate_than_torch(case, uint8, dtype, device):
    inputs = make_inputs(**case, uint8=uint8, device=device)
    check(triton_patch_embed, patch_embed_reference, inputs, dtype)


def test_bare_projection(device):
    inputs = make_inputs(2, (32, 32), (16, 16), 3, 64, 0, False, device=device)
    del inputs["bias"], inputs["pos_embed"]
    check(triton_patch_embed, patch_embed_reference, inputs, FP32)


@pytest.mark.slow
def test_deit_tiny_shape(device):
    inputs = make_inputs(1, (224, 224), (16, 16), 3, 192, 2, True, uint8=True, device=device)
    got = triton_patch_embed(**inputs)
    assert got.shape == (1, 198, 192)
    assert_close(got, patch_embed_reference(**inputs))


def test_normalization_is_torchvisions():
    from torchvision.transforms.v2.functional import normalize

    image = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    expected = normalize(image.permute(0, 3, 1, 2).float() / 255, MEAN[:3], STD[:3])
    assert_close(normalize_reference(image, MEAN[:3], STD[:3]), expected)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_bytes_cost_no_accuracy(value, device):
    """The folded bias cancels against the matmul; black and white are the hardest."""
    inputs = make_inputs(1, (32, 32), (16, 16), 3, 64, 0, False, uint8=True, device=device)
    inputs["image"].fill_(value)
    check(triton_patch_embed, patch_embed_reference, inputs, FP16, grads=False)


def test_channels_last_and_cropped_images(device):
    inputs = make_inputs(2, (32, 48), (16, 16), 3, 64, 1, True, device=device)
    expected = patch_embed_reference(**inputs)
    image = inputs.pop("image")
    for view in (
        image.to(memory_format=torch.channels_last),
        torch.nn.functional.pad(image, (3, 2, 1, 0))[:, :, 1:, 3:-2],
    ):
        assert not view.is_contiguous()
        assert_close(triton_patch_embed(view, **inputs), expected)


def test_nan_pixel_stays_in_its_token(device):
    inputs = make_inputs(2, (32, 32), (16, 16), 3, 64, 2, True, device=device)
    inputs["image"][1, 0, 20, 3] = torch.nan
    tokens = triton_patch_embed(**inputs).isnan()
    assert tokens[1, 2 + 2].all() and tokens.any(2).sum() == 1


def test_autocast_keeps_the_residual_stream_in_fp32(device):
    inputs = make_inputs(2, (32, 32), (16, 16), 3, 64, 2, True, device=device)
    exact = patch_embed_reference(**{k: t.double() for k, t in inputs.items()})
    with torch.autocast(device, FP16):
        got, torchs = triton_patch_embed(**inputs), patch_embed_reference(**inputs)
    assert got.dtype == FP32
    assert_as_accurate(got, torchs, exact)


def test_prefix_tokens_carry_their_dtype(device):
    """Without positions the class token keeps the residual stream in fp32 under autocast, as in
    timm."""
    inputs = make_inputs(2, (32, 32), (16, 16), 3, 64, 2, True, device=device)
    del inputs["pos_embed"]
    with torch.autocast(device, FP16):
        got, expected = triton_patch_embed(**inputs), patch_embed_reference(**inputs)
    assert got.dtype == expected.dtype == FP32
    assert_close(got, expected, dtype=FP16)


def test_op_contract(device):
    inputs = make_inputs(1, (32, 32), (16, 16), 3, 32, 2, True, device=device)
    tensors = [t.requires_grad_() for t in inputs.values()]
    torch.library.opcheck(_fwd.op, (*tensors, [], []))
    inputs = make_inputs(1, (32, 32), (16, 16), 3, 32, 2, False, uint8=True, device=device)
    image, weight = inputs["image"], inputs["weight"]
    torch.library.opcheck(_fwd.op, (image, weight, None, None, None, list(MEAN[:3]), list(STD[:3])))


def test_compiles_into_one_graph(device):
    leaves = make_inputs(1, (32, 32), (16, 16), 3, 32, 2, True, device=device).values()

    def f(image, weight, bias, pos_embed, prefix_tokens):
        return triton_patch_embed(image.sin(), weight, bias, pos_embed, prefix_tokens).cos()

    check_compiles(f, leaves)


def test_bad_input_is_named():
    inputs = make_inputs(1, (32, 32), (16, 16), 3, 32, 2, True)
    image, weight = inputs["image"], inputs["weight"]
    with pytest.raises(
        ValueError, match=r"image has shape \(1, 2, 32, 32\), expected float .*C = 3"
    ):
        patch_embed(image[:, :2], weight)
    with pytest.raises(
        ValueError, match="image is 32 x 31, expected positive multiples of 16 x 16"
    ):
        patch_embed(image[..., :31], weight)
    with pytest.raises(ValueError, match=r"image has shape .* expected uint8 \(B, H, W, C\)"):
        patch_embed(image.byte(), weight, mean=MEAN[:3], std=STD[:3])
    with pytest.raises(ValueError, match="mean is None, expected 3 values for a uint8 image"):
        patch_embed(image.byte().permute(0, 2, 3, 1), weight)
    with pytest.raises(TypeError, match="image has dtype torch.int32"):
        patch_embed(image.int(), weight)
    with pytest.raises(
        TypeError, match="image has dtype torch.float16, expected weight's torch.float32"
    ):
        patch_embed(image.half(), weight)
    with pytest.raises(ValueError, match=r"pos_embed has shape \(3, 32\), expected \(4, 32\)"):
        patch_embed(image, weight, pos_embed=torch.zeros(3, 32))
    with pytest.raises(ValueError, match="1 to 4 channels"):
        patch_embed(image, weight.repeat(1, 2, 1, 1))
