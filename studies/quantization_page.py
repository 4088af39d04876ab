"""The page of the study of quantization, from its data alone."""

from deit_fast.kernels.quantize import FORMATS
from deit_fast.kernels.quantized_linear import GROUP_SIZE
from studies.quantization_schemes import SCHEMES
from studies.runs import table_row

CHOSEN = {("fp8", "calibrated"), ("fp8", "bound"), ("int8", "group")}  # what is served
TITLES = {"fashion": "Fashion-MNIST", "photographs": "photographs"}


def page(study) -> str:
    """The page as Markdown, from the study's data alone."""
    found, plan = study["subjects"], study["plan"]
    fashion, photos = found["fashion"], found["photographs"]
    titles = TITLES | {"photographs": f"photographs, {plan['photographs']}, random"}
    served = [(title, row) for name, title in titles.items() for row in found[name]["served"]]
    lines = [
        "# What FP8 and INT8 cost in accuracy",
        "",
        "How to quantize a model: [Quantization](../guide/quantization.md).",
        "",
        "## What is quantized, and how",
        "",
        "The four matmuls of a Block: qkv, proj, fc1 and fc2. Weights have per-channel scales, one "
        "for each output feature. An activation is quantized by the kernel that produces it, so "
        "its scale has to be known there:",
        "",
        "| input of | written by | fp8 (e4m3) | int8 |",
        "|---|---|---|---|",
        "| qkv, fc1 | LayerNorm, which has the whole row | per-row, dynamic | the same |",
        "| proj | attention, of which a program has one head | per-tensor, static | per-group, "
        "dynamic: each row and head |",
        "| fc2 | GELU in fc1's epilogue, of which a tile has some columns | per-tensor, static | "
        f"per-group, dynamic: each row and {GROUP_SIZE} features |",
        "",
        "FP8's static scale is made for twice the largest value that `calibration` showed. Without "
        "images it is derived from a bound that no value exceeds: LayerNorm's rows have a norm of "
        "at most sqrt(D), so the Cauchy-Schwarz inequality with the weights behind it bounds what "
        "follows, and the rounding of both operands is bounded too. The relative precision of e4m3 "
        "is the same at 448 as at 0.016, so a wide bound costs it little. int8 has steps of one "
        "size and would lose by it: see below. Patch embedding, LayerNorm's arithmetic, attention "
        "between its operands, the residual stream and the heads are not quantized. Layers are "
        'excluded by name or pattern, `exclude=["blocks.0.*"]`.',
        "",
        "All figures below are from a CPU, in fp32 around the quantized matmuls, and are of "
        "accuracy alone. A relative error is |got - expected| / |expected| over all elements, "
        "where the fp32 model is expected.",
        "",
        "- Fashion-MNIST: the model that comes with deit_fast (`deit_nano_fashion`, "
        f"{fashion['parameters']:,} parameters), {fashion['images']:,} images of the test set, "
        f"scales calibrated on {fashion['calibration']} images of the training set.",
        f"- Photographs: {plan['photographs']} with random weights, because no pretrained ones "
        "were available where this ran, so there is no top-1; corners and centre of the "
        f"{photos['calibration']} photographs in deit_fast/data, {photos['images']} images, scales "
        f"calibrated on the whole ones. One image is {100 / photos['images']:.0f} points.",
        "",
        "## Compared with fp32",
        "",
        "Agreement is the share of images for which both models predict the same class.",
        "",
        "| model | | top-1, % | fp32, % | points | agreement, % | relative error of the logits |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for title, row in served:
        of = row["comparison"]
        top1 = ["–"] * 3
        if of["top1"] is not None:
            points = of["top1_quantized"] - of["top1"]
            top1 = [f"{of['top1_quantized']:.2f}", f"{of['top1']:.2f}", f"{points:+.2f}"]
        lines.append(table_row(title, row["name"], *top1, *_compared(of)))
    lines += [
        "",
        "## Each layer alone",
        "",
        "Relative error of one layer's output. It gets the input of the original layer, and "
        "quantizes it as it does in the model. The input comes from 8 images; or is random, normal "
        "and alike in all channels; or is random with outliers, every 37th channel 50 times the "
        "others. The random inputs have the rms of the images' ones, because a per-tensor scale is "
        "made for inputs of one size. Even so outliers can exceed the largest value that it was "
        "made for, and saturate, most where it was calibrated on a model without any: an input "
        "which that model does not produce. Mean over the blocks (largest).",
        "",
        "| model | | layer | images | random | outliers |",
        "|---|---|---|--:|--:|--:|",
    ]
    for title, row in served:
        for kind, errors in row["layers"].items():
            cells = (f"{a:.4f} ({b:.4f})" for a, b in errors.values())
            lines.append(table_row(title, row["name"], kind.partition(".")[2], *cells))
    lines += [
        "",
        "The layers of Fashion-MNIST's model that add most to the relative error of the logits: "
        "the error with this layer alone quantized, and with all but it (`--worst`, 64 images). "
        "fc2 alone has per-row scales, as wherever fc1 is excluded:",
        "",
        "| | all quantized | layer | it alone | all but it |",
        "|---|--:|---|--:|--:|",
    ]
    for row in fashion["served"]:
        for share in row["worst"]["layers"][:3]:
            together = f"{row['worst']['together']:.5f}"
            cells = (f"{value:.5f}" for value in (share["alone"], share["without"]))
            lines.append(table_row(row["name"], together, share["name"], *cells))
    of_fp32 = fashion["scales"][0]["comparison"]["top1"]
    lines += [
        "",
        "## Which scales",
        "",
        "Other scales for the outputs of attention and GELU, simulated in plain PyTorch: quantized "
        "values are dequantized to fp32 and multiplied there. Weights and LayerNorm's output are "
        f"as above. What is served is bold. The first {fashion['compared']:,} of those images of "
        f"Fashion-MNIST, of which fp32 gets {of_fp32:.2f}% right, and the photographs.",
        "",
        "| | scales of attention's and GELU's outputs | top-1, % | agreement, % | relative error "
        "of the logits | photographs: agreement, % | relative error of the logits |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for one, other in zip(fashion["scales"], photos["scales"], strict=True):
        bold = "**" if (one["format"], one["scheme"]) in CHOSEN else ""
        label = f"{bold}{SCHEMES[one['scheme']]}{bold}"
        top1 = f"{one['comparison']['top1_quantized']:.2f}"
        cells = (*_compared(one["comparison"]), *_compared(other["comparison"]))
        lines.append(table_row(one["format"], label, top1, *cells))
    lines += ["", *findings(study), "", "## Attention's own matmuls", ""]
    shares = " and ".join(f"{100 * v:.1f}% ({k})" for k, v in study["arithmetic"].items())
    lines += [
        f"q k^T and p v are {shares} of a block's multiplications. They are so few that they stay "
        'in bf16 or fp16, unless `quantize(model, "fp8", attention=True)` asks for e4m3 there, '
        "with one per-tensor scale for q, k and v. What it costs, simulated, with everything else "
        "in fp32 unless the row says so; p, the softmax, has per-row scales. The last row is the "
        "quantized model itself, except that a CPU does not round p:",
        "",
        "| in fp8 | agreement, % | relative error of the logits | photographs: agreement, % | "
        "relative error of the logits |",
        "|---|--:|--:|--:|--:|",
    ]
    for one, other in zip(fashion["attention"], photos["attention"], strict=True):
        cells = (*_compared(one["comparison"]), *_compared(other["comparison"]))
        lines.append(table_row(one["name"], *cells))
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


def _compared(of):
    return f"{of['agreement']:.2f}", f"{of['logits_error']:.5f}"


def findings(study) -> list[str]:
    """What the table of scales says, in words that follow from its numbers."""
    said = []
    for name, title in TITLES.items():
        error = {
            (row["format"], row["scheme"]): row["comparison"]["logits_error"]
            for row in study["subjects"][name]["scales"]
        }
        for format in FORMATS:
            others = "; ".join(
                f"{SCHEMES[scheme]} {error[format, scheme] / error[format, 'row']:.2f}"
                for scheme in SCHEMES
                if scheme != "row"
            )
            said.append(
                f"- {title}, {format}: error of the logits, relative to per-row scales: {others}."
            )
    return said


def attention_findings(study) -> list[str]:
    """What the table of attention's matmuls says."""
    said = []
    for name, title in TITLES.items():
        rows = study["subjects"][name]["attention"]
        error = {row["name"]: row["comparison"]["logits_error"] for row in rows}
        alone, both = error["the four matmuls of the block"], error["the four matmuls, and both"]
        said.append(
            f"- {title}: with attention's matmuls in fp8 as well the error of the logits is "
            f"{both / alone:.2f} times that of the four matmuls alone."
        )
    return said
