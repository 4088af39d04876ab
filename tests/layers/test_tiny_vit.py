"""TinyViT against timm on the same weights: PyTorch at full width, every Triton kernel in small."""

import copy
import pickle

import pytest
import selection
import timm
import torch
from checking import (
    NO_CODE,
    assert_as_accurate,
    assert_close,
    assert_gradients_as_accurate,
    seed,
)
from modelling import PRECISIONS, assert_same_logits, gradients, randomize
from modelling import SMALL_TINY_VIT as SMALL
from tiers import slow, slow_but
from torch import nn

import deit_fast
from deit_fast import layers
from deit_fast.layers import tiny_vit

NAMES = timm.list_models("tiny_vit_*")
SIZE = 64  # pixels: maps of 16 and 8, the latter in four windows


def pair(name="tiny_vit_5m_224", backend="torch", **options):
    """(timm's model, the accelerated copy), in eval mode, with statistics that matter."""
    seed(0)
    reference = randomize(timm.create_model(name, **options)).eval()
    for m in reference.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.normal_(m.running_mean, std=0.2)
    fast = copy.deepcopy(reference)
    deit_fast.accelerate(fast, backend)
    return reference, fast


def small(backend="torch", device="cpu", **options):
    return [m.to(device) for m in pair(backend=backend, **SMALL | options)]


def images(batch=2, size=(SIZE, SIZE), device="cpu"):
    seed(1)
    return torch.randn(batch, 3, *size, device=device)


@pytest.mark.parametrize("name", slow_but(NAMES, "tiny_vit_5m_224"))
def test_every_size_equals_timms(name):
    """Shallow: one block of each kind at the width and the image size of the model."""
    reference, fast = pair(name, depths=(1, 1, 1, 1), num_classes=10)
    assert fast.state_dict().keys() == reference.state_dict().keys()
    size = reference.pretrained_cfg["input_size"][1]
    assert_same_logits(reference, fast, images(1, (size, size)))


def test_whole_model():
    reference, fast = pair("tiny_vit_5m_224", num_classes=1000)
    assert_same_logits(reference, fast, images(1, (224, 224)))


def test_everything_is_replaced():
    model = timm.create_model("tiny_vit_11m_224")
    report = deit_fast.accelerate(model)
    assert {module.kind for module in report.skipped} == {"NormMlpClassifierHead", "LayerNorm2d"}
    counts = {kind: len(names) for kind, names in report.replaced.items()}
    assert counts == {
        "PatchEmbed": 1, "ConvNorm": 27, "MBConv": 2, "PatchMerging": 3, "TinyVitBlock": 10,
        "Attention": 10, "NormMlp": 10, "LayerNorm": 20,
    }  # fmt: skip
    deit_fast.restore(model)
    assert not any(isinstance(m, layers._base.Fast) for m in model.modules())
    assert type(model.stages[1].blocks[0]) is tiny_vit.TinyVitBlock.timm_class


# (33, 47): maps of 9 x 12 and 5 x 6, padded to 8 x 8
@pytest.mark.parametrize("size", [slow((64, 64)), (33, 47)], ids=str)
def test_every_triton_kernel(size, device):
    reference, fast = small("triton", device)
    assert_same_logits(reference, fast, images(size=size, device=device))


@pytest.mark.slow
def test_other_inputs(device):
    reference, fast = small("triton", device)
    x = images(device=device)
    with torch.no_grad():
        expected = reference(x)
        got = fast(x.contiguous(memory_format=torch.channels_last))
        assert_close(got, expected)
        strided = x.transpose(2, 3).contiguous().transpose(2, 3)
        assert_close(fast(strided), expected)
        assert fast(x[:0]).shape == (0, 11)


def step(model, x, dtype=None, upstreams=1):
    """Logits, gradients and statistics after one forward pass."""
    model = copy.deepcopy(model)
    made = gradients(model, x, dtype, upstreams=upstreams)
    return made | {n: b for n, b in model.named_buffers() if "running" in n}


def sum_as_ours(model):
    """Its batch norm gets channels_last, as ours does: PyTorch's on a CPU sums this in another
    order, with ten times the error in fp32."""
    last = {"memory_format": torch.channels_last}
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args: args[0].contiguous(**last))
            module.register_forward_hook(
                lambda _, args, y: y.register_hook(lambda dy: dy.contiguous(**last)) and None
            )


@pytest.mark.parametrize("backend", [slow("torch"), "triton"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("precision", slow_but(PRECISIONS, "bf16", "autocast bf16"))
def test_gradients(precision, training, backend, device):
    """Statistics too, and stochastic depth drawn as timm draws it."""
    weights, dtype = PRECISIONS[precision]
    options = {"depths": (2, 1), "drop_path_rate": 0.6}
    reference, fast = (m.to(weights).train(training) for m in small(backend, device, **options))
    assert reference.stages[0].blocks[1].drop_path.drop_prob > 0
    x = images(2, device=device).to(weights)
    truth = step(copy.deepcopy(reference).double(), x.double(), upstreams=8)
    sum_as_ours(reference)
    expected, got = (step(m, x, dtype, upstreams=8) for m in (reference, fast))
    if training:
        seed(3)
        reference(x)
        drawn = torch.rand(3)
        seed(3)
        fast(x)
        assert torch.equal(torch.rand(3), drawn)
    assert_gradients_as_accurate(got, expected, truth, dtype=dtype or weights)


def test_statistics_without_gradients(device):
    """A pass in train() under no_grad, as to calibrate batch norm."""
    reference, fast = small("triton", device)
    with torch.no_grad():
        expected, got = (m.train()(images(device=device)) for m in (reference, fast))
    assert_close(got, expected)
    for a, b in zip(reference.buffers(), fast.buffers(), strict=True):
        assert_close(b, a)


def test_drop_path_in_double():
    """The draws themselves: exact arithmetic leaves no room for another sample's being dropped."""
    reference, fast = (m.double().train() for m in small(depths=(3, 1), drop_path_rate=0.6))
    x = images(8).double()
    expected, got = step(reference, x), step(fast, x)
    for name, true in expected.items():
        assert_close(got[name], true, name)


@pytest.mark.slow
def test_autocast(device):
    reference, fast = small("triton", device)
    x = images(device=device)
    with torch.no_grad():
        exact = copy.deepcopy(reference).double()(x.double())
        with torch.autocast(device, torch.float16):
            expected, got = reference(x), fast(x)
    assert got.dtype == expected.dtype
    assert_as_accurate(got, expected, exact)


@pytest.mark.slow
def test_half_precision(device):
    reference, fast = (m.half() for m in small("triton", device))
    x = images(device=device).half()
    with torch.no_grad():
        exact = copy.deepcopy(reference).double()(x.double())
        assert_as_accurate(fast(x), reference(x), exact)


@pytest.mark.slow
def test_compiles(device):
    selection.compiler()
    _, fast = small("triton", device)
    x = images(1, device=device)
    compiled = torch.compile(fast, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), fast(x))


@pytest.mark.slow
def test_compiles_in_training(device):
    _, fast = small("torch", device)
    fast.train()
    x = images(2, device=device)
    compiled = torch.compile(copy.deepcopy(fast), fullgraph=True, backend=NO_CODE)
    assert_close(compiled(x), fast(x))


def test_copies():
    reference, fast = small()
    x = images()
    with torch.no_grad():
        expected = fast(x)
        for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(copied(x), expected)
        other = deit_fast.create_model("tiny_vit_5m_224", backend="torch", **SMALL).eval()
        other.load_state_dict(fast.state_dict())
        assert torch.equal(other(x), expected)


@pytest.mark.slow
def test_weights_may_change(device):
    """Nothing that was folded is kept."""
    reference, fast = small("triton", device)
    x = images(1, device=device)
    with torch.no_grad():
        fast(x)
        for model in (reference, fast):
            model.stages[0].blocks[0].conv1.bn.running_mean += 0.5
            model.stages[1].blocks[0].attn.attention_biases.mul_(-2)
        assert_close(fast(x), reference(x))


@pytest.mark.parametrize("part", ["conv2.conv", "conv2.bn", "conv2", "conv3", "act1"])
def test_hooks_see_what_timms_see(part):
    seen = []
    x = images()
    for model in small():
        of = model.stages[0].blocks[0].get_submodule(part)
        of.register_forward_hook(lambda m, i, o: seen.append(o.clone()))
        with torch.no_grad():
            seen.append(model(x))
    assert len(seen) == 4
    assert_close(seen[2:], seen[:2])


@pytest.mark.parametrize("change", [slow("bias"), slow("padding"), "fused", slow("no statistics")])
def test_convolutions_that_change_afterwards(change, device):
    """After `accelerate`: what no longer is the operation runs as it is."""
    x, found = images(device=device), []
    for model in small("triton", device):
        part = model.stages[0].blocks[0].conv2
        if change == "bias":
            part.conv.bias = nn.Parameter(torch.arange(64.0, device=device))
        if change == "padding":
            part.conv.padding_mode = "reflect"
        if change == "fused":
            part.conv, part.bn = part.fuse().to(device), nn.Identity()
        if change == "no statistics":
            part.bn.running_mean = part.bn.running_var = None
        with torch.no_grad():
            found.append(model.eval()(x))
    assert_close(found[1], found[0])


def test_recompute(device):
    """Saved on request: what the MLP's norm and GELU gave, 64 and 256 numbers for each of 4 x 4
    tokens."""
    _, fast = small("triton", device)
    kept = []
    for recompute in (True, False):
        deit_fast.accelerate(fast, "triton", recompute=recompute)
        numbers = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, n=numbers: n.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
        ):
            fast.stages[1].blocks[0].mlp(torch.randn(1, 4, 4, 64, device=device))
        kept.append(sum(numbers.values()))
    assert kept[1] - kept[0] == 16 * (64 + 256)


def test_batch_norm_that_is_frozen():
    """In training with batch norm in eval mode: fine-tuning's usual way."""
    models = small()
    for model in models:
        model.train()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
    expected, got = (step(m, images()) for m in models)
    for name, true in expected.items():
        assert_close(got[name], true, name)


@pytest.mark.parametrize(
    "options, name, reason",
    [
        ({"act_layer": nn.ReLU}, "patch_embed", "not the exact GELU"),
        ({"act_layer": nn.ReLU}, "stages.1.blocks.0", "mlp stays with timm"),
        ({"num_heads": (1, 4)}, "stages.1.blocks.0.attn", "heads of 16 and 16"),
    ],
)
def test_what_stays_with_timm(options, name, reason):
    reference = timm.create_model("tiny_vit_5m_224", **SMALL | options).eval()
    fast = copy.deepcopy(reference)
    report = deit_fast.accelerate(fast)
    assert any(m.name == name and reason in m.reason for m in report.skipped)
    with torch.no_grad():
        assert_close(fast(images()), reference(images()))


def test_a_window_alone(device):
    """timm's own call of the attention, which hands it windows."""
    reference, fast = small("triton", device)
    x = torch.randn(3, 16, 64, device=device)
    a, b = (m.stages[1].blocks[0].attn for m in (reference, fast))
    with torch.no_grad():
        assert_close(b(x), a(x))


def test_engine_folder_and_export(tmp_path):
    """Bytes through an engine; a folder of weights; a program for any batch."""
    _, fast = small()
    fast.pretrained_cfg = dict(fast.pretrained_cfg) | {"input_size": (3, SIZE, SIZE)}
    pixels = torch.randint(0, 256, (3, SIZE, SIZE, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(fast.pretrained_cfg[k]) for k in ("mean", "std"))
    x = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = fast(x)
        assert_close(deit_fast.InferenceEngine(fast, 2)(pixels), expected)
        options = {k: v for k, v in SMALL.items() if "drop" not in k}
        deit_fast.save_pretrained(fast, tmp_path, **options)
        again = deit_fast.from_pretrained(tmp_path, backend="torch").eval()
        assert_close(again(x), expected)
        program = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("B")},))
        assert_close(program.module()(x[:2]), expected[:2])


def test_weights_for_other_windows(tmp_path):
    """As TinyViT's code resizes them: each head's biases as an image, bicubic. Another number of
    heads is refused, and nothing is loaded."""
    small_windows, _ = small()
    path = tmp_path / "224.pth"
    torch.save({"model": small_windows.state_dict()}, path)
    other = {**SMALL, "window_sizes": (7, 6)}
    large = deit_fast.create_model("tiny_vit_5m_224", checkpoint=path, backend="torch", **other)
    name = "stages.1.blocks.0.attn.attention_biases"
    for head, got in enumerate(large.get_parameter(name)):
        biases = small_windows.get_parameter(name)[head].view(1, 1, 4, 4)
        expected = nn.functional.interpolate(biases, (6, 6), mode="bicubic", align_corners=False)
        assert_close(got, expected.flatten())
    rest = large.state_dict()
    assert all(torch.equal(rest[k], v) for k, v in small_windows.state_dict().items() if k != name)
    with pytest.raises(ValueError, match=rf"misshaped: .*{name} \(2, 16\), expected \(4, 36\)"):
        deit_fast.create_model(
            "tiny_vit_5m_224", checkpoint=path, backend="torch", **other | {"num_heads": (1, 4)}
        )
