"""The job on a local Ray cluster answers what one machine answers."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from modelling import tiny_pair
from PIL import Image

import deit_fast
from deit_fast import bulk, images, outputs

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")
PHOTOS = sorted((Path(deit_fast.__file__).parent / "data").glob("*.jpg"))


@pytest.fixture(scope="module")
def cluster():
    # workers import what the tests import
    path = os.pathsep.join((str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    environment = {"env_vars": {"PYTHONPATH": path}}
    ray.init(
        num_cpus=4, num_gpus=0, include_dashboard=False, log_to_driver=False,
        runtime_env=environment,
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few hundred different images, and some files that are none."""
    folder, draw = tmp_path_factory.mktemp("photos"), random.Random(0)
    photos = [Image.open(p).resize((160, 120)) for p in PHOTOS]
    for i in range(300):
        x, y = draw.randrange(80), draw.randrange(50)
        photos[i % 4].crop((x, y, x + 70, y + 66)).save(folder / f"{i}.png")
    for i in range(0, 300, 60):
        (folder / f"{i}.png").write_bytes(b"none")
    return folder


@pytest.mark.parametrize("embed", [False, True])
def test_equals_one_machine(cluster, folder, embed):
    from deit_fast.integrations.ray import classify

    model = tiny_pair()[1]
    predictor = bulk.Predictor(model, 32, topk=2, embed=embed)
    want = {}
    for batch in bulk.predict(predictor, images.find([folder]), 0):
        rows = list(outputs.entries(batch, bulk.label_names(model)))
        want |= {
            row["image"]: row
            for row in outputs.table(rows, batch.columns.get("embedding")).to_pylist()
        }
    found = classify([folder], model, batch_size=32, topk=2, embed=embed).take_all()
    assert len(found) == len(want) == 300
    assert sum(row["error"] is not None for row in found) == 5
    for row in found:
        other = want.pop(row["image"])
        assert row["error"] == other["error"]
        for name in ("classes", "labels"):
            assert row.get(name) is None or list(row[name]) == other[name]
        for name in ("scores", "embedding"):
            if other.get(name) is None:
                assert row.get(name) is None
            else:
                np.testing.assert_allclose(row[name], other[name], atol=1e-5)
        assert row["error"] or set(row) == set(other)
    assert not want
    assert model.backend == "torch" and not model.training


def test_no_images(cluster, tmp_path):
    from deit_fast.integrations.ray import classify

    with pytest.raises(ValueError, match="inputs: no images found"):
        classify([tmp_path], tiny_pair()[1])
