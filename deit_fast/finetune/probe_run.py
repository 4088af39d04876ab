"""A run that fits new heads to frozen features, in minutes on a CPU."""

import time
from pathlib import Path

from deit_fast.distill import evaluate, run_folder
from deit_fast.distill.recipe import load as load_recipe
from deit_fast.distill.run import Report
from deit_fast.distill.student import AMP, Settings, build_student, model_arguments
from deit_fast.pretrained import save_pretrained

from . import probe

FEATURES, BATCH = "features", 64


def run_probe(
    settings: Settings, out: Path, *, workers: int, device: str,
    crop_pct: float, report: Report = lambda event: None,
) -> dict:  # fmt: skip
    """Fit a model's heads to its features of the training images, and evaluate it.

    The same call again goes on with the features that `out` holds.

    Args:
        settings: What is trained on what. A teacher is no use here.
        out: Gets features/, model/, settings.json and result.json.
        workers: Processes that decode.
        device: Where features are computed.
        crop_pct: Of the resized side that is seen.
        report: Gets {"event": "note", "text": ...}.

    Returns:
        The content of result.json.

    Raises:
        ValueError: Settings, images and model do not fit.
        FileNotFoundError: Data or weights are missing.
    """
    if settings.distill != "none":
        raise ValueError(
            f"teacher: {settings.teacher}, with freeze 'backbone', expected none: heads are fitted "
            "to the labels"
        )
    if (out / run_folder.CHECKPOINT).exists():
        raise ValueError(f"out: {out} is of a run that trains, expected a folder for this one")
    with run_folder.locked(out):
        images, validation, model = build_student(settings, load_recipe("deit", crop_pct=crop_pct))
        probe.heads_of(model)
        arguments = model_arguments(settings, model)
        model.to(device).eval()
        began = time.perf_counter()
        features = probe.extract(
            model, images, out / FEATURES, batch_size=BATCH, workers=workers,
            dtype=AMP[settings.amp],
        )  # fmt: skip
        seconds = time.perf_counter() - began
        report({"event": "note", "text": f"features of {len(images)} images: {seconds:.0f} s"})
        *heads, decay = probe.fit(features, len(images.classes), settings.seed)
        probe.put(model, *heads)
        found = evaluate.predictions(
            model, validation, batch_size=BATCH, workers=workers, dtype=AMP[settings.amp]
        )
        unreadable = [*features.skipped, *found.skipped]
        result = found.accuracy().percent() | {
            "images": len(found.labels), "weight_decay": decay, "seconds": seconds,
            "images_per_s": len(images) / seconds, "unreadable": len(unreadable),
        }  # fmt: skip
        if unreadable:
            named = [{"image": name, "reason": why} for name, why in unreadable]
            run_folder.write_csv(out / run_folder.UNREADABLE, named)
        save_pretrained(model, out / run_folder.MODEL, **arguments)
        run_folder.write_json(out / run_folder.RESULT, result)
    return result
