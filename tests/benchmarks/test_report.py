"""The README's tables and the page say what the files say, and nothing else."""

import json
import re
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import selection
from made_up_results import kernel_row, model_row, results_of

from benchmarks import measured, table5
from benchmarks.measured import Chip, ratio
from benchmarks.report import __main__ as report
from benchmarks.report import comparison
from benchmarks.report import page as page_module
from benchmarks.report.predicted import predicted_table
from benchmarks.report.readme import BEGIN, END, gpu_tables
from benchmarks.table5 import ENTRIES
from deit_fast.bench.modes import MODES
from deit_fast.bench.results import ModelRow

ROOT = Path(__file__).parents[2]
BY_NAME = {e.network: e for e in ENTRIES}
SMALL, RESNET = BY_NAME["DeiT-S distilled"], BY_NAME["ResNet-50"]
FAILED = {"status": "failed", "note": "relative error <0.5>"}
SPEED = {  # made up, and different for each mode
    "eager_fp32": 1000.0, "eager_bf16": 4000.0, "compile_max_autotune_bf16": 5000.0,
    "deit_fast_bf16": 8000.0,
}  # fmt: skip


def everything():
    """Rows of every network: twice as fast as the paper's V100 in fp32, and so on."""
    rows = []
    for entry in table5.distinct(list(ENTRIES)):
        for mode, speed in SPEED.items():
            if MODES[mode].fast and entry.family == "convnet":
                continue
            images = speed / 1000 * 2 * entry.v100_images_per_s
            rows.append(model_row(entry, mode, images))
            rows.append(model_row(entry, mode, images / 2, protocol="paper", asked_batch=4096))
    rows += [
        model_row(SMALL, "deit_fast_bf16", 500.0, protocol="latency", asked_batch=1, batch=1),
        model_row(SMALL, "eager_bf16_train", 900.0),
        model_row(SMALL, "deit_fast_bf16_train", 1800.0),
        model_row(RESNET, "compile_bf16", **FAILED),
        kernel_row(), kernel_row(mode="eager", ms=4.0),
        kernel_row("layer_norm", flops=0, case=""),
        kernel_row("attention", case="<last>", status="failed", note="no"),
    ]  # fmt: skip
    return rows


@pytest.fixture
def folder(tmp_path):
    results_of(*everything()).save(tmp_path / "imaginary" / "table5.json")
    return tmp_path


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    return path


def test_the_readme_of_this_checkout_is_what_its_files_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


@pytest.fixture
def drawing():
    selection.extra("bench", "matplotlib")


@pytest.mark.slow
def test_readme_tables(folder, readme, drawing, capsys):
    args = ["--results", str(folder), "--readme", str(readme)]
    assert report.main([*args, "--check"]) == 1
    assert "old" in readme.read_text() and not list(folder.glob("*/*.html"))
    assert report.main(args) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| DeiT-S distilled | 256 | 1,872 | 7,490 | 9,362 | 14,979 | – | 2.00 | 1.60 |" in text
    assert "NVIDIA Imaginary, torch 2.11.0, triton 3.6.0, 2026-11-21, commit aaaaaaa" in text
    assert "ResNet" not in text  # deit_fast has no figure for it
    assert report.main([*args, "--check"]) == 0
    readme.write_text(text.replace("14,979", "15,979"))  # someone improves a figure
    assert report.main([*args, "--check"]) == 1


@pytest.mark.slow
def test_a_cpus_table5_is_not_in_the_readme(folder, readme, drawing):
    (path,) = folder.glob("*/table5.json")
    results_of(*everything(), gpu=None).save(path)
    assert report.main(["--results", str(folder), "--readme", str(readme)]) == 0
    assert f"{BEGIN}\n{predicted_table()}\n{END}" in readme.read_text()
    page = (path.parent / "report.html").read_text()
    assert "Measured on a CPU" in page and "(CPU, 2 threads)" in page


def test_every_prediction_is_marked_as_one():
    title, _, _, _, *rows = predicted_table().split("\n")
    assert "deit_fast has not been measured on a GPU yet. Predicted" in title and len(rows) == 4
    cells = [cell for row in rows for cell in row.strip("| ").split(" | ")[1:]]
    assert len(cells) == 8 and all(re.fullmatch(r"[\d,]+ predicted", cell) for cell in cells)


@pytest.mark.slow
def test_the_manuals_page_is_written_and_checked(folder, readme, drawing, capsys):
    (path,) = folder.glob("*/table5.json")
    results_of(*everything(), gpu=None).save(path)
    page = folder / "docs" / "results" / "table5_cpu.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"# Title\n{comparison.BEGIN}\nold\n{comparison.END}\nend\n")
    args = ["--results", str(folder), "--readme", str(readme)]
    assert report.main([*args, "--check"]) == 1
    assert f"{page} is not what the results say" in capsys.readouterr().out
    changed = comparison.for_manual(report.read_chips(folder))
    assert "| DeiT-S distilled | 224 | 936.2 | 1,872 (0%) |" in changed
    readme.write_text(readme.read_text().replace("old", predicted_table()))
    page.write_text(page.read_text().replace("old", changed))
    assert report.main([*args, "--check"]) == 0
    page.write_text(page.read_text().replace("1,872", "1,972"))  # someone improves a figure
    assert report.main([*args, "--check"]) == 1
    page.write_text("no comments")
    assert report.main([*args, "--check"]) == 2
    assert f"{page}: lacks the comments" in capsys.readouterr().err


def test_the_manual_has_the_page():
    assert comparison.BEGIN in (ROOT / report.TABLE5_CPU).read_text()


def test_bad_files_are_named_and_nothing_is_written(folder, readme, capsys):
    (path,) = folder.glob("*/table5.json")
    path.write_text(path.read_text()[:-30])
    assert report.main(["--results", str(folder), "--readme", str(readme)]) == 2
    assert f"{path}: not JSON" in capsys.readouterr().err
    assert "old" in readme.read_text() and not list(folder.glob("*/*.html"))
    readme.write_text("no comments")
    path.unlink()
    assert report.main(["--results", str(folder), "--readme", str(readme)]) == 2
    assert "lacks the comments" in capsys.readouterr().err


def test_ratios_are_within_one_run():
    fast, base = model_row(SMALL, "deit_fast_bf16", 300.0), model_row(SMALL, "eager_bf16", 100.0)
    assert ratio(fast, base) == pytest.approx(3.0)
    for change in ({"build": "c" * 12}, {"batch": 128}, {"protocol": "paper"}, FAILED):
        assert (
            ratio(fast, model_row(SMALL, "eager_bf16", **{"images_per_s": 100.0, **change})) is None
        )
    assert ratio(fast, None) is None


def test_one_network_in_several_rows_is_reported_in_each(folder):
    chip = Chip.read(folder / "imaginary")
    long = BY_NAME["DeiT-S distilled 1000 epochs"]
    assert chip.row(long, "deit_fast_bf16", "batch") is chip.row(SMALL, "deit_fast_bf16", "batch")
    assert chip.throughput(SMALL, "eager_fp32").protocol == "paper"
    assert chip.throughput(RESNET, "compile_bf16") is None
    assert chip.row(RESNET, "compile_bf16", "batch").status == "failed"


def test_a_measured_row_goes_before_a_failed_one_and_the_largest_batch_first():
    rows = [model_row(SMALL, batch=b, asked_batch=b) for b in (8, 64, 16)]
    failed = model_row(SMALL, batch=256, **FAILED)
    chip = Chip(Path(), {"table5": results_of(failed, *rows)})
    assert chip.row(SMALL, "eager_fp32", "batch") is rows[1]
    assert chip.row(SMALL, "eager_fp32", "batch", 16) is rows[2]
    assert chip.row(SMALL, "eager_fp32", "batch", 256) is failed


def test_the_last_build_speaks():
    """An old row is shown only where the last run has none, failed ones included; never in the
    README."""
    old = model_row(SMALL, "deit_fast_bf16", 500.0, build="c" * 12, batch=512, asked_batch=512)
    failed = model_row(SMALL, "deit_fast_bf16", **FAILED)
    chip = Chip(Path(), {"table5": results_of(old, failed)})
    assert chip.row(SMALL, "deit_fast_bf16", "batch") is failed
    assert gpu_tables([chip]) == ""
    chip = Chip(Path(), {"table5": results_of(old, model_row(SMALL, "eager_bf16", 100.0))})
    assert chip.row(SMALL, "deit_fast_bf16", "batch") is old
    assert gpu_tables([chip]) == ""


def test_the_readme_compares_only_what_ran_together():
    rows = [
        model_row(SMALL, "deit_fast_bf16", 800.0), model_row(SMALL, "eager_bf16", 400.0),
        model_row(SMALL, "deit_fast_engine_bf16", 1200.0),
        model_row(SMALL, "eager_fp32", 7.0, build="c" * 12),
        model_row(SMALL, "compile_max_autotune_bf16", 9.0, batch=128),
    ]  # fmt: skip
    table = gpu_tables([Chip(Path(), {"table5": results_of(*rows)})])
    assert "| DeiT-S distilled | 256 | – | 400 | – | 800 | 1,200 | 3.00 | – |" in table
    table = gpu_tables([Chip(Path(), {"table5": results_of(*rows[1:])})])
    assert "| DeiT-S distilled | 256 | – | 400 | – | – | 1,200 | 3.00 | – |" in table
    table = gpu_tables([Chip(Path(), {"table5": results_of(*rows[:2])})])
    assert "| DeiT-S distilled | 256 | – | 400 | – | 800 | – | 2.00 | – |" in table


BASE = BY_NAME["DeiT-B distilled"]
UNAVAILABLE = {"status": "unavailable", "note": "torchao is not <installed>"}


def quantized(entry, fp8, torchao, **changes):
    return [
        model_row(entry, "deit_fast_bf16", 1000.0), model_row(entry, "deit_fast_int8", 1250.0),
        model_row(entry, "deit_fast_fp8", fp8, **changes),
        model_row(entry, "deit_fast_engine_fp8", fp8 + 100),
        model_row(entry, "deit_fast_engine_bf16", 1100.0),
        model_row(entry, "deit_fast_fp8_attention", fp8 + 1),
        torchao if isinstance(torchao, ModelRow) else
        model_row(entry, "torchao_fp8_compile", torchao),
    ]  # fmt: skip


def test_quantized_inference_has_a_table_with_its_targets():
    none = model_row(BASE, "torchao_fp8_compile", **UNAVAILABLE)
    rows = [*quantized(SMALL, 1300.0, 1350.0), *quantized(BASE, 1400.0, none)]
    text = gpu_tables([Chip(Path(), {"table5": results_of(*rows)})])
    assert (
        "| DeiT-S distilled | 256 | 1,000 | 1,300 | 1,250 | 1,301 | 1,100 | 1,400 | 1,350 | 1.30 "
        "| 1.30 met | 1.27 | 1.30 missed | 1.25 | 0.96 | 1.04 | met |" in text
    )
    assert (
        "| DeiT-B distilled | 256 | 1,000 | 1,400 | 1,250 | 1,401 | 1,100 | 1,500 | unavailable "
        "| 1.40 | 1.50 missed | 1.36 | 1.50 missed | 1.25 | – | – "
        "| unavailable: torchao is not <installed> |" in text
    )
    target = "target on an H100 or H200"
    assert f"| fp8 / bf16 | {target} | engine fp8 / engine bf16 | {target} |" in text
    assert "every Block quantized" in text and "dynamic per-row scales for all four" in text
    slower = quantized(SMALL, 1300.0, 1500.0)
    assert "| 0.87 | 0.93 | missed |" in gpu_tables([made(*slower)])


def test_nothing_is_said_of_quantized_modes_that_did_not_run():
    other = {"batch": 128, "asked_batch": 128}
    halved = [replace(r, **other) for r in quantized(SMALL, 1300.0, 1000.0)]
    text = gpu_tables([made(*halved)])
    assert (
        "| DeiT-S distilled | 128 |" in text and "| 1.30 | – | 1.27 | – | 1.25 |" in text
    )  # no target there
    apart = quantized(SMALL, 1300.0, 1000.0, build="c" * 12)
    text = gpu_tables([made(*apart[:3])])
    assert "| 1,000 | – | 1,250 |" + " – |" * 8 + " 1.25 | – | – | – |" in text


def test_quantized_modes_that_failed_have_a_line():
    """Which one never run has not; nor one that the chip does not have."""
    failed = [model_row(SMALL, f"deit_fast_{f}", **FAILED) for f in ("fp8", "int8")]
    bf16 = model_row(SMALL, "deit_fast_bf16", 1000.0)
    text = gpu_tables([made(bf16, *failed)])
    assert "| DeiT-S distilled | 256 | 1,000 | failed | failed | – |" in text
    text = gpu_tables([made(*failed)])
    assert "| DeiT-S distilled | 256 | – | failed | failed | – |" in text
    int8 = model_row(SMALL, "deit_fast_int8", 1250.0)
    assert "| 1,000 | failed | 1,250 | – |" in gpu_tables([made(bf16, failed[0], int8)])
    old = replace(bf16, build="c" * 12)
    assert "| 256 | – | failed | failed |" in gpu_tables([made(old, *failed)])
    gone = [replace(r, **UNAVAILABLE) for r in failed]
    assert "quantized" not in gpu_tables([made(bf16, *gone)])
    assert gpu_tables([made(*(replace(r, build="c" * 12) for r in failed))]) == ""


def test_other_tables_say_what_failed_too():
    ours, base = model_row(SMALL, "deit_fast_bf16", 8.0), model_row(SMALL, "eager_bf16", **FAILED)
    assert "| 256 | – | failed | – | 8 | – | – |" in gpu_tables([made(ours, base)])
    rows = training(200.0, 280.0)
    rows[1] = replace(rows[1], **FAILED, images_per_s=None)
    assert "| 256 | 100 | – | – | failed | 280 | – |" in gpu_tables([made(*rows)])


@pytest.mark.slow
def test_a_mode_that_is_not_to_be_had_has_no_column(tmp_path, readme, drawing):
    """A mode that failed has one."""
    rows = []
    for protocol in ("batch", "paper", "latency", "host"):
        rows += [
            model_row(SMALL, "eager_fp32", protocol=protocol),
            model_row(SMALL, "eager_tf32", protocol=protocol, **UNAVAILABLE),
            model_row(SMALL, "compile_bf16", protocol=protocol, **FAILED),
            model_row(BASE, "eager_tf32", protocol=protocol, batch=8, **UNAVAILABLE),
        ]
    rows.append(model_row(SMALL, "deit_fast_bf16_train", batch=64, **UNAVAILABLE))
    chip = made(*rows)
    for protocol in ("batch", "paper", "latency", "host"):
        assert chip.modes(protocol) == ["eager_fp32", "compile_bf16"]
        assert chip.batches(BASE, protocol, train=False) == []
    assert chip.modes("batch", train=True) == chip.batches(SMALL, "batch", train=True) == []
    results_of(*rows).save(tmp_path / "imaginary" / "table5.json")
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    text = (tmp_path / "imaginary" / "report.html").read_text()
    assert "eager_<wbr>tf32" not in text and "compile_<wbr>bf16" in text
    assert "Training" not in text and "eager_tf32, batch 8: unavailable" in text


@pytest.mark.slow
def test_the_page_shows_quantized_inference(tmp_path, readme, drawing):
    none = model_row(BASE, "torchao_fp8_compile", **UNAVAILABLE)
    rows = [*quantized(SMALL, 1300.0, 1350.0), *quantized(BASE, 1400.0, none)]
    results_of(*rows).save(tmp_path / "imaginary" / "table5.json")
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    text = (tmp_path / "imaginary" / "report.html").read_text()
    section = text.split("<h2>Quantized inference</h2>")[1].split("</section>")[0]
    cells = [unescape(c) for c in re.findall(r"<td[^>]*>([^<]*)</td>", section)]
    for wanted in ("1.30 met", "1.50 missed", "1.25", "1.04", "met", "unavailable", "1,350",
                   "1.30 missed", f"unavailable: {UNAVAILABLE['note']}"):  # fmt: skip
        assert wanted in cells, wanted
    assert "torchao_fp8_compile, batch 256: unavailable: torchao is not &lt;installed&gt;" in text
    assert "dynamic per-row scales for all four" in section


def test_the_page_shows_the_batch_of_quantized_inference():
    wide, narrow = {"batch": 512, "asked_batch": 512}, {"batch": 128, "asked_batch": 128}
    rows = [model_row(SMALL, "deit_fast_bf16", **wide), model_row(SMALL, "deit_fast_fp8", **narrow)]
    assert '<td class="" data-value="128">128</td>' in page_module._quantized_table(made(*rows))


def training(compiled, ours, gb=(9.0, 8.0), entry=SMALL, **changes):
    return [
        model_row(entry, f"{mode}_amp_bf16_train", speed, peak_memory_gb=memory, **changes)
        for mode, speed, memory in (
            ("eager", 100.0, 12.0), ("compile_max_autotune", compiled, gb[0]),
            ("deit_fast_reduce_overhead", ours, gb[1]),
        )
    ]  # fmt: skip


def made(*rows):
    return Chip(Path(), {"train": results_of(*rows)})


def test_training_has_a_table_with_its_targets():
    step = {"protocol": "step", "batch": 64, "asked_batch": 64}
    text = gpu_tables([made(*training(200.0, 280.0), *training(200.0, 250.0, **step))])
    assert (
        "| DeiT-S distilled | forward + backward | 256 | 100 | – | – | 200 | 280 | 1.40 | 1.30 met "
        "| 9.00 | 8.00 |" in text
    )
    assert (
        "| DeiT-S distilled | full step | 64 | 100 | – | – | 200 | 250 | 1.25 | 1.30 missed: speed "
        "| 9.00 | 8.00 |" in text
    )
    assert "target on an H100 or H200" in text and "images/s in training" in text
    fatter = gpu_tables([made(*training(200.0, 280.0, (8.0, 8.5)))])
    assert "| 1.30 missed: memory | 8.00 | 8.50 |" in fatter


def test_nothing_is_said_of_training_that_did_not_run():
    apart = training(200.0, 280.0)
    apart[1] = model_row(SMALL, "compile_max_autotune_amp_bf16_train", 200.0, build="c" * 12)
    text = gpu_tables([made(*apart)])
    assert "| 256 | 100 | – | – | – | 280 | – | – | – | 8.00 |" in text and "met" not in text
    assert gpu_tables([made(*training(200.0, 280.0)[:2])]) == ""
    on_a_cpu = results_of(*training(200.0, 280.0), gpu=None)
    assert gpu_tables([Chip(Path(), {"train": on_a_cpu})]) == ""
    no_target = made(*training(200.0, 280.0, entry=BY_NAME["ViT-B/16"]))
    assert "| 1.40 | – | 9.00 | 8.00 |" in gpu_tables([no_target])


@pytest.mark.slow
def test_the_page_shows_training(tmp_path, readme, drawing):
    step = {"protocol": "step", "batch": 64, "asked_batch": 64}
    results_of(*training(200.0, 280.0), *training(200.0, 250.0, **step)).save(
        tmp_path / "imaginary" / "train.json"
    )
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    text = (tmp_path / "imaginary" / "report.html").read_text()
    assert "Training: forward + backward" in text and "Training: full step" in text
    cells = [unescape(c) for c in re.findall(r"<td[^>]*>([^<]*)</td>", text)]
    for wanted in ("1.30 met", "1.40", "1.30 missed: speed", "1.25", "9.00", "8.00"):
        assert wanted in cells, wanted
    only_forward = [r for r in everything() if "train" not in r.mode]
    results_of(*only_forward).save(tmp_path / "imaginary" / "train.json")
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    assert "Training" not in (tmp_path / "imaginary" / "report.html").read_text()


def test_one_protocol_for_a_comparison():
    """Mean at the largest batch and median at a given one are not mixed."""
    rows = [model_row(e, images_per_s=e.v100_images_per_s) for e in ENTRIES[:6]]
    rows += [model_row(e, images_per_s=5.0, protocol="paper") for e in ENTRIES[:2]]
    chip = Chip(Path(), {"table5": results_of(*rows)})
    assert chip.protocol == "batch"
    assert chip.throughput(ENTRIES[0], "eager_fp32").images_per_s == ENTRIES[0].v100_images_per_s
    assert measured.rank_correlation(chip, list(ENTRIES)) == (pytest.approx(1.0), 6)


def test_the_header_is_table5s():
    other = results_of(torch="2.9.0")
    chip = Chip(Path(), {"peak_rates": other, "table5": results_of(model_row(SMALL))})
    assert chip.newest.hardware["torch"] == "2.11.0"


def test_rank_correlation():
    chip = Chip(Path(), {"table5": results_of(*everything())})
    assert measured.rank_correlation(chip, list(ENTRIES)) == (pytest.approx(1.0), 26)
    rows = [model_row(e, images_per_s=1 / e.v100_images_per_s) for e in ENTRIES]
    chip = Chip(Path(), {"table5": results_of(*rows)})
    assert measured.rank_correlation(chip, list(ENTRIES)) == (pytest.approx(-1.0), 26)
    assert measured.rank_correlation(Chip(Path(), {"x": results_of(*rows[:2])}), ENTRIES) is None


def test_spearman_is_as_by_hand():
    """Ranks 1, 2.5, 2.5, 4, 5 and 2, 1, 4, 3, 5. The products of their deviations from 3 are 2, 1,
    -0.5, 0 and 4; their squares' sums 9.5 and 10."""
    found = measured.spearman([10.0, 20.0, 20.0, 30.0, 40.0], [2.0, 1.0, 4.0, 3.0, 5.0])
    assert found == pytest.approx(6.5 / (9.5 * 10) ** 0.5)
    assert measured.spearman([1.0, 5.0, 7.0], [1.0, 50.0, 700.0]) == pytest.approx(1.0)
    assert measured.spearman([1.0, 5.0, 7.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)


@pytest.fixture
def page(folder, readme, drawing):
    assert report.main(["--results", str(folder), "--readme", str(readme)]) == 0
    return folder / "imaginary" / "report.html"


@pytest.mark.slow
def test_the_page_stands_alone_and_holds_every_row(page):
    text = page.read_text()
    cells = [unescape(c) for c in re.findall(r"<td[^>]*>([^<]*)</td>", text)]
    for entry in ENTRIES:
        assert cells.count(entry.network) >= 2, entry.network
        assert f"{entry.v100_images_per_s:,.1f}" in cells
    assert "1,872" in cells and "14,979" in cells and "2.00" in cells and "1.60" in cells
    assert "<b>1.000</b>" in text and "over 26 networks" in text
    assert "attention &lt;last&gt;" in text and "<last>" not in text
    assert "relative error &lt;0.5&gt;" in text
    assert not re.search(r'(src|href)="(?!data:)', text)  # needs nothing beside itself
    assert text.count("data:image/svg+xml;base64,") == 3
    images = sorted(page.parent.glob("*.png"))
    assert [p.name for p in images] == ["figure1.png", "ratios.png", "rooflines.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in images)


@pytest.mark.slow
def test_a_chip_with_little_still_has_a_page(tmp_path, readme, drawing):
    results_of(model_row(RESNET)).save(tmp_path / "imaginary" / "table5.json")
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    text = (tmp_path / "imaginary" / "report.html").read_text()
    assert "no rank correlation" in text and "Kernels" not in text
    assert predicted_table() in readme.read_text()


@pytest.mark.slow
def test_in_a_real_browser(page, tmp_path):
    """No script error; a click on a heading sorts, a second one turns the order."""
    chromium = selection.tool("chromium", "google-chrome")
    copy = tmp_path / "clicked.html"
    script = """<script>
const table = document.querySelector("section:nth-of-type(2) table");
const column = text => [...table.tHead.rows[0].cells].find(c => c.textContent === text);
const names = () => [...table.tBodies[0].rows].map(r => r.cells[0].textContent);
const found = {rows: document.querySelectorAll("tbody tr").length, start: names()};
column("V100 (paper)").click(); found.slowest = names()[0];
column("V100 (paper)").click(); found.fastest = names()[0];
column("network").click(); found.first = names()[0]; found.all = names().length;
column("deit_fast_bf16").click(); found.last = names().at(-1);
found.images = [...document.images].every(i => i.complete && i.naturalWidth > 0);
document.title = JSON.stringify(found);
</script>"""
    copy.write_text(page.read_text().replace("</html>", script + "</html>"))
    shot = tmp_path / "page.png"
    common = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--window-size=1300,3000",
    ]  # fmt: skip
    done = subprocess.run([*common, "--dump-dom", f"file://{copy}"], capture_output=True, text=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    title = unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1])
    found = json.loads(title)
    assert found["start"] == [e.network for e in ENTRIES]
    assert (found["slowest"], found["fastest"]) == ("KDforAA-B8", "ResNet-18")
    assert found["first"] == "DeiT-B" and found["all"] == 32 and found["images"]
    assert BY_NAME[found["last"]].family == "convnet"  # without a figure: last
    assert found["rows"] >= 2 * 32  # forward modes and the paper's protocol; training has its own
    subprocess.run([*common, f"--screenshot={shot}", f"file://{page}"], check=True,
                   capture_output=True)  # fmt: skip
    assert shot.stat().st_size > 50_000
