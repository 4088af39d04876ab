"""What a forward pass launches, seen without a GPU; and what it is predicted to take."""

import copy
import gc
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up_results import kernel_row, model_row, results_of
from modelling import images, tiny_pair
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

import deit_fast
from benchmarks.predict import __main__ as command
from benchmarks.predict import chips, costs
from benchmarks.predict import model as predicted
from benchmarks.predict.table import markdown
from benchmarks.table5 import select
from deit_fast.bench import launches
from deit_fast.kernels import _tuned
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.cases import DEIT, deit_cases
from deit_fast.kernels.layer_norm_mlp.configs import HOPPER_CONFIGS as FUSED_CONFIGS

V100, A100 = Chip("Tesla V100", (7, 0), 80), Chip("A100", (8, 0), 108)
H200, B200 = chips.H200.chip, Chip("B200", (10, 0), 148)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = ["layer_norm_linear", "attention", "linear", "layer_norm_linear", "linear"]


def record(*args):
    return launches.record(*args, tables=False)


def meta_model(name="deit_base_distilled", **options):
    with torch.device("meta"):
        return deit_fast.create_model(name, **options)


@pytest.mark.parametrize("chip", [A100, H200, B200], ids=lambda chip: chip.name)
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("name", ["deit_tiny", "deit_small_distilled", "deit_base_distilled_384"])
def test_nothing_but_our_kernels_in_half_precision(name, uint8, chip):
    """No casts, no transposes, no copies between kernels: PyTorch's own are one copy of the prefix
    tokens' rows and, of a distilled model, of the tokens themselves."""
    recorder = record(meta_model(name), 256, BF16, chip, uint8)
    ops = [op for op, _, _ in recorder.calls]
    assert ops[0] == "patch_embed" and ops[-1] == "classifier"
    assert ops[1 : 1 + 11 * 5] == BLOCK * 11
    last = Counter(ops[1 + 11 * 5 : -1])
    # of 512 rows the prologue serves queries and fc1; DeiT-B's fc1 is too wide for it
    apart = last["layer_norm"]
    assert last["attention"] == 1 and sum(last.values()) == 6 + apart
    assert last["layer_norm_linear_prologue"] == 2 - apart and apart <= ("base" in name)
    assert recorder.others == {"clone": 1} | ({"cat": 1} if "distilled" in name else {})


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224", "vit_base_patch16_384", "vit_large_patch16_224",
        "vit_large_patch16_384", "deit3_small_patch16_224", "deit3_medium_patch16_224",
        "deit3_base_patch16_384", "deit3_large_patch16_384", "deit3_huge_patch14_224",
    ],
)  # fmt: skip
def test_every_kernel_serves_its_relatives(name):
    """ViT and DeiT-III, with LayerScale in the epilogues; huge has heads of 80."""
    model = meta_model(name)
    depth = len(model.blocks)
    recorder = record(model, 256, BF16, H200)
    ops = [op for op, _, _ in recorder.calls]
    assert ops[0] == "patch_embed" and ops[-1] == "classifier"
    assert ops[1 : 1 + (depth - 1) * 5] == BLOCK * (depth - 1)
    assert recorder.others == {"clone": 1}
    scales = [args[4] is not None for op, args, _ in recorder.calls[:-8] if op == "linear"]
    assert all(scales) if name.startswith("deit3") else not any(scales)


QUANTIZED_BLOCK = [
    "layer_norm_quantized", "quantized_linear", "attention_quantized", "quantized_linear",
    "layer_norm_quantized", "quantized_linear", "quantized_linear",
]  # fmt: skip


@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled", {}),
        ("deit3_small_patch16_224", {}),
        ("deit3_huge_patch14_224", {"embed_dim": 160, "num_heads": 2}),  # heads of 80, as it has
    ],
)
def test_no_kernel_only_quantizes(name, options, format):
    """One LayerNorm a half block, which quantizes its output, as attention and GELU's epilogue do.
    PyTorch's own kernels are those of the model in bf16."""
    model = deit_fast.create_model(name, depth=3, **options)
    plain = record(copy.deepcopy(model), 256, BF16, H200)
    deit_fast.quantize(model, format)
    recorder = record(model, 256, BF16, H200)
    block, last = list(QUANTIZED_BLOCK), Counter(QUANTIZED_BLOCK)
    last |= {"quantized_linear": 5}  # queries apart from keys and values
    last |= {"layer_norm_quantized": 3}
    if format == "int8" and options:  # heads without whole parts of 32 features leave proj alone
        block[2:4] = ["attention", "linear"]
        last += {"attention": 1, "linear": 1, "attention_quantized": -1, "quantized_linear": -1}
    ops = [op for op, _, _ in recorder.calls]
    assert ops[:15] == ["patch_embed", *block, *block] and ops[-1] == "classifier"
    assert Counter(ops[15:-1]) == +last
    assert recorder.others == plain.others
    quantized = torch.float8_e4m3fn if format == "fp8" else torch.int8
    for op, args, _ in recorder.calls:
        if op == "quantized_linear":
            assert args[0].dtype == args[2].dtype == quantized, "operand and weight"


def test_tiny_vit_in_half_precision():
    """A convolution, its norm, residual and GELU are one operation; no map is partitioned, padded
    or copied. PyTorch's own: the image's channels are brought together; the head, after pooling."""
    recorder = record(meta_model("tiny_vit_11m_224"), 512, BF16, H200)
    ops = [op for op, _, _ in recorder.calls]
    block = ["layer_norm_linear", "window_attention", "linear", "conv_norm"]
    block += ["layer_norm_linear", "linear"]
    expected = ["conv_norm"] * (2 + 2 * 3)
    for depth in (2, 6, 2):
        expected += ["conv_norm"] * 3 + block * depth
    assert ops == expected
    assert recorder.others == {"clone": 1, "mean": 1, "native_layer_norm": 1, "addmm": 1}


def test_row_stats_come_with_the_gemm_before():
    recorder = record(meta_model("deit_small_distilled"), 256, BF16, H200)
    row_stats = [args[5] for op, args, _ in recorder.calls if op == "layer_norm_linear"]
    assert len(row_stats) == 23 and row_stats[0] is None
    assert all(m.shape == (6, 2, 256 * 198) for m in row_stats[1:])


def test_the_last_block_is_for_the_prefix_tokens():
    recorder = record(meta_model("deit_small_distilled"), 256, BF16, H200)
    (x, weight) = [args[:2] for op, args, _ in recorder.calls if op == "linear"][-1]
    assert x.shape == (512, 1536) and weight.shape == (384, 1536)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_chips_without_tensor_cores_for_triton(dtype):
    """GEMMs are cuBLAS' (in deit_fast::linear), attention and convolution PyTorch's."""
    recorder = record(meta_model("deit_small_distilled"), 64, dtype, V100)
    ops = Counter(op for op, _, _ in recorder.calls)
    assert ops == {"layer_norm": 25, "linear": 49}
    assert recorder.others["convolution"] == 1


def test_a_table_that_says_separate_or_fused():
    """Then nobody makes row statistics, and what a table chooses can be listed too."""
    with _tuned.forced("layer_norm_linear", {"implementation": "separate"}):
        recorder = record(meta_model("deit_tiny"), 256, BF16, H200)
        ops = Counter(op for op, _, _ in recorder.calls)
        assert ops["layer_norm"] == 25 and "layer_norm_linear" not in ops
        assert not [1 for op, args, _ in recorder.calls if op == "linear" and args[-2]]
        rows, _, _ = predicted.predict("Ti", 256, chips.H200.peak_rates)
        assert "layer_norm" in {launch.op for launch, _, _ in rows}
    with _tuned.forced("layer_norm_mlp", {"implementation": "fused", **FUSED_CONFIGS[0]}):
        rows, total, _ = predicted.predict("Ti", 256, chips.H200.peak_rates)
        (mlp,) = [r for r in rows if r[0].op == "layer_norm_mlp" and r[0].bytes > 1e7]
        assert mlp[1] == 11 and total > 0


def test_small_batches_are_not_folded():
    """LayerNorm is in the prologue of the GEMM; nobody makes row statistics."""
    recorder = record(meta_model("deit_base_distilled"), 1, BF16, H200)
    ops = [op for op, _, _ in recorder.calls]
    block = [op.replace("norm_linear", "norm_linear_prologue") for op in BLOCK]
    assert ops[1 : 1 + 11 * 5] == block * 11
    assert not {"layer_norm_linear", "layer_norm"} & set(ops)
    assert not [1 for op, args, _ in recorder.calls if op == "linear" and args[-2]]


def launched(name, batch, uint8, chip, monkeypatch):
    """Kernels of Triton and operations of PyTorch's that one forward pass launches."""
    model = deit_fast.create_model(name).eval().to(BF16)
    size = (batch, 224, 224, 3) if uint8 else (batch, 3, 224, 224)
    x = torch.zeros(size, dtype=torch.uint8 if uint8 else BF16)
    kernels = []
    with monkeypatch.context() as patch, simulate_device(chip), _tuned.disabled(), torch.no_grad():
        patch.setattr(GridExecutor, "__call__", lambda *args, **kwargs: kernels.append(args))
        with launches.Recorder() as recorder:
            model(x)
    return len(kernels), sum(recorder.others.values())


@pytest.mark.cpu("counts launches of the interpreter without running them")
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize(
    "name", ["deit_tiny", "deit_tiny_distilled", "deit_small_distilled", "deit_base_distilled"]
)
def test_launches_of_one_image(name, uint8, monkeypatch):
    """Five a block, one more in the last, and the embedding and the classifier; bytes have their
    normalisation folded into the weights first."""
    ours, others = launched(name, 1, uint8, H200, monkeypatch)
    assert (ours, others) == (12 * 5 + 1 + 2 + uint8, "distilled" in name)


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that PyTorch's operations made and someone still holds."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {id(t.untyped_storage()) for t in args if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        if function.namespace == "deit_fast":
            gc.collect()  # the interpreter's cycles hold what a kernel was given
        for t in result if isinstance(result, tuple | list) else [result]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.seen:
                self._hold(t.untyped_storage(), known)
        return result

    def _hold(self, storage, known):
        if id(storage) in known:
            return
        address, size = storage.data_ptr(), storage.nbytes()
        self.seen.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone():
            self.now -= size
            self.seen.discard(address)

        weakref.finalize(storage, gone)


@pytest.mark.slow
@pytest.mark.cpu("counts what PyTorch's operators for the CPU hold")
def test_peak_memory_is_no_more_than_eagers():
    """Activations of a forward pass in half precision, in Triton's interpreter."""
    reference, fast = tiny_pair("triton", depth=3)
    x = images(reference, batch=32).half()
    peaks = []
    for model in (reference.half(), fast.half()):
        with torch.no_grad(), PeakMemory() as memory:
            model(x)
        peaks.append(memory.peak)
    tokens = 32 * 18 * 64 * 2
    assert peaks[0] >= 6 * tokens, "the yardstick sees eager's hidden layers"
    assert 5 * tokens < peaks[1] < 0.8 * peaks[0]


@pytest.mark.parametrize("network", predicted.NETWORKS)
def test_prediction_counts_the_whole_model(network):
    """Its FLOPs are those of the paper's model less the last block's pruning, and its time lies
    between the tensor floor and the plan of separate kernels."""
    rows, total, others = predicted.predict(network, 256, chips.H200.peak_rates, tables=False)
    D, H, N, size = DEIT[network]
    patches = (size // 16) ** 2
    block = 2 * N * D * 12 * D + 4 * N * N * D
    last = 2 * N * 2 * D * D + 2 * 2 * 10 * D * D + 4 * 2 * N * D
    whole = 11 * block + last + 2 * patches * 768 * D + 2 * 2 * 1000 * D
    counted = sum(count * launch.flops for launch, count, _ in rows)
    assert counted == 256 * whole
    floor = counted / 788e12 * 1e6
    assert 1.2 * floor < total < 3 * floor
    assert sum(others.values()) == 2
    for launch, _, times in rows:
        assert times["predicted"] >= max(costs.LEAST_US, times["traffic"], times["arithmetic"])
        assert launch.bytes > 0


def test_prediction_of_one_gemm():
    """By hand: 50,688 x 768 -> 3072 with GELU."""
    rows, _, _ = predicted.predict("B", 256, chips.H200.peak_rates, tables=False)
    (row,) = [r for r in rows if r[0].shape == "50688 x 768 -> 3072, gelu"]
    launch, count, times = row
    assert count == 11 and launch.flops == 2 * 50688 * 768 * 3072
    w = 3072 * 768 * 2
    assert launch.bytes == 50688 * (768 + 3072) * 2 + 3 * w + 3072 * 2 + 12 * 2 * 50688 * 4
    assert times["arithmetic"] == pytest.approx(launch.flops / (0.72 * 788e12) * 1e6)
    assert times["traffic"] == pytest.approx(launch.bytes / (0.9 * 4.3e12) * 1e6)
    mufu = 50688 * 3072 * 2 / (16 * 132 * 1.75e9) * 1e6
    assert times["epilogue"] == pytest.approx(mufu / 2)
    assert times["predicted"] == pytest.approx(times["arithmetic"] + mufu / 2)


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_prediction_of_a_quantized_format(format):
    """Every launch has one; GEMMs at twice the peak rate, and as if K were half as long."""
    model = deit_fast.create_model("deit_tiny_distilled", depth=2)
    deit_fast.quantize(model, format)
    found = costs.launches(record(model, 256, BF16, H200))
    ops = Counter(launch.op for launch in found)
    assert ops["layer_norm_quantized"] >= 4 and ops["attention_quantized"] == 2
    gemms = [launch for launch in found if launch.op == "quantized_linear"]
    assert {predicted.case_of(launch, "Ti") for launch in gemms} >= {
        f"{format} {name}" for name in ("qkv", "proj", "fc1", "fc2")
    }
    for op in ("layer_norm_quantized", "attention_quantized"):  # a row of theirs is a launch's
        cases = {predicted.case_of(launch, "Ti") for launch in found if launch.op == op}
        assert cases - {None} == {format} and format in deit_cases(op, "Ti", 256)
    fc2 = next(launch for launch in gemms if predicted.case_of(launch, "Ti") == f"{format} fc2")
    M, K, N = 256 * 198, 768, 192
    times = fc2.times({"bf16_tflops": 788.0, "copy_tb_per_s": 4.3})
    assert fc2.flops == 2 * M * N * K
    assert times["arithmetic"] == pytest.approx(fc2.flops / (0.62 * 2 * 788) / 1e6)
    scales = 4 * (1 if format == "fp8" else M * K // 64)
    moved = M * K + N * K + 2 * 2 * M * N + 4 * N + 2 * N + scales
    assert fc2.bytes == moved


@pytest.mark.slow
def test_prediction_of_a_quantized_model(capsys):
    """The command's ratio to bf16; attention in fp8 is named and takes less."""
    (bf16, fp8, attention) = (
        predicted.predict("S", 256, chips.H200.peak_rates, False, False, *kind)[1]
        for kind in ((), ("fp8",), ("fp8", True))
    )
    assert bf16 / 1.5 < fp8 < bf16 / 1.2 and attention < fp8
    command.main(["--chip", "h200", "--network", "S", "--format", "fp8", "--attention"])
    out = capsys.readouterr().out
    assert "fp8 operands" in out and "fp8, attention too: 1.4" in out
    with pytest.raises(SystemExit):
        command.main(["--format", "int8", "--attention"])


def test_prediction_beside_measurement(tmp_path, monkeypatch, capsys):
    """What was measured stands in its column; what was not, does not."""
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    h200 = ["--network", "Ti", "--chip", "h200"]
    command.main(h200)
    before = capsys.readouterr().out
    assert "measured: not yet" in before and "788 TFLOP/s" in before
    limits = {"bf16_tflops": 700.0, "copy_tb_per_s": 4.0}
    folder = tmp_path / "h200"
    folder.mkdir()
    kernel = kernel_row(network="Ti", case="fc2", ms=0.0345)
    model = model_row(select(["DeiT-Ti distilled"])[0], "deit_fast_engine_bf16", 123456.0)
    for name, rows in (("peak_rates", []), ("kernels", [kernel]), ("table5", [model])):
        results = replace(results_of(*rows), peak_rates=limits)
        results.save(folder / f"{name}.json")
    command.main(["--network", "Ti"])
    other = capsys.readouterr().out
    assert "measured: not yet" in other and "798 TFLOP/s, 3.0 TB/s" in other, "an H100"
    command.main(h200)
    out = capsys.readouterr().out
    assert "700 TFLOP/s" in out and "123,456 images/s" in out and "34.5" in out
    assert "34.5" not in before and out.count("measured here") == 1


@pytest.mark.slow
def test_the_documented_predictions_are_the_commands():
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    documented = page.split("<!-- predictions: begin -->\n")[1].split("\n<!-- predictions: end")[0]
    assert documented == markdown(), "python -m benchmarks.predict --markdown"
