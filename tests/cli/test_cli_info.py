"""deit-fast info, as a user calls it."""

import pytest

from deit_fast.cli import main


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
