"""Recipes: the paper's numbers, what may be changed, and what is refused."""

import dataclasses
import json

import pytest

from deit_fast.cli import main
from deit_fast.distill import recipe
from deit_fast.distill.recipe import NAMES, load

TABLE_9 = {  # DeiT-B and ViT-B
    "epochs": (300, 300), "batch": (1024, 4096), "opt": ("adamw", "adamw"),
    "weight_decay": (0.05, 0.3), "warmup_epochs": (5, 3.4), "label_smoothing": (0.1, 0),
    "drop": (0, 0.1), "drop_path": (0.1, 0), "repeated_aug": (3, 1), "mixup": (0.8, 0),
    "cutmix": (1.0, 0), "erasing": (0.25, 0),
    "auto_augment": ("rand-m9-mstd0.5-inc1", "none"), "clip_grad": (0, 1.0),
    "temperature": (3.0, 3.0), "soft_weight": (0.1, 0.1),
}  # fmt: skip


@pytest.mark.parametrize("setting", TABLE_9)
def test_table_9(setting):
    assert (getattr(load("deit"), setting), getattr(load("vit"), setting)) == TABLE_9[setting]


def test_learning_rates():
    """5e-4 x batch / 512 for DeiT, 0.003 as it is for ViT."""
    assert load("deit").peak_lr == 5e-4 * 2
    assert load("deit", batch=256).peak_lr == 5e-4 / 2
    assert load("vit").peak_lr == load("vit", batch=64).peak_lr == 3e-3
    assert load("transfer").peak_lr == 0.01
    with pytest.raises(ValueError, match="min_lr: 5e-06, expected at most the peak lr 2.5e-06"):
        load("deit-384", batch=256)
    fine = load("deit-384")
    assert fine.peak_lr == fine.min_lr == 5e-6 and (fine.epochs, fine.batch) == (30, 512)


def test_transfer_is_imagenets_recipe_but_for_these():
    deit, transfer = (dataclasses.asdict(load(name)) for name in ("deit", "transfer"))
    assert {k: v for k, v in transfer.items() if v != deit[k]} == {
        "epochs": 1000, "batch": 768, "opt": "sgd", "lr": 0.01, "lr_batch": 0,
        "weight_decay": 1e-4, "erasing": 0.0, "drop_path": 0.0,
    }  # fmt: skip


def test_tiny_vits():
    """The official configurations: lr, its warm-up and its end scale with the batch, by 8 and 2."""
    distilled, tuned = load("tinyvit-22k"), load("tinyvit-22k-1k")
    assert (distilled.epochs, distilled.batch, distilled.weight_decay) == (90, 4096, 0.01)
    assert (distilled.peak_lr, distilled.warmup_lr, distilled.min_lr) == (2e-3, 4e-6, 4e-5)
    assert not distilled.mixes and distilled.repeated_aug == 1 and distilled.layer_decay == 1
    assert not distilled.freeze_bn and tuned.freeze_bn and tuned.layer_decay == 0.8
    assert (tuned.epochs, tuned.batch, tuned.weight_decay) == (30, 1024, 1e-8)
    assert (tuned.peak_lr, tuned.warmup_lr, tuned.min_lr) == (5e-4, 1e-6, 2e-5)
    assert (tuned.label_smoothing, tuned.mixes, tuned.ema) == (0.1, False, 0)
    assert distilled.clip_grad == tuned.clip_grad == 5 and distilled.auto_augment != "none"


@pytest.mark.parametrize(
    "flag, setting",
    [
        ("--opt sgd", {"opt": "sgd"}),
        ("--auto-augment none", {"auto_augment": "none"}),
        ("--auto-augment original", {"auto_augment": "original"}),
        ("--mixup 0", {"mixup": 0.0}),
        ("--cutmix 0", {"cutmix": 0.0}),
        ("--mixup-prob 0", {"mixup_prob": 0.0}),
        ("--erasing 0", {"erasing": 0.0}),
        ("--drop-path 0", {"drop_path": 0.0}),
        ("--repeated-aug 1", {"repeated_aug": 1}),
        ("--drop 0.1", {"drop": 0.1}),
        ("--ema 0.9999", {"ema": 0.9999}),
        ("--sched-on-updates", {"sched_on_updates": True}),
        ("--freeze-bn", {"freeze_bn": True}),
        ("--freeze 3", {"freeze": 3}),
        ("--freeze -1", {"freeze": -1}),
        ("--balance loss", {"balance": "loss"}),
    ],
)
def test_every_ablation_is_one_flag(flag, setting, monkeypatch, tmp_path):
    """Table 8, through the command line: that setting changes and nothing else."""
    seen = {}

    def train(settings, recipe, out, **options):
        seen["recipe"] = recipe
        return {"top1": {"class": 0.0}, "images_per_s": 1.0, "unreadable": 0}

    monkeypatch.setattr("deit_fast.cli.train.train", train)
    arguments = ["train", "data", "--model", "deit_base", "--out", str(tmp_path), *flag.split()]
    assert main(arguments) == 0
    assert seen["recipe"] == dataclasses.replace(load("deit"), **setting) != load("deit")
    assert not load("deit", mixup_prob=0.0).mixes and load("deit").mixes


@pytest.mark.parametrize("name", NAMES)
def test_a_file_may_build_on_a_recipe(name, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"about": "mine", "base": name, "epochs": 7}))
    assert load(path) == dataclasses.replace(load(name), epochs=7)
    assert load(path, epochs=9).epochs == 9


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "mine.json: is no JSON"),
        ("[1]", "holds a list, expected an object"),
        ('{"base": "deit", "leraning_rate": 1}', "unknown leraning_rate"),
        ('{"epochs": 3}', "misses auto_augment, batch"),
        ('{"base": "deit", "epochs": 0}', "epochs: 0, expected 1 or more"),
        ('{"base": "deit", "epochs": 2.5}', "epochs: 2.5, expected a int"),
        ('{"base": "deit", "lr": 0}', "lr: 0.*, expected it above 0"),
        ('{"base": "deit", "mixup": NaN}', "mixup: nan, expected a float"),
        ('{"base": "deit", "erasing": 1.5}', "erasing: 1.5, expected at most 1"),
        ('{"base": "deit", "opt": "adamm"}', "opt: 'adamm', expected one of timm's"),
        ('{"base": "deit", "crop": "centre"}', "crop: 'centre', expected one of resize, pad"),
        (
            '{"base": "deit", "epochs": 3}',
            "warmup_epochs: 5, expected at most the 3 epochs; give --warmup-epochs, or more --epoc",
        ),
        (
            '{"base": "deit", "batch": 8}',
            r"min_lr: 1e-05, expected at most the peak lr 7.8125e-06 \(lr 0.0005 x batch 8 / "
            r"lr_batch 512\); give a lower --min-lr, or a higher --lr",
        ),
        (
            '{"base": "vit", "lr": 1e-6}',
            "min_lr: 1e-05, expected at most the peak lr 1e-06; give a lower --min-lr",
        ),
        ('{"base": "deit", "freeze": -2}', "freeze: -2, expected -1 or more"),
        ('{"base": "deit", "balance": "all"}', "balance: 'all', expected one of none, sampler, lo"),
        (
            '{"base": "deit", "balance": "loss", "label_smoothing": 1}',
            "label_smoothing: 1 with balance 'loss', expected less",
        ),
        ('{"base": "deit", "sched_on_updates": 1}', "sched_on_updates: 1, expected a bool"),
    ],
)
def test_refused(content, message, tmp_path):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "mine.json")
    assert "mine.json" in str(caught.value)


def test_a_file_from_before_a_setting_came(tmp_path):
    """It lists all that there was, and has no base."""
    content = dataclasses.asdict(load("deit"))
    del content["freeze"], content["balance"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert load(tmp_path / "old.json") == load("deit")
    del content["hard_weight"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="old.json: misses hard_weight$"):
        load(tmp_path / "old.json")


def test_no_such_recipe():
    with pytest.raises(FileNotFoundError, match="deti is no file, nor one of deit, deit-384"):
        load("deti")


def test_a_recipe_on_itself(tmp_path):
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"base": f"{base}.json"}))
    with pytest.raises(ValueError, match="a.json: .*b.json: .*is based on itself"):
        load(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps({"base": "none.json"}))
    with pytest.raises(ValueError, match="b.json: .*none.json is no file"):
        load(tmp_path / "a.json")


def test_weights_of_the_teacher():
    assert [load("deit").weight(d) for d in ("none", "soft", "hard")] == [0, 0.1, 0.5]
    with pytest.raises(ValueError, match="distill: 'both', expected one of"):
        load("deit").weight("both")
    assert recipe.load("deit", hard_weight=0.7).weight("hard") == 0.7
