"""Other libraries' tools on an accelerated model, each beside timm's with the same weights."""

import copy
import warnings

import pytest
import selection
import torch
from checking import assert_close, assert_differ, assert_equal, assert_gradients_close
from modelling import gradients, images, tiny_pair
from timm.utils import ModelEmaV3, freeze, unfreeze
from timm.utils.model import ActivationStatsHook

import deit_fast

pytestmark = pytest.mark.slow  # they need the extra
BACKENDS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def models(backend, device):
    reference, fast = (m.to(device) for m in tiny_pair(backend))
    return reference, fast, images(reference).to(device)


def maps(tokens):
    """Tokens (B, 2 + 16, D) as grad-cam wants them: (B, D, 4, 4)."""
    return tokens[:, 2:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("target", ["1.norm1", "0.attn", "0.mlp.act"])
@pytest.mark.parametrize("method", ["GradCAM", "EigenCAM", "LayerCAM"])
def test_grad_cam(method, target, backend, device):
    selection.extra("tools", "pytorch_grad_cam")
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    reference, fast, x = models(backend, device)
    targets, found = [ClassifierOutputTarget(3), ClassifierOutputTarget(5)], []
    for model in (reference, fast):
        layer = model.blocks.get_submodule(target)
        with getattr(pytorch_grad_cam, method)(model, [layer], reshape_transform=maps) as cam:
            found.append(torch.from_numpy(cam(input_tensor=x, targets=targets)))
    assert_close(found[1], found[0])
    assert found[0].max() > 0.5 and deit_fast.report(fast).unfused == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_captum(backend, device):
    selection.extra("tools", "captum")
    from captum.attr import (
        IntegratedGradients,
        LayerActivation,
        LayerGradCam,
        LayerIntegratedGradients,
    )

    reference, fast, x = models(backend, device)
    found = []
    for model in (reference, fast):
        block = model.blocks[0]
        steps = {"target": 3, "n_steps": 3}
        found.append([
            IntegratedGradients(model).attribute(x, **steps),
            LayerGradCam(model, block.mlp.act).attribute(x, target=3),
            LayerActivation(model, block.attn.qkv).attribute(x),
            LayerIntegratedGradients(model, block.norm2).attribute(x, **steps),
        ])  # fmt: skip
    for expected, got in zip(*found, strict=True):
        assert_close(got, expected)
    assert deit_fast.report(fast).unfused == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_torchinfo(backend, device):
    """Row by row: layers, shapes, parameters, operations."""
    selection.extra("tools", "torchinfo")
    import torchinfo

    reference, fast, x = models(backend, device)
    columns = ("input_size", "output_size", "num_params", "kernel_size", "mult_adds")
    expected, got = (
        str(torchinfo.summary(m, input_data=x, depth=5, col_names=columns, verbose=0))
        for m in (reference, fast)
    )
    assert got == expected and "GELU" in expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_fvcore(backend, device):
    selection.extra("tools", "fvcore")
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count

    reference, fast, x = models(backend, device)
    for analysis in (FlopCountAnalysis, ActivationCountAnalysis):
        expected, got = (analysis(m, x).by_module() for m in (reference, fast))
        assert got == expected and expected["blocks.0.mlp"] > 0
    assert parameter_count(fast) == parameter_count(reference)


def test_lightnings_summary():
    selection.extra("tools", "lightning")
    from lightning import LightningModule
    from lightning.pytorch.utilities.model_summary import ModelSummary

    class Module(LightningModule):
        def __init__(self, model, x):
            super().__init__()
            self.model, self.example_input_array = model, x

        def forward(self, x):
            return self.model(x)

    reference, fast, x = models("torch", "cpu")
    expected, got = (str(ModelSummary(Module(m, x), max_depth=5)) for m in (reference, fast))
    assert got == expected and "blocks.0.mlp.act" in expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_lora(backend, device):
    """Adapters on qkv and fc1: called, the rest fused; merged, all is fused again."""
    selection.extra("tools", "peft")
    from peft import LoraConfig, get_peft_model

    reference, fast, x = models(backend, device)
    plain, found = reference(x), []
    config = {"target_modules": ["qkv", "fc1"], "r": 4, "lora_dropout": 0.2}
    for model in (reference, fast):
        torch.manual_seed(0)
        found.append(get_peft_model(model, LoraConfig(init_lora_weights=False, **config)))
    expected, got = found
    report = deit_fast.report(got)
    assert [module.name[-8:] for module in report.unfused] == ["blocks.0", "blocks.1"]
    for module in report.unfused:
        assert module.reason == (
            "attn.qkv is a peft.tuners.lora.layer.Linear, mlp.fc1 is a "
            "peft.tuners.lora.layer.Linear: called, the rest is fused"
        )
    trained = [dict(zip(*_trained(m.train(), x), strict=True)) for m in (expected, got)]
    assert len(trained[0]) == 8
    assert_gradients_close(trained[1], trained[0])
    expected, got = expected.eval(), got.eval()
    assert_close(got(x), expected(x))
    assert_differ(expected(x), plain)
    merged, ours = expected.merge_and_unload(), got.merge_and_unload()
    assert ours is fast and deit_fast.accelerate(ours, backend).unfused == []
    assert_close(ours(x), merged(x))
    expected, got = (gradients(m.requires_grad_(), x) for m in (merged, ours))
    assert_gradients_close(got, expected)


def _trained(model, x):
    torch.manual_seed(1)  # of the adapters' dropout
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = sum(y.square().mean() for y in [model(x)])
    return list(named), torch.autograd.grad(loss, list(named.values()))


def test_adapters_in_place_before_accelerate():
    """`accelerate` sees them, and says so; there is nothing more to warn of."""
    selection.extra("tools", "peft")
    from peft import LoraConfig, get_peft_model

    reference, fast, x = models("torch", "cpu")
    deit_fast.restore(fast)
    for model in (reference, fast):
        torch.manual_seed(0)
        get_peft_model(model, LoraConfig(init_lora_weights=False, target_modules=["proj", "fc2"]))
    report = deit_fast.accelerate(fast, "torch")
    assert len(report.unfused) == 2 and "attn.proj is a peft" in report.unfused[0].reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(fast(x), reference(x))


def test_torchaos_weights():
    selection.extra("tools", "torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    reference, fast, x = models("torch", "cpu")
    with torch.no_grad():
        fast(x)
        for model in (reference, fast):
            quantize_(model, Int8WeightOnlyConfig())
        assert_equal(fast(x), reference(x))
    assert (
        "attn.qkv is a Linear whose weight is a torchao."
        in deit_fast.report(fast).unfused[0].reason
    )


def test_bitsandbytes_layers():
    selection.extra("tools", "bitsandbytes")
    from bitsandbytes.nn import Linear8bitLt

    reference, fast, x = models("torch", "cpu")
    for model in (reference, fast):
        for block in model.blocks:
            linear = block.mlp.fc1
            block.mlp.fc1 = Linear8bitLt(
                linear.in_features, linear.out_features, has_fp16_weights=False
            )
            block.mlp.fc1.load_state_dict(linear.state_dict())
    with torch.no_grad():
        assert_close(fast(x), reference(x))
    assert "mlp.fc1 is a bitsandbytes." in deit_fast.report(fast).unfused[0].reason


@pytest.mark.parametrize("backend", BACKENDS)
def test_timms_utilities(backend, device):
    """Statistics of activations, frozen parts, an average of weights."""
    reference, fast, x = models(backend, device)
    found = []
    for model in (reference, fast):
        stats = ActivationStatsHook(
            model, hook_fn_locs=["blocks.*.mlp.act"], hook_fns=[lambda m, i, y: y.std(0)]
        )
        model(x)
        found.append([y for some in stats.stats.values() for y in some])
    assert len(found[0]) == 2
    for expected, got in zip(*found, strict=True):
        assert_close(got, expected)
    for model in (reference, fast):
        freeze(model, ["blocks.0", "patch_embed"])
        assert not model.blocks[0].attn.qkv.weight.requires_grad
        unfreeze(model, ["blocks.0"])
        assert model.blocks[0].attn.qkv.weight.requires_grad
    average = [ModelEmaV3(m, decay=0.5) for m in (reference, fast)]
    for ema, model in zip(average, (reference, fast), strict=True):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        ema.update(model)
    assert_close(average[1](x), average[0](x))
    assert_differ(average[0](x), copy.deepcopy(reference)(x))
