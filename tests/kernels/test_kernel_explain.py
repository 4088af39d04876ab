"""`explain`: every reason for which a call goes to PyTorch, to cuBLAS or to a kernel, in words."""

import json
from contextlib import contextmanager

import pytest
import torch
from torch.autograd import forward_ad

import deit_fast
from deit_fast import kernels
from deit_fast.kernels import _explain, _tuned, cases, explain, layer_norm, linear
from deit_fast.kernels._chips import Chip, simulate_device

FP16, FP32, FP64 = torch.float16, torch.float32, torch.float64
H100 = Chip("NVIDIA H100", (9, 0), 132)
V100, OLD = Chip("V100", (7, 0), 80), Chip("GTX 1080", (6, 1), 20)
ALLOWED = ("triton", "cublas", "torch")


def arguments(op, *sizes, dtype=FP16, device="meta", **options):
    """Of an operation, on the meta device: nothing is launched there."""
    made = getattr(cases, f"{op}_inputs")(*sizes, **options, device=device)
    return {
        k: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t
        for k, t in made.items()
    }


def why(op, *args, on=H100, **kwargs):
    """The decisions of one call on a chip."""
    with simulate_device(on):
        return explain(getattr(kernels, op), *args, **kwargs)


def one(op, *args, **kwargs):
    (decision,) = why(op, *args, **kwargs)
    assert decision.op == op
    return decision[1:]


LINEAR = (64, 1, 64, 128)


def test_the_caller_asked():
    for implementation in ALLOWED:
        inputs = arguments("linear", *LINEAR)
        assert one("linear", **inputs, implementation=implementation) == (
            implementation, "asked for by the caller",
        )  # fmt: skip


def test_no_cuda_device():
    (decision,) = explain(linear, **arguments("linear", *LINEAR, device="cpu"))
    assert decision == ("linear", "torch", "no CUDA device: plain PyTorch")


def test_compute_capability():
    inputs = arguments("linear", *LINEAR)
    assert one("linear", **inputs, on=OLD) == ("torch", "Triton needs compute capability 7.0")
    implementation, reason = one("linear", **inputs, on=V100)
    assert implementation == "cublas"
    assert reason.startswith("Triton uses no tensor cores below compute capability 8.0; cuBLAS")


def test_dtypes():
    implementation, reason = one("linear", **arguments("linear", *LINEAR, dtype=FP32))
    assert implementation == "cublas" and reason.startswith("fp32 matmuls run on the FMA units")
    implementation, reason = one("linear", **arguments("linear", *LINEAR, dtype=FP64))
    assert (implementation, "fp32, fp16 and bf16 only" in reason) == ("torch", True)
    implementation, reason = one("linear", **arguments("linear", *LINEAR))
    assert implementation == "triton" and reason.startswith("tensor cores")
    implementation, reason = one("layer_norm", **arguments("layer_norm", (4, 64), dtype=FP32))
    assert implementation == "triton" and reason.startswith("memory-bound")


def test_the_dtype_of_autocast():
    x, weight = torch.randn(4, 64), torch.randn(32, 64)
    with torch.autocast("cpu", FP16):
        (decision,) = explain(linear, x, weight)
        assert decision.reason == "no CUDA device: plain PyTorch; autocast to float16"
        (decision,) = explain(layer_norm, x, weight[0], weight[1])
        assert decision.reason == "no CUDA device: plain PyTorch"  # autocast leaves its dtype


@pytest.fixture
def exclude():
    yield kernels.exclude
    kernels.exclude()


def test_excluded(exclude):
    exclude("linear", "layer_norm_linear")
    assert kernels.excluded() == {"linear", "layer_norm_linear"}
    excluded = ("torch", "excluded: see deit_fast.kernels.exclude")
    assert one("linear", **arguments("linear", *LINEAR)) == excluded
    exclude("layer_norm_linear")
    first, *parts = why("layer_norm_linear", **arguments("layer_norm_linear", 2048, 64, 128))
    assert first == ("layer_norm_linear", "separate", excluded[1])
    assert [(d.op, d.implementation) for d in parts] == [
        ("layer_norm", "triton"), ("linear", "triton"),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.func and forward-mode")
def test_transforms():
    x, weight, bias = arguments("layer_norm", (4, 64), dtype=FP32, device="cpu").values()

    def rows(x):
        return layer_norm(x, weight, bias)

    with simulate_device(H100):
        decisions = explain(torch.func.vmap(rows), x)
        with forward_ad.dual_level():
            decisions += explain(rows, forward_ad.make_dual(x, torch.ones_like(x)))
    reason = "torch.func and forward-mode differentiation know PyTorch's operations only"
    assert decisions == [("layer_norm", "torch", reason)] * 2


@contextmanager
def table(tmp_path, monkeypatch, **row):
    """The user's table for H100, of one row."""
    monkeypatch.setenv("DEIT_FAST_CACHE", str(tmp_path))
    path = tmp_path / "tuned" / "h100.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"gpu": H100.name, "capability": [9, 0], "choices": [row]}))
    _tuned.forget()
    yield
    _tuned.forget()


@pytest.mark.cpu("the table's chip is simulated")
def test_a_tuned_table(tmp_path, monkeypatch):
    """Its entry follows the rule's, and is not listed where the caller's choice stands."""
    shape = {"M": 60, "K": 64, "N": 128, "dtype": "float16", "epilogue": "bias"}
    inputs = arguments("linear", *LINEAR, device="cpu")
    choice = {"implementation": "cublas"}
    with table(tmp_path, monkeypatch, op="linear", shape=shape, choice=choice), torch.no_grad():
        by_rule, by_table = why("linear", **inputs)
        asked = why("linear", **inputs, implementation="triton")
        agreed = why("linear", **inputs, implementation="cublas")
        without_table = explain(linear, **inputs)
    assert by_rule.implementation == "triton" and "not yet measured" in by_rule.reason
    entry = "M 64, K 64, N 128, dtype float16, epilogue bias"
    assert by_table == ("linear", "cublas", f"tuned table of NVIDIA H100: {entry}")
    assert asked == [("linear", "triton", "asked for by the caller")]
    assert agreed == [("linear", "cublas", "asked for by the caller"), by_table]
    assert [d.implementation for d in without_table] == ["torch"]


@pytest.mark.cpu("the table's chip is simulated")
def test_the_configuration_of_a_table():
    from deit_fast.kernels.linear.configs import AMPERE_CONFIGS

    config = {"implementation": "triton", **AMPERE_CONFIGS[0]}
    inputs = arguments("linear", *LINEAR, device="cpu")
    with _tuned.forced("linear", config), torch.no_grad():
        by_table = why("linear", **inputs)[-1]
    assert by_table.reason.startswith("_tuned.forced: M 64, ") and "BLOCK_M 64" in by_table.reason


@pytest.mark.parametrize(
    ("M", "implementation", "reason"),
    [
        (2048, "prologue", "normalised as the GEMM loads it"),
        (2**18, "fold", "folded into the GEMM"),
    ],
)
def test_layer_norm_linear_in_the_gemm(M, implementation, reason):
    inputs = arguments("layer_norm_linear", M, 64, 128)
    assert why("layer_norm_linear", **inputs) == [("layer_norm_linear", implementation, reason)]
    for asked in ("prologue", "fold"):
        (decision,) = why("layer_norm_linear", **inputs, implementation=asked)
        assert decision == ("layer_norm_linear", asked, "asked for by the caller")
    first, *parts = why("layer_norm_linear", **inputs, implementation="separate")
    assert first == ("layer_norm_linear", "separate", "asked for by the caller")
    assert [d.op for d in parts] == ["layer_norm", "linear"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"grad": True}, "gradients are wanted: it has none"),
        ({"dtype": FP32}, "x is torch.float32 and the GEMM torch.float32: it takes one half"),
        ({"on": V100}, "Triton does not serve the GEMM"),
        ({"implementation": "torch"}, "Triton does not serve the GEMM"),
        (
            {"M": 6000, "K": 768, "N": 3072},
            "rows are few: folding W would cost more than normalising x",
        ),
        ({"table": True}, "measured slower on this chip"),
    ],
)
def test_layer_norm_linear_as_two_operations(change, reason):
    options = {"on": H100, "implementation": "auto"}
    options |= {k: v for k, v in change.items() if k in options}
    sizes = [change.get(name, size) for name, size in (("M", 2048), ("K", 64), ("N", 128))]
    inputs = arguments("layer_norm_linear", *sizes, dtype=change.get("dtype", FP16))
    inputs["weight"].requires_grad_("grad" in change)
    if "table" in change:
        with _tuned.forced("layer_norm_linear", {"implementation": "separate"}):
            by_table, first, *parts = why("layer_norm_linear", **inputs, **options)
        assert by_table.reason.startswith("_tuned.forced: M 2048, K 64, N 128, dtype float16")
    else:
        first, *parts = why("layer_norm_linear", **inputs, **options)
    assert first[:2] == ("layer_norm_linear", "separate") and first.reason.startswith(reason)
    assert [d.op for d in parts] == ["layer_norm", "linear"]


def test_gradients_leave_the_kernel():
    inputs = arguments("classifier", 2, 3, 64, 10)
    assert [d.op for d in why("classifier", **inputs)] == ["classifier"]
    inputs["x"].requires_grad_()
    first, second, *parts = why("classifier", **inputs)
    assert (first.implementation, second.implementation) == ("triton", "parts")
    assert second.reason == "gradients are wanted: the kernel has none"
    assert [d.op for d in parts] == ["layer_norm", "linear", "linear"]

    inputs = arguments("conv_norm", 1, 32, 32, 5, 5, 3, 1, 1, 32)
    assert one("conv_norm", **inputs)[0] == "triton"
    inputs["weight"].requires_grad_()
    first, second = why("conv_norm", **inputs)
    assert first.implementation == "triton"
    assert second[1:] == ("torch", "gradients are wanted: the kernels have none")


def test_layer_norm_attention_in_training():
    inputs = arguments("layer_norm_attention", 2, 2, 5, 64, 32)
    parts = [d.op for d in why("layer_norm_attention", **inputs)]
    assert parts == ["layer_norm_linear", "attention", "linear"]
    inputs["x"].requires_grad_()
    first, *rest = why("layer_norm_attention", **inputs)
    assert first == ("layer_norm_attention", "triton", "training: one autograd node")
    assert [(d.op, d.implementation) for d in rest] == [
        ("linear", "triton"), ("attention", "triton"),
    ]  # fmt: skip


def test_layer_norm_mlp():
    inputs = arguments("layer_norm_mlp", 2, 2, 192, 768)
    inputs |= {"layer_scale": None, "row_scale": None}
    first, *parts = why("layer_norm_mlp", **inputs)
    assert first == ("layer_norm_mlp", "parts", "not measured faster")
    assert [d.op for d in parts] == ["layer_norm_linear", "linear"]
    (decision,) = why("layer_norm_mlp", **inputs, implementation="fused")
    assert decision == ("layer_norm_mlp", "fused", "one kernel")
    inputs["residual"] = inputs["x"].requires_grad_()
    first, second, *parts = why("layer_norm_mlp", **inputs)
    assert first[1:] == ("parts", "gradients are wanted: it has none")
    assert second == ("layer_norm_mlp", "triton", "training: one autograd node")
    assert [(d.op, d.implementation) for d in parts] == [("linear", "triton")]


def test_a_model():
    with torch.device("meta"):
        model = deit_fast.deit_tiny_distilled(depth=2).eval().half()
        image = torch.zeros(256, 3, 224, 224, dtype=FP16)
    with simulate_device(H100), torch.no_grad():
        decisions = explain(model, image)
    ops = [d.op for d in decisions]
    assert ops[0] == "patch_embed" and ops[-1] == "classifier"
    assert ops.count("attention") == 2 and all(len(d.reason) > 10 for d in decisions)
    found = [d.implementation for d in decisions if d.op == "layer_norm_linear"]
    # the last block's queries and fc1, of the prefix tokens, have few rows
    assert found == ["fold", "fold", "prologue", "fold", "prologue"]
    assert {d.implementation for d in decisions} == {"triton", "fold", "prologue", "parts"}
    by_block = explain(model.to_empty(device="cpu").float().blocks[0], torch.zeros(1, 198, 192))
    assert {d.reason for d in by_block if d.implementation not in ("separate", "parts")} == {
        "no CUDA device: plain PyTorch"
    }


def test_nothing_is_recorded_outside():
    x = arguments("layer_norm", (4, 64), device="cpu")
    layer_norm(**x)
    assert _explain.decisions is None

    def failing():
        layer_norm(**x)
        raise KeyError("the call's own")

    with pytest.raises(KeyError, match="the call's own"):
        explain(failing)
    assert _explain.decisions is None
    inner = []
    outer = explain(lambda: (layer_norm(**x), inner.extend(explain(layer_norm, **x))))
    assert len(outer) == len(inner) == 1
    assert outer[0]._fields == ("op", "implementation", "reason")
    assert kernels.Choice("torch", "why") == ("torch", "why")


def test_under_compile():
    """Compiled code is one graph, in which nothing is recorded; explained, it runs eagerly, and
    what was compiled stays."""
    x, weight, bias = arguments("layer_norm", (4, 64), dtype=FP32, device="cpu").values()
    compiled = torch.compile(lambda x: layer_norm(x, weight, bias), fullgraph=True, backend="eager")
    expected = compiled(x)
    assert explain(compiled, x) == [("layer_norm", "torch", "no CUDA device: plain PyTorch")]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(x), expected)


def test_compiling_is_not_recorded(monkeypatch):
    monkeypatch.setattr(_explain, "decisions", [])
    x, weight, bias = arguments("layer_norm", (4, 64), dtype=FP32, device="cpu").values()
    torch.compile(lambda: layer_norm(x, weight, bias), fullgraph=True, backend="eager")()
    assert _explain.decisions == []
