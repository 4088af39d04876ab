"""Learning from a soft-label store: batches, loss, students, epochs."""

import json

import numpy as np
import pytest
import torch
from checking import assert_close, seeded
from small_runs import image_folders, same
from small_stores import flip_bit, train_from_store, write_module, write_store
from tiers import slow
from torch.nn import functional as F

import deit_fast
from deit_fast.distill import recipe
from deit_fast.distill.datasets import open_images
from deit_fast.distill.store import Damaged, Store, check, write
from deit_fast.distill.store.soft_labels import PairBatches, soft_label_loss


def test_pairs_stay_together_and_are_shared():
    """Whole pairs, each once, over the ranks as one rank would take them."""

    def epoch(seed=0, number=0, start=0, rank=0, world=1, batch=8):
        batches = PairBatches(51, [4, 7], batch, seed, rank, world)
        batches.begin(number, start)
        assert len(batches) == 50 // (batch * world)
        return list(batches)

    one = epoch()
    assert all(
        a[0] == b[0] == 4 and a[1] % 2 == 0 and b[1] == a[1] + 1
        for batch in one
        for a, b in zip(batch[::2], batch[1::2], strict=True)
    )
    places = [place for batch in one for _, place in batch]
    assert len(set(places)) == len(places) == 48 and max(places) < 50
    assert epoch(start=4) == one[4:]
    assert {stored for batch in epoch(number=1) for stored, _ in batch} == {7}
    orders = {tuple(p for b in epoch(seed, n) for _, p in b) for seed in (0, 1) for n in (0, 1)}
    assert len(orders) == 4
    shares = [epoch(rank=rank, world=2, batch=4) for rank in (0, 1)]
    for batch, a, b in zip(one, *shares, strict=True):
        pairs = [a[:2], b[:2], a[2:], b[2:]]
        assert batch == [place for pair in pairs for place in pair]


def test_the_loss_is_the_dense_formula():
    """With two heads the mean of both."""
    torch.manual_seed(seeded(0))
    z, d = torch.randn(2, 6, 7, dtype=torch.float32).requires_grad_()
    probs, classes = torch.randn(6, 7).softmax(1).topk(3)
    probs = probs.half()
    target = torch.zeros(6, 7, dtype=torch.float64)
    for b in range(6):
        target[b] = (1 - probs[b].double().sum()) / 4
        target[b, classes[b]] = probs[b].double()
    expected = [F.cross_entropy(x.double(), target) for x in (z, d)]
    one = soft_label_loss(z, None, classes, probs)
    both = soft_label_loss((z, d), None, classes, probs)
    assert_close(one, expected[0].float())
    assert_close(both, (sum(expected) / 2).float())
    got, true = torch.autograd.grad(both, d)[0], torch.autograd.grad(sum(expected) / 2, d)[0]
    assert_close(got, true)


@pytest.mark.parametrize(
    "model, model_args",
    [
        ("deit_tiny_distilled", {}),
        slow("tiny_vit_5m_224", {"embed_dims": [16, 32, 32, 32], "depths": [1, 1, 1, 1],
                                 "num_heads": [1, 1, 1, 1], "window_sizes": [2, 2, 2, 2]}),
        slow("cait_xxs24_224", {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}),
    ],
    ids=["deit", "tiny_vit", "cait"],
)  # fmt: skip
def test_students(model, model_args, data, net, whole, tmp_path, monkeypatch):
    """Any model, without a teacher in memory, going on bit for bit."""
    store = whole
    if model == "tiny_vit_5m_224":  # which divides its images by 32
        store = tmp_path / "store"
        write_store(data, store, net, img_size=32)
    monkeypatch.setattr("deit_fast.distill.run.load_teacher", None)
    options = {"model": model, "model_args": model_args, "recipe_of": {"drop": 0.0}}

    def stop(event):
        if event["event"] == "update" and (event["epoch"], event["update"]) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_from_store(data, tmp_path / "o", store, report=stop, save_every=1, **options)
    state = train_from_store(data, tmp_path / "o", store, save_every=1, **options)
    assert same(state, train_from_store(data, tmp_path / "p", store, workers=2, **options))
    facts = json.loads((tmp_path / "o" / "run.json").read_text())
    assert facts["distill"] == "store" and facts["teacher"] == f"{net}, K = 2"
    assert facts["distill_token"] == ("both" if model == "deit_tiny_distilled" else "class")
    size = 32 if model == "tiny_vit_5m_224" else 16
    assert facts["img_size"] == size
    found = deit_fast.from_pretrained(tmp_path / "o" / "model", strict=False)
    assert tuple(found.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)


def test_a_student_learns_what_the_teacher_says(tmp_path):
    """Not the labels: from a teacher that calls every class by the next one's name."""
    data = image_folders(tmp_path / "data")
    plain = {"mixup": 0.0, "cutmix": 0.0, "auto_augment": "none", "erasing": 0.0, "scale": 0.8,
             "color_jitter": 0.0}  # fmt: skip

    class Next(torch.nn.Module):
        num_classes = 3
        pretrained_cfg = {"architecture": "next", "input_size": (3, 16, 16),
                          "mean": (0.5,) * 3, "std": (0.5,) * 3}  # fmt: skip

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(20.0))

        def forward(self, x):  # the colour tells the class
            return self.scale * x.mean((2, 3)).roll(1, 1)

    taught = Next()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_module, "load_teacher", lambda *args: taught)
        write(data, tmp_path / "s", "next", recipe.load("deit", **plain), epochs=12, k=2, batch=8)
    records = Store(tmp_path / "s").epoch(0).all()
    said = dict(zip(records["index"].tolist(), records["classes"][:, 0].tolist(), strict=True))
    by_class = [{said[i] for i in range(8 * c, 8 * c + 8)} for c in range(3)]
    assert all(len(found) == 1 for found in by_class) and len(set.union(*by_class)) == 3
    names = [found.pop() for found in by_class]
    assert names != [0, 1, 2]
    train_from_store(
        data, tmp_path / "o", tmp_path / "s", model="deit_tiny",
        recipe_of=plain | {"epochs": 12, "ema": 0.0, "drop": 0.0, "drop_path": 0.0, "lr": 3e-3},
    )  # fmt: skip
    model = deit_fast.from_pretrained(tmp_path / "o" / "model").eval()
    images = open_images(data, "validation")
    pixels = np.stack([np.asarray(images.image(i)) for i in range(24)])
    with torch.no_grad():
        found = model((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).argmax(1)
    right = (found == torch.tensor(names)[torch.from_numpy(images.labels)]).float().mean()
    assert right > 0.8


@pytest.mark.slow
def test_intact_epochs_stay_usable(data, net, whole, copy, tmp_path):
    """As many as are needed, in order; which is said."""
    path = copy / "epoch-0001-rank-0-of-1.records"
    path.write_bytes(flip_bit(path.read_bytes(), 100))
    events = []
    state = train_from_store(
        data, tmp_path / "a", copy, recipe_of={"epochs": 2}, report=events.append
    )
    assert state["identity"]["settings"]["store"]["epochs"] == [0, 2]
    (note,) = (event["text"] for event in events if event["event"] == "note")
    assert str(path) in note and "byte 64" in note and "left out" in note
    with pytest.raises(ValueError, match="epochs: 3, but .* has 2 that can be used .1 is damaged"):
        train_from_store(data, tmp_path / "b", copy)
    path.rename(path.with_suffix(".part"))
    with pytest.raises(ValueError, match="is not complete, write it to its end"):
        train_from_store(data, tmp_path / "b", copy)
    path.with_suffix(".part").unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        train_from_store(data, tmp_path / "b", copy)
    assert check(data, copy, net)["records"] == 48
    for epoch in (0, 2):
        (copy / f"epoch-000{epoch}-rank-0-of-1.records").unlink()
    with pytest.raises(ValueError, match="has no whole epoch"):
        check(data, copy, net)


@pytest.mark.slow
def test_a_run_goes_on_whatever_happens_to_epochs_it_needs_no_more(whole, data, copy, tmp_path):
    """Repaired or newly damaged: the run keeps the epochs it began with."""
    expected = train_from_store(data, tmp_path / "expected", whole, recipe_of={"epochs": 2})
    files_of = [copy / f"epoch-000{epoch}-rank-0-of-1.records" for epoch in (0, 1, 2)]
    contents_of = [path.read_bytes() for path in files_of]

    def stop(event):
        if event["event"] == "update" and (event["epoch"], event["update"]) == (1, 1):
            raise KeyboardInterrupt

    def begin(out):
        with pytest.raises(KeyboardInterrupt):
            train_from_store(data, out, copy, recipe_of={"epochs": 2}, report=stop, save_every=1)

    begin(tmp_path / "a")
    files_of[0].write_bytes(flip_bit(contents_of[0], 100))  # is behind it
    files_of[2].unlink()  # was never asked for
    state = train_from_store(data, tmp_path / "a", copy, recipe_of={"epochs": 2})
    assert same(state, expected)
    files_of[2].write_bytes(contents_of[2])
    begin(tmp_path / "b")
    files_of[0].write_bytes(contents_of[0])
    files_of[2].write_bytes(flip_bit(contents_of[2], 100))
    with pytest.raises(Damaged, match="epoch-0002.*, byte 64"):  # is still to come
        train_from_store(data, tmp_path / "b", copy, recipe_of={"epochs": 2})
    files_of[2].write_bytes(contents_of[2])
    state = train_from_store(data, tmp_path / "b", copy, recipe_of={"epochs": 2})
    assert state["identity"]["settings"]["store"]["epochs"] == [1, 2]


@pytest.mark.slow
def test_no_more_epochs_are_read_than_are_needed(data, copy, tmp_path, monkeypatch):
    """And what is not written is not called damaged."""
    first = copy / "epoch-0000-rank-0-of-1.records"
    first.rename(first.with_suffix(".part"))
    looked, damage, events = [], Store.damage, []
    monkeypatch.setattr(Store, "damage", lambda s, e: looked.append(e) or damage(s, e))
    train_from_store(data, tmp_path / "a", copy, recipe_of={"epochs": 1}, report=events.append)
    assert looked == [0, 1]
    (note,) = (event["text"] for event in events if event["event"] == "note")
    assert note == "store: 1 epoch is not written, and left out: 0"
    with pytest.raises(ValueError, match="has 2 that can be used .1 is not written: .*complete"):
        train_from_store(data, tmp_path / "b", copy)
