"""LoRA: adapters beside the Linears of the blocks, trained alone, merged at the end."""

import sys

import pytest
import selection
import timm
import torch
from checking import assert_close, assert_differ
from modelling import images, tiny_pair
from small_runs import MODEL_ARGS, RECIPE, run, settings

import deit_fast
from deit_fast.distill import adapters
from deit_fast.distill.recipe import load
from deit_fast.distill.student import build_student


@pytest.fixture
def peft():
    return selection.extra("tools", "peft")


@pytest.mark.slow
def test_adapters_are_beside_these_linears(peft):
    _, model = tiny_pair("torch", depth=2)
    names = [name for name, _ in model.named_parameters()]
    x = images(model)
    before = model.eval()(x)
    adapters.add_adapters(model, 3, seed=0, backend="torch")
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    linears = [f"blocks.{i}.{name}" for i in range(2)
               for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]  # fmt: skip
    expected = {f"{name}.lora_{part}.default.weight" for name in linears for part in "AB"}
    assert found.keys() == expected | {name for name in names if name.startswith("head")}
    assert all(3 in p.shape for name, p in found.items() if "lora" in name)
    assert_close(model(x), before)  # B is 0
    report = deit_fast.report(model)
    assert len(report.unfused) == 2 and "attn.qkv is a peft" in report.unfused[0].reason
    for name, p in found.items():
        if "lora_B" in name:
            p.data.normal_()
    learnt = model(x)
    assert_differ(learnt, before)
    plain = adapters.merged(model)
    assert [name for name, _ in plain.named_parameters()] == names
    assert all(p.requires_grad for p in plain.parameters())
    assert_close(plain(x), learnt)
    layer = model.blocks[0].attn.qkv
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert_close(plain.blocks[0].attn.qkv.weight, layer.base_layer.weight + 2 * b @ a)
    assert torch.equal(model(x), learnt)  # nothing of it was merged


@pytest.mark.slow
def test_a_run_with_adapters(peft, data, tmp_path):
    """Its folder is an ordinary one; what is frozen is as it began."""
    begun = build_student(settings(data), load("deit", **RECIPE))[2].state_dict()
    state = run(data, tmp_path / "out", lora=4)
    kept = {name.replace(".base_layer", ""): tensor for name, tensor in state["model"].items()}
    moved = {name for name in begun if not torch.equal(begun[name], kept[name])}
    assert moved == {name for name in begun if name.startswith("head")}
    assert len(state["optimizer"]["state"]) == 2 * 4 * 2 + 4
    for folder, part in (("model", "model"), ("model-ema", "ema")):
        model = deit_fast.from_pretrained(tmp_path / "out" / folder)
        weights, layer = model.state_dict(), "blocks.1.mlp.fc2."
        assert weights.keys() == begun.keys()
        a, b = (state[part][f"{layer}lora_{x}.default.weight"] for x in "AB")
        assert_close(weights[layer + "weight"], begun[layer + "weight"] + 2 * b @ a)
        assert torch.equal(weights["head.weight"], state[part]["head.weight"])
    assert state["rows"][-1]["loss"] < state["rows"][0]["loss"]
    assert state["identity"]["settings"]["lora"] == 4
    with pytest.raises(ValueError, match="other settings: lora 4, now 0"):
        run(data, tmp_path / "out")


@pytest.mark.slow
def test_adapters_of_a_distilled_student_with_layer_decay(peft, data, net, tmp_path):
    options = {"epochs": 1, "warmup_epochs": 0, "layer_decay": 0.5}
    state = run(data, tmp_path, lora=2, distill="hard", teacher=str(net), recipe_of=options)
    scales = {group["lr_scale"] for group in state["optimizer"]["param_groups"]}
    assert scales == {0.25, 0.5, 1.0}


@pytest.mark.slow
def test_a_model_without_such_linears(peft, data, tmp_path):
    with pytest.raises(ValueError, match="lora: 2, but a ResNet has no qkv, proj, fc1, fc2 in bl"):
        run(data, tmp_path, model="test_resnet", img_size=32, lora=2, recipe_of={"drop": 0.0})


def test_peft_is_an_extra(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RuntimeError, match=r"lora: peft is not.*pip install 'deit_fast\[tools\]'"):
        run(data, tmp_path, lora=2)
    assert not list(tmp_path.glob("*.*"))


def test_adapters_and_frozen_blocks(data, tmp_path):
    with pytest.raises(ValueError, match="freeze: 1 with lora 2, expected 0: all but the adapters"):
        run(data, tmp_path, lora=2, recipe_of={"freeze": 1})
    with pytest.raises(ValueError, match="lora: -1, expected 0 or more"):
        run(data, tmp_path, lora=-1)


def test_where_linears_are_looked_for():
    model = timm.create_model("deit_tiny_patch16_224", img_size=16, **MODEL_ARGS)
    found = [name for name, _ in model.named_modules() if adapters._is_of_a_block(name)]
    assert len(found) == 2 * 4 and "patch_embed.proj" not in found
