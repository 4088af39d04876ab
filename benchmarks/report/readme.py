"""The README's tables, in Markdown."""

from benchmarks.measured import Chip, ratio
from benchmarks.table5 import ENTRIES, RELATIVES, distinct

from . import targets
from .predicted import predicted_table
from .targets import QuantizedComparison, training_target

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COLUMNS = {
    "eager fp32": "eager_fp32", "eager bf16": "eager_bf16",
    "compile max-autotune bf16": "compile_max_autotune_bf16", "deit_fast bf16": "deit_fast_bf16",
    "deit_fast bf16, engine": "deit_fast_engine_bf16",
}  # fmt: skip


TRAINING = {
    "eager AMP": "eager_amp_bf16_train", "compile AMP": "compile_amp_bf16_train",
    "deit_fast AMP": "deit_fast_amp_bf16_train",
    "compile max-autotune AMP": targets.BASELINE, "deit_fast reduce-overhead AMP": targets.OURS,
}  # fmt: skip


def readme_tables(chips: list[Chip]) -> str:
    """Everything between the README's two comments: measured on GPUs, else what is predicted."""
    return gpu_tables(chips) or predicted_table()


def gpu_tables(chips: list[Chip]) -> str:
    """Tables of inference, quantized inference and training for each GPU; "" without any."""
    kinds = (_readme_table, _quantized_table, _train_table)
    tables = [table(chip) for chip in chips if not chip.is_cpu for table in kinds]
    return "\n\n".join(filter(None, tables))


def _readme_table(chip):
    """Ratios are the engine's where it was measured: the plain call may wait for Python."""
    lines, runs = [], set()
    for entry in distinct([*ENTRIES, *RELATIVES]):
        rows = {name: chip.row(entry, mode, "batch") for name, mode in COLUMNS.items()}
        both = (rows["deit_fast bf16, engine"], rows["deit_fast bf16"])
        ours = [r for r in both if r and r.status == "measured" and not chip.is_old(r)]
        if not ours:
            continue
        ours = ours[0]
        speeds = [_speed(chip, r, ours) for r in rows.values()]
        runs.add(ours.runs)
        times = [
            "–" if (x := ratio(ours, rows[base])) is None else f"{x:.2f}"
            for base in ("eager bf16", "compile max-autotune bf16")
        ]
        lines.append("| " + " | ".join([entry.network, str(ours.batch), *speeds, *times]) + " |")
    headings = ["network", "batch", *COLUMNS, "ours / eager", "ours / compile"]
    return _markdown(chip, "images/s", runs, headings, lines)


def _speed(chip, row, base):
    """images/s of a row that `base` can be compared with; else what became of it."""
    if row and row.status != "measured" and not chip.is_old(row):
        return row.status
    return f"{row.images_per_s:,.0f}" if ratio(row, base) else "–"


def _quantized_table(chip):
    lines, runs, headings = [], set(), []
    for entry in distinct([*ENTRIES, *RELATIVES]):
        found = QuantizedComparison.of(chip, entry)
        if found is None or chip.is_old(found.ours):
            continue
        base = found.base
        runs.add(base.runs)
        speeds = [_speed(chip, r, base) for r in found.rows.values()]
        columns = [f"{x:.2f}" if isinstance(x, float) else x or "–" for _, x in found.columns]
        lines.append("| " + " | ".join([entry.network, str(base.batch), *speeds, *columns]) + " |")
        headings = [
            "network",
            "batch",
            *targets.QUANTIZED_MODES,
            *[name for name, _ in found.columns],
        ]
    what = (
        "images/s with the GEMMs of every Block quantized, the rest in bf16; torchao's float8 "
        f"dynamic per-row quantization under torch.compile. Differences: {targets.DIFFERENCES}"
    )
    return _markdown(chip, what, runs, headings, lines)


def _train_table(chip):
    lines, runs = [], set()
    for entry in distinct([*ENTRIES, *RELATIVES]):
        for protocol, work in targets.WORK.items():
            for batch in chip.batches(entry, protocol, train=True):
                rows = [chip.row(entry, mode, protocol, batch) for mode in TRAINING.values()]
                baseline, ours = rows[-2:]
                if ours is None or ours.status != "measured" or chip.is_old(ours):
                    continue
                runs.add(ours.runs)
                speeds = [_speed(chip, r, ours) for r in rows]
                times = ratio(ours, baseline)
                memory = [
                    f"{r.peak_memory_gb:.2f}" if ratio(r, ours) and r.peak_memory_gb else "–"
                    for r in (baseline, ours)
                ]
                lines.append("| " + " | ".join([
                    entry.network, work, str(batch), *speeds,
                    "–" if times is None else f"{times:.2f}",
                    training_target(entry, ours, baseline) or "–", *memory,
                ]) + " |")  # fmt: skip
    headings = [
        "network", "work", "batch", *TRAINING, "reduce-overhead / max-autotune",
        targets.HEADING, "GB max-autotune", "GB reduce-overhead",
    ]  # fmt: skip
    what = "images/s in training, fp32 weights, bf16 autocast; a full step has fused AdamW"
    return _markdown(chip, what, runs, headings, lines)


def _markdown(chip, what, runs, headings, lines):
    if not lines:
        return ""
    newest = chip.newest
    title = (
        f"{chip.name}, torch {newest.hardware['torch']}, triton {newest.hardware['triton']}, "
        f"{newest.date}, commit {newest.commit[:7]}: {what}, median of at least {min(runs)} "
        "calls, all at that batch and by one build."
    )
    table = [
        "| " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) - 1), *lines,
    ]  # fmt: skip
    return "\n".join([title, "", *table])


def with_tables(readme: str, tables: str) -> str:
    """The README's text with what lies between the two comments replaced.

    Raises:
        ValueError: A comment is missing.
    """
    return with_block(readme, tables, BEGIN, END, "README.md")


def with_block(text: str, block: str, begin: str, end: str, name: str) -> str:
    """A file's text with what lies between two comments replaced.

    Args:
        text: The file's.
        block: What is to lie there.
        begin: The first comment.
        end: The second.
        name: Of the file, for the error.

    Raises:
        ValueError: A comment is missing.
    """
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{name}: lacks the comments {begin} and {end}")
    return f"{before}{begin}\n{block}\n{end}{after}"
