"""Export a model to a file: PyTorch's exported programs, AOTInductor packages, ONNX."""

import copy
import importlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import calibration
from ._names import EXPORT_BACKENDS as BACKENDS
from ._names import EXPORT_FORMATS as FORMATS
from .layers._base import Fast
from .quantization import quantized_layers

# Relative error that another order of summation may cause: some ten times the largest seen
TOLERANCE = {
    torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2,
}  # fmt: skip
# Of a quantized model: it can move an activation across a rounding boundary, by a whole step
QUANTIZED_TOLERANCE = 5e-3
ONNX_DTYPES = (torch.float32, torch.float16)
ONNX_LIMIT = 2**31  # bytes: a protobuf message, which a whole ONNX file is, ends there
_ONNX_MODULES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """What `export` wrote; `str()` of it is a text for people.

    Attributes:
        path: the file.
        format: "torch-export", "aoti" or "onnx".
        bytes: its size.
        batch: its batch size, None for any.
        backend: "kernels" if deit_fast's operators are in the file, "torch" if none are.
        why: the reason for `backend`.
        errors: batch size -> relative error of the loaded file against the model.
    """

    path: Path
    format: str
    bytes: int
    batch: int | None
    backend: str
    why: str
    errors: dict[int, float] = field(default_factory=dict)

    def __str__(self):
        errors = ", ".join(f"{error:.1e} at batch {batch}" for batch, error in self.errors.items())
        return "\n".join(
            (
                f"{self.path}: {self.format}, {self.bytes / 1e6:,.1f} MB, "
                f"batch {'dynamic' if self.batch is None else self.batch}",
                f"operations: {self.backend} ({self.why})",
                f"relative error, loaded again, against the model: {errors}",
            )
        )


def export(
    model: nn.Module,
    path: str | Path,
    format: str,
    *,
    batch: int | None = None,
    backend: str = "auto",
) -> Exported:
    """Write a model to a file, load the file again and compare its logits with the model's.

    The file maps float images (B, C, H, W), normalised, of the model's dtype and size and on its
    device, to what the model returns, its `heads` included. The formats:

      "torch-export"  .pt2 for torch.export.load. If the model's device has deit_fast's kernels and
                      `backend` is "auto" they are in it as operators, and loading it takes an
                      `import deit_fast`; "torch" leaves plain PyTorch operations. With a dynamic
                      batch no LayerNorm is folded into a GEMM: whether it pays off depends on B.
      "aoti"          .pt2 for torch._inductor.aoti_load_package and C++: compiled for the device,
                      the CPU and the PyTorch of this machine, without deit_fast's kernels.
      "onnx"          .onnx, one file of standard operators, from a float32 or float16 model. Needs
                      `pip install 'deit_fast[export]'`.

    The names of the classes and the calibration, where the model has them, are in the file too, as
    JSON: extra files "label_names" and "calibration" of torch.export.load, metadata of
    AOTInductor's packages and of ONNX.

    An earlier file at `path` is replaced only once the new one has passed.

    Args:
        model: in eval mode; it is not changed.
        path: of the file, with the suffix of its format.
        format: "torch-export", "aoti" or "onnx".
        batch: B, or None for any B from 1.
        backend: "auto" or "torch", for torch-export.

    Returns:
        What was written, with its relative errors.

    Raises:
        ValueError: for arguments and models that do not fit.
        OSError: for a folder that can't be written to.
        RuntimeError: with one line, if a package is missing, the exporter fails, or the file's
            logits are not the model's.
    """
    path, model = Path(path), getattr(model, "_orig_mod", model)  # what torch.compile wrapped
    check(path, format, batch)
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r}, expected one of {BACKENDS}")
    if model.training:
        raise ValueError("model: in training mode, expected model.eval()")
    shape, weight = _image_shape(model), next(model.parameters())
    if weight.dtype not in TOLERANCE or weight.is_meta:
        raise ValueError(
            f"model: {weight.dtype} on {weight.device}, expected a float model with data"
        )
    if format == "onnx":
        _check_onnx(model, weight.dtype)
    copied = copy.deepcopy(model)
    if backend == "torch" or format != "torch-export":
        for module in copied.modules():
            if isinstance(module, Fast):
                module.backend = "torch"

    def images(count):
        generator = torch.Generator().manual_seed(count)
        return torch.randn(count, *shape, generator=generator).to(weight)

    with torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        # a folder in that of `path`: the last step is a rename, and a failure leaves nothing
        written = Path(folder, path.name)
        with _one_line(f"{format}: export failed"):
            # an example of 1 would make the batch a constant
            program = _trace(copied, images(batch or 2), dynamic=batch is None)
            # by way of memory: on a full disk PyTorch's own writer ends the process
            written.write_bytes(_WRITERS[format](program, metadata(model)))
        with _one_line(f"{format}: the file was written and can't be run"):
            run = _READERS[format](written)
            found = {b: _relative_error(run(images(b)), model(images(b))) for b in _sizes(batch)}
        tolerance = TOLERANCE[weight.dtype]
        if quantized_layers(model):
            tolerance = max(tolerance, QUANTIZED_TOLERANCE)
        for size, error in found.items():
            if not error <= tolerance:  # so that NaN fails
                raise RuntimeError(
                    f"{format}: the file disagrees with the model, relative error {error:.1e} at "
                    f"batch {size}, expected {tolerance:.0e} or less; nothing was kept"
                )
        os.replace(written, path)
    why = _why(program, format, backend, weight.device)
    return Exported(path, format, path.stat().st_size, batch, *why, found)


def check(path: str | Path, format: str, batch: int | None = None) -> None:
    """Check the arguments of `export` before there is a model.

    Args:
        path: of the file.
        format: "torch-export", "aoti" or "onnx".
        batch: the batch size, or None for any.

    Raises:
        ValueError: as `export`.
        OSError: as `export`.
        RuntimeError: if a package is missing.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format: {format!r}, expected one of {tuple(FORMATS)}")
    if path.suffix != FORMATS[format]:
        raise ValueError(
            f"path: {path} for {format}, expected a name that ends in {FORMATS[format]}"
        )
    if batch is not None and (not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch: {batch!r}, expected 1 or more, or None for any")
    if path.is_dir():
        raise IsADirectoryError(f"path: {path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"path: folder {path.parent} can't be written to")
    for name in _ONNX_MODULES if format == "onnx" else ():
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RuntimeError(
                f"onnx: needs {name} ({error}): pip install 'deit_fast[export]'"
            ) from error


def _image_shape(model: nn.Module) -> tuple[int, int, int]:
    embed: Any = getattr(model, "patch_embed", None)
    proj = getattr(embed, "proj", None)
    size = getattr(embed, "img_size", None)
    if proj is None or size is None:
        raise ValueError(
            f"model: {type(model).__name__}, expected a timm vision transformer built for one "
            "image size (patch_embed.img_size)"
        )
    return proj.in_channels, *size


def _check_onnx(model: nn.Module, dtype: torch.dtype) -> None:
    formats = quantized_layers(model)
    if "fp8" in formats.values():
        raise ValueError(
            f"onnx: {list(formats.values()).count('fp8')} layers of the model are in fp8, whose "
            "GEMMs onnxruntime does not compute on a CPU: call deit_fast.restore(model) and "
            "accelerate first, or quantize to int8, or write torch-export or aoti"
        )
    if dtype not in ONNX_DTYPES:
        names = " or ".join(str(d)[6:] for d in ONNX_DTYPES)
        raise ValueError(
            f"onnx: {str(dtype)[6:]} model, expected {names}: onnxruntime, which checks the file, "
            "computes nothing else on a CPU"
        )
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size >= ONNX_LIMIT:
        raise ValueError(f"onnx: {size:,} bytes of weights, expected fewer than {ONNX_LIMIT:,}")


def _trace(model: nn.Module, example: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        model, (example,), dynamic_shapes=({0: batch},) if dynamic else None
    )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # this machine's paths, in every format
    return program


def metadata(model: nn.Module) -> dict[str, str]:
    """What a file says about its logits: "label_names" and "calibration", each as JSON.

    Args:
        model: A model; what it does not know is left out.
    """
    cfg: dict = getattr(model, "pretrained_cfg", None) or {}
    names, calibrated = cfg.get("label_names"), calibration.of(model)
    found = {"label_names": json.dumps(list(names))} if names else {}
    if calibrated is not None:
        found[calibration.KEY] = json.dumps(calibrated.as_dict())
    return found


def _write_torch_export(
    program: torch.export.ExportedProgram, metadata: dict[str, str]
) -> memoryview:
    torch.export.save(program, file := io.BytesIO(), extra_files=dict(metadata))
    return file.getbuffer()


def _write_aoti(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> memoryview:
    torch._inductor.aoti_compile_and_package(
        program, package_path=(file := io.BytesIO()),
        inductor_configs={"aot_inductor.metadata": dict(metadata)},
    )  # fmt: skip
    return file.getbuffer()


def _write_onnx(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    exported: Any = torch.onnx.export(
        program, (), dynamo=True, verbose=False,
        input_names=["images"], output_names=["logits"],
        dynamic_shapes=({0: "batch"},) if program.range_constraints else None,  # the name alone
    )  # fmt: skip
    proto = exported.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.cpu().numpy()})[0])


_Writer = Callable[[torch.export.ExportedProgram, dict[str, str]], bytes | memoryview]
_WRITERS: dict[str, _Writer] = {
    "torch-export": _write_torch_export,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
}
_READERS: dict[str, Callable[[Path], Callable[[Tensor], Tensor]]] = {
    "torch-export": lambda path: torch.export.load(path).module(),
    "aoti": lambda path: torch._inductor.aoti_load_package(str(path)),
    "onnx": _read_onnx,
}


def _sizes(batch):
    return (1, 3) if batch is None else (batch,)


def _relative_error(got, expected):
    if got.shape != expected.shape:
        raise ValueError(f"it returns {tuple(got.shape)}, the model {tuple(expected.shape)}")
    got, expected = got.double().cpu(), expected.double().cpu()
    return ((got - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def _why(
    program: torch.export.ExportedProgram, format: str, backend: str, device: torch.device
) -> tuple[str, str]:
    """Which operations are in the file, and why."""
    targets: list[Any] = [getattr(node, "target", None) for node in program.graph.nodes]
    ours = {t.name() for t in targets if getattr(t, "namespace", None) == "deit_fast"}
    if ours:
        return "kernels", f"{', '.join(sorted(ours))}: to load it, import deit_fast first"
    why = "plain PyTorch operations, loads without deit_fast"
    if format == "aoti":
        return "torch", f"{why}; compiled for this machine's {device.type}"
    if format == "torch-export" and backend == "auto":
        return "torch", f"no kernels of deit_fast in this model on {device.type}: {why}"
    return "torch", "standard ONNX operators" if format == "onnx" else why


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn the errors of exporters, which are pages long, into one line; OSErrors are clear."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"{what}: {lines[0]}") from error
