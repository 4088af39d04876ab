"""Agreement before a timing, the search for the largest batch, and what a row says."""

import copy
import importlib.util
import sys
import types
from dataclasses import replace

import pytest
import selection
import torch
from checking import (
    APART,
    FP32,
    assert_at_most,
    assert_close,
    assert_differ,
    assert_equal,
    assert_within,
)
from fake_cuda import FakeCuda
from modelling import tiny_pair
from tiers import slow, slow_but
from torch import nn

import deit_fast
from deit_fast.bench import networks
from deit_fast.bench.modes import MODES
from deit_fast.bench.networks import TOLERANCE, Network, Plan, check_network, random_images
from deit_fast.quantization import quantized_layers

CPU = torch.device("cpu")
STAMP = {"commit": "unknown", "build": "0" * 12}
PEAK_RATES = {"fp32_tflops": 1.0, "bf16_tflops": 2.0, "copy_tb_per_s": 1.0, "fp8_tflops": 4.0}
ONE = Plan("batch", batch=3, runs=2, warmup=1)


@pytest.fixture(scope="module")
def vit():
    return Network("deit_tiny_distilled", 32, CPU, "DeiT-Ti distilled")


@pytest.fixture(scope="module")
def convnet():
    return Network("resnet18", 64, CPU)


def measure(network, mode, plan=ONE):
    return network.measure(MODES[mode], plan, PEAK_RATES, STAMP)


ROWS = ["eager_fp32", "eager_bf16", "deit_fast_fp32", "deit_fast_bf16"]


@pytest.mark.parametrize("mode", slow_but(ROWS, "deit_fast_bf16"))
@pytest.mark.parametrize("train", ["", slow("_train")])
def test_a_row_of_a_vision_transformer(vit, mode, train):
    row, times = measure(vit, mode + train)
    assert row.status == "measured" and row.note is None
    assert (row.network, row.timm_name) == ("DeiT-Ti distilled", "deit_tiny_distilled_patch16_224")
    assert (row.batch, row.image_size, row.channels_last) == (3, 32, False)
    assert len(times) == 2 and row.ms_mean == pytest.approx(sum(times) / 2)
    assert row.images_per_s == pytest.approx(3e3 / row.ms_median)
    flops = vit.flops * (3 if train else 1)
    assert row.tflops == pytest.approx(flops * row.images_per_s / 1e12)
    peak_rate = 1.0 if mode.endswith("fp32") else 2.0
    assert row.fraction_of_peak_rate == pytest.approx(row.tflops / peak_rate)
    exact = mode.endswith("fp32")
    assert_at_most(row.relative_error, APART[FP32] if exact else TOLERANCE["bf16"] / 2)
    assert exact or row.relative_error > 1e-4


@pytest.mark.parametrize("mode", ["eager_fp32", slow("eager_bf16"), slow("eager_fp32_train")])
def test_a_row_of_a_convolutional_network(convnet, mode):
    row, _ = measure(convnet, mode)
    assert row.status == "measured", row.note
    assert row.channels_last == (mode == "eager_bf16")
    assert convnet.why_not(MODES["deit_fast_fp32"]) == "deit_fast has no modules for it"


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 7, 10, 11, 24])
def test_batches_of_any_size_are_compared(vit, convnet, batch):
    """Few different images, each equally often: then batch norm sees the reference's statistics."""
    for network in (vit, convnet):
        images = network.batch(batch)
        distinct = {1: 1, 7: 7, 10: 5, 11: 1, 24: 8}[batch]
        assert len(images) == batch and len(images.unique(dim=0)) == distinct
        for mode in ("eager_fp32", "eager_fp32_train"):
            step = network.step(MODES[mode])
            # batch norm takes a mean away, and so most of what it is a difference of
            allowed = APART[FP32] * (5 if network is convnet else 1)
            assert_at_most(network.check(step, batch), allowed, mode)


@pytest.mark.slow
def test_every_image_of_the_batch_is_compared(vit, monkeypatch):
    """A kernel that computes the first images and leaves the rest is fast."""
    real = deit_fast.layers.VisionTransformerDistilled.forward

    def forward(self, x, **kwargs):
        y = real(self, x, **kwargs)
        return torch.cat((y[:-1], y[-2:-1]))

    monkeypatch.setattr(deit_fast.layers.VisionTransformerDistilled, "forward", forward)
    for mode in ("deit_fast_fp32", "deit_fast_fp32_train"):
        row, _ = measure(vit, mode, Plan("batch", 40, 2, 1))
        assert row.status == "failed" and "Disagreement" in row.note, mode


@pytest.mark.slow
def test_the_input_sets_are_different_memory(vit, monkeypatch):
    seen = []
    monkeypatch.setattr(
        networks, "throughput_ms", lambda step, inputs, *args: seen.append(inputs) or [1.0, 2.0]
    )
    for mode in ("eager_fp32", "eager_bf16"):
        measure(vit, mode, Plan("batch", 4, 2, 1))
        assert len({x.data_ptr() for x in seen[-1]}) == len(seen[-1]) == 64


@pytest.mark.parametrize("mode", ["deit_fast_fp8", slow("deit_fast_int8")])
def test_a_row_in_eight_bits(vit, mode):
    """Its peak rate is that of its products; its error what eight bits cost, and no more."""
    row, times = measure(vit, mode)
    assert row.status == "measured" and row.note is None and len(times) == 2
    fp8 = mode.endswith("fp8")
    assert row.relative_error > (0.02 if fp8 else 0.005)
    assert_at_most(row.relative_error, TOLERANCE["fp8" if fp8 else "int8"])
    assert row.fraction_of_peak_rate == (pytest.approx(row.tflops / 4.0) if fp8 else None)
    step = vit.step(MODES[mode])
    assert len(quantized_layers(step.model)) == 48 and step.left is None
    assert not quantized_layers(vit.model)


def test_layers_that_stay_in_bf16_are_named():
    """Heads of 80 features, of which int8 cannot make parts of 32."""
    _, fast = tiny_pair(embed_dim=160, num_heads=2)
    left = networks._left(deit_fast.quantize(fast, "int8"))
    assert left.startswith("not in int8: 2 x proj: heads of 80 features")


def test_modes_in_eight_bits_say_why_they_are_not_to_be_had(vit, convnet, monkeypatch):
    """And a row says it."""
    row, times = measure(vit, "torchao_fp8_compile")
    if not importlib.util.find_spec("torchao"):
        assert (row.status, row.note) == ("unavailable", "torchao is not installed")
        assert not times and row.ms_median is None and row.batch == 3
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    wanted = "torchao's float8 needs a GPU of compute capability 8.9"
    assert vit.why_not(MODES["torchao_fp8_compile"]) == wanted
    for mode, reason in (("torchao_fp8_compile", "it has no Block"), ("deit_fast_fp8", "no mod")):
        assert reason in convnet.why_not(MODES[mode])
    cait = object.__new__(Network)
    cait.why_not_fast, cait.blocks, cait.device = None, 0, CPU
    assert "it has no Block of a ViT or DeiT" in cait.why_not(MODES["deit_fast_fp8"])
    monkeypatch.setattr(vit, "device", torch.device("cuda"))
    monkeypatch.setattr(networks, "capability", lambda device: (8, 6))
    assert "fp8 (e4m3) needs compute capability 8.9" in vit.why_not(MODES["deit_fast_fp8"])
    assert vit.why_not(MODES["torchao_fp8_compile"]) == wanted
    monkeypatch.setattr(networks, "has_bf16", lambda device: False)
    assert vit.why_not(MODES["deit_fast_int8"]) == "the GPU has no bf16 arithmetic"


class Float8(torch.Tensor):
    """What torchao puts in the place of a weight, as far as its kind goes."""


def test_torchao_is_asked_for_float8_by_row(vit, monkeypatch):
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
    step = vit.step(MODES["torchao_fp8_compile"], compiled=False)
    assert asked == [("VisionTransformerDistilled", {"granularity": "row"})]
    assert step.left == "not in fp8: 1 x proj"
    for mode, inference in (("torchao_fp8_compile", False), ("eager_fp32", True)):
        step.mode, found = MODES[mode], []
        step.forward = lambda x, found=found: found.append(
            (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        )
        step(vit.batch(1))
        assert found == [(inference, False)], mode


@pytest.mark.gpu("torchao's products in fp8")
def test_torchao_agrees_and_is_timed():
    selection.extra("torchao", "torchao")
    network = Network("deit_tiny_distilled", 224, torch.device("cuda"))
    if reason := network.why_not(MODES["torchao_fp8_compile"]):
        pytest.skip(f"GPU: {reason}")
    row, _ = measure(network, "torchao_fp8_compile", Plan("batch", 8, 2, 1))
    assert row.status == "measured" and row.note is None, row.note


def test_a_row_without_time_is_not_begun(vit):
    with pytest.raises(networks.TooSlow, match="0 s left"):
        measure(vit, "eager_fp32", Plan("batch", 1, 2, 1, seconds=0.0))


def test_the_search_may_fail_too(vit, monkeypatch):
    def call(self, x):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(networks.Step, "__call__", call)
    row, _ = measure(vit, "eager_fp32", Plan("paper", 8, 2, 1))
    assert row.status == "failed" and row.note == "RuntimeError: CUDNN_STATUS_NOT_SUPPORTED"


def test_modes_run_what_they_name(monkeypatch):
    monkeypatch.setenv("DEIT_FAST_BACKEND", "torch")
    with pytest.raises(ValueError, match="DEIT_FAST_BACKEND is set"):
        Network("deit_tiny", 32, CPU)


@pytest.mark.slow
def test_paper_protocol_reports_the_mean_of_the_largest_batch(vit):
    row, times = measure(vit, "eager_fp32", Plan("paper", batch=5, runs=3, warmup=1))
    assert (row.batch, row.asked_batch, row.note) == (5, 5, "capped at 5")
    assert row.images_per_s == pytest.approx(5e3 * 3 / sum(times))


@pytest.mark.slow
def test_compiled_rows_agree():
    """Two blocks: compiling takes its time."""
    selection.compiler()
    shallow = Network("deit_tiny_distilled", 32, CPU, options={"depth": 2})
    row, _ = measure(shallow, "compile_bf16")
    assert row.status == "measured", row.note


STEP = Plan("step", batch=3, runs=2, warmup=1)
STEPPED = ["deit_fast_fp32", "eager_bf16", "deit_fast_amp_bf16"]


@pytest.mark.parametrize("mode", slow_but(STEPPED, "deit_fast_fp32"))
def test_a_full_step_is_measured(vit, mode):
    before = copy.deepcopy(vit.model.state_dict())
    row, times = measure(vit, f"{mode}_train", STEP)
    assert row.status == "measured", row.note
    assert (row.protocol, row.batch, len(times)) == ("step", 3, 2)
    if mode.endswith("fp32"):
        assert_at_most(row.relative_error, APART[FP32])
    else:
        assert row.relative_error > 1e-4
    assert_equal(dict(vit.model.state_dict()), dict(before))


def test_ours_may_be_compiled_too(vit, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda model, **how: asked.append((model, how)) or model)
    step = vit.step(MODES["deit_fast_reduce_overhead_amp_bf16_train"])
    step(vit.batch(3))
    ((model, how),) = asked
    assert model is step.model and how == {"mode": "reduce-overhead", "dynamic": False}
    assert isinstance(model, deit_fast.layers.VisionTransformerDistilled)


def test_every_timed_step_updates_and_the_compared_ones_do_not(vit, monkeypatch):
    """As many updates as timed and warm calls, from the network's own weights."""
    mode, steps = MODES["eager_fp32_train"], []

    def clock(step, inputs, runs, warmup, device):
        start = [p.detach().clone() for p in step.model.parameters()]
        for p, q in zip(start, vit.model.parameters(), strict=True):
            if steps:  # one, of AdamW, moves each number by the learning rate
                moved = (p - q).abs().max().item()
                assert_at_most(moved, 2 * networks.LEARNING_RATE, "the step before")
            else:
                assert_equal(p, q)
        for _ in range(runs + warmup):
            step(inputs[0])
        steps.append(step)
        assert not any(
            torch.equal(p, q) for p, q in zip(start, step.model.parameters(), strict=True)
        )
        return [1.0] * runs

    monkeypatch.setattr(networks, "latency_ms", clock)  # one call, before those that are timed
    monkeypatch.setattr(networks, "throughput_ms", clock)
    with mode.settings():
        vit._timed(mode, 3, STEP)
    one, step = steps
    assert one is step and step.mode == mode
    counts = {state["step"].item() for state in step.optimizer.state.values()}
    assert counts == {1 + 3} and len(step.optimizer.state) == len(list(step.model.parameters()))
    assert step.optimizer.defaults["fused"] and isinstance(step.optimizer, torch.optim.AdamW)


@pytest.mark.slow
def test_a_step_under_fp16_autocast_goes_through_a_scaler(vit, monkeypatch):
    scaled, real = [], torch.amp.GradScaler.scale
    monkeypatch.setattr(
        torch.amp.GradScaler, "scale", lambda self, x: scaled.append(x) or real(self, x)
    )
    row, _ = measure(vit, "eager_amp_fp16_train", STEP)
    assert row.status == "measured", row.note
    assert len(scaled) == 2 + 1 + 1 + 3  # not where gradients are compared
    step = vit.step(MODES["eager_amp_fp16_train"], optimize=True)
    before = [p.detach().clone() for p in step.model.parameters()]
    step._upstream = torch.full((3, 1000), float("inf"))  # such a step is left out
    step(vit.batch(3))
    pairs = list(zip(before, step.model.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in pairs) and step.scaler.get_scale() == 0.5
    step._upstream = None
    step(vit.batch(3))
    assert not any(torch.equal(p, q) for p, q in pairs)
    for name in ("eager_amp_bf16_train", "eager_fp32_train"):
        assert vit.step(MODES[name], optimize=True).scaler is None


UPDATES = {  # what a broken optimiser may do, and what is said of it
    "nothing": (lambda step: None, "cls_token, "),
    "ascent": (lambda step: step.optimizer.param_groups[0].update(maximize=True), "cls_token, "),
    "one left out": (lambda step: step.optimizer.param_groups[0]["params"].pop(), "head_dist.bias"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", UPDATES)
def test_an_optimiser_that_does_not_descend_is_not_timed(vit, fault, monkeypatch):
    break_it, said = UPDATES[fault]
    real = networks.Step.__init__

    def make(self, *args):
        real(self, *args)
        if self.optimizer is not None:
            break_it(self)
            if fault == "nothing":
                self.optimizer.step = lambda: None

    monkeypatch.setattr(networks.Step, "__init__", make)
    row, _ = measure(vit, "eager_fp32_train", STEP)
    assert row.status == "failed", row
    assert "Disagreement: the optimiser leaves " + said in row.note


def test_only_what_trains_takes_a_step(vit):
    with pytest.raises(
        ValueError, match="mode: eager_fp32 by protocol step, expected one that ends"
    ):
        measure(vit, "eager_fp32", STEP)


WRONG = {  # what a broken fast mode may do to its output -> the mode that must notice
    "scaled": (lambda y: 1.001 * y, "deit_fast_fp32"),
    "scaled beyond rounding": (lambda y: 1.03 * y, "deit_fast_bf16"),
    "NaN": (lambda y: y * float("nan"), "deit_fast_bf16"),
    "permuted": (lambda y: y.roll(1, 0), "deit_fast_bf16"),
    "beyond eight bits": (lambda y: 1.15 * y, "deit_fast_fp8"),
    "beyond int8": (lambda y: 1.05 * y, "deit_fast_int8"),
    "gradient": (lambda y: y + 0.01 * (y - y.detach()), "deit_fast_fp32_train"),
}


@pytest.mark.parametrize("fault", slow_but(WRONG, "NaN", "gradient", "beyond int8"))
def test_what_disagrees_is_not_timed(vit, fault, monkeypatch):
    break_it, mode = WRONG[fault]
    real = deit_fast.layers.VisionTransformerDistilled.forward

    def forward(self, x, **kwargs):
        return break_it(real(self, x, **kwargs))

    monkeypatch.setattr(deit_fast.layers.VisionTransformerDistilled, "forward", forward)
    clocks = []
    monkeypatch.setattr(networks, "throughput_ms", lambda *args: clocks.append(args))
    row, times = measure(vit, mode)
    assert row.status == "failed" and "Disagreement: relative error" in row.note
    assert not times and not clocks and row.images_per_s is None


def test_a_mode_that_raises_is_reported(vit, monkeypatch):
    def forward(self, x, **kwargs):
        raise TypeError("no such thing\nsecond line")

    monkeypatch.setattr(deit_fast.layers.VisionTransformerDistilled, "forward", forward)
    row, _ = measure(vit, "deit_fast_fp32")
    assert (row.status, row.note) == ("failed", "TypeError: no such thing")


def limit_memory(monkeypatch, images):
    """Steps of more images than that run out of memory."""
    real = networks.Step.__call__

    def call(self, x):
        if len(x) > images:
            raise torch.OutOfMemoryError(f"{len(x)} images")
        return real(self, x)

    monkeypatch.setattr(networks.Step, "__call__", call)


@pytest.mark.parametrize(
    ("fits", "cap", "batch", "note"),
    [slow(5, 100, 4, "8 does not"), slow(8, 8, 8, "capped at 8"), slow(7, 6, 6, "capped at 6"),
     (1, 64, 1, "2 does not")],
)  # fmt: skip
def test_the_largest_batch_is_found_by_doubling(vit, monkeypatch, fits, cap, batch, note):
    limit_memory(monkeypatch, fits)
    found, said = vit.largest_batch(MODES["eager_fp32"], cap)
    assert found == batch and note in said


@pytest.mark.slow
def test_a_batch_too_large_is_halved_and_said(vit, monkeypatch):
    limit_memory(monkeypatch, 5)
    row, _ = measure(vit, "eager_fp32", Plan("batch", 16, 2, 1))
    assert (row.status, row.batch, row.asked_batch) == ("measured", 4, 16)
    assert row.note == "batch 8 does not fit in memory"
    limit_memory(monkeypatch, 0)
    row, _ = measure(vit, "eager_bf16", Plan("batch", 2, 2, 1))
    assert (row.status, row.batch) == ("failed", 1)


@pytest.mark.gpu("memory that really runs out")
def test_running_out_of_memory_leaves_none_behind():
    device = torch.device("cuda")
    network = Network("deit_tiny", 224, device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    share = 2e9 / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        batch, note = network.largest_batch(MODES["eager_fp32"], 1 << 20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 16 < batch < 1 << 16 and "does not" in note
    assert torch.cuda.memory_allocated() <= before + (1 << 26)


def test_modes_share_the_weights_and_leave_them(vit):
    before = copy.deepcopy(vit.model.state_dict())
    steps = [vit.step(MODES[name]) for name in ("eager_fp32", "deit_fast_fp32", "eager_bf16")]
    for step in steps:
        for name, value in step.model.state_dict().items():
            assert_equal(value, before[name].to(value.dtype))
    measure(vit, "eager_fp32_train")
    assert_equal(dict(vit.model.state_dict()), dict(before))


@pytest.mark.slow
def test_every_part_matters_for_the_output(vit, convnet):
    """Or a wrong part would go unnoticed: each parameter, zeroed, changes the logits."""
    for network in (vit, convnet):
        step = network.step(MODES["eager_fp32"])
        expected = step(network.images)
        for name, p in step.model.named_parameters():
            kept = p.detach().clone()
            p.data.zero_()
            if name.endswith("qkv.bias"):  # the keys' third cannot matter, the rest must
                p.data[p.numel() // 3 : 2 * p.numel() // 3] = 0
            assert_differ(step(network.images), expected, name)
            p.data.copy_(kept)


def test_batch_norm_keeps_activations_in_range(convnet):
    """At inference every batch norm normalises: what it has seen is what comes."""
    step, seen = convnet.step(MODES["eager_fp32"]), []

    def look(m, inputs, y):
        normal = (y - m.bias[:, None, None]) / m.weight[:, None, None]
        seen.append(normal.std().item())

    norms = [m for m in step.model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.register_forward_hook(look)
    step(random_images(8, 64, CPU, seed=9))
    assert len(seen) == len(norms) == 20 and 0.6 < min(seen) <= max(seen) < 1.6
    assert all(m.momentum == 0.1 and not m.training for m in norms)


@pytest.mark.parametrize(
    ("name", "gflop"),
    [("deit_tiny_distilled", 2.522), slow("deit_small_distilled", 9.248),
     slow("deit_base_distilled_384", 111.18), slow("resnet50", 8.18),
     slow("cait_xxs24_224", 5.047)],
)  # fmt: skip
def test_flops_are_the_published_ones(name, gflop):
    timm_name, size = check_network(name, None)
    with torch.device("meta"):
        model = networks.timm.create_model(timm_name)
    assert_within(networks._count(model, size) / 1e9, gflop, 1e-3, "published with three digits")


def test_bad_networks_and_sizes_are_named():
    with pytest.raises(ValueError, match="unknown 'deit_smal_distilled', did you mean deit_small"):
        check_network("deit_smal_distilled", None)
    with pytest.raises(ValueError, match="225 for deit_tiny.*, nearest valid: 224 or 240"):
        check_network("deit_tiny", 225)
    with pytest.raises(ValueError, match="image size: 3 for deit_tiny.*: 16 or 32"):
        check_network("deit_tiny", 3)
    with pytest.raises(ValueError, match="image size: 31 for resnet18, nearest valid: 32 or more"):
        check_network("resnet18", 31)
    assert check_network("resnet18", 33) == ("resnet18", 33)
    assert check_network("deit_base_384", None) == ("deit_base_patch16_384", 384)
    assert check_network("tf_efficientnet_b8", None)[1] == 672


def test_an_engine_needs_a_gpu(vit):
    mode = MODES["deit_fast_engine_bf16"]
    if not torch.cuda.is_available():
        assert vit.why_not(mode) == "an engine has its graphs on a CUDA device"


@pytest.mark.gpu("an engine's real graphs")
def test_an_engine_computes_what_the_model_does():
    """For new images and for another batch, too; its memory counts."""
    network = Network("deit_tiny_distilled", 224, torch.device("cuda"))
    engine, plain = (network.step(MODES[f"deit_fast_{kind}bf16"]) for kind in ("engine_", ""))
    for seed, batch in enumerate((8, 8, 8, 4)):
        images = random_images(batch, 224, network.device, seed).bfloat16()
        got = engine(images)
        assert_equal(got, plain(images))
    row, times = measure(network, "deit_fast_engine_bf16")
    assert row.status == "measured" and row.peak_memory_gb > 0 and len(times) == 2


@pytest.mark.slow
def test_a_captured_training_step(vit, monkeypatch):
    """Forward and backward replayed from a graph give the gradients of the images and the upstream
    gradients at hand, not of those that were captured."""
    mode = replace(MODES["deit_fast_graph_amp_bf16_train"], autocast=None)
    assert vit.why_not(mode) == "a CUDA graph needs a CUDA device"
    plain = vit.step(MODES["deit_fast_fp32_train"])
    with FakeCuda(monkeypatch) as cuda:
        step = vit.step(mode)
        for seed in (5, 6):
            images = random_images(3, 32, CPU, seed)
            assert_close(step.outputs(images), plain.outputs(images))
        assert cuda.replays == 4
        doubled = step.outputs(images, copies=2)  # other upstream gradients
        assert_close(doubled, plain.outputs(images, copies=2))


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED at gemm"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("out of resource: shared memory, Required: 262144"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error"), False),
        (networks.Disagreement("relative error nan"), False),
    ],
)  # fmt: skip
def test_errors_after_which_a_process_measures_nothing(error, lost):
    assert networks.device_is_lost(error) == lost


def test_a_lost_device_is_said_in_the_row(vit, monkeypatch):
    def broken(*args):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(Network, "check", broken)
    row, _ = measure(vit, "eager_fp32")
    assert row.status == "failed" and row.note.startswith("device lost: RuntimeError: Triton")


def test_timed_calls_by_protocol():
    def runs(protocol, ms, asked=30):
        return networks._runs(Plan(protocol, runs=asked), ms)

    assert [runs("batch", ms) for ms in (1.0, 1e4)] == [30, 30]
    assert [runs("latency", ms) for ms in (1.0, 1e3)] == [200, 30]
    assert [runs("paper", ms) for ms in (1.0, 300.0, 5000.0)] == [30, 10, 5]
    assert runs("paper", 5000.0, 2) == 2
