"""Each number against one computed by hand, or by the model itself; and the accuracy of the model
whose weights come with the package."""

import copy
import os
from pathlib import Path

import pytest
import selection
import torch
from checking import (
    APART,
    FP32,
    QUANTIZED_LAYER,
    assert_at_most,
    assert_close,
    assert_differ,
    assert_within,
    seeded,
)
from modelling import images as random_images
from modelling import tiny_pair
from quantized_models import LAYERS, SIZE, quantized_copy
from torch import nn

import deit_fast
from deit_fast import kernels, quantization_report
from deit_fast.distill import evaluate
from deit_fast.distill.datasets import open_images
from deit_fast.kernels.quantize import dequantize
from deit_fast.quantization import quantized_layers
from deit_fast.quantization_report import compare, layer_errors, worst_layers

FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


@pytest.fixture(scope="module")
def model():
    return tiny_pair(**SIZE)[1]


class Says(nn.Module):
    """Logits that were written down: row i for an image of i."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, x):
        return self.rows[x.flatten().long()]


WANT = Says([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 12.0], [0.0, 0.0, 0.0]]).eval()
GOT = Says([[3.0, 0.0, 0.0], [5.0, 4.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 12.0]]).eval()
FOUR = torch.arange(4.0).view(4, 1, 1, 1)


def test_compare_by_hand():
    labels = torch.tensor([0, 1, 0, 2])
    batches = [(FOUR[:3], labels[:3]), [FOUR[3:], labels[3:]]]
    found = compare(WANT, GOT, batches)
    assert found.logits_error == pytest.approx(((25 + 144 + 144) / (9 + 16 + 144)) ** 0.5)
    assert (found.images, found.agreement) == (4, 25.0)  # the first alone
    assert (found.top1, found.top1_quantized) == (50.0, 75.0)
    found = compare(WANT, GOT, iter([FOUR[:1], FOUR[1:]]))
    assert found.top1 is found.top1_quantized is None and found.agreement == 25.0


def test_compare_refuses():
    with pytest.raises(ValueError, match="no images came"):
        compare(WANT, GOT, [])
    with pytest.raises(ValueError, match="labels for 2 of 4 images, expected all or none"):
        compare(WANT, GOT, [(FOUR[:2], torch.zeros(2)), FOUR[2:]])
    with pytest.raises(ValueError, match="quantized: in train mode"):
        compare(WANT, Says([[0.0]]), [FOUR])
    with pytest.raises(FloatingPointError, match="quantized: logits that are not finite"):
        compare(WANT, Says([[0.0, torch.inf, 0.0]] * 4).eval(), [FOUR])


def recorded(monkeypatch):
    """The operands of every quantized GEMM from here on, and their results."""
    real, seen = kernels.quantized_linear, []

    def record(x, weight, *args, **options):
        y = real(x, weight, *args, **options)
        seen.append((x, weight, y))
        return y

    monkeypatch.setattr(kernels, "quantized_linear", record)
    return seen


@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.parametrize("name", LAYERS[:4])
def test_a_layer_gets_what_it_gets_in_the_model(model, format, name, monkeypatch):
    """The first block's, with that layer alone quantized: its input is the original's then, and the
    operand is the one that the model itself multiplies."""
    quantized = quantized_copy(model, format, [name])
    x, inputs = random_images(model, 2), []
    timms = deit_fast.restore(copy.deepcopy(model))
    timms.get_submodule(name).register_forward_hook(lambda module, args, y: inputs.append(y))
    seen = recorded(monkeypatch)
    with torch.inference_mode():
        timms(x)
        quantized(x)
    (operand, weight, _), (expected,) = seen[0], inputs
    layer = quantized.get_submodule(name)
    got = dequantize(operand) @ dequantize(weight).T + layer.bias
    want_error = ((got - expected).norm() / expected.norm()).item()
    (found,) = layer_errors(model, quantized, x)
    assert found.name == name
    # a number halfway between two quantized ones may go either way
    assert_within(found.images, want_error, 0.02)
    assert_differ(got, expected)


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_operands_have_the_models_scales(model, format, monkeypatch):
    quantized = quantized_copy(model, format)
    x = random_images(model, 2)
    seen = recorded(monkeypatch)
    with torch.inference_mode():
        quantized(x)
    in_model = [operand for operand, *_ in seen[:4]]
    seen.clear()
    errors = layer_errors(model, quantized, x)
    assert [e.name for e in errors] == LAYERS and len(seen) == 3 * len(LAYERS)
    for place, expected in enumerate(in_model):
        for i in range(3):
            operand = seen[3 * place + i][0]
            assert operand.values.shape == expected.values.shape
            assert operand.scales.shape == expected.scales.shape
            if expected.scales.numel() == 1:
                assert torch.equal(operand.scales, expected.scales)
    for place in (1, 3):  # no LayerNorm between the input and the operand
        of_images, random, outliers = (dequantize(seen[3 * place + i][0]) for i in range(3))
        assert_differ(random, of_images)
        apart = [(x[..., 37].norm() / x[..., 36].norm()).item() for x in (random, outliers)]
        assert 0.5 < apart[0] < 2 and apart[1] > 10
    for e in errors:
        for error in (e.images, e.random):
            assert_at_most(error, QUANTIZED_LAYER[format], e.name)
        assert min(e.images, e.random, e.outliers) > 1e-3


def test_random_inputs():
    torch.manual_seed(seeded(3))
    x = 7 * torch.randn(500, 80) + 2
    found = quantization_report._random_like(x, 0)
    for drawn in found.values():
        assert_close(drawn.square().mean(), x.square().mean())
    rms = found["outliers"].square().mean(0).sqrt()
    large, small = rms[[0, 37, 74]], rms[[i for i in range(80) if i % 37]]
    assert_within(large.mean() / small.mean(), 50.0, 0.05, "three features, each of 500 samples")
    rms = found["random"].square().mean(0).sqrt()
    assert_at_most((rms.max() / rms.min()).item(), 1.3, "of 80 features, each of 500 samples")
    assert_at_most(abs(found["random"].mean().item()), 0.2, "of 40,000 samples")
    again, other = (quantization_report._random_like(x, seed)["random"] for seed in (0, 1))
    assert torch.equal(again, found["random"]) and not torch.equal(other, again)


def test_a_scale_that_is_too_small_shows(model):
    quantized = quantized_copy(model, "fp8")
    before = layer_errors(model, quantized, random_images(model, 2))
    quantized.blocks[1].attn.proj.input_scale.div_(1000)
    after = layer_errors(model, quantized, random_images(model, 2))
    place = LAYERS.index("blocks.1.attn.proj")
    assert min(after[place].images, after[place].random, after[place].outliers) > 0.3
    before.pop(place), after.pop(place)
    assert after == before


def test_layer_errors_refuse(model):
    x, quantized = random_images(model, 1), quantized_copy(model, "int8")
    with pytest.raises(ValueError, match="quantized: no layer is quantized"):
        layer_errors(model, model, x)
    with pytest.raises(ValueError, match="model: is quantized"):
        layer_errors(quantized, quantized, x)
    with pytest.raises(ValueError, match=r"model: has no layer blocks.1.attn.qkv"):
        layer_errors(tiny_pair(**SIZE, depth=1)[1], quantized, x)
    with pytest.raises(ValueError, match="model: in train mode"):
        layer_errors(copy.deepcopy(model).train(), quantized, x)


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_the_worst_layer_is_found(format):
    """One whose weights have a feature so large that the others are rounded to 0."""
    model = tiny_pair(**SIZE)[1]
    x = random_images(model, 5)
    with torch.no_grad():
        fc1 = model.blocks[1].mlp.fc1
        fc1.weight[:, 3] *= 1e5
        model.blocks[1].norm2.weight[3] = model.blocks[1].norm2.bias[3] = 1e-5
    kinds = [type(m) for m in model.modules()]
    before = {k: (v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()}
    calibration = [x] if format == "fp8" else None
    reported = []
    found = worst_layers(
        model, format, x, calibration, ["blocks.0.mlp.fc2"], 2, lambda *done: reported.append(done)
    )
    assert [type(m) for m in model.modules()] == kinds
    for key, value in model.state_dict(keep_vars=True).items():
        assert value is before[key][0] and torch.equal(value, before[key][1])
    assert reported == [(i, 15) for i in range(1, 16)]
    names = [share.name for share in found.layers]
    assert names[0] == "blocks.1.mlp.fc1" and sorted(names) == sorted(set(LAYERS) - {LAYERS[3]})
    assert [s.alone for s in found.layers] == sorted([s.alone for s in found.layers], reverse=True)
    assert min(found.layers, key=lambda share: share.without).name == names[0]
    options = {"calibration": calibration}
    chosen = set(names)
    for only, error in [
        (chosen, found.together),
        *(({s.name}, s.alone) for s in found.layers),
        *((chosen - {s.name}, s.without) for s in found.layers),
    ]:
        by_hand = compare(model, quantized_copy(model, format, only, **options), [x])
        # roundings of fp32, beside a difference of a hundredth
        assert_within(error, by_hand.logits_error, 100 * APART[FP32])


def test_the_model_is_whole_after_an_interruption(model):
    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    mine = copy.deepcopy(model)
    x = random_images(model, 2)
    with pytest.raises(KeyboardInterrupt):
        worst_layers(mine, "fp8", x, progress=stop)
    assert not quantized_layers(mine)
    assert [type(m) for m in mine.modules()] == [type(m) for m in model.modules()]
    with torch.inference_mode():
        assert torch.equal(mine(x), model(x))


class Once(nn.Module):
    """A model that is run once on each batch."""

    def __init__(self, model):
        super().__init__()
        self.model, self.logits = model, {}

    def forward(self, x):
        if x.data_ptr() not in self.logits:
            self.logits[x.data_ptr()] = self.model(x)
        return self.logits[x.data_ptr()]


@pytest.mark.slow
def test_top1_on_the_whole_test_set_of_fashion_mnist():
    """Within 0.1 point of fp32, however the scales were found."""
    selection.data(FASHION, "Fashion-MNIST")
    torch.use_deterministic_algorithms(False)  # memory full of NaN costs too much time here
    model = deit_fast.deit_nano_fashion(pretrained=True).eval()
    test, train = (open_images(FASHION, split, mode="L") for split in ("validation", "train"))
    labels = torch.from_numpy(test.labels)
    batches = [(x, labels[numbers]) for numbers, x in evaluate.batches(model, test, 50, 0, [])]
    some = range(0, len(train), len(train) // 256)
    calibration = [x for _, x in evaluate.batches(model, train, 64, 0, [], some)]
    reference = Once(model).eval()
    for format, images in (("fp8", None), ("fp8", calibration), ("int8", None)):
        quantized = copy.deepcopy(model)
        deit_fast.quantize(quantized, format, images)
        found = compare(reference, quantized, batches)
        assert found.images == 10_000 and found.top1 > 86
        assert_at_most(abs(found.top1_quantized - found.top1), 0.1, f"points, {format}")
        assert found.agreement > 99 and 1e-3 < found.logits_error < 0.03
