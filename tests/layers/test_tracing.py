"""Tracers and transforms of functions: what works on timm's model works on the accelerated one."""

import copy
import warnings

import pytest
import timm
import torch
from checking import assert_close, assert_gradients_close
from small_models import small_models
from tiers import slow
from timm.models import FeatureGraphNet, GraphExtractNet
from timm.utils import AttentionExtract
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import deit_fast
from deit_fast import kernels
from deit_fast.kernels import _dispatch

# torch.fx


@pytest.mark.parametrize("backend", ["torch", slow("triton")])
@pytest.mark.parametrize("family", ["distilled", "plain", "cait"])  # timm's TinyViT has no trace
def test_symbolic_traces_have_timms_nodes(family, backend, device):
    """By torchvision's feature extraction: each node's name and value."""
    reference, fast, x = small_models(family, device, backend)
    with pytest.warns(UserWarning, match="torch.fx: is traced by torch.fx"):
        got = get_graph_node_names(fast)
    expected = get_graph_node_names(reference)
    assert got == expected and len(expected[1]) > 50
    names = [name for name in expected[1] if not name.startswith("getattr")]
    found = []
    for model in (reference, fast):
        traced = create_feature_extractor(model, names[5::9])
        with torch.no_grad():
            found.append(traced(x))
    for name, value in found[0].items():
        if isinstance(value, torch.Tensor):
            assert_close(found[1][name], value, name)


def test_a_trace_by_hand_trains(device):
    reference, fast, x = small_models("plain", device)
    with pytest.warns(UserWarning, match="torch.fx"):
        traced = torch.fx.symbolic_trace(fast)
    found = []
    for model in (reference, traced):
        loss = model(x).square().mean()
        names, parameters = zip(*model.named_parameters(), strict=True)
        found.append(dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)))
    expected, got = found
    for name, value in got.items():
        assert_close(value, expected[name], name)


def test_timms_features_by_fx(device):
    reference, fast, x = small_models("plain", device)
    found = []
    for model in (reference, fast):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            levels = FeatureGraphNet(copy.deepcopy(model), out_indices=(0, 1))(x)
            named = GraphExtractNet(copy.deepcopy(model), ["blocks.0.mlp.fc1", "head"])(x)
        found.append([*levels, *named])
    assert len(found[0]) == 4
    for expected, got in zip(*found, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("method", ["fx", "hook"])
def test_timms_attention_extraction(method, device):
    reference, fast, x = small_models("distilled", device)
    found = []
    for model in (reference, fast):
        for block in model.blocks:
            block.attn.fused_attn = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(AttentionExtract(model, method=method)(x))
    expected, got = found
    assert len(expected) == 2 and expected.keys() == got.keys()
    for name in expected:
        assert_close(got[name], expected[name], name)


# TorchScript


@pytest.mark.parametrize("backend", ["torch", slow("triton")])
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("family", ["distilled", "plain", "cait", "tiny_vit"])
def test_traces_pass_pytorchs_own_check(family, with_grad, backend, device):
    """And hold no operator of ours, so that they run anywhere."""
    reference, fast, x = small_models(family, device, backend)
    with torch.set_grad_enabled(with_grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(fast, x)
    assert "deit_fast::" not in str(traced.inlined_graph)
    other = torch.cat((x, x + 1))
    with torch.no_grad():
        assert_close(traced(other), reference(other))


def test_a_trace_of_bytes(device):
    reference, fast, _ = small_models("distilled", device)
    x = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8, device=device)
    with torch.no_grad():
        expected = fast(x)
        traced = torch.jit.trace(fast, x)
        assert_close(traced(x), expected)


def test_scripting_says_what_to_do_instead():
    _, fast, _ = small_models("distilled", "cpu")
    with pytest.raises(RuntimeError, match="torch.jit.script: TorchScript is deprecated and can't "
                       "hold VisionTransformerDistilled: script deit_fast.restore"):  # fmt: skip
        torch.jit.script(fast)


# torch.func and forward-mode differentiation


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("family", ["distilled", slow("cait"), slow("tiny_vit")])
def test_gradients_of_each_sample(family, backend, device):
    reference, fast, x = small_models(family, device, backend)
    found = []
    for model in (reference, fast):
        parameters = {k: p.detach() for k, p in model.named_parameters()}
        rest = {**dict(model.named_buffers())}

        def loss(parameters, image, model=model, rest=rest):
            return functional_call(model, (parameters, rest), (image[None],)).square().sum()

        found.append(vmap(grad(loss), (None, 0))(parameters, x))
    expected, got = found
    assert_gradients_close(got, expected)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_jacobians_and_tangents(backend, device):
    """Forward mode is timm's with plain attention: PyTorch's fused one has no such formula."""
    reference, fast, x = small_models("distilled", device, backend)
    for block in reference.blocks:
        block.attn.fused_attn = False
    direction = torch.randn_like(x)
    rows = [jacrev(lambda x, m=m: m(x)[:, :3])(x[:1]) for m in (reference, fast)]
    assert_close(rows[1], rows[0])
    tangents = [jvp(m, (x,), (direction,))[1] for m in (reference, fast)]
    assert_close(tangents[1], tangents[0])
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(fast(forward_ad.make_dual(x, direction)))
    assert_close(dual.tangent, tangents[0])
    doubly = [
        grad(lambda x, m=m: (jvp(m, (x,), (direction,))[1]).sum())(x) for m in (reference, fast)
    ]
    assert_close(doubly[1], doubly[0])


def test_transforms_say_that_no_kernel_runs(monkeypatch, device):
    """Once, and only where one would have run."""
    x, weight = torch.randn(3, 32, device=device), torch.randn(16, 32, device=device)
    monkeypatch.setattr(_dispatch, "_warned", [])

    def run(by):
        return vmap(lambda row: kernels.linear(row[None], weight, implementation=by))(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = run("torch")
    with pytest.warns(UserWarning, match="torch.func and forward-mode .* no kernels"):
        got = run("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("triton")
    assert_close(got, expected)


@pytest.mark.slow
def test_a_transform_inside_a_compiled_function(device):
    reference, fast, x = small_models("distilled", device)
    for block in reference.blocks:
        block.attn.fused_attn = False  # of which PyTorch compiles no gradient on a CPU
    found = []
    for model in (reference, fast):
        sensitivity = grad(lambda x, model=model: model(x).square().sum())
        found.append(torch.compile(sensitivity, fullgraph=True, backend="aot_eager")(x))
    assert_close(found[1], found[0])


def test_plain_calls_keep_their_kernels(monkeypatch, device):
    """After the transforms are over."""
    _, fast, x = small_models("distilled", device, "triton")
    vmap(lambda x: fast(x[None]))(x)
    monkeypatch.setattr(kernels.linear_reference, "__code__", (lambda *_, **__: None).__code__)
    assert torch.isfinite(fast(x)).all()


def test_relatives_of_timm(device):
    """timm's own tests of a model: head reset, intermediates, both with the same numbers."""
    reference, fast, x = small_models("distilled", device)
    with torch.no_grad():
        for model in (reference, fast):
            model.reset_classifier(0)
        assert_close(fast(x), reference(x))
        expected, got = (m.forward_intermediates(x, norm=True) for m in (reference, fast))
    assert_close(got[0], expected[0])
    for a, b in zip(expected[1], got[1], strict=True):
        assert_close(b, a)
    assert deit_fast.report(fast).unfused == [] and isinstance(fast, timm.models.VisionTransformer)
