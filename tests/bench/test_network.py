"""Which networks and modes there are, and why not."""

import importlib.util

import pytest
import timm
import torch
from checking import assert_within
from measuring import CPU, measure_row
from tiers import slow

from deit_fast.bench import network as bench_network
from deit_fast.bench.modes import MODES
from deit_fast.bench.network import Network, check_network, count_flops


def test_quantized_modes_say_why_they_are_unavailable(vit, convnet, monkeypatch):
    """And a row says it."""
    row, times = measure_row(vit, "torchao_fp8_compile")
    if not importlib.util.find_spec("torchao"):
        assert (row.status, row.note) == ("unavailable", "torchao is not installed")
        assert not times and row.ms_median is None and row.batch == 3
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    expected = "torchao's float8 needs a GPU of compute capability 8.9"
    assert vit.why_not(MODES["torchao_fp8_compile"]) == expected
    for mode, reason in (("torchao_fp8_compile", "it has no Block"), ("deit_fast_fp8", "no mod")):
        assert reason in convnet.why_not(MODES[mode])
    cait = object.__new__(Network)
    cait.why_not_fast, cait.blocks, cait.device = None, 0, CPU
    assert "it has no Block of a ViT or DeiT" in cait.why_not(MODES["deit_fast_fp8"])
    monkeypatch.setattr(vit, "device", torch.device("cuda"))
    monkeypatch.setattr(bench_network, "capability", lambda device: (8, 6))
    assert "fp8 (e4m3) needs compute capability 8.9" in vit.why_not(MODES["deit_fast_fp8"])
    assert vit.why_not(MODES["torchao_fp8_compile"]) == expected
    monkeypatch.setattr(bench_network, "has_bf16", lambda device: False)
    assert vit.why_not(MODES["deit_fast_int8"]) == "the GPU has no bf16 arithmetic"


def test_modes_run_what_they_name(monkeypatch):
    monkeypatch.setenv("DEIT_FAST_BACKEND", "torch")
    with pytest.raises(ValueError, match="DEIT_FAST_BACKEND is set"):
        Network("deit_tiny", 32, CPU)


@pytest.mark.parametrize(
    ("name", "gflop"),
    [("deit_tiny_distilled", 2.522), slow("deit_small_distilled", 9.248),
     slow("deit_base_distilled_384", 111.18), slow("resnet50", 8.18),
     slow("cait_xxs24_224", 5.047)],
)  # fmt: skip
def test_flops_are_the_published_ones(name, gflop):
    timm_name, size = check_network(name, None)
    with torch.device("meta"):
        model = timm.create_model(timm_name)
    assert_within(count_flops(model, size) / 1e9, gflop, 1e-3, "published with three digits")


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
