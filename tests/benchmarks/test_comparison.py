"""Table 5 here beside the paper's figures, for a terminal and for the manual."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_up_results import model_row, results_of

from benchmarks.measured import Chip
from benchmarks.report import comparison
from benchmarks.table5 import ENTRIES, select
from deit_fast.bench import tables

BY_NAME = {e.network: e for e in ENTRIES}
SMALL, TINY = BY_NAME["DeiT-S"], BY_NAME["DeiT-Ti"]
IN_TURN = {"baseline": "eager_fp32", "speedup": 1.25}


def on_a_cpu(*rows):
    return Chip(Path(), {"table5": results_of(*rows, gpu=None, cpu="Imaginary 9")})


def quick_rows():
    rows = [model_row(e, images_per_s=e.v100_images_per_s / 100, batch=8) for e in ENTRIES[:3]]
    rows += [model_row(e, images_per_s=e.v100_images_per_s / 50, batch=4) for e in (SMALL, TINY)]
    ours = model_row(SMALL, "deit_fast_fp32", 23.0, batch=4, **IN_TURN)
    return [*rows, ours, model_row(TINY, "deit_fast_fp32", 60.0, batch=4)]


def shown(chip, entries):
    console = tables.console()
    with console.capture() as captured:
        for part in comparison.for_terminal(chip, entries):
            console.print(part, soft_wrap=isinstance(part, str))
    return captured.get()


def test_a_network_has_the_papers_figure_and_ours():
    """The ratio is that of calls in turn where the row has it, else that of the figures."""
    headings, lines = comparison.cells(on_a_cpu(*quick_rows()), list(ENTRIES), "batch")
    assert headings == [
        "network", "pixels", "paper, V100", "eager fp32", "deit_fast fp32",
        "deit_fast / eager fp32", "batch",
    ]  # fmt: skip
    assert lines == [
        ["ResNet-18", "224", "4,458.4", "44.6 (0%)", "–", "–", "8"],
        ["ResNet-50", "224", "1,226.1", "12.3 (0%)", "–", "–", "8"],
        ["ResNet-101", "224", "753.6", "7.54 (0%)", "–", "–", "8"],
        ["DeiT-Ti", "224", "2,536.5", "50.7 (0%)", "60.0 (0%)", "1.18", "4"],
        ["DeiT-S", "224", "940.4", "18.8 (0%)", "23.0 (0%)", "1.25", "4"],
    ]


def test_a_spread_is_shown_and_what_failed_says_so():
    wide = replace(model_row(SMALL, images_per_s=10.0, batch=4), ms_p20=380.0, ms_p80=440.0)
    failed = model_row(TINY, status="failed", note="no", batch=4)
    old = model_row(BY_NAME["DeiT-B"], build="c" * 12)
    _, lines = comparison.cells(on_a_cpu(wide, failed, old), list(ENTRIES), "batch")
    assert [line[:4] for line in lines] == [
        ["DeiT-Ti", "224", "2,536.5", "failed"], ["DeiT-S", "224", "940.4", "10.0 (15%)"],
    ]  # fmt: skip


def test_correlations_are_of_all_and_of_each_family():
    rows = [
        model_row(e, images_per_s=e.v100_images_per_s) for e in ENTRIES if "RA" not in e.network
    ]
    said = comparison.correlations(on_a_cpu(*rows), list(ENTRIES), "batch")
    groups = ("26 networks", "16 convolutional networks", "10 transformers")
    assert said.endswith(f": {', '.join(f'1.000 over {name}' for name in groups)}.")
    some = comparison.correlations(on_a_cpu(*quick_rows()), list(ENTRIES), "batch")
    # ranks 5 3 1 4 2 in the paper, 4 2 1 5 3 here: 1 - 6 * 4 / (5 * 24)
    assert "0.800 over 5 networks, 1.000 over 3 convolutional networks." in some
    assert comparison.correlations(on_a_cpu(*quick_rows()[:2]), list(ENTRIES), "batch") == ""


def test_a_terminal_shows_what_was_chosen():
    text = shown(on_a_cpu(*quick_rows()), select(["DeiT-S", "DeiT-Ti", "resnet18"]))
    assert "Table 5: images/s beside the paper's" in text and "940.4" in text and "1.25" in text
    assert "over 3 networks" in text and "ResNet-101" not in text
    few = shown(on_a_cpu(*quick_rows()), select(["DeiT-S"]))
    assert "fewer than three networks measured" in few
    assert not list(comparison.for_terminal(on_a_cpu(*quick_rows()), select(["DeiT-B"])))


def test_the_manual_has_a_table_for_each_cpu_and_none_of_a_gpu():
    gpu = Chip(Path(), {"table5": results_of(*quick_rows())})
    assert comparison.for_manual([gpu]) == comparison.for_manual([]) == comparison.NOTHING
    no_table = Chip(Path(), {"kernels": results_of(gpu=None)})
    assert comparison.for_manual([no_table]) == comparison.NOTHING
    text = comparison.for_manual([gpu, no_table, on_a_cpu(*quick_rows())])
    assert text.startswith("## Imaginary 9, 2 threads\n\ntorch 2.11.0, timm 1.0.26, Python 3.11, ")
    assert "| DeiT-S | 224 | 940.4 | 18.8 (0%) | 23.0 (0%) | 1.25 | 4 |" in text
    assert "Rank correlation (Spearman)" in text and text.count("\n| ") == 6


@pytest.mark.parametrize("mode", ["deit_fast_bf16", "compile_max_autotune_bf16"])
def test_a_gpus_modes_have_columns(mode):
    rows = [model_row(SMALL, mode, 900.0), model_row(SMALL, "eager_bf16", 300.0)]
    headings, lines = comparison.cells(
        Chip(Path(), {"table5": results_of(*rows)}), list(ENTRIES), "batch"
    )
    assert comparison.MODES[mode] in headings and "eager fp32" not in headings
    assert ("3.00" in lines[0]) == ("deit_fast / eager bf16" in headings) == ("deit" in mode)
