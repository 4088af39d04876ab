"""A linear probe: features once, heads that are the best there are."""

import numpy as np
import pytest
import small_datasets
import small_runs
import timm
import torch

import deit_fast
from deit_fast.distill.datasets import open_images
from deit_fast.finetune import probe


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_images(small_runs.image_folders(tmp_path_factory.mktemp("data")), "train")


def model_of(name="deit_tiny_distilled", **kwargs):
    torch.manual_seed(0)
    sizes = small_runs.MODEL_ARGS | {"img_size": 16} if name.startswith("deit") else {}
    return deit_fast.create_model(name, num_classes=3, strict=False, **sizes, **kwargs).eval()


def extracted(model, images, folder, **kwargs):
    options = {"batch_size": 8, "workers": 0, "dtype": None} | kwargs
    return probe.extract(model, images, folder, **options)


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled", "deit_tiny", "test_resnet", "tiny_vit_5m_224"]
)
def test_heads_of_the_features_are_the_models_logits(name):
    model = model_of(name)
    x = torch.randn(2, 3, *([16, 16] if name.startswith("deit") else [64, 64]))
    with torch.no_grad():
        features = probe.features_of(model, x)
        heads = probe.heads_of(model)
        logits = [head(features[:, i]) for i, head in enumerate(heads)]
        torch.testing.assert_close(torch.stack(logits).mean(0), model(x))


def test_a_model_without_a_linear_head():
    with pytest.raises(ValueError, match="its head is Identity, expected a linear layer"):
        probe.heads_of(timm.create_model("test_resnet", num_classes=0))


def test_features_are_computed_once(images, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "PART", 10)
    model = model_of()
    first = extracted(model, images, tmp_path)
    assert first.values.shape == (24, 2, 32) and len(list(tmp_path.iterdir())) == 3
    (tmp_path / "0000010.safetensors").unlink()
    (tmp_path / "0000020.safetensors").write_bytes(b"half a file")
    computed, real = [], probe._computed
    monkeypatch.setattr(
        probe, "_computed", lambda *args: computed.append(args[2][0]) or real(*args)
    )
    again = extracted(model, images, tmp_path)
    assert computed == [10, 20] and torch.equal(first.values, again.values)
    assert torch.equal(again.labels, torch.from_numpy(images.labels))
    torch.nn.init.ones_(model.norm.weight.data[:1].mul_(3))  # other weights
    with torch.no_grad():
        model.norm.bias.add_(1)
    extracted(model, images, tmp_path)
    assert computed == [10, 20, 0, 10, 20]


def test_unreadable_images_are_named(tmp_path):
    data = small_runs.image_folders(tmp_path / "data", each=3)
    broken = data / "train" / "class1" / "1.png"
    broken.write_bytes(b"no image")
    found = extracted(model_of(), open_images(data, "train"), tmp_path / "features")
    assert len(found.values) == len(found.labels) == 8 and found.skipped[0][0] == str(broken)
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    kept = extracted(model_of(), open_images(data, "train"), tmp_path / "features")
    assert kept.skipped == found.skipped


def test_heads_are_the_least_loss():
    """The gradient of the whole loss, taken here from its definition, is 0."""
    draw = torch.Generator().manual_seed(0)
    x = 5 + torch.randn(60, 4, generator=draw) * torch.tensor([1.0, 10.0, 0.1, 0.0])
    y = (x[:, 0] + 0.1 * x[:, 1] + 0.3 * torch.randn(60, generator=draw) > 6).long()
    w, b = probe._Regression(x, y, 2).fit(0.1)
    deviation = x.double().std(0, correction=0)
    scaled = (w * deviation).requires_grad_()
    z = torch.where(deviation > 0, (x - x.double().mean(0)) / deviation, 0)
    free = (b + w @ x.double().mean(0)).requires_grad_()
    loss = torch.nn.functional.cross_entropy(z @ scaled.T + free, y)
    (loss + 0.1 * scaled.square().sum() / 120).backward()
    assert scaled.grad.abs().max() < 1e-4 and free.grad.abs().max() < 1e-4
    assert (w[:, 3] == 0).all()


def test_noisy_features_have_more_weight_decay():
    draw = np.random.RandomState(small_datasets.seeded(0))
    labels = np.arange(90) % 3
    decays = []
    for noise in (0.1, 1.0):
        signal = np.eye(3)[labels] + noise * draw.randn(90, 3)
        values = torch.from_numpy(np.concatenate([signal, draw.randn(90, 60)], 1))
        features = probe.Features(values[:, None].float(), torch.from_numpy(labels), [])
        weights, biases, decay = probe.fit(features, 3, 0)
        decays.append(decay)
        right = (values.float() @ weights[0].T + biases[0]).argmax(1) == torch.from_numpy(labels)
        assert right.float().mean() > 0.8
    assert decays[0] < decays[1]


def test_one_image_of_each_class():
    features = probe.Features(torch.eye(3)[:, None], torch.arange(3), [])
    weights, biases, _ = probe.fit(features, 3, 0)
    assert ((torch.eye(3) @ weights[0].T + biases[0]).argmax(1) == torch.arange(3)).all()


def test_a_probed_model_classifies(images, tmp_path):
    model = model_of()
    features = extracted(model, images, tmp_path)
    probe.put(model, *probe.fit(features, 3, 0)[:2])
    from deit_fast.distill import evaluate

    assert evaluate.predictions(model, images).accuracy().percent()["top1"]["joint"] > 90
