"""Kernels are sorted by what they do, and their times add up."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import deit_fast.kernels
from deit_fast.bench import profiling
from deit_fast.bench.profiling import FOREIGN, KINDS, kind, profile

NAMES = {
    "GEMM": [
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>",
        "triton_tem_fused_addmm_gelu_3", "triton_tem_fused__to_copy_addmm_t_3",
        "triton_tem_fused_native_layer_norm_addmm_3",
        "sm80_xmma_fprop_implicit_gemm_f16f16_f16f32",
        "_linear_kernel", "_depthwise_conv_kernel",
        "_patch_embed_kernel", "_classifier_kernel", "_layer_norm_mlp_kernel",
        "_layer_norm_linear_kernel",
        "aten::addmm", "aten::mkldnn_convolution",
    ],
    "attention": [
        "_attention_kernel", "_attention_resident_kernel", "_window_attention_scores_kernel",
        "_talking_heads_dq_kernel",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ],
    "norm": [
        "_layer_norm_kernel", "_row_stats_kernel", "_fold_layer_norm_kernel",
        "_fold_batch_norm_kernel",
        "void at::native::vectorized_layer_norm_kernel<BFloat16, float>",
        "triton_per_fused_add_addmm_native_layer_norm_view_4", "aten::native_batch_norm",
        "void cudnn::bn_fw_inf_1C11_kernel_NCHW",
    ],
    "elementwise": [
        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
        "triton_poi_fused_addmm_gelu_view_5", "_linear_epilogue_kernel", "aten::gelu",
    ],
    "copies": [
        "Memcpy HtoD (Pinned -> Device)", "Memset (Device)", "aten::copy_",
        "nchwToNhwcKernel<__half>",
        "void at::native::direct_copy_kernel_cuda", "aten::cat",
    ],
}  # fmt: skip


def sources():
    """Of all kernels, those in folders too."""
    folder = Path(deit_fast.kernels.__file__).parent
    return "".join(path.read_text() for path in sorted(folder.rglob("*.py")))


@pytest.mark.parametrize("expected", NAMES)
def test_kinds(expected):
    names = NAMES[expected]
    assert {name: kind(name) for name in names} == dict.fromkeys(names, expected)


def test_every_launched_kernel_is_known():
    kernels = re.findall(r"_plans\.launch\(\s*(_\w+_kernel),", sources())
    assert len(kernels) > 20
    assert [name for name in kernels if not profiling._OURS.match(name)] == []


def test_overlapping_kernels_count_once_and_gaps_are_idle():
    shares = profiling._shares(
        [
            ("gemm", 100, 1100), ("aten::gelu", 600, 1600), ("memcpy", 700, 900),
            ("_linear_kernel", 3600, 4600),
        ]
    )  # fmt: skip
    assert shares == {
        "GEMM": 2.0, "elementwise": 0.5, "copies": 0.0, "idle": 2.0, "norm": 0.0, "attention": 0.0,
        FOREIGN: 1.5,
    }  # fmt: skip
    assert set(shares) == {*KINDS, FOREIGN}


def test_every_kernel_of_ours_is_known_as_ours():
    """FOREIGN is the share of kernels whose name no kernel in deit_fast.kernels has."""
    names = re.findall(r"^def (_\w+_kernel)\(", sources(), re.M)
    assert len(names) == len(set(names)) >= 11
    shares = profiling._shares([(name, i, i + 1) for i, name in enumerate(names)])
    assert shares[FOREIGN] == 0.0


@pytest.mark.slow
def test_a_profile_finds_where_the_time_goes(tmp_path, device):
    x = torch.randn(1500, 1500, device=device)
    trace = tmp_path / "new" / "trace.json.gz"
    shares = profile(lambda: F.gelu(x @ x @ x), torch.device(device), trace)
    assert shares["GEMM"] > 0.5 * sum(shares.values()) > 0
    assert shares["elementwise"] > 0 == shares["attention"]
    names = {e.get("name") for e in json.loads(gzip.open(trace).read())["traceEvents"]}
    assert "aten::mm" in names
