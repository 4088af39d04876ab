"""What is compared, and that no mode leaves PyTorch's switches changed."""

import pytest
import torch
from torch._inductor import config

from deit_fast.bench.modes import MODES, pick


def test_the_modes_are_those_of_the_results_format():
    forward = [
        "eager_fp32", "eager_tf32", "eager_amp_fp16", "eager_fp16", "eager_bf16", "compile_bf16",
        "compile_reduce_overhead_bf16", "compile_max_autotune_bf16", "deit_fast_fp32",
        "deit_fast_fp16", "deit_fast_bf16", "deit_fast_engine_bf16", "deit_fast_fp8",
        "deit_fast_int8", "deit_fast_engine_fp8", "deit_fast_fp8_attention", "torchao_fp8_compile",
    ]  # fmt: skip
    without = ("r_fp16", "t_fp16", "engine_bf16", "overhead_bf16", "8", "8_compile", "8_attention")
    backward = [f"{name}_train" for name in forward if not name.endswith(without)]
    mixed = [
        f"{name}_amp_bf16_train"
        for name in (
            "eager", "compile", "compile_max_autotune", "deit_fast", "deit_fast_reduce_overhead",
            "deit_fast_graph",
        )
    ]  # fmt: skip
    assert list(MODES) == forward + backward + mixed
    for name in mixed:  # as people train: weights stay in fp32
        assert MODES[name].dtype == torch.float32 and MODES[name].autocast == torch.bfloat16
    assert MODES["compile_max_autotune_amp_bf16_train"].compile == "max-autotune"
    for name, mode in MODES.items():
        assert mode.train == name.endswith("_train")
        assert mode.fast == name.startswith("deit_fast")
        assert bool(mode.compile) == ("compile" in name or "overhead" in name)
        assert mode.graph == ("_graph_" in name)
        assert mode.engine == ("_engine_" in name) and mode.torchao == name.startswith("torchao")
        assert bool(mode.quantized_format) == ("8" in name)
        assert mode.attention == ("attention" in name)
        assert mode.precision in name


def test_each_mode_is_compared_with_eager_of_its_precision():
    for name, eager in {
        "deit_fast_fp16": "eager_fp16",
        "deit_fast_bf16_train": "eager_bf16_train",
        "compile_max_autotune_bf16": "eager_bf16",
        "deit_fast_fp32": "eager_fp32",
        "eager_amp_fp16": "eager_amp_fp16",
        "eager_tf32": "eager_tf32",
        "deit_fast_fp8": "eager_bf16",
        "deit_fast_int8": "eager_bf16",
        "torchao_fp8_compile": "eager_bf16",
        "eager_amp_fp16_train": "eager_amp_fp16_train",
        "eager_amp_bf16_train": "eager_amp_bf16_train",
        "compile_amp_bf16_train": "eager_amp_bf16_train",
        "compile_max_autotune_amp_bf16_train": "eager_amp_bf16_train",
        "deit_fast_amp_bf16_train": "eager_amp_bf16_train",
        "deit_fast_reduce_overhead_amp_bf16_train": "eager_amp_bf16_train",
        "deit_fast_graph_amp_bf16_train": "eager_amp_bf16_train",
    }.items():
        assert MODES[name].eager is MODES[eager]


def switches():
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark


def test_settings_come_and_go():
    before = switches()
    with MODES["eager_tf32"].settings():
        assert switches() == ("high", True, True)
        with MODES["eager_fp32"].settings():
            assert switches() == ("highest", False, True)
        assert switches() == ("high", True, True)
    assert switches() == before
    with pytest.raises(KeyError), MODES["eager_tf32"].settings():
        raise KeyError
    assert switches() == before


def test_what_torchao_sets_of_the_compiler_comes_and_goes():
    before = config.coordinate_descent_tuning
    with MODES["torchao_fp8_compile"].settings():
        config.coordinate_descent_tuning = not before
    found, config.coordinate_descent_tuning = config.coordinate_descent_tuning, before
    assert found == before


def test_pick_names_the_nearest():
    assert pick("modes", ["b", "a", "b"], ["a", "b"]) == ["b", "a"]
    with pytest.raises(ValueError, match="modes: unknown 'eager_fp33', did you mean eager_fp32"):
        pick("modes", ["eager_fp33"], MODES)
    with pytest.raises(ValueError, match=r"rows: unknown 'zzz', expected one of \['a', 'b'\]"):
        pick("rows", ["zzz"], ["a", "b"])
