"""Where the files come from: a folder or the hub."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from saved_models import assert_equal_models, refused, tiny

from deit_fast.pretrained import from_pretrained, save_pretrained


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tiny(), tmp_path / "saved")
    return tmp_path / "saved"


def test_what_looks_local_is_never_looked_up(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "deit").write_text("")
    for path in ("./a", "../a/b", str(tmp_path / "a"), "~/no/such", "a/b/c", "a b", Path("timm/a")):
        refused(FileNotFoundError, "no such folder .*hub", path)
    refused(FileNotFoundError, "timm: has no config.json", "timm")
    refused(ValueError, "is a file, expected a folder", "timm/deit")


@pytest.fixture
def hub(folder, monkeypatch):
    """A hub with one model, and what it was asked for."""
    asked = []

    def download(repo, name, revision=None):
        asked.append((repo, name, revision))
        if not (folder / name).is_file():
            raise EntryNotFoundError(f"404: {name}")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_hub(hub, folder):
    assert_equal_models(from_pretrained("timm/tiny.fb_in1k"), tiny())
    files = ["config.json", "model.safetensors"]
    assert hub == [("timm/tiny.fb_in1k", name, None) for name in files]
    hub.clear()
    from_pretrained("timm/tiny@refs/pr/1")
    assert hub == [("timm/tiny", name, "refs/pr/1") for name in files]
    (folder / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")  # from elsewhere never a pickle
    hub.clear()
    refused(FileNotFoundError, "timm/tiny: has no model.safetensors", "timm/tiny")
    assert hub == [("timm/tiny", name, None) for name in files]
    (folder / "config.json").unlink()
    refused(FileNotFoundError, "timm/tiny: has no config.json", "timm/tiny")


def test_hub_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("timm/deit_no_such", "facebook/a..b"):
        message = refused(FileNotFoundError, "no such folder, and config.json did not come", name)
        assert "Hugging Face hub (offline, or no such model?" in message
        assert len(message.splitlines()) == 1
