"""The studies' pages say what their data says. That one runs, in little, is a step of .ci/run."""

import argparse
import json
import shlex
from pathlib import Path

from deit_fast.cli import train
from studies import fashion_mnist

DOCS = Path(__file__).parents[1] / "docs" / "studies"


def study():
    return json.loads((DOCS / "fashion_mnist.json").read_text())


def test_the_page_is_what_the_data_says():
    assert (DOCS / "fashion_mnist.md").read_text() == fashion_mnist.page(study())
    for name in ("top1", "disagreement", "tokens"):
        assert (DOCS / f"fashion_mnist_{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_every_row_has_every_seed():
    rows = study()["rows"]
    assert [row["row"] for row in rows] == [label for label, *_ in fashion_mnist.ROWS]
    assert {len(row["top1"]) for row in rows} == {len(study()["seeds"])} == {3}


def test_differences_follow_from_the_figures():
    top1 = {
        ("none", "class"): [80.0, 81.0], ("soft", "class"): [80.0, 82.0],
        ("hard", "class"): [82.0, 83.0], ("token", "both"): [81.0, 84.0],
    }  # fmt: skip
    said = fashion_mnist.differences(top1)
    assert "class token against none: +2.00 points, the same sign in each of 2 seeds" in said[2]
    assert "soft distillation against none: +0.50 points, not the same sign in each" in said[3]
    assert said[-1].endswith("class token: +0.00 points, not the same sign in each of 2 seeds")


def test_the_commands_shown_are_commands():
    parser = argparse.ArgumentParser(exit_on_error=False)
    train.add_arguments(parser)
    shown = [parser.parse_args(shlex.split(line)[2:]) for line in fashion_mnist.commands()]
    assert [args.distill for args in shown] == [None, None, "soft", "hard", "hard"]
    teacher = str(shown[0].out / "model")
    assert [args.teacher for args in shown] == [None, None, teacher, teacher, teacher]
