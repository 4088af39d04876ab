"""What quantization costs in accuracy, and the choices that follow from it.

    python -m studies.quantization --data /usr/share/datasets/fashion-mnist

The model that comes with deit_fast on Fashion-MNIST, and DeiT-S with random weights on photographs:
as `deit_fast.quantize` serves them, and simulated with other scales and with attention's matmuls in
FP8. Writes docs/studies/quantization.json and from that file the page, quantization.md. `--quick`
is a smoke run on few images and DeiT-Ti; give it another `--docs`. The data is Debian's package
dataset-fashion-mnist, or any folder with the same idx files.
"""

import copy
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

import deit_fast
from deit_fast.bench.weights import randomize
from deit_fast.distill import evaluate
from deit_fast.distill.datasets import open_images
from deit_fast.engine import data_config
from deit_fast.kernels.patch_embed import normalize_reference
from deit_fast.quantization_report import compare, layer_errors, worst_layers
from studies import runs
from studies.quantization_page import page
from studies.quantization_schemes import LAYERS, CachedOutputs, Subject, attention, scales

SERVED = {  # name -> format, calibrated?
    "fp8, bound-derived scales": ("fp8", False), "fp8, calibrated scales": ("fp8", True),
    "int8": ("int8", False),
}  # fmt: skip
FULL = {
    "test": 10_000,
    "compared": 2000,
    "calibration": 256,
    "photographs": "deit_small",
    "depth": 12,
}
QUICK = {"test": 60, "compared": 60, "calibration": 16, "photographs": "deit_tiny", "depth": 2}
ARITHMETIC = {"DeiT-B": (768, 198), "DeiT-B at 384 pixels": (768, 578)}  # features, tokens


def main():
    parser = runs.parser_of(__doc__, runs.ROOT / "docs" / "studies")
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    study = {
        "plan": plan, "subjects": {}, "arithmetic": arithmetic(), "versions": runs.versions(),
    }  # fmt: skip
    for name, subject in (
        ("fashion", fashion(args.data, plan)),
        ("photographs", photographs(plan)),
    ):
        study["subjects"][name] = {
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "images": len(subject.images), "calibration": len(subject.calibration),
            "compared": min(subject.compared, len(subject.images)),
            "served": served(subject), "scales": scales(subject), "attention": attention(subject),
        }  # fmt: skip
    runs.write_study(args.docs, "quantization", study, page)


def fashion(data: Path, plan: dict) -> Subject:
    model = deit_fast.deit_nano_fashion(pretrained=True).eval()

    def read(split, count):
        images = open_images(data, split, mode="L")
        numbers = [i * len(images) // count for i in range(count)]
        batches = evaluate.batches(model, images, 500, 0, [], numbers)
        return torch.cat([x for _, x in batches]), torch.from_numpy(images.labels[numbers])

    images, labels = read("validation", plan["test"])
    calibration, _ = read("train", plan["calibration"])
    return Subject(model, images, labels, plan["compared"], calibration)


def photographs(plan: dict) -> Subject:
    """Corners and centre of each photograph; scales are measured on the whole ones."""
    model = randomize(deit_fast.create_model(plan["photographs"], depth=plan["depth"])).eval()
    config = data_config(model)
    size = config["input_size"][-1]
    crops, whole = [], []
    for path in sorted(files("deit_fast").joinpath("data").iterdir()):
        if path.suffix == ".jpg":
            image = transforms.pil_to_tensor(Image.open(path).convert("RGB"))
            crops += transforms.five_crop(transforms.resize(image, size * 3 // 2), size)
            whole.append(transforms.resize(image, [size, size]))
    crops, whole = (
        normalize_reference(torch.stack(some).permute(0, 2, 3, 1), config["mean"], config["std"])
        for some in (crops, whole)
    )
    return Subject(model, crops, None, len(crops), whole)


def served(subject: Subject) -> list[dict]:
    """Every way that `deit_fast.quantize` has, by the report's functions."""
    rows, reference = [], CachedOutputs(subject.model).eval()
    for name, (format, calibrated) in SERVED.items():
        calibration = subject.calibration if calibrated else None
        quantized = copy.deepcopy(subject.model)
        deit_fast.quantize(quantized, format, calibration)
        errors = layer_errors(subject.model, quantized, subject.images[:8])
        row = {"name": name, "comparison": asdict(compare(reference, quantized, subject.batches()))}
        row["layers"] = {kind: _spread(errors, kind) for kind in LAYERS}
        if subject.labels is not None:
            shares = worst_layers(subject.model, format, subject.images[:64], calibration)
            row["worst"] = asdict(shares)
        rows.append(row)
    return rows


def _spread(errors, kind):
    """Mean and largest over the blocks."""
    found = [asdict(e) for e in errors if e.name.endswith(kind)]
    kinds = ("images", "random", "outliers")
    return {of: [op(e[of] for e in found) for op in (mean, max)] for of in kinds}


def arithmetic() -> dict[str, float]:
    """Attention's share of the multiplications in a block: 2 N^2 D of 12 N D^2 + 2 N^2 D."""
    return {name: N / (6 * D + N) for name, (D, N) in ARITHMETIC.items()}


if __name__ == "__main__":
    main()
