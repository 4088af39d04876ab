"""ViT and DeiT against timm on the same weights: PyTorch backend and Triton."""

import copy
import sys

import pytest
import selection
import timm
import torch
from checking import (
    NO_CODE,
    assert_as_accurate,
    assert_close,
    assert_differ,
    seed,
    seeded,
)
from model_checks import assert_awkward_batches, assert_copies, assert_exports, uint8_and_floats
from modelling import (
    PRECISIONS,
    assert_precision,
    assert_same_logits,
    images,
    pair,
    randomize,
    tiny_pair,
)
from tiers import slow, slow_but
from torch import nn

import deit_fast
from deit_fast import layers
from deit_fast.kernels.layer_norm_linear import configs

VARIANTS = {
    "square": {"img_size": 160},
    "wide": {"img_size": (192, 256)},
    "no classes": {"num_classes": 0},
    "ten classes": {"num_classes": 10},
    "grey": {"in_chans": 1},
    "patch 32": {"patch_size": 32},
    "no qkv bias": {"qkv_bias": False},
    "LayerScale": {"init_values": 1e-4},
    "margin no patch covers": {"img_size": (70, 64)},
    "drop path": {"drop_path_rate": 0.3, "drop_rate": 0.2},
    "no final norm": {"final_norm": False},
}


@pytest.mark.parametrize("distilled", [False, True], ids=["", "distilled"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, distilled):
    reference, fast = tiny_pair(distilled=distilled, **VARIANTS[variant])
    assert_same_logits(reference, fast, images(reference))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("deit3_small_patch16_224", {"depth": 2}),
        ("vit_small_patch16_224", {"depth": 2, "reg_tokens": 3}),
        ("vit_small_patch16_224", {"depth": 2, "global_pool": "avg"}),
        ("vit_small_patch16_224", {"depth": 2, "class_token": False, "global_pool": "avg"}),
        ("vit_small_patch16_224", {"depth": 2, "global_pool": "map"}),
        ("vit_small_patch16_224", {"depth": 2, "fc_norm": True}),
        ("deit_tiny_distilled_patch16_224", {"depth": 2, "fc_norm": True}),
        ("vit_base_patch16_clip_224", {"depth": 2}),  # norm_pre, no patch bias
        ("vit_small_patch14_dinov2", {"depth": 2, "img_size": 70}),
        ("vit_base_patch16_siglip_224", {"depth": 2}),  # tanh GELU: Mlp stays with timm
        ("vit_base_patch16_224", {"depth": 1}),
        ("vit_large_patch16_224", {"depth": 1, "img_size": 64}),
        ("deit3_huge_patch14_224", {"depth": 2, "img_size": 56}),  # head dimension 80
        ("vit_small_patch16_224", {"depth": 2, "qk_norm": True}),
        ("vit_small_patch16_224", {"depth": 2, "pos_embed": "none"}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}),
    ],
)
def test_other_timm_models(name, options):
    reference, fast = pair(name, **options)
    size = reference.patch_embed.img_size or (224, 224)
    seed(1)
    assert_same_logits(reference, fast, torch.randn(2, 3, *size))


@pytest.mark.parametrize("distilled", [False, True], ids=["", "distilled"])
def test_dynamic_img_size(distilled):
    reference, fast = tiny_pair(distilled=distilled, dynamic_img_size=True, img_size=(64, 32))
    for size in ((64, 32), (32, 64), (96, 48)):
        assert_same_logits(reference, fast, images(reference, size=size))


TRITON_VARIANTS = {
    "distilled": {},
    "plain": {"distilled": False},
    "LayerScale": {"init_values": 1e-4, "no_embed_class": True, "distilled": False},
    "no qkv bias": {"qkv_bias": False},
    "d = 32, patch 14": {
        "embed_dim": 64,
        "num_heads": 2,
        "patch_size": 14,
        "img_size": 42,
        "in_chans": 1,
    },
    "d = 48": {"embed_dim": 96, "num_heads": 2, "distilled": False},
    "d = 80": {"embed_dim": 160, "num_heads": 2, "init_values": 1e-4, "distilled": False},
    "no classes": {"num_classes": 0},
}


@pytest.mark.parametrize("variant", slow_but(TRITON_VARIANTS, "distilled", "LayerScale"))
def test_every_triton_kernel_in_a_shallow_model(variant, device):
    options = {"embed_dim": 128, "num_heads": 2} | TRITON_VARIANTS[variant]
    reference, fast = tiny_pair("triton", **options)
    reference, fast = reference.to(device), fast.to(device)
    assert_same_logits(reference, fast, images(reference).to(device))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_uint8_images(backend, device):
    reference, fast = tiny_pair(backend)
    reference, fast = reference.to(device), fast.to(device)
    image, floats = uint8_and_floats(reference, 64, device)
    with torch.no_grad():
        assert_close(fast(image), reference(floats))
    del fast.pretrained_cfg
    with pytest.raises(ValueError, match="mean is None"):
        fast(image)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("heads", ["joint", "joint_softmax", "class", "distill"])
def test_heads(heads, backend, device):
    reference, fast = tiny_pair(backend)
    reference, fast = reference.to(device), fast.to(device)
    deit_fast.set_heads(fast, heads)
    x = images(reference).to(device)
    with torch.no_grad():
        features = reference.forward_features(x)
        a, b = reference.head(features[:, 0]), reference.head_dist(features[:, 1])
        expected = {
            "joint": (a + b) / 2, "joint_softmax": a.softmax(1) + b.softmax(1),
            "class": a, "distill": b,
        }[heads]  # fmt: skip
        assert_close(fast(x), expected)
    assert_close(fast(x), expected)  # the path with gradients


IN_PLACE = {
    "head": lambda m: setattr(m, "head", nn.Sequential(nn.ReLU(inplace=True), m.head)),
    "dropout": lambda m: setattr(m, "head_drop", nn.Dropout(0.5, inplace=True)),
    "hook": lambda m: m.head.register_forward_pre_hook(lambda _, args: args[0].mul_(2)),
    "nothing": lambda m: None,
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_heads_may_change_their_input_in_training(change):
    """Both heads' logits and all gradients, as timm's: autograd forbids it for some views."""
    got = []
    for model in tiny_pair():
        IN_PLACE[change](model.train())
        model.set_distilled_training(True)
        seed(0)  # the dropout's
        logits = model(images(model))
        torch.stack(logits).square().sum().backward()
        got.append((*logits, *(p.grad for p in model.parameters())))
    for ours, timms in zip(got[1], got[0], strict=True):
        assert_close(ours, timms)


def test_the_last_block_runs_for_the_prefix_tokens_alone(monkeypatch):
    _, fast = tiny_pair()
    x = images(fast)
    rows = []
    real = layers.Mlp.branch

    def spy(self, x, *args, **kwargs):
        rows.append(x.shape[1])
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(layers.Mlp, "branch", spy)
    with torch.no_grad():
        fast(x)
    assert rows == [18, 2]
    rows.clear()
    fast.train()(x)
    assert rows == [18, 2]
    rows.clear()
    fast.forward_features(x)
    assert rows == [18, 18]


def test_features_and_intermediates():
    reference, fast = tiny_pair()
    x = images(reference)
    assert_close(fast.forward_features(x), reference.forward_features(x))
    for options in ({}, {"return_prefix_tokens": True, "norm": True}, {"output_fmt": "NLC"}):
        assert_close(
            fast.forward_intermediates(x, **options), reference.forward_intermediates(x, **options)
        )
    got = fast.get_intermediate_layers(x, 1)
    assert_close(got, reference.get_intermediate_layers(x, 1))
    assert_close(
        fast.forward_head(fast.forward_features(x), pre_logits=True),
        reference.forward_head(reference.forward_features(x), pre_logits=True),
    )


def test_patch_embed_of_any_size_leaves_a_margin_out():
    reference = timm.layers.PatchEmbed(img_size=None, patch_size=16, embed_dim=32)
    fast = copy.deepcopy(reference)
    deit_fast.accelerate(fast, "torch")
    x = torch.randn(2, 3, 40, 56)
    assert fast(x).shape == (2, 6, 32)
    assert_close(fast(x), reference(x))


def test_features_only_wrapper():
    options = {"features_only": True, "depth": 3, "img_size": 64, "out_indices": (0, 2)}
    reference = randomize(
        timm.create_model("deit_tiny_patch16_224", **options), seed=seeded(0)
    ).eval()
    fast = copy.deepcopy(reference)
    deit_fast.accelerate(fast, "torch")
    x = torch.randn(2, 3, 64, 64)
    assert_close(fast(x), reference(x))


def test_dropout_left_on_in_eval_stays_on():
    """Monte-Carlo dropout, in timm's path and in that of a single head."""
    for heads in ("joint", "class"):
        _, fast = tiny_pair(drop_rate=0.5, distilled=heads == "class")
        deit_fast.set_heads(fast, heads)
        x = images(fast)
        with torch.no_grad():
            assert torch.equal(fast(x), fast(x))
            fast.head_drop.train()
            assert not torch.equal(fast(x), fast(x))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_second_order_gradients(backend, device):
    """A penalty on the gradient's norm, as WGAN-GP or SAM-like methods use."""
    reference, fast = tiny_pair(backend, depth=1)
    x = images(reference).to(device)
    penalties = []
    for model in (fast, reference):
        model = model.to(device)
        image = x.clone().requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (grad,) = torch.autograd.grad(model(image).sum(), image, create_graph=True)
            penalty = grad.square().sum()
            parameters = [model.blocks[0].norm1.weight, model.patch_embed.proj.weight]
            penalties.append((penalty, *torch.autograd.grad(penalty, parameters)))
    assert_close(penalties[0], penalties[1])


def test_export_with_a_dynamic_batch_and_the_meta_device():
    reference, fast = tiny_pair()
    assert_exports(reference, fast, images(reference))


def test_classifier_surgery():
    reference, fast = tiny_pair()
    assert fast.get_classifier() == (fast.head, fast.head_dist)
    fast.reset_classifier(5)
    reference.reset_classifier(5)
    fast.load_state_dict(reference.state_dict())
    assert_same_logits(reference, fast, images(reference))
    fast.reset_classifier(0)
    reference.reset_classifier(0)
    assert_same_logits(reference, fast, images(reference))


def test_masks_given_at_run_time_go_through_timm():
    reference, fast = tiny_pair()
    x, mask = images(reference), torch.rand(18, 18) > 0.3
    mask.fill_diagonal_(True)
    with torch.no_grad():
        assert_close(fast(x, attn_mask=mask), reference(x, attn_mask=mask))
        assert_differ(fast(x), fast(x, attn_mask=mask))
        causal = reference(x, is_causal=True)
        assert_close(fast(x, is_causal=True), causal)


@pytest.mark.slow
@pytest.mark.parametrize("backend, compiler", [
    ("torch", NO_CODE), pytest.param("triton", "inductor", marks=pytest.mark.slow),
])  # fmt: skip
def test_compiles_into_one_graph(backend, compiler, device):
    """Inductor has the kernels to call; without any there are PyTorch's operators alone."""
    if compiler == "inductor":
        selection.compiler()
    reference, fast = tiny_pair(backend)
    reference, fast = reference.to(device), fast.to(device)
    x = images(reference).to(device)
    compiled = torch.compile(fast, fullgraph=True, backend=compiler)
    with torch.no_grad():
        for batch in (x, torch.cat((x, x[:1]))):  # the second with a dynamic batch size
            assert_close(compiled(batch), reference(batch))
    expected = torch.autograd.grad(reference(x).sum(), list(reference.parameters()))
    got = torch.autograd.grad(compiled(x).sum(), list(fast.parameters()))
    assert_close(got, expected)


@pytest.mark.parametrize("backend", [slow("torch"), "triton"])
@pytest.mark.parametrize("precision", slow_but(PRECISIONS, "bf16", "autocast bf16"))
def test_precisions(precision, backend, device):
    """Under autocast half-precision GEMMs around an fp32 residual stream."""
    reference, fast = tiny_pair(backend)
    assert_precision(reference, fast, images(reference), precision, device)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_copies_and_state_dict(backend, device):
    reference, fast = tiny_pair(backend)
    fast = fast.to(device)
    x = images(reference).to(device)
    other = randomize(tiny_pair(backend)[1].to(device), seed=5)
    assert_copies(fast, other, x, backend)
    with torch.no_grad():
        expected = fast(x)
        # weights that were replaced are used
        other.load_state_dict(randomize(reference, seed=7).state_dict(), assign=True)
        assert_differ(other.to(device)(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_awkward_batches(backend, device):
    reference, fast = tiny_pair(backend)
    fast = fast.to(device)
    x = images(reference, batch=4).to(device)
    with torch.no_grad():
        expected = fast(x)
    assert_awkward_batches(fast, x, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_images_are_named(backend, device):
    fast = tiny_pair(backend)[1].to(device)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"image has shape \(2, 4, 64, 64\).*C = 3"):
            fast(torch.zeros(2, 4, 64, 64, device=device))
        with pytest.raises(ValueError, match="image is 64 x 80, the model was built for 64 x 64"):
            fast(torch.zeros(2, 3, 64, 80, device=device))
        with pytest.raises(TypeError, match="image has dtype torch.float16, expected"):
            fast(torch.zeros(2, 3, 64, 64, device=device).half())
        with pytest.raises(ValueError, match=r"image has shape \(3, 64, 64\)"):
            fast(torch.zeros(3, 64, 64, device=device))
        with pytest.raises(ValueError, match=r"image has shape .*expected uint8 \(B, H, W, C\)"):
            fast(torch.zeros(2, 3, 64, 64, device=device, dtype=torch.uint8))


@pytest.mark.gpu("a real capture, and the choices of the policy on this chip")
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_cuda_graph_and_auto_backend_on_a_gpu(uint8):
    reference, fast = tiny_pair("auto", embed_dim=128)
    reference, fast = reference.cuda().half(), fast.cuda().half()
    x = images(reference, batch=4).cuda().half()
    if uint8:
        x = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8, device="cuda")
    with torch.no_grad():
        expected = fast(x)  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fast(x)
        x.copy_(x.flip(0))
        graph.replay()
        assert_close(out, expected.flip(0))
        if not uint8:
            exact = copy.deepcopy(reference).double()(x.double())
            assert_as_accurate(out, reference(x), exact)
            # float64 is not for the kernels: PyTorch computes it
            assert_close(fast.double()(x.double()), exact)


@pytest.mark.slow
def test_folded_layer_norms_and_row_stats_through_the_whole_model(device, monkeypatch):
    """Half precision in Triton: every LayerNorm in front of many rows is folded. Its row statistics
    come from the GEMM before, the first ones from a kernel of their own."""
    reference, fast = (m.to(device) for m in tiny_pair("triton", depth=2))
    x = images(reference, batch=86).to(device).half()  # rows enough to fold without row statistics
    # ... were the model wide enough for its GEMMs to be many multiply-adds
    monkeypatch.setattr(configs, "LARGEST_PROLOGUE", {True: 0, False: 0})
    seen = []
    module = sys.modules["deit_fast.kernels.layer_norm_linear.op"]
    real = module._fwd

    def spy(*args):
        seen.append((args[3].shape[0], args[5] is not None))
        return real(*args)

    monkeypatch.setattr(module, "_fwd", spy)
    exact = copy.deepcopy(reference).half().double()
    with torch.no_grad():
        got = fast.half()(x)
        assert_as_accurate(got, reference.half()(x), exact(x.double()))
    # qkv, fc1, then keys and values alone: the prefix tokens' rows are few
    assert seen == [(192, False), (256, True), (128, True)]
    seen.clear()
    with torch.no_grad():
        features, torchs = (m.forward_features(x) for m in (fast, reference))
        assert_as_accurate(features, torchs, exact.forward_features(x.double()))
    assert [has for _, has in seen] == [False, True, True, True]
    seen.clear()
    fast(x[:2])  # with gradients on nothing is folded
    assert not seen
