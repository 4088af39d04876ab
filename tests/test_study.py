"""The studies' pages say what their data says. That they run, in little, are steps of .ci/run."""

import argparse
import json
import shlex
from pathlib import Path

from deit_fast.cli import distill_store, train
from studies import fashion_mnist, store

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


def study_of_stores():
    return json.loads((DOCS / "store.json").read_text())


def test_the_page_of_stores_is_what_the_data_says():
    assert (DOCS / "store.md").read_text() == store.page(study_of_stores())


def test_the_study_of_stores_is_complete():
    found = study_of_stores()
    assert found["plan"] == json.loads(json.dumps(store.FULL))
    names = ["labels", *(f"k{k}" for k in store.FULL["ks"]), "live"]
    assert [row["run"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert len(row["top1"]) == len(store.FULL["seeds"])
        if row["run"].startswith("k"):
            assert row["bytes"] == row["predicted"]
            assert row["check"]["records"] >= store.FULL["count"]
    for way in store.WAYS:
        assert len(found["steps"][way]["ms"]) == store.FULL["repeats"]


def test_findings_on_stores_follow_from_the_figures():
    steps = {
        "labels": {"ms": [9.0], "mib": [500.0]},
        "store": {"ms": [10.0, 12.0, 11.0], "mib": [505.0]},
        "teacher": {"ms": [22.0], "mib": [500.0]}, "large": {"ms": [5.5], "mib": [700.0]},
    }  # fmt: skip
    rows = [
        {"run": "labels", "top1": [80.0]}, {"run": "k1", "top1": [81.0, 82.0]},
        {"run": "k10", "top1": [81.0]}, {"run": "live", "top1": [82.0]},
    ]  # fmt: skip
    said = store.findings({"steps": steps, "rows": rows})
    assert said[0] == (
        "- From the store a step takes 50% less time of a core and the process 5 MiB MORE than "
        "with the ResNet of this study live."
    )
    assert "takes 100% MORE time of a core and the process 195 MiB less than" in said[1]
    assert (
        "K tried, 1 has the highest mean; the largest difference between two K is 0.50" in said[2]
    )
    assert "to the live teacher -1.00, to labels +1.00. Seeds alone differ by up to 1.00" in said[2]


def test_the_commands_shown_on_stores_are_commands():
    shown = [shlex.split(line)[1:] for line in store.shown_commands(Path("runs"))]
    parsers = {"train": train, "distill-store": distill_store}
    found = []
    for name, *options in shown:
        parser = argparse.ArgumentParser(exit_on_error=False)
        parsers[name].add_arguments(parser)
        found.append(parser.parse_args(options))
    _, written, labels, live, stored = found
    assert (written.action, written.k) == ("write", 10)
    assert (labels.teacher, labels.store) == (None, None)
    assert live.teacher == written.teacher == str(found[0].out / "model")
    assert live.recipe_temperature == live.recipe_soft_weight == 1.0
    assert stored.store == str(written.store) and stored.teacher is None
    alike = ("model", "model_args", "recipe", "recipe_lr", "recipe_epochs", "recipe_batch")
    for name in alike:
        assert getattr(labels, name) == getattr(live, name) == getattr(stored, name)
