"""`linear` on a CPU in fp32 inference: oneDNN with the epilogue, where and only where it may."""

import pytest
import torch
from checking import assert_close, seed
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from deit_fast.kernels import linear, linear_reference
from deit_fast.kernels.linear import cpu

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="CPU: this PyTorch has no oneDNN"
)


def operands(rows=(2, 66), K=48, N=40):
    seed(0)
    x, residual = torch.randn(*rows, K), torch.randn(*rows, N)
    return x, torch.randn(N, K) / K**0.5, torch.randn(N), residual, torch.rand(N)


def calls(monkeypatch):
    """A list that gets an entry for each call that oneDNN serves."""
    served, run = [], cpu._fwd.body
    monkeypatch.setattr(cpu._fwd, "body", lambda *args: served.append(1) or run(*args))
    return served


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("epilogue", ["", "residual", "layer_scale", "residual layer_scale"])
def test_it_is_the_reference(monkeypatch, bias, activation, epilogue):
    x, weight, b, residual, layer_scale = operands()
    given = {"residual": residual, "layer_scale": layer_scale}
    rest = {k: v for k, v in given.items() if k in epilogue.split()}
    args = (x, weight, b if bias else None, activation)
    served = calls(monkeypatch)
    with torch.inference_mode():
        got = linear(*args, **rest)
    assert served
    assert_close(got, linear_reference(*args, **rest))


def test_weights_changed_in_place_are_seen(monkeypatch):
    x, weight, bias, *_ = operands()
    served = calls(monkeypatch)
    with torch.no_grad():
        linear(x, weight, bias)
        weight.data.mul_(2)
        assert_close(linear(x, weight, bias), linear_reference(x, weight, bias))
    assert len(served) == 2


@pytest.mark.parametrize("case", ["few rows", "fp64", "mixed", "gradient", "autocast", "off"])
def test_where_it_may_not_serve(monkeypatch, case):
    x, weight, bias, residual, _ = operands(rows=(63,) if case == "few rows" else (2, 66))
    if case == "fp64":
        x, weight, bias, residual = (t.double() for t in (x, weight, bias, residual))
    if case == "mixed":
        residual = residual.double()
    weight.requires_grad_(case == "gradient")
    served = calls(monkeypatch)
    with (
        torch.autocast("cpu", enabled=case == "autocast"),
        torch.backends.mkldnn.flags(enabled=case != "off"),
    ):
        got = linear(x, weight, bias, residual=residual)
        assert_close(got, linear_reference(x, weight, bias, "none", residual))
    assert not served


def test_tangents_are_kept():
    x, weight, bias, residual, _ = operands()
    primals = (x, weight, bias, residual)
    tangents = tuple(map(torch.randn_like, primals))
    reference = torch.func.jvp(lambda *o: linear_reference(*o[:3], "none", o[3]), primals, tangents)
    with torch.no_grad(), forward_ad.dual_level():
        duals = list(map(forward_ad.make_dual, primals, tangents))
        found = forward_ad.unpack_dual(linear(*duals[:3], residual=duals[3]))
    assert_close(found.primal, reference[0])
    assert_close(found.tangent, reference[1])


def test_strides_and_no_columns(monkeypatch):
    x, weight, bias, residual, _ = operands()
    wide = torch.randn(2, 66, 96)[..., ::2]
    turned = weight.t().contiguous().t()
    with torch.no_grad():
        got = linear(
            wide, turned, bias, residual=residual.transpose(0, 1).contiguous().transpose(0, 1)
        )
        assert_close(got, linear_reference(wide, turned, bias, "none", residual))
        assert linear(x[..., :0], weight[:, :0], bias).shape == (2, 66, 40)


def test_flops():
    x, weight, *_ = operands()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 132 * 48 * 40


def test_a_compiler_sees_one_operator_and_an_exporter_none():
    x, weight, bias, residual, _ = operands()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return linear(x, weight, bias, residual=residual)

    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        got = torch.compile(Layer(), backend=backend, fullgraph=True)(x)
        assert_close(got, linear_reference(x, weight, bias, "none", residual))
        program = torch.export.export(Layer(), (x,))
    assert sum("linear_cpu" in name for name in seen) == 1
    assert not any("deit_fast" in str(node.target) for node in program.graph.nodes)
