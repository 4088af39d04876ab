"""Every numerical comparison of the suite, and the rule that each goes by.

assert_as_accurate  against fp64: at most twice PyTorch's own error in the same dtype
assert_close        two ways to compute the same: apart by roundings of their dtype
assert_equal        the same bits
assert_within       a relative error of at most a share that the test states and explains

The size of a tensor is its norm. Where terms cancel in the truth to nothing, an error says nothing
beside the truth's own size: `terms` is what cancels, and a truth that is less than the dtype
resolves of it (one eps) is judged beside the terms, by an absolute bound of a few eps of them.
"""

import json
import os
from pathlib import Path

import torch

FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
ROW_DTYPES = DOT_DTYPES = [BF16, FP16, FP32]
HALVES = [FP16, BF16]

# What two orders of the same operations differ by at most, in whole models too, beside the size of
# the result: some hundred roundings in fp32 and fp64, of half precision those of the result alone
APART = {FP64: 1e-12, FP32: 1e-5, FP16: 2e-3, BF16: 1.6e-2}
# ... and the largest difference of single numbers, beside the largest number
PEAK = 10
# A tensor of so few numbers has an error of its own by chance; so has a row of 33 that 7 numbers
# times a matrix give
FEW = 64
# What fp64 leaves of terms of size 1 that cancel to zero is less, for each number
NOTHING = 1e-12
# What cancels to nothing leaves this many eps of the terms
CANCELLED = 32

# Scores are written with six digits; the last one may be rounded either way
SIXTH_DIGIT = 1.01e-6

# A number halfway between two quantized values rounds to either after sums in another order. Of all
# that quantization changes in a model, a rounding of each number, those few are this share at most
NEIGHBOURS = 0.4
# What quantization changes at most, with random weights. In a layer each fp8 operand errs by 2.6 %
# (a number by a sixteenth at most), each int8 operand by 0.7 % (a number by half a 127th of its
# row's largest); both together by 1.4 times that, and rows with large numbers by more. Of a block
# 5 % was the most in eight seeds, of the logits after two blocks 14 %.
QUANTIZED_LAYER = {"fp8": 0.06, "int8": 0.03}
QUANTIZED_BLOCK = 0.1
QUANTIZED_LOGITS = 0.2


def the_seed() -> int:
    """--seed; also in processes of tests. Not known yet when conftest.py imports this file."""
    return int(os.environ.get("DEIT_FAST_TEST_SEED") or 0)


def seeded(number: int) -> int:
    """`number`, or another for each --seed: for generators of a test's inputs."""
    return number + 1_000_003 * the_seed()


def seed(number: int) -> None:
    """torch.manual_seed, by --seed."""
    torch.manual_seed(seeded(number))


def note_margin(what: str, error: float, allowed: float) -> None:
    """Errors near their bound are written down (--margins)."""
    path = os.environ.get("DEIT_FAST_TEST_MARGINS")
    if path and error > 0.8 * allowed:
        test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
        line = {"test": test, "what": what, "error": error, "allowed": allowed, "seed": the_seed()}
        with Path(path).open("a") as file:
            file.write(json.dumps(line | {"margin": round(error / allowed, 3)}) + "\n")


def assert_at_most(error: float, allowed: float, what: str = "") -> None:
    note_margin(what, error, allowed)
    assert error <= allowed, f"{what}: error {error:.2e} > {allowed:.2e} (--seed {the_seed()})"


def size(t) -> float:
    return t.detach().double().norm().item()


def relative_error(got, true) -> float:
    got, true = got.detach().double(), true.detach().double()
    return ((got - true).norm() / true.norm().clamp_min(1e-300)).item() if true.numel() else 0.0


def rms(terms) -> float:
    """Of a tensor, or a number that is one already."""
    return size(terms) / max(1, terms.numel()) ** 0.5 if torch.is_tensor(terms) else float(terms)


def assert_as_accurate(got, torchs, true, what="", factor=2.0, terms=None, dtype=None, typical=0):
    """`got` errs at most `factor` times what PyTorch errs in the same dtype, plus 4 eps of fp32.

    terms: a tensor as large, number for number, as what is summed in `true`. Where it is larger
    than the truth, terms cancel, and those 4 eps count beside it. Of a truth that is below one eps
    of `dtype` (that of the arithmetic; got's) beside it, PyTorch's own error is luck: 32 eps of the
    terms are allowed. Where the truth is zero everywhere, but for what fp64 rounds, and no terms
    are given, they are of size 1, as inputs are.
    typical: PyTorch's relative error in tensors like this one. Of few numbers its error in these
    alone is luck, too: of 4, one draw in ten is twice another."""
    assert got.shape == true.shape, f"{what}: {tuple(got.shape)} != {tuple(true.shape)}"
    assert not got.isnan().any(), f"{what}: NaN"
    if not true.numel():
        return
    true = true.detach().double()
    whole = beside = size(true)
    if terms is not None or whole <= NOTHING * true.numel() ** 0.5:
        beside = max(whole, rms(1.0 if terms is None else terms) * true.numel() ** 0.5)
    error, torch_error = size(got.double() - true), size(torchs.double() - true)
    if true.numel() <= FEW:
        torch_error = max(torch_error, typical * whole)
    allowed = factor * torch_error + 4 * torch.finfo(FP32).eps * beside
    cancelled = torch.finfo(dtype or got.dtype).eps * beside
    if terms is not None and whole < cancelled:
        allowed = max(allowed, CANCELLED * cancelled)
    assert_at_most(error, allowed, what)


def assert_gradients_as_accurate(got, torchs, true, dtype=None):
    """Named tensors. A bias's gradient is a sum of rows dy; its weight's is the same sum with
    factors of size 1 or so, in which the rows do not cancel: these are its terms."""
    assert got.keys() == torchs.keys() == true.keys()
    errors = [relative_error(torchs[name], t) for name, t in true.items() if t is not None]
    typical = sorted(errors)[len(errors) // 2]
    for name, exact in true.items():
        assert (got[name] is None) == (exact is None), name
        if exact is None:
            continue
        assert got[name].dtype == torchs[name].dtype, name
        terms = _terms(true, name)
        assert_as_accurate(
            got[name], torchs[name], exact, name, terms=terms, dtype=dtype, typical=typical
        )


def _terms(gradients, name):
    return gradients.get(name.removesuffix("bias") + "weight") if name.endswith("bias") else None


def assert_close(got, expected, what="", terms=None, dtype=None):
    """Tensors, or containers of them, that two ways gave in one dtype: apart by APART[dtype] of
    their size at most, single numbers by ten times that of the largest. terms: as above, where
    `expected` is nothing beside it. dtype: of the arithmetic, where coarser than the result's."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), what
        for k in expected:
            assert_close(got[k], expected[k], f"{what} {k}".strip(), terms, dtype)
        return
    if isinstance(expected, list | tuple):
        assert len(got) == len(expected), what
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_close(a, b, f"{what} {i}".strip(), terms, dtype)
        return
    if expected is None or not expected.is_floating_point():
        return assert_equal(got, expected, what)
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} != {tuple(expected.shape)}"
    assert got.dtype == expected.dtype, f"{what}: {got.dtype} != {expected.dtype}"
    assert got.device == expected.device, f"{what}: {got.device} != {expected.device}"
    if not expected.numel() or torch.equal(got, expected):
        return
    assert not got.isnan().any(), f"{what}: NaN"
    apart, beside = (
        (got.detach().double() - expected.detach().double()),
        0.0 if terms is None else rms(terms),
    )
    allowed = APART[dtype or expected.dtype]
    whole = max(size(expected), beside * expected.numel() ** 0.5)
    assert_at_most(size(apart), allowed * whole, what)
    largest = max(expected.detach().abs().max().item(), beside)
    assert_at_most(apart.abs().max().item(), PEAK * allowed * largest, f"{what}, a single number")


def assert_gradients_close(got, expected, dtype=None):
    """`assert_close` of named tensors, with the terms that a bias's gradient has."""
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name], name, _terms(expected, name), dtype)


def assert_equal(got, expected, what=""):
    """Tensors, or containers of them: the same bits, NaN where NaN is."""
    torch.testing.assert_close(
        got, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def assert_within(got, expected, share, what=""):
    """|got - expected| is at most `share` of |expected|: of a number (or some), or of a tensor's
    norm. For what is no rounding of one dtype: quantized beside half precision, statistics."""
    got, expected = (torch.as_tensor(t).detach().double() for t in (got, expected))
    assert got.shape == expected.shape, f"{what}: {tuple(got.shape)} != {tuple(expected.shape)}"
    assert_at_most(size(got - expected), share * size(expected), what)


def assert_differ(got, expected, what=""):
    """By a thousandth at least, which is far above rounding: what was changed is seen."""
    assert relative_error(got, expected) > 1e-3, f"{what}: the same"


def as_list(outputs):
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def run(fn, inputs, upstream):
    """Outputs of fn(**inputs), and the gradients of every input that requires one."""
    outputs = as_list(fn(**inputs))
    wanted = {k: t for k, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad}
    grads = ()
    if upstream is not None and wanted:
        grads = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
    named = {f"output {i}": t for i, t in enumerate(outputs)}
    return named | {f"grad of {k}": g for k, g in zip(wanted, grads, strict=False)}


def check(fn, reference, inputs, dtype, grads=True, no_grad=("row_scale",)):
    """fn against reference: values and, with random upstream gradients, gradients. Float tensors
    among `inputs` (made in fp32) are rounded to `dtype` first, so that all three see the same
    numbers."""

    def cast(t, to):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return t.detach().to(dtype).to(to)

    def prepare(to):
        made = {k: cast(t, to) for k, t in inputs.items()}
        for k, t in made.items():
            if grads and isinstance(t, torch.Tensor) and t.is_floating_point() and k not in no_grad:
                t.requires_grad_()
        return made

    with torch.no_grad():
        shapes = as_list(reference(**prepare(dtype)))
    seed(1)
    upstream = [torch.randn(t.shape, device=t.device).to(dtype) for t in shapes] if grads else None
    exact_upstream = [u.double() for u in upstream] if grads else None
    got = run(fn, prepare(dtype), upstream)
    torchs = run(reference, prepare(dtype), upstream)
    truth = run(reference, prepare(FP64), exact_upstream)
    assert_gradients_as_accurate(got, torchs, truth)


# All that torch.compile does to a graph, and no C++ compiler, which takes most of the time on a CPU
NO_CODE = "aot_eager_decomp_partition"


def check_compiles(fn, leaves, backend=NO_CODE):
    """fn(*leaves) and its gradients are the same in one compiled graph. The whole models go through
    Inductor (tests/layers)."""
    leaves = [t.requires_grad_() for t in leaves]
    out, compiled = fn(*leaves), torch.compile(fn, fullgraph=True, backend=backend)(*leaves)
    assert_close(compiled, out)
    upstream = torch.randn_like(out)
    assert_close(
        torch.autograd.grad(compiled, leaves, upstream), torch.autograd.grad(out, leaves, upstream)
    )
