"""Gradients of whole models against timm's on the same weights, and the tensors saved for them.

The judge is timm in fp64. Triton runs in the interpreter on shallow and narrow models whose heads
have 64 features as DeiT's do; the PyTorch backend runs the models themselves.
"""

import pytest
import torch
from checking import (
    BF16,
    FP16,
    as_list,
    assert_close,
    assert_differ,
    assert_gradients_close,
    seeded,
)
from modelling import assert_training_as_accurate, autocast, gradients, images, pair, tiny_pair
from tiers import slow, slow_but

import deit_fast

BACKENDS = ["torch", "triton"]
# The first block never drops a path and the last runs for some tokens alone: the second shows
# stochastic depth.
DEEPER = {"depth": 3, "num_heads": 1, "img_size": 48, "init_values": 0.5}
LOW = [(backend, dtype) for backend in BACKENDS for dtype in (FP16, BF16)]


def set_mode(models, mode):
    for model in models:
        model.train(mode != "eval")
        if mode == "distilled training":
            model.set_distilled_training(True)


def modes(name):
    return ["train", "eval"] + ["distilled training"] * ("distilled" in name)


# The interpreter takes seconds for a head at 198 tokens and minutes for a model at 578: tiny has
# all of its 197 and 198 tokens and one head, small and base more heads at fewer tokens, and a
# larger grid stands for 384 pixels.
NARROW = {
    "deit_tiny": {"embed_dim": 64, "num_heads": 1},
    "deit_small": {"embed_dim": 128, "num_heads": 2, "img_size": 48},
    "deit_base": {"embed_dim": 192, "num_heads": 3, "img_size": 48},
    "deit_base_384": {"embed_dim": 64, "num_heads": 1, "img_size": 112},
}


@pytest.mark.parametrize("name", slow_but(deit_fast.NAMES, "deit_tiny_distilled"))
def test_gradients_of_named_models_in_triton(name, device):
    options = NARROW[name.replace("_distilled", "")]
    reference, fast = pair(deit_fast.NAMES[name], "triton", depth=2, num_classes=11, **options)
    set_mode((reference, fast), modes(name)[-1] if "distilled" in name else "train")
    x = images(reference, batch=1).to(device)
    assert_training_as_accurate(reference.to(device), fast.to(device), x)


# fp64 takes a CPU long for the 12 blocks of the wider models: 2 of full width stand for them. Modes
# differ in nothing but the head, so these are not asked for each.
@pytest.mark.parametrize(
    "name, mode",
    [
        (name, mode) if name == "deit_tiny_distilled" else slow(name, mode)
        for name in deit_fast.NAMES
        for mode in (modes(name) if "tiny" in name else modes(name)[-1:])
    ],
)
def test_gradients_of_named_models_in_pytorch(name, mode):
    options = {} if "tiny" in name else {"depth": 2}
    reference, fast = pair(deit_fast.NAMES[name], "torch", **options)
    set_mode((reference, fast), mode)
    assert_training_as_accurate(reference, fast, images(reference, batch=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["train", "eval", "distilled training"])
def test_gradients_with_layer_scale(mode, backend, device):
    reference, fast = tiny_pair(backend, init_values=1e-4)
    set_mode((reference, fast), mode)
    x = images(reference).to(device)
    assert_training_as_accurate(reference.to(device), fast.to(device), x)


@pytest.mark.slow
def test_gradients_without_qkv_bias_for_a_pooled_mean(device):
    """No prefix token is read: the last block runs for all tokens."""
    options = {"qkv_bias": False, "global_pool": "avg", "fc_norm": False, "distilled": False}
    reference, fast = tiny_pair("triton", **options)
    set_mode((reference, fast), "train")
    x = images(reference).to(device)
    assert_training_as_accurate(reference.to(device), fast.to(device), x)


def test_autocast_rounds_no_gradient_of_a_bias(device):
    """Weights are cast for the matmuls, and their gradients come back through that."""
    _, fast = tiny_pair("triton", **DEEPER)
    fast = fast.to(device).train()
    found = gradients(fast, images(fast, batch=4).to(device), FP16)
    layers = "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"
    for name in (f"blocks.{i}.{layer}" for i in range(3) for layer in layers):
        weight, bias = found[f"{name}.weight"], found[f"{name}.bias"]
        assert torch.equal(weight, weight.half().float()), name
        assert not torch.equal(bias, bias.half().float()), name


@pytest.mark.slow
@pytest.mark.parametrize("backend, dtype", LOW)
def test_autocast_gradients(backend, dtype, device):
    """Weights, their gradients and the residual stream between blocks stay fp32."""
    reference, fast = tiny_pair(backend, depth=3, init_values=0.5)
    reference, fast = reference.to(device), fast.to(device)
    set_mode((reference, fast), "distilled training")
    x = images(reference, batch=4).to(device)
    assert_training_as_accurate(reference, fast, x, dtype)
    residuals = []
    fast.blocks[1].register_forward_hook(lambda module, args, y: residuals.append((args[0], y)))
    got = gradients(fast, x, dtype)
    assert all(got[n].dtype == torch.float32 for n, _ in fast.named_parameters())
    assert [[t.dtype for t in pair] for pair in residuals] == [[torch.float32] * 2]


@pytest.mark.parametrize("backend, dtype", LOW)
def test_gradients_of_half_precision_weights(backend, dtype, device):
    reference, fast = tiny_pair(backend, init_values=0.5)
    reference, fast = reference.to(device, dtype), fast.to(device, dtype)
    set_mode((reference, fast), "distilled training")
    x = images(reference, batch=4).to(device, dtype)
    assert_training_as_accurate(reference, fast, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_depth_and_head_dropout_draw_timms_numbers(backend, device):
    """The same seed drops the same branches: outputs and gradients are timm's."""
    reference, fast = tiny_pair(backend, drop_path_rate=0.6, drop_rate=0.3, **DEEPER)
    reference, fast = reference.to(device).train(), fast.to(device).train()
    x = images(reference, batch=4).to(device)
    expected, got = gradients(reference, x), gradients(fast, x)
    assert_gradients_close(got, expected)
    with torch.no_grad():  # another draw drops other branches
        torch.manual_seed(seeded(4))
        assert_differ(fast(x), expected["output 0"])


def saved_bytes(model, x, dtype=None):
    """Bytes of the saved tensors, each storage once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}  # held, so that no address is given twice

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage
        return t

    torch.manual_seed(seeded(3))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, autocast(x.device.type, dtype):
        outputs = model(x)
    assert as_list(outputs)[0].requires_grad
    return sum(s.nbytes() for s in storages.values())


@pytest.mark.parametrize("part", [slow("model"), "block"])
@pytest.mark.parametrize("dtype", [slow(None), FP16], ids=["fp32", "autocast fp16"])
def test_saves_less_than_timm_eager_or_compiled(dtype, part, device):
    """torch.compile's partitioner recomputes what is cheap; so do the blocks. The whole model saves
    less again: its last block runs for the prefix tokens. inductor's graphs are split by the same
    partitioner as this backend's."""
    reference, fast = tiny_pair("triton", num_heads=1)
    reference, fast = reference.to(device).train(), fast.to(device).train()
    x = images(reference, batch=16).to(device)
    models = reference, fast
    if part == "block":
        x = torch.randn(16, 18, 64, device=device, requires_grad=True)
        models = reference.blocks[0], fast.blocks[0]
    timms, ours = (saved_bytes(m, x, dtype) for m in models)
    torch.compiler.reset()
    compiled = torch.compile(models[0], backend="aot_eager_decomp_partition", fullgraph=True)
    compiled = saved_bytes(compiled, x, dtype)
    print(f"saved: ours {ours}, timm compiled {compiled}, timm {timms}")
    assert ours < compiled <= timms


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, FP16], ids=["fp32", "autocast fp16"])
def test_recompute_saves_memory_for_the_same_gradients(dtype, device):
    _, fast = tiny_pair("triton", depth=2, init_values=0.5)
    fast = fast.to(device).train()
    x = images(fast).to(device)
    lean, expected = saved_bytes(fast, x, dtype), gradients(fast, x, dtype)
    deit_fast.accelerate(fast, "triton", recompute=False)
    rows, features, hidden = 2 * 18, 64, 256
    # LN(x) of both halves and GELU(x): of one block for all tokens, of the last one's MLP for two
    both = 2 * rows * features + rows * hidden
    last = rows * features + 2 * 2 * features + 2 * 2 * hidden
    size = 4 if dtype is None else 2
    more = saved_bytes(fast, x, dtype) - lean
    assert both * size <= more <= (both + last) * size
    got = gradients(fast, x, dtype)
    for name in expected:
        if dtype is None or not name.endswith("fc2.weight"):
            assert torch.equal(got[name], expected[name]), name
        else:  # GELU is recomputed from what was rounded to fp16
            assert_close(got[name], expected[name], name, dtype=FP16)


@pytest.mark.parametrize("backend", ["torch", slow("triton")])
def test_grad_checkpointing(backend, device):
    """The second forward pass drops what the first one dropped."""
    reference, fast = tiny_pair(backend, drop_path_rate=0.6, **DEEPER)
    reference, fast = reference.to(device).train(), fast.to(device).train()
    x = images(reference, batch=4).to(device)
    expected, all_bytes = gradients(fast, x), saved_bytes(fast, x)
    assert_gradients_close(expected, gradients(reference, x))
    fast.set_grad_checkpointing(True)
    assert_gradients_close(gradients(fast, x), expected)
    assert saved_bytes(fast, x) < all_bytes / 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, FP16], ids=["fp32", "autocast fp16"])
def test_compiled_training_step(dtype, device):
    """Forward and backward in one graph each, with stochastic depth and dropout drawn as eagerly.
    test_compiles_into_one_graph has inductor's code; this backend leaves the random numbers be."""
    _, fast = tiny_pair("triton", drop_path_rate=0.6, drop_rate=0.3, **DEEPER)
    fast = fast.to(device).train()
    fast.set_distilled_training(True)
    x = images(fast, batch=4).to(device)
    expected = gradients(fast, x, dtype)
    torch.compiler.reset()
    fast.compile(backend="aot_eager", fullgraph=True)
    assert_gradients_close(gradients(fast, x, dtype), expected)


@pytest.mark.gpu("Inductor's own graphs, and its memory of them")
@pytest.mark.parametrize("dtype", [None, BF16], ids=["fp32", "autocast bf16"])
def test_a_training_step_in_cuda_graphs(dtype, device):
    """The first calls warm up and record, the others replay."""
    _, fast = tiny_pair("triton", **DEEPER)
    fast = fast.to(device).train()
    x = images(fast, batch=4).to(device)
    expected = gradients(fast, x, dtype)
    torch.compiler.reset()
    fast.compile(mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        got = gradients(fast, x, dtype)
        for name, g in got.items():
            assert_close(g, expected[name], name, dtype=dtype)
