"""The report of one chip as a page that needs nothing beside itself."""

import base64
from html import escape
from pathlib import Path
from string import Template

from benchmarks.measured import Chip, rank_correlation, ratio
from benchmarks.table5 import ENTRIES, distinct

from . import targets
from .cells import number, section, speed, table, text
from .targets import QuantizedComparison, training_target

ALT = {
    "figure1": "Throughput on a logarithmic axis against ImageNet top-1, one line a family",
    "ratios": "Bars: each mode's throughput over eager PyTorch in the same precision",
    "rooflines": "Kernels under the chip's roofline, and memory-bound kernels against a copy",
}
PAGE = Template(Path(__file__).with_name("page.html").read_text())


def render(chip: Chip, svgs: dict[str, bytes]) -> str:
    """The page of one chip.

    Args:
        chip: Its results.
        svgs: Name -> SVG of the plots, as `plots.draw` makes them.

    Returns:
        HTML with the plots, style and script inside.
    """
    newest = chip.newest
    hardware, protocol = newest.hardware, newest.protocol
    versions = ", ".join(f"{k} {v}" for k, v in hardware.items() if v is not None and k != "gpu")
    limits = ", ".join(_rate(name, value) for name, value in chip.peak_rates.items())
    warning = (
        '<p class="warning">Measured on a CPU. deit_fast runs plain PyTorch there: these figures '
        "show that the suite works and say nothing about its kernels.</p>"
    )
    sections = [
        section("Throughput and accuracy", _plot("figure1", svgs)),
        section("Table 5, by the paper's protocol", _correlation(chip), _paper_table(chip)),
        section("A given batch", _batch_table(chip)),
        section("Faster than eager PyTorch by", _plot("ratios", svgs)),
        section("Quantized inference", _quantized_table(chip)),
        section("Latency", _latency_table(chip)),
        section("From pinned host memory", _host_table(chip)),
        *[
            section(f"Training: {work}", _train_table(chip, protocol))
            for protocol, work in targets.WORK.items()
        ],
        section("Kernels", _plot("rooflines", svgs), _kernel_table(chip)),
        section("Not timed", _failed(chip)),
        section("Older rows", _older(chip)),
    ]
    return PAGE.substitute(
        chip=escape(chip.name),
        warning=warning if chip.is_cpu else "",
        versions=escape(versions),
        commit=escape(newest.commit),
        date=newest.date,
        protocol=escape(
            f"{protocol['runs']} timed calls after {protocol['warmup']}, {protocol['timer']}; "
            "input sets in turn; random weights; outputs checked against eager fp32 first"
        ),
        peak_rates=escape(f"Peak rates: {limits}."),
        body="\n".join(filter(None, sections)),
    )


def _rate(name, value):
    for end, unit in (("_tb_per_s", "TB/s"), ("_tflops", "TFLOP/s")):
        if name.endswith(end):
            return f"{name.removesuffix(end)} {value:,.4g} {unit}"
    return f"{name} {value:,.4g}"


def _plot(name, svgs):
    if name not in svgs:
        return ""
    data = base64.b64encode(svgs[name]).decode()
    return (
        f'<figure><img alt="{escape(ALT[name])}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


def _correlation(chip):
    found = rank_correlation(chip, list(ENTRIES))
    if found is None:
        return "<p>Fewer than three networks measured: no rank correlation with the paper.</p>"
    return (
        f"<p>Rank correlation (Spearman) of eager fp32 here (protocol: {chip.protocol}) with the "
        f"paper's V100 over "
        f"{found[1]} networks: <b>{found[0]:.3f}</b>. The paper gives two figures for "
        "EfficientNet-B5, which counts once.</p>"
    )


def _paper_table(chip):
    modes = chip.modes("paper")
    if not modes:
        return ""
    rows = []
    for e in ENTRIES:
        eager = chip.row(e, "eager_fp32", "paper")
        rows.append([
            text(e.network), number(e.image_size, "{}"), number(e.params_m, "{}"),
            number(e.imagenet_top1), number(e.v100_images_per_s),
            *[speed(chip.row(e, mode, "paper")) for mode in modes],
            number(eager.batch if eager else None, "{}"),
        ])  # fmt: skip
    headings = ["network", "size", "M params", "top-1", "V100 (paper)", *modes, "batch (fp32)"]
    caption = "images/s: largest batch that fits or the cap, mean; hover for the batch"
    return table(caption, headings, rows)


def _batch_table(chip):
    modes = chip.modes("batch")
    if not modes:
        return ""
    fast, base, compiled = "deit_fast_bf16", "eager_bf16", "compile_max_autotune_bf16"
    rows = []
    for e in ENTRIES:
        ours, eager, autotuned = (chip.row(e, m, "batch") for m in (fast, base, compiled))
        rows.append([
            text(e.network), *[speed(chip.row(e, mode, "batch")) for mode in modes],
            number(ratio(ours, eager), "{:.2f}"), number(ratio(ours, autotuned), "{:.2f}"),
        ])  # fmt: skip
    headings = ["network", *modes, f"{fast} / eager", f"{fast} / max-autotune"]
    return table("images/s: median; hover for the batch", headings, rows)


def _quantized_table(chip):
    rows, headings = [], []
    for e in ENTRIES:
        found = QuantizedComparison.of(chip, e)
        if found is None:
            continue
        columns = [
            text(x) if isinstance(x, str) else number(x, "{:.2f}") for _, x in found.columns
        ]  # fmt: skip
        speeds = map(speed, found.rows.values())
        rows.append([text(e.network), number(found.base.batch, "{}"), *speeds, *columns])
        headings = [
            "network",
            "batch",
            *targets.QUANTIZED_MODES.values(),
            *[name for name, _ in found.columns],
        ]
    caption = (
        "images/s: median; the GEMMs of every Block quantized, the rest in bf16. Differences: "
        f"{targets.DIFFERENCES}"
    )
    return table(caption, headings, rows) if rows else ""


def _train_table(chip, protocol):
    modes, rows = chip.modes(protocol, train=True), []
    for e in distinct(list(ENTRIES)):
        for batch in chip.batches(e, protocol, train=True):
            found = {mode: chip.row(e, mode, protocol, batch) for mode in modes}
            ours, baseline = found.get(targets.OURS), found.get(targets.BASELINE)
            rows.append([
                text(e.network), number(batch, "{}"), *map(speed, found.values()),
                number(ratio(ours, baseline), "{:.2f}"), text(training_target(e, ours, baseline)),
                *[number(r and r.peak_memory_gb, "{:.2f}") for r in (baseline, ours)],
            ])  # fmt: skip
    headings = [
        "network", "batch", *modes, f"{targets.OURS} / max-autotune", targets.HEADING,
        "GB max-autotune", "GB reduce-overhead",
    ]  # fmt: skip
    caption = "images/s: median. GB: the most allocated at once, both in autocast bf16"
    return table(caption, headings, rows) if rows else ""


def _latency_table(chip):
    caption = "ms, median, each call waited for"
    return _by_batch(chip, "latency", caption, lambda row: number(row and row.ms_median, "{:,.2f}"))


def _host_table(chip):
    caption = "images/s, median; images in the mode's dtype are copied from pinned host memory"
    return _by_batch(chip, "host", caption, lambda row: number(row and row.images_per_s, "{:,.0f}"))


def _by_batch(chip, protocol, caption, cell):
    modes = chip.modes(protocol)
    rows = []
    for e in distinct(list(ENTRIES)):
        batches = {r.batch for r in chip.models if (r.timm_name, r.image_size) == e.measured_as}
        for batch in sorted(batches):
            found = [chip.row(e, mode, protocol, batch) for mode in modes]
            if any(row and row.status != "unavailable" for row in found):
                rows.append([text(e.network), number(batch, "{}"), *map(cell, found)])
    return table(caption, ["network", "batch", *modes], rows) if rows else ""


def _kernel_table(chip):
    rows = [
        [
            text(f"{r.op} {r.case}".strip()), text(r.network), number(r.batch, "{}"),
            text(r.mode), text(r.served_by), text(r.dtype),
            number(r.bytes / 1e6), number(r.flops / 1e9), number(1e3 * r.predicted_ms),
            number(r.ms_median and 1e3 * r.ms_median),
            number(r.fraction_of_peak_rate, "{:.0%}"), number(r.relative_error, "{:.1e}"),
        ]
        for r in chip.kernels
    ]  # fmt: skip
    headings = [
        "operation", "network", "batch", "mode", "served by", "dtype", "MB", "GFLOP",
        "predicted us", "measured us", "of the roof", "relative error",
    ]  # fmt: skip
    caption = "predicted: bytes and FLOPs at the measured peak rates, the larger of the two"
    return table(caption, headings, rows) if rows else ""


def _failed(chip):
    failed = [r for r in (*chip.models, *chip.kernels) if r.status != "measured"]
    items = [
        f"<li>{escape(r.network)}, {escape(r.mode)}, batch {r.batch}: "
        f"{'unavailable: ' * (r.status == 'unavailable')}{escape(r.note)}</li>"
        for r in failed
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _older(chip):
    old = sum(map(chip.is_old, (*chip.models, *chip.kernels)))
    return (
        f"<p>{old} rows are not of the last build ({chip.newest.build}); hover for each one's. "
        "Ratios are drawn between rows of one build only.</p>"
        if old
        else ""
    )
