"""The yardstick of every numerical test: relative error against fp64, next to PyTorch's own."""

import pytest
import torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ROW_DTYPES = [FP32, FP16, BF16]
# Triton's interpreter computes bf16 dots wrongly (triton issue 11584)
DOT_DTYPES = [FP32, FP16, pytest.param(BF16, marks=pytest.mark.gpu)]


def relative_error(got, true):
    got, true = got.detach().double(), true.detach().double()
    return ((got - true).norm() / true.norm().clamp_min(1e-300)).item() if true.numel() else 0.0


def assert_as_accurate(got, same_dtype, true, what="", factor=2.0):
    """`got` errs at most `factor` times what PyTorch errs in the same dtype, plus a few eps. Where
    the truth is nothing but zeros, errors count against 1, the size of the inputs."""
    assert got.shape == true.shape, f"{what}: {tuple(got.shape)} != {tuple(true.shape)}"
    assert not got.isnan().any(), f"{what}: NaN"
    if true.numel() and not true.any():
        got, same_dtype, true = (t.double() + 1 for t in (got, same_dtype, true))
    error = relative_error(got, true)
    allowed = factor * relative_error(same_dtype, true) + 4 * torch.finfo(torch.float32).eps
    assert error <= allowed, f"{what}: relative error {error:.2e} > {allowed:.2e}"


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
    torch.manual_seed(1)
    upstream = [torch.randn(t.shape, device=t.device).to(dtype) for t in shapes] if grads else None
    exact_upstream = [u.double() for u in upstream] if grads else None
    got = run(fn, prepare(dtype), upstream)
    torchs = run(reference, prepare(dtype), upstream)
    truth = run(reference, prepare(torch.float64), exact_upstream)
    assert got.keys() == torchs.keys() == truth.keys()
    # Triton's interpreter rounds bf16 towards zero, which errs twice as much as to nearest
    truncates = dtype == BF16 and not torch.cuda.is_available()
    factor = 2.5 if truncates else 2.0
    for name, true in truth.items():
        assert (got[name] is None) == (true is None), name
        if true is not None:
            assert got[name].dtype == torchs[name].dtype, name
            assert_as_accurate(got[name], torchs[name], true, name, factor)


# All that torch.compile does to a graph, and no C++ compiler, which takes most of the time on a CPU
NO_CODE = "aot_eager_decomp_partition"


def check_compiles(fn, leaves, backend=NO_CODE):
    """fn(*leaves) and its gradients are the same in one compiled graph. The whole models go through
    Inductor (tests/layers)."""
    leaves = [t.requires_grad_() for t in leaves]
    out, compiled = fn(*leaves), torch.compile(fn, fullgraph=True, backend=backend)(*leaves)
    torch.testing.assert_close(compiled, out)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, leaves, upstream), torch.autograd.grad(out, leaves, upstream)
    )
