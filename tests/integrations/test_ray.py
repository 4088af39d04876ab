"""The job on a local Ray cluster gives the predictions of one machine."""

import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import selection
import torch
from checking import assert_close
from modelling import tiny_pair
from PIL import Image

import deit_fast
from deit_fast import batch_inference, images, predictions

SCRIPT = Path(selection.__file__).with_name("ray_classify.py")  # needs ray
PHOTOS = sorted((Path(deit_fast.__file__).parent / "data").glob("*.jpg"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hundred different images, and some files that are none."""
    folder, draw = tmp_path_factory.mktemp("photos"), random.Random(0)
    photos = [Image.open(p).resize((160, 120)) for p in PHOTOS]
    for i in range(120):
        x, y = draw.randrange(80), draw.randrange(50)
        photos[i % 4].crop((x, y, x + 70, y + 66)).save(folder / f"{i}.png")
    for i in range(0, 120, 24):
        (folder / f"{i}.png").write_bytes(b"none")
    return folder


def on_the_cluster(folder, tmp_path):
    empty, out = tmp_path / "empty", tmp_path / "found"
    empty.mkdir()
    path = os.pathsep.join((str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")))
    # Ray makes its workers nice, and then other tests keep them waiting
    env = os.environ | {"PYTHONPATH": path, "RAY_worker_niceness": "0"}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, empty, out], env=env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return pickle.loads(out.read_bytes())


def on_one_machine(folder):
    model = tiny_pair()[1]
    predictor = batch_inference.Predictor(model, 32, topk=2, embed=True)
    found = {}
    for batch in batch_inference.predict(predictor, images.find([folder]), 0):
        rows = list(predictions.entries(batch, batch_inference.label_names(model)))
        table = predictions.arrow_table(rows, batch.columns.get("embedding")).to_pylist()
        found |= {row["image"]: row for row in table}
    return found


@pytest.mark.slow
def test_equals_one_machine(folder, tmp_path):
    selection.extra("ray", "ray", "pyarrow")
    job = on_the_cluster(folder, tmp_path)
    assert job["model"] == ("torch", False)
    assert "inputs: no images found" in job["empty"]
    found, expected = job["rows"], on_one_machine(folder)
    assert len(found) == len(expected) == 120
    assert sum(row["error"] is not None for row in found) == 5
    for row in found:
        other = expected.pop(row["image"])
        assert row["error"] == other["error"]
        for name in ("classes", "labels"):
            assert row.get(name) is None or list(row[name]) == other[name]
        for name in ("scores", "embedding"):
            if other.get(name) is None:
                assert row.get(name) is None
            else:
                assert_close(torch.tensor(row[name]), torch.tensor(other[name]), name)
        assert row["error"] or set(row) == set(other)
    assert not expected
