"""deit-fast data, as a user calls it."""

import json
from pathlib import Path

import numpy as np
import pytest
from checking import seeded
from PIL import Image

import deit_fast
from deit_fast.cli import main
from deit_fast.distill.datasets import sheet
from deit_fast.distill.datasets.image_set import ImageSet

PHOTOS = sorted((Path(deit_fast.__file__).parent / "data").glob("*.jpg"))


def photo(i):
    return Image.open(PHOTOS[i]).convert("RGB").resize((160, 120))


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def good(tmp_path):
    """Two classes, two splits, nothing wrong."""
    draw = np.random.default_rng(seeded(0))
    for split, count in (("train", 6), ("val", 2)):
        for c, name in enumerate(("ant", "bee")):
            for i in range(count + 3 * c * (split == "train")):
                pixels = draw.integers(0, 256, (70, 80 + i, 3), dtype=np.uint8)
                save(Image.fromarray(pixels), tmp_path / "data" / split / name / f"{i}.png")
    return tmp_path / "data"


def call(capsys, *args):
    code = main(["data", *map(str, args), "--workers", "0"])
    return code, *capsys.readouterr()


def test_data_without_a_fault(good, capsys):
    code, out, err = call(capsys, good)
    assert code == 0 and not err.strip()
    lines = [line.split() for line in out.splitlines()]
    assert ["ant", "6", "2"] in lines and ["bee", "9", "2"] in lines and ["all", "15", "4"] in lines
    assert ["largest", "/", "smallest", "1.5", "1.0"] in lines
    assert ["train", "width", "80", "83", "88"] in lines
    assert "modes, train: RGB 15" in out and "duplicates: 0 copies" in out
    assert "across splits: 0 pictures" in out


def test_every_fault_is_named(good, tmp_path, capsys):
    train, val = good / "train", good / "val"
    save(photo(0), train / "ant" / "cat.png")
    save(photo(0).resize((300, 220)), val / "ant" / "same.jpg", quality=50)
    save(photo(1), train / "ant" / "b.png")
    save(photo(1), train / "bee" / "b.png")
    (train / "bee" / "broken.jpg").write_bytes(PHOTOS[2].read_bytes()[:9000])
    (val / "bee" / "text.png").write_bytes(b"text")
    grey = np.arange(100 * 100, dtype=np.uint16).reshape(100, 100) * 6
    save(Image.fromarray(grey), train / "ant" / "deep.png")
    save(photo(2).convert("RGBA"), train / "ant" / "alpha.png")
    frames = [Image.new("L", (90, 90), 80 * i) for i in range(3)]
    save(frames[0], train / "ant" / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    save(photo(3), train / "ant" / "turned.jpg", exif=exif)
    draw = np.random.default_rng(seeded(1)).integers(0, 256, (20, 90), dtype=np.uint8)
    save(Image.fromarray(draw), train / "ant" / "narrow.png")
    target = tmp_path / "data.json"
    code, out, err = call(capsys, good, "--json", target)
    assert code == 1
    said = [line for line in err.splitlines() if line.strip()]
    assert said[0].startswith(f"{train}/bee/broken.jpg: ") and "truncated" in said[0]
    assert said[1:] == [
        f"{val}/bee/text.png: cannot identify image file",
        "damaged: 2 unreadable images",
    ]
    found = json.loads(target.read_text())
    assert found["unreadable"] == [line.split(": ", 1) for line in said[:2]]
    assert found["splits"]["train"]["classes"] == {"ant": 13, "bee": 11}
    assert found["splits"]["validation"]["images"] == 6 and found["images"] == 30
    assert found["across_splits"] == 1
    assert found["duplicates"] == [
        {"equal": False, "across": True, "classes": ["ant"],
         "images": [["train", f"{train}/ant/cat.png"], ["validation", f"{val}/ant/same.jpg"]]},
        {"equal": True, "across": False, "classes": ["ant", "bee"],
         "images": [["train", f"{train}/ant/b.png"], ["train", f"{train}/bee/b.png"]]},
    ]  # fmt: skip
    odd = {kind: [Path(name).name for name in names] for kind, names in found["odd"].items()}
    assert odd == {
        "16 bits": ["deep.png"], "alpha": ["alpha.png"], "animated": ["moving.gif"],
        "turned by EXIF": ["turned.jpg"], "under 32 pixels": ["narrow.png"],
        "over 4 : 1": ["narrow.png"],
    }  # fmt: skip
    assert f"  {train}/ant/cat.png = {val}/ant/same.jpg" in out.splitlines()
    assert "16 bits: 1 images, such as" in out and "across splits: 1 pictures" in out
    (train / "bee" / "broken.jpg").unlink()
    (val / "bee" / "text.png").unlink()
    assert call(capsys, good)[0] == 1, "for the picture in both splits"
    (val / "ant" / "same.jpg").unlink()
    assert call(capsys, good)[0] == 0, "duplicates in one split are no fault"


def test_data_without_splits_and_json_alone(good, capsys):
    code, out, _ = call(capsys, good / "train", "--json", "-")
    assert code == 0 and list(json.loads(out)["splits"]) == ["all"]


@pytest.mark.parametrize("suffix, kind", [(".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP")])
def test_a_contact_sheet(suffix, kind, good, tmp_path, capsys):
    (good / "train" / "ant" / "0.png").write_bytes(b"")
    save(Image.new("RGB", (200, 100), (250, 0, 0)), good / "train" / "bee" / "0.png")
    path = tmp_path / f"sheet{suffix}"
    assert call(capsys, good, "--sheet", path)[0] == 1
    with Image.open(path) as made:
        assert made.format == kind and made.size == (160 + 8 * 100 + 4, 2 * 100 + 4)
        pixels = np.asarray(made.convert("RGB")).astype(int)
    assert (pixels[10:90, 170:250] > 250).all(), "the unreadable image is left out"
    assert (pixels[10:90, 275:345].std() > 35) and (pixels[:100, :150].min() < 80), "noise, a name"
    red = pixels[104 + 30 : 104 + 66, 170:250].mean((0, 1))
    assert red[0] > 240 and red[1:].max() < 15, "whole, on a grey background"


def test_names_on_the_sheet(monkeypatch):
    monkeypatch.setattr(sheet, "find_spec", lambda name: None)
    assert sheet._font()[1] and sheet._as_ascii("Bär 猫 é") == "Bar ? e"
    images = ImageSet(["猫"], np.zeros(0, np.int64), "RGB")
    assert np.asarray(sheet.contact_sheet(images)).min() < 80


def test_errors(good, tmp_path, capsys):
    for args, expected in (
        ((tmp_path / "none",), "no such file or folder"),
        ((good, "--sheet", "a.gif"), "--sheet: a.gif, expected a name that ends in .png"),
        ((good, "--sheet", tmp_path / "no" / "a.png"), "--sheet: there is no folder"),
    ):
        code, out, err = call(capsys, *args)
        assert code == 2 and expected in err and not out
    assert main(["data", str(good), "--workers", "-1"]) == 2
    assert "--workers: -1, expected 0 or more" in capsys.readouterr().err
