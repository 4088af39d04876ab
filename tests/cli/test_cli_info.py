"""deit-fast info, as a user calls it."""

import json
import os
import platform
from pathlib import Path

import pytest
import torch

import deit_fast
from deit_fast.cli import info, main
from deit_fast.cli._next_steps import EXTRAS, extras, next_steps
from deit_fast.kernels import _chips, _tuned, exclude


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "triton", "timm", "attention", "layer_norm_mlp"):
        assert word in out
    assert main(["info", "--chip", "7.0"]) == 0
    out = capsys.readouterr().out
    assert "cublas" in out and "tensor cores" in out
    assert main(["info", "--chip", "nine"]) == 2


@pytest.mark.parametrize(
    ("chip", "fp8", "int8"),
    [("8.0", "none fp8 (e4m3) needs compute capability 8.9", "triton quantized operands"),
     ("9.0", "triton quantized operands", "triton quantized operands"),
     ("7.5", "none fp8 (e4m3) needs", "none Triton multiplies int8 on tensor cores from")],
)  # fmt: skip
def test_info_of_quantized_formats(chip, fp8, int8, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["info", "--chip", chip]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"quantized_linear fp8 {fp8}" in out and f" int8 {int8}" in out


def test_json_is_all_of_standard_output(capsys, tmp_path):
    assert main(["info", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "backend auto" in printed.err and "Next:" in printed.err
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["versions"]["deit_fast"] == deit_fast.__version__
    assert found["python"] == platform.python_version() and found["os"] == platform.platform()
    assert {row["operation"] for row in found["operations"]} > {"attention", "layer_norm_mlp"}
    for name in ("gpu", "driver", "cuda", "cpu", "capability", "tuned", "environment", "extras"):
        assert name in found
    assert str(Path.home()) not in printed.out and os.getcwd() not in printed.out
    assert main(["info", "--json", str(tmp_path / "new" / "info.json")]) == 0
    assert json.loads((tmp_path / "new" / "info.json").read_text()) == found
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["info.json"]
    assert "backend auto" in capsys.readouterr().out
    assert main(["info", "--json", str(tmp_path)]) == 2
    assert f"--json: {tmp_path} is a folder, expected a file" in capsys.readouterr().err


def test_json_of_another_chip(capsys):
    assert main(["info", "--chip", "7.0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["asked"] and found["capability"] == [7, 0] and not found["next"]
    linear = [r["implementation"] for r in found["operations"] if r["operation"] == "linear"]
    assert linear == ["cublas"]


def test_exclusions_are_named(capsys):
    exclude("attention")
    try:
        assert main(["info"]) == 0
    finally:
        exclude()
    out = " ".join(capsys.readouterr().out.split())
    assert "DEIT_FAST_EXCLUDE leaves to PyTorch: attention. Unset it" in out


def machine(**changes):
    found = {"excluded": [], "gpu": None, "capability": None, "cuda": "13.0", "tuned": []}
    return found | {"extras": {}} | changes


H200 = {"gpu": "NVIDIA H200", "capability": (9, 0)}
NO_TABLE = {"whose": "user's", "file": "h200.json", "choices": 0, "problem": None}


@pytest.mark.parametrize(
    ("found", "driver", "expected"),
    [
        (machine(), False, ["On this CPU PyTorch computes everything: deit-fast demo"]),
        (machine(cuda=None), True, ["this PyTorch is built without CUDA", "On this CPU"]),
        (machine(), True, ["this PyTorch cannot use it", "On this CPU"]),
        (machine(**H200, tuned=[NO_TABLE]), True, ["deit-fast tune --model deit_base_distilled"]),
        (machine(**H200, tuned=[NO_TABLE | {"choices": 3}]), True, ["deit-fast bench"]),
        (
            machine(**H200, tuned=[NO_TABLE | {"problem": "no JSON"}]), True,
            ["deit-fast tune", "The user's tuned table is ignored: delete it"],
        ),
        (machine(gpu="V100", capability=(7, 0)), True, ["deit-fast bench"]),
        (machine(gpu="P100", capability=(6, 0)), True, ["need compute capability 7.0"]),
        (machine(excluded=["linear"]), False, ["leaves to PyTorch: linear", "On this CPU"]),
        (
            machine(extras={"export": {"onnx": None, "onnxscript": "0.7"}}), False,
            ["On this CPU", "--format onnx: pip install 'deit_fast[export]' (onnx missing)"],
        ),
    ],
)  # fmt: skip
def test_next_steps(found, driver, expected):
    steps = next_steps(found, driver)
    assert len(steps) == len(expected)
    for step, words in zip(steps, expected, strict=True):
        assert words in step


def test_extras_are_those_of_the_package():
    assert set(extras()) == set(EXTRAS) and set(extras()["train"]) > {"matplotlib", "datasets"}


def test_tuned_tables_without_paths(tmp_path, monkeypatch):
    chip = _chips.Chip("NVIDIA H9000", (9, 0), 4)
    monkeypatch.setenv("DEIT_FAST_CACHE", str(tmp_path))
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/h9000.json").write_text("{")
    mine, shipped = info._tables(chip)
    assert mine["whose"] == "user's" and mine["problem"] and str(tmp_path) not in mine["problem"]
    assert (shipped["choices"], shipped["problem"]) == (0, None)
    assert "h9000.json is ignored: " in info._line(mine, _tuned.folder())
    assert info._line(shipped, _tuned.SHIPPED) == f"no tuned table {_tuned.SHIPPED}/h9000.json"
