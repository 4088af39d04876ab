"""Frozen blocks: which those are, that nothing of them changes, and that backward ends at them."""

import pytest
import timm
import torch
from checking import assert_gradients_close
from modelling import images, tiny_pair
from small_runs import MODEL_ARGS, RECIPE, run, same, settings, start
from tiers import slow

from deit_fast.distill.freezing import freeze, frozen_modules, head_names
from deit_fast.distill.recipe import load
from deit_fast.distill.student import build_student

SMALL = {"img_size": 16, "num_classes": 5, **MODEL_ARGS}
TINY_VIT = {
    "num_classes": 5, "embed_dims": (32,) * 4, "depths": (1, 1, 2, 1), "num_heads": (1,) * 4,
}  # fmt: skip


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def made(name):
    options = {"tiny_vit_5m_224": TINY_VIT, "test_resnet": {}}
    return timm.create_model(name, **options.get(name, SMALL))


@pytest.mark.parametrize(
    "name, blocks, first, frozen",
    [
        # model, blocks, prefix of what is trained first, prefixes of what is not
        ("deit_tiny_distilled_patch16_224", 1, "blocks.1.", "patch_embed pos_ cls_ dist_ blocks.0"),
        ("deit_tiny_distilled_patch16_224", 2, "head", "patch_embed blocks norm"),
        ("vit_tiny_patch16_224", -1, "head", "patch_embed pos_ cls_ blocks norm"),
        ("cait_xxs24_224", 2, "blocks_token_only.0", "patch_embed pos_ cls_ blocks.0 blocks.1"),
        ("cait_xxs24_224", 3, "blocks_token_only.1", "blocks. blocks_token_only.0"),
        ("cait_xxs24_224", 4, "head", "blocks blocks_token_only norm"),
        ("tiny_vit_5m_224", 2, "stages.2.downsample", "patch_embed stages.0 stages.1"),
        ("tiny_vit_5m_224", -1, "head.fc", "patch_embed stages head.norm"),
        ("test_resnet", 1, "layer2", "conv1 bn1 layer1"),
        ("test_resnet", -1, "fc", "conv1 bn1 layer"),
    ],
)
def test_which_layers_are_frozen(name, blocks, first, frozen):
    model = made(name)
    heads = head_names(model)
    assert len(heads) == (4 if "distilled" in name else 2)
    freeze(model, blocks)
    names = [name for name, _ in model.named_parameters()]
    left = trained(model)
    assert heads <= left and (blocks != -1 or left == heads)
    assert any(name.startswith(first) for name in left)
    for prefix in frozen.split():
        some = [name for name in names if name.startswith(prefix)]
        assert some and not left.intersection(some), prefix
    order = [name in left for name in names if not name.startswith(("cls_", "pos_", "dist_"))]
    if not name.startswith("cait"):  # which registers the last norm before the blocks
        assert order == sorted(order)  # what is trained comes behind


@pytest.mark.parametrize(
    "name, most", [("vit_tiny_patch16_224", 2), ("cait_xxs24_224", 4), ("tiny_vit_5m_224", 5)]
)
def test_more_blocks_than_there_are(name, most):
    model = made(name)
    with pytest.raises(ValueError, match=f"freeze: {most + 1}, expected at most {most}, the model"):
        freeze(model, most + 1)
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_a_model_whose_layers_are_unknown(monkeypatch):
    model = made("test_resnet")
    monkeypatch.delattr(type(model), "group_matcher")
    with pytest.raises(ValueError, match="freeze: 1, but timm knows no layers of a ResNet, expect"):
        freeze(model, 1)
    freeze(model, -1)
    assert trained(model) == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("backend", ["torch", slow("triton")])
def test_backward_ends_at_what_is_frozen(backend, device):
    """What the last frozen block gives needs no gradient, so autograd records nothing before it;
    what is trained gets timm's gradients, with the frozen part in eval mode, as it is trained."""
    small = {"depth": 3, "num_heads": 1, "img_size": 48}
    reference, fast = tiny_pair(backend, drop_path_rate=0.5, pos_drop_rate=0.5, **small)
    given = []
    for model in (reference, fast):
        model.to(device).train()
        freeze(model, 2)
        for module in frozen_modules(model):
            module.eval()
        modes = [model.pos_drop.training, *(block.training for block in model.blocks)]
        assert modes == [False, False, False, True]
        model.blocks[1].register_forward_hook(lambda block, x, y: given.append(y.requires_grad))
    x = images(reference).to(device)
    found = []
    for model in (reference, fast):
        torch.manual_seed(0)  # of stochastic depth
        model(x).square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert given == [False, False]
    assert found[0] and found[0].keys() == found[1].keys() == trained(reference)
    assert_gradients_close(found[1], found[0])


@pytest.mark.parametrize("blocks", [1, slow(-1)])
def test_nothing_frozen_changes(blocks, data, tmp_path):
    """Nor its average; the optimizer keeps no state of it."""
    _, _, model = build_student(settings(data), load("deit", **RECIPE))
    begun, notes = model.state_dict(), []
    state = run(data, tmp_path, recipe_of={"freeze": blocks}, report=notes.append)
    for part in ("model", "ema"):
        moved = {k for k, v in state[part].items() if not torch.equal(v, begun[k])}
        behind = ("head",) if blocks == -1 else ("blocks.1", "norm", "head")
        assert moved == {name for name in state["model"] if name.startswith(behind)}, part
    assert len(state["optimizer"]["state"]) == len(moved)
    said = [event["text"] for event in notes if event["event"] == "note"]
    count = sum(state["model"][name].numel() for name in moved)
    assert len(said) == 1 and said[0].startswith(f"trained: {count:,} parameters; the model has")


@pytest.mark.slow
def test_frozen_batch_norm_keeps_its_statistics(data, tmp_path):
    net = {"model": "test_resnet", "img_size": 32}
    small = {"drop": 0.0, "epochs": 1, "warmup_epochs": 0}
    begun = build_student(settings(data, **net), load("deit", **RECIPE | small))[2].state_dict()
    state = run(data, tmp_path, recipe_of=small | {"freeze": 2}, **net)["model"]
    moved = {name for name in state if not torch.equal(state[name], begun[name])}
    assert {name.split(".")[0] for name in moved} == {"layer3", "layer4", "fc"}
    assert any(name.endswith("running_mean") for name in moved)


def test_layer_decay_is_that_of_the_whole_model(data, tmp_path):
    """What is frozen shifts no layer's learning rate."""
    options = {"epochs": 1, "warmup_epochs": 0, "layer_decay": 0.5, "opt": "sgd"}
    scales = [
        {group["lr_scale"] for group in state["optimizer"]["param_groups"]}
        for state in (
            run(data, tmp_path / str(n), recipe_of=options | {"freeze": n}) for n in (0, 1)
        )
    ]
    assert scales == [{0.125, 0.25, 0.5, 1.0}, {0.5, 1.0}]


def test_another_freeze_is_another_run(data, tmp_path):
    state = run(data, tmp_path, recipe_of={"freeze": 1, "epochs": 1})
    with pytest.raises(ValueError, match="other settings: freeze 1, now 0"):
        run(data, tmp_path, recipe_of={"epochs": 1})
    assert state["identity"]["recipe"]["freeze"] == 1
    again = run(data, tmp_path, recipe_of={"freeze": 1, "epochs": 1})
    assert same(again, state)


@pytest.mark.slow
def test_frozen_blocks_learn_nothing_from_a_store(data, whole, tmp_path):
    _, _, model = build_student(settings(data), load("deit", **RECIPE))
    begun = model.state_dict()
    options = {"freeze": 1, "epochs": 2, "repeated_aug": 1}
    start(data, tmp_path / "out", 1, 2, store=str(whole), recipe_of=options)
    state = run(data, tmp_path / "out", save_every=1, store=str(whole), recipe_of=options)
    assert same(state, run(data, tmp_path / "whole", store=str(whole), recipe_of=options))
    moved = {name for name in begun if not torch.equal(begun[name], state["model"][name])}
    assert moved == {name for name in begun if name.startswith(("blocks.1", "norm", "head"))}
