"""A wrong mode or a wrong optimizer is noticed before it is timed."""

import pytest
import torch
from checking import APART, FP32, assert_at_most
from measuring import STEP, measure_row
from tiers import slow_but

import deit_fast
from deit_fast.bench import correctness
from deit_fast.bench import measure as bench_measure
from deit_fast.bench.correctness import check
from deit_fast.bench.measure import Plan
from deit_fast.bench.modes import MODES
from deit_fast.bench.step import Step


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 7, 10, 11, 24])
def test_batches_of_any_size_are_compared(vit, convnet, batch):
    """Few different images, each equally often: then batch norm sees the reference's statistics."""
    for network in (vit, convnet):
        images = network.batch(batch)
        distinct = {1: 1, 7: 7, 10: 5, 11: 1, 24: 8}[batch]
        assert len(images) == batch and len(images.unique(dim=0)) == distinct
        for mode in ("eager_fp32", "eager_fp32_train"):
            step = Step(network, MODES[mode])
            # batch norm takes a mean away, and so most of what it is a difference of
            allowed = APART[FP32] * (5 if network is convnet else 1)
            assert_at_most(check(network, step, batch), allowed, mode)


@pytest.mark.slow
def test_every_image_of_the_batch_is_compared(vit, monkeypatch):
    """A kernel that computes the first images and leaves the rest is fast."""
    real = deit_fast.layers.VisionTransformerDistilled.forward

    def forward(self, x, **kwargs):
        y = real(self, x, **kwargs)
        return torch.cat((y[:-1], y[-2:-1]))

    monkeypatch.setattr(deit_fast.layers.VisionTransformerDistilled, "forward", forward)
    for mode in ("deit_fast_fp32", "deit_fast_fp32_train"):
        row, _ = measure_row(vit, mode, Plan("batch", 40, 2, 1))
        assert row.status == "failed" and "Mismatch" in row.note, mode


UPDATES = {  # what a broken optimizer may do, and which parameters are named
    "nothing": (lambda step: None, "cls_token, "),
    "ascent": (lambda step: step.optimizer.param_groups[0].update(maximize=True), "cls_token, "),
    "one left out": (lambda step: step.optimizer.param_groups[0]["params"].pop(), "head_dist.bias"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", UPDATES)
def test_an_optimizer_that_does_not_descend_is_not_timed(vit, fault, monkeypatch):
    break_it, said = UPDATES[fault]
    real = Step.__init__

    def make(self, *args, **options):
        real(self, *args, **options)
        if self.optimizer is not None:
            break_it(self)
            if fault == "nothing":
                self.optimizer.step = lambda: None

    monkeypatch.setattr(Step, "__init__", make)
    row, _ = measure_row(vit, "eager_fp32_train", STEP)
    assert row.status == "failed", row
    assert "Mismatch: the optimizer did not move " + said in row.note


WRONG = {  # what a broken fast mode may do to its output -> the mode that must notice
    "scaled": (lambda y: 1.001 * y, "deit_fast_fp32"),
    "scaled beyond rounding": (lambda y: 1.03 * y, "deit_fast_bf16"),
    "NaN": (lambda y: y * float("nan"), "deit_fast_bf16"),
    "permuted": (lambda y: y.roll(1, 0), "deit_fast_bf16"),
    "beyond fp8": (lambda y: 1.15 * y, "deit_fast_fp8"),
    "beyond int8": (lambda y: 1.05 * y, "deit_fast_int8"),
    "gradient": (lambda y: y + 0.01 * (y - y.detach()), "deit_fast_fp32_train"),
}


@pytest.mark.parametrize("fault", slow_but(WRONG, "NaN", "gradient", "beyond int8"))
def test_a_mismatch_is_not_timed(vit, fault, monkeypatch):
    break_it, mode = WRONG[fault]
    real = deit_fast.layers.VisionTransformerDistilled.forward

    def forward(self, x, **kwargs):
        return break_it(real(self, x, **kwargs))

    monkeypatch.setattr(deit_fast.layers.VisionTransformerDistilled, "forward", forward)
    clocks = []
    monkeypatch.setattr(bench_measure, "throughput_ms", lambda *args: clocks.append(args))
    row, times = measure_row(vit, mode)
    assert row.status == "failed" and "Mismatch: relative error" in row.note
    assert not times and not clocks and row.images_per_s is None


def test_the_eager_mode_is_run_only_where_its_error_counts(vit, monkeypatch):
    """In fp32 the bound is the margin: a large network need not be run for it once more."""
    seen = []
    monkeypatch.setattr(
        correctness, "_eager_error", lambda network, mode: seen.append(mode.name) or 1e-2
    )
    for mode in ("deit_fast_fp32", "deit_fast_bf16"):
        assert measure_row(vit, mode)[0].status == "measured"
    assert seen == ["eager_bf16"]
