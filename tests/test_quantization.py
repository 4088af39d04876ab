"""quantize(model): the chosen layers, by the definition, and back again."""

import copy
import fnmatch
import io
import json
import pickle

import pytest
import safetensors.torch
import torch
from checking import (
    NEIGHBOURS,
    QUANTIZED_BLOCK,
    QUANTIZED_LOGITS,
    assert_close,
    assert_differ,
    assert_within,
    relative_error,
    seed,
    seeded,
)
from modelling import TINY, images, randomize, tiny_pair
from quantized_models import LAYERS, logits, quantized_pair
from tiers import slow
from torch.nn.utils import prune

import deit_fast
from deit_fast.kernels import _chips
from deit_fast.kernels.quantize import (
    Quantized,
    dequantize,
    quantize_reference,
    quantize_statically_reference,
)
from deit_fast.layers import Attention
from deit_fast.layers.quantized import undo
from deit_fast.layers.quantized_linear import QuantizedLinear
from deit_fast.quantization import convert_for_loading, quantized_layers

FP8, INT8 = torch.float8_e4m3fn, torch.int8


def simulated(reference, fast):
    """timm's model with weights and inputs of the same layers quantized and dequantized, by
    the definition alone; scales that are given are those of `fast`."""
    model = copy.deepcopy(reference)
    for name, format in quantized_layers(fast).items():
        linear, ours = model.get_submodule(name), fast.get_submodule(name)
        scale, output = ours.input_scale, ours.output_scale
        if output is not None:
            linear.register_forward_hook(
                lambda module, args, y, s=output: dequantize(quantize_statically_reference(y, s))
            )
        linear.weight.data = dequantize(quantize_reference(linear.weight.data, format))
        width = {"proj": fast.blocks[0].attn.head_dim, "fc2": 64}.get(name.rsplit(".")[-1])
        if name.endswith("fc2") and name.replace("fc2", "fc1") not in quantized_layers(fast):
            width = None  # a separate kernel then quantizes GELU's result, with whole rows

        def hook(module, args, format=format, scale=scale, width=width):
            x = args[0]
            if scale is not None:
                values = (x / scale.view(())).clamp(-448, 448).to(FP8)
                return dequantize(Quantized(values, scale))
            return dequantize(quantize_reference(x, format, x.shape[-1] // width if width else 1))

        linear.register_forward_pre_hook(hook)
    return model


def features(model, x):
    with torch.no_grad():
        return model.forward_features(x)


VARIANTS = {
    "distilled": {},
    "plain": {"distilled": False},
    "LayerScale": {"distilled": False, "init_values": 0.1},
    "no biases of qkv": {"qkv_bias": False},
    "some excluded": {"exclude": ["blocks.0.attn.qkv", "blocks.*.mlp.fc1"]},
    "others excluded": {"exclude": ["blocks.1.attn.proj", "*.fc2"]},
}


@pytest.mark.parametrize(
    "format", ["fp8", "calibrated fp8", "attention fp8", "attention calibrated fp8", "int8"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_definition(variant, format):
    """Closer by far to a model rounded layer by layer than either is to the unrounded one. What is
    left comes of sums in another order, which now and then round to the neighbour."""
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(seeded(1)))
    options = dict(VARIANTS[variant])
    exclude = options.pop("exclude", ())
    calibration = x[:3] if "calibrated" in format else None
    reference, fast = tiny_pair("torch", **options)
    for model in (reference, fast):
        model.blocks[1].attn.scale, model.blocks[1].attn.fused_attn = 0.3, False
    attention = "attention" in format
    deit_fast.quantize(fast, format.split()[-1], calibration, exclude, attention)
    assert [b.attn._qkv_output() != {} for b in fast.blocks] == [
        attention and not any(f"blocks.{i}.attn" in p for p in exclude) for i in (0, 1)
    ]
    left = {n for n in LAYERS for p in exclude if fnmatch.fnmatchcase(n, p)}
    assert quantized_layers(fast).keys() == set(LAYERS) - left
    defined = simulated(reference, fast)
    for read in (logits, features):  # all tokens go through the same blocks
        got, expected, exact = (read(model, x) for model in (fast, defined, reference))
        assert_differ(expected, exact)
        assert_within(expected, exact, QUANTIZED_LOGITS)
        assert_within(got, expected, NEIGHBOURS * relative_error(expected, exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("format", [slow("fp8"), "attention fp8", "int8"])
def test_kernels_serve_the_model(format, dtype, device):
    """Triton and PyTorch agree as far as rounding to the neighbour lets them; fp16 is rounded more
    often, and softmax in fp8 by the kernel alone. All tokens say how far, the logits are few."""
    attention = "attention" in format
    _, fast = tiny_pair("triton", img_size=32)
    deit_fast.quantize(fast, format.split()[-1], attention=attention)
    x = images(fast).to(device, dtype)
    fast.to(device, dtype)
    got, got_logits = features(fast, x), logits(fast, x)
    deit_fast.accelerate(fast, "torch")
    expected, want_logits = features(fast, x), logits(fast, x)
    undo(fast)
    exact = features(fast, x)
    assert got.dtype == got_logits.dtype == dtype
    rounding = relative_error(expected, exact)
    exactly = dtype == torch.float32 and not attention
    assert_within(expected, exact, QUANTIZED_LOGITS)
    assert_within(got, expected, rounding / (2 if exactly else 1))
    assert_within(got, exact, 1.25 * rounding)
    assert_within(got_logits, want_logits, QUANTIZED_LOGITS)


def test_what_was_done_is_reported():
    _, fast = tiny_pair()
    report = deit_fast.quantize(fast, "int8", exclude=["blocks.0.*", "*.fc2"])
    assert report.quantized == [n for n in LAYERS[4:] if "fc2" not in n]
    assert {m.name for m in report.skipped} == {n for n in LAYERS if n not in report.quantized}
    assert "int8: 3 layers, activation scales dynamic" in str(report) and "excluded" in str(report)
    assert quantized_layers(fast) == dict.fromkeys(report.quantized, "int8")
    assert "format=int8" in repr(fast)


@pytest.mark.parametrize("format, skipped", [("int8", ["attn.proj", "mlp.fc2"]), ("fp8", [])])
def test_widths_without_whole_groups_are_skipped(format, skipped):
    """Heads of 48 features, and 160 = 2.5 x 64 hidden ones: int8 has nothing to scale them by."""
    reference, fast = tiny_pair(embed_dim=96, mlp_ratio=160 / 96)
    report = deit_fast.quantize(fast, format)
    assert [m.name for m in report.skipped] == [f"blocks.{i}.{n}" for i in (0, 1) for n in skipped]
    assert all("multiple of" in m.reason for m in report.skipped)
    x = images(reference)
    assert_within(logits(fast, x), logits(reference, x), QUANTIZED_LOGITS)
    if skipped:  # and no folder may say otherwise
        _, fast = tiny_pair(embed_dim=96, mlp_ratio=160 / 96)
        with pytest.raises(ValueError, match="blocks.1.attn.proj heads of 48 features"):
            convert_for_loading(fast, format, ["blocks.1.attn.proj"])
        assert not quantized_layers(fast)


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_restore_is_exact(format):
    reference, fast = quantized_pair(format)
    weight = reference.blocks[0].attn.qkv.weight
    assert not torch.equal(dequantize(fast.blocks[0].attn.qkv.operand), weight)
    accelerated = undo(copy.deepcopy(fast))
    assert type(accelerated.blocks[0].attn) is Attention and not quantized_layers(accelerated)
    deit_fast.quantize(accelerated, "int8")
    deit_fast.restore(fast)
    assert type(fast) is type(reference)
    assert [type(m) for m in fast.modules()] == [type(m) for m in reference.modules()]
    for model in (fast, deit_fast.restore(accelerated)):
        state = model.state_dict()
        assert list(state) == list(reference.state_dict())  # in order
        assert all(torch.equal(t, state[name]) for name, t in reference.state_dict().items())
        names = [name for name, _ in model.named_parameters()]
        assert names == [name for name, _ in reference.named_parameters()]
        assert vars(model.blocks[0].mlp.fc2).keys() == vars(reference.blocks[0].mlp.fc2).keys()


def test_the_weight_on_the_cpu_stays_the_same_parameter():
    _, fast = tiny_pair()
    weight = fast.blocks[1].mlp.fc2.weight
    deit_fast.quantize(fast)
    assert weight not in set(fast.parameters())
    deit_fast.restore(fast)
    assert fast.blocks[1].mlp.fc2.weight is weight


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_dtypes_survive_a_change_of_the_models(format, qkv_bias, device):
    reference, fast = quantized_pair(format, qkv_bias=qkv_bias)
    x = images(reference)
    kept = {n: t.clone() for n, t in fast.state_dict().items() if "_scale" in n}
    values = fast.blocks[0].attn.qkv.weight.clone()
    for change in ("half", "bfloat16", "double", "float"):
        getattr(fast, change)()
        assert fast.blocks[0].attn.qkv.weight.dtype == values.dtype
    fast.to(device, torch.float16)
    assert fast.head.weight.dtype == fast.blocks[0].attn.proj.bias.dtype == torch.float16
    with pytest.raises(TypeError, match="quantized weight would become torch.float16"):
        fast.type(torch.float16)
    state = fast.state_dict()
    assert all(torch.equal(state[name].cpu(), t) for name, t in kept.items())
    assert torch.equal(state["blocks.0.attn.qkv.weight"].cpu().float(), values.float())
    got = logits(fast, x.to(device, torch.float16)).cpu()
    assert_within(got, logits(reference, x), QUANTIZED_LOGITS)
    meta = copy.deepcopy(fast).to("meta")
    assert meta.blocks[0].attn.qkv.weight.is_meta and meta.blocks[0].attn.qkv.weight_scale.is_meta
    deit_fast.restore(fast)
    assert fast.blocks[0].attn.qkv.weight.dtype == torch.float16
    half = reference.blocks[0].attn.qkv.weight.half()
    assert torch.equal(fast.blocks[0].attn.qkv.weight.cpu(), half)


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_state_dict_through_safetensors(format, tmp_path):
    x = torch.randn(2, 3, 64, 64)
    _, fast = quantized_pair(format, calibration=x if format == "fp8" else None)
    file = tmp_path / "model.safetensors"
    state = fast.state_dict()
    static = ["blocks.0.attn.proj.input_scale", "blocks.0.mlp.fc2.input_scale"]
    assert [n for n in state if n.startswith("blocks.0.") and n.endswith("input_scale")] == (
        static if format == "fp8" else []
    )
    assert state["blocks.0.mlp.fc1.weight_scale"].shape == (256,)
    safetensors.torch.save_file(state, file)
    other = deit_fast.create_model("deit_tiny_distilled_patch16_224", **TINY).eval()
    deit_fast.quantize(other, format)
    assert not torch.equal(logits(other, x), logits(fast, x))
    other.load_state_dict(safetensors.torch.load_file(file))
    assert torch.equal(logits(other, x), logits(fast, x))
    # what it was made of is no longer what it holds
    deit_fast.restore(other)
    own = dequantize(fast.blocks[1].attn.proj.operand)
    assert torch.equal(other.blocks[1].attn.proj.weight, own)
    assert isinstance(other.blocks[1].attn.proj.weight, torch.nn.Parameter)


def test_scales_that_are_none_are_refused():
    _, fast = quantized_pair("fp8")
    x, state = images(fast), fast.state_dict()
    expected = logits(fast, x)
    for value in (0.0, torch.nan, torch.inf, -1.0):
        broken = state | {"blocks.0.mlp.fc2.input_scale": torch.full((1, 1), value)}
        with pytest.raises(RuntimeError, match="input_scale has values that are not positive"):
            fast.load_state_dict(broken)
    _, fast = quantized_pair("fp8")
    name = "blocks.0.attn.qkv.weight"
    with pytest.raises(RuntimeError, match="size mismatch"):
        fast.load_state_dict({name: state[name][:1]}, strict=False)
    assert torch.equal(logits(fast, x), expected)
    layer = fast.blocks[0].attn.qkv
    assert layer._original is not None
    fast.load_state_dict({"blocks.0.attn.qkv.weight_scale": 2 * layer.weight_scale}, strict=False)
    doubled = dequantize(layer.operand)
    deit_fast.restore(fast)
    assert torch.equal(fast.blocks[0].attn.qkv.weight, doubled)


def test_weights_of_another_format_are_refused():
    reference, fast = quantized_pair("fp8")
    before = copy.deepcopy(fast.state_dict())
    with pytest.raises(
        RuntimeError, match=r"qkv.weight has torch.float32, expected torch.float8_e4m3"
    ):
        fast.load_state_dict(reference.state_dict(), strict=False)
    _, other = quantized_pair("int8")
    with pytest.raises(RuntimeError, match=r"expected torch.float8_e4m3fn: deit_fast.restore"):
        fast.load_state_dict(other.state_dict(), strict=False)
    for name in LAYERS:
        for part in ("weight", "weight_scale"):
            now = fast.state_dict()[f"{name}.{part}"].float()
            assert torch.equal(now, before[f"{name}.{part}"].float())
    with pytest.raises(RuntimeError, match="weight_scale"):
        deit_fast.create_model("deit_tiny_distilled_patch16_224", **TINY).load_state_dict(before)


@pytest.mark.parametrize("format, attention", [("fp8", False), ("fp8", True), ("int8", False)])
def test_folders(format, attention, tmp_path):
    seed(0)
    model = deit_fast.create_model("deit_tiny_distilled_patch16_224", backend="torch", **TINY)
    randomize(model).eval().half()
    deit_fast.quantize(model, format, exclude="blocks.0.attn.*", attention=attention)
    deit_fast.save_pretrained(model, tmp_path)
    again = deit_fast.from_pretrained(tmp_path, backend="torch").eval()
    assert quantized_layers(again) == quantized_layers(model)
    assert again.blocks[1].mlp.fc1.weight.dtype == model.blocks[1].mlp.fc1.weight.dtype
    x = images(model)
    assert torch.equal(logits(again, x), logits(copy.deepcopy(model).float(), x))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["deit_fast"]["quantized"]["format"] == format
    good = config["deit_fast"]["quantized"]
    for wrong in ({"format": "fp4"}, {"layers": ["blocks.7.attn.qkv"]}, {"layers": None}):
        config["deit_fast"]["quantized"] = good | wrong
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="config.json has a wrong 'quantized'"):
            deit_fast.from_pretrained(tmp_path)
    config["deit_fast"]["quantized"] = good | {"layers": good["layers"][1:]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weight_scale"):
        deit_fast.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("format", [slow("fp8"), "int8"])
def test_copies_pickles_and_compilation(format):
    _, fast = quantized_pair(format)
    x = images(fast)
    expected = logits(fast, x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for again in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(logits(again, x), expected)
        assert not quantized_layers(deit_fast.restore(again))
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, x), expected)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        # rounded to bf16 first: more numbers go to a neighbour
        assert_within(fast(x), expected, QUANTIZED_LOGITS / 2)


def test_a_sample_that_is_not_a_number_stays_alone():
    for format in ("fp8", "int8"):
        _, fast = quantized_pair(format)
        x = images(fast, 3)
        expected = logits(fast, x)
        for bad in (torch.nan, torch.inf):
            x[1, 0, 5, 5] = bad
            got = logits(fast, x)
            assert got[1].isnan().all(), (format, bad)
            assert_close(got[[0, 2]], expected[[0, 2]])


def test_models_and_names_that_do_not_fit():
    reference, fast = tiny_pair()
    types = [type(m) for m in fast.modules()]
    for model, options, error, message in (
        (reference, {}, ValueError, "has timm's blocks, call deit_fast.accelerate first"),
        (torch.nn.Linear(3, 4), {}, ValueError, "Linear has no Block"),
        (fast, {"format": "fp4"}, ValueError, "format: 'fp4', expected one of"),
        (
            fast,
            {"exclude": "blocks.2.*"},
            ValueError,
            r"'blocks.2.\*' is none of the 8 layers, expected",
        ),
        (fast, {"exclude": "blocks.*"}, ValueError, "no layer can be quantized"),
        (
            fast,
            {"format": "int8", "calibration": [1]},
            ValueError,
            "int8 has dynamic activation scales",
        ),
        (fast, {"format": "int8", "attention": True}, ValueError, "there is no int8 attention"),
        (copy.deepcopy(fast).double(), {}, TypeError, "torch.float64, expected float32"),
    ):
        with pytest.raises(error, match=message):
            deit_fast.quantize(model, **options)
    for name, message in (
        ("blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc1.weight has values that are not finite"),
        ("blocks.1.norm2.bias", "the scale of blocks.1.mlp.fc2 would be nan"),
    ):
        broken = copy.deepcopy(fast)
        broken.get_parameter(name).data.view(-1)[3] = torch.nan
        with pytest.raises(ValueError, match=message):
            deit_fast.quantize(broken)
        assert not quantized_layers(broken)
    pruned = copy.deepcopy(fast)
    prune.l1_unstructured(pruned.blocks[0].mlp.fc1, "weight", 0.5)
    assert "or a changed one" in str(deit_fast.quantize(pruned))
    with pytest.raises(ValueError, match="attention: in no block are qkv"):
        deit_fast.quantize(copy.deepcopy(fast), exclude="*.proj", attention=True)
    assert [type(m) for m in fast.modules()] == types
    deit_fast.quantize(fast)
    with pytest.raises(ValueError, match="is quantized already"):
        deit_fast.quantize(fast)


@pytest.mark.parametrize(
    "capability, format, reason",
    [((8, 0), "fp8", "needs compute capability 8.9; int8"), ((7, 5), "int8", "from compute")],
)
def test_a_gpu_that_does_not_support_the_format(capability, format, reason):
    """Raised by quantize, and by the call if the model was moved there later."""
    _, fast = tiny_pair("auto")
    with _chips.simulate_device(_chips.Chip("a chip", capability, 108)):
        with pytest.raises(RuntimeError, match=f"on a GPU of .*{reason}"):
            deit_fast.quantize(fast, format)
    assert not quantized_layers(fast)
    deit_fast.quantize(fast, format)
    with _chips.simulate_device(_chips.Chip("a chip", capability, 108)), torch.no_grad():
        with pytest.raises(RuntimeError, match=reason):
            fast.blocks[0](torch.randn(1, 5, 64))


def test_a_layer_alone():
    """What holds a QuantizedLinear may call it: masks go through timm's own attention."""
    for format in ("fp8", "int8"):
        reference, fast = quantized_pair(format)
        x, mask = torch.randn(2, 18, 64), torch.rand(18, 18) > 0.2
        got = fast.blocks[0](x, attn_mask=mask)
        assert_within(got, reference.blocks[0](x, attn_mask=mask), QUANTIZED_BLOCK)
        for name in ("attn", "mlp"):
            got, expected = (getattr(m.blocks[0], name)(x) for m in (fast, reference))
            assert_differ(got, expected, name)
            assert_within(got, expected, QUANTIZED_BLOCK, name)
        assert type(fast.blocks[0].attn.qkv) is QuantizedLinear
        layer = fast.blocks[0].attn.qkv
        for backend in ("auto", "torch"):
            deit_fast.accelerate(fast, backend)
            assert layer.backend == backend
        expected = (
            dequantize(quantize_reference(x, format)) @ dequantize(layer.operand).t() + layer.bias
        )
        assert_close(layer(x), expected)


@pytest.mark.slow
def test_gradients_are_refused_when_they_are_asked_for():
    """Not before: whoever forgets no_grad gets his logits, compiled too."""
    _, fast = quantized_pair("fp8")
    x = images(fast)
    expected = logits(fast, x)
    torch._dynamo.reset()
    for model in (fast, torch.compile(fast, fullgraph=True, backend="aot_eager")):
        y = model(x)
        assert y.requires_grad
        assert_close(y, expected)
        with pytest.raises(RuntimeError, match="quantized operations are for inference"):
            y.sum().backward()


def test_one_layer_restored_by_itself():
    """proj alone: attention then reads values in the model's dtype, not quantized ones."""
    reference, fast = quantized_pair("fp8")
    undo(fast)
    deit_fast.quantize(fast, "fp8", attention=True)
    fast.blocks[0].attn.proj.restore()
    x = images(fast)
    assert_within(logits(fast, x), logits(reference, x), QUANTIZED_LOGITS)


def test_a_block_of_zeros(device):
    """As some are initialised: every scale is the least there is."""
    _, fast = tiny_pair("triton", img_size=32, depth=1)
    for t in fast.blocks[0].attn.parameters():
        t.data.zero_()
    expected = logits(fast.to(device), images(fast).to(device))
    deit_fast.quantize(fast, "fp8", exclude="*.mlp.*", attention=True)
    assert_close(logits(fast, images(fast).to(device)), expected)


@pytest.mark.gpu("a real capture of a quantized model")
@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_cuda_graph(format):
    _, fast = tiny_pair("auto")
    deit_fast.quantize(fast.cuda(), format)
    assert fast.blocks[0].attn.qkv._original.device.type == "cpu"
    fast.bfloat16()
    x = images(fast, 8).cuda().bfloat16()
    expected = logits(fast, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        got = fast(x)
    graph.replay()
    assert torch.equal(got, expected)
