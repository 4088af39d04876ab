"""Classes of unequal size: how often their images come, and how much their labels weigh."""

import numpy as np
import pytest
import torch
from checking import assert_close, seed, seeded
from small_runs import image_folders, run, same
from timm.data import Mixup
from torch import nn
from torch.nn import functional as F

from deit_fast.distill import recipe
from deit_fast.distill.augment import Batches, balanced
from deit_fast.distill.datasets import open_images
from deit_fast.distill.sources import class_weights
from deit_fast.distill.teacher import Objective

LABELS = np.array([0] * 40 + [1] * 7 + [3] * 1 + [2] * 12)  # in no order, and class 3 is rare
COUNTS = np.bincount(LABELS)


def test_classes_come_equally_often():
    for number in range(20):
        drawn = balanced(LABELS, np.random.default_rng(number))
        assert len(drawn) == len(LABELS)
        assert np.bincount(LABELS[drawn], minlength=4).tolist() == [15] * 4
        often = np.bincount(drawn, minlength=len(LABELS))
        wanted = 15 / COUNTS[LABELS]
        assert (often >= np.floor(wanted)).all() and (often <= np.ceil(wanted)).all()


def test_every_image_comes_in_proportion():
    """Over many epochs: no image of a class comes more often than another."""
    rounds = 2000
    often = sum(
        np.bincount(balanced(LABELS, np.random.default_rng(number)), minlength=len(LABELS))
        for number in range(rounds)
    )
    wanted = 15 / COUNTS[LABELS]
    spread = np.sqrt((wanted % 1) * (1 - wanted % 1) * rounds)
    assert (abs(often - rounds * wanted) <= 5 * spread + 1e-9).all()


def test_classes_that_are_not_there_and_odd_numbers():
    labels = np.array([5, 2, 2, 5, 5, 9, 5])
    for number in range(50):
        drawn = np.bincount(labels[balanced(labels, np.random.default_rng(number))], minlength=10)
        assert set(drawn[[2, 5, 9]]) <= {2, 3} and drawn.sum() == 7


@pytest.mark.parametrize("repeats", [1, 3])
def test_ranks_share_a_balanced_epoch(repeats):
    """The ranks' batches are those of one rank; order and images change from epoch to epoch."""

    def items(world, epoch):
        found = []
        for rank in range(world):
            batches = Batches(60, 12 // world, repeats, 3, rank, world, balance=LABELS)
            batches.begin(epoch)
            found.append([one for batch in batches for one in batch])
        return [one for some in zip(*found, strict=True) for one in some]

    assert items(2, 1) == items(1, 1) != items(1, 2)
    counts = np.bincount(LABELS[[index for index, _ in items(1, 1)]], minlength=4)
    assert counts.min() >= (15 if repeats == 1 else 6)
    resumed = Batches(60, 12, repeats, 3, balance=LABELS)
    resumed.begin(1, 2)
    assert [one for batch in resumed for one in batch] == items(1, 1)[24:]


def test_without_balance_nothing_is_drawn_anew():
    one, two = Batches(60, 6, 1, 3), Batches(60, 6, 1, 3, balance=LABELS)
    assert sorted(index for batch in one for index, _ in batch) == list(range(60))
    assert [s for batch in one for _, s in batch] == [s for batch in two for _, s in batch]


def test_weights_have_the_mean_1():
    weights = class_weights(LABELS)
    assert_close(weights[LABELS].mean(), torch.tensor(1.0))
    assert_close(weights * torch.from_numpy(COUNTS), torch.full((4,), 15.0))
    assert class_weights(np.array([0, 0, 2])).tolist() == [0.75, 0, 1.5]


class Fixed(nn.Module):
    """A teacher that says the same of every image."""

    pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.5,) * 3}

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        return self.logits


@pytest.mark.parametrize("distill", ["none", "soft", "hard"])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_of_labels_is_weighted(distill, mixed):
    """By hand, in fp64; the teacher's term is that without weights."""
    seed(0)
    chosen = recipe.load("deit", balance="loss")
    z, d, t = torch.randn(3, 8, 5, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0])
    weights = torch.tensor([0.25, 1.5, 2.0, 8.0])  # none of the last class
    images, target, shares = torch.randn(8, 3, 8, 8), labels, F.one_hot(labels, 5).double()
    if mixed:
        torch.manual_seed(seeded(1))
        np.random.seed(seeded(1))
        options = {"label_smoothing": chosen.label_smoothing, "num_classes": 5}
        images, target = Mixup(0.8, 1.0, **options)(images, labels)
        shares = (target.double() - 0.1 / 5) / 0.9
    teacher = None if distill == "none" else Fixed(t.float())
    objective = Objective(chosen, distill, teacher, Fixed(z), weights)
    plain = Objective(chosen, distill, teacher, Fixed(z))
    z, d = (x.float().requires_grad_() for x in (z, d))

    cross_entropy = -((0.9 * shares + 0.1 / 5) * F.log_softmax(z.double(), 1)).sum(1)
    share = chosen.weight(distill)
    labelled = (1 - share) * (shares @ F.pad(weights, (0, 1)).double() * cross_entropy).mean()
    unweighted = (1 - share) * cross_entropy.mean()
    expected = labelled + plain((z, d), images, target).double() - unweighted
    got = objective((z, d), images, target)
    assert_close(got, expected.float())
    used = [z] if distill == "none" else [z, d]
    for one, other in zip(
        *(torch.autograd.grad(x, used, retain_graph=True) for x in (got, expected)), strict=True
    ):
        assert_close(one, other)
    assert abs(got - plain((z, d), images, target)) > 0.01


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Three classes of 12, 3 and 1 images to train on."""
    data = image_folders(tmp_path_factory.mktemp("uneven"), each=12)
    for c, count in ((1, 3), (2, 1)):
        for i in range(count, 12):
            (data / "train" / f"class{c}" / f"{i}.png").unlink()
    return data


@pytest.mark.parametrize("balance", ["sampler", "loss"])
def test_a_balanced_run(balance, uneven, tmp_path):
    options = {"balance": balance, "freeze": -1, "epochs": 1, "warmup_epochs": 0}
    state = run(uneven, tmp_path / "out", recipe_of=options)
    assert state["identity"]["recipe"]["balance"] == balance
    plain = run(uneven, tmp_path / "plain", recipe_of=options | {"balance": "none"})
    assert not same(state["model"], plain["model"])
    assert "balance" not in plain["identity"]["recipe"]
    scores = state["rows"][-1]["scores"]
    assert len(open_images(uneven, "validation")) == 36
    assert scores["balanced"] == pytest.approx(scores["top1"])  # of classes of one size


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["sampler", "loss"])
def test_a_store_is_not_balanced(balance, data, whole, tmp_path):
    options = {"repeated_aug": 1, "mixup_prob": 1.0, "balance": balance}
    with pytest.raises(ValueError, match=f"balance: '{balance}' with a store, expected 'none'"):
        run(data, tmp_path, store=str(whole), recipe_of=options)
