"""Attention rollout against numpy, the maps of the tokens, and the command that draws them."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import selection
import torch
from checking import BF16, assert_close, assert_differ, assert_equal, seeded
from modelling import images, pair, timms_softmax, tiny_pair, write_image
from PIL import Image

import deit_fast
from deit_fast.attention_weights import token_maps
from deit_fast.cli import main
from deit_fast.engine import data_config
from deit_fast.images import Decoder

CAIT = "cait_xxs24_224"


def by_numpy(maps, fusion, ratio):
    """One image at a time, in fp64, as in vit-explain, but normalised by rows."""
    every = []
    for image in range(len(next(iter(maps.values())))):
        rollout = np.eye(next(iter(maps.values())).shape[-1])
        for p in maps.values():
            fused = getattr(np, fusion)(p[image].double().numpy(), axis=0)
            lowest = np.argsort(fused, axis=None)[: int(fused.size * ratio)]
            fused.flat[lowest[lowest != 0]] = 0
            step = 0.5 * fused + 0.5 * np.eye(len(fused))
            rollout = step / step.sum(1, keepdims=True) @ rollout
        every.append(rollout)
    return torch.from_numpy(np.stack(every))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
def test_rollout_by_numpy(fusion, ratio):
    models = tiny_pair(img_size=(32, 80), depth=3, num_heads=4, embed_dim=128)
    x, found = images(models[0], batch=3), []
    maps = timms_softmax(models[0], x)
    expected = by_numpy(maps, fusion, ratio)
    for model in models:
        found.append(deit_fast.attention_rollout(model, x, fusion, ratio))
        assert_close(found[-1], expected.float())
        assert_close(found[-1].sum(-1), torch.ones(3, 12))
        assert_differ(found[-1][0], found[-1][1])
    others = itertools.product(("mean", "max", "min"), (0.0, 0.5, 0.999))
    for other in others:
        if other != (fusion, ratio):
            assert_differ(by_numpy(maps, *other), expected)
    assert_equal(deit_fast.attention_rollout(models[0], x),
                 deit_fast.attention_rollout(models[0], x, "mean", 0.0))  # fmt: skip


def test_rollout_errors():
    model = tiny_pair()[1]
    x = images(model)
    with torch.autocast("cpu", BF16):
        rollout = deit_fast.attention_rollout(model, x)
    assert_close(rollout.sum(-1), torch.ones(2, 18))
    with pytest.raises(
        ValueError, match=r"head_fusion: 'sum', expected one of \('mean', 'max', 'min'"
    ):
        deit_fast.attention_rollout(model, x, "sum")
    for ratio in (-0.1, 1, float("nan")):
        with pytest.raises(
            ValueError, match="discard_ratio: .*, expected 0 or more, and less than 1"
        ):
            deit_fast.attention_rollout(model, x, discard_ratio=ratio)
    for cait in pair(CAIT, depth=1, img_size=32):
        with pytest.raises(ValueError, match="model: Cait mixes its heads behind the softmax"):
            deit_fast.attention_rollout(cait, images(cait))


def test_maps_of_the_tokens():
    """Row by row of patches, behind the tokens."""
    for (model, _), names, first in (
        (tiny_pair(img_size=(32, 80)), ["class", "distillation"], 2),
        (tiny_pair(img_size=(32, 80), distilled=False, reg_tokens=3), ["class"], 4),
        (pair(CAIT, depth=1, img_size=(32, 80)), ["class"], 1),
    ):
        x = images(model)
        p = deit_fast.attention_maps(model, x, -1).popitem()[1]
        for weights in (p, p.mean(1)):
            maps = token_maps(model, x, weights)
            assert list(maps) == names
            for row, (name, of) in enumerate(maps.items()):
                for i, j in np.ndindex(2, 5):
                    assert_equal(of[..., i, j], weights[..., row, first + 5 * i + j], name)
        as_bytes = torch.zeros(2, 32, 80, 3, dtype=torch.uint8)
        assert_equal(token_maps(model, as_bytes, p), token_maps(model, x, p))
    trunk = deit_fast.attention_maps(model, x, 0)["blocks.0"]
    headless = tiny_pair(distilled=False, class_token=False, reg_tokens=1, global_pool="avg")[1]
    x = images(headless)
    for other, weights in ((model, trunk), (headless, deit_fast.attention_rollout(headless, x))):
        with pytest.raises(ValueError, match="weights: .* patches behind a class token"):
            token_maps(other, images(other), weights)


# deit-fast analyse attention


@pytest.fixture(scope="module")
def model():
    return tiny_pair(img_size=(32, 48), depth=3)[1]


@pytest.fixture(scope="module")
def command(model, tmp_path_factory):
    """Two images; the second in a list whose first file is no image."""
    root = tmp_path_factory.mktemp("attention")
    random = np.random.default_rng(seeded(0))
    for name in ("one $x^$.png", "two.png"):
        write_image(root / "photos" / name, random, (4, 6), (60, 50))
    (root / "photos" / "broken.png").write_bytes(b"none")
    names = (root / "photos" / name for name in ("broken.png", "two.png"))
    (root / "some.txt").write_text("\n".join(map(str, names)))
    deit_fast.save_pretrained(model, root / "model")
    inputs = [str(root / "photos" / "one $x^$.png"), str(root / "some.txt")]
    return ["analyse", "attention", *inputs, "--model", str(root / "model")]


@pytest.mark.slow
def test_command_draws(model, command, tmp_path, capsys, monkeypatch):
    selection.extra("train", "matplotlib")
    from deit_fast.distill import plots

    real, drawn = plots.attention, []
    monkeypatch.setattr(plots, "attention", lambda *args: drawn.append(args) or real(*args))
    figures = []
    for options, what in (
        ((), "attention in blocks.2, mean of the heads"),
        (("--block", "-1"), "attention in blocks.2, mean of the heads"),
        (("--block", "1"), "attention in blocks.1, mean of the heads"),
        (("--rollout",), "attention rollout"),
    ):
        out = tmp_path / "new" / "folder" / "a.png"
        assert main([*command, "--out", str(out), *options]) == 1
        printed = capsys.readouterr()
        assert printed.out == f"{out}: {what}, 2 images\n"
        assert "broken.png: cannot identify image file" in printed.err
        assert list(out.parent.iterdir()) == [out]
        rows, title, _ = drawn.pop()
        assert title == f"{command[-1]}: {what}"
        assert [Path(name).name for name, *_ in rows] == ["one $x^$.png", "two.png"]
        for name, pixels, maps in rows:
            assert np.array_equal(pixels, Decoder(data_config(model))(name))
            x = torch.from_numpy(pixels)[None]
            if "--rollout" in options:
                weights = deit_fast.attention_rollout(model, x)
            else:
                number = int(what.split(",")[0].split(".")[1])
                weights = deit_fast.attention_maps(model, x)[f"blocks.{number}"].mean(1)
            for row, token in enumerate(("class", "distillation")):
                expected = weights[0, row, 2:].view(2, 3)
                assert_equal(torch.from_numpy(maps[token]), expected)
        with Image.open(out) as image:
            assert image.format == "PNG" and min(image.size) > 400
            figures.append(np.asarray(image.convert("RGB")))
    assert np.array_equal(figures[0], figures[1])
    assert not np.array_equal(figures[0], figures[2])
    assert not np.array_equal(figures[0], figures[3])


@pytest.mark.slow
def test_figure_shows_the_values(tmp_path):
    """A map is bright where it is largest and dark where it is least; the first column is the image
    itself. No text is cut off at the edge."""
    selection.extra("train", "matplotlib")
    from deit_fast.distill import plots

    pixels = np.full((40, 60, 3), (0, 0, 255), np.uint8)
    low, high = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    low[0, 0], high[0, 0] = 1.0, 0.0
    for rows in (1, 3):
        one = ("x" * 200 + ".png", pixels, {"class": low, "distillation": high})
        plots.attention([one] * rows, "a long title $x^$ " * 20, tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            found = np.asarray(image.convert("RGB")).astype(int)
        assert all((edge == 255).all() for edge in (found[:, [0, -1]], found[[0, -1]]))
        blue = (found == (0, 0, 255)).all(-1)
        columns = np.flatnonzero(blue.any(0))
        wide = columns[-1] - columns[0]
        assert 0.25 < wide / found.shape[1] < 0.35  # one of three
        first = np.flatnonzero(blue[:, columns[wide // 2]])
        top = first[0] + 5  # in the row of patches above
        brightness = [
            found[top, columns[0] + 5 + int(k * wide * 1.04) : columns[0] + int((k + 0.2) * wide)]
            .sum(-1).mean()
            for k in (1, 2)
        ]  # fmt: skip
        assert brightness[0] > 2 * brightness[1]
    gray = ("\udcff.png", pixels[..., :1], {"class": low})
    plots.attention([gray], "one channel, one token", tmp_path / "a.png")


def test_without_matplotlib_nothing_is_run(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "deit_fast.distill.plots", raising=False)
    monkeypatch.delattr("deit_fast.distill.plots", raising=False)
    assert main([*command, "--out", str(tmp_path / "new" / "a.png")]) == 2
    assert "pip install 'deit_fast[train]'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def wrong(command, capsys, *options):
    """The one line on stderr."""
    assert main([*command, *options]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert not printed.out and line.startswith("deit-fast analyse: ")
    return line


def test_command_errors_before_anything_is_read(command, tmp_path, capsys):
    out = ["--out", str(tmp_path / "a.png")]
    found = wrong(command, capsys, *out, "--rollout", "--block", "1")
    assert "--block: rollout goes through all of them" in found
    found = wrong(command, capsys, "--out", str(tmp_path / "a.jpg"))
    assert "a.jpg, expected a name that ends in .png" in found
    (tmp_path / "a.png").mkdir()
    assert "a.png is a folder" in wrong(command, capsys, *out)


@pytest.mark.slow
def test_command_errors(command, tmp_path, capsys, monkeypatch):
    """Whatever fails, an earlier figure stays, and no other file is left."""
    selection.extra("train", "matplotlib")
    from deit_fast.distill import plots

    start, photo = command[:2], Path(command[2])
    model, broken = command[-2:], str(photo.with_name("broken.png"))
    earlier = tmp_path / "a.png"
    earlier.write_bytes(b"earlier")
    out, before = ["--out", str(earlier)], photo.read_bytes()
    roundabout = photo.parent / ".." / photo.parent.name / photo.name
    many, empty = tmp_path / "many.txt", tmp_path / "empty.txt"
    many.write_text(f"{photo}\n" * 65)
    empty.write_text("")
    for inputs, options, message in (
        ([str(photo)], [*model, "--out", str(roundabout)], "$.png is an IMAGE, which"),
        ([broken], [*model, *out], "none of 1 images could be read"),
        ([str(many)], [*model, *out], "more than 64 images in"),
        ([str(empty)], [*model, *out], "no images found in"),
        ([str(photo.parent / "*.gif")], [*model, *out], "no images found in"),
        ([str(photo)], [*model, *out, "--block", "3"], "blocks: 3, expected -3 to 2 for 3 blocks"),
        ([str(photo)], ["--model", str(tmp_path), *out], "config.json"),
    ):
        assert message in wrong([*start, *inputs], capsys, *options), message
        assert earlier.read_bytes() == b"earlier" and photo.read_bytes() == before

    def full(rows, title, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "attention", full)
    assert "No space left" in wrong([*start, str(photo), *model], capsys, *out)
    assert earlier.read_bytes() == b"earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "empty.txt", "many.txt"]
