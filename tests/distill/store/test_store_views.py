"""Students see, bit for bit, the views that the teacher saw."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import selection
import torch
from small_runs import small_teacher
from small_stores import write_module, write_store

import deit_fast
from deit_fast.distill import recipe
from deit_fast.distill.datasets import open_images
from deit_fast.distill.store import Store, soft_labels
from deit_fast.distill.store.compatibility import views_of
from deit_fast.distill.store.soft_labels import PairBatches, SoftLabelDataset
from deit_fast.distill.store.views import Views

SHIPPED = Path(deit_fast.__file__).parent / "data"


FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


def real_images(folder):
    """The photographs and the Fashion-MNIST images that come with the package."""
    for name, found in (("photo", SHIPPED.glob("*.jpg")), ("fashion", SHIPPED.glob("fashion/*"))):
        for split in ("train", "val"):
            (folder / split / name).mkdir(parents=True)
        for path in sorted(found):
            shutil.copy(path, folder / "train" / name)
        shutil.copy(path, folder / "val" / name)
    return folder


def seen_by(model, kept):
    model.register_forward_pre_hook(lambda module, args: kept.append(args[0].clone()))
    return model


@pytest.mark.parametrize("kind", ["files", pytest.param("idx", marks=pytest.mark.slow)])
def test_students_see_the_very_bits_that_the_teacher_saw(kind, tmp_path, monkeypatch):
    """Real images, everything of the recipe that is random, Mixup and CutMix in pairs; in any
    order, in batches of any size, by any number of workers."""
    if kind == "files":
        data, count, size, chans = real_images(tmp_path / "data"), None, 48, 3
        classes = 2
    else:
        selection.data(FASHION, "Fashion-MNIST")
        data, count, size, chans, classes = FASHION, 30, 28, 1, 10
    net = small_teacher(tmp_path / "net", classes, in_chans=chans)
    kept, load = [], write_module.load_teacher
    monkeypatch.setattr(write_module, "load_teacher", lambda *args: seen_by(load(*args), kept))
    plan = {"img_size": size, "epochs": 2, "batch": 8, "count": count}
    write_store(data, tmp_path / "s", net, **plan)
    store = Store(tmp_path / "s")
    records = store.manifest.records
    taught = torch.cat(kept).split(records)
    assert len(taught) == 2 and records == (14 if kind == "files" else 30)

    images = open_images(data, "train", mode="RGB" if chans == 3 else "L")
    config = {k: store.manifest.transform[k] for k in ("input_size", "mean", "std")}
    found, _ = views_of(store, images, recipe.load("deit", repeated_aug=1), config)
    for workers, batch in ((0, 2), (2, 6)):
        batches = PairBatches(records, [1, 0], batch, seed=5)
        source = soft_labels.loader(SoftLabelDataset(store, found), batches, workers)
        for epoch, stored in ((0, 1), (1, 0)):
            batches.begin(epoch)
            places = [place for b in batches for _, place in b]
            assert places != sorted(places)
            parts = list(source)
            assert torch.equal(torch.cat([x for x, *_ in parts]), taught[stored][places])
            expected = store.epoch(stored).all()[places]
            classes_of, probs = (torch.cat([target[i] for _, target, _ in parts]) for i in (0, 1))
            assert np.array_equal(classes_of.numpy(), expected["classes"])
            assert np.array_equal(probs.numpy(), expected["probs"])
    # and they were mixed: of views that were not, most differ
    alone = Views(images, recipe.load("deit", mixup=0.0, cutmix=0.0), config)
    of = store.epoch(0)
    single = [alone[int(of[i]["index"]), int(of[i]["seed"])][0] for i in range(records)]
    changed = [not torch.equal(x, y) for x, y in zip(single, taught[0], strict=True)]
    assert sum(changed) >= 0.7 * records
