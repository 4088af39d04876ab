"""Rows: what is measured, what a row says, and the largest batch that fits."""

import copy

import pytest
import selection
import torch
from checking import (
    APART,
    FP32,
    assert_at_most,
    assert_equal,
)
from measuring import CPU, STEP, measure_row
from tiers import slow, slow_but

import deit_fast
from deit_fast.bench import measure as bench_measure
from deit_fast.bench.correctness import TOLERANCE
from deit_fast.bench.measure import Plan, TooSlow, largest_batch, timed_calls
from deit_fast.bench.modes import MODES
from deit_fast.bench.network import Network
from deit_fast.bench.step import LEARNING_RATE, Step
from deit_fast.quantization import quantized_layers

ROWS = ["eager_fp32", "eager_bf16", "deit_fast_fp32", "deit_fast_bf16"]


@pytest.mark.parametrize("mode", slow_but(ROWS, "deit_fast_bf16"))
@pytest.mark.parametrize("train", ["", slow("_train")])
def test_a_row_of_a_vision_transformer(vit, mode, train):
    row, times = measure_row(vit, mode + train)
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
    row, _ = measure_row(convnet, mode)
    assert row.status == "measured", row.note
    assert row.channels_last == (mode == "eager_bf16")
    assert convnet.why_not(MODES["deit_fast_fp32"]) == "deit_fast has no modules for it"


@pytest.mark.slow
def test_the_input_sets_are_different_memory(vit, monkeypatch):
    seen = []
    monkeypatch.setattr(
        bench_measure,
        "throughput_ms",
        lambda step, inputs, *args: seen.append(inputs) or [1.0, 2.0],
    )
    for mode in ("eager_fp32", "eager_bf16"):
        measure_row(vit, mode, Plan("batch", 4, 2, 1))
        assert len({x.data_ptr() for x in seen[-1]}) == len(seen[-1]) == 64


@pytest.mark.parametrize("mode", ["deit_fast_fp8", slow("deit_fast_int8")])
def test_a_row_of_a_quantized_mode(vit, mode):
    """Its peak rate is that of its matmuls; its error that of quantization, and no more."""
    row, times = measure_row(vit, mode)
    assert row.status == "measured" and row.note is None and len(times) == 2
    fp8 = mode.endswith("fp8")
    assert row.relative_error > (0.02 if fp8 else 0.005)
    assert_at_most(row.relative_error, TOLERANCE["fp8" if fp8 else "int8"])
    assert row.fraction_of_peak_rate == (pytest.approx(row.tflops / 4.0) if fp8 else None)
    step = Step(vit, MODES[mode])
    assert len(quantized_layers(step.model)) == 48 and step.skipped is None
    assert not quantized_layers(vit.model)


def test_a_row_in_turn_has_its_speedup(vit, monkeypatch):
    """The median of the turns' ratios, which no slow second spoils; the row's times are its own."""
    seen = []

    def in_turn(calls, inputs, runs, warmup, device):
        seen.extend(step.mode.name for step in calls)
        return [[30.0, 300.0, 24.0], [20.0, 200.0, 20.0]]

    monkeypatch.setattr(bench_measure, "in_turn_ms", in_turn)
    row, times = measure_row(vit, "deit_fast_fp32", Plan("batch", 3, 3, 1, in_turn=True))
    assert seen == ["eager_fp32", "deit_fast_fp32"] and times == [20.0, 200.0, 20.0]
    assert (row.baseline, row.speedup, row.ms_median) == ("eager_fp32", 1.5, 20.0)
    for mode in ("eager_fp32", "deit_fast_fp32_train"):
        with pytest.raises(ValueError, match=f"mode: {mode} in turn, expected a forward mode"):
            measure_row(vit, mode, Plan("batch", 3, 3, 1, in_turn=True))


def test_a_row_without_time_left_is_not_begun(vit):
    with pytest.raises(TooSlow, match="0 s left"):
        measure_row(vit, "eager_fp32", Plan("batch", 1, 2, 1, seconds=0.0))


def test_the_search_may_fail_too(vit, monkeypatch):
    def call(self, x):
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(Step, "__call__", call)
    row, _ = measure_row(vit, "eager_fp32", Plan("paper", 8, 2, 1))
    assert row.status == "failed" and row.note == "RuntimeError: CUDNN_STATUS_NOT_SUPPORTED"


@pytest.mark.slow
def test_paper_protocol_reports_the_mean_of_the_largest_batch(vit):
    row, times = measure_row(vit, "eager_fp32", Plan("paper", batch=5, runs=3, warmup=1))
    assert (row.batch, row.asked_batch, row.note) == (5, 5, "capped at 5")
    assert row.images_per_s == pytest.approx(5e3 * 3 / sum(times))


@pytest.mark.slow
def test_compiled_rows_agree():
    """Two blocks: compiling takes its time."""
    selection.compiler()
    shallow = Network("deit_tiny_distilled", 32, CPU, options={"depth": 2})
    row, _ = measure_row(shallow, "compile_bf16")
    assert row.status == "measured", row.note


STEPPED = ["deit_fast_fp32", "eager_bf16", "deit_fast_amp_bf16"]


@pytest.mark.parametrize("mode", slow_but(STEPPED, "deit_fast_fp32"))
def test_a_full_step_is_measured(vit, mode):
    before = copy.deepcopy(vit.model.state_dict())
    row, times = measure_row(vit, f"{mode}_train", STEP)
    assert row.status == "measured", row.note
    assert (row.protocol, row.batch, len(times)) == ("step", 3, 2)
    if mode.endswith("fp32"):
        assert_at_most(row.relative_error, APART[FP32])
    else:
        assert row.relative_error > 1e-4
    assert_equal(dict(vit.model.state_dict()), dict(before))


def test_every_timed_step_updates_and_the_compared_ones_do_not(vit, monkeypatch):
    """As many updates as timed and warm calls, from the network's own weights."""
    mode, steps = MODES["eager_fp32_train"], []

    def clock(step, inputs, runs, warmup, device):
        start = [p.detach().clone() for p in step.model.parameters()]
        for p, q in zip(start, vit.model.parameters(), strict=True):
            if steps:  # one, of AdamW, moves each number by the learning rate
                moved = (p - q).abs().max().item()
                assert_at_most(moved, 2 * LEARNING_RATE, "the step before")
            else:
                assert_equal(p, q)
        for _ in range(runs + warmup):
            step(inputs[0])
        steps.append(step)
        assert not any(
            torch.equal(p, q) for p, q in zip(start, step.model.parameters(), strict=True)
        )
        return [1.0] * runs

    monkeypatch.setattr(bench_measure, "latency_ms", clock)  # one call, before those that are timed
    monkeypatch.setattr(bench_measure, "throughput_ms", clock)
    with mode.settings():
        bench_measure._timed(vit, mode, 3, STEP)
    one, step = steps
    assert one is step and step.mode == mode
    counts = {state["step"].item() for state in step.optimizer.state.values()}
    assert counts == {1 + 3} and len(step.optimizer.state) == len(list(step.model.parameters()))
    assert step.optimizer.defaults["fused"] and isinstance(step.optimizer, torch.optim.AdamW)


def test_only_what_trains_takes_a_step(vit):
    with pytest.raises(
        ValueError, match="mode: eager_fp32 by protocol step, expected one that ends"
    ):
        measure_row(vit, "eager_fp32", STEP)


def test_a_mode_that_raises_is_reported(vit, monkeypatch):
    def forward(self, x, **kwargs):
        raise TypeError("no such thing\nsecond line")

    monkeypatch.setattr(deit_fast.layers.VisionTransformerDistilled, "forward", forward)
    row, _ = measure_row(vit, "deit_fast_fp32")
    assert (row.status, row.note) == ("failed", "TypeError: no such thing")


def test_a_lost_device_is_named_in_the_row(vit, monkeypatch):
    def broken(*args):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setattr(bench_measure, "check", broken)
    row, _ = measure_row(vit, "eager_fp32")
    assert row.status == "failed" and row.note.startswith("device lost: RuntimeError: Triton")


def limit_memory(monkeypatch, images):
    """Steps of more images than that run out of memory."""
    real = Step.__call__

    def call(self, x):
        if len(x) > images:
            raise torch.OutOfMemoryError(f"{len(x)} images")
        return real(self, x)

    monkeypatch.setattr(Step, "__call__", call)


@pytest.mark.parametrize(
    ("fits", "cap", "batch", "note"),
    [slow(5, 100, 4, "8 does not"), slow(8, 8, 8, "capped at 8"), slow(7, 6, 6, "capped at 6"),
     (1, 64, 1, "2 does not")],
)  # fmt: skip
def test_the_largest_batch_is_found_by_doubling(vit, monkeypatch, fits, cap, batch, note):
    limit_memory(monkeypatch, fits)
    found, said = largest_batch(vit, MODES["eager_fp32"], cap)
    assert found == batch and note in said


@pytest.mark.slow
def test_a_batch_too_large_is_halved_and_the_note_says_so(vit, monkeypatch):
    limit_memory(monkeypatch, 5)
    row, _ = measure_row(vit, "eager_fp32", Plan("batch", 16, 2, 1))
    assert (row.status, row.batch, row.asked_batch) == ("measured", 4, 16)
    assert row.note == "batch 8 does not fit in memory"
    limit_memory(monkeypatch, 0)
    row, _ = measure_row(vit, "eager_bf16", Plan("batch", 2, 2, 1))
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
        batch, note = largest_batch(network, MODES["eager_fp32"], 1 << 20)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 16 < batch < 1 << 16 and "does not" in note
    assert torch.cuda.memory_allocated() <= before + (1 << 26)


def test_timed_calls_by_protocol():
    def runs(protocol, ms, asked=30):
        return timed_calls(Plan(protocol, runs=asked), ms)

    assert [runs("batch", ms) for ms in (1.0, 1e4)] == [30, 30]
    assert [runs("latency", ms) for ms in (1.0, 1e3)] == [200, 30]
    assert [runs("paper", ms) for ms in (1.0, 300.0, 5000.0)] == [30, 10, 5]
    assert runs("paper", 5000.0, 2) == 2
    enough = Plan("batch", runs=10, timed_seconds=3.0)
    assert [timed_calls(enough, ms) for ms in (1.0, 400.0, 5000.0)] == [10, 8, 5]
