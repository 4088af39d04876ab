"""What the installed Triton makes of every shipped kernel configuration, without a GPU.

It runs in a process of its own: this one may have chosen the interpreter.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-W", "ignore", "-m", "benchmarks.ahead_of_time"]

# What Triton 3.6 alone makes worse, by a few registers: (figure, there, elsewhere)
IN_TRITON_3_6 = {
    (80, "talking_heads", "dkv, H = 8, 16x8 w8 s1, fp32"): ("spill_bytes", 8, 0),
    (90, "linear", "bias+scales+residual, z, fp32 residual stream, "
        "128x128x64 w8 s3 tma split, bf16"): ("ctas_per_sm", 1, 2),
}  # fmt: skip


def forgiven(row):
    """That one figure, as bad as it is known to be and no worse."""
    known = IN_TRITON_3_6.get((row["arch"], row["op"], row["label"]))
    if known and row["triton"].startswith("3.6.") and row[known[0]] == known[1]:
        return row | {known[0]: known[2]}
    return row


@pytest.fixture(scope="module")
def rows():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([*COMMAND, "--json"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [forgiven(json.loads(line)) for line in done.stdout.splitlines()]


def test_every_kernel_for_ampere_or_hopper():
    """One configuration in forty: no spills, shared memory that fits, matmuls that overlap."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = ["--check", "--arch", "80", "90", "--every", "40", "--in-turn"]
    done = subprocess.run([*COMMAND, *options], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def bad(rows, condition):
    return [f"sm_{r['arch']} {r['op']} {r['label']}: {r}" for r in rows if condition(r)]


@pytest.mark.slow
def test_every_operation_on_every_chip_it_serves(rows):
    seen = {(r["op"], r["arch"]) for r in rows}
    matmuls = ("layer_norm_linear", "layer_norm_mlp", "attention", "patch_embed", "classifier")
    matmuls += ("window_attention", "talking_heads")
    dots = {(op, arch) for op in matmuls for arch in (80, 90)}
    row_kernels = ("layer_norm", "distillation_loss", "sparse_cross_entropy", "linear", "conv_norm")
    row_kernels += ("column_sums",)
    memory_bound = {(op, arch) for op in row_kernels for arch in (70, 80, 90)}
    quantized = {
        (op, arch)
        for op in ("quantize", "quantized_linear", "layer_norm", "attention")
        for arch in (80, 89, 90)
    }
    assert seen == dots | memory_bound | quantized
    twice = [k for k, n in Counter((r["op"], r["label"], r["arch"]) for r in rows).items() if n > 1]
    assert not twice


@pytest.mark.slow
def test_no_register_spills(rows):
    assert not bad(rows, lambda r: r["spill_bytes"])


@pytest.mark.slow
def test_shared_memory_and_registers_fit(rows):
    assert not bad(rows, lambda r: r["ctas_per_sm"] < 1)


@pytest.mark.slow
def test_matmuls_overlap_their_loads_on_hopper(rows):
    """wgmma is there, ptxas did not serialise it, and only a tile's last one is waited for: where
    tiles follow each other in one loop, there and after the loop."""
    meant = [r for r in rows if r["asynchronous"] and r["arch"] == 90]
    assert len(meant) >= 50
    assert not bad(
        meant,
        lambda r: (
            not r["wgmma"]
            or r["serialized"]
            or r["waits_for_all"] > 1 + ("persistent" in r["label"])
        ),
    )


@pytest.mark.slow
def test_two_ctas_share_an_sm(rows):
    """... of what the rule chooses for DeiT in bf16 on sm_90: one's epilogue runs while the
    other multiplies. So it does for attention."""
    tiles = ("128x128x64 w8 s3 tma split, bf16", "128x64x64 w4 s3 tma, bf16")
    tiles += ("128x64x64 w4 s3 tma split, bf16",)  # of the narrow tile's backward GEMM
    chosen = [r for r in rows if r["arch"] == 90 and r["label"].endswith(tiles)]
    assert len(chosen) == 22
    chosen += [
        r
        for r in rows
        if r["op"] == "attention"
        and r["arch"] == 90
        and r["label"].endswith("bf16")
        and ("64 w4 s1" in r["label"] or "backward" in r["label"])
    ]
    assert len(chosen) == 30 and not bad(chosen, lambda r: r["ctas_per_sm"] < 2)


@pytest.mark.slow
def test_the_prologue_of_layer_norm_linear(rows):
    """wgmma on sm_90, whose dots each wait for x to be normalised: two CTAs or more share an SM,
    so that one multiplies meanwhile."""
    found = [r for r in rows if r["label"].startswith("prologue: ")]
    kinds = Counter(r["arch"] for r in found)
    assert kinds[80] == kinds[90] == len(found) / 2 >= 20
    even = [r for r in found if "odd K" not in r["label"]]
    assert not bad(even, lambda r: r["ctas_per_sm"] < 2)
    assert not bad(found, lambda r: (r["arch"] == 90) != (r["wgmma"] > 0))


@pytest.mark.slow
def test_quantized_operands_are_multiplied_as_such(rows):
    """Not widened on the way, by the instruction of the type; each format on each chip that has
    it. sm_80 has no e4m3."""
    gemms = [r for r in rows if r["op"] == "quantized_linear"]
    kinds = {(r["arch"], r["label"].rpartition(", ")[2]) for r in gemms}
    assert kinds == {(80, "int8"), (89, "fp8"), (89, "int8"), (90, "fp8"), (90, "int8")}
    instruction = {"fp8": ["e4m3"], "int8": ["s8"]}
    assert not bad(gemms, lambda r: r["operands"] != instruction[r["label"].rpartition(", ")[2]])
    # of few queries sm_90 multiplies fp16, which has no wgmma of 16 rows
    attention = [r for r in rows if "all in fp8" in r["label"] and "N = 2," not in r["label"]]
    assert len(attention) == 8 and not bad(attention, lambda r: r["operands"] != ["e4m3"])


@pytest.mark.slow
def test_quantized_gemms_share_an_sm(rows):
    """... of what the rule chooses for DeiT in half precision on sm_90: two of the wide tile, three
    of the narrow one."""
    for tile, least, number in (
        ("128x128x128 w8 s3 tma split", 2, 6),
        ("128x64x128 w4 s3 tma", 3, 8),
    ):
        chosen = [
            r
            for r in rows
            if r["op"] == "quantized_linear"
            and r["arch"] == 90
            and f", {tile}, " in r["label"]
            and "fp32" not in r["label"]
        ]
        assert len(chosen) == number and not bad(
            chosen, lambda r, least=least: r["ctas_per_sm"] < least
        )


@pytest.mark.slow
def test_ptxas_serialises_nothing(rows):
    assert not bad(rows, lambda r: r["serialized"])


@pytest.mark.slow
def test_memory_bound_kernels_keep_the_chip_busy(rows):
    """Half the threads that an SM can hold, for DeiT's widths and ImageNet-1k's classes."""
    threads = {70: 2048, 80: 2048, 89: 1536, 90: 2048}
    wide = ("8192", "21841", "2048", "65535")
    # threads of a CTA at these widths
    size = {"layer_norm": 128, "distillation_loss": 256, "sparse_cross_entropy": 128}
    row_kernels = [
        r
        for r in rows
        if r["op"] in size
        and not any(width in r["label"] for width in wide)
        and "backward" not in r["label"]
    ]
    assert {r["op"] for r in row_kernels} == size.keys()
    assert not bad(row_kernels, lambda r: r["ctas_per_sm"] * size[r["op"]] < threads[r["arch"]] / 2)


@pytest.mark.slow
def test_the_ctas_of_layer_norms_backward_are_resident_at_once(rows):
    """6 an SM; a seventh would wait for a whole round."""
    backward = [r for r in rows if r["op"] == "layer_norm" and "backward" in r["label"]]
    narrow = [r for r in backward if "8192" not in r["label"]]
    assert len(narrow) == 36 and not bad(narrow, lambda r: r["ctas_per_sm"] < 6)
