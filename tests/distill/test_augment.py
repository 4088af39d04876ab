"""What a model sees in training: the same for the same seed, on whatever rank or worker."""

import numpy as np
import pytest
import torch
from checking import seeded
from PIL import Image
from small_runs import image_folders
from timm.data import auto_augment
from torchvision import transforms

from deit_fast.distill import augment
from deit_fast.distill.augment import Augmented, Batches, loader, transform_of
from deit_fast.distill.datasets import open_images
from deit_fast.distill.recipe import load

CONFIG = {"input_size": (3, 16, 16), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_images(image_folders(tmp_path_factory.mktemp("images"), each=10), "train")


def batches_of(images, workers, epochs=(0, 1), start=0, batch=8, repeats=1, **kwargs):
    batches = Batches(len(images), batch, repeats, seed=3, **kwargs)
    source = loader(Augmented(images, transform_of(load("deit"), CONFIG)), batches, workers)
    found = []
    for epoch in epochs:
        batches.begin(epoch, start)
        found += [(x.clone(), y.clone()) for x, y, unreadable in source]
    return found


def equal(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_workers_make_the_same_images(images):
    alone = batches_of(images, 0)
    assert len(alone) == 6 and equal(alone, batches_of(images, 2))
    assert not equal(alone[:3], alone[3:])  # the next epoch has others, in another order


def test_an_epoch_goes_on_where_it_stopped(images):
    assert equal(
        batches_of(images, 0, epochs=(1,), start=2), batches_of(images, 0, epochs=(1,))[2:]
    )
    assert batches_of(images, 0, epochs=(1,), start=3) == []


def test_nothing_else_draws(images):
    """Whatever others do with the global generators."""
    alone = batches_of(images, 0, epochs=(0,))
    np.random.seed(seeded(7))
    torch.manual_seed(seeded(7))
    assert equal(alone, batches_of(images, 0, epochs=(0,)))


def test_ranks_share_the_images(images):
    """Two ranks see, in each update, the images that one would."""
    alone = batches_of(images, 0, epochs=(0,), batch=8)
    first, second = (
        batches_of(images, 0, epochs=(0,), batch=4, rank=rank, world_size=2) for rank in (0, 1)
    )
    for (x, y), (a, b), (c, d) in zip(alone, first, second, strict=True):
        assert torch.equal(x, torch.stack((a, c), 1).flatten(0, 1))
        assert torch.equal(y, torch.stack((b, d), 1).flatten(0, 1))


@pytest.mark.parametrize("world_size", [1, 2])
def test_repeated_augmentation(world_size):
    """An image comes three times, each with another seed; an epoch is as long as without."""
    count = 600
    per_rank = [
        Batches(count, 8, 3, seed=0, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    drawn = [[pair for batch in batches for pair in batch] for batches in per_rank]
    joint = [pair for pairs in zip(*drawn, strict=True) for pair in pairs]
    assert len(joint) == 512  # timm, as the official code, takes whole 256s
    indices, seeds = zip(*joint, strict=True)
    assert all(len(set(indices[i : i + 3])) == 1 for i in range(0, 510, 3))
    assert len(set(indices)) == 171 and len(set(seeds)) == len(seeds)


def test_seeds_decide():
    def order(seed, epoch):
        batches = Batches(100, 10, 1, seed)
        batches.begin(epoch)
        return [pair for batch in batches for pair in batch]

    assert order(0, 0) == order(0, 0)
    assert sorted(i for i, _ in order(0, 0)) == list(range(100))
    different = {tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(different) == 9


def test_the_recipes_transform(images):
    """RandomResizedCrop, mirror, RandAugment, normalised, erased: the official order."""
    steps = transform_of(load("deit"), CONFIG).transforms
    kinds = [type(step).__name__ for step in steps]
    assert kinds == [
        "RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment",
        "MaybeToTensor", "Normalize", "RandomErasing",
    ]  # fmt: skip
    assert steps[0].scale == (0.08, 1.0) and steps[1].p == 0.5
    assert steps[-1].probability == 0.25 and steps[-1].rand_color is False
    assert steps[-1].per_pixel is True
    assert [len(steps[2].ops), steps[2].num_layers] == [15, 2]
    jitter = load("deit", auto_augment="none", erasing=0.0, hflip=0.0)
    kinds = [type(step).__name__ for step in transform_of(jitter, CONFIG).transforms]
    assert kinds[1] == "ColorJitter" and len(kinds) == 4


def test_pad_crops_keep_the_scale():
    """As the official code for small images: 4 pixels around, nothing resized."""
    recipe = load("deit", crop="pad", auto_augment="none", color_jitter=0.0, erasing=0.0, hflip=0.0)
    change = transform_of(recipe, CONFIG | {"mean": (0.0,) * 3, "std": (1.0,) * 3})
    pixels = torch.arange(1, 257, dtype=torch.uint8).view(16, 16, 1).expand(16, 16, 3)
    padded = torch.nn.functional.pad(pixels[..., 0] / 255, (4, 4, 4, 4))
    windows = padded.unfold(0, 16, 1).unfold(1, 16, 1).flatten(0, 1)
    seen = set()
    for seed in range(80):
        augment.reseed(seed)
        x = change(Image.fromarray(pixels.numpy()))[0]
        places = [i for i, window in enumerate(windows) if torch.equal(window, x)]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 40  # of 81
    assert isinstance(change.transforms[1], transforms.RandomCrop)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_policies_on_colour_and_grey(policy, mode):
    """None of a few hundred draws fails, at any strength."""
    channels = len(mode) if mode == "RGB" else 1
    config = {"input_size": (channels, 16, 16), "mean": (0.5,) * channels, "std": (0.2,) * channels}
    change = transform_of(load("deit", auto_augment=policy), config)
    image = Image.fromarray(
        np.random.default_rng(seeded(0)).integers(0, 256, (20, 24, 3), np.uint8)
    )
    for seed in range(300):
        augment.reseed(seed)
        x = change(image.convert(mode))
        assert x.shape == (channels, 16, 16) and x.isfinite().all()


def test_posterizing_to_no_bits_is_black():
    """RandAugment at its highest level; Pillow 13 refuses what earlier versions did."""
    image = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    assert np.asarray(augment._posterize(image, 0)).max() == 0
    change = transform_of(load("deit"), CONFIG).transforms[2]
    (op,) = (op for op in change.ops if "Posterize" in op.name)
    op.prob, op.magnitude, op.magnitude_std = 1.0, 10, 0
    assert np.asarray(op(image)).max() == 0
    for bits in (1, 4, 8):
        expected = np.asarray(auto_augment.posterize(image, bits))
        assert np.array_equal(np.asarray(augment._posterize(image, bits)), expected)


def test_an_unreadable_image_gives_way_to_the_next(tmp_path):
    folder = image_folders(tmp_path, classes=2, each=3)
    for name in ("class0/1.png", "class0/2.png"):
        (folder / "train" / name).write_bytes(b"no image")
    images = open_images(folder, "train")
    data = Augmented(images, transform_of(load("deit"), CONFIG))
    x, label, unreadable = data[1, 5]
    assert label == 1 and torch.equal(x, data[3, 5][0])  # the next that can be read
    assert [name for name, _ in unreadable] == [images.name(1), images.name(2)]
    assert data[3, 5][2] == []
