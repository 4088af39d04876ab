"""Measured rows and profiles, as tables for a terminal."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .profiling import FOREIGN
from .results import KernelRow, ModelRow


def console() -> Console:
    """A console wide enough for these tables: a line may wrap, but no figure is cut short."""
    found = Console()
    found.width = max(found.width, 150)
    return found


def _table(title: str | None, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, show_edge=False, title_justify="left")
    for heading in left:
        table.add_column(heading, no_wrap=True)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def models(rows: Iterable[ModelRow]) -> Table:
    """A table of models' rows: images/s with batch, time, memory and error.

    Memory and the fraction of the peak rate are a GPU's. A fraction over 1 says that the peak rate
    was measured too low.
    """
    rows = list(rows)
    gpu = any(r.peak_memory_gb is not None or r.fraction_of_peak_rate is not None for r in rows)
    figures = ("batch", "images/s", "ms", "p20-p80", *("GB", "of peak rate") * gpu, "error")
    table = _table("images/s", ("network", "mode", "protocol"), figures)
    for r in rows:
        name = (r.network, r.mode, r.protocol, str(r.batch))
        per_s, median, p20, p80 = r.images_per_s, r.ms_median, r.ms_p20, r.ms_p80
        if per_s is None or median is None or p20 is None or p80 is None:  # not measured
            table.add_row(*name, f"{r.status}: {r.note}")
            continue
        of_gpu = (_or_dash(r.peak_memory_gb, "{:.2f}"), _fraction(r.fraction_of_peak_rate))
        table.add_row(
            *name, f"{per_s:,.1f}", f"{median:,.2f}", f"{(p80 - p20) / median:.1%}",
            *of_gpu * gpu, _or_dash(r.relative_error, "{:.0e}"),
        )  # fmt: skip
    return table


def kernels(rows: Iterable[KernelRow]) -> Table:
    """A table of kernels' rows: the time predicted from bytes and FLOPs, and the measured one."""
    figures = ("MB", "GFLOP", "predicted us", "measured us", "ratio", "error")
    title = "predicted (bytes and FLOPs at the measured peak rates) against measured"
    table = _table(title, ("operation", "network", "case", "mode", "served by"), figures)
    for r in rows:
        ms = r.ms_median
        table.add_row(
            r.op, r.network, r.case, r.mode, r.served_by, f"{r.bytes / 1e6:,.1f}",
            f"{r.flops / 1e9:,.2f}", f"{1e3 * r.predicted_ms:,.1f}",
            f"{1e3 * ms:,.1f}" if ms else "failed", f"{ms / r.predicted_ms:.2f}" if ms else "",
            _or_dash(r.relative_error, "{:.0e}"),
        )  # fmt: skip
    return table


def listed(title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of cells that are text already; the first column to the left."""
    table = _table(title, headings[:1], headings[1:])
    for row in rows:
        table.add_row(*row)
    return table


def shares(title: str, milliseconds: dict[str, float]) -> Table:
    """A table of where one call's time went, by kind of kernel."""
    table = _table(None, (title,), ("ms", "share"))
    milliseconds = dict(milliseconds)
    foreign = milliseconds.pop(FOREIGN, None)
    total = sum(milliseconds.values()) or 1.0
    for name, ms in sorted(milliseconds.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{ms:.3f}", f"{ms / total:.0%}")
    if foreign is not None:
        table.add_section()
        table.add_row(FOREIGN, f"{foreign:.3f}", f"{foreign / total:.0%}")
    return table


def _fraction(value: float | None) -> str:
    return "peak rate too low" if value is not None and value > 1 else _or_dash(value, "{:.0%}")


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
