"""classifier against fp64: every fusion of the two heads, and one head alone."""

from functools import partial

import pytest
import torch
from checking import (
    DOT_DTYPES,
    FP16,
    FP32,
    NO_CODE,
    assert_as_accurate,
    assert_close,
    assert_equal,
    check,
)

from deit_fast.kernels import cases, classifier, classifier_reference
from deit_fast.kernels.cases import classifier_inputs as make_inputs
from deit_fast.kernels.classifier import FUSIONS, _fwd

triton_classifier = partial(classifier, implementation="triton")


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("case", cases.CLASSIFIER, ids=str)
def test_two_heads(case, fusion, dtype, device):
    inputs = make_inputs(**case, device=device) | {"fusion": fusion}
    check(triton_classifier, classifier_reference, inputs, dtype, grads=False)


@pytest.mark.parametrize("dtype", DOT_DTYPES, ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients(fusion, dtype, device):
    """Its parts run then."""
    inputs = make_inputs(5, 7, 64, 33, device=device) | {"fusion": fusion}
    check(triton_classifier, classifier_reference, inputs, dtype)


def test_gradients_of_one_head(device):
    inputs = make_inputs(5, 7, 64, 33, distilled=False, device=device)
    check(triton_classifier, classifier_reference, inputs, FP16)


@pytest.mark.parametrize("fusion", ["joint", "class"])
def test_one_head(fusion, device):
    inputs = make_inputs(5, 7, 100, 33, distilled=False, device=device) | {"fusion": fusion}
    check(triton_classifier, classifier_reference, inputs, FP16, grads=False)
    del inputs["head_bias"]
    check(triton_classifier, classifier_reference, inputs, FP32, grads=False)


def test_eps(device):
    """As large as the variance: a millionth is not seen."""
    inputs = make_inputs(5, 7, 64, 33, device=device) | {"eps": 0.5}
    check(triton_classifier, classifier_reference, inputs, FP32)
    check(triton_classifier, classifier_reference, inputs, FP32, grads=False)


def test_fusions_are_what_they_say(device):
    """Against the formulas written out, for each implementation."""
    inputs = make_inputs(4, 3, 64, 10, device=device)
    y = torch.nn.functional.layer_norm(
        inputs["x"], (64,), inputs["norm_weight"], inputs["norm_bias"], 1e-6
    )
    a = y[:, 0] @ inputs["head_weight"].T + inputs["head_bias"]
    b = y[:, 1] @ inputs["dist_weight"].T + inputs["dist_bias"]
    expected = {
        "joint": (a + b) / 2, "joint_softmax": a.softmax(1) + b.softmax(1),
        "class": a, "distill": b,
    }  # fmt: skip
    for implementation in ("triton", "torch"):
        for fusion, logits in expected.items():
            got = classifier(**inputs, fusion=fusion, implementation=implementation)
            assert_close(got, logits)


def test_prefix_rows_of_a_wider_buffer(device):
    inputs = make_inputs(4, 198, 64, 10, device=device)
    expected = triton_classifier(**inputs)
    inputs["x"] = inputs["x"][:, :2]  # strided, not copied
    assert_equal(triton_classifier(**inputs), expected)
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    assert_equal(triton_classifier(**inputs), expected)
    for name in ("norm_weight", "norm_bias", "head_bias", "dist_bias"):
        inputs[name] = inputs[name].repeat_interleave(2)[::2]
    assert_equal(triton_classifier(**inputs), expected)


def test_autocast(device):
    inputs = make_inputs(4, 3, 64, 10, device=device)
    exact = classifier_reference(**{k: t.double() for k, t in inputs.items()})
    with torch.autocast(device, FP16):
        got, torchs = triton_classifier(**inputs), classifier_reference(**inputs)
    assert got.dtype == torchs.dtype == FP16
    assert_as_accurate(got, torchs, exact)
    inputs["x"].requires_grad_()
    with torch.autocast(device, FP16):
        for fusion in FUSIONS:
            assert triton_classifier(**inputs, fusion=fusion).dtype == FP16


def test_nan_stays_with_its_image(device):
    inputs = make_inputs(4, 3, 100, 10, device=device)
    inputs["x"][2, 1, 7] = torch.nan
    got = triton_classifier(**inputs).isnan()
    assert got[2].all() and got.any(1).sum() == 1


def test_op_contract(device):
    tensors = make_inputs(3, 2, 64, 10, device=device).values()
    torch.library.opcheck(_fwd.op, (*tensors, "joint", 1e-6))


def test_compiles_into_one_graph(device):
    inputs = make_inputs(3, 2, 64, 10, device=device)
    compiled = torch.compile(triton_classifier, fullgraph=True, backend=NO_CODE)
    for fusion in FUSIONS:
        assert_close(compiled(**inputs, fusion=fusion), triton_classifier(**inputs, fusion=fusion))


def test_bad_input_is_named():
    inputs = make_inputs(3, 2, 64, 10)
    with pytest.raises(ValueError, match="fusion 'sum' with 2 head"):
        classifier(**inputs, fusion="sum")
    with pytest.raises(ValueError, match=r"x has shape \(3, 1, 64\)"):
        classifier(**inputs | {"x": inputs["x"][:, :1]})
    with pytest.raises(ValueError, match=r"dist_bias has shape \(9,\), expected \(10,\)"):
        classifier(**inputs | {"dist_bias": torch.zeros(9)})
    one = make_inputs(3, 2, 64, 10, distilled=False)
    with pytest.raises(ValueError, match="fusion 'distill' with 1 head"):
        classifier(**one, fusion="distill")
