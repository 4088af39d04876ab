"""pytest benchmarks/, as a user runs it."""

import json
import os
import re
from pathlib import Path

import forked
import jsonschema
import pytest
import timm
import torch
from made_up_results import model_row, results_of

from benchmarks import bench_attention_quantized, bench_quantized_linear, operations, suite, table5
from benchmarks.options import Options
from deit_fast import tune
from deit_fast.bench import results
from deit_fast.bench.modes import MODES
from deit_fast.bench.network import _patch_size, count_flops
from deit_fast.kernels import _chips, _tuned
from deit_fast.kernels.cases import deit_cases
from deit_fast.kernels.quantize import FORMATS

ROOT = Path(__file__).parents[2]
SCHEMA = jsonschema.Draft202012Validator(
    json.loads((ROOT / "benchmarks" / "results.schema.json").read_text())
)
FORWARD = "fused and not backward"
PYTHONPATH = os.environ.get("PYTHONPATH", "")
BF16 = torch.bfloat16
SMOKE = ["--rows", "DeiT-Ti distilled", "--max-batch", "1", "--runs", "2", "--warmup", "1"]


def bench(out, *args):
    drop = ("TRITON_INTERPRET", "PYTEST_")  # what the tests and xdist set
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    command = ["pytest", "-q", "--benchmark-only", "--out", out, *args]
    return forked.run(command, cwd=ROOT, envs=[env])[0]


@pytest.fixture(scope="module")
def peak_rates(tmp_path_factory):
    """A results folder whose peak rates are measured, for the others to start from."""
    out = tmp_path_factory.mktemp("results")
    done = bench(out, "benchmarks/bench_peak_rates.py", "--quick")
    assert done.returncode == 0, done.stdout
    return out


@pytest.fixture
def out(peak_rates, tmp_path):
    (path,) = peak_rates.glob("*/peak_rates.json")
    target = tmp_path / path.parent.name / path.name
    target.parent.mkdir()
    target.write_bytes(path.read_bytes())
    return tmp_path


def rows(out, name):
    (path,) = out.glob(f"*/{name}.json")
    SCHEMA.validate(json.loads(path.read_text()))
    return results.load(path).rows


@pytest.mark.slow
def test_rows_are_measured_kept_and_measured_again(out):
    args = ["benchmarks/bench_table5.py", *SMOKE, "--modes", "eager_fp32,deit_fast_fp32"]
    saved = out / "saved.json"
    done = bench(out, *args, "--protocols", "batch", f"--benchmark-json={saved}")
    assert "2 passed" in done.stdout, done.stdout
    first = rows(out, "table5")
    assert [(r.mode, r.batch, r.status) for r in first] == [
        ("eager_fp32", 1, "measured"), ("deit_fast_fp32", 1, "measured"),
    ]  # fmt: skip
    # pytest-benchmark shows the times that the device's clock took
    for shown, row in zip(json.loads(saved.read_text())["benchmarks"], first, strict=True):
        assert shown["stats"]["median"] == pytest.approx(row.ms_median / 1e3)
        assert shown["extra_info"]["images_per_s"] == row.images_per_s
        assert shown["extra_info"]["relative_error"] == row.relative_error

    done = bench(
        out, *args, "--protocols", "batch,paper"
    )  # both protocols now: what is there is kept
    assert "2 passed, 2 skipped" in done.stdout, done.stdout
    assert "kept: measured by this build on this chip" in done.stdout
    assert ", batch 1, kept\n" in done.stdout
    assert len(re.findall(r"DeiT-Ti distilled +eager_fp32 ", done.stdout)) == 2
    second = rows(out, "table5")
    assert second[:2] == first and [r.protocol for r in second[2:]] == ["paper", "paper"]

    done = bench(out, *args, "--protocols", "batch", "--again", "--profile")
    assert "2 passed" in done.stdout, done.stdout
    again = rows(out, "table5")
    assert again[2:] == second[2:] and again[0].ms_median != first[0].ms_median
    assert "DeiT-Ti distilled, eager_fp32, batch 1" in done.stdout and "GEMM" in done.stdout
    assert len(list(out.glob("*/traces/*.json.gz"))) == 2


@pytest.mark.slow
def test_training_is_measured_with_and_without_the_optimiser(out):
    done = bench(out, "benchmarks/bench_train.py", *SMOKE, "--modes",
                 "eager_fp32,eager_fp32_train,deit_fast_fp32_train", "--profile")  # fmt: skip
    assert "4 passed" in done.stdout, done.stdout
    assert [(r.mode, r.protocol, r.batch, r.status) for r in rows(out, "train")] == [
        (f"{mode}_fp32_train", protocol, 1, "measured")
        for mode in ("eager", "deit_fast")
        for protocol in ("batch", "step")
    ]
    assert "eager_fp32_train, full step, batch 1" in done.stdout
    assert len(list(out.glob("*/traces/*.json.gz"))) == 4


@pytest.mark.slow
def test_when_the_minutes_are_over_nothing_is_begun(out):
    done = bench(out, "benchmarks/bench_table5.py", *SMOKE, "--modes", "eager_fp32",
                 "--minutes", "0")  # fmt: skip
    assert "1 skipped" in done.stdout and "--minutes are over" in done.stdout, done.stdout
    assert not list(out.glob("*/table5.json"))


@pytest.mark.slow
def test_kernels_are_compared_with_the_playbook(out):
    done = bench(out, "benchmarks/bench_layer_norm.py", "benchmarks/bench_linear.py", *SMOKE,
                 "--against-playbook", "-k", "not compiled and not backward")  # fmt: skip
    assert "failed" not in done.stdout, done.stdout
    measured = {(r.op, r.case, r.mode): r for r in rows(out, "kernels")}
    cases = [("layer_norm", ""), ("add_layer_norm", ""), *[("linear", c) for c in
             ("qkv", "proj", "fc1", "fc2")]]  # fmt: skip
    assert {(op, case) for op, case, _ in measured} == set(cases)
    norm = measured["layer_norm", "", "fused"]
    assert norm.bytes == 2 * (2 * 198 * 192 + 2 * 192) and norm.flops == 0
    fc1 = measured["linear", "fc1", "eager"]
    assert fc1.flops == 2 * 198 * 192 * 768
    assert fc1.bytes == 2 * (198 * 192 + 192 * 768 + 768 + 198 * 768)
    (chip,) = out.glob("*/peak_rates.json")
    limits = json.loads(chip.read_text())["peak_rates"]
    moved, matmuls = fc1.bytes / limits["copy_tb_per_s"], fc1.flops / limits["bf16_tflops"]
    assert fc1.predicted_ms == pytest.approx(max(moved, matmuls) / 1e9)
    gpu = torch.cuda.is_available()
    expected = pytest.approx(fc1.predicted_ms / fc1.ms_median) if gpu else None
    assert fc1.fraction_of_peak_rate == expected
    assert "predicted us" in done.stdout


ALL_WITH_GRADIENTS = ("layer_norm", "linear", "attention", "layer_norm_linear", "layer_norm_mlp",
                      "layer_norm_attention", "patch_embed", "talking_heads")  # fmt: skip


@pytest.mark.slow
def test_kernels_are_compared_forward_and_backward(out):
    files = [f"benchmarks/bench_{op}.py" for op in (*ALL_WITH_GRADIENTS, "classifier")]
    done = bench(out, *files, *SMOKE, "-k", "backward and fused and not proj and not qkv")
    assert "failed" not in done.stdout, done.stdout
    measured = {(r.op, r.case, r.mode): r for r in rows(out, "kernels")}
    assert {op for op, _, _ in measured} == {*ALL_WITH_GRADIENTS, "add_layer_norm"}
    assert all(case.endswith("forward+backward") for _, case, _ in measured)
    fc1 = measured["linear", "fc1 forward+backward", "fused"]
    assert fc1.flops == 3 * 2 * 198 * 192 * 768
    assert fc1.bytes == 2 * (2 * (198 * 192 + 192 * 768 + 768 + 198 * 768))
    patches = measured["patch_embed", "float NCHW forward+backward", "fused"]
    assert patches.flops == 2 * 2 * 196 * 192 * 768  # nobody asks for the images' gradient


@pytest.mark.slow
def test_a_wrong_gradient_is_not_timed(out, tmp_path):
    plugin = tmp_path / "broken_gradient.py"
    plugin.write_text(
        "from deit_fast import kernels\n"
        "real = kernels.layer_norm\n"
        "def layer_norm(x, weight, bias):\n"
        "    return real(x, weight, bias + 0.2 * (bias - bias.detach()))\n"
        "kernels.layer_norm = layer_norm\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), PYTHONPATH])
    try:
        done = bench(out, "-p", "broken_gradient", "benchmarks/bench_layer_norm.py", *SMOKE,
                     "-k", "fused and not add")  # fmt: skip
    finally:
        os.environ["PYTHONPATH"] = PYTHONPATH
    found = {r.case: r.status for r in rows(out, "kernels")}
    assert found == {"": "measured", "forward+backward": "failed"}, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("factor", ["1.02", "float('nan')"])
def test_a_kernel_that_disagrees_is_not_timed(out, tmp_path, factor):
    """A fused attention that is off by two per cent, or NaN, in a process of its own."""
    plugin = tmp_path / "broken_attention.py"
    plugin.write_text(
        "from deit_fast import kernels\n"
        "real = kernels.attention\n"
        f"kernels.attention = lambda *a, **k: {factor} * real(*a, **k)\n"
    )
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path), PYTHONPATH])
    try:
        done = bench(out, "-p", "broken_attention", "benchmarks/bench_attention.py", *SMOKE,
                     "-k", FORWARD)  # fmt: skip
    finally:
        os.environ["PYTHONPATH"] = PYTHONPATH
    assert "2 failed" in done.stdout and "Mismatch: relative" in done.stdout, done.stdout
    assert {(r.status, r.ms_median) for r in rows(out, "kernels")} == {("failed", None)}
    if "nan" in factor:
        return
    # it is not stumbled over again
    done = bench(out, "benchmarks/bench_attention.py", *SMOKE, "-k", FORWARD)
    assert "2 failed" in done.stdout and "(kept; --again tries anew)" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table5.json", "peak_rates.json"])
def test_a_corrupt_file_stops_the_suite_and_stays(out, name):
    (peak_rates,) = out.glob("*/peak_rates.json")
    broken = peak_rates.with_name(name)
    broken.write_text('{"rows": [')
    done = bench(out, "benchmarks/bench_latency.py", *SMOKE, "--modes", "eager_fp32")
    assert done.returncode == 4
    assert f"{broken}: not JSON" in done.stdout and "left untouched" in done.stdout
    assert broken.read_text() == '{"rows": [' and "Traceback" not in done.stdout + done.stderr
    assert not list(out.glob("*/latency.json"))


def parse(**given):
    return Options.parse(lambda name: given.get(name.replace("-", "_")))


def test_bad_options_are_named():
    for given, message in (
        ({"rows": "DeiT-X"}, "rows: unknown 'deit-x', did you mean deit-s"),
        ({"modes": "eager_fp31"}, "modes: unknown 'eager_fp31', did you mean eager_fp32"),
        ({"protocols": "latency"}, "protocols: unknown 'latency', did you mean batch"),
        ({"protocols": "step"}, "protocols: unknown 'step', did you mean"),
        ({"runs": 0}, "--runs: 0, expected 1 or more"),
        ({"max_batch": -3}, "--max-batch: -3, expected 1 or more"),
        ({"warmup": -1}, "--warmup: -1, expected 0 or more"),
        ({"quick": True, "all": True}, "--quick and --all: expected one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(**given)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As far as options look."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_gpu_the_quick_set_is_the_default(on_a_cpu):
    options = parse()
    assert options.quick and options.chosen_for_cpu and not parse(quick=True).chosen_for_cpu
    assert options.out == ROOT / "benchmarks" / "results" / "quick"
    table = options.table5_rows()
    assert {e.network for p, e, m in table if (p, m.name) == ("batch", "eager_fp32")} == {
        "ResNet-18", "ResNet-50", "RegNetY-4GF", "EfficientNet-B0", "EfficientNet-B1", "DeiT-Ti",
        "DeiT-S", "DeiT-B", "DeiT-Ti distilled",
    }  # fmt: skip
    compiled = [(p, e.network) for p, e, m in table if m.compile]
    assert compiled == [("batch", "DeiT-Ti distilled")]
    assert {m.name for _, e, m in table} == {"eager_fp32", "deit_fast_fp32", "compile_bf16"}
    assert not any(m.fast for _, e, m in table if e.family == "convnet")
    for given in ({"all": True}, {"rows": "DeiT-S"}, {"modes": "eager_bf16"},
                  {"protocols": "batch"}):  # fmt: skip
        chosen = parse(**given)
        assert not chosen.quick and chosen.out.name == "results", given
    assert len(parse(quick=True, modes="compile_bf16").table5_rows()) == 4


def test_all_on_a_cpu_is_fp32_at_a_batch_by_size(on_a_cpu):
    options = parse(all=True)
    assert options.rows == list(table5.ENTRIES) and options.protocols == ["batch"]
    assert [m.name for m in options.modes if not m.train] == ["eager_fp32", "deit_fast_fp32"]
    assert (options.runs, options.warmup, len(options.table5_rows())) == (10, 1, 36)
    batches = {e.network: options.batch_of(e, "batch") for e in options.rows}
    for network, batch in (("ResNet-18", 8), ("DeiT-S", 4), ("DeiT-B", 2), ("ViT-L/16", 1),
                           ("EfficientNet-B7", 1), ("EfficientNet-B4", 8)):  # fmt: skip
        assert batches[network] == batch, network
    assert all(b == 1 or b * e.gmacs <= 36 for e in table5.ENTRIES for b in [batches[e.network]])
    given = parse(all=True, batch=3)
    assert {given.batch_of(e, "batch") for e in given.rows} == {3}
    assert {parse(all=True, max_batch=1).batch_of(e, "batch") for e in given.rows} == {1}
    assert options.batch_of(table5.ENTRIES[0], "paper") == options.max_batch


@pytest.mark.slow
def test_multiply_adds_are_those_of_timms_networks():
    for entry in table5.distinct([*table5.ENTRIES, *table5.RELATIVES]):
        size = {"img_size": entry.image_size} if _patch_size(entry.timm_name) else {}
        model = timm.create_model(entry.timm_name, num_classes=1000, **size).to("meta").eval()
        counted = round(count_flops(model, entry.image_size) / 2e9, 2)
        assert entry.gmacs == counted, entry.network


def test_the_whole_of_table5_is_the_default_on_a_gpu(on_a_gpu):
    options = parse()
    assert not options.quick and len(options.table5_rows()) == 2 * (26 * 17 - 16 * 9)
    assert {options.batch_of(e, "batch") for e in options.rows} == {256}
    assert options.rows == list(table5.ENTRIES) and options.modes == list(MODES.values())
    assert options.protocols == ["batch", "paper"] and options.kernel_networks() == [
        "Ti", "S", "B", "B-384",
    ]  # fmt: skip
    assert (options.runs, options.warmup, options.batch) == (30, 10, 256)
    assert [e.network for e in options.networks(train=True)] == [
        f"DeiT-{size} distilled" for size in ("Ti", "S", "B")
    ]
    assert options.train_batches == (64, 256)
    assert parse(max_batch=128).train_batches == (64, 128)
    assert parse(max_batch=128, batch=32).train_batches == (32,)
    assert [e.network for e in parse(rows="resnet50").networks(train=True)] == ["ResNet-50"]
    assert options.relatives == list(table5.RELATIVES)
    some = parse(rows="TinyViT-5M,DeiT-S")
    assert [[e.network for e in rows] for rows in (some.rows, some.relatives)] == [
        ["DeiT-S"], ["TinyViT-5M"],
    ]  # fmt: skip
    assert [e.network for e in some.networks(train=True)] == ["DeiT-S", "TinyViT-5M"]
    quick = parse(quick=True, runs=7)
    assert quick.relatives == []
    assert [e.network for e in quick.networks(train=True)] == ["DeiT-Ti distilled"]
    assert [e.network for e in quick.rows] == ["ResNet-18", "DeiT-Ti distilled"]
    assert (quick.runs, quick.kernel_networks()) == (7, ["Ti"])
    assert not quick.small_rows and not quick.compile_once and quick.out.name == "results"


def test_table5_is_the_papers():
    assert len(table5.ENTRIES) == 32 and len(table5.distinct(list(table5.ENTRIES))) == 26
    (small,) = table5.select(["DeiT-S distilled 1000 epochs"])
    assert (small.v100_images_per_s, small.imagenet_top1, small.params_m) == (936.2, 82.6, 22)
    assert len(table5.select(["convnet"])) == 18 and len(table5.select(["transformer"])) == 14
    same = table5.select(["deit_small_distilled_patch16_224"])
    assert [e.network for e in same] == ["DeiT-S distilled", "DeiT-S distilled 1000 epochs"]
    assert [e.network for e in table5.distinct(same)] == ["DeiT-S distilled"]
    sizes = {e.network: e.image_size for e in table5.ENTRIES}
    assert (sizes["EfficientNet-B1"], sizes["KDforAA-B8"], sizes["ViT-B/16"]) == (240, 800, 384)


@pytest.mark.slow
def test_relatives_are_timms():
    """Their sizes, and TinyViT's throughputs of the paper."""
    for entry in table5.RELATIVES:
        config = timm.get_pretrained_cfg(entry.timm_name)
        assert config.input_size[-1] == entry.image_size, entry.network
        with torch.device("meta"):
            model = timm.create_model(entry.timm_name, num_classes=1000)
        params = sum(p.numel() for p in model.parameters())
        assert round(params / 1e6) == entry.params_m, entry.network
    v100 = {e.network: e.v100_images_per_s for e in table5.RELATIVES if e.v100_images_per_s}
    assert v100 == {"TinyViT-5M": 3060, "TinyViT-11M": 2468, "TinyViT-21M": 1571}
    assert [e.timm_name for e in table5.select(["CaiT-S24-384"])] == ["cait_s24_384"]


@pytest.mark.slow
def test_relatives_are_measured(out):
    done = bench(
        out, "benchmarks/bench_relatives.py", "--rows", "TinyViT-5M", *SMOKE[2:],
        "--modes", "eager_fp32,deit_fast_fp32,deit_fast_fp8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert [(r.timm_name, r.mode, r.status) for r in rows(out, "relatives")] == [
        ("tiny_vit_5m_224", *found)
        for found in (
            ("eager_fp32", "measured"), ("deit_fast_fp32", "measured"),
            ("deit_fast_fp8", "unavailable"),
        )
    ]  # fmt: skip
    assert "2 passed, 1 skipped" in done.stdout and "unavailable: it has no Block" in done.stdout
    assert re.search(r"deit_fast_fp8 .* unavailable: it has no Block", done.stdout)


def test_what_is_unavailable_stays_so_for_its_build(tmp_path):
    entry = table5.select(["DeiT-S distilled"])[0]
    row = model_row(entry, "torchao_fp8_compile", status="unavailable", note="no torchao")
    stamp = {"commit": row.commit, "build": row.build}
    session = suite.Suite(parse(), torch.device("cpu"), {}, stamp, tmp_path)
    session.files["table5"] = results_of(row)
    with pytest.raises(pytest.skip.Exception, match="unavailable: no torchao"):
        session.keep_or_stop("table5", row.key)
    assert session.measured == [row]


def test_served_by_is_what_a_table_says():
    """The results file names who computed, not who would by rule."""
    x = torch.zeros(2, 100, 64).half()
    inputs = {"x": x, "weight": torch.zeros(128, 64).half(), "activation": "none"}
    qkv = torch.zeros(2, 70, 3, 1, 32).half().unbind(2)
    attended = dict(zip("qkv", qkv, strict=True))
    with _chips.simulate_device(_chips.Chip("H", (9, 0), 132)):
        assert tune.served_by("linear", inputs) == tune.served_by("attention", attended) == "triton"
        with _tuned.forced("linear", {"implementation": "cublas"}):
            assert tune.served_by("linear", inputs) == "cublas"
        with _tuned.forced("attention", {"implementation": "torch"}):
            assert tune.served_by("attention", attended) == "torch"


def scales_rows():
    """On a CPU PyTorch 2.11's fp8 GEMM takes a per-tensor scale, not per-row scales."""
    x, scales = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(x, x.T, scales, scales.T, out_dtype=BF16)
    except RuntimeError as error:
        assert "per-tensor scaling" in str(error)
        return False
    return True


@pytest.mark.parametrize("case", [f"{of} {name}" for of in ("fp8", "int8")
                                  for name in ("qkv", "proj", "fc1", "fc2")])  # fmt: skip
def test_quantized_baselines_compute_the_same(case):
    """What only a GPU times: ours in bf16, PyTorch's quantized GEMMs, and the reference
    as it is traced."""

    def make(device="cpu"):
        return operations.cast(bench_quantized_linear.inputs(**arguments, device=device), BF16)

    torch.compiler.reset()
    arguments = deit_cases("quantized_linear", "Ti", 1)[case]
    made = make()
    plain = bench_quantized_linear.reference(**made)
    traced = torch.compile(
        bench_quantized_linear.reference, backend="eager", fullgraph=True, dynamic=False
    )
    rest = {name: t for name, t in made.items() if not name.startswith("wide")}
    found = [bench_quantized_linear.matmul(**made, implementation="bf16"), traced(**made)]
    if case.startswith("int8") or scales_rows():
        found.append(bench_quantized_linear.cublas(**rest))
    for got in found:
        assert operations.agree(got, plain, bench_quantized_linear.exact, made) > 0


@pytest.mark.parametrize("case", ["fp8", "int8", "fp8 operands"])
def test_quantized_attention_is_what_its_case_says(case):
    arguments = deit_cases("attention_quantized", "Ti", 1)[case]
    made = operations.cast(bench_attention_quantized.attention_quantized_inputs(**arguments), BF16)
    plain = bench_attention_quantized.reference(**made)
    assert plain.values.dtype == FORMATS[case.split()[0]]
    assert (plain.scales.numel() == 1) == ("fp8" in case) == (made["out_scale"] is not None)
    got = bench_attention_quantized.ours(**made)
    assert operations.agree(got, plain, bench_attention_quantized.exact, made) > 0
    assert ("qkv" in made) == ("operands" in case)
