"""The report as one page that needs nothing beside itself: no script, no file, no network.

Names come from files and folders: every one goes through `_name` or `escape`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from . import charts
from .thumbnails import Thumbnails

SHOWN_CLASSES = 30  # of the confusion matrix; the file has all
LISTED_CLASSES = 50
PAIRS = 12
LONG = 14  # rows of a table of facts that is folded


def render(report: Mapping[str, Any], matrix: np.ndarray, scores: Mapping[str, Sequence[float]],
           cases: Mapping[str, list[dict]], pictures: Thumbnails) -> str:  # fmt: skip
    """Write the page.

    Args:
        report: The content of report.json.
        matrix: The confusion matrix, int64 (classes, classes).
        scores: {"correct": ..., "wrong": ...}, the scores for unknown images; {} without any.
        cases: {"wrong": ..., "unsure": ...}: images to show, each {"number", "image", "label",
            "predicted", "probability", "second", "second_probability", "unknown"}.
        pictures: Of those.

    Returns:
        HTML.
    """
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    body = [
        *(f'<p class="warning">{escape(note)}</p>' for note in report["notes"]),
        _section("Training", _curves(report["log"])),
        _section("Confusion matrix", _confusion(report, matrix)),
        _section("Classes", _classes(report["classes"])),
        _section("Calibration", _calibration(report, scores)),
        _section("Most wrong", _cases(
            cases["wrong"], pictures, "Wrong predictions, the most confident ones first.")),
        _section("Most unsure", _cases(
            cases["unsure"], pictures, "The images whose best class has the lowest probability.")),
        _section("Data, recipe and versions", _facts(report["facts"])),
        _section("Unreadable images", _skipped(report["skipped"])),
    ]  # fmt: skip
    page = template.substitute(
        title=escape(report["title"]), head=_head(report), body="\n".join(filter(None, body))
    )
    return page.encode(errors="backslashreplace").decode()  # names of files may be no UTF-8


def percent(share: float | None, digits: int = 1) -> str:
    """A share from 0 to 1 in percent, or a dash."""
    if share is None or math.isnan(share):
        return "–"
    return f"{100 * share:.{digits}f}%"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}</section>" if content else ""


def _name(text: str) -> str:
    """A name in a table, cut short by the browser; hovering shows all of it."""
    return f'<bdi class="name" title="{escape(text)}">{escape(text)}</bdi>'


def _head(report: Mapping) -> str:
    found = report["metrics"]
    after = found.get("after", found["before"])
    low, high = found["top1_interval"]
    tiles = [
        ("top-1", percent(found["top1"]), f"95%: {percent(low)} to {percent(high)}"),
        ("top-5", percent(found["top5"]), "") if "top5" in found else None,
        ("balanced accuracy", percent(found["balanced_accuracy"]), "mean recall of the classes"),
        ("calibration error", percent(after["ece"]),
         "at the temperature" if "after" in found else "not calibrated"),
        ("images", f"{found['images']:,}", f"{len(report['classes']):,} classes"),
    ]  # fmt: skip
    if found["images_per_s"]:
        tiles.append(("images/s", f"{found['images_per_s']:,.1f}", report["setting"]))
    boxes = "".join(
        f"<div><span>{escape(what)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>"
        for what, value, more in filter(None, tiles)
    )
    return f'<p>{escape(report["about"])}</p>\n<div class="tiles">{boxes}</div>'


def _curves(log: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in log for key in row))
    groups = {
        "loss": [c for c in columns if "loss" in c],
        "top-1, %": [c for c in columns if "top1" in c or "balanced" in c],
        "learning rate": [c for c in columns if c == "lr"],
    }
    drawn = []
    for what, names in groups.items():
        series = {name: _points(log, name) for name in names}
        series = {name: points for name, points in series.items() if points}
        if series:
            drawn.append(charts.lines(series, what, percent="%" in what))
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


def _points(log: Sequence[Mapping], name: str) -> list[tuple[float, float]]:
    """(epoch, value) of a column; rows without a finite number have none."""
    found = []
    for row in log:
        try:
            epoch, value = float(row["epoch"]), float(row[name])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value):
            found.append((epoch, value))
    return found


def _confusion(report: Mapping, matrix: np.ndarray) -> str:
    names = [row["class"] for row in report["classes"]]
    chosen, said = np.arange(len(names)), "Rows: labels. Columns: predictions."
    if len(names) > SHOWN_CLASSES:
        errors = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
        chosen = np.sort(np.argsort(-errors, kind="stable")[:SHOWN_CLASSES])
        said += (
            f" The {SHOWN_CLASSES} of {len(names):,} classes with the most errors; all are in "
            "confusion.csv."
        )
    head = "".join(f"<th>{_name(names[j])}</th>" for j in chosen)
    rows = []
    for i in chosen:
        total = max(int(matrix[i].sum()), 1)
        cells = "".join(_cell(int(matrix[i, j]), total, bool(i == j)) for j in chosen)
        rows.append(f"<tr><th>{_name(names[i])}</th>{cells}</tr>")
    table = (
        f'<p class="small">{said}</p><div class="wide"><table class="confusion">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    pairs = [
        [_name(p["label"]), _name(p["predicted"]), f"{p['count']:,}", percent(p["share"])]
        for p in report["confusions"][:PAIRS]
    ]
    if not pairs:
        return table + "<p>No image was classified wrongly.</p>"
    headings = ("label", "predicted", "images", "of the label's")
    return table + _table("The most frequent confusions", headings, pairs, text=2)


def _cell(count: int, total: int, hit: bool) -> str:
    if not count:
        return "<td></td>"
    strength = 0.12 + 0.68 * count / total
    kind = "good" if hit else "bad"
    return f'<td style="background-color:rgba(var(--{kind}),{strength:.2f})">{count:,}</td>'


def _table(
    caption: str, headings: Iterable[str], rows: Iterable[Iterable[str]], text: int = 1
) -> str:
    """A table; cells are HTML. The first `text` columns are words."""

    def line(cells: Iterable[str], tag: str) -> str:
        kinds = (' class="text"' if i < text else "" for i in range(1000))
        return "".join(f"<{tag}{k}>{c}</{tag}>" for k, c in zip(kinds, cells, strict=False))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption><thead>'
        f"<tr>{line(headings, 'th')}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _classes(classes: Sequence[Mapping]) -> str:
    def order(row: Mapping) -> tuple:
        return (row["f1"] is None, row["f1"] or 0.0)

    worst = sorted(classes, key=order)[:LISTED_CLASSES]
    rows = [
        [_name(row["class"]), *(_meter(row[k]) for k in ("precision", "recall", "f1")),
         f"{row['support']:,}", f"{row['predicted']:,}"]
        for row in worst
    ]  # fmt: skip
    caption = "By F1, the lowest first"
    if len(classes) > len(worst):
        caption += f"; {len(worst)} of {len(classes):,} classes, all are in per_class.csv"
    headings = ("class", "precision", "recall", "F1", "images", "predicted")
    return _table(caption, headings, rows)


def _meter(share: float | None) -> str:
    if share is None:
        return '<span class="none">–</span>'
    bar = f'<span class="meter"><i style="width:{100 * share:.1f}%"></i></span>'
    return f"{bar}{percent(share)}"


def _calibration(report: Mapping, scores: Mapping[str, Sequence[float]]) -> str:
    found, bins = report["metrics"], report["reliability"]
    parts = [charts.reliability(bins["before"], "Before: probabilities as the model gives them")]
    lines = [("before", found["before"])]
    said = "This model was not calibrated. "
    if "after" in found:
        t = report["calibration"]["temperature"]
        parts.append(charts.reliability(bins["after"], f"At temperature {t:.3f}"))
        lines.append((f"at temperature {t:.3f}", found["after"]))
        said = (
            f"The logits are divided by the temperature {t:.4f} before the softmax, which "
            f"changes no prediction. {report['origin']} "
        )
    said += (
        "Images are sorted into bins by the confidence in their prediction. Orange: the model is "
        "more confident there than correct; green: less; the nearer a bar to the diagonal, the "
        "better. The dark foot of a bar shows how many images it stands for."
    )
    rows = [[escape(n), percent(v["ece"], 2), f"{v['nll']:.4f}"] for n, v in lines]
    table = _table("", ("", "expected calibration error", "negative log-likelihood"), rows)
    unknown = _unknown(report, scores)
    return f'<p>{escape(said)}</p><div class="charts">{"".join(parts)}</div>{table}{unknown}'


def _unknown(report: Mapping, scores: Mapping[str, Sequence[float]]) -> str:
    how = (report["calibration"] or {}).get("unknown")
    if not how:
        return ""
    kept = report["kept"]
    name = {"max_logit": "largest logit", "energy": "negative energy"}[how["score"]]
    said = (
        f"An image is called unknown where its {name} is below {how['threshold']:.4f} "
        f"(deit-fast classify --unknown). Of these images {percent(kept['all'])} are known: "
        f"{percent(kept['correct'])} of those that are classified correctly, "
        f"{percent(kept['wrong'])} of the others. How many images of other kinds it would let "
        "through these images cannot tell."
    )
    drawn = charts.histogram(scores, how["threshold"], name, "Scores; the line is the threshold")
    return f'<h3>Unknown images</h3><p>{escape(said)}</p><div class="charts">{drawn}</div>'


def _cases(cases: Sequence[Mapping], pictures: Thumbnails, said: str) -> str:
    if not cases:
        return "<p>None.</p>"
    if pictures.kind:
        said += f" Light is where the token attends: {pictures.kind}."
    elif pictures.why_not:
        said += f" No attention maps of this model: {pictures.why_not}."
    cards = "".join(_card(case, pictures.uris.get(case["number"], {})) for case in cases)
    return f'<p class="small">{escape(said)}</p><div class="cards">{cards}</div>'


def _card(case: Mapping, uris: Mapping[str, str]) -> str:
    names = {"image": "image", "class": "class token", "distillation": "distillation token"}
    shown = "".join(
        f'<figure><img alt="{escape(names[kind])}" src="{uri}"><figcaption>{names[kind]}'
        "</figcaption></figure>"
        for kind, uri in uris.items()
    )
    hit = case["label"] == case["predicted"]
    second = ""
    if case["second"] is not None:
        second = f", then <bdi>{escape(case['second'])}</bdi> {percent(case['second_probability'])}"
    unknown = "; unknown by the threshold" if case["unknown"] else ""
    return (
        f'<article><div class="row">{shown}</div>'
        f"<p><bdi>{escape(case['image'])}</bdi></p>"
        f"<p>label <b><bdi>{escape(case['label'])}</bdi></b>, predicted "
        f'<span class="{"right" if hit else "wrong"}"><bdi>{escape(case["predicted"])}</bdi></span>'
        f" {percent(case['probability'])}{second}{unknown}</p></article>"
    )


def _facts(facts: Mapping[str, Mapping[str, Any]]) -> str:
    tables = []
    for title, values in facts.items():
        rows = "".join(
            f"<tr><td>{escape(str(name))}</td><td><bdi>{escape(said(value))}</bdi></td></tr>"
            for name, value in values.items()
        )
        table = f"<table><tbody>{rows}</tbody></table>"
        if len(values) > LONG:
            summary = f"{escape(title)}: {len(values)} settings"
            tables.append(f"<details><summary>{summary}</summary>{table}</details>")
        elif values:
            tables.append(f"<div><h3>{escape(title)}</h3>{table}</div>")
    return f'<div class="facts">{"".join(tables)}</div>' if tables else ""


def said(value: Any) -> str:
    """A fact in words."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, list | tuple):
        shown = ", ".join(map(said, value[:20]))
        return shown + (f" and {len(value) - 20:,} more" if len(value) > 20 else "")
    return str(value)


def _skipped(skipped: Sequence[Sequence[str]]) -> str:
    rows = [[_name(name), escape(why)] for name, why in skipped[:LISTED_CLASSES]]
    more = len(skipped) - len(rows)
    caption = f"the first {len(rows)} of {len(skipped):,}" if more else ""
    return _table(caption, ("image", "why"), rows, text=2) if rows else ""
