"""Files that versions before 0.1 wrote still load; tests/data/before_0.1 says who wrote them."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from checking import APART, FP32, assert_within

from deit_fast.distill import checkpoints, recipe
from deit_fast.distill.store import Store
from deit_fast.distill.student import Settings
from deit_fast.distill.train import train

BEFORE = Path(__file__).parents[1] / "data" / "before_0.1"
# random crops and mirroring alone, of which every version of Pillow makes the same pixels
AUGMENTATION = {
    "crop": "pad", "color_jitter": 0.0, "auto_augment": "none", "erasing": 0.0, "mixup": 0.0,
    "cutmix": 0.0, "repeated_aug": 1,
}  # fmt: skip
RECIPE = AUGMENTATION | {
    "epochs": 3, "batch": 4, "lr": 1e-3, "lr_batch": 0, "warmup_epochs": 1, "drop": 0.1,
    "drop_path": 0.2, "ema": 0.9, "clip_grad": 1.0, "crop_pct": 1.0,
}  # fmt: skip
MODEL_ARGS = {
    "embed_dim": 16, "depth": 1, "num_heads": 1, "patch_size": 8, "mlp_ratio": 1, "in_chans": 1,
}  # fmt: skip
LOSSES = [1.0986253420511882, 1.0954296191533406, 1.0868568817774455]  # of the run to its end


def settings(**kwargs):
    data = str(BEFORE / "images")
    return Settings(data, "deit_tiny_distilled", MODEL_ARGS, **kwargs)


def test_a_run_resumes_from_its_checkpoint(tmp_path):
    """In the middle of the second of three epochs; to the losses that it would have had."""
    out = Path(shutil.copytree(BEFORE / "run", tmp_path / "run"))
    before = checkpoints.load(out / "checkpoint.pt")
    assert (before["epoch"], before["update"]) == (1, 1)
    events = []
    own = settings(mean=(0.5,), std=(0.25,), img_size=16)
    train(own, recipe.load("deit", **RECIPE), out, report=events.append)
    assert (events[0]["event"], events[0]["epoch"], events[0]["update"]) == ("begin", 1, 1)
    after = checkpoints.load(out / "checkpoint.pt")
    assert after["identity"] == before["identity"]
    assert after["rows"][0] == before["rows"][0]
    for row, loss in zip(after["rows"], LOSSES, strict=True):
        assert_within(row["loss"], loss, APART[FP32])
    for name in ("settings.json", "run.json"):
        assert (out / name).read_text() == (BEFORE / "run" / name).read_text()
    before, after = (list(csv.DictReader(open(f / "log.csv"))) for f in (BEFORE / "run", out))
    assert len(before) == 1 and len(after) == 3
    assert {key: after[0][key] for key in before[0]} == before[0]
    assert after[0]["val_loss"] == "" != after[1]["val_loss"]  # which came later


def test_a_store_is_verified_and_taught_from(tmp_path):
    store = Store(BEFORE / "soft_labels")
    assert store.manifest.key == "8787fc92d76870ac4b10bf9c74337514"
    for epoch in range(2):
        store.verify(epoch)
        records = store.epoch(epoch).all()
        assert sorted(records["index"]) == list(range(12))
        assert (records["classes"] < 3).all()
        assert (records["probs"][:, 0] >= records["probs"][:, 1]).all()
    small = RECIPE | {"epochs": 2}
    train(settings(store=str(store.folder)), recipe.load("deit", **small), tmp_path)
    state = checkpoints.load(tmp_path / "checkpoint.pt")
    assert state["identity"]["settings"]["store"] == {"key": store.manifest.key, "epochs": [0, 1]}
    assert all(torch.isfinite(p).all() for p in state["model"].values())
    with pytest.raises(ValueError, match="is of another transform: hflip 0.5, now 0.0"):
        other = recipe.load("deit", **small | {"hflip": 0.0})
        train(settings(store=str(store.folder)), other, tmp_path / "other")
