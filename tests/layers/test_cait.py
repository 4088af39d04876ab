"""CaiT against timm on the same weights: all named models in PyTorch, all head counts in Triton."""

import copy

import pytest
import selection
import timm
import torch
from checking import (
    FP16,
    NO_CODE,
    assert_as_accurate,
    assert_close,
    assert_differ,
    assert_gradients_close,
    seed,
)
from model_checks import assert_awkward_batches, assert_copies, assert_exports, uint8_and_floats
from modelling import (
    PRECISIONS,
    assert_precision,
    assert_same_logits,
    gradients,
    hooked,
    images,
    pair,
    randomize,
)
from tiers import slow, slow_but
from torch.nn.parallel import DistributedDataParallel

import deit_fast
from deit_fast import layers
from deit_fast.bench import launches
from deit_fast.kernels._chips import Chip

NAMES = timm.list_models("cait_*")
H200 = Chip("NVIDIA H200", (9, 0), 132)


def tiny_cait(backend="torch", heads=4, **kwargs):
    """Of CaiT's width for that many heads, 9 patches."""
    options = {"embed_dim": 48 * heads, "num_heads": heads, "depth": 2, "depth_token_only": 2}
    options |= {"img_size": 48, "num_classes": 11}
    return pair("cait_xxs24_224", backend, **options | kwargs)


def test_ten_models_have_the_head_counts_that_are_tested():
    with torch.device("meta"):
        attention = [timm.create_model(name, depth=1).blocks[0].attn for name in NAMES]
    assert len(attention) == 10 and {a.num_heads for a in attention} == {4, 6, 8, 16}
    assert {a.proj.in_features // a.num_heads for a in attention} == {48}


@pytest.mark.parametrize("name", slow_but(NAMES, "cait_xxs24_224", "cait_s24_224"))
def test_named_models_equal_timms(name):
    options = {"depth": 1, "depth_token_only": 1}
    seed(0)
    reference = randomize(timm.create_model(name, **options)).eval()
    fast = deit_fast.create_model(name, backend="torch", **options).eval()
    assert type(fast) is layers.Cait and fast.state_dict().keys() == reference.state_dict().keys()
    fast.load_state_dict(reference.state_dict())
    assert_same_logits(reference, fast, images(reference, batch=1))


def test_report():
    model = timm.create_model("cait_xxs24_224", depth=3)
    report = deit_fast.accelerate(model)
    assert {kind: len(names) for kind, names in report.replaced.items()} == {
        "Cait": 1, "PatchEmbed": 1, "LayerScaleBlock": 3, "TalkingHeadAttn": 3, "Mlp": 5,
        "LayerScaleBlockClassAttn": 2, "ClassAttn": 2, "LayerNorm": 11,
    }  # fmt: skip
    assert report.skipped == []


@pytest.mark.parametrize(
    "options, name, reason",
    [
        ({"num_heads": 32, "embed_dim": 96}, "blocks.1", "attn stays with timm"),
        ({"num_heads": 32, "embed_dim": 96}, "blocks.0.attn", "32 heads"),
        ({"num_heads": 4, "embed_dim": 160}, "blocks.0.attn", "head dimension 40"),
        ({"act_layer": torch.nn.ReLU}, "blocks_token_only.0", "mlp stays with timm"),
    ],
)
def test_skipped_modules_have_a_reason(options, name, reason):
    reference, fast = tiny_cait(**options)
    reasons = {module.name: module.reason for module in deit_fast.accelerate(fast, "torch").skipped}
    assert reason in reasons[name]
    assert_same_logits(reference, fast, images(reference))


def test_restore_is_exact():
    reference, fast = tiny_cait()
    before = {name: type(m) for name, m in reference.named_modules()}
    parameters = dict(fast.named_parameters())
    deit_fast.restore(fast)
    assert {name: type(m) for name, m in fast.named_modules()} == before
    for name, module in fast.named_modules():
        assert module.__dict__.keys() == reference.get_submodule(name).__dict__.keys(), name
    assert all(p is parameters[name] for name, p in fast.named_parameters())


VARIANTS = {
    "plain": {},
    "mean of the patches": {"global_pool": "avg"},
    "all tokens": {"global_pool": ""},
    "no classes": {"num_classes": 0},
    "no qkv bias": {"qkv_bias": False},
    "odd sizes": {"img_size": (80, 48), "in_chans": 1},
    "dropout": {"drop_rate": 0.2, "pos_drop_rate": 0.2, "drop_path_rate": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    reference, fast = tiny_cait(**VARIANTS[variant])
    assert_same_logits(reference, fast, images(reference))


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 6, 8])
def test_every_triton_kernel(heads, device):
    reference, fast = tiny_cait("triton", heads)
    reference, fast = reference.to(device), fast.to(device)
    assert_same_logits(reference, fast, images(reference).to(device))


@pytest.mark.parametrize("backend", [slow("torch"), "triton"])
@pytest.mark.parametrize("precision", slow_but(PRECISIONS, "bf16"))
def test_precisions(precision, backend, device):
    reference, fast = tiny_cait(backend, depth=1, depth_token_only=1)
    assert_precision(reference, fast, images(reference), precision, device)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_heads(precision, device):
    """Only in half precision the kernels take them."""
    reference, fast = tiny_cait("triton", 16, depth=1, depth_token_only=1, img_size=32)
    assert_precision(reference, fast, images(reference), precision, device)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_stochastic_depth_drops_the_samples_that_timm_drops(checkpointing):
    reference, fast = tiny_cait(drop_path_rate=0.5)
    x = images(reference, batch=4)
    for model in (reference, fast):
        model.train().set_grad_checkpointing(checkpointing)
    runs = []
    fast.blocks[0].register_forward_pre_hook(lambda *args: runs.append(1))
    got, expected = (gradients(m, x) for m in (fast, reference))
    assert_gradients_close(got, expected)
    assert len(runs) == 1 + checkpointing
    assert_differ(fast.eval()(x), got["output 0"])


def test_evaluation_drops_nothing():
    reference, fast = tiny_cait(drop_path_rate=0.5, drop_rate=0.5, pos_drop_rate=0.5)
    x = images(reference)
    assert_close(fast.eval()(x), reference.eval()(x))


@pytest.mark.slow
def test_autocast_leaves_gradients_in_fp32(device):
    _, fast = tiny_cait("triton", depth=1)
    fast = fast.to(device)
    with torch.autocast(device, FP16):
        fast(images(fast).to(device)).float().square().mean().backward()
    grad = fast.blocks[0].attn.proj_w.weight.grad
    assert grad.dtype == torch.float32 and grad.any()


@pytest.mark.slow
def test_compiles_into_one_graph(device):
    reference, fast = tiny_cait("triton", depth=1, depth_token_only=1)
    reference, fast = reference.to(device), fast.to(device)
    x = images(reference).to(device)
    compiled = torch.compile(fast, fullgraph=True, backend=NO_CODE)
    with torch.no_grad():
        for batch in (x, torch.cat((x, x[:1]))):  # the second with a dynamic batch size
            assert_close(compiled(batch), reference(batch))


@pytest.mark.slow
def test_compiles_to_code_with_gradients(device):
    selection.compiler()
    reference, fast = tiny_cait("triton", depth=1, depth_token_only=1)
    reference, fast = reference.to(device), fast.to(device)
    x = images(reference).to(device)
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True)
    names = dict(reference.named_parameters()).keys()
    expected = torch.autograd.grad(reference(x).sum(), list(reference.parameters()))
    got = torch.autograd.grad(compiled(x).sum(), list(fast.parameters()))
    assert_gradients_close(*(dict(zip(names, grads, strict=True)) for grads in (got, expected)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_copies_and_state_dict(backend, device):
    fast = tiny_cait(backend)[1].to(device)
    other = randomize(tiny_cait(backend)[1], seed=5).to(device)
    assert type(fast) is layers.Cait
    assert_copies(fast, other, images(fast).to(device), backend)


@pytest.mark.slow
def test_distributed_data_parallel_finds_every_gradient(tmp_path, device):
    """Also that of proj_l's bias, which the result does not depend on."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(tiny_cait("triton", depth=1)[1].to(device).train())
        for _ in range(2):  # the second step fails where the first left a parameter out
            model(images(model.module).to(device)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_uint8_images(backend, device):
    reference, fast = tiny_cait(backend)
    reference, fast = reference.to(device), fast.to(device)
    image, floats = uint8_and_floats(reference, 48, device)
    with torch.no_grad():
        assert_close(fast(image), reference(floats))
        fast.patch_embed.register_forward_hook(lambda *args: None)  # then it is called
        assert_close(fast(image), reference(floats))


HOOKED = (
    "patch_embed", "pos_drop", "blocks", "blocks.0", "blocks.1", "blocks_token_only.0", "norm",
    "head_drop", "head",
)  # fmt: skip


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_on_the_models_own_modules_fire(name):
    expected, got = hooked(*tiny_cait(), name)
    assert expected is not None
    assert_close(got, expected)


def test_features_intermediates_and_surgery():
    reference, fast = tiny_cait()
    x = images(reference)
    models = (fast, reference)
    assert_close(*(m.forward_features(x) for m in models))
    for options in ({}, {"norm": True, "output_fmt": "NLC"}, {"indices": 1}):
        assert_close(*(m.forward_intermediates(x, **options) for m in models))
    expected = reference.forward_head(reference.forward_features(x), pre_logits=True)
    assert_close(fast.forward_pre_logits(x), expected)
    for model in models:
        seed(2)
        model.reset_classifier(5, "avg")
    assert_close(*(m(x) for m in models))
    for model in models:
        model.prune_intermediate_layers(1)
    assert_close(*(m(x) for m in models))


@pytest.mark.slow
def test_modules_by_themselves(device):
    reference, fast = (m.to(device) for m in tiny_cait("triton"))
    exact = copy.deepcopy(reference).double()
    x = torch.randn(2, 7, 192, device=device)
    for name in ("blocks.0.attn", "blocks.0", "blocks_token_only.0.attn", "blocks_token_only.0"):
        args = (x, x[:, :1] + 1) if name == "blocks_token_only.0" else (x,)
        got, expected = (m.get_submodule(name)(*args) for m in (fast, reference))
        true = exact.get_submodule(name)(*(t.double() for t in args))
        assert_as_accurate(got, expected, true, name)


def test_half_precision_launches():
    """The trunk is five launches a block in inference, all of them ours. The row statistics of a
    LayerNorm, but for the first, come with the GEMM before it."""
    ours, others = [], []
    for depth in (1, 3):
        with torch.device("meta"):
            model = deit_fast.create_model("cait_s24_224", depth=depth)
        recorder = launches.record(model, 64, torch.bfloat16, H200, uint8=True, tables=False)
        ours.append([op for op, _, _ in recorder.calls])
        others.append(recorder.others)
        row_stats = [args[5] for op, args, _ in recorder.calls[1:] if op == "layer_norm_linear"]
        assert row_stats[0] is None and all(m is not None for m in row_stats[1 : 2 * depth])
    block = ["layer_norm_linear", "talking_heads", "linear", "layer_norm_linear", "linear"]
    assert ours[1][:16] == ["patch_embed", *block * 3] and ours[1][-1] == "classifier"
    assert len(ours[1]) == len(ours[0]) + 10 and others[0] == others[1]


@pytest.mark.slow
def test_export_with_a_dynamic_batch_and_the_meta_device():
    reference, fast = tiny_cait(depth=1, depth_token_only=1)
    assert_exports(reference, fast, images(reference))


@pytest.mark.slow
def test_awkward_batches(device):
    reference, fast = (m.to(device) for m in tiny_cait("triton", depth=1))
    x = images(reference, batch=3).to(device)
    assert_awkward_batches(fast, x, reference(x).detach())
