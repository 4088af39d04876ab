"""deit-fast demo, as a user calls it."""

import re

import pytest
import torch
from breaking import wrong_mlps

from deit_fast.cli import main


@pytest.mark.slow
def test_demo_agrees_and_says_what_ran(capsys):
    assert main(["demo", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    for name in ("deit_tiny_distilled", "deit_small_distilled"):
        assert re.search(rf"{name} +fp32 +100% +\d\.\de-\d\d +[\d,]+ +[\d,]+ +\d+\.\d\d", out), out
    assert "astronaut, cat, coffee, rocket" in out
    if not torch.cuda.is_available():
        assert "These figures are a CPU's" in out and "attention: torch" in out


@pytest.mark.slow
def test_demo_fails_when_the_models_disagree(monkeypatch, capsys):
    wrong_mlps(monkeypatch, 1.001)
    assert main(["demo", "--batch", "1"]) == 1
    assert "disagrees" in capsys.readouterr().out
