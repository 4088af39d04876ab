"""What is compared: each builds a function of images (B, 3, H, W), a NumPy array, to logits."""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import deit_fast
from deit_fast.bench.weights import randomize

Call = Callable[[np.ndarray], np.ndarray]
NETWORKS = {
    "tiny": ("DeiT-Ti distilled", "deit_tiny_distilled_patch16_224"),
    "small": ("DeiT-S distilled", "deit_small_distilled_patch16_224"),
    "base": ("DeiT-B distilled", "deit_base_distilled_patch16_224"),
}
SMOKE = ("tiny of depth 1, 32 pixels", "vit_of_the_tests")  # only the tests run it


def model_of(timm_name: str) -> nn.Module:
    """timm's model with random weights, the same in every process; in eval mode."""
    if timm_name == SMOKE[1]:
        size = {"img_size": 32, "depth": 1, "embed_dim": 64, "num_heads": 1, "num_classes": 7}
        return randomize(timm.create_model(NETWORKS["tiny"][1], **size)).eval()
    return randomize(timm.create_model(timm_name)).eval()


def _call(forward: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    @torch.inference_mode()
    def call(images):
        return forward(torch.from_numpy(images)).numpy()

    return call


def eager(model: nn.Module, images: np.ndarray, threads: int) -> Call:
    """timm in eager PyTorch."""
    return _call(model)


def compiled(model: nn.Module, images: np.ndarray, threads: int, freezing: bool = False) -> Call:
    """torch.compile of a model; with `freezing` Inductor packs the weights."""
    import torch._inductor.config as inductor

    made = torch.compile(model, dynamic=False)
    if not freezing:
        return _call(made)

    @torch.no_grad()  # what Inductor asks for
    def call(images):
        with inductor.patch(freezing=True):
            return made(torch.from_numpy(images)).numpy()

    return call


def ours(model: nn.Module, images: np.ndarray, threads: int) -> Call:
    """accelerate(model)."""
    return _call(_fast(model))


def ours_compiled(model: nn.Module, images: np.ndarray, threads: int) -> Call:
    """torch.compile(accelerate(model))."""
    return compiled(_fast(model), images, threads)


def ours_engine(model: nn.Module, images: np.ndarray, threads: int) -> Call:
    """InferenceEngine(accelerate(model), compile=True)."""
    engine = deit_fast.InferenceEngine(
        _fast(model), batch_size=len(images), prepare=("float",), compile=True
    )
    return lambda images: engine(torch.from_numpy(images)).numpy()


def _fast(model):
    fast = copy.deepcopy(model)
    deit_fast.accelerate(fast)
    return fast


def onnxruntime(model: nn.Module, images: np.ndarray, threads: int) -> Call:
    """ONNX Runtime, on timm's model exported at this batch size."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    with tempfile.TemporaryDirectory() as folder:
        path = _exported(model, images, folder)
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    return lambda images: session.run(None, {source.name: images})[0]


def openvino(model: nn.Module, images: np.ndarray, threads: int) -> Call:
    """OpenVINO, on timm's model exported at this batch size."""
    request = compile_openvino(model, images, threads).create_infer_request()
    return lambda images: request.infer({0: images})[0].copy()


def compile_openvino(model: nn.Module, images: np.ndarray, threads: int, **more: str) -> Any:
    """OpenVINO's compiled model, in fp32; `more` are other settings of OpenVINO's."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32", **more,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        core = ov.Core()
        network = core.read_model(_exported(model, images, folder))
        return core.compile_model(network, "CPU", settings)


def _exported(model, images, folder):
    import onnx  # noqa: F401  both read what its exporter writes

    path = Path(folder) / "model.onnx"
    torch.onnx.export(
        model, (torch.from_numpy(images),), path, dynamo=True, verbose=False, external_data=False
    )
    return str(path)


CONTENDERS: dict[str, tuple[str, Callable[[nn.Module, np.ndarray, int], Call]]] = {
    "eager": ("timm, eager", eager),
    "compile": ("timm, torch.compile", compiled),
    "compile-freezing": ("timm, torch.compile with freezing", partial(compiled, freezing=True)),
    "onnxruntime": ("ONNX Runtime", onnxruntime),
    "openvino": ("OpenVINO", openvino),
    "ours": ("ours", ours),
    "ours-compile": ("ours, torch.compile", ours_compiled),
    "ours-engine": ("ours, engine, compiled", ours_engine),
}
BASELINE = "eager"
