"""Evaluation over labelled images: each figure against one made by hand or by brute force."""

import copy
import json
import re

import numpy as np
import pytest
import timm.data
import torch
from checking import assert_close, assert_differ, seed, seeded
from modelling import images as random_images
from modelling import tiny_pair, write_image
from PIL import Image

import deit_fast
from deit_fast.cli import main
from deit_fast.distill import evaluate, real
from deit_fast.distill.datasets import open_images
from deit_fast.engine import data_config

SIZE = {"img_size": 32, "num_classes": 7}
BROKEN = "c2/ILSVRC2012_val_00000009.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven classes of three images, numbered through from 1; the ninth can't be read."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(seeded(0))
    for i in range(21):
        path = root / f"c{i // 3}" / f"ILSVRC2012_val_{i + 1:08}.png"
        write_image(path, random, (3, 4), (50 + i, 41))
    (root / BROKEN).write_bytes(b"none")
    return root


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    deit_fast.save_pretrained(models[1], path)
    return str(path)


def by_hand(model, images, head):
    """Classes, best first, of the readable images, one at a time by timm's own transform."""
    model = copy.deepcopy(model)
    deit_fast.set_heads(model, head)
    transform = timm.data.create_transform(**data_config(model), is_training=False)
    readable = [i for i in range(len(images)) if BROKEN not in images.name(i)]
    with torch.no_grad():
        logits = torch.cat([model(transform(images.image(i))[None]) for i in readable])
    return readable, logits.argsort(1, descending=True)


@pytest.mark.parametrize("distilled", [True, False])
def test_every_head_is_the_models_own_output(distilled):
    reference, fast = tiny_pair(distilled=distilled, **SIZE)
    x = random_images(fast, 5)
    with torch.no_grad():
        found = evaluate.head_logits(fast, x)
        assert tuple(found) == evaluate.heads_of(fast) == evaluate.heads_of(reference)
        assert len(found) == (4 if distilled else 1)
        for head, logits in found.items():
            deit_fast.set_heads(fast, head if distilled else "joint")
            assert_close(logits, fast(x))
        of_timm = evaluate.head_logits(reference, x)
        assert_close(of_timm, found)
        shown = of_timm["joint" if distilled else "class"]
        assert_close(shown, reference(x))
    assert len({logits.argmax(1).shape for logits in found.values()}) == 1
    for a in found:
        for b in found:
            if a != b:
                assert_differ(found[a], found[b])


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (4, 2), (64, 0)])
def test_predictions_are_those_of_one_image_at_a_time(folder, models, batch_size, workers):
    images, seen = open_images(folder), []
    found = evaluate.predictions(
        models[1], images, batch_size=batch_size, workers=workers, progress=seen.append
    )
    ((name, reason),) = found.skipped
    assert BROKEN in name and reason == "cannot identify image file"
    for head in evaluate.HEADS:
        readable, expected = by_hand(models[1], images, head)
        assert found.top[head].tolist() == expected[:, :5].tolist()
        assert found.top[head].dtype == np.int64
    assert found.numbers.tolist() == readable
    assert found.labels.tolist() == [i // 3 for i in range(21) if i != 8]
    assert seen == sorted(seen) and seen[-1] == 21 and len(seen) >= 20 / batch_size
    assert found.seconds > 0
    accuracy = found.accuracy()
    labels = torch.tensor(found.labels)
    for head in evaluate.HEADS:
        _, expected = by_hand(models[1], images, head)
        assert accuracy.top1[head] == (expected[:, 0] == labels).sum()
        assert accuracy.top5[head] == (expected[:, :5] == labels[:, None]).any(1).sum()
    assert accuracy.images == 20


def test_some_of_the_images(folder, models):
    images = open_images(folder)
    whole = evaluate.predictions(models[1], images)
    some = evaluate.predictions(models[1], images, numbers=range(20, 0, -3))
    assert some.numbers.tolist() == [20, 17, 14, 11, 5, 2] and len(some.skipped) == 1
    assert some.labels.tolist() == [6, 5, 4, 3, 1, 0]
    places = [whole.numbers.tolist().index(i) for i in some.numbers]
    for head, top in some.top.items():
        assert np.array_equal(top, whole.top[head][places])


def test_counts_by_brute_force():
    seed(0)
    logits, labels = torch.randn(200, 11), torch.randint(11, (200,))
    top = logits.topk(5).indices
    found = evaluate.Accuracy()
    for part in (slice(0, 70), slice(70, 70), slice(70, 200)):
        found.add({"class": top[part].numpy()}, labels[part].numpy())
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found == evaluate.Accuracy(200, {"class": (rank < 1).sum()}, {"class": (rank < 5).sum()})
    percent = found.percent()
    assert percent["top1"]["class"] == pytest.approx(100 * (rank < 1).double().mean().item())
    assert 0 < percent["top1"]["class"] < percent["top5"]["class"] < 100
    with pytest.raises(ValueError, match="truths: 3 for 200 images of head class"):
        found.add({"class": top.numpy()}, [1, 2, 3])
    with pytest.raises(ValueError, match="none with a label"):
        evaluate.Accuracy().percent()


def test_three_classes_have_a_top_three(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.new("L", (32, 32), ord(name)).save(tmp_path / name / "one.png")
    _, fast = tiny_pair(img_size=32, num_classes=3, in_chans=1)
    with pytest.raises(ValueError, match=r"model: mean \(0.485, .* in its pretrained_cfg"):
        evaluate.predictions(fast, open_images(tmp_path, mode="L"))
    fast.pretrained_cfg = dict(fast.pretrained_cfg) | {"mean": (0.4,), "std": (0.2,)}
    found = evaluate.predictions(fast, open_images(tmp_path, mode="L"))
    assert [sorted(row) for row in found.top["joint"].tolist()] == [[0, 1, 2]] * 3
    assert found.accuracy().top5 == dict.fromkeys(evaluate.HEADS, 3)
    with pytest.raises(ValueError, match="images: mode RGB, expected L"):
        evaluate.predictions(fast, open_images(tmp_path))


def test_real_labels_by_hand(tmp_path):
    path = tmp_path / "real.json"
    path.write_text("[[3], [], [1, 2], [0], [4, 0]]")
    labels = real.read_real_labels(path)
    names = [
        "val/n1/ILSVRC2012_val_00000005.JPEG",
        "ILSVRC2012_val_00000002_n01440764.JPEG",
        "a_val_00000001/ILSVRC2012_val_00000003.png",
        "x.tar/ILSVRC2012_val_00000001.JPEG",
    ]
    truths = real.real_truths(labels, names)
    assert truths == [[4, 0], [], [1, 2], [3]]
    top = {"class": np.array([[0, 1], [9, 8], [3, 2], [2, 1]])}
    found = evaluate.Accuracy()
    found.add(top, truths)
    assert found == evaluate.Accuracy(3, {"class": 1}, {"class": 2})


@pytest.mark.parametrize(
    "text, message",
    [
        ("[[1], ", "is no JSON"),
        ('{"1": [1]}', "holds a dict, expected a list of lists"),
        ("[[1], 2]", "image 2 has 2, expected a list of ints"),
        ("[[1], [2], [1, 2.0]]", r"image 3 has \[1, 2.0\]"),
        ("[[true]]", "image 1 has"),
        ("[[-1]]", "image 1 has"),
    ],
)
def test_broken_real_labels(text, message, tmp_path):
    path = tmp_path / "real.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"real.json: {message}"):
        real.read_real_labels(path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("val/cat.JPEG", "val/cat.JPEG: has no number"),
        ("ILSVRC2012_val_123456789.JPEG", "has no number"),
        ("ILSVRC2012_val_00000003.JPEG", "number 3, expected one from 1 to 2"),
        ("ILSVRC2012_val_00000000.JPEG", "number 0, expected one from 1 to 2"),
    ],
)
def test_names_without_a_real_label(name, message):
    with pytest.raises(ValueError, match=message):
        real.real_truths([[0], [1]], [name])


def test_transforms_of_ones_own(folder, models):
    """Normalised floats are taken as they are, bytes are normalised."""
    images = open_images(folder)
    config = data_config(models[1])
    expected = evaluate.predictions(models[1], images).top
    for transform in (
        timm.data.create_transform(**config, is_training=False),
        timm.data.create_transform(**config, use_prefetcher=True),
    ):
        found = evaluate.predictions(models[1], images, transform=transform).top
        assert all(np.array_equal(found[head], expected[head]) for head in expected)
    dark = evaluate.predictions(models[1], images, transform=lambda _: torch.zeros(3, 32, 32)).top
    with torch.no_grad():
        grey = evaluate.head_logits(models[1], torch.zeros(1, 3, 32, 32))
    for head, logits in grey.items():
        assert dark[head].tolist() == logits.topk(5).indices.tolist() * 20

    def fails(image):
        if image.width == 50:
            raise OverflowError("too odd")
        return torch.zeros(3, 32, 32)

    found = evaluate.predictions(models[1], images, transform=fails)
    assert [(name[-12:], why) for name, why in found.skipped] == [
        ("00000001.png", "too odd"),
        ("00000009.png", "cannot identify image file"),
    ]


def test_dtypes(folder, models):
    images, seen = open_images(folder), []
    hook = models[1].head.register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    try:
        for dtype in (None, torch.float32, torch.bfloat16):
            evaluate.predictions(models[1], images, dtype=dtype, device="cpu")
    finally:
        hook.remove()
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    half = copy.deepcopy(models[1]).bfloat16()
    assert evaluate.predictions(half, images).top["joint"].shape == (20, 5)


def test_what_does_not_fit_is_named(folder, models, tmp_path):
    images = open_images(folder)
    _, other = tiny_pair(img_size=32, num_classes=6)
    with pytest.raises(
        ValueError, match="model: 6 classes, images: 7, expected as many .*ImageNet"
    ):
        evaluate.predictions(other, images)
    with pytest.raises(ValueError, match="model: in train mode"):
        evaluate.predictions(copy.deepcopy(models[1]).train(), images)
    for options, message in (
        ({"batch_size": 0}, "batch_size: 0, expected 1 or more"),
        ({"workers": -1}, "workers: -1, expected 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.predictions(models[1], images, **options)
    wrong = copy.deepcopy(models[1])
    wrong.head_dist.bias.data[2] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN from head distill"):
        evaluate.predictions(wrong, images)
    for i in range(7):
        (tmp_path / f"c{i}").mkdir()
        (tmp_path / f"c{i}" / "x.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="none of 7 could be read .*x.png: cannot identify"):
        evaluate.predictions(models[1], open_images(tmp_path))


def test_command(folder, models, saved, tmp_path, capsys):
    truths = [[] if i % 4 == 0 else [i % 7, 6 - i % 7] for i in range(21)]
    (tmp_path / "real.json").write_text(json.dumps(truths))
    out = tmp_path / "new" / "found.json"
    command = ["eval", str(folder), "--model", saved, "--workers", "0", "--batch", "5"]
    command += ["--dtype", "fp32"]
    options = ["--real", str(tmp_path / "real.json"), "--json", str(out)]
    assert main([*command, *options]) == 1
    printed = capsys.readouterr()
    result = json.loads(out.read_text())
    images = open_images(folder)
    for head in evaluate.HEADS:
        readable, order = by_hand(models[1], images, head)
        labels = images.labels[readable]
        top1 = 100 * np.mean(order[:, 0].numpy() == labels)
        top5 = 100 * np.mean((order[:, :5].numpy() == labels[:, None]).any(1))
        judged = [k for k, i in enumerate(readable) if truths[i]]
        by_real = 100 * np.mean([order[k, 0] in truths[readable[k]] for k in judged])
        assert re.search(rf"^ ?{head} +{top1:.2f} +{top5:.2f} +{by_real:.2f} *$", printed.out, re.M)
        assert result["top1"][head] == pytest.approx(top1)
        assert result["top5"][head] == pytest.approx(top5)
        assert result["real"]["top1"][head] == pytest.approx(by_real)
    assert result["images"] == 20 and result["real"]["images"] == len(judged) == 15
    assert result["images_per_s"] > 0 and BROKEN in result["skipped"][0][0]
    assert "20 images in" in printed.out and "ReaL: 15 of these" in printed.out
    assert f"{BROKEN}: cannot identify image file" in printed.err
    assert "skipped: 1 unreadable images" in printed.err
    if not torch.cuda.is_available():
        assert "(fp32 on cpu" in printed.out and "This speed is a CPU's" in printed.out
    assert main([*command, *options[:-1]]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["top1"] == result["top1"] and "ReaL: 15 of" in printed.err


def test_command_takes_the_validation_images(saved, tmp_path, capsys):
    """Where DATA has them; DATA itself elsewhere."""
    for split, count in (("train", 3), ("val", 1)):
        for path in (tmp_path / split / f"c{i}" for i in range(7)):
            path.mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (32, 32), (9, 99, k)).save(path / f"{k}.png")
    for data, options, images in (
        (tmp_path, [], 7), (tmp_path, ["--split", "train"], 21), (tmp_path / "train", [], 21),
    ):  # fmt: skip
        assert main(["eval", str(data), "--model", saved, "--workers", "0", *options]) == 0
        assert f"\n{images} images in" in capsys.readouterr().out


def test_command_names_ten_of_the_skipped(saved, tmp_path, capsys):
    for i in range(7):
        (tmp_path / f"c{i}").mkdir()
        for k in range(2):
            path = tmp_path / f"c{i}" / f"{k}.png"
            if i < 6:
                path.write_bytes(b"none")
            else:
                Image.new("RGB", (32, 32), (9, 99, k)).save(path)
    assert main(["eval", str(tmp_path), "--model", saved, "--workers", "0"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert [f"{i}/{k}.png" in lines[2 * i + k] for i in range(5) for k in (0, 1)] == [True] * 10
    assert lines[10:] == ["and 2 more", "skipped: 12 unreadable images"]
    for path in tmp_path.glob("c[0-5]/*.png"):
        Image.new("RGB", (32, 32)).save(path)
    assert main(["eval", str(tmp_path), "--model", saved, "--workers", "0"]) == 0


def test_command_names_what_is_wrong(folder, saved, tmp_path, capsys):
    (tmp_path / "real.json").write_text("[[1]]")
    for options, message in (
        (["--batch", "0"], "--batch: 0, expected 1 or more"),
        (["--workers", "-1"], "--workers: -1, expected 0 or more"),
        (["--real", str(tmp_path / "absent.json")], "No such file"),
        (
            ["--real", str(tmp_path / "real.json")],
            "00000002.png: number 2, expected one from 1 to 1",
        ),
        (["--no-pretrained"], "a folder with weights of its own"),
        (["--split", "train"], "train"),
    ):
        assert main(["eval", str(folder), "--model", saved, *options]) == 2, options
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(folder), "--model", saved, "--heads", "joint"])
