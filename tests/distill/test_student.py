"""What is trained: models, their start weights, dropout and groups of parameters."""

import pytest
import small_runs
import torch
from checking import assert_within
from small_runs import image_folders, run, same

import deit_fast
from deit_fast.distill import recipe
from deit_fast.distill.student import build_student, parameter_groups
from deit_fast.models import create_model


def test_dropout_and_stochastic_depth(data):
    """Of positions, projections and MLPs, as the official code; a convnet's of its head."""
    chosen = recipe.load("deit", **small_runs.RECIPE)
    _, _, model = build_student(small_runs.settings(data), chosen)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    last = model.blocks[-1]
    rates = [model.pos_drop.p, last.attn.proj_drop.p, last.mlp.drop1.p, last.mlp.drop2.p]
    assert rates == [0.1] * 4 and model.head_drop.p == last.attn.attn_drop.p == 0.0
    _, _, model = build_student(small_runs.settings(data, "test_resnet"), chosen)
    assert model.drop_rate == 0.1
    images, validation, _ = build_student(small_runs.settings(data, count=6), chosen)
    assert len(images) == 6 and sorted(images.labels.tolist()) == [0, 0, 1, 1, 2, 2]
    assert len(validation) == 24


TINY_VIT = {  # a stage of each kind
    "embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 1), "window_sizes": (7, 2),
}  # fmt: skip


def test_groups_of_parameters():
    """TinyViT's attention biases do not decay, nor do norms and biases; the first layer's lr is the
    least."""
    model = create_model("tiny_vit_5m_224", num_classes=5, **TINY_VIT)
    names = {id(p): name for name, p in model.named_parameters()}
    plain, fine = (recipe.load(name) for name in ("tinyvit-22k", "tinyvit-22k-1k"))
    for of in (plain, fine):
        groups = parameter_groups(of, model)
        decayed = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
        assert decayed.keys() == set(names.values())
        for name, decay in decayed.items():
            matrix = model.get_parameter(name).dim() > 1 and "attention_biases" not in name
            assert decay == (of.weight_decay if matrix else 0), name
    scales = {
        names[id(p)]: group["lr_scale"] for group in parameter_groups(fine, model)
        for p in group["params"]
    }  # fmt: skip
    assert scales["head.fc.weight"] == 1
    assert scales["patch_embed.conv1.conv.weight"] == min(scales.values()) < 0.52
    (block,) = {v for k, v in scales.items() if k.startswith("stages.1.blocks.0")}
    (before,) = {v for k, v in scales.items() if k.startswith("stages.0.blocks.0")}
    assert before < block < 1
    vit = create_model("deit_tiny", depth=1)
    kept = [g["params"] for g in parameter_groups(plain, vit) if not g["weight_decay"]]
    assert {id(vit.cls_token), id(vit.pos_embed), id(vit.norm.weight)} <= set(
        map(id, sum(kept, []))
    )


def test_tiny_vit_by_its_recipes(data, tmp_path):
    """Distilled from labels here, then tuned: statistics frozen, and another number of classes."""
    tiny = {"model": "tiny_vit_5m_224", "model_args": TINY_VIT, "img_size": 16}
    less = {"epochs": 2, "batch": 8, "warmup_epochs": 1, "lr_batch": 0}
    first = run(data, tmp_path / "22k", recipe_of=less, recipe_name="tinyvit-22k", **tiny)
    moved = [k for k, v in first["model"].items() if k.endswith("running_mean") and v.any()]
    assert len(moved) == 9
    other = image_folders(tmp_path / "other", classes=2, size=16)
    tiny |= {"start": str(tmp_path / "22k" / "model"), "model": None, "model_args": None}
    tuned = run(other, tmp_path / "1k", recipe_of=less, recipe_name="tinyvit-22k-1k", **tiny)
    assert tuned["model"]["head.fc.weight"].shape == (2, 32)
    for name, value in first["model"].items():
        if "running" in name:
            assert torch.equal(tuned["model"][name], value), name
    learnt = "stages.1.blocks.0.attn.attention_biases"
    assert not torch.equal(tuned["model"][learnt], first["model"][learnt])


@pytest.mark.slow
def test_convnets_are_trained_on(data, tmp_path):
    """With the arguments of their start, which old versions of timm do not remember."""
    args = {"model": "resnet18", "model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}}
    plain = {"recipe_of": {"epochs": 1, "drop": 0.0}}
    run(data, tmp_path / "first", img_size=32, **args, **plain)
    model = str(tmp_path / "first" / "model")
    state = run(data, tmp_path / "second", model=None, start=model, img_size=32, **plain)
    again = deit_fast.from_pretrained(tmp_path / "second" / "model", strict=False)
    assert same(dict(again.state_dict()), dict(state["model"]))
    # other weights in the same place are another run, the same ones elsewhere are not
    (tmp_path / "moved").mkdir()
    for path in (tmp_path / "first" / "model").iterdir():
        path.rename(tmp_path / "moved" / path.name)
    run(data, tmp_path / "second", model=None, start=str(tmp_path / "moved"), img_size=32, **plain)
    run(data, tmp_path / "third", img_size=32, seed=1, **args, **plain)
    other = str(tmp_path / "third" / "model")
    with pytest.raises(ValueError, match="other settings: start"):
        run(data, tmp_path / "second", model=None, start=other, img_size=32, **plain)


def test_fine_tuning_at_another_resolution(data, whole_run, tmp_path):
    """The position embedding keeps its norms (bicubic, no antialiasing); bilinear's would shrink.
    The teacher, a transformer of a fixed size, is resized too."""
    state = run(
        data, tmp_path / "out", model=None, start=str(whole_run[0] / "model"), img_size=32,
        distill="hard",
        teacher=str(whole_run[0] / "model"),
        recipe_of={"epochs": 1, "lr": 1e-30, "warmup_lr": 0.0, "min_lr": 0.0},
    )  # fmt: skip
    new, old = state["model"]["pos_embed"], whole_run[1]["model"]["pos_embed"]
    assert new.shape[1] == 2 + 16 and old.shape[1] == 2 + 4
    assert torch.equal(new[:, :2], old[:, :2])

    def norm(pos_embed):
        return pos_embed[:, 2:].norm(dim=2).mean().item()

    grid = old[:, 2:].unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    bilinear = torch.nn.functional.interpolate(grid, (4, 4), mode="bilinear")
    assert bilinear.flatten(2).norm(dim=1).mean().item() < 0.9 * norm(old)
    assert_within(norm(new), norm(old), 0.1, "norms that bicubic keeps")


def test_another_number_of_classes(whole_run, tmp_path):
    image_folders(tmp_path / "data", classes=2)
    with pytest.warns(UserWarning, match="head"):
        state = run(
            tmp_path / "data", tmp_path / "out", model=None, start=str(whole_run[0] / "model"),
            recipe_of={"epochs": 1},
        )  # fmt: skip
    assert state["model"]["head.weight"].shape[0] == 2


def test_weights_of_another_model(data, whole_run, tmp_path):
    with pytest.raises(
        ValueError, match="holds a deit_tiny_distilled_patch16_224, expected deit_tiny"
    ):
        run(data, tmp_path, model="deit_tiny", start=str(whole_run[0] / "model"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit"):
        run(data, tmp_path / "out", start=str(tmp_path / "other.pth"))


def test_a_start_that_is_not_there(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="start: nowhere is no folder or file"):
        run(data, tmp_path, start="nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no folder of weights"):
        run(data, tmp_path, model=None, start=str(tmp_path / "empty"))


def test_validation_images_are_split_off(data, tmp_path):
    """Of data without any; folders of classes alone are data too."""
    chosen = recipe.load("deit")
    for path in (data / "train", tmp_path):
        (tmp_path / "train").symlink_to(data / "train") if path is tmp_path else None
        with pytest.raises(ValueError, match="no split '(train|validation)'"):
            build_student(small_runs.settings(path), chosen)
        images, validation, _ = build_student(small_runs.settings(path, holdout=0.25), chosen)
        assert (len(images), len(validation)) == (18, 6)
        assert set(validation.labels) == {0, 1, 2}
    images, validation, _ = build_student(small_runs.settings(data, holdout=0.25), chosen)
    assert (len(images), len(validation)) == (24, 24), "data that has validation images keeps them"
    with pytest.raises(ValueError, match="holdout: 1.0, expected a share of 0 or more, below 1"):
        small_runs.settings(data, holdout=1.0)
