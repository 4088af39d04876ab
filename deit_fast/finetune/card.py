"""The model card: README.md of a folder of weights, as the Hugging Face hub reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from deit_fast.distill.checkpoints import write_atomically

from .report_page import percent, said

README = "README.md"
MARK = (
    "<!-- deit-fast wrote this card and replaces it. Without this line it is yours and stays. -->"
)
SHOWN = 40  # classes that are named


def write_card(
    folder: str | Path, report: Mapping[str, Any], *, name: str, license: str | None = None,
    base: str | None = None, quantized: bool = False,
) -> bool:  # fmt: skip
    """Write the model card of a folder of weights, unless there is one by someone else.

    Args:
        folder: Of the weights.
        report: What `report.write_report` returned.
        name: The model's.
        license: An identifier of the hub's, such as "apache-2.0"; None: "other", not stated.
        base: What it was trained on from.
        quantized: Whether timm can't load it.

    Returns:
        Whether it was written: a README.md without our mark is left as it is.

    Raises:
        OSError: It can't be written.
    """
    path = Path(folder, README)
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return False
    text = "\n".join([
        "---", _front_matter(report, name, license, quantized), "---", MARK, "",
        *_body(report, name, license, base), "",
    ])  # fmt: skip
    content = text.encode(errors="backslashreplace")
    write_atomically(path, lambda file: file.write(content))
    return True


def _front_matter(report: Mapping, name: str, license: str | None, quantized: bool) -> str:
    found = report["metrics"]
    named: dict[str, Any] = {"license": license}
    if license is None:
        named = {"license": "other", "license_name": "not-stated"}
    library = "deit_fast" if quantized else "timm"
    what: dict[str, Any] = {
        "task_type": "image-classification", "dataset_type": "imagefolder",
        "dataset_name": "validation images", "dataset_split": "validation",
    }  # fmt: skip
    results = [
        EvalResult(metric_type="accuracy", metric_value=round(found["top1"], 6), **what),
        EvalResult(
            metric_type="balanced_accuracy", metric_name="balanced accuracy",
            metric_value=round(found["balanced_accuracy"], 6), **what,
        ),
        EvalResult(
            metric_type="f1", metric_name="macro F1", metric_value=round(found["macro_f1"], 6),
            **what,
        ),
    ]  # fmt: skip
    data = ModelCardData(
        library_name=library, pipeline_tag="image-classification", model_name=name,
        tags=["image-classification", "deit_fast", library], eval_results=results, **named,
    )  # fmt: skip
    return data.to_yaml()


def _body(report: Mapping, name: str, license: str | None, base: str | None) -> list[str]:
    found, classes = report["metrics"], [row["class"] for row in report["classes"]]
    more = f" and {len(classes) - SHOWN:,} more" if len(classes) > SHOWN else ""
    low, high = found["top1_interval"]
    begun = "" if base is None else f", trained on from {_text(base)}"
    lines = [
        f"# {_text(name)}", "",
        f"An image classifier{begun}. {_text(report['about'])}", "",
        f"- **Classes** ({len(classes):,}): {', '.join(map(_text, classes[:SHOWN]))}{more}",
        "- **License**: " + (license or "not stated; ask who trained it"), "",
        "## Use", "", "```python", "import deit_fast", "",
        'model = deit_fast.from_pretrained("FOLDER_OR_HUB_ID").eval()', "```", "",
        "```bash", "deit-fast classify photos/ --model FOLDER --unknown", "```", "",
        "## Results", "", f"On {found['images']:,} validation images:", "",
        "| | |", "|---|--:|",
        f"| top-1 | {percent(found['top1'])} (95%: {percent(low)} to {percent(high)}) |",
    ]  # fmt: skip
    if "top5" in found:
        lines.append(f"| top-5 | {percent(found['top5'])} |")
    lines += [
        f"| balanced accuracy | {percent(found['balanced_accuracy'])} |",
        f"| macro F1 | {percent(found['macro_f1'])} |",
    ]
    if report["notes"]:
        lines += ["", *(f"- {_text(note)}" for note in report["notes"])]
    lines += ["", *_calibration(report)]
    for heading, facts in report["facts"].items():
        lines += ["", f"## {_text(heading)}", "", "| | |", "|---|---|"]
        lines += [f"| {_text(str(k))} | {_text(said(v))} |" for k, v in facts.items()]
    return lines


def _calibration(report: Mapping) -> list[str]:
    found, how = report["metrics"], report["calibration"]
    if how is None:
        return []
    before, after = found["before"], found["after"]
    lines = [
        "## Calibration", "",
        f"Divide the logits by {how['temperature']:.4f} before the softmax: the expected "
        f"calibration error goes from {percent(before['ece'], 2)} to {percent(after['ece'], 2)}, "
        f"the negative log-likelihood from {before['nll']:.4f} to {after['nll']:.4f}. "
        f"{_text(report['origin'])}",
    ]  # fmt: skip
    if unknown := how.get("unknown"):
        lines += ["", (
            f"An image is unknown where its {unknown['score'].replace('_', ' ')} is below "
            f"{unknown['threshold']:.4f}, which keeps {percent(unknown['kept'])} of the "
            "correctly classified validation images."
        )]  # fmt: skip
    return lines


def _text(text: str) -> str:
    """Words of others in Markdown: no markup of theirs, no new line."""
    text = " ".join(text.split())
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text
