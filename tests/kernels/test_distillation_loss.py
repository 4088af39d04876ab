"""distillation_loss against fp64: both terms, loss and gradients, and the odd rows."""

from functools import partial

import losses
import pytest
import selection
import torch
from checking import (
    BF16,
    FP16,
    FP32,
    NO_CODE,
    ROW_DTYPES,
    assert_close,
    assert_equal,
    assert_within,
    check,
    check_compiles,
)

from deit_fast.kernels import cases, distillation_loss, distillation_loss_reference
from deit_fast.kernels.cases import distillation_loss_inputs as make_inputs
from deit_fast.kernels.distillation_loss import DISTILLATIONS, _fwd

triton_loss = partial(distillation_loss, implementation="triton")
check_loss = partial(check, no_grad=("target", "teacher_logits"))
LOGITS = ("class_logits", "dist_logits")
loss_and_gradients = partial(losses.loss_and_gradients, logits=LOGITS)
assert_accurate = partial(
    losses.assert_accurate, triton_loss, distillation_loss_reference, logits=LOGITS
)
in_fp64 = partial(losses.in_dtype, dtype=torch.float64)
every_distillation = pytest.mark.parametrize("distillation", DISTILLATIONS)
labels_and_mixup = pytest.mark.parametrize("soft_target", [False, True], ids=["labels", "mixup"])
# numpy's, of the interpreter: columns beyond the last are -inf - -inf before they are masked
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=str)
@labels_and_mixup
@every_distillation
@pytest.mark.parametrize("case", cases.DISTILLATION_LOSS, ids=str)
def test_no_less_accurate_than_torch(case, distillation, soft_target, dtype, device):
    inputs = make_inputs(**case, distillation=distillation, soft_target=soft_target, device=device)
    check_loss(triton_loss, distillation_loss_reference, inputs, dtype)


@every_distillation
def test_weight_temperature_and_smoothing(distillation, device):
    inputs = make_inputs(4, 100, distillation, device=device)
    inputs |= {"alpha": 0.3, "temperature": 1.7, "label_smoothing": 0.1}
    check_loss(triton_loss, distillation_loss_reference, inputs, FP32)
    inputs |= {"alpha": 1.0, "label_smoothing": 1.0}
    check_loss(triton_loss, distillation_loss_reference, inputs, FP32)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_equations_of_the_paper(implementation, device):
    """Written out in probabilities, with the paper's weight and temperature."""
    inputs = make_inputs(6, 50, device=device)
    z, d, y, t = (inputs[k] for k in ("class_logits", "dist_logits", "target", "teacher_logits"))
    rows = torch.arange(6, device=device)
    ce = -z.double().softmax(1)[rows, y].log().mean()
    teacher, student = ((x.double() / 3.0).softmax(1) for x in (t, d))
    kl = (teacher * (teacher / student).log()).sum() / 6
    hard = -d.double().softmax(1)[rows, t.argmax(1)].log().mean()
    loss = partial(distillation_loss, implementation=implementation)
    for distillation, expected in (("soft", 0.9 * ce + 0.1 * 9 * kl), ("hard", ce / 2 + hard / 2)):
        assert_close(loss(z, d, y, t, distillation), expected.float())
    assert_close(loss(z, None, y, distillation="none"), ce.float())
    smooth = torch.nn.functional.cross_entropy(z, y, label_smoothing=0.1)
    got = loss(z, None, y, distillation="none", label_smoothing=0.1, alpha=0.7)
    assert_close(got, smooth)  # no teacher to give a weight to


@pytest.mark.parametrize("distillation", ["soft", "hard"])
def test_usual_distillation_through_the_class_token(distillation, device):
    """One tensor for both heads: its gradients add up."""
    inputs = make_inputs(5, 100, device=device)
    del inputs["dist_logits"], inputs["distillation"]

    def once(fn, class_logits, **rest):
        return fn(class_logits, class_logits, distillation=distillation, **rest)

    check_loss(partial(once, triton_loss), partial(once, distillation_loss_reference), inputs, FP32)


@pytest.mark.parametrize("distillation", ["soft", "hard"])
def test_mixed_dtypes(distillation, device):
    inputs = make_inputs(5, 100, distillation, soft_target=True, device=device)
    for k, dtype in (("class_logits", BF16), ("dist_logits", FP32), ("teacher_logits", FP16)):
        inputs[k] = inputs[k].to(dtype)
    assert_accurate(inputs, 0.3)
    inputs["class_logits"], inputs["dist_logits"] = inputs["dist_logits"], inputs["class_logits"]
    assert_accurate(inputs, 0.3)
    with torch.autocast(device, BF16):
        assert triton_loss(**inputs).dtype == FP32


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_gradients_are_rounded_once(dtype, device):
    """After the multiplication with the upstream gradient, which is fp32 too."""
    inputs = make_inputs(4, 1000, "soft", device=device)
    inputs = {k: t.to(dtype) if k.endswith("logits") else t for k, t in inputs.items()}
    _, *grads = loss_and_gradients(triton_loss, inputs, 0.3)
    _, *true = loss_and_gradients(distillation_loss_reference, in_fp64(inputs), 0.3)
    for got, expected in zip(grads, true, strict=True):
        assert (got == expected.to(dtype)).float().mean() > 0.99  # fp32 shifts a few across


def test_a_loss_scale_keeps_small_gradients_in_fp16(device):
    """Of probabilities that over B are below what fp16 can hold."""
    inputs = make_inputs(16, 1000, "soft", device=device)
    for k, below in (("class_logits", 16), ("dist_logits", 40), ("teacher_logits", 50)):
        inputs[k][:, 1:] -= below
    inputs = {k: t.half() if k.endswith("logits") else t for k, t in inputs.items()}
    _, *grads = loss_and_gradients(triton_loss, inputs, 2.0**16)
    _, *true = loss_and_gradients(distillation_loss_reference, in_fp64(inputs), 2.0**16)
    for got, expected in zip(grads, true, strict=True):
        assert (expected / 2**16).abs().median() < 1e-6
        small = expected.abs() < expected.abs().median()
        for some in (small, ~small):
            assert_close(got.double()[some], expected[some], dtype=FP16)


def test_the_loss_of_a_sure_row_is_not_rounded_away(device):
    inputs = make_inputs(1, 100, "hard", device=device)
    labels = inputs["target"], inputs["teacher_logits"].argmax()
    for k, label in zip(LOGITS, labels, strict=True):
        inputs[k] += 500
        inputs[k][:, label] = inputs[k].max() + 8
    truth = distillation_loss_reference(**in_fp64(inputs))
    assert 1e-4 < truth < 1e-2
    # the logarithm of 1 + the loss: an eps or so beside the 1
    assert_within(triton_loss(**inputs), truth, 1e-3)


def test_rows_of_a_wider_buffer(device):
    """As one GEMM for both heads leaves them; what lies beside the rows is NaN."""
    inputs = make_inputs(5, 100, "soft", soft_target=True, device=device)
    expected = loss_and_gradients(triton_loss, inputs)
    tensors = [k for k, t in inputs.items() if isinstance(t, torch.Tensor)]

    def assert_same(change):
        changed = inputs | {k: change(inputs[k]) for k in tensors}
        assert any(not changed[k].is_contiguous() for k in tensors)
        got = loss_and_gradients(triton_loss, changed)
        assert_equal(got, expected)

    def wider(t):
        buffer = torch.full((5, 333), torch.nan, device=device)
        buffer[:, 7:107] = t
        return buffer[:, 7:107]

    assert_same(wider)
    assert_same(lambda t: t.t().contiguous().t())
    inputs = make_inputs(5, 100, "hard", device=device)
    expected = triton_loss(**inputs)
    inputs["target"] = inputs["target"].repeat_interleave(2)[::2]
    assert_equal(triton_loss(**inputs), expected)
    row = inputs["teacher_logits"][:1]
    expected = triton_loss(**inputs | {"teacher_logits": row.repeat(5, 1)})
    got = triton_loss(**inputs | {"teacher_logits": row.expand(5, 100)})
    assert_equal(got, expected)


@pytest.mark.parametrize("label", [-1, -100, 10, 2**32 + 1])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_label_out_of_range_is_nan(label, smoothing, device):
    inputs = make_inputs(4, 10, device=device) | {"label_smoothing": smoothing}
    inputs["target"][2] = label
    loss, dz, dd = loss_and_gradients(triton_loss, inputs)
    assert loss.isnan() and not dd.isnan().any()
    assert dz[2].isnan().all() and not dz[[0, 1, 3]].isnan().any()
    if device == "cpu":  # on a GPU PyTorch's assertion ends the process
        with pytest.raises(IndexError):
            distillation_loss(**inputs, implementation="torch")


@pytest.mark.parametrize("C", [10, 5000])
@labels_and_mixup
@every_distillation
def test_classes_left_out(distillation, soft_target, C, device):
    """-inf where the target is 0, in a whole block too: they cost nothing."""
    inputs = make_inputs(3, C, distillation, soft_target, device=device)
    out = torch.arange(C, device=device) < C - 4
    if soft_target:
        inputs["target"][:, out] = 0
    else:
        inputs["target"][:] = C - 2
    for k in (*LOGITS, "teacher_logits"):
        if inputs[k] is not None:
            inputs[k][:, out] = -torch.inf
    assert loss_and_gradients(triton_loss, inputs)[0].isfinite()
    assert_accurate(inputs)
    if distillation == "soft":
        inputs["dist_logits"] = make_inputs(3, C, device=device)["dist_logits"]
        assert_accurate(inputs)


def test_a_class_the_target_wants_and_the_student_excludes_costs_infinitely_much(device):
    inputs = make_inputs(3, 10, "none", device=device)
    inputs["class_logits"][1, (inputs["target"][1] + 1) % 10] = -torch.inf
    assert triton_loss(**inputs).isfinite()
    assert triton_loss(**inputs, label_smoothing=0.1) == torch.inf
    inputs = make_inputs(3, 10, "soft", device=device)
    inputs["dist_logits"][1, 4] = -torch.inf
    assert triton_loss(**inputs) == torch.inf
    inputs["dist_logits"][1] = -torch.inf  # no class left
    assert triton_loss(**inputs).isnan()


@pytest.mark.parametrize("where", [*LOGITS, "teacher_logits", "target"])
@pytest.mark.parametrize("distillation", ["soft", "hard"])
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_nan_reaches_the_loss_and_stays_in_its_row(implementation, distillation, where, device):
    inputs = make_inputs(4, 5000, distillation, soft_target=True, device=device)
    inputs[where][2, 4321] = torch.nan
    fn = partial(distillation_loss, implementation=implementation)
    loss, dz, dd = loss_and_gradients(fn, inputs)
    assert loss.isnan()
    touched, other = (dz, dd) if where in ("class_logits", "target") else (dd, dz)
    others = [0, 1, 3]
    assert not other.isnan().any() and not touched[others].isnan().any()
    if implementation == "triton":  # torch's argmax leaves no trace of a teacher's NaN in gradients
        assert touched[2].isnan().all()


@pytest.mark.parametrize("equal", [(3, 7), (10, 4500), (4096, 4097), (0, 4999)])
def test_of_equal_teacher_logits_the_first_is_the_label(equal, device):
    inputs = make_inputs(2, 5000, device=device)
    inputs["teacher_logits"][:, equal] = 50.0
    labels = torch.full((2,), equal[0], device=device)
    _, _, dd = loss_and_gradients(triton_loss, inputs)
    assert torch.equal(dd.argmin(1), labels)
    inputs["teacher_logits"][:] = -1.0
    _, _, dd = loss_and_gradients(triton_loss, inputs)
    assert torch.equal(dd.argmin(1), torch.zeros_like(labels))


@every_distillation
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_no_rows_make_nan_as_in_torch(implementation, distillation, device):
    inputs = make_inputs(0, 10, distillation, device=device)
    fn = partial(distillation_loss, implementation=implementation)
    loss, *grads = loss_and_gradients(fn, inputs)
    assert loss.isnan() and loss.shape == () and all(g.shape == (0, 10) for g in grads)


def test_gradients_that_are_not_needed_are_not_computed(device):
    inputs = make_inputs(3, 10, "soft", device=device)
    tensors = [inputs[k] for k in (*LOGITS, "target", "teacher_logits")]
    rest = ("soft", 0.1, 3.0, 0.0)
    loss, dz, dd = _fwd(*tensors, *rest, False, False)
    assert dz.numel() == dd.numel() == 0
    expected = loss_and_gradients(triton_loss, inputs)
    assert_equal(loss, expected[0])
    for i, name in enumerate(LOGITS):
        leaf = inputs[name].detach().requires_grad_()
        (got,) = torch.autograd.grad(triton_loss(**inputs | {name: leaf}), leaf)
        assert_equal(got, expected[1 + i])
        with torch.no_grad():
            assert not triton_loss(**inputs | {name: leaf}).requires_grad


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_target_and_teacher_are_constants(implementation, device):
    inputs = make_inputs(3, 10, "soft", soft_target=True, device=device)
    for name in ("class_logits", "target", "teacher_logits"):
        inputs[name].requires_grad_()
    distillation_loss(**inputs, implementation=implementation).backward()
    assert inputs["class_logits"].grad.abs().sum() > 0
    assert inputs["target"].grad is None and inputs["teacher_logits"].grad is None


def test_second_derivatives_are_torchs(device):
    inputs = make_inputs(3, 10, "soft", device=device)
    z = inputs["class_logits"].requires_grad_()
    with pytest.raises(RuntimeError, match="create_graph=True needs .* implementation='torch'"):
        torch.autograd.grad(triton_loss(**inputs), z, create_graph=True)
    loss = distillation_loss(**inputs, implementation="torch")
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), z)[0].abs().sum() > 0


@labels_and_mixup
@every_distillation
def test_op_contract(distillation, soft_target, device):
    inputs = make_inputs(3, 10, distillation, soft_target, device=device)
    inputs["class_logits"].requires_grad_()
    taught = distillation != "none"
    if taught:
        inputs["dist_logits"].requires_grad_()
    tensors = [inputs[k] for k in (*LOGITS, "target", "teacher_logits")]
    torch.library.opcheck(_fwd.op, (*tensors, distillation, 0.4, 2.0, 0.0, True, taught))
    with torch.no_grad():
        tensors = [t if t is None else t.detach() for t in tensors]
        torch.library.opcheck(_fwd.op, (*tensors, distillation, 0.4, 2.0, 0.0, False, False))


@pytest.mark.parametrize(
    "distillation, compiler",
    [pytest.param("soft", "inductor", marks=pytest.mark.slow), ("hard", NO_CODE)],
)
def test_compiles_into_one_graph(distillation, compiler, device):
    if compiler == "inductor":
        selection.compiler()
    inputs = make_inputs(5, 100, distillation, device=device)
    logits = [inputs.pop(k) for k in LOGITS]

    def f(z, d):
        loss = triton_loss(z.sin(), d.cos(), label_smoothing=0.1, **inputs)
        return loss * 3 + triton_loss(z, None, inputs["target"], distillation="none")

    check_compiles(f, logits, compiler)


def test_bad_input_is_named(device):
    inputs = make_inputs(3, 10, device=device)
    z, d, y, t = (inputs[k] for k in (*LOGITS, "target", "teacher_logits"))
    with pytest.raises(ValueError, match="distillation 'kl', expected one of"):
        distillation_loss(z, d, y, t, "kl")
    with pytest.raises(ValueError, match="teacher_logits is None, expected a tensor .* 'hard'"):
        distillation_loss(z, d, y)
    with pytest.raises(ValueError, match="dist_logits is None, expected a tensor .* 'soft'"):
        distillation_loss(z, None, y, t, "soft")
    with pytest.raises(ValueError, match="dist_logits is a tensor, expected None .* 'none'"):
        distillation_loss(z, d, y, None, "none")
    with pytest.raises(ValueError, match=r"class_logits has shape \(3, 0\), expected \(B, C\)"):
        distillation_loss(z[:, :0], d, y, t)
    with pytest.raises(ValueError, match=r"class_logits has shape \(10,\), expected \(B, C\)"):
        distillation_loss(z[0], d, y, t)
    with pytest.raises(ValueError, match=r"dist_logits has shape \(3, 9\), expected \(3, 10\)"):
        distillation_loss(z, d[:, :9], y, t)
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(2, 10\), expected \(3, 10\)"):
        distillation_loss(z, d, y, t[:2])
    with pytest.raises(ValueError, match=r"target has shape \(3, 1\), expected \(3,\)"):
        distillation_loss(z, d, y[:, None], t)
    with pytest.raises(ValueError, match=r"target has shape \(3,\), expected \(3, 10\)"):
        distillation_loss(z, d, y.float(), t)
    with pytest.raises(TypeError, match="target has dtype torch.int32, expected int64"):
        distillation_loss(z, d, y.int(), t)
    with pytest.raises(TypeError, match="teacher_logits has dtype torch.int64, expected floating"):
        distillation_loss(z, d, y, t.long())
    for alpha in (-0.1, 1.1, torch.nan):
        with pytest.raises(ValueError, match="alpha .*, expected 0 to 1"):
            distillation_loss(z, d, y, t, alpha=alpha)
    for temperature in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="temperature .*, expected it above 0"):
            distillation_loss(z, d, y, t, temperature=temperature)
    with pytest.raises(ValueError, match="label_smoothing 1.5, expected 0 to 1"):
        distillation_loss(z, d, y, t, label_smoothing=1.5)
    mixed = make_inputs(3, 10, soft_target=True, device=device)["target"]
    with pytest.raises(
        ValueError, match="label_smoothing 0.1 with soft targets, expected 0: Mixup"
    ):
        distillation_loss(z, d, mixed, t, label_smoothing=0.1)
    with pytest.raises(ValueError, match="implementation: 'cuda'"):
        distillation_loss(z, d, y, t, implementation="cuda")
    with pytest.raises(TypeError, match="float64"):
        distillation_loss(z.double(), d, y, t, implementation="triton")
