"""Whether a soft-label store fits what is asked of it, and what differs where it does not."""

from dataclasses import replace
from pathlib import Path

from ..datasets import ImageSet
from ..recipe import VIEW_SETTINGS, Recipe
from ..student import Settings
from .manifest import Manifest
from .reader import Store
from .views import Views, describe_transform, fingerprint, versions


def recipe_settings(store: Store) -> dict:
    """Settings for a recipe that trains from a store: what decides its views, each of them once."""
    return {name: store.manifest.transform[name] for name in VIEW_SETTINGS} | {"repeated_aug": 1}


def adopt_settings(store: Store, settings: Settings) -> Settings:
    """Take the views' size and normalisation from a store.

    Raises:
        ValueError: The settings say otherwise, or say what a store decides.
    """
    transform = store.manifest.transform
    found = {"img_size": transform["input_size"][1]}
    found |= {name: tuple(transform[name]) for name in ("mean", "std")}
    for name, value in found.items():
        given = getattr(settings, name)
        if given is not None and given != value:
            raise ValueError(f"{name}: {given}, but the images of {store.folder} have {value}")
    if settings.count is not None:
        raise ValueError(f"count: {settings.count}, but the images are those of {store.folder}")
    return replace(settings, **found)


def views_of(
    store: Store, images: ImageSet, recipe: Recipe, config: dict
) -> tuple[Views, list[str]]:
    """Make the very views that the teacher saw.

    Args:
        store: That the teacher filled.
        images: Its data set.
        recipe: With the settings of `recipe_settings`.
        config: timm's data configuration, with the store's size and normalisation.

    Returns:
        The views, and notes on versions that are not those they were made with.

    Raises:
        ValueError: It is another recipe, size or data set, or the same comes out with other pixels
            or not at all.
    """
    there, views = store.manifest, Views(images, recipe, config, tries=1)
    if recipe.repeated_aug != 1:
        raise ValueError(f"repeated_aug: {recipe.repeated_aug}, expected 1: an epoch of "
                         f"{store.folder} has each image once")  # fmt: skip
    for what, was, now in (("transform", there.transform, describe_transform(recipe, config)),
                           ("data", there.images, fingerprint(images))):  # fmt: skip
        differences = [f"{k} {was[k]!r}, now {now[k]!r}" for k in now if was[k] != now[k]]
        if differences:
            raise ValueError(
                f"store: {store.folder} is of another {what}: {'; '.join(differences)}"
            )
    if views.sample(there.seed, there.sample["images"]) != there.sample:
        raise pixel_mismatch(store.folder, there)
    return views, version_notes(there)


def require_same_store(out: Path, there: Manifest, now: Manifest) -> None:
    """Refuse to go on with a store of something else.

    Raises:
        ValueError: The keys differ; the message says in what.
    """
    if there.key == now.key:
        return
    differences = []
    for name in ("teacher", "images", "transform"):
        was, is_now = getattr(there, name), getattr(now, name)
        differences += [
            f"{name} {key} {was.get(key)!r}, now {value!r}"
            for key, value in is_now.items()
            if was.get(key) != value
        ]
    for name in ("k", "records", "batch", "seed", "world", "amp"):
        was, is_now = getattr(there, name), getattr(now, name)
        if was != is_now:
            differences.append(f"{name} {was!r}, now {is_now!r}")
    if not differences:
        raise pixel_mismatch(out, there)
    raise ValueError(f"out: {out} is another store: {'; '.join(differences)}")


def pixel_mismatch(out: Path, there: Manifest) -> ValueError:
    """The error for views that come out differently though all settings are the same."""
    why = "; ".join(f"{name} {was}, now {now}" for name, was, now in _changed_versions(there))
    why = why or "versions are the same; other images of the same names, or another CPU?"
    return ValueError(
        f"store: {out}: views made here are not, bit for bit, those its teacher saw ({why})"
    )


def version_notes(manifest: Manifest) -> list[str]:
    """Notes on versions that are not those of a store, where the views are its own."""
    return [
        f"store: written with {name} {was}, now {now}; sample views are the same"
        for name, was, now in _changed_versions(manifest)
    ]


def _changed_versions(manifest: Manifest) -> list[tuple[str, str | None, str]]:
    """(package, its version when the store was begun, now) where these differ."""
    now, was = versions(), manifest.notes["versions"]
    return [(name, was.get(name), now[name]) for name in now if was.get(name) != now[name]]
