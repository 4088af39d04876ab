"""The HTML of the page: sections, tables, cells."""

from html import escape

from deit_fast.bench.modes import MODES
from deit_fast.bench.results import ModelRow


def section(title: str, *parts: str) -> str:
    """A section of the parts that are there; "" without any."""
    parts = [part for part in parts if part]
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if parts else ""


def table(caption: str, headings: list[str], rows: list[list[str]]) -> str:
    """A table that scrolls sideways; rows of cells made by `text`, `number` or `speed`."""
    breakable = (escape(h).replace("_", "_<wbr>") for h in headings)
    head = "".join(f'<th scope="col">{h}</th>' for h in breakable)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def text(value: object) -> str:
    """A cell of words."""
    return f"<td>{escape(str(value))}</td>"


def number(value: float | None, form: str = "{:,.1f}", kind: str = "") -> str:
    """A cell of a figure, by which the table can be sorted; a dash for None."""
    if value is None:
        return '<td class="none" data-value="">–</td>'
    return f'<td class="{kind}" data-value="{value!r}">{form.format(value)}</td>'


def speed(row: ModelRow | None) -> str:
    """A cell of images/s; on hover the batch, or the reason why there is none."""
    if row is None:
        return '<td class="none" data-value="" title="not measured">–</td>'
    if row.status != "measured":
        return f'<td class="failed" data-value="" title="{escape(row.note)}">{row.status}</td>'
    title = f"batch {row.batch}, commit {row.commit[:7]}, build {row.build}"
    title += f"; {row.note}" if row.note else ""
    kind = "fast" if MODES[row.mode].fast else ""
    shown = f"{row.images_per_s:,.0f}" if row.images_per_s >= 100 else f"{row.images_per_s:.1f}"
    return (
        f'<td class="{kind}" data-value="{row.images_per_s!r}" title="{escape(title)}">{shown}</td>'
    )
