"""Pairs of models with the same random weights: timm's and the accelerated one."""

import contextlib
import copy

import numpy as np
import timm
import torch
from checking import (
    BF16,
    FP16,
    as_list,
    assert_as_accurate,
    assert_close,
    assert_gradients_as_accurate,
    seed,
    seeded,
)
from PIL import Image

import deit_fast
from deit_fast.bench import weights

TINY = {"embed_dim": 64, "num_heads": 2, "depth": 2, "img_size": 64, "num_classes": 11}
SMALL_TINY_VIT = {  # a stage of each kind
    "embed_dims": (16, 64), "depths": (1, 1), "num_heads": (1, 2), "window_sizes": (7, 4),
    "num_classes": 11, "drop_path_rate": 0.0,
}  # fmt: skip
SMALL_CAIT = {
    "embed_dim": 96, "num_heads": 2, "depth": 2, "depth_token_only": 1, "img_size": 32,
    "num_classes": 11,
}  # fmt: skip


def randomize(model, seed=0):
    """Every parameter random, others for each --seed."""
    return weights.randomize(model, seeded(seed))


def pair(name="deit_tiny_distilled_patch16_224", backend="torch", **kwargs):
    """(timm's model, the accelerated copy), in eval mode."""
    seed(0)
    reference = randomize(timm.create_model(name, **kwargs)).eval()
    fast = copy.deepcopy(reference)
    deit_fast.accelerate(fast, backend)
    return reference, fast


def tiny_pair(backend="torch", distilled=True, **kwargs):
    name = f"deit_tiny{'_distilled' if distilled else ''}_patch16_224"
    return pair(name, backend, **TINY | kwargs)


def images(model, batch=2, size=None):
    seed(1)
    size = size or model.patch_embed.img_size
    return torch.randn(batch, model.patch_embed.proj.in_channels, *size)


def assert_same_logits(reference, fast, x):
    """At most twice timm's own fp32 error against fp64, with and without gradients."""
    exact = copy.deepcopy(reference).double()
    with torch.no_grad():
        true, expected = exact(x.double()), reference(x)
        assert_as_accurate(fast(x), expected, true, "inference")
    assert_as_accurate(fast(x), expected, true, "with gradients on")


# name: (dtype of the weights, dtype of autocast)
PRECISIONS = {
    "fp32": (None, None), "fp16": (FP16, None), "bf16": (BF16, None),
    "autocast fp16": (None, FP16), "autocast bf16": (None, BF16),
}  # fmt: skip


def autocast(device, dtype):
    return torch.autocast(device, dtype) if dtype else contextlib.nullcontext()


def gradients(model, x, dtype=None, draw=3, upstreams=1):
    """Of every parameter, by name, and the outputs: random upstream gradients (which bf16 holds)
    for each output; `dtype` of autocast, `draw` the seed of dropout and stochastic depth. With more
    than one of `upstreams` the gradients are stacked: a few roundings decide the error of all that
    one upstream gives, which may then be three times PyTorch's by chance."""
    weight = next(model.parameters())
    seed(draw)  # of stochastic depth and dropout
    with autocast(x.device.type, dtype):
        outputs = as_list(model(x.to(weight.dtype)))
    generator = torch.Generator().manual_seed(seeded(2))
    parameters, found = dict(model.named_parameters()), []
    for more in reversed(range(upstreams)):
        upstream = [torch.randn(t.shape, generator=generator).bfloat16() for t in outputs]
        upstream = [u.to(t) for u, t in zip(upstream, outputs, strict=True)]
        found.append(
            torch.autograd.grad(
                outputs, list(parameters.values()), upstream, allow_unused=True, retain_graph=more
            )
        )
    named = {
        name: of[0] if upstreams == 1 or of[0] is None else torch.stack(of)
        for name, of in zip(parameters, zip(*found, strict=True), strict=True)
    }
    return named | {f"output {i}": t.detach() for i, t in enumerate(outputs)}


def assert_training_as_accurate(reference, fast, x, dtype=None, upstreams=1):
    """Every parameter's error at most twice timm's own, both against timm in fp64."""
    ours, timms = (gradients(model, x, dtype, upstreams=upstreams) for model in (fast, reference))
    true = gradients(copy.deepcopy(reference).double(), x, upstreams=upstreams)
    computed = dtype or next(reference.parameters()).dtype
    assert_gradients_as_accurate(ours, timms, true, dtype=computed)


def assert_precision(reference, fast, x, precision, device, train=True):
    """Inference, with and without gradients, and a training step, in one of PRECISIONS."""
    weights, dtype = PRECISIONS[precision]
    models = reference, fast = (m.to(device, weights) for m in (reference, fast))
    x = x.to(device, weights)
    with torch.no_grad():
        true = copy.deepcopy(reference).double()(x.double())
        with autocast(x.device.type, dtype):
            expected, got = reference(x), fast(x)
    with autocast(x.device.type, dtype):
        graded = fast(x)
    for result in (got, graded):
        assert result.dtype == expected.dtype
        assert_as_accurate(result, expected, true, precision)
    for model in models:
        model.train(train)
    assert_training_as_accurate(reference, fast, x, dtype, upstreams=4)


def hooked(reference, fast, name):
    """What a forward hook on that module of each sees first, or None; logits are compared."""
    seen, x = {}, images(reference)
    for model in (reference, fast):

        def hook(module, args, out, model=model):
            seen.setdefault(id(model), out)

        model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        assert_close(fast(x), reference(x))
    return seen.get(id(reference)), seen.get(id(fast))


def timms_softmax(model, x):
    """{block: the softmax (B, heads, N, N) of timm's unfused attention}, of a plain timm model."""
    model, found = copy.deepcopy(model), {}
    for block, module in model.named_modules():
        attn = getattr(module, "attn", None)
        if attn is None:
            continue
        talking = hasattr(attn, "proj_w")
        attn.fused_attn = False

        def record(_, args, block=block, talking=talking):
            found[block] = args[0].permute(0, 3, 1, 2) if talking else args[0]

        reader = attn.proj_w if talking else attn.attn_drop
        reader.register_forward_pre_hook(record)
    with torch.no_grad():
        model(x)
    return found


def write_image(path, random, patches, size):
    """Write an image of (rows, columns) random colours, (width, height) pixels large."""
    path.parent.mkdir(exist_ok=True)
    pixels = random.integers(0, 256, (*patches, 3), np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path)
