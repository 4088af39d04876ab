"""The race on a CPU: what it measures, its file, its table and its plot."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks.cpu_race import __main__ as command
from benchmarks.cpu_race import contenders, figures, machine, operators, turns
from benchmarks.cpu_race.machine import Load, Watch
from benchmarks.report import __main__ as report
from benchmarks.report import race as race_report
from benchmarks.report.predicted import predicted_table
from benchmarks.report.readme import BEGIN, END

MACHINE = {"cpu": "Imaginary <1>", "cores": 2, "isa": "AVX9"}


def turn(*times):
    return {"times": list(times), "cpu_ms": 2 * sum(times) / len(times), "faults": 3.0}


def row(contender, *times, baseline=(10.0, 20.0)):
    turns_of = [[turn(t) for t in ts] for ts in (times, baseline)]
    return figures.measured_row(contender, 1e-6, *turns_of, batch=4)


def cell(**changes):
    rows = [
        row("eager", 10.0, 20.0), row("ours", 5.0, 8.0), row("compile", 5.1, 8.1),
        figures.row_without_figures("openvino", "unavailable", "no module | here"),
    ]  # fmt: skip
    return {
        "network": "DeiT-Ti distilled", "timm_name": "t", "batch": 4, "threads": 2, "rounds": 2,
        "turn_s": 0.1, "date": "2026-01-02", "commit": "a" * 40, "build": "b" * 12,
        "versions": {"torch": "2.14.1", "onnx": None}, "load_average": 0.1, "other_percent": 0.5,
        "steal_percent": 0.0, "rows": rows,
    } | changes  # fmt: skip


def test_ratios_are_taken_within_a_round():
    made = row("ours", 5.0, 20.0)
    assert made["ratio_median"] == pytest.approx((10 / 5 + 20 / 20) / 2)
    assert made["ms_median"] == 12.5 and made["images_per_s"] == pytest.approx(4e3 / 12.5)
    assert (made["ratio_p20"], made["ratio_p80"]) == pytest.approx((1.2, 1.8))
    assert made["cpu_ms"] == 25.0 and made["faults"] == 3.0


def test_a_turn_is_the_median_of_its_calls():
    made = figures.measured_row("ours", 0.0, [turn(1.0, 2.0, 90.0)], [turn(4.0)], batch=1)
    assert made["ms_median"] == 2.0 and made["ratio_median"] == 2.0


def test_a_cell_takes_the_place_of_the_same(tmp_path):
    path = tmp_path / "cpu-x" / "race.json"
    for changes in ({}, {"batch": 8}, {"rounds": 7}):
        figures.put(path, MACHINE, cell(**changes))
    cells = figures.load(path)["cells"]
    assert [(c["batch"], c["rounds"]) for c in cells] == [(8, 2), (4, 7)]
    assert [p.name for p in path.parent.iterdir()] == ["race.json"]


def test_another_machine_is_refused(tmp_path):
    path = tmp_path / "race.json"
    figures.put(path, MACHINE, cell())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="holds figures of.*Imaginary.*this is.*Other"):
        figures.put(path, MACHINE | {"cpu": "Other"}, cell())
    assert path.read_bytes() == before


NO_TIME = row("ours", 5.0, 8.0) | {"ms_p20": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object with machine and cells"),
        (json.dumps({"machine": MACHINE, "cells": [cell(batch="8")]}), r"cells\[0\].batch is '8'"),
        (json.dumps({"machine": MACHINE, "cells": None}), "cells is None, expected a list"),
        (json.dumps({"machine": MACHINE, "cells": [cell(rows=[{}])]}), r"rows\[0\] has other"),
        (json.dumps({"machine": MACHINE, "cells": [cell(rows=[3])]}), r"rows\[0\] has other"),
        (json.dumps({"machine": MACHINE, "cells": [cell(rows=[NO_TIME])]}), r"\.ms_p20 is None"),
    ],
)
def test_a_damaged_file_is_left_as_it_is(tmp_path, text, message):
    path = tmp_path / "race.json"
    path.write_text(text)
    with pytest.raises(figures.CorruptRace, match=message):
        figures.put(path, MACHINE, cell())
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "huge"], "models: 'huge', expected some of tiny, small, base"),
        (["--contenders", "ours,ours"], "each once"),
        (["--batches", "1,0"], "'1,0', expected whole numbers from 1"),
        (["--rounds", "1"], "--rounds 1: expected 2 or more"),
        (["--threads", "10000"], "--threads 10000: expected 1 to"),
        (["--minutes", "0"], "--minutes 0.0: expected more than 0"),
    ],
)
def test_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_results_of_another_machine_are_refused_before_anything_runs(tmp_path, capsys):
    path = tmp_path / "race.json"
    figures.put(path, MACHINE, cell())
    with pytest.raises(SystemExit):
        command.main(["--out", str(path)])
    assert "holds figures of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"logits": [1.0, 2.00001]}, {"error": pytest.approx(5e-6)}),
        ({"logits": [1.0, 2.1]}, {"failed": "relative error 5.0e-02, expected at most 1e-04"}),
        ({"logits": [1.0, float("nan")]}, {"failed": "relative error nan, expected at most 1e-04"}),
        ({"logits": [1.0]}, {"failed": "1 logits, expected 2"}),
        ({"unavailable": "why"}, {"unavailable": "why"}),
    ],
)
def test_logits_are_checked_first(answer, expected):
    checked = turns._checked(answer, {"logits": [1.0, 2.0]})
    assert {k: v for k, v in checked.items() if k != "logits"} == expected


def test_what_others_take_is_told(monkeypatch):
    ticks = iter([(1000, 500, 0), (2000, 1400, 30)])  # in all, busy, steal
    own = iter([100, 300])
    monkeypatch.setattr(machine, "_machine", lambda: next(ticks))
    monkeypatch.setattr(machine, "_own", lambda pids: next(own))
    load = Watch([1]).read()
    assert load.other_percent == pytest.approx(70.0) and load.steal_percent == pytest.approx(3.0)
    assert "other processes took 70%" in load.warning and "3.0% (steal)" in load.warning
    assert Load(0.1, 1.0, 0.0).warning is None


IN_README = (
    "Measured on a CPU (Imaginary <1>, 2 cores, AVX9, 2026-01-02), fp32: images/s in multiples of "
    "timm's eager model. No Triton kernel runs on a CPU, so this says nothing about a GPU. "
    "Spreads, times, versions: [DeiT on a CPU](docs/results/cpu.md).\n\n"
    "| network | batch | compile | compile, frozen | ONNX Runtime | OpenVINO | ours "
    "| ours, compile | ours, engine |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|\n"
    "| DeiT-Ti distilled | 4 | **2.21** | – | – | – | **2.25** | – | – |"
)


@pytest.fixture
def manual(tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{predicted_table()}\n\n{IN_README}\n{END}\n")
    page = tmp_path / "docs" / "results" / "cpu.md"
    page.parent.mkdir(parents=True)
    page.write_text(f"before\n{race_report.BEGIN}\nold\n{race_report.END}\nafter\n")
    figures.put(tmp_path / "results" / "cpu-x" / "race.json", MACHINE, cell())
    return page


def test_the_report_renews_the_page_and_the_plot(tmp_path, manual, capsys):
    arguments = ["--results", str(tmp_path / "results"), "--readme", str(tmp_path / "README.md")]
    races = race_report.read_races(tmp_path / "results")
    stale = race_report.renewed(tmp_path, tmp_path / "results")
    assert report.main([*arguments, "--check"]) == 1
    assert str(manual) in capsys.readouterr().out
    for path, (_, new) in stale.items():
        report.write(path, new.encode())
    assert report.main([*arguments, "--check"]) == 0
    text = manual.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| ours | 6.5 | 5.6 to 7.4 | 615.4 | **2.25** | 2.10 to 2.40 |" in text
    assert "| timm, torch.compile | 6.6 | 5.7 to 7.5 | 606.1 | **2.21** |" in text  # within 3%
    assert "| timm, eager | 15.0 | 12.0 to 18.0 | 266.7 | 1.00 |" in text
    assert "| OpenVINO | unavailable: no module \\| here |" in text
    assert "torch 2.14.1. Load average" in text and "Disturbed" not in text
    (root,) = ElementTree.fromstring(race_report.draw(races["cpu-x"])).iter(
        "{http://www.w3.org/2000/svg}svg"
    )
    assert len(root.findall("{http://www.w3.org/2000/svg}rect")) == 3


def test_a_disturbed_race_says_so():
    text = race_report.tables({"x": {"machine": MACHINE, "cells": [cell(other_percent=40.0)]}})
    assert "**Disturbed: other processes took 40% of the CPU time.**" in text
    cells = [cell(other_percent=40.0), cell(date="2026-01-05")]
    text = race_report.readme_table({"x": {"machine": MACHINE, "cells": cells}})
    assert "| 4, disturbed |" in text and "2026-01-02 to 2026-01-05" in text


def test_without_a_race_the_page_says_so(tmp_path):
    assert race_report.tables({}) == race_report.NOTHING and race_report.readme_table({}) == ""
    assert race_report.renewed(tmp_path, tmp_path) == {}


def test_the_other_tables_do_not_read_the_race(tmp_path, manual):
    assert report.read_chips(tmp_path / "results") == []


PROGRAM = """
import json, sys
name = sys.argv[1]
if name == "broken": raise SystemExit(3)
print(json.dumps({"logits": [1.0, float("nan") if name == "wrong" else 2.0]}), flush=True)
for i, line in enumerate(sys.stdin):
    if name == "dies" and i == 1: raise SystemExit(4)
    print(json.dumps({"times": [2.0], "cpu_ms": 2.0, "faults": 0.0}), flush=True)
"""


@pytest.fixture
def race(monkeypatch):
    """contenders, the first as the baseline -> the outcome of four rounds of PROGRAM."""
    real = subprocess.Popen

    def run(*names):
        monkeypatch.setattr(turns, "BASELINE", names[0])
        monkeypatch.setattr(
            turns.subprocess, "Popen",
            lambda c, **options: real([sys.executable, "-c", PROGRAM, c[3]], **options),
        )  # fmt: skip
        return turns.run(list(names), "t", 1, 1, rounds=4, turn=0.0, seconds=60.0)

    return run


def test_a_contender_that_ends_leaves_the_others(race):
    outcome = race("eager", "dies", "broken", "ours")
    assert outcome.rounds == 4
    assert [(r["status"], r["note"]) for r in outcome.rows] == [
        ("measured", None), ("failed", "ended with 4"), ("failed", "ended with 3"),
        ("measured", None),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["dies", "broken", "wrong"])
def test_without_a_baseline_there_is_no_race(race, name):
    with pytest.raises(RuntimeError, match=f"{name}: .*, expected it to run"):
        race(name, "ours")


def test_the_longest_operators_come_first():
    times = {f"op {i}": (2.0, float(i)) for i in range(12)}
    lines = list(operators.table("ours", times))
    assert len(lines) == operators.SHOWN + 2
    assert lines[0] == "| ours | op 11 | 2 | 11.00 |"
    assert lines[-2:] == ["| ours | 4 others | 8 | 6.00 |", "| ours | **sum** | | **66.0** |"]


def test_operators_of_a_small_network(capsys):
    threads = torch.get_num_threads()
    images = np.zeros((16, 3, 32, 32), np.float32)
    for contender, name in (("eager", "aten::addmm"), ("ours", "mkldnn::_linear_pointwise")):
        times = operators.of_pytorch(contender, contenders.SMOKE[1], images, threads)
        calls, ms = times[name]
        assert calls >= 1 and 0 < ms < sum(ms for _, ms in times.values())
    chosen = ["--contenders", "eager", "ours", "--threads", str(threads)]
    operators.main(["--models", "smoke", "--batch", "2", *chosen])
    text = capsys.readouterr().out
    assert text.startswith(f"{contenders.SMOKE[0]}, batch 2, {threads} threads\n")
    assert text.count("**sum**") == 2


@pytest.mark.slow
def test_smoke(tmp_path, monkeypatch, capsys):
    (tmp_path / "openvino.py").write_text("raise ImportError('no openvino here')")
    (tmp_path / "onnxruntime.py").write_text("raise RuntimeError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "race.json"
    arguments = "--models smoke --batches 2 --rounds 2 --turn 0.01 --threads 1 --contenders"
    names = "ours,openvino,onnxruntime"
    assert command.main([*arguments.split(), names, "--out", str(path)]) == 0
    (made,) = figures.load(path)["cells"]
    rows = {r["contender"]: r for r in made["rows"]}
    assert [r["status"] for r in made["rows"]] == [
        "measured", "failed", "unavailable", "measured"
    ]  # fmt: skip
    assert rows["openvino"]["note"] == "no openvino here"
    assert rows["onnxruntime"]["note"] == "RuntimeError: broken"
    assert rows["eager"]["ratio_median"] == 1.0 and rows["eager"]["relative_error"] == 0.0
    assert 0 < rows["ours"]["relative_error"] < 1e-4 and rows["ours"]["ms_p20"] > 0
    assert made["timm_name"] == contenders.SMOKE[1] and made["rounds"] == 2
    assert "unavailable: no openvino here" in capsys.readouterr().out
