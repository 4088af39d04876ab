"""How operators meet PyTorch: registered once, called without the dispatcher, in autograd."""

import importlib
import sys
from functools import partial

import pytest
import torch
from checking import NO_CODE, assert_equal, seed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from deit_fast import kernels
from deit_fast.bench.launches import Recorder
from deit_fast.kernels import _dispatch, cases, linear

FP16, FP32 = torch.float16, torch.float32


def test_no_other_import_registers_the_operators_again():
    """`import kernels` with the checkout's root on sys.path, as transformers does: operators that
    are registered twice leave those in use with freed schemas, and their calls fail at random."""
    assert "linear" not in vars(importlib.import_module("kernels"))
    assert [name for name in sys.modules if name.split(".")[0] == "kernels"] == ["kernels"]
    assert (
        torch.ops.deit_fast.linear.default
        is sys.modules["deit_fast.kernels.linear.op"]._fwd.op._opoverload
    )


class Bypassed(Exception):
    """The body was called without the dispatcher."""


@pytest.fixture
def call(device, monkeypatch):
    """linear in Triton, which raises Bypassed where it skips the dispatcher."""
    module = sys.modules["deit_fast.kernels.linear.op"]

    def body(*args):
        raise Bypassed

    monkeypatch.setattr(module._fwd, "body", body)

    def call(x=None, grad=False, on=device, weight=None):
        x = torch.randn(4, 32, device=on) if x is None else x
        if weight is None:
            weight = torch.nn.Parameter(torch.randn(8, 32, device=on), requires_grad=grad)
        return linear(x, weight, implementation="triton")

    return call


def test_the_dispatcher_is_bypassed_where_nothing_records(call):
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context(), pytest.raises(Bypassed):
            call()
    with torch.no_grad(), pytest.raises(Bypassed):
        call(grad=True)


def test_an_operator_is_dispatched_where_something_records(call, device):
    assert call(grad=True).requires_grad
    assert call(x=torch.randn(4, 32, device=device, requires_grad=True)).requires_grad
    with Recorder() as recorder:
        call()
    assert [name for name, _, _ in recorder.calls] == ["linear"]
    with FakeTensorMode() as mode:
        assert isinstance(call(x=mode.from_tensor(torch.randn(4, 32))), FakeTensor)
    x, weight = torch.randn(4, 32, device=device), torch.randn(8, 32, device=device)
    rows = torch.func.vmap(lambda x: call(x=x[None], weight=weight)[0])(x)
    assert rows.shape == (4, 8)
    graph = make_fx(lambda x: call(x=x))(torch.randn(4, 32, device=device)).graph
    assert "deit_fast.linear" in str(graph)
    compiled = torch.compile(
        lambda x, weight: call(x=x, weight=weight), fullgraph=True, backend=NO_CODE
    )
    assert compiled(*torch.randn(2, 4, 32, device=device)).shape == (4, 4)


@pytest.mark.cpu("the interpreter stands in for the device")
def test_an_operator_is_dispatched_on_the_meta_device(call, monkeypatch):
    assert call(on="meta").shape == (4, 8)


OPERATIONS = {
    "layer_norm": partial(cases.layer_norm_inputs, (6, 64)),
    "add_layer_norm": lambda **on: (
        (made := cases.layer_norm_inputs((6, 64), **on)) | {"residual": made["x"].clone()}
    ),
    "linear": partial(cases.linear_inputs, 6, 2, 64, 32, activation="gelu", residual=True),
    "attention": partial(cases.attention_inputs, 1, 2, 5, 5, 32),
    "layer_norm_attention": partial(cases.layer_norm_attention_inputs, 2, 2, 5, 64, 32),
    "layer_norm_mlp": partial(cases.layer_norm_mlp_inputs, 6, 2, 64, 32),
    "talking_heads_attention": partial(cases.talking_heads_inputs, 2, 4, 5, 32),
}


@pytest.fixture(params=OPERATIONS)
def differentiated(request, device):
    """The results of an operation on leaves, in Triton, and the leaves."""
    inputs = OPERATIONS[request.param](device=device)
    if "residual" in inputs and "norm_weight" in inputs:
        inputs["residual"] = inputs["x"]
    leaves = [t.requires_grad_() for k, t in inputs.items() if torch.is_tensor(t)]
    inputs |= {k: t.detach() for k, t in inputs.items() if k == "row_scale"}
    results = getattr(kernels, request.param)(**inputs, implementation="triton")
    return results if isinstance(results, tuple) else (results,), leaves


def test_backward_makes_no_zeros(differentiated):
    """Unless it is told not to, PyTorch hands backward a tensor of zeros for each result without a
    gradient: as many bytes as all that is saved."""
    (y, *_), leaves = differentiated
    with Recorder() as recorder:
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
    assert not any("zero" in name or "full" in name for name in recorder.others), recorder.others
    assert recorder.calls and grads[0].any()


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return None


def test_no_gradient_comes_and_none_goes(differentiated):
    results, leaves = differentiated
    ends = [NoGradient.apply(y).sum() for y in results]
    grads = torch.autograd.grad(sum(ends), leaves, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_only_the_sum_of_add_layer_norm_is_used(device):
    x, weight, bias = cases.layer_norm_inputs((6, 64), device=device).values()
    x, residual = x.half().requires_grad_(), x.clone().requires_grad_()
    _, h = kernels.add_layer_norm(x, residual, weight, bias, implementation="triton")
    upstream = torch.randn_like(h)
    dx, dresidual = torch.autograd.grad(h, (x, residual), upstream)
    assert (dx.dtype, dresidual.dtype) == (FP16, FP32)
    assert_equal(dresidual, upstream)
    assert_equal(dx, upstream.half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_that_a_cpu_trains_is_computed_in_fp32(dtype, masked):
    """So is its gradient, and each is rounded once; without gradients it is PyTorch's own."""
    seed(0)
    qkv = [torch.randn(2, 3, 7, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    mask = torch.randn(3, 7, 7, dtype=dtype) if masked else None
    wide = [t.detach().float().requires_grad_() for t in qkv]
    expected = F.scaled_dot_product_attention(
        *wide, attn_mask=None if mask is None else mask.float(), scale=0.3
    )
    with torch.autocast("cpu", torch.bfloat16):
        got = _dispatch.sdpa(*qkv, mask, 0.3)
    assert_equal(got, expected.to(dtype))
    upstream = torch.randn_like(got)
    found = torch.autograd.grad(got, qkv, upstream)
    for one, other in zip(
        found, torch.autograd.grad(expected, wide, upstream.float()), strict=True
    ):
        assert_equal(one, other.to(dtype))
    with torch.no_grad():
        plain = F.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=0.3)
        assert_equal(_dispatch.sdpa(*qkv, mask, 0.3), plain)
