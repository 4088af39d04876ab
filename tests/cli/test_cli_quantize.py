"""deit-fast quantize, as a user calls it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import (
    APART,
    BF16,
    FP32,
    assert_close,
    assert_differ,
    assert_within,
    seeded,
)
from modelling import tiny_pair, write_image
from quantized_models import LAYERS, SIZE, quantized_copy

import deit_fast
from deit_fast.cli import main
from deit_fast.distill import evaluate
from deit_fast.distill.datasets import open_images
from deit_fast.engine import data_config
from deit_fast.images import Decoder
from deit_fast.quantization_report import compare, layer_errors, worst_layers


@pytest.fixture(scope="module")
def model():
    return tiny_pair(**SIZE)[1]


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """A model, seven classes of three images each, and others without labels; one is broken."""
    root = tmp_path_factory.mktemp("quantize")
    (root / "data").mkdir()
    random = np.random.default_rng(seeded(0))
    for i in range(21):
        write_image(root / "data" / f"c{i // 3}" / f"{i:02}.png", random, (3, 4), (50, 41))
    (root / "data/c3/09.png").write_bytes(b"none")
    for i in range(5):
        write_image(root / "more" / f"{i}.png", random, (5, 4), (60, 48))
    deit_fast.save_pretrained(model, root / "model")
    (root / "empty").mkdir()
    return root


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Also where there is a GPU: the results are compared with a CPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pixels(model, images):
    return torch.cat([x for _, x in evaluate.batches(model, images, 8, 0, [])])


def assert_same_values(read, expected):
    """What was read from JSON has that name and those values."""
    assert read.keys() == vars(expected).keys() and read.pop("name") == expected.name
    for key, value in read.items():
        assert_within(value, getattr(expected, key), APART[FP32], key)


def test_quantize_reports_and_saves(model, folders, tmp_path, capsys, on_a_cpu):
    out, report = tmp_path / "new" / "out", tmp_path / "figures" / "report.json"
    args = ["--data", folders / "data", "--calibration", folders / "more", "--images", 3, "--worst"]
    args += ["--exclude", "blocks.0.*", "--exclude", "*.fc2", "--workers", 0]
    args += ["--out", out, "--json", report]
    assert main(["quantize", *map(str, [folders / "model", *args])]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("c3/09.png") == 1 and "skipped: 1 unreadable" in printed.err
    found = json.loads(report.read_text())

    images = open_images(folders / "data", None)
    kept = [i for i in range(21) if i != 9]
    x, labels = pixels(model, images), torch.from_numpy(images.labels[kept])
    some = open_images(folders / "data", None)
    some.image = lambda i: deit_fast.images.Image.open(folders / f"more/{i}.png").convert("RGB")
    calibration = [x for _, x in evaluate.batches(model, some, 8, 0, [], [0, 1, 3])]
    quantized = copy.deepcopy(model)
    exclude = ["blocks.0.*", "*.fc2"]
    expected = deit_fast.quantize(quantized, "fp8", calibration, exclude)
    assert str(expected) in printed.out and "3 images" in str(expected)
    assert found["quantized"] == expected.quantized == [LAYERS[i] for i in (4, 5, 6)]
    comparison = compare(model, quantized, [(x, labels)])
    for name, value in found["comparison"].items():
        assert_within(value, getattr(comparison, name), APART[FP32], name)
    assert comparison.images == 20
    # the layers' sample: 16 of 21, one of which is the broken one
    sample = [i * 21 // 16 for i in range(16)]
    sample = x[[kept.index(i) for i in sample if i != 9]]
    for one, other in zip(found["layers"], layer_errors(model, quantized, sample), strict=True):
        assert_same_values(one, other)
        assert f"{other.outliers:.4f}" in printed.out
    shares = worst_layers(model, "fp8", sample, calibration, exclude)
    assert_within(found["worst"]["together"], shares.together, APART[FP32])
    assert_same_values(found["worst"]["layers"][0], shares.layers[0])
    loaded = deit_fast.from_pretrained(out).eval()
    with torch.inference_mode():
        assert_close(loaded(x), quantized(x))
        assert_differ(loaded(x), model(x))


def test_quantize_runs_the_shipped_photographs(model, folders, tmp_path, capsys, on_a_cpu):
    report = tmp_path / "report.json"
    args = ["--format", "int8", "--workers", "0", "--dtype", "bf16", "--json", str(report)]
    assert main(["quantize", str(folders / "model"), *args]) == 0
    out = capsys.readouterr().out
    assert "in int8 against fp32, 4 images of the photographs of deit_fast" in out
    assert "inputs of 4 images" in out
    found = json.loads(report.read_text())
    assert found["comparison"]["top1"] is None and found["dtype"] == "bf16"
    photographs = sorted(Path(deit_fast.__file__).parent.glob("data/*.jpg"))
    decoder = Decoder(data_config(model))
    x = torch.from_numpy(np.stack([decoder(path) for path in photographs]))
    quantized = quantized_copy(model, "int8").bfloat16()
    error = compare(model, quantized, [x]).logits_error
    assert_within(found["comparison"]["logits_error"], error, APART[BF16])
    layers = layer_errors(model, quantized, x)
    for one, other in zip(found["layers"], layers, strict=True):
        assert_within(one["images"], other.images, APART[BF16], one["name"])
    assert [layer.name for layer in layers] == LAYERS and "worst" not in found
    assert "top-1" not in out and "blocks.1.mlp.fc2" in out

    assert main(["quantize", str(folders / "model"), *args[:-1]]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == found and "in int8 against fp32" in printed.err


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--format", "int8", "--calibration", "more"],
            "--calibration: int8 has dynamic activation scales",
        ),
        (["--calibration", "empty"], "empty: nothing recognised"),
        (["--calibration", "nowhere"], "no image, folder, pattern or list"),
        (["--calibration", "broken"], "calibration: no images came"),
        (["--calibration", "more", "--images", "0"], "--images: 0, expected 1 or more"),
        (["--images", "3"], "--images: of what"),
        (["--format", "int8", "--attention"], "--attention: there is no int8 attention"),
        (["--split", "train"], "--split: of what"),
        (["--data", "empty"], "empty: nothing recognised"),
        (
            ["--exclude", "blocks.9.*", "--out", "nowhere"],
            "exclude: 'blocks.9.*' is none of the 8 layers, expected",
        ),
        (["--exclude", "*"], "no layer can be quantized"),
        (["--out", "model"], "is MODEL, whose weights would be lost"),
        (["--batch", "0"], "--batch: 0, expected 1 or more"),
    ],
)
def test_quantize_says_what_is_wrong(args, message, folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    (folders / "broken").mkdir(exist_ok=True)
    (folders / "broken/1.png").write_bytes(b"none")
    assert main(["quantize", "model", "--workers", "0", *args]) == 2
    printed = capsys.readouterr().err
    assert "deit-fast quantize: " in printed and message in printed
    assert not Path("nowhere").exists()


@pytest.mark.slow
def test_quantize_wants_blocks_and_classes(folders, tmp_path, capsys):
    deit_fast.save_pretrained(tiny_pair(img_size=32, num_classes=3)[1], tmp_path / "three")
    data = ["--data", str(folders / "data")]
    for model, options, message in (
        ("tiny_vit_5m_224", ["--no-pretrained"], "TinyVit has no Block of a ViT or DeiT"),
        ("resnet18", ["--no-pretrained"], "nothing to replace in ResNet"),
        (str(tmp_path / "three"), data, "3 classes, images: 7"),
    ):
        assert main(["quantize", model, "--workers", "0", *options]) == 2
        assert message in capsys.readouterr().err
