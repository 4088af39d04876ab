"""Parts of a set of images."""

import pickle

import numpy as np
import pytest
from small_datasets import (
    COLOUR,
    png,
    tar,
)

from deit_fast.distill.datasets import fraction, open_images

# What a seed chooses must never change: runs resume with it.
FROZEN = [1, 2, 5, 8, 10, 11, 13, 14, 16, 20, 22, 23, 25, 26, 27]


def test_fraction_is_balanced(tmp_path):
    path = tmp_path / "a.tar"
    sizes = {"a": 10, "b": 2, "c": 10, "d": 7}
    tar(path, {f"{c}/{i}.png": png(COLOUR[i]) for c, n in sizes.items() for i in range(n)})
    images = open_images(path)
    part = fraction(images, 15, seed=0)
    counts = np.bincount(part.labels, minlength=4)
    assert counts[1] == 2 and sorted(counts[[0, 2, 3]]) == [4, 4, 5] and len(part) == 15
    names = [part.name(i) for i in range(15)]
    assert len(set(names)) == 15 and part.classes == images.classes and part.mode == images.mode
    whole = {images.name(i): i for i in range(len(images))}
    places = [whole[name] for name in names]
    assert places == sorted(places)
    for i, place in enumerate(places):
        assert part.labels[i] == images.labels[place]
        np.testing.assert_array_equal(np.asarray(part.image(i)), np.asarray(images.image(place)))

    def chosen(count, seed):
        some = pickle.loads(pickle.dumps(fraction(images, count, seed)))
        return {some.name(i) for i in range(count)}

    assert chosen(15, 0) == set(names) != chosen(15, 1)
    assert chosen(6, 0) < chosen(15, 0) < chosen(28, 0)
    assert len(chosen(29, 0)) == 29
    assert any("a/9" in n or "c/9" in n for seed in range(9) for n in chosen(4, seed))
    assert places == FROZEN
    for count in (0, 30):
        with pytest.raises(ValueError, match=f"count: {count}, expected 1 to 29"):
            fraction(images, count, 0)
