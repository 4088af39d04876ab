"""A step in each mode: quantized, compiled, with an optimizer, as a CUDA graph."""

import copy
import sys
import types
from dataclasses import replace

import pytest
import selection
import torch
from checking import (
    assert_close,
    assert_equal,
)
from fake_cuda import FakeCuda
from measuring import CPU, STEP, measure_row
from modelling import tiny_pair
from torch import nn

import deit_fast
from deit_fast.bench.measure import Plan
from deit_fast.bench.modes import MODES
from deit_fast.bench.network import Network
from deit_fast.bench.step import Step, skipped_layers
from deit_fast.bench.weights import random_images


def test_layers_that_stay_in_bf16_are_named():
    """Heads of 80 features, of which int8 cannot make parts of 32."""
    _, fast = tiny_pair(embed_dim=160, num_heads=2)
    left = skipped_layers(deit_fast.quantize(fast, "int8"))
    assert left.startswith("not in int8: 2 x proj: heads of 80 features")


class Float8(torch.Tensor):
    """Stands for the class of torchao's quantized weights."""


def test_torchao_is_asked_for_float8_with_per_row_scales(vit, monkeypatch):
    """As its documentation has it, on the eager model in bf16; what it leaves is named."""
    asked = []

    def quantize_(model, config):
        asked.append((type(model).__name__, config))
        for name, m in model.named_modules():
            if isinstance(m, nn.Linear) and not name.startswith(("head", "blocks.3.attn.proj")):
                assert m.weight.dtype == torch.bfloat16
                m.weight = nn.Parameter(m.weight.detach().as_subclass(Float8), False)

    torchao = types.ModuleType("torchao.quantization")
    torchao.Float8DynamicActivationFloat8WeightConfig = dict
    torchao.PerRow, torchao.quantize_ = lambda: "row", quantize_
    monkeypatch.setitem(sys.modules, "torchao", types.ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", torchao)
    step = Step(vit, MODES["torchao_fp8_compile"], compiled=False)
    assert asked == [("VisionTransformerDistilled", {"granularity": "row"})]
    assert step.skipped == "not in fp8: 1 x proj"
    for mode, inference in (("torchao_fp8_compile", False), ("eager_fp32", True)):
        step.mode, found = MODES[mode], []
        step.forward = lambda x, found=found: found.append(
            (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        )
        step(vit.batch(1))
        assert found == [(inference, False)], mode


@pytest.mark.gpu("torchao's matmuls in fp8")
def test_torchao_agrees_and_is_timed():
    selection.extra("torchao", "torchao")
    network = Network("deit_tiny_distilled", 224, torch.device("cuda"))
    if reason := network.why_not(MODES["torchao_fp8_compile"]):
        pytest.skip(f"GPU: {reason}")
    row, _ = measure_row(network, "torchao_fp8_compile", Plan("batch", 8, 2, 1))
    assert row.status == "measured" and row.note is None, row.note


def test_our_models_may_be_compiled_too(vit, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **how: asked.append((model, how)) or model)
    step = Step(vit, MODES["deit_fast_reduce_overhead_amp_bf16_train"])
    step(vit.batch(3))
    ((model, how),) = asked
    assert model is step.model and how == {"mode": "reduce-overhead", "dynamic": False}
    assert isinstance(model, deit_fast.layers.VisionTransformerDistilled)


@pytest.mark.slow
def test_a_step_under_fp16_autocast_goes_through_a_scaler(vit, monkeypatch):
    scaled, real = [], torch.amp.GradScaler.scale
    monkeypatch.setattr(
        torch.amp.GradScaler, "scale", lambda self, x: scaled.append(x) or real(self, x)
    )
    row, _ = measure_row(vit, "eager_amp_fp16_train", STEP)
    assert row.status == "measured", row.note
    assert len(scaled) == 2 + 1 + 1 + 3  # not where gradients are compared
    step = Step(vit, MODES["eager_amp_fp16_train"], optimize=True)
    before = [p.detach().clone() for p in step.model.parameters()]
    step._upstream = torch.full((3, 1000), float("inf"))  # such a step is skipped
    step(vit.batch(3))
    pairs = list(zip(before, step.model.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in pairs) and step.scaler.get_scale() == 0.5
    step._upstream = None
    step(vit.batch(3))
    assert not any(torch.equal(p, q) for p, q in pairs)
    for name in ("eager_amp_bf16_train", "eager_fp32_train"):
        assert Step(vit, MODES[name], optimize=True).scaler is None


def test_modes_share_the_weights_and_leave_them(vit):
    before = copy.deepcopy(vit.model.state_dict())
    steps = [Step(vit, MODES[name]) for name in ("eager_fp32", "deit_fast_fp32", "eager_bf16")]
    for step in steps:
        for name, value in step.model.state_dict().items():
            assert_equal(value, before[name].to(value.dtype))
    measure_row(vit, "eager_fp32_train")
    assert_equal(dict(vit.model.state_dict()), dict(before))


@pytest.mark.gpu("an engine's real graphs")
def test_an_engine_computes_what_the_model_does():
    """For new images and for another batch, too; its memory counts."""
    network = Network("deit_tiny_distilled", 224, torch.device("cuda"))
    engine, plain = (Step(network, MODES[f"deit_fast_{kind}bf16"]) for kind in ("engine_", ""))
    for seed, batch in enumerate((8, 8, 8, 4)):
        images = random_images(batch, 224, network.device, seed).bfloat16()
        got = engine(images)
        assert_equal(got, plain(images))
    row, times = measure_row(network, "deit_fast_engine_bf16")
    assert row.status == "measured" and row.peak_memory_gb > 0 and len(times) == 2


@pytest.mark.slow
def test_a_captured_training_step(vit, monkeypatch):
    """Forward and backward replayed from a graph give the gradients of the images and the upstream
    gradients at hand, not of those that were captured."""
    mode = replace(MODES["deit_fast_graph_amp_bf16_train"], autocast=None)
    assert vit.why_not(mode) == "a CUDA graph needs a CUDA device"
    plain = Step(vit, MODES["deit_fast_fp32_train"])
    with FakeCuda(monkeypatch) as cuda:
        step = Step(vit, mode)
        for seed in (5, 6):
            images = random_images(3, 32, CPU, seed)
            assert_close(step.outputs(images), plain.outputs(images))
        assert cuda.replays == 4
        doubled = step.outputs(images, copies=2)  # other upstream gradients
        assert_close(doubled, plain.outputs(images, copies=2))
