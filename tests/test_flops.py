"""FlopCounterMode counts an accelerated model as it counts timm's with plain attention."""

from functools import partial

import pytest
import torch
from modelling import pair, tiny_pair
from tiers import slow, slow_but
from timm.models import VisionTransformer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import deit_fast
from deit_fast import kernels
from deit_fast.kernels import cases

# without it Triton raises on a machine that has no GPU
pytestmark = pytest.mark.usefixtures("device")

SIZE = 32  # pixels: 2 x 2 patches
CAIT = {"embed_dim": 192, "num_heads": 4, "depth": 1, "depth_token_only": 1, "num_classes": 11}
TINY_VIT = {  # a map of 4 x 4, no multiple of its windows
    "embed_dims": (16, 64), "depths": (1, 1), "num_heads": (1, 2), "window_sizes": (7, 3),
    "num_classes": 11,
}  # fmt: skip
MODELS = {
    "deit": partial(tiny_pair, distilled=False, img_size=SIZE),
    "distilled": partial(tiny_pair, img_size=SIZE),
    "cait": partial(pair, "cait_xxs24_224", img_size=SIZE, **CAIT),
    "tiny_vit": partial(pair, "tiny_vit_5m_224", **TINY_VIT),
}


def counted(call):
    """FLOPs of a call, and its result. PyTorch's own attention is counted as its matmuls."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


def inference(model, x):
    """FLOPs without gradients. Parameters require none either: the counter fails on an expanded one
    that does, as timm's CaiT has."""
    model.requires_grad_(False)
    with torch.no_grad():
        found, _ = counted(lambda: model(x))
    model.requires_grad_()
    return found


def training(call):
    """FLOPs of a forward pass with gradients, and of the backward pass."""
    forward, y = counted(call)
    return forward, counted(lambda: y.backward(torch.randn_like(y)))[0]


def pixels(device="meta"):
    return torch.randn(2, 3, SIZE, SIZE, device=device)


def expected_flops(reference, pruned=True, backend="triton"):
    """Of inference, of a forward pass and of a backward pass: timm's; of DeiT less what the last
    block saves where it runs for the prefix tokens alone, and in Triton with the rows of zeros that
    are part of the GEMM for the gradient of the patch embedding's weight."""
    for module in reference.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    x = pixels()
    reference = reference.to("meta")
    found = inference(reference, x), *training(lambda: reference(x))
    if not isinstance(reference, VisionTransformer):
        return found
    B, D, T = len(x), reference.embed_dim, reference.num_prefix_tokens
    n = reference.patch_embed.num_patches
    # queries, projection, Q K^T, P V, fc1, fc2
    saved = 2 * B * n * D * (D + D + (T + n) + (T + n) + 4 * D + 4 * D) if pruned else 0
    zeros = 2 * B * T * D * 3 * 16**2 if backend == "triton" else 0
    return found[0] - saved, found[1] - saved, found[2] - 2 * saved + zeros


@pytest.mark.parametrize("backend", ["triton", slow("torch")])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, backend):
    """On the meta device."""
    reference, fast = MODELS[name](backend)
    fast, x = fast.to("meta"), pixels()
    assert (inference(fast, x), *training(lambda: fast(x))) == expected_flops(
        reference, backend=backend
    )


@pytest.mark.parametrize("name", slow_but(MODELS, "distilled"))
def test_models_that_compute(name, device):
    reference, fast = MODELS[name]("triton")
    fast, x = fast.to(device), pixels(device)
    assert (inference(fast, x), *training(lambda: fast(x))) == expected_flops(reference)


@pytest.mark.parametrize("name", ["deit", "distilled"])
def test_features_of_all_tokens(name):
    reference, fast = MODELS[name]("triton")
    fast, x = fast.to("meta"), pixels()
    fast.forward, reference.forward = fast.forward_features, reference.forward_features
    assert (inference(fast, x), *training(lambda: fast(x))) == expected_flops(
        reference, pruned=False
    )


def test_fake_tensors(device):
    reference, fast = MODELS["distilled"]("triton")
    expected = expected_flops(reference)[0]
    fast = fast.to(device)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert counted(lambda: fast(pixels(device)))[0] == expected


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_quantized_models(format, device):
    reference, fast = MODELS["distilled"]("triton")
    deit_fast.quantize(fast.to(device), format)
    with torch.no_grad():
        found, _ = counted(lambda: fast(pixels(device)))
    assert found == expected_flops(reference)[0]


def test_every_operator_has_a_formula():
    """One without matmuls says so: see `_dispatch.no_flops`."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    ours = {name.split("::")[1] for name in names if name.startswith("deit_fast::")}
    assert "linear" in ours
    assert not [name for name in ours if getattr(torch.ops.deit_fast, name) not in flop_registry]


# operation and what is special about it: its implementation, its inputs
TRAINED = {
    "layer_norm": ("triton", partial(cases.layer_norm_inputs, (6, 64))),
    "linear": ("triton", partial(cases.linear_inputs, 6, 2, 64, 32, layer_scale=True)),
    "linear, cuBLAS": ("cublas", partial(cases.linear_inputs, 6, 2, 64, 32, activation="gelu")),
    "attention": ("triton", partial(cases.attention_inputs, 2, 3, 2, 5, 48)),
    "talking_heads_attention": ("triton", partial(cases.talking_heads_inputs, 2, 4, 5, 32)),
    "window_attention": ("triton", partial(cases.window_attention_inputs, 2, 6, 3, 2, 3)),
    "layer_norm_attention": (
        "triton", partial(cases.layer_norm_attention_inputs, 2, 3, 5, 100, 32),
    ),
    "layer_norm_attention, cuBLAS": (
        "cublas", partial(cases.layer_norm_attention_inputs, 2, 3, 5, 100, 32),
    ),
    "layer_norm_mlp": ("triton", partial(cases.layer_norm_mlp_inputs, 6, 2, 100, 64)),
    "layer_norm_mlp, cuBLAS": ("cublas", partial(cases.layer_norm_mlp_inputs, 6, 2, 100, 64)),
    "classifier": ("triton", partial(cases.classifier_inputs, 2, 5, 64, 7)),
    "patch_embed": (
        "triton", partial(cases.patch_embed_inputs, 2, (16, 24), (8, 8), 3, 32, 0, False),
    ),
    "patch_embed, bytes": (
        "triton", partial(cases.patch_embed_inputs, 2, (16, 24), (8, 8), 3, 32, 0, False, True),
    ),
    "distillation_loss": ("triton", partial(cases.distillation_loss_inputs, 3, 7)),
    "sparse_cross_entropy": ("triton", partial(cases.sparse_cross_entropy_inputs, 3, 7, 2)),
}  # fmt: skip
OPERATIONS = TRAINED | {
    "attention, a bias": ("triton", partial(cases.attention_inputs, 2, 3, 2, 5, 48, bias=True)),
    "attention_quantized": (
        "triton", partial(cases.attention_quantized_inputs, 2, 3, 5, 64, "fp8"),
    ),
    "classifier, one head": (
        "triton", lambda **on: cases.classifier_inputs(2, 5, 64, 7, **on) | {"fusion": "distill"},
    ),
    "conv_norm": ("triton", partial(cases.conv_norm_inputs, 2, 8, 16, 6, 6, 3, 2, 1)),
    "conv_norm, a matmul": ("triton", partial(cases.conv_norm_inputs, 2, 8, 16, 4, 6, 1)),
    "conv_norm, depthwise": ("triton", partial(cases.conv_norm_inputs, 2, 8, 8, 4, 6, 3, 1, 1, 8)),
    "layer_norm_linear": ("fold", partial(cases.layer_norm_linear_inputs, 6, 64, 32)),
    "layer_norm_linear, prologue": (
        "prologue", partial(cases.layer_norm_linear_inputs, 6, 64, 32),
    ),
    "layer_norm_mlp, fused": (
        "fused", partial(cases.layer_norm_mlp_inputs, 6, 2, 192, 64, scales=False),
    ),
    "layer_norm_quantized": ("triton", partial(cases.layer_norm_inputs, (6, 64))),
    "patch_embed, prefix": (
        "triton", partial(cases.patch_embed_inputs, 2, (16, 24), (8, 8), 3, 32, 2, True),
    ),
    "quantize": ("triton", partial(cases.quantize_inputs, (6, 64), 2)),
    "quantized_linear": (
        "triton", partial(cases.quantized_linear_inputs, 6, 2, 64, 32, 2, dtype=torch.float32),
    ),
}  # fmt: skip
CONSTANTS = ("row_scale", "target", "teacher_logits", "probs")


def operation(name, on):
    """The operation, its reference, and inputs for both."""
    implementation, inputs = OPERATIONS[name]
    dtype = torch.float16 if implementation in ("fold", "prologue", "fused") else torch.float32

    def moved(t):
        return t.to(on, dtype if t.dtype == torch.float32 else t.dtype)

    inputs, name = tree_map_only(torch.Tensor, moved, inputs()), name.partition(",")[0]
    if name == "layer_norm_mlp":
        inputs["residual"] = inputs["x"]
    run = partial(getattr(kernels, name), implementation=implementation)
    return run, getattr(kernels, f"{name}_reference"), inputs


@pytest.mark.parametrize("on", ["meta", "device"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_in_inference(name, on, device):
    run, reference, inputs = operation(name, device if on == "device" else on)
    assert counted(lambda: run(**inputs))[0] == counted(lambda: reference(**inputs))[0]


@pytest.mark.parametrize("on", ["meta", "device"])
@pytest.mark.parametrize("name", TRAINED)
def test_operations_in_training(name, on, device):
    run, reference, inputs = operation(name, device if on == "device" else on)
    for key, t in inputs.items():
        if torch.is_tensor(t) and t.is_floating_point() and key not in CONSTANTS:
            t.requires_grad_()
    assert training(lambda: run(**inputs)) == training(lambda: reference(**inputs))
