"""`deit-fast classify` on many machines: the decoder and the predictor as stages of Ray Data.

    ray.init("auto")
    rows = deit_fast.integrations.ray.classify(["/data/photos"], model, batch_size=256)
    rows.write_parquet("s3://bucket/classes")

Needs `pip install 'deit_fast[ray]'` on every machine. Images are decoded by up to as many actors as
the cluster has CPU cores, less one, on any machine, and predicted by one engine per GPU.
"""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

try:
    import ray
    import ray.data
except ImportError as error:
    raise ImportError("deit_fast.integrations.ray: pip install 'deit_fast[ray]'") from error

from deit_fast import batch_inference, images, predictions
from deit_fast.engine import data_config


class Decode:
    """The stage that decodes.

    Args:
        config: timm's data configuration (`deit_fast.engine.data_config(model)`).
    """

    def __init__(self, config: dict[str, Any]):
        self.decoder = images.Decoder(config)
        channels, *size = config["input_size"]
        self.blank = np.zeros((*size, channels), np.uint8)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Decode a batch.

        Args:
            batch: {"image": paths}.

        Returns:
            The same with "error", "" for readable images, and "pixels", uint8 (n, H, W, C), zeros
            for unreadable ones.
        """
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
    """The stage that predicts: one engine, on the GPU that Ray gave its actor, or on the CPU.

    Args:
        model: A Ray reference to the model.
        dtype: To compute in; None: the model's.
        **options: Of `deit_fast.batch_inference.Predictor`.
    """

    def __init__(self, model: Any, dtype: torch.dtype | None, **options: Any):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = ray.get(model).to(device, dtype)
        self.predictor = batch_inference.Predictor(model, **options)
        self.labels = None if self.predictor.embed else batch_inference.label_names(model)

    def __call__(self, batch: dict[str, np.ndarray]) -> Any:
        """Predict a batch.

        Args:
            batch: What `Decode` returned.

        Returns:
            A pyarrow.Table, as `deit-fast classify --out FILE.parquet` writes it.
        """
        reasons = [error or None for error in batch["error"].tolist()]
        found = batch_inference.Batch(batch["image"].tolist(), reasons)
        readable = np.array([reason is None for reason in reasons])
        if readable.any():
            found.columns = self.predictor(np.ascontiguousarray(batch["pixels"][readable]))
        embedding = None
        if self.predictor.embed:
            embedding = found.columns.get("embedding", np.empty((0, 0), np.float32))
        rows = list(predictions.entries(found, self.labels))
        return predictions.arrow_table(rows, embedding)


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
    """Classify images on disks that every machine can read, or compute their features.

    Args:
        inputs: Folders, patterns, lists and images as `deit-fast classify` takes them, found on
            the machine that calls; or a Dataset with the paths in column "image".
        model: In eval mode. Each engine gets a copy.
        batch_size: Images in one forward pass.
        topk: Classes per image.
        embed: Compute features instead of classes.
        dtype: To compute in; None: the model's.
        engines: How many; None: one per GPU of the cluster, or one on the CPU if it has none.

    Returns:
        A lazy Dataset with the columns image, error, classes, labels, scores, or image, error,
        embedding, in no particular order unless Ray is told to preserve it.

    Raises:
        ValueError: For inputs without images.
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
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=_decoders()),
    )  # fmt: skip
    return decoded.map_batches(
        Predict, batch_size=batch_size, fn_constructor_args=(shared, dtype),
        fn_constructor_kwargs=options, num_gpus=1 if gpus else 0,
        compute=ray.data.ActorPoolStrategy(size=engines or max(gpus, 1)),
    )  # fmt: skip


def _decoders() -> int:
    return max(int(ray.cluster_resources().get("CPU", 2)) - 1, 1)
