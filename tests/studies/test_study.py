"""The studies' pages say what their data says. Smoke runs of them are steps of .ci/run."""

import argparse
import copy
import json
import shlex
from pathlib import Path

import pytest
import torch
from checking import NEIGHBOURS, assert_at_most, assert_close, assert_differ, seed, size
from modelling import images, tiny_pair

import deit_fast
from deit_fast.cli import distill_store, train
from studies import (
    fashion_mnist,
    quantization,
    quantization_page,
    quantization_schemes,
    store,
    store_page,
    store_plan,
)

DOCS = Path(__file__).parents[2] / "docs" / "studies"


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
    assert found["plan"] == json.loads(json.dumps(store_plan.FULL))
    names = ["labels", *(f"k{k}" for k in store_plan.FULL["ks"]), "live"]
    assert [row["run"] for row in found["rows"]] == names
    for row in found["rows"]:
        assert len(row["top1"]) == len(store_plan.FULL["seeds"])
        if row["run"].startswith("k"):
            assert row["bytes"] == row["predicted"]
            assert row["check"]["records"] >= store_plan.FULL["count"]
    for way in store_page.WAYS:
        assert len(found["steps"][way]["ms"]) == store_plan.FULL["repeats"]


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
    said = store_page.findings({"steps": steps, "rows": rows})
    assert said[0] == (
        "- From the store a step takes 50% less CPU time and the process 5 MiB MORE than "
        "with the ResNet of this study live."
    )
    assert "takes 100% MORE CPU time and the process 195 MiB less than" in said[1]
    assert (
        "K tried, 1 has the highest mean; the largest difference between two K is 0.50" in said[2]
    )
    assert "to the live teacher -1.00, to labels +1.00. Seeds alone differ by up to 1.00" in said[2]


def test_the_commands_shown_on_stores_are_commands():
    shown = [shlex.split(line)[1:] for line in store_plan.shown_commands(Path("runs"))]
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


def study_of_quantization():
    return json.loads((DOCS / "quantization.json").read_text())


def test_the_page_of_quantization_is_what_the_data_says():
    assert (DOCS / "quantization.md").read_text() == quantization.page(study_of_quantization())


def test_the_study_of_quantization_is_complete():
    found = study_of_quantization()
    assert found["plan"] == quantization.FULL
    for subject in found["subjects"].values():
        assert [row["name"] for row in subject["served"]] == list(quantization.SERVED)
        assert len(subject["scales"]) == 2 * len(quantization_schemes.SCHEMES)
        for row in (*subject["served"], *subject["scales"], *subject["attention"]):
            assert row["comparison"]["images"] in (subject["images"], subject["compared"])
    fashion = found["subjects"]["fashion"]
    assert fashion["images"] == 10_000
    for row in fashion["served"]:
        top1 = row["comparison"]["top1"], row["comparison"]["top1_quantized"]
        assert abs(top1[0] - top1[1]) <= 0.1


def test_findings_on_quantization_follow_from_the_figures():
    schemes = zip(quantization_schemes.SCHEMES, (0.02, 0.01, 0.03, 0.08), strict=True)
    rows = [
        {"format": format, "scheme": scheme, "comparison": {"logits_error": times * error}}
        for scheme, error in schemes
        for format, times in (("fp8", 1), ("int8", 1 + (scheme == "bound")))
    ]
    matmuls = [
        {"name": "the four matmuls of the block", "comparison": {"logits_error": 0.02}},
        {"name": "the four matmuls, and both", "comparison": {"logits_error": 0.025}},
    ]
    subject = {"scales": rows, "attention": matmuls}
    found = {"subjects": {"fashion": subject, "photographs": subject}}
    said = quantization_page.findings(found)
    assert len(said) == 4 and said[0].startswith("- Fashion-MNIST, fp8")
    assert (
        "64 features 0.50; per-tensor, calibrated 1.50; per-tensor, bound-derived 4.00" in said[0]
    )
    assert said[3].startswith("- photographs, int8") and "bound-derived 8.00." in said[3]
    assert "is 1.25 times" in quantization_page.attention_findings(found)[0]


@pytest.fixture
def subject():
    model = tiny_pair(img_size=32)[1]
    x = images(model, 6)
    return quantization_schemes.Subject(model, x, None, 6, x[:2])


@pytest.mark.parametrize(
    "format, scheme", [("fp8", "bound"), ("fp8", "calibrated"), ("int8", "group")]
)
def test_simulated_quantization_is_what_is_served(subject, format, scheme):
    model, x = subject.model, subject.images
    simulated = quantization_schemes.simulated(subject, format, scheme)
    served = copy.deepcopy(model)
    deit_fast.quantize(served, format, subject.calibration if scheme == "calibrated" else None)
    with torch.inference_mode():
        expected, got, exact = served(x), simulated(x), model(x)
    assert_differ(expected, exact)
    # a number between two quantized ones may go either way
    assert_at_most(size(got - expected), NEIGHBOURS * size(expected - exact))


def test_attention_in_fp8_by_hand():
    """One head of one image at a time."""
    seed(0)
    for how in ("row", "head"):
        attn = deit_fast.restore(tiny_pair(img_size=32)[1]).blocks[0].attn
        x = torch.randn(2, 9, 64)
        with torch.no_grad():
            qkv = attn.qkv(x)
            quantization_schemes.round_attention(attn, "qkpv", how)
            found = attn(x)
            out = torch.empty(2, 9, 64)
            for i in range(2):
                for h in range(2):
                    q, k, v = (qkv[i, :, 64 * j + 32 * h :][:, :32] for j in range(3))
                    axis = 1 if how == "row" else (0, 1)
                    q, k = e4m3(q, axis), e4m3(k, axis)
                    p = e4m3((q @ k.T / 32**0.5).softmax(1), 1)
                    out[i, :, 32 * h :][:, :32] = p @ e4m3(v, (0, 1))
            assert_close(found, attn.proj(out))


def e4m3(x, axis):
    scale = x.abs().amax(axis, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale
