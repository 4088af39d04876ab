"""The recipe that is chosen from the number of images."""

import pytest

from deit_fast.finetune.plan import Facts, as_rows, choose


def facts(images, classes=4, img_size=224, width=384, counts=None):
    return Facts(images, counts or (images // classes,) * classes, img_size, width)


@pytest.mark.parametrize(
    ("images", "epochs", "batch", "lr"),
    [
        (2, 60, 2, 4.4e-5), (36, 60, 8, 8.8e-5), (500, 45, 32, 1.8e-4), (1000, 32, 64, 2.5e-4),
        (30_000, 6, 64, 2.5e-4), (1_000_000, 5, 64, 2.5e-4),
    ],
)  # fmt: skip
def test_more_images_have_fewer_epochs_of_larger_batches(images, epochs, batch, lr):
    recipe = choose(facts(images)).recipe
    assert (recipe.epochs, recipe.batch, recipe.lr) == (epochs, batch, lr)
    assert recipe.peak_lr == lr and recipe.min_lr == pytest.approx(lr / 100)
    assert recipe.batch <= images


@pytest.mark.parametrize("images", [999, 1000, 20_000])
def test_more_images_have_more_augmentation(images):
    recipe = choose(facts(images)).recipe
    assert (recipe.auto_augment != "none") == (recipe.erasing > 0) == (images >= 1000)
    assert recipe.mixes == (images >= 20_000)
    small = choose(facts(images, img_size=28)).recipe
    assert not small.mixes and small.auto_augment == "none" and small.scale == 0.8


def test_wider_models_learn_more_slowly():
    assert choose(facts(1000, width=768)).recipe.lr == pytest.approx(1.25e-4, rel=0.05)
    assert choose(facts(1000, width=192)).recipe.lr == pytest.approx(5e-4)


def test_other_settings_follow_what_is_given():
    """Two epochs and a small learning rate: what failed with a recipe for long runs."""
    given = {"epochs": 2, "batch": 8, "lr": 1e-6}
    plan = choose(facts(36), given)
    assert plan.recipe.warmup_epochs == 0.2 and plan.recipe.min_lr == 1e-8
    assert {c.setting: c.why for c in plan.choices}["epochs"] == "as given"
    scaled = choose(facts(36), {"lr_batch": 512, "lr": 5e-4, "batch": 8}).recipe
    assert scaled.peak_lr == 5e-4 / 64 and scaled.min_lr == pytest.approx(scaled.peak_lr / 100)


def test_what_makes_no_sense_is_an_error():
    with pytest.raises(ValueError, match="data: 1 images to train on, expected 2 or more"):
        choose(facts(1))
    with pytest.raises(ValueError, match="warmup_epochs: 9, expected at most the 3 epochs"):
        choose(facts(100), {"epochs": 3, "warmup_epochs": 9})


def test_every_choice_has_a_reason_and_is_in_the_recipe():
    plan = choose(facts(5000))
    for choice in plan.choices:
        assert choice.why and getattr(plan.recipe, choice.setting) == choice.value
    assert ("batch", "64", "about a tenth of the images, from 8 to 64") in as_rows(plan)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((50, 50), []), ((1000, 20), ["classes have 20 to 1,000 images"]),
        ((20, 3), ["a class has 3 images"]),
    ],
)  # fmt: skip
def test_advice(counts, said):
    advice = choose(facts(sum(counts), counts=counts)).advice
    assert len(advice) == len(said)
    assert all(text in one for text, one in zip(said, advice, strict=True))
