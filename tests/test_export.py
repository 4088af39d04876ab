"""torch.compile and torch.export of an accelerated model, and the files of deit_fast.export.

Each file is read again here without the help of deit_fast.export.
"""

import copy
import importlib
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import selection
import timm
import torch
from checking import (
    APART,
    BF16,
    FP16,
    FP32,
    assert_as_accurate,
    assert_at_most,
    assert_close,
    seed,
)
from modelling import images, randomize, tiny_pair
from tiers import slow
from torch._dynamo.testing import CompileCounterWithBackend

import deit_fast
from benchmarks.predict.chips import H200
from deit_fast.cli import main
from deit_fast.export import export
from deit_fast.kernels import _chips, _tuned
from deit_fast.quantization import quantized_layers

exporting = importlib.import_module("deit_fast.export")  # the name may be the function's, too
SMALL = {"embed_dim": 32, "num_heads": 1, "img_size": 32, "depth": 1}
ONNX = slow("onnx")
ANY = ({0: torch.export.Dim("batch", min=1)},)


def some_images(batch, dtype=FP32, uint8=False, device="cpu", size=32):
    seed(batch)
    if uint8:
        return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    return torch.randn(batch, 3, size, size).to(device, dtype)


def normalised(model, image):
    if image.dtype != torch.uint8:
        return image
    mean, std = (image.new_tensor(model.pretrained_cfg[k], dtype=FP32) for k in ("mean", "std"))
    return ((image / 255 - mean) / std).permute(0, 3, 1, 2)


def our_operators(program):
    names = [getattr(node.target, "name", str)() for node in program.graph.nodes]
    return {n.removeprefix("deit_fast::") for n in names if n.startswith("deit_fast::")}


# torch.compile and torch.export


@pytest.mark.slow
@pytest.mark.parametrize("backend, uint8", [("torch", False), ("torch", True), ("triton", True)])
def test_compiles_for_any_batch(backend, uint8, device):
    """One graph for a batch of 1, which PyTorch makes a constant, and one for all others. Floats
    in Triton: tests/layers/test_vision_transformer.py."""
    reference, fast = (m.to(device) for m in tiny_pair(backend, **SMALL))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (1, 2, 3):
            x = some_images(batch, uint8=uint8, device=device)
            assert_close(compiled(x), reference(normalised(reference, x)))
    assert counter.frame_count == 2


@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("batch", [None, 1])
def test_exports_for_any_and_for_a_fixed_batch(batch, backend, uint8, device):
    reference, fast = (m.to(device) for m in tiny_pair(backend, **SMALL))
    example = some_images(batch or 2, uint8=uint8, device=device)
    with torch.no_grad():
        program = torch.export.export(fast, (example,), dynamic_shapes=None if batch else ANY)
        for size in (1, 3) if batch is None else (batch,):
            x = some_images(size, uint8=uint8, device=device)
            got = program.module()(x)
            assert_close(got, reference(normalised(reference, x)))
    kernels = {"patch_embed", "layer_norm", "linear", "attention", "classifier"}
    assert our_operators(program) == (kernels if backend == "triton" else set())


@pytest.fixture
def h200():
    """Tensors of the meta device count as CUDA tensors of an H200."""
    with _chips.simulate_device(H200.chip), _tuned.disabled(), torch.no_grad():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("dtype, uint8", [(FP16, False), (FP16, True), (FP32, False)], ids=str)
def test_what_a_gpu_would_run_exports_for_any_batch(h200, dtype, uint8):
    """Whether a LayerNorm is folded goes by the number of rows: a program for any can't ask.
    One way of tracing a variant."""
    fast = tiny_pair("auto")[1].to("meta", dtype)
    operators = {}
    for batch in (2, 300):
        x = some_images(batch, dtype, uint8, "meta", 64)
        for shapes in (None, ANY):
            program = torch.export.export(fast, (x,), dynamic_shapes=shapes, strict=uint8)
            operators[batch, shapes is None] = our_operators(program)
            if shapes is not None:
                (sizes,) = program.range_constraints.values()
                assert sizes.lower == 1 and sizes.upper > 10**9
    if dtype == FP32:  # GEMMs and attention are PyTorch's and cuBLAS'
        assert set(map(frozenset, operators.values())) == {frozenset({"layer_norm", "linear"})}
        return
    plain = {"patch_embed", "layer_norm", "linear", "attention", "classifier"}
    for batch in (2, 300):
        prologue = plain - {"layer_norm"} | {"layer_norm_linear_prologue"}
        assert operators.pop((batch, True)) == prologue
    assert all(found == plain for found in operators.values())


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_quantized_models_export_as_a_gpu_would_run_them(format):
    """For any batch; the graph has no kernel that only quantizes."""
    fast = tiny_pair("auto")[1].half()
    deit_fast.quantize(fast, format)
    fast.to("meta")
    with _chips.simulate_device(H200.chip), _tuned.disabled(), torch.no_grad():
        x = some_images(2, FP16, device="meta", size=64)
        program = torch.export.export(fast, (x,), dynamic_shapes=ANY)
    quantized = {"layer_norm_quantized", "quantized_linear", "attention_quantized"}
    assert our_operators(program) == {"patch_embed", *quantized, "classifier"}


@pytest.mark.slow
def test_a_compiled_model_keeps_asking_for_the_number_of_rows(h200):
    """A graph each where the prologue serves all, where all is folded, and between the two."""
    fast = tiny_pair("auto")[1].to("meta", FP16)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(fast, fullgraph=True, backend=counter, dynamic=True)
    folded = {}
    few, some, many = (2, 3), (4096, 4097), (8192, 8193)
    for batch in (*few, *some, *many):
        assert compiled(some_images(batch, FP16, device="meta", size=64)).shape == (batch, 11)
        nodes = counter.graphs[-1].graph.nodes
        folded[batch] = sum("layer_norm_linear.d" in str(node.target) for node in nodes)
    assert counter.frame_count == 3
    counts = [{folded[batch] for batch in batches} for batches in (few, some, many)]
    assert counts == [{0}, {1}, {3}]


def test_half_precision_kernels_for_any_batch(device):
    reference, fast = tiny_pair("triton", **SMALL)
    fast, rounded = fast.to(device, FP16), reference.to(device, FP16)
    exact = copy.deepcopy(rounded).double()
    with torch.no_grad():
        x = some_images(2, FP16, device=device)
        program = torch.export.export(fast, (x,), dynamic_shapes=ANY)
        for batch in (1, 3):
            x = some_images(batch, FP16, device=device)
            assert_as_accurate(program.module()(x), rounded(x), exact(x.double()))


# Files


def read(path, format):
    """The file as its reader would load it: a function of a tensor."""
    if format == "onnx":
        session = importlib.import_module("onnxruntime").InferenceSession(path)
        return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    return torch.export.load(path).module()


def target(folder, format):
    if format == "onnx":
        selection.extra("export", "onnx", "onnxscript", "onnxruntime")
    return folder / f"tiny{exporting.FORMATS[format]}"


def fused(reference, x, heads):
    """What the paper's heads return, from timm's features."""
    with torch.no_grad():
        features = reference.forward_features(x)
        a, b = reference.head(features[:, 0]), reference.head_dist(features[:, 1])
    return {"joint_softmax": a.softmax(1) + b.softmax(1), "distill": b}[heads]


@pytest.mark.parametrize("heads", ["joint_softmax", "distill"])
@pytest.mark.parametrize("format", ["torch-export", ONNX])
def test_files_compute_what_timm_computes(format, heads, tmp_path):
    reference, fast = tiny_pair("auto", **SMALL)
    deit_fast.set_heads(fast, heads)
    path = target(tmp_path, format)
    report = export(fast, path, format)
    run = read(path, format)
    for batch in (1, 3, 7):  # 7: no size that export tries itself
        x = images(reference, batch)
        assert_close(run(x), fused(reference, x, heads))
    assert report.path == path and report.bytes == path.stat().st_size > 10_000
    assert report.backend == "torch" and list(report.errors) == [1, 3]
    assert "batch dynamic" in str(report)
    assert_at_most(max(report.errors.values()), APART[FP32])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format, bits", [
    ("torch-export", "fp8"),
    slow("onnx", "int8"),
])  # fmt: skip
def test_files_of_quantized_models(format, bits, tmp_path):
    """They compute what the model does, which stays quantized, and hold quantized weights."""
    _, fast = tiny_pair("auto", **SMALL)
    deit_fast.quantize(fast, bits)
    path = target(tmp_path, format)
    report = export(fast, path, format, batch=2)
    x = images(fast)
    with torch.no_grad():
        assert_close(read(path, format)(x), fast(x))
    assert_at_most(report.errors[2], APART[FP32])
    assert len(quantized_layers(fast)) == 4


@pytest.mark.slow
def test_fp8_has_no_onnx(tmp_path):
    _, fast = tiny_pair("auto", **SMALL)
    deit_fast.quantize(fast, "fp8", exclude="*.qkv")
    with pytest.raises(ValueError, match=r"onnx: 3 layers .* fp8.*call deit_fast.restore\(model\)"):
        export(fast, target(tmp_path, "onnx"), "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["torch-export", ONNX])
def test_a_fixed_batch_takes_no_other(format, tmp_path):
    reference, fast = tiny_pair(distilled=False, **SMALL)
    path = target(tmp_path, format)
    report = export(fast, path, format, batch=2)
    run = read(path, format)
    x = images(reference, 3)
    with torch.no_grad():
        assert_close(run(x[:2]), reference(x[:2]))
    with pytest.raises(Exception, match="(?i)dimension|shape|2"):
        run(x)
    assert list(report.errors) == [2] and "batch 2" in str(report)


@pytest.mark.slow
def test_aoti_and_plain_programs_load_without_deit_fast(tmp_path, device):
    """In a process of its own. One AOTInductor compilation: it takes half a minute."""
    selection.compiler()
    reference, fast = tiny_pair("triton", **SMALL)
    deit_fast.set_heads(fast.to(device), "joint_softmax")
    paths = [tmp_path / "tiny-aoti.pt2", tmp_path / "tiny-plain.pt2"]
    reports = [
        export(fast, paths[0], "aoti"),
        export(fast, paths[1], "torch-export", backend="torch"),
    ]
    x = images(reference, 5)
    torch.save(x.to(device), tmp_path / "x.pt")
    script = """
        import sys, torch
        torch.backends.cudnn.allow_tf32 = False
        aoti, plain, x, out = sys.argv[1:]
        x = torch.load(x)
        runs = [torch._inductor.aoti_load_package(aoti), torch.export.load(plain).module()]
        torch.save([[run(x[:n]) for n in (1, 5)] for run in runs], out)
        assert not {"deit_fast", "timm"} & set(sys.modules)
    """
    out = tmp_path / "out.pt"
    command = [sys.executable, "-c", textwrap.dedent(script), *paths, tmp_path / "x.pt", out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for found in torch.load(out):
        for got in found:
            expected = fused(reference, x[: len(got)], "joint_softmax")
            assert_close(got.cpu(), expected)
    assert f"compiled for this machine's {device}" in str(reports[0])
    assert all(r.backend == "torch" and "loads without deit_fast" in r.why for r in reports)


@pytest.mark.slow
def test_kernels_stay_in_a_torch_export_file(tmp_path, device):
    reference, fast = tiny_pair("triton", **SMALL)
    fast = fast.to(device)
    report = export(fast, tmp_path / "tiny.pt2", "torch-export")
    program = torch.export.load(tmp_path / "tiny.pt2")
    assert {"attention", "classifier", "linear"} <= our_operators(program)
    assert report.backend == "kernels" and "deit_fast::attention" in report.why
    assert "import deit_fast" in str(report)
    x = images(reference, 5)
    with torch.no_grad():
        got = program.module()(x.to(device)).cpu()
        assert_close(got, reference(x))
    assert export(fast, tmp_path / "b.pt2", "torch-export", backend="torch").backend == "torch"
    assert not our_operators(torch.export.load(tmp_path / "b.pt2"))


@pytest.mark.slow
@pytest.mark.parametrize("format, dtype", [
    slow("onnx", FP16),
    ("torch-export", BF16),
], ids=str)  # fmt: skip
def test_half_precision(format, dtype, tmp_path):
    reference, fast = tiny_pair(**SMALL)
    path = target(tmp_path, format)
    export(fast.to(dtype), path, format)
    x = images(reference, 5).to(dtype)
    with torch.no_grad():
        got, expected = read(path, format)(x), reference.to(dtype)(x)
        assert got.dtype == dtype
        true = reference.double()(x.double())
        assert_as_accurate(got, expected, true, factor=3.0)  # onnxruntime rounds elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch-export", ONNX])
def test_the_model_stays_what_it_is(format, tmp_path, device):
    _, fast = tiny_pair("triton", **SMALL)
    fast = fast.to(device)
    deit_fast.set_heads(fast, "class")
    fired = []
    fast.blocks[0].register_forward_hook(lambda *args: fired.append(1))
    kinds = {name: (type(m), vars(m).get("backend")) for name, m in fast.named_modules()}
    weights = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in fast.named_parameters()}
    x = images(fast, 2).to(device)
    with torch.no_grad():
        expected = fast(x)
        export(fast, target(tmp_path, format), format)
        fired.clear()
        assert torch.equal(fast(x), expected) and fired == [1]
    assert kinds == {name: (type(m), vars(m).get("backend")) for name, m in fast.named_modules()}
    assert kinds["blocks.0"] == (deit_fast.layers.Block, "triton") and not fast.training
    for name, p in fast.named_parameters():
        before, address, values = weights[name]
        assert p is before and p.data_ptr() == address and torch.equal(p, values), name
        assert p.requires_grad


@pytest.mark.slow
def test_onnx_holds_standard_operators_names_and_no_paths(tmp_path, device):
    path = target(tmp_path, "onnx")
    import onnx

    _, fast = tiny_pair("triton", **SMALL)
    export(fast.to(device), path, "onnx")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""} and not model.functions
    assert {node.domain for node in model.graph.node} == {""}
    (given,), (returned,) = model.graph.input, model.graph.output
    for value, name, sizes in (
        (given, "images", ["batch", 3, 32, 32]),
        (returned, "logits", ["batch", 11]),
    ):
        dims = value.type.tensor_type.shape.dim
        assert value.name == name and [d.dim_param or d.dim_value for d in dims] == sizes
    for folder in (Path(deit_fast.__file__).parent, Path(timm.__file__).parent):
        assert str(folder).encode() not in path.read_bytes()


@pytest.mark.parametrize("scale", [1.001, torch.nan])
@pytest.mark.parametrize("format", ["torch-export", ONNX])
def test_a_file_that_disagrees_is_not_kept(format, scale, tmp_path, monkeypatch):
    """Found by running the file, which is the program of another model."""
    real = exporting._trace

    def trace(model, *args, **kwargs):
        model.head.weight.data.mul_(scale)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(exporting, "_trace", trace)
    _, fast = tiny_pair(**SMALL)
    path = target(tmp_path, format)
    path.write_text("an earlier file")
    with pytest.raises(RuntimeError, match="disagrees with the model, relative .* at batch 1"):
        export(fast, path, format)
    assert path.read_text() == "an earlier file" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("scale, kept", [(1.001, True), (1.02, False)])
def test_a_quantized_file_may_be_a_few_roundings_apart(scale, kept, tmp_path, monkeypatch):
    """One across a rounding boundary changes an activation by a whole step; seen in ONNX: 4e-4."""
    real = exporting._trace

    def trace(model, *args, **kwargs):
        model.head.weight.data.mul_(scale)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(exporting, "_trace", trace)
    _, fast = tiny_pair(distilled=False, **SMALL)
    deit_fast.quantize(fast, "int8")
    path = target(tmp_path, "torch-export")
    if kept:
        assert max(export(fast, path, "torch-export").errors.values()) > APART[FP32]
    else:
        with pytest.raises(RuntimeError, match="disagrees .* expected 5e-03 or less"):
            export(fast, path, "torch-export")
    assert path.exists() == kept


@pytest.mark.slow
def test_a_file_wrong_for_many_images_alone_is_not_kept(tmp_path, monkeypatch):
    real = exporting._READERS["torch-export"]

    def reader(path):
        run = real(path)
        return lambda x: run(x[:1]).expand(len(x), -1)

    monkeypatch.setitem(exporting._READERS, "torch-export", reader)
    with pytest.raises(RuntimeError, match="at batch 3"):
        export(tiny_pair(**SMALL)[1], tmp_path / "tiny.pt2", "torch-export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["torch-export", ONNX])
def test_a_full_disk_leaves_the_earlier_file(format, tmp_path):
    """Simulated by a limit on file sizes. PyTorch's own writer would end the process."""
    _, fast = tiny_pair(**SMALL)
    path = target(tmp_path, format)
    path.write_text("an earlier file")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(fast, path, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "an earlier file" and list(tmp_path.iterdir()) == [path]


def test_what_the_exporter_can_not_trace_is_one_line(tmp_path):
    _, fast = tiny_pair(**SMALL)
    fast.blocks[0].register_forward_hook(lambda module, args, out: out if out.sum() > 0 else -out)
    with pytest.raises(RuntimeError, match="torch-export: export failed: ") as caught:
        export(fast, tmp_path / "tiny.pt2", "torch-export")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", *(
    slow(name) for name in ("onnxscript", "onnxruntime")
)])  # fmt: skip
def test_missing_packages_are_named(missing, tmp_path, monkeypatch):
    if missing != "onnx":  # which is imported first
        selection.extra("export", "onnx", "onnxscript", "onnxruntime")
    monkeypatch.setitem(sys.modules, missing, None)
    expected = rf"onnx: needs {missing} .*: pip install 'deit_fast\[export\]'"
    _, fast = tiny_pair(**SMALL)
    with pytest.raises(RuntimeError, match=expected):
        export(fast, tmp_path / "tiny.onnx", "onnx")
    assert export(fast, tmp_path / "tiny.pt2", "torch-export", batch=1).bytes  # needs none


@pytest.mark.slow
def test_a_compiled_model_is_exported_without_its_wrapper(tmp_path):
    reference, fast = tiny_pair(**SMALL)
    export(torch.compile(fast), tmp_path / "tiny.pt2", "torch-export")  # it takes (*args, ...)
    x = images(reference, 2)
    with torch.no_grad():
        got = read(tmp_path / "tiny.pt2", "torch-export")(x)
        assert_close(got, reference(x))


def test_models_that_do_not_fit(tmp_path):
    pt2 = tmp_path / "a.pt2"
    _, fast = tiny_pair(**SMALL)
    with pytest.raises(ValueError, match="backend: 'triton', expected one of"):
        export(fast, pt2, "torch-export", backend="triton")
    with pytest.raises(ValueError, match=r"in training mode, expected model.eval\(\)"):
        export(fast.train(), pt2, "torch-export")
    with pytest.raises(ValueError, match="expected a timm vision transformer"):
        export(timm.create_model("resnet18").eval(), pt2, "torch-export")
    with pytest.raises(ValueError, match="float32 on meta, expected a float model with data"):
        export(tiny_pair(**SMALL)[1].to("meta"), pt2, "torch-export")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_models_that_do_not_fit_onnx(tmp_path, monkeypatch):
    selection.extra("export", "onnx", "onnxscript", "onnxruntime")
    onnx = tmp_path / "a.onnx"
    with pytest.raises(ValueError, match="onnx: bfloat16 model, expected float32 or float16"):
        export(tiny_pair(**SMALL)[1].bfloat16(), onnx, "onnx")
    monkeypatch.setattr(exporting, "ONNX_LIMIT", 100_000)
    with pytest.raises(ValueError, match="bytes of weights, expected fewer than 100,000"):
        export(tiny_pair(**SMALL)[1], onnx, "onnx")
    assert not list(tmp_path.iterdir())


# The command


def command(*args):
    return main(["export", *map(str, args)])


def test_command(tmp_path, capsys):
    name = "deit_tiny_distilled_patch16_224"
    reference = randomize(timm.create_model(name, img_size=32)).eval()
    weights, path = tmp_path / "tiny.safetensors", tmp_path / "tiny.pt2"
    safetensors.torch.save_file(reference.state_dict(), weights)
    options = ["--checkpoint", weights, "--img-size", 32, "--heads", "distill"]
    args = ["--format", "torch-export", "--out", path, "--backend", "torch"]
    assert command("deit_tiny_distilled", *args, *options) == 0
    out = capsys.readouterr().out
    assert f"{path}: torch-export, " in out and "batch dynamic" in out and "at batch 3" in out
    assert "operations: torch (plain PyTorch operations" in out
    x = some_images(5)
    program = torch.export.load(path)
    device = next(iter(program.state_dict.values())).device
    with torch.no_grad():
        got = program.module()(x.to(device)).cpu()
    assert_close(got, fused(reference, x, "distill"))


@pytest.mark.slow
@pytest.mark.usefixtures("device")
def test_command_with_another_dtype_batch_and_backend(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DEIT_FAST_BACKEND", "triton")  # else there are no kernels on a CPU to omit
    path = tmp_path / "tiny.pt2"
    options = ["--no-pretrained", "--img-size", "32", "--dtype", "fp16", "--batch", "2"]
    options += ["--format", "torch-export", "--backend", "torch"]
    assert command("test_vit", "--out", path, *options) == 0
    printed = capsys.readouterr()
    assert "batch 2\n" in printed.out and "random weights" in printed.err
    program = torch.export.load(path)
    assert {p.dtype for p in program.parameters()} == {FP16} and not program.range_constraints
    assert not our_operators(program)


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["--out", "tiny.onnx"],
            "path: tiny.onnx for torch-export, expected a name that ends in .pt2",
        ),
        (["--out", "absent/tiny.pt2"], "path: no folder absent"),
        (["--out", "folder.pt2"], "path: folder.pt2 is a folder"),
        (["--out", "tiny.pt2", "--batch", "0"], "batch: 0, expected 1 or more"),
        (["--out", "tiny.pt2", "--checkpoint", "absent.pth"], "checkpoint: no file absent.pth"),
        (["--out", "tiny.pt2", "--no-pretrained", "--heads", "distill"], "has one head"),
    ],
)
def test_wrong_calls_get_one_line_and_exit_code_2(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder.pt2").mkdir()
    assert command("deit_tiny", "--format", "torch-export", *args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("deit-fast export: ")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.pt2"]


def test_the_target_is_checked_before_the_model_is_built(monkeypatch, tmp_path, capsys):
    assert command("deit_huge", "--format", "torch-export", "--out", tmp_path / "a.pt2") == 2
    assert "Unknown model" in capsys.readouterr().err
    assert command("deit_huge", "--format", "torch-export", "--out", tmp_path / "a.txt") == 2
    assert "Unknown model" not in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write anywhere
    assert command("deit_huge", "--format", "torch-export", "--out", tmp_path / "a.pt2") == 2
    assert f"folder {tmp_path} can't be written to" in capsys.readouterr().err
