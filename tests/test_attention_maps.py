"""Attention maps against timm's own softmax; and the model is not changed."""

import copy

import numpy as np
import pytest
import timm
import torch
from checking import (
    BF16,
    FP16,
    NEIGHBOURS,
    assert_as_accurate,
    assert_close,
    assert_differ,
    assert_equal,
    assert_within,
    relative_error,
    seeded,
)
from modelling import images, pair, randomize, timms_softmax, tiny_pair
from tiers import slow_but
from torch import nn

import deit_fast
from deit_fast.attention_weights import token_maps
from deit_fast.kernels.patch_embed import normalize_reference
from deit_fast.kernels.quantize import (
    dequantize,
    quantize_reference,
    quantize_statically_reference,
)

CAIT = {"embed_dim": 96, "num_heads": 2, "depth": 2, "depth_token_only": 2, "img_size": 48}


def tiny_cait(backend="torch", **kwargs):
    return pair("cait_xxs24_224", backend, **CAIT | kwargs)


def assert_timms(found, reference, x):
    """As accurate as timm's against fp64, of the same x; rows sum to 1."""
    expected = timms_softmax(reference, x)
    true = timms_softmax(copy.deepcopy(reference).double(), x.double())
    assert list(found) == list(expected)
    for name, p in found.items():
        assert p.dtype == torch.float32 and not p.requires_grad
        assert_as_accurate(p, expected[name], true[name], name)
        assert_close(p.sum(-1), torch.ones_like(p[..., 0]), f"rows of {name}")
        assert_differ(p[0], p[1])


MODELS = {
    "distilled": tiny_pair,
    "one token": lambda backend: tiny_pair(backend, distilled=False),
    "q and k normalised": lambda backend: tiny_pair(backend, distilled=False, qk_norm=True),
    "attention alone is ours": lambda backend: tiny_pair(backend, act_layer=nn.ReLU),
    "registers, mean of patches": lambda backend: tiny_pair(
        backend, distilled=False, reg_tokens=3, class_token=False, global_pool="avg"
    ),
    "LayerScale": lambda backend: tiny_pair(backend, distilled=False, init_values=0.5),
    "CaiT": tiny_cait,
    "CaiT, attention alone is ours": lambda backend: tiny_cait(backend, act_layer=nn.ReLU),
}


@pytest.mark.parametrize("kind", MODELS)
def test_timms_own_softmax(kind):
    reference, fast = MODELS[kind]("torch")
    x = images(reference)
    for model in (reference, fast):
        for module in (m for m in model.modules() if hasattr(m, "scale")):
            module.scale *= 0.8  # timm's fused attention knows only that of the head dimension
            module.fused_attn = False
    for model in (reference, fast):
        assert_timms(deit_fast.attention_maps(model, x), reference, x)


@pytest.mark.parametrize("kind", slow_but(list(MODELS), "distilled", "CaiT"))
def test_timms_own_softmax_from_kernels(kind, device):
    reference, fast = MODELS[kind]("triton")
    x = images(reference).to(device)
    reference, fast = reference.to(device), fast.to(device)
    assert_timms(deit_fast.attention_maps(fast, x), reference, x)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("make", [tiny_pair, tiny_cait])
def test_half_precision(make, dtype):
    reference, fast = (model.to(dtype) for model in make())
    x = images(reference)  # in fp32: it is rounded as the model is
    for model in (reference, fast):
        assert_timms(deit_fast.attention_maps(model, x), reference, x.to(dtype))


@pytest.mark.parametrize("make", [tiny_pair, tiny_cait])
def test_autocast(make):
    reference, fast = make()
    x = images(reference)
    for model in (reference, fast):
        with torch.autocast("cpu", BF16):
            found, expected = deit_fast.attention_maps(model, x), timms_softmax(reference, x)
        true = timms_softmax(copy.deepcopy(reference).double(), x.double())
        for name, p in found.items():
            assert p.dtype == torch.float32
            assert_as_accurate(p, expected[name], true[name], name)
            assert_close(p.sum(-1), torch.ones_like(p[..., 0]), name)


def test_sizes_that_are_not_square():
    for options, size in (
        ({"img_size": (32, 80)}, (32, 80)),
        ({"dynamic_img_size": True}, (48, 96)),
        ({"dynamic_img_size": True, "dynamic_img_pad": True}, (50, 30)),
    ):
        reference, fast = tiny_pair(**options)
        x = images(reference, size=size)
        grid = tuple(-(-side // 16) for side in size)
        for model in (reference, fast):
            found = deit_fast.attention_maps(model, x)
            assert_timms(found, reference, x)
            maps = token_maps(model, x, found["blocks.1"])
            assert [of.shape for of in maps.values()] == [(2, 2, *grid)] * 2


@pytest.mark.parametrize("make", [tiny_pair, tiny_cait])
def test_uint8_images(make):
    reference, fast = make()
    size = reference.patch_embed.img_size
    generator = torch.Generator().manual_seed(seeded(1))
    pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=generator)
    config = reference.pretrained_cfg
    x = normalize_reference(pixels, config["mean"], config["std"])
    for model in (reference, fast):
        assert_close(deit_fast.attention_maps(model, pixels), deit_fast.attention_maps(model, x))
        assert_timms(deit_fast.attention_maps(model, pixels), reference, x)


def softmax(qkv):
    """Of two heads of 32 features."""
    q, k, _ = qkv.unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(2, 3) / 32**0.5).softmax(-1)


@pytest.mark.parametrize("variant", ["fp8", "fp8, attention too", "int8", "int8, proj alone"])
def test_quantized_layers(variant):
    """q and k by the reference quantization of the block's own input. A few values round to the
    neighbour: much less than the quantization error."""
    reference, fast = tiny_pair()
    exclude = ["*.qkv"] if "alone" in variant else ()
    deit_fast.quantize(fast, variant[:4].strip(","), None, exclude, "too" in variant)
    x, inputs = images(reference, batch=4), {}
    for i, block in enumerate(fast.blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: inputs.update({i: args[0]}))
    found = deit_fast.attention_maps(fast, x)
    for i, block in enumerate(fast.blocks):
        exact = reference.blocks[i]
        u = exact.norm1(inputs[i])
        qkv, layer = exact.attn.qkv(u), block.attn.qkv
        unrounded = qkv
        if not exclude:
            u, weight = (
                dequantize(quantize_reference(t, layer.format)) for t in (u, exact.attn.qkv.weight)
            )
            qkv = u @ weight.T + layer.bias
        if "too" in variant:
            qkv = dequantize(quantize_statically_reference(qkv, layer.output_scale))
        expected, plain = (
            (q @ k.transpose(2, 3) * exact.attn.scale).softmax(-1)
            for q, k, _ in (
                t.unflatten(2, (3, 2, 32)).permute(2, 0, 3, 1, 4) for t in (qkv, unrounded)
            )
        )
        got = found[f"blocks.{i}"]
        if exclude:
            assert_close(got, expected)
            continue
        assert_differ(expected, plain)
        assert_within(got, expected, NEIGHBOURS * relative_error(expected, plain))


# The model is not changed


def state(model):
    """{module: its class and attributes}, with dictionaries of hooks and parameters as lists."""
    return {
        name: {"class": type(module)}
        | {
            key: [part for pair in held.items() for part in pair] if type(held) is dict else held
            for key, held in module.__dict__.items()
        }
        for name, module in model.named_modules()
    }


def assert_same_state(after, before):
    assert after.keys() == before.keys()
    for name, held in before.items():
        assert after[name].keys() == held.keys(), name
        for key, value in held.items():
            now = after[name][key]
            if isinstance(value, list):
                assert len(now) == len(value), (name, key)
                assert all(a is b for a, b in zip(now, value, strict=True)), (name, key)
            else:
                assert now is value or now == value, (name, key)


@pytest.mark.parametrize("fast", [0, 1])
@pytest.mark.parametrize("make", [tiny_pair, tiny_cait])
def test_the_model_is_never_changed(make, fast):
    """Not even in the middle of a call, in which another thread may be using it."""
    model = make()[fast]
    x, outputs, states, inside = images(model), [], [], []

    def another(*_):
        if not inside:
            inside.append(True)
            states.append(state(model))
            with torch.no_grad():
                outputs.append(model(x))

    model.blocks[0].register_forward_hook(another)
    with torch.no_grad():
        model(x)
    ((before,), (expected,)) = states, outputs
    inside.clear()
    deit_fast.attention_maps(model, x)
    with torch.no_grad():
        outputs.append(model(x))
    assert len(states) == 2
    assert_equal(outputs, [expected] * 3)
    for after in (states[1], state(model)):
        assert_same_state(after, before)


def counted(model, call):
    """{name: how often its hooks fired}"""
    counts, hooks = dict.fromkeys(dict(model.named_modules()), 0), []
    for name, module in model.named_modules():

        def count(*_, name=name):
            counts[name] += 1

        hooks += [module.register_forward_hook(count), module.register_forward_pre_hook(count)]
    call()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("make", [tiny_pair, tiny_cait])
def test_hooks_fire_as_in_one_forward_pass(make):
    for model in make():
        x = images(model)
        expected = counted(model, lambda model=model, x=x: model(x))
        assert (
            counted(model, lambda model=model, x=x: deit_fast.attention_maps(model, x)) == expected
        )
        assert max(expected.values()) >= 2


class Adapted(nn.Module):
    """A Linear plus a low-rank one (LoRA)."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 4, bias=False)
        self.up = nn.Linear(4, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


def test_what_is_in_place_of_a_layer_is_called():
    reference = tiny_pair()[0]
    reference.blocks[0].attn.qkv = Adapted(reference.blocks[0].attn.qkv)
    randomize(reference, seed=3)
    fast, x = copy.deepcopy(reference), images(reference)
    deit_fast.accelerate(fast, "torch")
    for model in (reference, fast):
        assert_timms(deit_fast.attention_maps(model, x), reference, x)


@pytest.mark.parametrize("name", ["norm1", "attn", "attn.qkv", "attn.k_norm"])
def test_what_hooks_change_is_changed(name):
    reference = tiny_pair(distilled=False, qk_norm=True)[0]
    x = images(reference)
    before = deit_fast.attention_maps(reference, x)
    module = reference.blocks[0].get_submodule(name)
    module.register_forward_hook(lambda module, args, y: 1.5 * y)
    found = deit_fast.attention_maps(reference, x)
    assert_timms(found, reference, x)
    assert_differ(found["blocks.1"], before["blocks.1"])


def test_a_compiled_model():
    """The copy of a compiled model is not compiled."""
    for model in tiny_pair():
        x = images(model)
        expected = deit_fast.attention_maps(model, x)
        never = {"backend": lambda *_: pytest.fail("compiled")}
        assert_equal(deit_fast.attention_maps(torch.compile(model, **never), x), expected)
        for module in (model, model.blocks):
            module.compile(**never)
        assert_equal(deit_fast.attention_maps(model, x), expected)


# Which blocks


def test_blocks_by_number():
    for make, names in (
        (tiny_pair, ["blocks.0", "blocks.1"]),
        (tiny_cait, ["blocks.0", "blocks.1", "blocks_token_only.0", "blocks_token_only.1"]),
    ):
        for model in make():
            x, L = images(model), len(names)
            every = deit_fast.attention_maps(model, x)
            assert list(every) == names
            for numbers, places in (
                (-1, [L - 1]), ([L - 1, 0], [0, L - 1]), ((-L, 0), [0]), (np.int64(1), [1]),
                (torch.arange(1, 2), [1]),
            ):  # fmt: skip
                got = deit_fast.attention_maps(model, x, numbers)
                assert list(got) == [names[i] for i in places]
                assert_close(got, {name: every[name] for name in got})
            for wrong in (L, -L - 1, [0, L]):
                with pytest.raises(ValueError, match=f"blocks: -?{L}|blocks: -{L + 1}, expected"):
                    deit_fast.attention_maps(model, x, wrong)


def test_errors():
    model = tiny_pair()[1]
    x = images(model)
    for wrong, error, message in (
        ([], ValueError, "blocks: none, expected a number at least"),
        (1.0, TypeError, "blocks: 1.0, expected whole numbers"),
        ("1", TypeError, "blocks: '1', expected whole numbers"),
    ):
        with pytest.raises(error, match=message):
            deit_fast.attention_maps(model, x, wrong)
    for call in (deit_fast.attention_maps, deit_fast.attention_rollout):
        for wrong, error, message in (
            (x.numpy(), TypeError, "images: a ndarray, expected a tensor"),
            (x.long(), TypeError, "images: torch.int64, expected floats"),
            (x[0], ValueError, r"images: shape \(3, 64, 64\), expected \(B, C, H, W\)"),
            (x[0].byte(), ValueError, r"expected \(B, H, W, C\) of uint8"),
        ):
            with pytest.raises(error, match=message):
                call(model, wrong)
        with pytest.raises(ValueError, match="model: in train mode, expected"):
            call(copy.deepcopy(model).train(), x)


def test_models_that_have_no_such_attention():
    vit, x = "deit_tiny_patch16_224", torch.zeros(1, 3, 64, 64)
    small = {"embed_dim": 64, "num_heads": 2, "depth": 1, "img_size": 64}
    for name, options, message in (
        ("tiny_vit_5m_224", {}, "model: TinyVit, expected timm's VisionTransformer"),
        ("test_resnet", {}, "model: ResNet, expected timm's VisionTransformer"),
        (
            vit,
            {"block_fn": timm.models.vision_transformer.ParallelScalingBlock, **small},
            "model: blocks.0 is a ParallelScalingBlock, expected one of Block, LayerScaleBlock",
        ),
        (vit, {"attn_layer": "diff", **small}, "model: blocks.0.attn is a DiffAttention, expected"),
    ):
        model = timm.create_model(name, **options).eval()
        with pytest.raises(ValueError, match=message):
            deit_fast.attention_maps(model, x)
    model = tiny_pair()[0]
    model.blocks[1].forward = model.blocks[1].forward
    with pytest.raises(RuntimeError, match="model: blocks.1 was not seen: it, or what it is in"):
        deit_fast.attention_maps(model, x)
