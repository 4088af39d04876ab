"""Runs with a live teacher."""

import json

import pytest
import torch
from small_runs import run, same, small_teacher, start
from tiers import slow


@pytest.mark.parametrize("distill", [slow("soft"), "hard"])
@pytest.mark.parametrize(
    "model, token", [slow("deit_tiny", "class"), ("deit_tiny_distilled", "distill")]
)
def test_distillation(distill, model, token, data, tmp_path):
    teacher = small_teacher(tmp_path / "teacher")
    out = tmp_path / "out"
    options = {"model": model, "distill": distill, "teacher": str(teacher)}
    events = []
    if (distill, token) in (("soft", "class"), ("hard", "distill")):
        start(data, out, **options)
        state = run(data, out, save_every=1, report=events.append, **options)
        assert same(state, run(data, tmp_path / "whole", **options))
    else:
        run(data, out, report=events.append, recipe_of={"epochs": 1}, **options)
    facts = json.loads((out / "run.json").read_text())
    assert facts["distill_token"] == token and facts["distill"] == distill
    assert facts["teacher_top1"] == events[0]["teacher_top1"] is not None
    heads = {"class", "distill", "joint", "joint_softmax"} if token == "distill" else {"class"}
    assert set(json.loads((out / "result.json").read_text())["top1"]) == heads


@pytest.mark.slow
def test_the_teacher_is_heard_by_the_distillation_head_alone(data, tmp_path):
    options = {"distill": "hard", "teacher": str(small_teacher(tmp_path / "teacher"))}
    recipe_of = {"hard_weight": 1.0, "opt": "sgd", "weight_decay": 0.0, "epochs": 1}
    first = run(data, tmp_path / "a", recipe_of=recipe_of | {"lr": 1e-30, "min_lr": 0.0}, **options)
    state = run(data, tmp_path / "b", recipe_of=recipe_of | {"warmup_epochs": 0}, **options)
    assert torch.equal(state["model"]["head.weight"], first["model"]["head.weight"])
    assert not torch.equal(state["model"]["head_dist.weight"], first["model"]["head_dist.weight"])


@pytest.mark.slow
def test_the_teacher_matters(data, tmp_path):
    """What it says is learnt, and another teacher is another run."""
    options = {"distill": "hard", "teacher": str(small_teacher(tmp_path / "teacher"))}
    state = run(data, tmp_path / "out", recipe_of={"epochs": 1}, **options)
    alone = run(data, tmp_path / "alone", recipe_of={"epochs": 1})
    assert state["rows"][0]["loss"] != alone["rows"][0]["loss"]
    weights = tmp_path / "teacher" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="other settings: teacher"):
        run(data, tmp_path / "out", recipe_of={"epochs": 1}, **options)


@pytest.mark.slow
def test_a_teacher_of_other_classes(data, tmp_path):
    teacher = str(small_teacher(tmp_path / "teacher", classes=5))
    with pytest.raises(ValueError, match="has 5 classes, expected the data's 3"):
        run(data, tmp_path / "out", distill="hard", teacher=teacher)
