"""Analyses of distilled models and of training runs, against figures made by hand."""

import csv
import json
import math
import re
import sys

import numpy as np
import pytest
import selection
import timm.data
import torch
from checking import FP64, assert_close, seeded
from modelling import randomize, tiny_pair, write_image
from PIL import Image

import deit_fast
from deit_fast.cli import main
from deit_fast.distill import analyse, evaluate
from deit_fast.distill.datasets import open_images
from deit_fast.engine import data_config

SIZE = {"img_size": 32, "num_classes": 5, "depth": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five classes of four images."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(seeded(0))
    for i in range(20):
        write_image(root / f"c{i // 4}" / f"{i:02}.png", random, (4, 4), (40, 40))
    return root


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """{"two": distilled, "one": not, "convnet": of another kind} -> folder"""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(seeded(0))
    made = {
        "two": models[1],
        "one": tiny_pair(distilled=False, **SIZE)[1],
        "convnet": randomize(timm.create_model("test_resnet", num_classes=5), seed=2),
    }
    for name, model in made.items():
        deit_fast.save_pretrained(model, root / name)
    return {name: str(root / name) for name in made}


def disagreement(folder, *options):
    command = ["analyse", "disagreement", str(folder), "--workers", "0", "--dtype", "fp32"]
    return [*command, *options]


def tokens(folder):
    return ["analyse", "tokens", str(folder), "--workers", "0", "--dtype", "fp32"]


def assert_figure(path):
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 200
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


# Table 4


def test_disagreement_by_brute_force():
    random = np.random.default_rng(seeded(0))
    decided = {f"row {i}": random.integers(0, 3, 57) for i in range(4)}
    decided["row 4"] = decided["row 1"].copy()
    found = analyse.disagreement(decided)
    rows = list(decided.values())
    expected = [
        [sum(int(x != y) for x, y in zip(a, b, strict=True)) / 57 for b in rows] for a in rows
    ]
    assert_close(torch.from_numpy(found), torch.tensor(expected, dtype=FP64))
    assert (found == found.T).all() and not found.diagonal().any()
    assert found[1, 4] == 0 and found[0, 1] > 0.3
    with pytest.raises(ValueError, match="none that every model could read"):
        analyse.disagreement({"a": np.array([], int)})


def test_predicted_classes_over_what_all_could_read():
    def run(numbers, **top):
        top = {head: np.array([[c, 9] for c in classes]) for head, classes in top.items()}
        labels = np.array(numbers) + 100
        return evaluate.Predictions(np.array(numbers), labels, top, [], 1.0)

    first = run([0, 1, 2, 4], **{"class": [5, 6, 7, 8], "distill": [1, 2, 3, 4]})
    second = run([1, 2, 3, 4], **{"class": [6, 0, 0, 1]})
    found = analyse.predicted_classes([({"A:distill": "distill", "A:class": "class"}, first),
                               ({"B": "class"}, second)])  # fmt: skip
    assert {name: row.tolist() for name, row in found.items()} == {
        "truth": [101, 102, 104], "A:distill": [2, 3, 4], "A:class": [6, 7, 8], "B": [6, 0, 1],
    }  # fmt: skip
    assert list(found)[0] == "truth"


def test_specifications(models, tmp_path, monkeypatch):
    assert analyse.parse_classifiers(["a", "b:class", "a:joint_softmax", "b:distill"]) == {
        "a": [None, "joint_softmax"], "b": ["class", "distill"],
    }  # fmt: skip
    assert analyse.parse_classifiers(["hf-hub:x/y", "hf-hub:x/y:class"]) == {
        "hf-hub:x/y": [None, "class"],
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:name").mkdir()
    assert analyse.parse_classifiers(["odd:name", "odd:name:joint"]) == {
        "odd:name": [None, "joint"]
    }
    with pytest.raises(ValueError, match="a:both: head 'both', expected one of"):
        analyse.parse_classifiers(["a:both"])
    three = {"m:class": "class", "m:distill": "distill", "m:joint": "joint"}
    assert analyse.rows_of("m", models[0], [None]) == three
    assert analyse.rows_of("m", models[1], ["joint_softmax", None]) == three | {
        "m:joint_softmax": "joint_softmax"
    }
    _, one = tiny_pair(distilled=False, **SIZE)
    assert analyse.rows_of("m", one, [None]) == analyse.rows_of("m", one, ["class"])
    assert analyse.rows_of("m", one, [None]) == {"m": "class"}
    with pytest.raises(ValueError, match="m:distill: VisionTransformer has one head"):
        analyse.rows_of("m", one, [None, "distill"])


@pytest.mark.slow
def test_disagreement_command(folder, saved, tmp_path, capsys):
    selection.extra("train", "matplotlib")
    two, one, convnet = (saved[name] for name in ("two", "one", "convnet"))
    out = tmp_path / "new" / "table4"
    command = disagreement(folder, "--out", str(out))
    specs = [convnet, one, two, f"{two}:joint_softmax"]
    assert main([*command, "--models", *specs]) == 0
    printed = capsys.readouterr().out
    result = json.loads((out / "disagreement.json").read_text())
    names = ["truth", convnet, one, *(f"{two}:{h}" for h in evaluate.HEADS)]
    assert result["classifiers"] == names and result["images"] == 20 and result["skipped"] == []

    images = open_images(folder)
    rows = [images.labels]
    for path, heads in ((convnet, ["joint"]), (one, ["joint"]), (two, evaluate.HEADS)):
        for head in heads:
            if path == convnet:
                model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
            else:
                model = deit_fast.from_pretrained(path, heads=head).eval()
            transform = timm.data.create_transform(**data_config(model), is_training=False)
            x = torch.stack([transform(images.image(i)) for i in range(20)])
            with torch.no_grad():
                rows.append(model(x).argmax(1).numpy())
    expected = np.array([[np.mean(a != b) for b in rows] for a in rows])
    assert_close(torch.tensor(result["disagreement"], dtype=FP64), torch.from_numpy(expected))
    assert len(np.unique(expected)) > 5
    with open(out / "disagreement.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["", *names] and [line[0] for line in lines] == names
    assert np.array_equal(np.array([line[1:] for line in lines], float), expected)
    assert re.search(r"^ +classifier +0 +1 +2 +3 +4 +5 +6 *$", printed, re.M), printed
    for i, (name, row) in enumerate(zip(names, expected, strict=True)):
        numbers = " +".join(f"{rate:.3f}" for rate in row)
        assert re.search(rf"^ ?{i} +{re.escape(name)} +{numbers} *$", printed, re.M), printed
    assert_figure(out / "disagreement.png")


def test_each_model_runs_once_and_skipped_images_are_told(
    folder, saved, tmp_path, capsys, monkeypatch
):
    real, calls = evaluate.predictions, []
    monkeypatch.setattr(
        evaluate, "predictions", lambda m, *a, **k: calls.append(m) or real(m, *a, **k)
    )
    broken = folder / "c0" / "broken.png"
    broken.write_bytes(b"none")
    two, one = saved["two"], saved["one"]
    command = disagreement(folder, "--models")
    try:
        specs, path = (f"{two}:class", one, f"{two}:distill"), tmp_path / "rates.json"
        assert main([*command, *specs, "--json", str(path)]) == 1
    finally:
        broken.unlink()
    printed = capsys.readouterr()
    assert len(calls) == 2 and "over 20 images" in printed.out
    assert printed.err.count("broken.png: cannot identify image file") == 1
    assert "skipped: 1 unreadable images" in printed.err and f"{two}:joint" not in printed.out
    found = json.loads(path.read_text())
    assert len(found["disagreement"]) == len(found["classifiers"]) == 4
    ((name, reason),) = found["skipped"]
    assert name.endswith("broken.png") and "cannot identify" in reason


def test_a_model_that_does_not_fit_is_refused_before_any_runs(
    folder, saved, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "predictions", None)
    _, other = tiny_pair(**SIZE | {"num_classes": 4})
    deit_fast.save_pretrained(other, tmp_path)
    command = ["analyse", "disagreement", str(folder), "--workers", "0", "--models"]
    for spec, message in (
        (str(tmp_path), "model: 4 classes, images: 5, expected as many"),
        (f"{saved['one']}:distill", "VisionTransformer has one head"),
        ("x:both", "x:both: head 'both', expected one of"),
    ):
        assert main([*command, saved["two"], spec]) == 2
        assert message in capsys.readouterr().err


# Similarity of the tokens


def by_hand(model, images, numbers):
    """Mean cosines from timm's own parts, one after the other, without a hook."""
    transform = timm.data.create_transform(**data_config(model), is_training=False)
    x = torch.stack([transform(images.image(i)) for i in numbers])

    def mean_cosine(x):
        a, b = x[:, 0].double(), x[:, 1].double()
        return ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean().item()

    with torch.no_grad():
        found = [mean_cosine(torch.cat((model.cls_token, model.dist_token), 1))]
        x = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            x = block(x)
            found.append(mean_cosine(x))
        return [*found, mean_cosine(model.norm(x))]


@pytest.mark.parametrize("fast", [0, 1])
def test_cosines_by_hand(folder, models, fast):
    images = open_images(folder)
    for count, numbers in ((1000, range(20)), (3, (0, 6, 13))):
        found = analyse.token_similarity(models[fast], images, count=count, batch_size=7)
        assert list(found.cosines) == ["input", "block 1", "block 2", "block 3", "norm"]
        expected = by_hand(models[0], images, numbers)
        assert_close(torch.tensor(list(found.cosines.values())), torch.tensor(expected))
        assert found.images == len(numbers) and found.skipped == []
        assert len({round(cosine, 3) for cosine in expected}) == 5
    assert not any(m._forward_hooks for m in models[fast].modules())


def test_hooks_are_removed_whatever_happens(folder, models, monkeypatch):
    def fails(*_):
        assert all(block._forward_hooks for block in models[1].blocks)
        raise KeyboardInterrupt

    monkeypatch.setattr(models[1].norm, "forward", fails)
    with pytest.raises(KeyboardInterrupt):
        analyse.token_similarity(models[1], open_images(folder))
    assert not any(block._forward_hooks for block in models[1].blocks)


def test_tokens_errors(folder, models, tmp_path):
    images = open_images(folder)
    _, one = tiny_pair(distilled=False, **SIZE)
    with pytest.raises(ValueError, match="model: VisionTransformer has no distillation token"):
        analyse.token_similarity(one, images)
    with pytest.raises(ValueError, match="count: 0, expected 1 or more"):
        analyse.token_similarity(models[1], images, count=0)
    with pytest.raises(ValueError, match="in train mode"):
        try:
            analyse.token_similarity(models[1].train(), images)
        finally:
            models[1].eval()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="none of 1 could be read"):
        analyse.token_similarity(models[1], open_images(tmp_path))


@pytest.mark.slow
def test_tokens_command(folder, models, saved, tmp_path, capsys):
    selection.extra("train", "matplotlib")
    out = tmp_path / "tokens"
    command = [*tokens(folder), "--count", "10"]
    assert main([*command, "--model", saved["two"], "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    expected = by_hand(models[0], open_images(folder), range(0, 20, 2))
    places = ["input", "block 1", "block 2", "block 3", "norm"]
    with open(out / "tokens.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["after", "cosine"] and [row[0] for row in rows[1:]] == places
    assert_close(torch.tensor([float(row[1]) for row in rows[1:]]), torch.tensor(expected))
    for place, cosine in zip(places, expected, strict=True):
        assert re.search(rf"^ ?{place} +{cosine:.4f} *$", printed, re.M), printed
    assert_figure(out / "tokens.png")
    assert main([*command, "--model", saved["one"]]) == 2
    assert "has no distillation token" in capsys.readouterr().err


def test_without_matplotlib_nothing_is_run(folder, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "deit_fast.distill.plots", raising=False)
    monkeypatch.delattr("deit_fast.distill.plots", raising=False)
    command = [*tokens(folder), "--model", saved["two"]]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'deit_fast[train]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)  # alone there
    assert found["images"] == 20 and found["skipped"] == []
    assert list(found["cosines"]) == ["input", "block 1", "block 2", "block 3", "norm"]


@pytest.mark.slow
def test_plots_show_the_values(tmp_path):
    """Other values, another figure; the same ones, the same."""
    selection.extra("train", "matplotlib")
    from deit_fast.distill import plots

    figures = []
    for i, high in enumerate((0.5, 0.5, 0.25)):
        plots.matrix(["a", "b"], np.array([[0, high], [high, 0]]), "t", tmp_path / f"{i}.png")
        plots.line({"x": 0.1, "y": 1 - high, "z": 1}, "t", "what", tmp_path / f"l{i}.png")
        figures.append([np.asarray(Image.open(tmp_path / f"{k}{i}.png")) for k in ("", "l")])
    for same, other in zip(figures[0], figures[1], strict=True):
        assert np.array_equal(same, other)
    for same, other in zip(figures[0], figures[2], strict=True):
        assert same.shape == other.shape and not np.array_equal(same, other)
    dark = (figures[0][0][..., :3] == (8, 48, 107)).all(-1)  # the end of the scale
    assert 0.1 < dark.mean() < 0.5  # two of four cells


# Tables 2 and 3

RUN = {
    "model": "deit_tiny_distilled", "teacher": "regnety_160", "teacher_top1": 82.94,
    "distill": "hard", "distill_token": "distill", "img_size": 224, "epochs": 300, "seed": 0,
    "params": 5910800,
}  # fmt: skip
RESULT = {
    "images": 50000, "epoch": 300, "images_per_s": 1.0,
    "top1": {"class": 73.9, "distill": 74.6, "joint": 74.5, "joint_softmax": 74.4},
    "top5": {"class": 91.0, "distill": 92.0, "joint": 92.5, "joint_softmax": 92.4},
}  # fmt: skip
PLAIN = {
    "model": "deit_tiny", "teacher": None, "teacher_top1": None, "distill": "none",
    "distill_token": None,
}  # fmt: skip
ONE = {"top1": {"class": 70.0}, "top5": {"class": 90.0}}


def write(folder, run=None, result=None):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(RUN | (run or {})))
    (folder / "result.json").write_text(json.dumps(RESULT | (result or {})))
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    """A distilled run, and three seeds of one without distillation, mixed."""
    made = [
        write(tmp_path / f"plain{seed}", PLAIN | {"seed": seed},
              {"top1": {"class": top1}, "top5": {"class": 90.0 + seed}})
        for seed, top1 in ((0, 72.0), (1, 72.6), (2, 72.3))
    ]  # fmt: skip
    return [made[0], write(tmp_path / "hard"), *made[1:]]


EXPECTED = [
    ("deit_tiny", "no distillation", "–", "class", "224", "300", "3", "72.30 ± 0.30",
     "91.00 ± 1.00"),
    ("deit_tiny_distilled", "hard, distillation token", "regnety_160 (82.9)", "class", "224", "300",
     "1", "73.90", "91.00"),
    ("deit_tiny_distilled", "hard, distillation token", "regnety_160 (82.9)", "distillation", "224",
     "300", "1", "74.60", "92.00"),
    ("deit_tiny_distilled", "hard, distillation token", "regnety_160 (82.9)", "both", "224", "300",
     "1", "74.50", "92.50"),
]  # fmt: skip


def test_comparison_by_hand(runs):
    assert analyse.comparison(runs) == EXPECTED


def test_runs_that_differ_in_anything_are_apart(runs, tmp_path):
    for i, (key, value) in enumerate((
        ("model", "deit_small"), ("teacher", "x"), ("teacher_top1", 1), ("distill", "soft"),
        ("distill_token", "class"), ("img_size", 32), ("epochs", 9), ("params", 1),
    )):  # fmt: skip
        other = write(tmp_path / f"other{i}", PLAIN | {"seed": 3, key: value}, ONE)
        rows = analyse.comparison([*runs, other])
        assert len(rows) == 5 and rows[:4] == EXPECTED and rows[4][6] == "1", key
    usual = write(tmp_path / "usual", {"distill": "soft", "distill_token": "class"}, ONE)
    ((_, method, *_, top1, top5),) = analyse.comparison([usual])
    assert (method, top1, top5) == ("soft", "70.00", "90.00")
    both = write(tmp_path / "both", PLAIN | {"distill_token": None})
    assert [row[1:4:2] for row in analyse.comparison([both])] == [
        ("no distillation", token) for token in ("class", "distillation", "both")
    ]


def test_spread_is_the_samples(tmp_path):
    random = np.random.default_rng(seeded(0)).uniform(70, 80, 5)
    folders = [
        write(tmp_path / str(i), PLAIN | {"seed": i},
              {"top1": {"class": x}, "top5": {"class": 99}}) for i, x in enumerate(random)
    ]  # fmt: skip
    (row,) = analyse.comparison(folders)
    deviation = math.sqrt(((random - random.mean()) ** 2).sum() / 4)
    assert row[6:] == ("5", f"{random.mean():.2f} ± {deviation:.2f}", "99.00 ± 0.00")


def test_table_command(runs, tmp_path, capsys):
    assert main(["analyse", "table", *runs]) == 0
    printed = capsys.readouterr().out
    assert all(heading in printed for heading in analyse.COLUMNS)
    for row in EXPECTED:
        cells = " +".join(map(re.escape, row))
        assert re.search(rf"^ ?{cells} *$", printed, re.M), printed
    out = tmp_path / "table.md"
    assert main(["analyse", "table", *runs, "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    lines = out.read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(analyse.COLUMNS) and [tuple(row) for row in cells[2:]] == EXPECTED
    assert [set(c) - {":"} for c in cells[1]] == [{"-"}] * 9 and len(lines) == 6
    assert "a\\|b" in analyse.markdown([("a|b", *EXPECTED[0][1:])])


@pytest.mark.parametrize(
    "run, result, message",
    [
        ({"seed": None}, {}, "run.json: seed: None, expected int"),
        ({"epochs": True}, {}, "run.json: epochs: True, expected int"),
        ({"teacher": 3}, {}, "run.json: teacher: 3, expected str or null"),
        ({"distill": "warm"}, {}, "run.json: distill: 'warm', expected one of"),
        ({}, {"top1": [1]}, r"result.json: top1: \[1\], expected dict"),
        (
            {},
            {"top1": {"class": 1, "joint": 1}},
            "result.json: top1: distill: None, expected a percentage",
        ),
        ({}, {"top5": RESULT["top5"] | {"joint": 101}}, "top5: joint: 101, expected a percentage"),
        ({}, {"top5": RESULT["top5"] | {"joint": math.nan}}, "top5: joint: nan, expected a perc"),
    ],
)
def test_broken_values_are_named(run, result, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        analyse.comparison([write(tmp_path / "run", run, result)])


def test_broken_files_are_named(tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="run/run.json: can't be read .No such file"):
        analyse.comparison([folder])
    write(folder)
    for name, text, message in (
        ("run.json", "{", "run/run.json: is no JSON"),
        ("run.json", "[]", "run/run.json: holds a list, expected a JSON object"),
        ("run.json", '{"model": "x"}', "run/run.json: has no teacher"),
        ("result.json", '{"images": 1}', "run/result.json: has no top1"),
    ):
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            analyse.comparison([folder])
        (folder / name).write_text(before)
    with pytest.raises(ValueError, match="run: the same run as .*run, with the same seed"):
        analyse.comparison([folder, folder])
    other = write(tmp_path / "other", {"seed": 1}, {"images": 100})
    with pytest.raises(ValueError, match="other/result.json: images: 100, but 50000 in .*run"):
        analyse.comparison([folder, other])
    assert main(["analyse", "table", str(tmp_path / "absent")]) == 2
    assert "deit-fast analyse: " in capsys.readouterr().err
