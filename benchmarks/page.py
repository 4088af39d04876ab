"""The report of one chip as a page that needs nothing beside itself."""

import base64
from html import escape
from string import Template

from benchmarks.measured import (
    EIGHT_BITS,
    NOT_ALIKE,
    OURS,
    RIVAL,
    WORK,
    Chip,
    EightBits,
    mark,
    rank_correlation,
    ratio,
)
from benchmarks.table5 import ENTRIES
from deit_fast.bench.modes import MODES

ALT = {
    "figure1": "Throughput on a logarithmic axis against ImageNet top-1, one line a family",
    "ratios": "Bars: each mode's throughput over eager PyTorch in the same precision",
    "rooflines": "Kernels under the chip's roofline, and memory-bound kernels against a copy",
}
PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>DeiT, Table 5 on $chip</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
         margin: 2rem auto; max-width: 1200px; padding: 0 1rem; }
  h2 { margin-top: 2.5rem; }
  figure { margin: 1rem 0; }
  figure img { width: 100%; height: auto; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
  caption { text-align: left; padding: .3rem 0; color: #444; }
  th, td { padding: .2rem .6rem; text-align: right; white-space: nowrap;
           border-bottom: 1px solid #ddd; }
  th:first-child, td:first-child { text-align: left; }
  th { position: sticky; top: 0; background: #f4f4f4; cursor: pointer; white-space: normal; }
  th[aria-sort=ascending]::after { content: " \\25B2"; }
  th[aria-sort=descending]::after { content: " \\25BC"; }
  tr:hover td { background: #f8f8e8; }
  .fast { font-weight: 600; } .none { color: #999; } .failed { color: #b00020; }
  .warning { background: #fff3cd; padding: .6rem 1rem; border-left: 4px solid #d39e00; }
</style>
<h1>DeiT, Table 5 on $chip</h1>
$warning
<p>$versions. Commit <code>$commit</code>, $date. $protocol.</p>
<p>$peak_rates</p>
$body
<script>
// A click on a heading sorts by that column; cells without a figure stay last.
for (const heading of document.querySelectorAll("th")) {
  heading.addEventListener("click", () => {
    const table = heading.closest("table"), column = heading.cellIndex;
    const up = heading.ariaSort !== "ascending";
    for (const other of table.querySelectorAll("th")) other.ariaSort = "none";
    heading.ariaSort = up ? "ascending" : "descending";
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return up ? order : -order;
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  });
}
</script>
</html>
""")


def render(chip: Chip, svgs: dict[str, bytes]) -> str:
    """The page. svgs: what `plots.draw` made."""
    newest = chip.newest
    hardware, protocol = newest.hardware, newest.protocol
    versions = ", ".join(f"{k} {v}" for k, v in hardware.items() if v is not None and k != "gpu")
    limits = ", ".join(f"{name} {value:,.4g}" for name, value in chip.peak_rates.items())
    warning = (
        '<p class="warning">Measured on a CPU. deit_fast runs plain PyTorch there: these figures '
        "show that the suite works and say nothing about its kernels.</p>"
    )
    sections = [
        _section("Throughput and accuracy", _plot("figure1", svgs)),
        _section("Table 5, by the paper's protocol", _correlation(chip), _paper_table(chip)),
        _section("A given batch", _batch_table(chip)),
        _section("Faster than eager PyTorch by", _plot("ratios", svgs)),
        _section("Eight bits", _eight_bits_table(chip)),
        _section("Latency", _latency_table(chip)),
        _section("From pinned host memory", _host_table(chip)),
        *[
            _section(f"Training: {work}", _train_table(chip, protocol))
            for protocol, work in WORK.items()
        ],
        _section("Kernels", _plot("rooflines", svgs), _kernel_table(chip)),
        _section("Not timed", _failed(chip)),
        _section("Older rows", _older(chip)),
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
        peak_rates=escape(f"Peak rates, measured: {limits}."),
        body="\n".join(filter(None, sections)),
    )


def _section(title, *parts):
    parts = [part for part in parts if part]
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if parts else ""


def _plot(name, svgs):
    if name not in svgs:
        return ""
    data = base64.b64encode(svgs[name]).decode()
    return (
        f'<figure><img alt="{escape(ALT[name])}" src="data:image/svg+xml;base64,{data}"></figure>'
    )


def _table(caption, headings, rows):
    """rows of cells made by `_text`, `_number` or `_speed`."""
    breakable = (escape(h).replace("_", "_<wbr>") for h in headings)
    head = "".join(f'<th scope="col">{h}</th>' for h in breakable)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(text):
    return f"<td>{escape(str(text))}</td>"


def _number(value, form="{:,.1f}", kind=""):
    if value is None:
        return '<td class="none" data-value="">–</td>'
    return f'<td class="{kind}" data-value="{value!r}">{form.format(value)}</td>'


def _speed(row):
    """images/s of a row; the reason on hover where there is none."""
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
            _text(e.network), _number(e.image_size, "{}"), _number(e.params_m, "{}"),
            _number(e.imagenet_top1), _number(e.v100_images_per_s),
            *[_speed(chip.row(e, mode, "paper")) for mode in modes],
            _number(eager.batch if eager else None, "{}"),
        ])  # fmt: skip
    headings = ["network", "size", "M params", "top-1", "V100 (paper)", *modes, "batch (fp32)"]
    caption = "images/s: largest batch that fits or the cap, mean; hover for the batch"
    return _table(caption, headings, rows)


def _batch_table(chip):
    modes = chip.modes("batch")
    if not modes:
        return ""
    fast, base, compiled = "deit_fast_bf16", "eager_bf16", "compile_max_autotune_bf16"
    rows = []
    for e in ENTRIES:
        ours, eager, autotuned = (chip.row(e, m, "batch") for m in (fast, base, compiled))
        rows.append([
            _text(e.network), *[_speed(chip.row(e, mode, "batch")) for mode in modes],
            _number(ratio(ours, eager), "{:.2f}"), _number(ratio(ours, autotuned), "{:.2f}"),
        ])  # fmt: skip
    headings = ["network", *modes, f"{fast} / eager", f"{fast} / max-autotune"]
    return _table("images/s: median; hover for the batch", headings, rows)


def _eight_bits_table(chip):
    rows, headings = [], []
    for e in ENTRIES:
        found = EightBits.of(chip, e)
        if found is None:
            continue
        verdicts = [
            _text(x) if isinstance(x, str) else _number(x, "{:.2f}") for _, x in found.verdicts
        ]  # fmt: skip
        speeds = map(_speed, found.rows.values())
        rows.append([_text(e.network), _number(found.base.batch, "{}"), *speeds, *verdicts])
        headings = ["network", "batch", *EIGHT_BITS.values(), *[name for name, _ in found.verdicts]]
    caption = (
        "images/s: median; the products of every Block in eight bits, the rest in bf16. Not "
        f"alike: {NOT_ALIKE}"
    )
    return _table(caption, headings, rows) if rows else ""


def _train_table(chip, protocol):
    modes, rows = chip.modes(protocol, train=True), []
    for e in ENTRIES:
        for batch in chip.batches(e, protocol, train=True):
            found = {mode: chip.row(e, mode, protocol, batch) for mode in modes}
            ours, rival = found.get(OURS), found.get(RIVAL)
            rows.append([
                _text(e.network), _number(batch, "{}"), *map(_speed, found.values()),
                _number(ratio(ours, rival), "{:.2f}"), _text(mark(e, ours, rival)),
                *[_number(r and r.peak_memory_gb, "{:.2f}") for r in (rival, ours)],
            ])  # fmt: skip
    headings = [
        "network", "batch", *modes, f"{OURS} / max-autotune", "wanted of an H100 or H200",
        "GB max-autotune", "GB reduce-overhead",
    ]  # fmt: skip
    caption = "images/s: median. GB: the most allocated at once, both in autocast bf16"
    return _table(caption, headings, rows) if rows else ""


def _latency_table(chip):
    caption = "ms, median, each call waited for"
    return _by_batch(
        chip, "latency", caption, lambda row: _number(row and row.ms_median, "{:,.2f}")
    )


def _host_table(chip):
    caption = "images/s, median; images in the mode's dtype are copied from pinned host memory"
    return _by_batch(
        chip, "host", caption, lambda row: _number(row and row.images_per_s, "{:,.0f}")
    )


def _by_batch(chip, protocol, caption, cell):
    modes = chip.modes(protocol)
    rows = []
    for e in ENTRIES:
        batches = {r.batch for r in chip.models if (r.timm_name, r.image_size) == e.measured_as}
        for batch in sorted(batches):
            found = [chip.row(e, mode, protocol, batch) for mode in modes]
            if any(row and row.status != "unavailable" for row in found):
                rows.append([_text(e.network), _number(batch, "{}"), *map(cell, found)])
    return _table(caption, ["network", "batch", *modes], rows) if rows else ""


def _kernel_table(chip):
    rows = [
        [
            _text(f"{r.op} {r.case}".strip()), _text(r.network), _number(r.batch, "{}"),
            _text(r.mode), _text(r.served_by), _text(r.dtype),
            _number(r.bytes / 1e6), _number(r.flops / 1e9), _number(1e3 * r.predicted_ms),
            _number(r.ms_median and 1e3 * r.ms_median),
            _number(r.fraction_of_peak_rate, "{:.0%}"), _number(r.relative_error, "{:.1e}"),
        ]
        for r in chip.kernels
    ]  # fmt: skip
    headings = [
        "operation", "network", "batch", "mode", "served by", "dtype", "MB", "GFLOP",
        "predicted us", "measured us", "of the roof", "relative error",
    ]  # fmt: skip
    caption = "predicted: bytes and FLOPs at the measured peak rates, the larger of the two"
    return _table(caption, headings, rows) if rows else ""


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
