"""Which implementation serves which chip, and that the choice can be asked for and explained."""

import importlib
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from checking import NO_CODE, assert_equal
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import deit_fast
from deit_fast import kernels
from deit_fast.bench.launches import Recorder, record
from deit_fast.kernels import _checks, _chips, _policy, cases, linear

FP16, FP32 = torch.float16, torch.float32
V100, T4, A100, H100, B200 = (7, 0), (7, 5), (8, 0), (9, 0), (10, 0)
EVERY_OP = (*_policy.ROW_OPS, *_policy.MATMUL_OPS)


def test_nobody_else_registers_the_operators_again():
    """`import kernels` with the checkout's root on sys.path, as transformers does: operators that
    are registered twice leave those in use with freed schemas, and their calls fail at random."""
    assert "linear" not in vars(importlib.import_module("kernels"))
    assert [name for name in sys.modules if name.split(".")[0] == "kernels"] == ["kernels"]
    assert (
        torch.ops.deit_fast.linear.default
        is sys.modules["deit_fast.kernels.linear.op"]._fwd.op._opoverload
    )


@pytest.mark.parametrize("op", EVERY_OP)
def test_cpu_and_ancient_chips_get_torch(op):
    for chip in (None, (6, 1)):
        assert _policy.choose(op, chip, FP16).implementation == "torch"


@pytest.mark.parametrize("chip", [V100, T4])
def test_without_tensor_cores_products_belong_to_cublas(chip):
    assert _policy.choose("linear", chip, FP16).implementation == "cublas"
    assert _policy.choose("attention", chip, FP16).implementation == "torch"
    assert _policy.choose("layer_norm", chip, FP16).implementation == "triton"


@pytest.mark.parametrize("chip", [A100, H100, B200])
@pytest.mark.parametrize("op", EVERY_OP)
def test_half_precision_on_tensor_cores_is_tritons(op, chip):
    assert _policy.choose(op, chip, FP16).implementation == "triton"


@pytest.mark.parametrize("op", _policy.MATMUL_OPS)
def test_fp32_products_are_not(op):
    assert _policy.choose(op, H100, FP32).implementation in ("cublas", "torch")


@pytest.mark.parametrize("op", EVERY_OP)
def test_float64_is_not_tritons(op):
    assert _policy.choose(op, H100, torch.float64).implementation == "torch"


def test_autocast_decides_with_its_own_dtype(monkeypatch):
    seen = []

    def choice(op, chip, dtype):
        seen.append((op, dtype))
        return _policy.Choice("torch", "")

    monkeypatch.setattr(_policy, "choose", choice)
    with torch.autocast("cpu", FP16):
        for op in ("linear", "layer_norm"):
            _policy.resolve(op, torch.zeros(1), "auto")
    assert seen == [("linear", FP16), ("layer_norm", FP32)]


@pytest.mark.parametrize("op", EVERY_OP)
def test_every_choice_has_a_reason(op):
    for chip in (None, (6, 1), V100, A100, H100):
        for dtype in _checks.DTYPES:
            assert len(_policy.choose(op, chip, dtype).reason) > 10


def test_triton_on_a_cpu_without_the_interpreter_raises(monkeypatch):
    monkeypatch.setattr(_chips, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="of linear needs a CUDA tensor, x is on cpu"):
        _policy.resolve("linear", torch.zeros(1), "triton")
    assert _policy.resolve("linear", torch.zeros(1), "auto") == "torch"


def test_the_chip_is_a_constant_under_compile(monkeypatch):
    monkeypatch.setattr(_chips, "chip", lambda device: _chips.Chip("H100", H100, 132))

    def f(x):
        choice = _policy.choose("linear", _chips.capability("cuda", 0), FP16)
        return x + 1 if choice.implementation == "triton" else x - 1

    assert torch.compile(f, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


def test_the_device_of_the_tensor_decides(monkeypatch):
    monkeypatch.setattr(_chips, "_cuda_chip", lambda index: _chips.Chip("H100", H100, 132))
    with FakeTensorMode():
        on_gpu, on_cpu = (torch.zeros(1, device=device) for device in ("cuda:0", "cpu"))
    assert on_gpu.is_cuda and _policy.resolve("layer_norm", on_gpu, "auto") == "triton"
    assert _policy.resolve("layer_norm", on_cpu, "auto") == "torch"


class Straight(Exception):
    """The body was called without the dispatcher."""


@pytest.fixture
def call(device, monkeypatch):
    """linear in Triton, which raises Straight where it skips the dispatcher."""
    module = sys.modules["deit_fast.kernels.linear.op"]

    def body(*args):
        raise Straight

    monkeypatch.setattr(module._fwd, "body", body)

    def call(x=None, grad=False, on=device, weight=None):
        x = torch.randn(4, 32, device=on) if x is None else x
        if weight is None:
            weight = torch.nn.Parameter(torch.randn(8, 32, device=on), requires_grad=grad)
        return linear(x, weight, implementation="triton")

    return call


def test_an_operator_is_called_straight_where_nothing_watches(call):
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context(), pytest.raises(Straight):
            call()
    with torch.no_grad(), pytest.raises(Straight):
        call(grad=True)


def test_an_operator_is_dispatched_where_something_watches(call, device):
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


@pytest.fixture
def exclude():
    yield _policy.exclude
    _policy.exclude()


def test_what_is_excluded_is_pytorchs(exclude):
    """Of every chip, in each operation that asks; the others stay."""
    exclude("attention", "fp8", "layer_norm_linear")
    assert _policy.choose("attention", H100, FP16).implementation == "torch"
    assert "excluded" in _policy.choose("attention", H100, FP16).reason
    assert _policy.choose("linear", H100, FP16).implementation == "triton"
    fp8, int8 = torch.float8_e4m3fn, torch.int8
    assert _policy.choose("quantized_linear", H100, fp8) == ("none", "fp8 is excluded")
    assert _policy.choose("quantized_linear", H100, int8).implementation == "triton"
    exclude("linear")
    assert _policy.choose("attention", H100, FP16).implementation == "triton"
    assert _policy.choose("linear", H100, FP16).implementation == "torch"


@pytest.mark.parametrize(
    ("name", "missing", "there"),
    [
        ("attention", "attention", "linear"),
        ("layer_norm_linear", "layer_norm_linear", "linear"),
        ("linear", "linear", "attention"),
        ("classifier", "classifier", "linear"),
    ],
)
def test_a_model_without_what_is_excluded(exclude, name, missing, there):
    exclude(name)
    with torch.device("meta"):
        model = deit_fast.deit_tiny_distilled(depth=2)
    recorder = record(model, 256, FP16, _chips.Chip("H100", H100, 132), tables=False)
    ops = {op for op, _, _ in recorder.calls}
    assert missing not in ops and there in ops
    exclude()
    recorder = record(model, 256, FP16, _chips.Chip("H100", H100, 132), tables=False)
    assert missing in {op for op, _, _ in recorder.calls}


@pytest.mark.slow
def test_unknown_exclusions(exclude):
    with pytest.raises(ValueError, match="unknown atention, expected some of"):
        exclude("atention", "linear")
    assert not _policy.excluded()
    code = "import deit_fast; print(sorted(deit_fast.kernels._policy.excluded()))"
    for value, wanted in (("fp8, linear", "['fp8', 'linear']"), ("liner", "unknown liner")):
        env = os.environ | {"DEIT_FAST_EXCLUDE": value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert wanted in done.stdout + done.stderr
