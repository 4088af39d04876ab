"""What both halves of a block share in training: autocast, gradients of weights, launches."""

from collections import Counter

import pytest
import torch
from checking import (
    BF16,
    FP16,
    FP32,
    HALVES,
    assert_as_accurate,
    assert_equal,
    assert_gradients_as_accurate,
    seed,
)

from deit_fast.kernels import (
    _training,
    column_sums,
    layer_norm_attention,
    layer_norm_attention_reference,
    layer_norm_mlp,
    layer_norm_mlp_reference,
)
from deit_fast.kernels import cases as made

NODES = {
    "attention": (
        layer_norm_attention, layer_norm_attention_reference,
        lambda **on: made.layer_norm_attention_inputs(2, 2, 20, 64, 32, **on),
    ),
    "first tokens": (
        layer_norm_attention, layer_norm_attention_reference,
        lambda **on: made.layer_norm_attention_inputs(2, 2, 20, 64, 32, **on) | {"queries": 2},
    ),
    "mlp": (
        layer_norm_mlp, layer_norm_mlp_reference,
        lambda **on: made.layer_norm_mlp_inputs(40, 2, 64, 128, **on),
    ),
}  # fmt: skip


def with_gradients(fn, inputs, dtype=None, autocast=None):
    """The result, and the gradients of every tensor but row_scale, with their names."""
    tensors = {k: t for k, t in inputs.items() if torch.is_tensor(t)}
    leaves = {k: t.detach().to(dtype or t.dtype) for k, t in tensors.items()}
    wanted = [t.requires_grad_() for k, t in leaves.items() if k != "row_scale"]
    device = wanted[0].device.type
    with torch.autocast(device, autocast or BF16, enabled=autocast is not None):
        y = fn(**inputs | leaves, residual=leaves["x"])
    seed(1)
    upstream = torch.randn(y.shape, device=y.device).to(y.dtype)
    grads = torch.autograd.grad(y, wanted, upstream)
    assert [g.dtype for g in grads] == [t.dtype for t in wanted]
    names = [k for k in leaves if k != "row_scale"]
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


def inputs_of(node, device):
    fn, reference, inputs = NODES[node]
    inputs = inputs(device=device)
    inputs.pop("residual", None)
    inputs["row_scale"] = torch.tensor([4 / 3, 0.0], device=device)  # drawn, it may be all zeros
    return lambda **rest: fn(**rest, implementation="triton"), reference, inputs


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("node", NODES)
def test_every_gradient_under_autocast(node, dtype, device):
    fn, reference, inputs = inputs_of(node, device)
    got = with_gradients(fn, inputs, autocast=dtype)
    torchs = with_gradients(reference, inputs, autocast=dtype)
    truth = with_gradients(reference, inputs, torch.float64)
    assert {t.dtype for t in got.values()} == {FP32}
    assert_gradients_as_accurate(got, torchs, truth)


@pytest.mark.parametrize("node", NODES)
def test_parameters_of_several_dtypes(node, device):
    """Norms and LayerScale in fp32 beside weights in half precision, each gradient in its own."""
    fn, reference, inputs = inputs_of(node, device)
    half = {k: t.half() for k, t in inputs.items() if k == "x" or "weight" in k or "bias" in k}
    inputs |= {k: t for k, t in half.items() if not k.startswith("norm")}
    got = with_gradients(fn, inputs)
    for name in ("norm_weight", "norm_bias", "layer_scale"):
        rounded = got[name].half().float()
        assert not torch.equal(rounded, got[name]), f"{name}: rounded to half precision on the way"
    truth = with_gradients(reference, inputs, torch.float64)
    torchs = with_gradients(reference, {k: to(t, FP16) for k, t in inputs.items()})
    assert_gradients_as_accurate({k: t.half() for k, t in got.items()}, torchs, truth)


def to(value, dtype):
    return value.to(dtype) if torch.is_tensor(value) else value


@pytest.mark.parametrize("node", NODES)
def test_one_launch_sums_all_vectors(node, device, monkeypatch):
    """Every vector's gradient: norms', biases' and LayerScale's; that of qkv's bias in two."""
    calls, run = Counter(), column_sums.run
    monkeypatch.setattr(column_sums, "run", lambda pairs: calls.update([len(pairs)]) or run(pairs))
    fn, _, inputs = inputs_of(node, device)
    with_gradients(fn, inputs)
    assert calls == {5 if node == "mlp" else 6: 1}


@pytest.mark.parametrize("node", NODES)
def test_the_same_bits_again(node, device):
    fn, _, inputs = inputs_of(node, device)
    got, again = with_gradients(fn, inputs), with_gradients(fn, inputs)
    for name, t in got.items():
        assert_equal(t, again[name])


@pytest.mark.parametrize("dtype", [FP32, *HALVES], ids=str)
def test_weight_gradients_in_fp32(dtype, device):
    """On a GPU PyTorch writes the sums of a GEMM in half precision as they are."""
    seed(0)
    dz, x = torch.randn(70, 24, device=device).to(dtype), torch.randn(70, 40, device=device)
    x = x.to(dtype)
    got = _training.weight_gradient(dz, x, FP32)
    assert got.dtype == FP32 and got.shape == (24, 40)
    assert_as_accurate(got, (dz.t() @ x).float(), dz.double().t() @ x.double())


def test_weight_gradients_are_not_rounded_where_torch_can(monkeypatch):
    seed(0)
    dz, x = torch.randn(70, 24).half(), torch.randn(70, 40).half()
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
    try:
        got = _training.weight_gradient(dz, x, FP32)
    finally:
        library._destroy()
    assert_equal(got, dz.t().float() @ x.float())
    rounded = _training.weight_gradient(dz, x, FP32)
    assert_equal(rounded, (dz.t() @ x).float())
    assert not torch.equal(got, rounded)
