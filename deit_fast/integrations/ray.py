"""`deit-fast classify` on many machines: the same decoder and predictor as stages of Ray Data.

    ray.init("auto")
    rows = deit_fast.integrations.ray.classify(["/data/photos"], model, batch_size=256)
    rows.write_parquet("s3://bucket/classes")

Needs `pip install 'deit_fast[ray]'` on every machine. Images are decoded by as many tasks as there
are processors, wherever these are, and predicted by one engine a GPU.
"""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

try:
    import ray
    import ray.data
except ImportError as error:
    raise ImportError("deit_fast.integrations.ray: pip install 'deit_fast[ray]'") from error

from deit_fast import bulk, images, outputs
from deit_fast.engine import data_config


class Decode:
    """{"image": paths} -> the same with "error" ("" where readable) and "pixels", uint8
    (n, H, W, C), zeros where not."""

    def __init__(self, config: dict):
        self.decoder = images.Decoder(config)
        channels, *size = config["input_size"]
        self.blank = np.zeros((*size, channels), np.uint8)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        errors, pixels = [], []
        for path in batch["image"]:
            error, decoded = "", self.blank
            try:
                decoded = self.decoder(path)
            except images.Unreadable as why:
                error = str(why)
            errors.append(error)
            pixels.append(decoded)
        return {"image": batch["image"], "error": np.array(errors), "pixels": np.stack(pixels)}


class Predict:
    """What `Decode` made -> a pyarrow.Table as `deit-fast classify --out FILE.parquet` writes it.
    One instance is one engine, on the GPU that Ray gave its actor, or on the CPU."""

    def __init__(self, model, dtype: torch.dtype | None, **options):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = ray.get(model).to(device, dtype)
        self.predictor = bulk.Predictor(model, **options)
        self.labels = None if self.predictor.embed else bulk.label_names(model)

    def __call__(self, batch: dict[str, np.ndarray]):
        reasons = [error or None for error in batch["error"].tolist()]
        found = bulk.Batch(batch["image"].tolist(), reasons)
        readable = np.array([reason is None for reason in reasons])
        if readable.any():
            found.columns = self.predictor(np.ascontiguousarray(batch["pixels"][readable]))
        embedding = None
        if self.predictor.embed:
            embedding = found.columns.get("embedding", np.empty((0, 0), np.float32))
        return outputs.table(list(outputs.entries(found, self.labels)), embedding)


def classify(
    inputs: "Iterable[str] | ray.data.Dataset",
    model: nn.Module,
    *,
    batch_size: int = 256,
    topk: int = 5,
    embed: bool = False,
    dtype: torch.dtype | None = None,
    engines: int | None = None,
) -> "ray.data.Dataset":
    """Classes, or with `embed` features, of images on disks that every machine sees.

    inputs: folders, patterns, lists and images as `deit-fast classify` takes them, found on the
    machine that calls; or a Dataset with the paths in column "image". model: in eval mode; a copy
    goes to each engine, in `dtype` (None: the model's). engines: one a GPU of the cluster; one on
    the CPU where it has none.

    Returns a lazy Dataset with the columns image, error, classes, labels, scores, or image, error,
    embedding, in no particular order unless Ray is told to preserve it. Raises ValueError for
    inputs without images.
    """
    if not isinstance(inputs, ray.data.Dataset):
        rows = [{"image": path} for path in images.find(inputs)]
        if not rows:
            raise ValueError("inputs: no images found")
        inputs = ray.data.from_items(rows)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    options = {"batch_size": batch_size, "topk": topk, "embed": embed}
    shared = ray.put(copy.deepcopy(model).cpu())
    decoded = inputs.map_batches(
        Decode, batch_size=images.CHUNK, fn_constructor_args=(data_config(model),),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=_processors()),
    )  # fmt: skip
    return decoded.map_batches(
        Predict, batch_size=batch_size, fn_constructor_args=(shared, dtype),
        fn_constructor_kwargs=options, num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=engines or max(gpus, 1)),
    )  # fmt: skip


def _processors():
    return max(int(ray.cluster_resources().get("CPU", 2)) - 1, 1)
