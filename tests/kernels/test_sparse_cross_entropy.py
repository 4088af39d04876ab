"""sparse_cross_entropy against fp64 and against the dense target, and the odd rows."""

from functools import partial

import losses
import pytest
import torch
from checking import (
    BF16,
    FP16,
    FP32,
    ROW_DTYPES,
    assert_close,
    assert_equal,
    assert_within,
    check,
    check_compiles,
)
from losses import loss_and_gradients
from torch.nn import functional as F

from deit_fast.kernels import cases, sparse_cross_entropy, sparse_cross_entropy_reference
from deit_fast.kernels.cases import sparse_cross_entropy_inputs as make_inputs
from deit_fast.kernels.sparse_cross_entropy import _fwd, dense_target

triton_loss = partial(sparse_cross_entropy, implementation="triton")
assert_accurate = partial(losses.assert_accurate, triton_loss, sparse_cross_entropy_reference)
in_fp64 = partial(losses.in_dtype, dtype=torch.float64)
both = pytest.mark.parametrize("implementation", ["triton", "torch"])
# numpy's, of the interpreter: columns beyond the last are -inf - -inf before they are masked
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.SPARSE_CROSS_ENTROPY, ids=str)
def test_no_less_accurate_than_torch(case, dtype, device):
    inputs = make_inputs(**case, device=device)
    check(triton_loss, sparse_cross_entropy_reference, inputs, dtype, no_grad=("probs",))


@both
@pytest.mark.parametrize("K", [1, 4, 9])
def test_it_is_the_dense_formula(implementation, K, device):
    """The target written out, class by class."""
    inputs = make_inputs(3, 9, K, device=device)
    z, indices, probs = in_fp64(inputs).values()
    target = torch.empty(3, 9, dtype=torch.float64)
    for b in range(3):
        target[b] = (1 - probs[b].sum()) / (9 - K) if K < 9 else torch.nan
        for k in range(K):
            target[b, indices[b, k]] = probs[b, k]
    assert_close(dense_target(indices, probs, 9).cpu(), target)
    assert target.sum(1).tolist() == pytest.approx([1.0] * 3)
    expected = F.cross_entropy(z.cpu(), target)
    got = sparse_cross_entropy(**inputs, implementation=implementation)
    assert_close(got.cpu(), expected.float())


@both
def test_stored_probabilities_above_one_leave_no_rest(implementation, device):
    """As rounding to fp16 makes them."""
    inputs = make_inputs(2, 50, 3, device=device)
    inputs["probs"] = torch.tensor([[0.9, 0.0999, 0.0005], [0.5, 0.25, 0.2]], device=device).half()
    assert inputs["probs"].double().sum(1)[0] > 1
    target = dense_target(inputs["indices"], inputs["probs"].double(), 50)
    assert (target >= 0).all() and (target[0] > 0).sum() == 3 and (target[1] > 0).all()
    loss = partial(sparse_cross_entropy, implementation=implementation)
    expected = -(target * inputs["logits"].double().log_softmax(1)).sum(1).mean()
    got, grad = loss_and_gradients(loss, inputs)
    assert_close(got, expected.float())
    p = inputs["logits"].double().softmax(1)
    expected = (p * target.sum(1, keepdim=True) - target) / 2
    assert_close(grad, expected.float())


def test_mixed_dtypes(device):
    inputs = make_inputs(5, 100, 7, device=device)
    for dtype, of_probs, of_indices in (
        (BF16, FP16, torch.int64), (FP16, FP32, torch.int32), (FP32, BF16, torch.int32),
    ):  # fmt: skip
        changed = {
            "logits": inputs["logits"].to(dtype), "indices": inputs["indices"].to(of_indices),
            "probs": inputs["probs"].to(of_probs),
        }  # fmt: skip
        assert_accurate(changed, 0.3)
        with torch.autocast(device, BF16):
            assert triton_loss(**changed).dtype == FP32


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_gradients_are_rounded_once(dtype, device):
    """After the multiplication with the upstream gradient, which is fp32 too."""
    inputs = make_inputs(4, 1000, 10, device=device)
    inputs["logits"] = inputs["logits"].to(dtype)
    _, got = loss_and_gradients(triton_loss, inputs, 0.3)
    _, true = loss_and_gradients(sparse_cross_entropy_reference, in_fp64(inputs), 0.3)
    assert (got == true.to(dtype)).float().mean() > 0.99  # fp32 shifts a few across


def test_a_loss_scale_keeps_small_gradients_in_fp16(device):
    """Of probabilities that over B are below what fp16 can hold."""
    inputs = make_inputs(16, 1000, 1, device=device)
    inputs["logits"] = (inputs["logits"] - 16).half()
    inputs["logits"][:, 0] = 0
    inputs["probs"][:] = 1.0
    _, got = loss_and_gradients(triton_loss, inputs, 2.0**16)
    _, true = loss_and_gradients(sparse_cross_entropy_reference, in_fp64(inputs), 2.0**16)
    assert (true / 2**16).abs().median() < 1e-6
    small = true.abs() < true.abs().median()
    for some in (small, ~small):
        assert_close(got.double()[some], true[some], dtype=FP16)


def test_the_loss_of_a_sure_row_is_not_rounded_away(device):
    inputs = make_inputs(1, 100, 1, device=device)
    inputs["probs"][:] = 1.0
    inputs["logits"] += 500
    inputs["logits"][:, inputs["indices"][0]] = inputs["logits"].max() + 8
    truth = sparse_cross_entropy_reference(**in_fp64(inputs))
    assert 1e-4 < truth < 1e-2
    # the logarithm of 1 + the loss: an eps or so beside the 1
    assert_within(triton_loss(**inputs), truth, 1e-3)


def test_rows_of_a_wider_buffer(device):
    """What lies beside the rows is NaN, or no class."""
    inputs = make_inputs(5, 100, 7, device=device)
    expected = loss_and_gradients(triton_loss, inputs)

    def assert_same(change):
        changed = {k: change(t) for k, t in inputs.items()}
        assert all(not t.is_contiguous() for t in changed.values())
        got = loss_and_gradients(triton_loss, changed)
        assert_equal(got, expected)

    def wider(t):
        fill = torch.nan if t.is_floating_point() else 10**9
        buffer = torch.full((5, 333), fill, device=device, dtype=t.dtype)
        buffer[:, 7 : 7 + t.shape[1]] = t
        return buffer[:, 7 : 7 + t.shape[1]]

    assert_same(wider)
    assert_same(lambda t: t.t().contiguous().t())
    row = inputs["probs"][:1]
    expected = triton_loss(**inputs | {"probs": row.repeat(5, 1)})
    got = triton_loss(**inputs | {"probs": row.expand(5, 7)})
    assert_equal(got, expected)


@pytest.mark.parametrize("bad", [-1, 10, 2**31 + 3, 2**32 + 1, 2**40])
def test_an_index_out_of_range_is_nan(bad, device):
    inputs = make_inputs(4, 10, 3, device=device)
    inputs["indices"][2, 1] = bad
    loss, grad = loss_and_gradients(triton_loss, inputs)
    assert loss.isnan() and grad[2].isnan().all() and not grad[[0, 1, 3]].isnan().any()
    if device == "cpu":  # on a GPU PyTorch's assertion ends the process
        with pytest.raises(RuntimeError, match="index"):
            sparse_cross_entropy(**inputs, implementation="torch")


@both
@pytest.mark.parametrize("C", [10, 5000])
def test_classes_left_out(implementation, C, device):
    """-inf where the target is 0, in a whole block too: they cost nothing."""
    loss_of = partial(sparse_cross_entropy, implementation=implementation)
    inputs = make_inputs(3, C, 4, device=device)
    inputs["indices"][:] = torch.tensor([C - 1, C - 3, C - 2, 0], device=device)
    inputs["probs"][:] = torch.tensor([0.5, 0.375, 0.125, 0.0], device=device)
    out = torch.arange(C, device=device) < C - 4
    inputs["logits"][:, out] = -torch.inf
    assert loss_of(**inputs).isfinite()
    assert_accurate(inputs)
    inputs["probs"][1, 0] = 0.25  # now the second row has a target for every class
    assert loss_of(**inputs) == torch.inf
    inputs["logits"][1, 1:] = 0.0  # but for that of probability 0
    assert loss_of(**inputs).isfinite()
    assert_accurate(inputs)


@both
def test_a_class_the_target_wants_and_the_student_excludes_costs_infinitely_much(
    implementation, device
):
    loss_of = partial(sparse_cross_entropy, implementation=implementation)
    inputs = make_inputs(3, 10, 2, device=device)
    assert loss_of(**inputs).isfinite()
    changed = inputs | {"logits": inputs["logits"].clone()}
    changed["logits"][1, inputs["indices"][1, 1]] = -torch.inf  # one of the K
    assert loss_of(**changed) == torch.inf
    changed = inputs | {"logits": inputs["logits"].clone()}
    other = next(c for c in range(10) if c not in inputs["indices"][1].tolist())
    changed["logits"][1, other] = -torch.inf  # one of the rest
    assert loss_of(**changed) == torch.inf
    changed["logits"][1] = -torch.inf  # no class left
    assert loss_of(**changed).isnan()


@both
@pytest.mark.parametrize("where", ["logits", "probs"])
def test_nan_reaches_the_loss_and_stays_in_its_row(implementation, where, device):
    for C, K in ((5000, 3), (3, 3)):
        inputs = make_inputs(4, C, K, device=device)
        inputs[where][2, -1] = torch.nan
        fn = partial(sparse_cross_entropy, implementation=implementation)
        loss, grad = loss_and_gradients(fn, inputs)
        assert loss.isnan()
        assert not grad[[0, 1, 3]].isnan().any()
        if where == "logits" or K < C:
            assert grad[2].isnan().all()


@both
def test_no_rows_make_nan_as_in_torch(implementation, device):
    inputs = make_inputs(0, 10, 3, device=device)
    loss, grad = loss_and_gradients(
        partial(sparse_cross_entropy, implementation=implementation), inputs
    )
    assert loss.isnan() and loss.shape == () and grad.shape == (0, 10)


def test_a_gradient_that_is_not_needed_is_not_computed(device):
    inputs = make_inputs(3, 10, 2, device=device)
    loss, dz = _fwd(*inputs.values(), False)
    assert dz.numel() == 0
    expected, _ = loss_and_gradients(triton_loss, inputs)
    assert_equal(loss, expected)
    with torch.no_grad():
        assert not triton_loss(
            **inputs | {"logits": inputs["logits"].clone().requires_grad_()}
        ).requires_grad


@both
def test_probabilities_are_constants(implementation, device):
    inputs = make_inputs(3, 10, 2, device=device)
    inputs["logits"].requires_grad_()
    inputs["probs"].requires_grad_()
    sparse_cross_entropy(**inputs, implementation=implementation).backward()
    assert inputs["logits"].grad.abs().sum() > 0 and inputs["probs"].grad is None


def test_second_derivatives_are_torchs(device):
    inputs = make_inputs(3, 10, 2, device=device)
    z = inputs["logits"].requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True needs .* implementation='torch'"):
        torch.autograd.grad(triton_loss(**inputs), z, create_graph=True)
    loss = sparse_cross_entropy(**inputs, implementation="torch")
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), z)[0].abs().sum() > 0


def test_op_contract(device):
    inputs = make_inputs(3, 10, 2, device=device)
    inputs["logits"].requires_grad_()
    torch.library.opcheck(_fwd.op, (*inputs.values(), True))
    with torch.no_grad():
        torch.library.opcheck(_fwd.op, (*(t.detach() for t in inputs.values()), False))


def test_compiles_into_one_graph(device):
    inputs = make_inputs(5, 100, 7, device=device)
    logits = inputs.pop("logits")
    check_compiles(lambda z: triton_loss(z.sin(), **inputs) * 3, [logits])


def test_bad_input_is_named(device):
    z, i, q = make_inputs(3, 10, 2, device=device).values()
    with pytest.raises(ValueError, match=r"logits has shape \(3, 0\), expected \(B, C\)"):
        sparse_cross_entropy(z[:, :0], i, q)
    with pytest.raises(ValueError, match=r"logits has shape \(10,\), expected \(B, C\)"):
        sparse_cross_entropy(z[0], i, q)
    with pytest.raises(
        ValueError, match=r"indices has shape \(3, 11\), expected .* K from 1 to 10"
    ):
        sparse_cross_entropy(z, i[:, :1].repeat(1, 11), q)
    with pytest.raises(ValueError, match=r"indices has shape \(3, 0\), expected \(3, K\)"):
        sparse_cross_entropy(z, i[:, :0], q[:, :0])
    with pytest.raises(ValueError, match=r"indices has shape \(3,\), expected \(3, K\)"):
        sparse_cross_entropy(z, i[:, 0], q)
    with pytest.raises(ValueError, match=r"indices has shape \(2, 2\), expected \(3, 2\)"):
        sparse_cross_entropy(z, i[:2], q)
    with pytest.raises(ValueError, match=r"probs has shape \(3, 1\), expected \(3, 2\)"):
        sparse_cross_entropy(z, i, q[:, :1])
    with pytest.raises(TypeError, match="indices has dtype torch.int16, expected int64 or int32"):
        sparse_cross_entropy(z, i.short(), q)
    with pytest.raises(TypeError, match="probs has dtype torch.int64, expected floating"):
        sparse_cross_entropy(z, i, q.long())
    with pytest.raises(TypeError, match="logits has dtype torch.int64, expected floating"):
        sparse_cross_entropy(z.long(), i, q)
    with pytest.raises(ValueError, match="implementation: 'cuda'"):
        sparse_cross_entropy(z, i, q, implementation="cuda")
    with pytest.raises(TypeError, match="float64"):
        sparse_cross_entropy(z.double(), i, q, implementation="triton")
    with pytest.raises(ValueError, match=f"indices is on meta, expected {device}"):
        sparse_cross_entropy(z, i.to("meta"), q)
