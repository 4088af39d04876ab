"""What eight bits cost in accuracy, and the choices that follow from it.

    python -m studies.quantization --data /usr/share/datasets/fashion-mnist

The model that comes with deit_fast on Fashion-MNIST, and DeiT-S with random weights on photographs:
as `deit_fast.quantize` serves them, and with other scales and fp8 in attention's products,
simulated in plain PyTorch. Writes docs/quantization.json and from that file the page,
quantization.md. `--quick` looks at few images and DeiT-Ti; give it another `--docs`. The data is
Debian's package dataset-fashion-mnist, or any folder with the same idx files.
"""

import argparse
import copy
import json
import platform
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as pictures

import deit_fast
from deit_fast.bench.weights import randomize
from deit_fast.distill import evaluate
from deit_fast.distill.datasets import open_images
from deit_fast.engine import data_config
from deit_fast.kernels.patch_embed import normalize_reference
from deit_fast.kernels.quantize import (
    FORMATS,
    LIMITS,
    dequantize,
    quantize_reference,
    round_reference,
)
from deit_fast.kernels.quantized_linear import GROUP_SIZE
from deit_fast.quantization_report import compare, layer_errors, worst_layers

HERE = Path(__file__).parent
KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SERVED = {  # name -> format, calibrated?
    "fp8, scales from a bound": ("fp8", False), "fp8, calibrated": ("fp8", True),
    "int8": ("int8", False),
}  # fmt: skip
SCHEMES = {  # of attention's and GELU's results
    "row": "a scale for each row", "parts": "each row and head, or 64 features",
    "calibrated": "one for all, calibrated", "bound": "one for all, from a bound",
}  # fmt: skip
CHOSEN = {("fp8", "calibrated"), ("fp8", "bound"), ("int8", "parts")}
ATTENTION = {  # which products read e4m3, with which scales
    "q k^T, a scale for each row and head": ("qk", "row"),
    "p v, v with a scale for each head": ("pv", "head"),
    "both": ("qkpv", "row"), "both, q and k with a scale for each head": ("qkpv", "head"),
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


class Subject(NamedTuple):
    """A model, the images it is judged by, all and some, with labels or None, and others."""

    model: nn.Module
    images: Tensor
    labels: Tensor | None
    compared: int
    calibration: Tensor

    def batches(self, count=None):
        images = self.images[:count].split(50)
        if self.labels is None:
            return images
        return zip(images, self.labels[:count].split(50), strict=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    plan = QUICK if args.quick else FULL
    study = {
        "plan": plan, "subjects": {}, "arithmetic": arithmetic(),
        "versions": {
            "torch": torch.__version__, "timm": timm.__version__,
            "python": platform.python_version(),
        },
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
    args.docs.mkdir(parents=True, exist_ok=True)
    (args.docs / "quantization.json").write_text(json.dumps(study, indent=1) + "\n")
    (args.docs / "quantization.md").write_text(page(study))
    print(page(study))


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
            picture = pictures.pil_to_tensor(Image.open(path).convert("RGB"))
            crops += pictures.five_crop(pictures.resize(picture, size * 3 // 2), size)
            whole.append(pictures.resize(picture, [size, size]))
    crops, whole = (
        normalize_reference(torch.stack(some).permute(0, 2, 3, 1), config["mean"], config["std"])
        for some in (crops, whole)
    )
    return Subject(model, crops, None, len(crops), whole)


def served(subject: Subject) -> list[dict]:
    """Every way that `deit_fast.quantize` has, by the report's functions."""
    rows, reference = [], _Remembered(subject.model).eval()
    for name, (format, calibrated) in SERVED.items():
        calibration = subject.calibration if calibrated else None
        quantized = copy.deepcopy(subject.model)
        deit_fast.quantize(quantized, format, calibration)
        errors = layer_errors(subject.model, quantized, subject.images[:8])
        row = {"name": name, "comparison": asdict(compare(reference, quantized, subject.batches()))}
        row["layers"] = {kind: _spread(errors, kind) for kind in KINDS}
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


class _Remembered(nn.Module):
    """A model that is asked once for each batch of the same tensor."""

    def __init__(self, model):
        super().__init__()
        self.model, self.said = model, {}

    def forward(self, x):
        key = x.data_ptr()
        if key not in self.said:
            self.said[key] = self.model(x)
        return self.said[key]


def scales(subject: Subject) -> list[dict]:
    """Weights and LayerNorm's results as ever, attention's and GELU's results by each scheme."""
    timms = deit_fast.restore(copy.deepcopy(subject.model))
    reference, rows = _Remembered(timms).eval(), []
    for format in FORMATS:
        for scheme in SCHEMES:
            simulated = _simulated(subject, format, scheme)
            found = compare(reference, simulated, subject.batches(subject.compared))
            rows.append({"format": format, "scheme": scheme, "comparison": asdict(found)})
    return rows


def _simulated(subject, format, scheme):
    """timm's model with weights and operands rounded to eight bits, multiplied in fp32."""
    model = deit_fast.restore(copy.deepcopy(subject.model))
    ranges = None
    if scheme in ("calibrated", "bound"):  # as of the fp8 that is served
        ours = copy.deepcopy(subject.model)
        calibration = subject.calibration if scheme == "calibrated" else None
        deit_fast.quantize(ours, "fp8", calibration)
        ranges = {n: m.input_scale for n, m in ours.named_modules() if hasattr(m, "input_scale")}
    for name, module in model.named_modules():
        if not name.endswith(KINDS):
            continue
        module.weight.data = _rounded(module.weight.data, format)
        scale, parts = None, 1
        if name.endswith(("attn.proj", "mlp.fc2")):
            if ranges is not None:
                scale = ranges[name] * LIMITS[torch.float8_e4m3fn] / LIMITS[FORMATS[format]]
            elif scheme == "parts":
                heads = model.blocks[0].attn.num_heads
                parts = heads if name.endswith("proj") else module.in_features // GROUP_SIZE

        def hook(module, args, scale=scale, parts=parts):
            if scale is None:
                return _rounded(args[0], format, parts)
            return round_reference(args[0] / scale, FORMATS[format]).float() * scale

        module.register_forward_pre_hook(hook)
    return model


def _rounded(x, format="fp8", parts=1):
    return dequantize(quantize_reference(x, format, parts))


def attention(subject: Subject) -> list[dict]:
    """q, k, p and v in e4m3 as well, the rest in fp32; and in the fp8 that is served."""
    timms = deit_fast.restore(copy.deepcopy(subject.model))
    reference, rows = _Remembered(timms).eval(), []
    plain = {name: (copy.deepcopy(timms), how) for name, how in ATTENTION.items()}
    products = _simulated(subject, "fp8", "bound")
    plain["the four products of the block"] = copy.deepcopy(products), ("", "")
    plain["the four products, and both"] = products, ATTENTION["both"]
    for name, (model, (which, how)) in plain.items():
        for block in model.blocks:
            _round_attention(block.attn, which, how)
        found = compare(reference, model, subject.batches(subject.compared))
        rows.append({"name": name, "comparison": asdict(found)})
    served = copy.deepcopy(subject.model)
    deit_fast.quantize(served, "fp8", attention=True)
    found = compare(reference, served, subject.batches(subject.compared))
    rows.append({"name": "as served: attention=True, a bound", "comparison": asdict(found)})
    return rows


def _round_attention(attn, which, how):
    """p has the scale of its row, which is as if softmax's largest were 1; v's rows are summed
    over, so it can't have a scale for each."""

    def round_qkv(module, args, y):
        q, k, v = y.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # (B, N, H, d)
        if "qk" in which:
            q, k = (_rounded(t) if how == "row" else _by_head(t) for t in (q, k))
        if "pv" in which:
            v = _by_head(v)
        return torch.stack((q, k, v), 2).flatten(2)

    attn.qkv.register_forward_hook(round_qkv)
    if "pv" in which:
        attn.fused_attn = False
        attn.attn_drop = _Rounded()


class _Rounded(nn.Module):
    def forward(self, p):
        return _rounded(p)


def _by_head(t):
    """(B, N, H, d), a scale for each image and head."""
    rows = t.transpose(1, 2)
    return _rounded(rows.flatten(2)).view(rows.shape).transpose(1, 2)


def arithmetic() -> dict[str, float]:
    """Attention's share of the multiplications in a block: 2 N^2 D of 12 N D^2 + 2 N^2 D."""
    return {name: N / (6 * D + N) for name, (D, N) in ARITHMETIC.items()}


def page(study) -> str:
    """The page as Markdown, from the study's data alone."""
    found, plan = study["subjects"], study["plan"]
    fashion, photos = found["fashion"], found["photographs"]
    titles = {
        "fashion": "Fashion-MNIST", "photographs": f"photographs, {plan['photographs']}, random",
    }  # fmt: skip
    lines = [
        "# Eight bits",
        "",
        "```python",
        'report = deit_fast.quantize(model, "fp8", calibration=images)  # or "int8"; in place',
        "deit_fast.restore(model)  # and back",
        "```",
        "",
        "```bash",
        "deit-fast quantize deit_base --calibration imagenet --data imagenet --worst --out base",
        "```",
        "",
        "## What is quantised, and how",
        "",
        "The four products of a Block: qkv, proj, fc1 and fc2. A weight has a scale for each "
        "output feature. An operand is written in eight bits by what produces it, so its scale has "
        "to be known there:",
        "",
        "| operand of | written by | fp8 (e4m3) | int8 |",
        "|---|---|---|---|",
        "| qkv, fc1 | LayerNorm, which has the whole row | a scale for each row | the same |",
        "| proj | attention, of which a program has one head | one scale for all | a scale for "
        "each row and head |",
        "| fc2 | GELU in fc1's epilogue, of which a tile has some columns | one scale for all | "
        f"a scale for each row and {GROUP_SIZE} features |",
        "",
        "The one scale of fp8 is made for twice the largest value that `calibration` showed; or, "
        "without images, for a bound that nothing passes: LayerNorm's rows have a length of at "
        "most sqrt(D), so with the weights behind it Cauchy and Schwarz bound what follows, and "
        "what rounding both operands adds is bounded too. e4m3 "
        "is as fine, relatively, at 448 as at 0.016, so a wide bound costs it little. int8 has "
        "steps of one size and would pay for it: see below. Patch embedding, LayerNorm's "
        "arithmetic, attention between its operands, the residual stream and the heads stay as "
        'they were. Layers are excluded by name or pattern, `exclude=["blocks.0.*"]`.',
        "",
        "All figures below are of a CPU, fp32 around the eight bits, and of accuracy alone. "
        "Relative errors are |got - expected| / |expected| of all elements together, "
        "against the model in fp32.",
        "",
        "- Fashion-MNIST: the model that comes with deit_fast (`deit_nano_fashion`, "
        f"{fashion['parameters']:,} parameters), {fashion['images']:,} images of the test set, "
        f"scales measured on {fashion['calibration']} images of the training set.",
        f"- Photographs: {plan['photographs']} with random weights, in the absence of pretrained ones "
        "where this ran, so there is no top-1; corners and centre of the "
        f"{photos['calibration']} photographs in deit_fast/data, {photos['images']} images, scales "
        f"measured on the whole ones. One image is {100 / photos['images']:.0f} points.",
        "",
        "## Against fp32",
        "",
        "| model | | top-1, % | fp32, % | points | the same class, % | error of the logits |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, title in titles.items():
        for row in found[name]["served"]:
            of = row["comparison"]
            top1 = ["–"] * 3
            if of["top1"] is not None:
                points = of["top1_quantized"] - of["top1"]
                top1 = [f"{of['top1_quantized']:.2f}", f"{of['top1']:.2f}", f"{points:+.2f}"]
            lines.append(_row(title, row["name"], *top1, *_compared(of)))
    lines += [
        "",
        "## Each layer by itself",
        "",
        "A layer gets what the original gets, and reads it as it does in the model. Its input is "
        "what 8 images cause; or normal numbers, alike in all channels; or such with every 37th "
        "channel 50 times the others. The random ones have the rms of what the images cause: one "
        "scale for all is made for operands of one size. Even so outliers can pass the largest "
        "value that it was made for, and saturate, most where it was calibrated on a model without "
        "any: an input which that model does not produce. Mean over the blocks (largest).",
        "",
        "| model | | layer | images | random | outliers |",
        "|---|---|---|--:|--:|--:|",
    ]
    for name, title in titles.items():
        for row in found[name]["served"]:
            for kind, errors in row["layers"].items():
                cells = (f"{a:.4f} ({b:.4f})" for a, b in errors.values())
                lines.append(_row(title, row["name"], kind.partition(".")[2], *cells))
    lines += [
        "",
        "The layers of Fashion-MNIST's model that cost the logits most, each alone in eight bits "
        "and all but it (`--worst`, 64 images). fc2 alone has a scale for each row, as wherever "
        "fc1 is excluded:",
        "",
        "| | with all | layer | it alone | all but it |",
        "|---|--:|---|--:|--:|",
    ]
    for row in fashion["served"]:
        for share in row["worst"]["layers"][:3]:
            figures = (share["alone"], share["without"])
            together = f"{row['worst']['together']:.5f}"
            cells = (f"{value:.5f}" for value in figures)
            lines.append(_row(row["name"], together, share["name"], *cells))
    of_fp32 = fashion["scales"][0]["comparison"]["top1"]
    lines += [
        "",
        "## Which scales",
        "",
        "Attention's and GELU's results by other schemes, simulated in plain PyTorch: eight bits "
        "are turned back to fp32 and multiplied there. Weights and LayerNorm's results are as "
        f"above. In bold what is served. The first {fashion['compared']:,} of those images of "
        f"Fashion-MNIST, of which fp32 gets {of_fp32:.2f}% right, and the photographs.",
        "",
        "| | attention's and GELU's results | top-1, % | the same class, % | error of the logits | "
        "photographs: the same class, % | error of the logits |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for one, other in zip(fashion["scales"], photos["scales"], strict=True):
        bold = "**" if (one["format"], one["scheme"]) in CHOSEN else ""
        label = f"{bold}{SCHEMES[one['scheme']]}{bold}"
        top1 = f"{one['comparison']['top1_quantized']:.2f}"
        cells = (*_compared(one["comparison"]), *_compared(other["comparison"]))
        lines.append(_row(one["format"], label, top1, *cells))
    lines += ["", *findings(study), "", "## Attention's own products", ""]
    shares = " and ".join(f"{100 * v:.1f}% ({k})" for k, v in study["arithmetic"].items())
    lines += [
        f"q k^T and p v are {shares} of a block's multiplications. So small a part is left in bf16 "
        'or fp16, unless `quantize(model, "fp8", attention=True)` asks for e4m3 there, with one '
        "scale for q, k and v. What it costs, simulated, everything else in fp32 unless it says "
        "so; p, the softmax, with the scale of its row. The last row is the model itself, but that "
        "a CPU does not round p:",
        "",
        "| in fp8 | the same class, % | error of the logits | photographs: the same class, % | "
        "error of the logits |",
        "|---|--:|--:|--:|--:|",
    ]
    for one, other in zip(fashion["attention"], photos["attention"], strict=True):
        cells = (*_compared(one["comparison"]), *_compared(other["comparison"]))
        lines.append(_row(one["name"], *cells))
    versions = study["versions"]
    lines += [
        "",
        *attention_findings(study),
        "",
        "## This page",
        "",
        "```bash",
        "python -m studies.quantization --data /usr/share/datasets/fashion-mnist",
        "```",
        "",
        "writes this page and [quantization.json](quantization.json), of which it is made. torch "
        f"{versions['torch']}, timm {versions['timm']}, Python {versions['python']}.",
    ]
    return "\n".join(lines) + "\n"


def _row(*cells):
    return f"| {' | '.join(cells)} |"


def _compared(of):
    return f"{of['agreement']:.2f}", f"{of['logits_error']:.5f}"


def findings(study) -> list[str]:
    """What the table of scales says, in words that follow from its numbers."""
    said = []
    for name, title in (("fashion", "Fashion-MNIST"), ("photographs", "photographs")):
        error = {
            (row["format"], row["scheme"]): row["comparison"]["logits_error"]
            for row in study["subjects"][name]["scales"]
        }
        for format in FORMATS:
            best = error[format, "row"]
            others = ", ".join(
                f"{SCHEMES[scheme]} {error[format, scheme] / best:.2f}"
                for scheme in SCHEMES
                if scheme != "row"
            )
            said.append(
                f"- {title}, {format}: error of the logits by that with a scale for each row: "
                f"{others}."
            )
    return said


def attention_findings(study) -> list[str]:
    said = []
    for name, title in (("fashion", "Fashion-MNIST"), ("photographs", "photographs")):
        rows = study["subjects"][name]["attention"]
        error = {row["name"]: row["comparison"]["logits_error"] for row in rows}
        alone, both = error["the four products of the block"], error["the four products, and both"]
        said.append(
            f"- {title}: with attention's products in fp8 as well the error of the logits is "
            f"{both / alone:.2f} times that of the four products alone."
        )
    return said


if __name__ == "__main__":
    main()
