"""Tables for a terminal show every row, also one that was not timed."""

from dataclasses import replace

import pytest
from made_up_results import kernel_row, model_row

from benchmarks.table5 import ENTRIES
from deit_fast.bench import tables


def shown(table) -> list[str]:
    console = tables.console()
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def test_a_kernel_that_failed_has_a_line():
    """Before or after it was found to agree."""
    failed = {"status": "failed", "note": "Mismatch"}
    rows = [
        kernel_row(case="qkv"), kernel_row(case="proj", **failed, relative_error=None),
        kernel_row(case="fc1", **failed),
    ]  # fmt: skip
    lines = {name: line for line in shown(tables.kernels(rows)) for name in ("qkv", "proj", "fc1")
             if name in line.split()}  # fmt: skip
    assert lines["qkv"].split()[-3:] == ["2,000.0", "1.33", "1e-03"]
    assert lines["proj"].split()[-3:] == ["1,500.0", "failed", "–"]
    assert lines["fc1"].split()[-3:] == ["1,500.0", "failed", "1e-03"]


@pytest.mark.parametrize("status", ["failed", "unavailable"])
def test_a_model_that_was_not_timed_says_why(status):
    rows = [model_row(ENTRIES[0]), model_row(ENTRIES[0], status=status, note="no torchao")]
    text = "\n".join(shown(tables.models(rows)))
    assert "100.0" in text and "1e-03" in text and f"{status}: no torchao" in text


def test_a_peak_rate_below_what_is_measured_is_none():
    row = model_row(ENTRIES[0])
    text = "\n".join(shown(tables.models([row])))
    assert "of peak rate" in text and "50%" in text
    over = replace(row, fraction_of_peak_rate=1.25)
    text = "\n".join(shown(tables.models([over])))
    assert "peak rate too low" in text and "125%" not in text


def test_a_cpus_rows_have_neither_memory_nor_a_peak_rate():
    row = replace(model_row(ENTRIES[0]), fraction_of_peak_rate=None, peak_memory_gb=None)
    text = "\n".join(shown(tables.models([row])))
    assert "GB" not in text and "peak rate" not in text and "1e-03" in text
