"""Images on disk -> classes: what timm's own transform and model predict."""

from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from checking import assert_close
from modelling import pair, tiny_pair
from PIL import Image

import deit_fast
from deit_fast import batch_inference

PHOTOS = [str(p) for p in sorted((Path(deit_fast.__file__).parent / "data").glob("*.jpg"))]
SMALL = {"embed_dim": 64, "num_heads": 2, "depth": 2}


def probabilities(reference, heads="joint"):
    """timm's model on timm's transform, an image at a time."""
    config = timm.data.resolve_model_data_config(reference)
    size = (3, *reference.patch_embed.img_size)
    transform = timm.data.create_transform(**config | {"input_size": size})
    rows = []
    for path in PHOTOS:
        with torch.no_grad():
            x = reference.forward_features(transform(Image.open(path).convert("RGB"))[None])
            z = [reference.head(x[:, 0]), reference.head_dist(x[:, 1])]
        p = {
            "joint": ((z[0] + z[1]) / 2).softmax(-1), "class": z[0].softmax(-1),
            "distill": z[1].softmax(-1),
            "joint_softmax": (z[0].softmax(-1) + z[1].softmax(-1)) / 2,
        }[heads]  # fmt: skip
        rows.append(p[0])
    return torch.stack(rows)


@pytest.mark.parametrize("heads", ["joint", "class", "distill", "joint_softmax"])
def test_classes_are_timms(tmp_path, heads):
    reference, fast = pair(**SMALL)
    deit_fast.set_heads(fast, heads)
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    paths = [PHOTOS[0], str(tmp_path / "bad.jpg"), *PHOTOS[1:]]
    predictor = batch_inference.Predictor(fast, batch_size=2, topk=3)
    batches = list(batch_inference.predict(predictor, paths, workers=0))
    assert [len(b.paths) for b in batches] == [2, 2, 1]
    assert [p for b in batches for p in b.paths] == paths
    assert [r for b in batches for r in b.reasons] == [None, "cannot identify image file"] + [
        None
    ] * 3
    expected = probabilities(reference, heads).topk(3)
    classes = np.concatenate([b.columns["classes"] for b in batches])
    scores = np.concatenate([b.columns["scores"] for b in batches])
    np.testing.assert_array_equal(classes, expected.indices)
    assert_close(torch.from_numpy(scores), expected.values)


def test_features_are_timms_pre_logits():
    reference, fast = tiny_pair()
    predictor = batch_inference.Predictor(fast, batch_size=8, embed=True)
    (batch,) = batch_inference.predict(predictor, PHOTOS, workers=1)
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(reference) | {"input_size": (3, 64, 64)}
    )
    x = torch.stack([transform(Image.open(p).convert("RGB")) for p in PHOTOS])
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features(x), pre_logits=True)
    assert_close(torch.from_numpy(batch.columns["embedding"]), expected)


def test_a_batch_of_nothing_but_unreadable_files():
    predictor = batch_inference.Predictor(tiny_pair()[1], batch_size=2)
    (batch,) = batch_inference.predict(predictor, ["nowhere.jpg"] * 2, workers=0)
    assert batch.reasons == ["no such file"] * 2 and batch.columns == {}
    assert list(batch_inference.predict(predictor, [], workers=0)) == []


def test_the_clock_tells_waiting_from_computing(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(batch_inference.time, "perf_counter", lambda: now[0])
    predictor = batch_inference.Predictor(tiny_pair()[1], batch_size=1)
    decoder, engine = predictor.decoder, predictor.engine

    def slow(function, seconds):
        def call(*args):
            now[0] += seconds
            return function(*args)

        return call

    predictor.decoder, clock = slow(decoder, 3.0), batch_inference.Clock()
    monkeypatch.setattr(type(engine), "__call__", slow(type(engine).__call__, 1.0))
    for _ in batch_inference.predict(predictor, PHOTOS, 0, clock):
        pass
    assert (clock.total, clock.waiting, clock.share) == (16.0, 12.0, 0.75)
    assert batch_inference.Clock().share == 0


def test_label_names():
    assert batch_inference.label_names(pair(**SMALL)[1])[
        1
    ] == timm.data.ImageNetInfo().index_to_description(1)
    own = tiny_pair()[1]
    assert batch_inference.label_names(own) == [f"class {i}" for i in range(11)]
    own.pretrained_cfg = own.pretrained_cfg | {"label_names": list("abcdefghijk")}
    assert batch_inference.label_names(own) == list("abcdefghijk")


def test_digest_is_of_the_weights():
    a, b = tiny_pair()
    assert batch_inference.digest(a) == batch_inference.digest(b)
    assert batch_inference.digest(b.half()) != batch_inference.digest(a)
    with torch.no_grad():
        a.head.bias[0] += 1
    assert batch_inference.digest(a) != batch_inference.digest(tiny_pair()[0])


def test_bad_options():
    with pytest.raises(ValueError, match="topk: 0"):
        batch_inference.Predictor(tiny_pair()[1], 2, topk=0)
    with pytest.raises(ValueError, match="no classes"):
        batch_inference.Predictor(tiny_pair(num_classes=0)[1], 2)
    assert batch_inference.Predictor(tiny_pair()[1], 2, topk=100).topk == 11
