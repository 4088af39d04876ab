"""deit-fast bench, as a user calls it."""

import re

import pytest
import torch
from breaking import wrong_mlps

from deit_fast.bench import results
from deit_fast.cli import bench, main

BENCH = ["bench", "deit_tiny_distilled", "--image-size", "32", "--runs", "2", "--warmup", "1"]


@pytest.mark.slow
def test_bench_measures_and_writes_a_results_file(tmp_path, capsys):
    path = tmp_path / "new" / "tiny.json"
    args = [*BENCH, "--batches", "1,2", "--modes", "eager_fp32,deit_fast_fp32", "--json", str(path)]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"deit_tiny_distilled +(eager|deit_fast)_fp32 +batch +[12] ", out)) == 4
    if not torch.cuda.is_available():
        assert "These figures are a CPU's" in out
    file = results.load(path)
    expected = [("eager_fp32", 1), ("deit_fast_fp32", 1), ("eager_fp32", 2), ("deit_fast_fp32", 2)]
    assert [(r.mode, r.batch) for r in file.rows] == expected
    assert all(r.status == "measured" and r.image_size == 32 and r.runs == 2 for r in file.rows)
    assert file.peak_rates["copy_tb_per_s"] > 0 and file.protocol["warmup"] == 1

    assert main([*BENCH, "--batches", "3", "--protocol", "latency", "--json", str(path)]) == 0
    assert results.load(path).rows[:4] == file.rows and len(results.load(path).rows) > 4


@pytest.mark.slow
def test_bench_keeps_what_was_measured_when_interrupted(tmp_path, capsys, monkeypatch):
    real, calls = bench.measure, []

    def measure(network, mode, *args):
        calls.append(mode.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(network, mode, *args)

    monkeypatch.setattr(bench, "measure", measure)
    path = tmp_path / "tiny.json"
    modes = "eager_fp32,deit_fast_fp32"
    assert main([*BENCH, "--batches", "1,2", "--modes", modes, "--json", str(path)]) == 130
    printed = capsys.readouterr()
    missing = "deit_fast_fp32 at 1, eager_fp32 at 2, deit_fast_fp32 at 2"
    assert f"interrupted; not measured: {missing}" in printed.err
    assert "eager_fp32 " in printed.out
    assert [r.mode for r in results.load(path).rows] == ["eager_fp32"]


@pytest.mark.slow
def test_bench_prints_a_results_file(tmp_path, capsys):
    assert main([*BENCH, "--batches", "1", "--modes", "deit_fast_fp32", "--json"]) == 0
    printed = capsys.readouterr()
    path = tmp_path / "printed.json"
    path.write_text(printed.out)
    assert [(r.mode, r.batch) for r in results.load(path).rows] == [("deit_fast_fp32", 1)]
    assert "deit_fast_fp32 " in printed.err
    assert main(["bench", "any", "--modes", "list"]) == 0
    assert "deit_fast_fp8_attention\n" in capsys.readouterr().out


def test_bench_keeps_what_was_measured_before_an_error(tmp_path, capsys, monkeypatch):
    real, calls = bench.measure, []

    def measure(network, mode, *args):
        calls.append(mode.name)
        if len(calls) == 2:
            raise RuntimeError("out of luck")
        return real(network, mode, *args)

    monkeypatch.setattr(bench, "measure", measure)
    path = tmp_path / "tiny.json"
    assert main([*BENCH, "--batches", "1,2", "--modes", "eager_fp32", "--json", str(path)]) == 2
    printed = capsys.readouterr()
    assert "out of luck" in printed.err and "eager_fp32 " in printed.out
    assert [(r.mode, r.batch) for r in results.load(path).rows] == [("eager_fp32", 1)]


@pytest.mark.slow
def test_bench_names_a_mismatch(monkeypatch, capsys):
    wrong_mlps(monkeypatch, 1.01)
    assert main([*BENCH, "--batches", "1", "--modes", "deit_fast_fp32"]) == 1
    assert "failed: Mismatch: relative error" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_profile(tmp_path, capsys):
    """Of a quantized mode too."""
    modes = ("eager_fp32", "deit_fast_fp8")
    args = ["--batches", "1", "--modes", ",".join(modes), "--profile", str(tmp_path / "traces")]
    assert main([*BENCH, *args]) == 0
    out = capsys.readouterr().out
    assert "attention" in out
    for mode in modes:
        assert f"deit_tiny_distilled, {mode}, batch 1" in out
        assert re.search(rf"{mode} +batch +1 +\d", out)
        trace = f"deit_tiny_distilled_patch16_224-{mode}-1.json.gz"
        assert (tmp_path / "traces" / trace).exists()


@pytest.mark.slow
def test_bench_names_what_is_wrong(tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for args, message in (
        (["bench", "deit_tinny"], "network: unknown 'deit_tinny', did you mean deit_tiny"),
        (["bench", "deit_tiny", "--image-size", "225"], "225 for deit_tiny_patch16_224"),
        (["bench", "deit_tiny", "--modes", "eager_fp31"], "--modes: unknown 'eager_fp31'"),
        (["bench", "deit_tiny", "--batches", "1,x"], "--batches: '1,x', expected numbers from 1"),
        (["bench", "deit_tiny", "--batches", "0"], "--batches: '0', expected numbers from 1"),
        (["bench", "deit_tiny", "--runs", "0"], "--runs: 0, expected 1 or more"),
        (
            ["bench", "deit_tiny", "--protocol", "step", "--modes", "eager_fp32"],
            "--modes: eager_fp32 by protocol step, expected one that ends in _train",
        ),
        (["bench", "deit_tiny", "--json", str(broken)], f"{broken}: not JSON"),
        (["bench", "resnet18", "--modes", "deit_fast_fp32"], "deit_fast has no modules for it"),
        (["bench", "resnet18", "--modes", "torchao_fp8_compile"], "resnet18: it has no Block"),
    ):
        assert main(args) == 2, args
        assert message in capsys.readouterr().err
    assert broken.read_text() == "{"
