"""Data sets, models, runs and soft-label stores that several files of tests look at, unchanged."""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from modelling import tiny_pair
from small_runs import image_folders, run, small_teacher
from small_stores import write_store


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return image_folders(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def net(data, tmp_path_factory):
    """A teacher's folder."""
    return small_teacher(tmp_path_factory.mktemp("teacher") / "net", data=data)


@pytest.fixture(scope="session")
def whole_run(data, tmp_path_factory):
    """(folder, last checkpoint) of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    return out, run(data, out)


@pytest.fixture(scope="session")
def whole(data, net, tmp_path_factory):
    """A store of three epochs that nothing disturbed."""
    out = tmp_path_factory.mktemp("store") / "whole"
    write_store(data, out, net)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    """Of that store."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


@pytest.fixture(scope="module")
def models(request):
    """timm's model and ours, as small as SIZE of a file of tests says."""
    return tiny_pair(**request.module.SIZE)


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    if find_spec("datasets"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
