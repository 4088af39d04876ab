"""Static activation scales: the bound holds, and calibration sees every image."""

import copy

import pytest
import timm
import torch
from checking import (
    assert_close,
)
from modelling import TINY, tiny_pair
from quantized_models import logits

import deit_fast
from deit_fast.kernels import layer_norm_quantized
from deit_fast.kernels.quantize import (
    LIMITS,
)
from deit_fast.quantization import quantized_layers

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("offset", [0.1, 1.0])
def test_the_bound_is_never_passed(offset):
    """Rows made to reach as far as a feature can, along its weights, through the quantized
    layers; where the weights have much in common rounding reaches further than what they say."""
    _, fast = tiny_pair(distilled=False)
    block = fast.blocks[0]
    for linear in (block.attn.qkv, block.mlp.fc1):
        linear.weight.data *= 0.3
        linear.weight.data += offset
    block.attn.qkv.bias.data -= 3
    undone = copy.deepcopy(block)
    deit_fast.quantize(fast, "fp8", attention=True)
    for part, norm, plain, linear, scale in (
        ("qkv", "norm1", undone.attn.qkv, block.attn.qkv, block.attn.qkv.output_scale),
        ("proj", "norm1", undone.attn.qkv, block.attn.qkv, block.attn.proj.input_scale),
        ("fc2", "norm2", undone.mlp.fc1, block.mlp.fc1, block.mlp.fc2.input_scale),
    ):
        norm = getattr(undone, norm)
        rows = (plain.weight * norm.weight).detach()
        rows -= rows.mean(1, keepdim=True)
        rows = 1e3 * torch.cat((rows, -rows))
        operand = layer_norm_quantized(rows, norm.weight, norm.bias, norm.eps)
        reached = linear.project(operand, rows)
        if part == "proj":
            reached = reached[:, -plain.in_features :]
        reached = (reached if part == "fc2" else reached.abs()).max().item()
        limit = LIMITS[FP8] * scale.item()
        assert (0.6 if offset == 0.1 else 0.1) * limit < reached < limit, part


def test_calibration_reads_images_in_every_way():
    """The largest value of all images, twice; the model's modes and hooks are as they were."""
    x = torch.randn(5, 3, 64, 64)
    _, fast = tiny_pair(drop_path_rate=0.9)
    fast.train()
    fast.blocks[0].eval()
    before = [m.training for m in fast.modules()]
    seen = []

    def hook(module, args):
        seen.append(args[0].abs().max().item())

    reference = timm.create_model("deit_tiny_distilled_patch16_224", **TINY).eval()
    reference.load_state_dict(fast.state_dict())
    reference.blocks[1].mlp.fc2.register_forward_pre_hook(hook)
    for image in x:
        logits(reference, image[None])
    x = x[torch.tensor(seen).argsort(descending=True)]  # the largest value comes first
    scales = []
    for calibration in (
        x,
        [x[:2], x[2:]],
        ((x[i : i + 1], torch.tensor([i])) for i in range(5)),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.arange(5)), 2),
    ):
        model = copy.deepcopy(fast)
        report = deit_fast.quantize(model, "fp8", calibration)
        assert report.scales == "static, calibrated on 5 images"
        assert [m.training for m in model.modules()] == before
        assert not any(m._forward_hooks for m in model.modules())
        scales.append(model.blocks[1].mlp.fc2.input_scale.item())
    assert_close(torch.tensor(scales), torch.tensor([2 * max(seen) / 448] * 4))
    as_bytes = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    assert "calibrated on 2 images" in str(deit_fast.quantize(copy.deepcopy(fast), "fp8", as_bytes))


@pytest.mark.parametrize(
    "calibration, error, message",
    [
        (torch.zeros(2, 3, 32, 32), ValueError, r"\(2, 3, 32, 32\).*expected \(B, 3, 64, 64\)"),
        (torch.zeros(3, 64, 64), ValueError, r"\(3, 64, 64\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), ValueError, r"expected \(B, 64, 64, 3\)"),
        (torch.zeros(0, 3, 64, 64), ValueError, "no images came"),
        ([], ValueError, "no images came"),
        (iter(()), ValueError, "no images came"),
        (["a.jpg"], TypeError, "a batch is a str"),
        (3, TypeError, "calibration: int, expected"),
        (torch.full((1, 3, 64, 64), torch.nan), ValueError, "input of blocks.0.attn.proj became"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), TypeError, "images in torch.int64"),
    ],
    ids=range(10),
)
def test_calibration_that_does_not_fit(calibration, error, message):
    _, fast = tiny_pair()
    types = [type(m) for m in fast.modules()]
    with pytest.raises(error, match=message):
        deit_fast.quantize(fast, "fp8", calibration)
    assert [type(m) for m in fast.modules()] == types
    assert not quantized_layers(fast) and not fast.blocks[0].attn.proj._forward_hooks
