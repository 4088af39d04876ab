"""accelerate and restore: what is replaced, what is skipped and why, and that both are exact."""

import pytest
import timm
import torch
from checking import assert_close, assert_equal
from modelling import TINY, images, tiny_pair
from small_models import unfused
from torch import nn
from torch.nn.utils import prune

import deit_fast
from deit_fast import layers
from deit_fast.kernels import _chips


def test_report_of_a_deit():
    model = timm.create_model("deit_tiny_distilled_patch16_224", **TINY)
    report = deit_fast.accelerate(model)
    counts = {kind: len(names) for kind, names in report.replaced.items()}
    assert counts == {
        "VisionTransformerDistilled": 1, "PatchEmbed": 1, "Block": 2, "LayerNorm": 5,
        "Attention": 2, "Mlp": 2,
    }  # fmt: skip
    assert report.skipped == [] and report.replaced["Attention"] == [
        "blocks.0.attn",
        "blocks.1.attn",
    ]
    assert "replaced: 1 VisionTransformerDistilled" in str(report) and "backend: auto" in str(
        report
    )


@pytest.mark.parametrize(
    "options, name, reason",
    [
        ({"qk_norm": True}, "blocks.0.attn", "normalises q and k"),
        ({"act_layer": "gelu_tanh"}, "blocks.1.mlp", "not the exact GELU"),
        ({"act_layer": "relu"}, "blocks.1", "mlp stays with timm"),
        ({"num_heads": 4}, "blocks.0.attn", "head dimension 16"),
        ({"scale_attn_norm": True}, "blocks.0.attn", "norm before the projection"),
        ({"scale_mlp_norm": True}, "blocks.0.mlp", "norm between fc1 and fc2"),
        ({"dynamic_img_pad": True}, "patch_embed", "pads images"),
        ({"in_chans": 6}, "patch_embed", "6 input channels"),
        ({"norm_layer": "rmsnorm"}, "blocks.0", "norm1 is a RmsNorm"),
    ],
)
def test_skipped_modules_have_a_reason(options, name, reason):
    model = timm.create_model("deit_tiny_patch16_224", **TINY | options).eval()
    x = torch.randn(1, options.get("in_chans", 3), 64, 64)
    expected = model(x)
    report = deit_fast.accelerate(model)
    reasons = {module.name: module.reason for module in report.skipped}
    assert reason in reasons[name]
    assert reason in str(report)
    assert_close(model(x), expected)


def test_a_layer_norm_that_is_not_over_the_last_dimension_alone_is_skipped():
    model = nn.Sequential(
        nn.LayerNorm((4, 8)), nn.LayerNorm(8, elementwise_affine=False), nn.LayerNorm(8)
    )
    report = deit_fast.accelerate(model)
    assert report.replaced == {"LayerNorm": ["2"]}
    assert [
        "2 dimensions" in report.skipped[0].reason,
        "no weight" in report.skipped[1].reason,
    ] == [True] * 2


def test_classes_of_a_kind_without_replacement_are_listed():
    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1))
    skipped = {m.kind for m in deit_fast.accelerate(model).skipped}
    assert "WindowAttention" in skipped and "SwinTransformerBlock" in skipped


def test_subclasses_are_not_replaced():
    class Mine(timm.layers.Mlp):
        def forward(self, x):
            return x

    model = nn.Sequential(Mine(4), nn.LayerNorm(4))
    report = deit_fast.accelerate(model)
    assert type(model[0]) is Mine and list(report.replaced) == ["LayerNorm"]


def test_restore_is_exact():
    reference, fast = tiny_pair()
    before = {name: type(m) for name, m in reference.named_modules()}
    deit_fast.set_heads(fast, "class")
    parameters = dict(fast.named_parameters())
    assert deit_fast.restore(fast) is fast
    assert {name: type(m) for name, m in fast.named_modules()} == before
    for name, module in fast.named_modules():
        assert module.__dict__.keys() == reference.get_submodule(name).__dict__.keys(), name
    assert all(p is parameters[name] for name, p in fast.named_parameters())
    x = images(reference)
    assert_equal(fast(x), reference(x))
    deit_fast.restore(nn.LayerNorm(3))  # nothing to undo is no error

    torchs = nn.Sequential(nn.LayerNorm(4))
    deit_fast.accelerate(torchs)
    assert type(deit_fast.restore(torchs)[0]) is nn.LayerNorm


def test_parameters_hooks_and_mode_stay():
    model = timm.create_model("deit_tiny_patch16_224", **TINY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    model.blocks[0].register_forward_hook(lambda *args: seen.append("block"))
    parameters = [id(p) for p in model.parameters()]
    deit_fast.accelerate(model)
    assert [id(p) for p in model.parameters()] == parameters and model.training
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    before.square().mean().backward()
    optimizer.step()
    assert seen == ["block"] and not torch.equal(model(x), before)


def test_accelerating_twice_changes_the_backend():
    _, fast = tiny_pair("torch")
    report = deit_fast.accelerate(fast, "auto")
    assert len(report.replaced["Block"]) == 2
    assert {m.backend for m in fast.modules() if hasattr(m, "backend")} == {"auto"}


def test_a_pruned_model_is_replaced_and_its_pruned_layers_are_called():
    """Pruning recomputes the weight in a hook of the layer, which a fused operation never calls."""
    reference, fast = tiny_pair()
    deit_fast.restore(fast)
    for model in (reference, fast):
        prune.l1_unstructured(model.blocks[0].attn.qkv, "weight", 0.5)
    report = deit_fast.accelerate(fast, "torch")
    assert report.skipped == [] and [m.name for m in report.unfused] == ["blocks.0"]
    assert report.unfused[0].reason == "attn.qkv has a forward pre-hook: called, the rest is fused"
    x = images(reference)
    assert_close(fast(x), reference(x))


def test_classes_build_as_timms_do():
    """Injected by constructor, without accelerate."""
    model = timm.models.VisionTransformer(
        **TINY, block_fn=layers.Block, attn_layer=layers.Attention, mlp_layer=layers.Mlp,
        norm_layer=layers.LayerNorm, embed_layer=layers.PatchEmbed,
    ).eval()  # fmt: skip
    reference = timm.models.VisionTransformer(**TINY).eval()
    reference.load_state_dict(model.state_dict())
    assert type(model.blocks[0]) is layers.Block and type(model.blocks[0].attn) is layers.Attention
    x = torch.randn(2, 3, 64, 64)
    assert_close(model(x), reference(x))
    assert type(deit_fast.restore(model).blocks[0].mlp) is timm.layers.Mlp


def test_backend_names_and_environment(monkeypatch):
    _, fast = tiny_pair()
    with pytest.raises(ValueError, match=r"backend: 'cuda' \(asked for\), expected one of"):
        deit_fast.accelerate(fast, "cuda")
    monkeypatch.setenv("DEIT_FAST_BACKEND", "torch")
    assert deit_fast.accelerate(fast, "auto").why_backend == "DEIT_FAST_BACKEND"
    assert fast.backend == "torch"
    monkeypatch.setenv("DEIT_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"'fast' \(DEIT_FAST_BACKEND\)"):
        deit_fast.accelerate(fast)


@pytest.mark.cpu("a machine without a GPU")
def test_triton_without_a_gpu_raises_and_changes_nothing(monkeypatch):
    monkeypatch.setattr(_chips, "INTERPRET", False)
    model = timm.create_model("deit_tiny_patch16_224", depth=1)
    with pytest.raises(RuntimeError, match=r"backend 'triton' \(asked for\) needs a CUDA device"):
        deit_fast.accelerate(model, "triton")
    assert not any("deit_fast" in type(module).__module__ for module in model.modules())


def test_nothing_to_replace():
    with pytest.raises(ValueError, match="nothing to replace in Sequential, expected a timm model"):
        deit_fast.accelerate(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="has no weight"):
        deit_fast.accelerate(nn.Sequential(nn.LayerNorm(3, elementwise_affine=False)))


def test_report_changes_nothing_and_needs_an_accelerated_model():
    reference, fast = tiny_pair()
    with pytest.raises(ValueError, match="nothing in VisionTransformerDistilled is accelerated"):
        deit_fast.report(reference)
    before = deit_fast.report(fast)
    assert before.replaced["Block"] == ["blocks.0", "blocks.1"] and before.backend == "torch"
    assert before.unfused == [] == before.skipped
    fast.blocks[1].attn = timm.layers.Attention(64, 2)
    later = deit_fast.report(fast)
    assert [(module.name, module.kind) for module in later.skipped] == [
        ("blocks.1.attn", "Attention")
    ]
    assert "came in since" in later.skipped[0].reason
    assert unfused(fast)["blocks.1"].startswith("attn stays with timm")
    assert deit_fast.accelerate(fast, "torch").unfused == []
