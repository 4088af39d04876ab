"""Images that show the same: equal pixels, and near-duplicates."""

import io
from pathlib import Path

import numpy as np
import pytest
from checking import seeded
from PIL import Image, ImageEnhance

import deit_fast
from deit_fast.distill.datasets import open_images, similar

PHOTOS = [
    Image.open(path).convert("RGB")
    for path in sorted((Path(deit_fast.__file__).parent / "data").glob("*.jpg"))
]


def folder(path, images):
    (path / "a").mkdir(parents=True)
    for i, image in enumerate(images):
        image.save(path / "a" / f"{i:03}.png", compress_level=0)
    return open_images(path)


def saved_as_jpeg(photo):
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


def cropped(photo):
    w, h = photo.size
    return photo.crop((w // 100, h // 100, w - w // 100, h - h // 100))


COPIES = {
    "another quality": saved_as_jpeg,
    "half as large": lambda photo: photo.resize((photo.width // 2, photo.height // 2)),
    "another shape": lambda photo: photo.resize((96, 120)),
    "brighter": lambda photo: ImageEnhance.Brightness(photo).enhance(1.2),
    "more contrast": lambda photo: ImageEnhance.Contrast(photo).enhance(1.3),
    "grey": lambda photo: photo.convert("L"),
    "without its border": cropped,
}


def test_copies_are_found_and_others_not(tmp_path):
    others = [photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for photo in PHOTOS]
    copies = [copy(photo) for copy in COPIES.values() for photo in PHOTOS]
    found = similar.groups(folder(tmp_path, [*PHOTOS, *others, *copies]))
    n = len(PHOTOS)
    assert found.dtype == np.int64
    assert found[: 2 * n].tolist() == list(range(2 * n))
    for i, name in enumerate(COPIES, 2):
        assert found[i * n : (i + 1) * n].tolist() == list(range(n)), name


def test_tiles_of_photographs_are_no_duplicates(tmp_path):
    """Alike in colour and texture: one in a hundred at most is taken for another's copy."""
    side = 96
    tiles = [
        photo.crop((x, y, x + side, y + side))
        for photo in PHOTOS
        for y in range(0, photo.height - side + 1, side)
        for x in range(0, photo.width - side + 1, side)
    ]
    found = similar.groups(folder(tmp_path, tiles))
    assert len(tiles) > 80 and len(np.unique(found)) >= 0.99 * len(tiles)


def test_small_and_flat_images_are_compared_by_their_pixels(tmp_path):
    small = PHOTOS[0].resize((63, 70))
    flat = Image.new("RGB", (100, 100), (90, 90, 90))
    noisy = np.random.default_rng(seeded(0)).integers(89, 92, (100, 100), dtype=np.uint8)
    images = [small, small.copy(), ImageEnhance.Brightness(small).enhance(1.1)]
    images += [flat, flat.convert("L"), Image.fromarray(noisy), Image.fromarray(noisy[::-1])]
    found = similar.groups(folder(tmp_path, images))
    assert found.tolist() == [0, 0, 2, 3, 3, 5, 6]
    steps = np.arange(1024, dtype=np.uint8) % 4
    for height, expected in ((1, [0, 1]), (9, [0, 0])):  # flat, and not
        pairs = enumerate((height * steps, height * steps + 100))
        made = [similar.Fingerprint(bytes([i]), 5, pixels, False) for i, pixels in pairs]
        assert similar.group(made).tolist() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_alone(workers, tmp_path):
    images = folder(tmp_path, [PHOTOS[0].resize((80, 80))] * 40)
    for i in (3, 20):
        Path(images.name(i)).write_bytes(b"no image")
    done = []
    found = similar.groups(images, workers, done.append)
    assert [i for i, first in enumerate(found) if first] == [3, 20] and done == [16, 32, 40]


def test_every_pair_within_the_distance_is_found():
    """Against all pairs, compared one by one."""
    draw = np.random.default_rng(seeded(1))
    hashes = draw.integers(0, 2**63, 40).astype(np.uint64)
    pairs = []
    for i, one in enumerate(hashes):
        bits = draw.permutation(64)[: 4 + i % 8]
        pairs.append(one ^ np.bitwise_or.reduce(np.uint64(1) << bits.astype(np.uint64)))
    pixels = np.tile(draw.integers(0, 256, 1024, dtype=np.uint8), (80, 1))  # all correlated
    found = similar._Near(np.array([*hashes, *pairs]), pixels).labels()
    assert found[:40].tolist() == list(range(40))
    for i in range(40):
        assert (found[40 + i] == i) == (4 + i % 8 <= similar.DISTANCE), i


@pytest.mark.parametrize("band", range(4))
def test_one_band_with_one_bit_is_enough(band):
    """Whichever bit it is; the other bands differ in two."""
    draw = np.random.default_rng(seeded(4))
    others = sum(3 << 16 * other for other in range(4) if other != band)
    hashes = draw.integers(0, 2**63, 16).astype(np.uint64)
    copies = [h ^ np.uint64(others | 1 << 16 * band + bit) for bit, h in enumerate(hashes)]
    pixels = np.tile(draw.integers(0, 256, 1024, dtype=np.uint8), (32, 1))
    found = similar._Near(np.array([*hashes, *copies]), pixels).labels()
    assert found.tolist() == 2 * list(range(16))


def test_chains_are_one_group():
    draw = np.random.default_rng(seeded(2))
    pixels = np.tile(draw.integers(0, 256, 1024, dtype=np.uint8), (30, 1))
    order = draw.permutation(30)
    hashes = np.zeros(30, np.uint64)
    for place, i in enumerate(order):  # each differs from the next in two bits
        hashes[i] = (1 << 2 * place) - 1
    assert not similar._Near(hashes, pixels).labels().any()


def test_what_has_other_pixels_is_no_duplicate():
    """Though the hash is the same."""
    pixels = np.random.default_rng(seeded(3)).integers(0, 256, (6, 1024), dtype=np.uint8)
    pixels[4] = pixels[1] // 2
    found = similar._Near(np.zeros(6, np.uint64), pixels).labels()
    assert found.tolist() == [0, 1, 2, 3, 1, 5]
