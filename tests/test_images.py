"""Finding images, and decoding them as timm's evaluation transform does."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from checking import assert_close
from PIL import Image

import deit_fast
from deit_fast import images
from deit_fast.images import Decoder, Unreadable, decode, find
from deit_fast.kernels.patch_embed import normalize_reference

PHOTOS = sorted((Path(deit_fast.__file__).parent / "data").glob("*.jpg"))
BASE = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_mode": "center"}
CONFIGS = {
    "DeiT": {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.9},
    "DeiT-384": {"input_size": (3, 384, 384), "interpolation": "bicubic", "crop_pct": 1.0},
    "squash": {
        "input_size": (3, 96, 160), "interpolation": "bilinear", "crop_pct": 0.875,
        "crop_mode": "squash",
    },
    "border": {
        "input_size": (3, 224, 224), "interpolation": "bilinear", "crop_pct": 0.95,
        "crop_mode": "border",
    },
}  # fmt: skip


def config(name):
    return BASE | CONFIGS[name]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("path", PHOTOS, ids=lambda p: p.stem)
def test_decoder_is_timms_evaluation_transform(name, path):
    transform = timm.data.create_transform(**config(name))
    expected = transform(Image.open(path).convert("RGB"))
    pixels = Decoder(config(name))(path)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    got = normalize_reference(torch.from_numpy(pixels)[None], BASE["mean"], BASE["std"])[0]
    assert_close(got, expected)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = {"CMYK": ".tif", "YCbCr": ".tif"}.get(mode, ".png")
    path = tmp_path / f"image{suffix}"
    photo = Image.open(PHOTOS[1]).resize((300, 260))
    # Pillow 12 cannot read the YCbCr that it writes without compression
    photo.convert(mode).save(path, **({"compression": "tiff_lzw"} if suffix == ".tif" else {}))
    expected = timm.data.create_transform(**config("DeiT"))(Image.open(path).convert("RGB"))
    pixels = torch.from_numpy(Decoder(config("DeiT"))(path))[None]
    got = normalize_reference(pixels, BASE["mean"], BASE["std"])[0]
    assert_close(got, expected)


SIXTEEN = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "PGM", "12 bits"])
def test_grey_of_16_bits_keeps_its_upper_8(kind, tmp_path):
    """Pillow's own conversion makes all above 255 white."""
    path = tmp_path / "image"
    if kind == "PGM":
        path.write_bytes(b"P5 16 16 65535\n" + SIXTEEN.astype(">u2").tobytes())
    elif kind == "12 bits":
        path.write_bytes(b"P5 16 16 4095\n" + (SIXTEEN >> 4).astype(">u2").tobytes())
    elif kind == "big-endian TIFF":
        Image.frombytes("I;16B", (16, 16), SIXTEEN.astype(">u2").tobytes()).save(path, "TIFF")
    else:
        Image.fromarray(SIXTEEN).save(path, kind)
    with images.opened(path) as image:
        np.testing.assert_array_equal(np.asarray(images.convert(image, "L")), SIXTEEN >> 8)
    grey = {"input_size": (3, 16, 16), "interpolation": "bicubic", "crop_pct": 1.0}
    pixels = Decoder(BASE | grey)(path)
    np.testing.assert_array_equal(pixels, np.repeat((SIXTEEN >> 8)[..., None], 3, 2))


@pytest.mark.parametrize("dtype, mode", [(np.float32, "F"), (np.int32, "I")])
def test_pixels_without_a_known_white_are_refused(dtype, mode, tmp_path):
    Image.fromarray(SIXTEEN.astype(dtype)).save(tmp_path / "image.tif")
    with pytest.raises(Unreadable, match=f"pixels of mode {mode}, expected 8 or 16 bits"):
        Decoder(config("DeiT"))(tmp_path / "image.tif")


def test_one_channel():
    gray = config("DeiT") | {"input_size": (1, 64, 64), "mean": (0.5,), "std": (0.5,)}
    expected = timm.data.create_transform(**gray)(Image.open(PHOTOS[0]).convert("L"))
    pixels = Decoder(gray)(PHOTOS[0])
    assert pixels.shape == (64, 64, 1)
    assert_close((torch.from_numpy(pixels[..., 0]) / 255 - 0.5) / 0.5, expected[0])
    with pytest.raises(ValueError, match="2 channels"):
        Decoder(gray | {"input_size": (2, 64, 64)})


def broken_files(folder):
    """{path: why it can't be read}"""
    photo = PHOTOS[0].read_bytes()
    narrow = folder / "narrow.png"
    Image.new("RGB", (1, 5000)).save(narrow)
    made = {narrow: "1 x 5000 pixels are too narrow to be resized"}
    for name, content, why in (
        ("text.jpg", b"hello", "cannot identify image file"),
        ("empty.jpg", b"", "cannot identify image file"),
        ("truncated.jpg", photo[: len(photo) // 2], "image file is truncated"),
    ):
        (folder / name).write_bytes(content)
        made[folder / name] = why
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    return made | {
        folder / "folder.jpg": "is a folder", folder / "none.jpg": "no such file",
        folder / "pipe.jpg": "is no regular file", folder / "itself.jpg": "no such file",
    }  # fmt: skip


def test_reasons(tmp_path):
    decoder = Decoder(config("DeiT"))
    for path, why in broken_files(tmp_path).items():
        with pytest.raises(Unreadable) as error:
            decoder(str(path))
        assert str(error.value).startswith(why), path
        assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


def test_without_pillows_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert Decoder(config("DeiT"))(PHOTOS[0]).shape == (224, 224, 3)


def test_bombs_are_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Unreadable, match="exceeds limit"):
        Decoder(config("DeiT"))(PHOTOS[0])


def test_a_mistake_of_ours_is_no_unreadable_file(monkeypatch):
    decoder = Decoder(config("DeiT"))
    decoder.transform = lambda image: image.no_such_method()
    with pytest.raises(AttributeError):
        list(decode([str(PHOTOS[0])], decoder, 0))


@pytest.fixture
def tree(tmp_path):
    for name in ("b.jpg", "a.PNG", "notes.txt.bak", "sub/deep/c.webp", "sub/d.jpeg", "z/e.gif"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "tree/sub/loop").symlink_to("..")
    (tmp_path / "tree/linked.jpg").symlink_to("b.jpg")
    (tmp_path / "tree/dangling").symlink_to("nowhere")
    (tmp_path / "tree/itself.jpg").symlink_to("itself.jpg")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/f.jpg").touch()
    (tmp_path / "tree/elsewhere").symlink_to("../outside")
    return tmp_path / "tree"


def test_folders_are_searched(tree):
    found = [os.path.relpath(path, tree) for path in find([tree])]
    assert found == [
        "a.PNG", "b.jpg", "itself.jpg", "linked.jpg", "elsewhere/f.jpg", "sub/d.jpeg",
        "sub/deep/c.webp", "z/e.gif",
    ]  # fmt: skip


def test_patterns_lists_and_single_images(tree, monkeypatch):
    monkeypatch.chdir(tree)
    Path("odd name").write_bytes(b"")
    Path("list.txt").write_text("\ufeffb.jpg\n\nmissing.jpg\nsub/deep/c.webp")
    assert list(find(["**/*.jpeg", "list.txt", "odd name", "gone.png"])) == [
        "sub/d.jpeg", "b.jpg", "missing.jpg", "sub/deep/c.webp", "odd name", "gone.png",
    ]  # fmt: skip
    assert list(find(["*.tiff", "z/*"])) == ["z/e.gif"]
    with pytest.raises(FileNotFoundError, match="no image, folder, pattern or list nowhere"):
        list(find(["nowhere"]))


def test_large_folders_are_sorted_in_pieces(tree, monkeypatch):
    expected = set(find([tree]))
    monkeypatch.setattr(images, "SORTED", 2)
    found = list(find([tree]))
    assert len(found) == len(expected) and set(found) == expected


def test_a_folder_that_cannot_be_read(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="deep"):
        list(find([tree]))


@pytest.mark.parametrize("workers", [0, 2])
def test_decode_keeps_the_order(tmp_path, workers):
    broken = list(map(str, broken_files(tmp_path)))
    paths = [str(PHOTOS[0]), broken[0], *map(str, PHOTOS[1:]), *broken[1:], str(PHOTOS[2])]
    decoder = Decoder(config("DeiT"))
    seen, reasons, pixels = [], [], []
    for part in decode(paths, decoder, workers, chunk=3):
        assert len(part[0]) <= 3
        seen += part[0]
        reasons += part[1]
        pixels += list(part[2])
    assert seen == paths
    assert [reason is None for reason in reasons] == [path not in broken for path in paths]
    readable = [path for path in paths if path not in broken]
    for path, got in zip(readable, pixels, strict=True):
        np.testing.assert_array_equal(got, decoder(path))


@pytest.mark.parametrize("workers", [0, 2])
def test_decode_runs_ahead_by_a_few_chunks_only(workers):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield "nowhere.jpg"

    chunks = decode(endless(), Decoder(config("DeiT")), workers, chunk=5)
    for _ in range(3):
        next(chunks)
    assert taken <= 5 * (3 + 2 * workers + 1)
