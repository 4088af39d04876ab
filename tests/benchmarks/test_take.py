"""Taking a lease's folder into the results: figures made up, in temporary folders only."""

import json
from dataclasses import asdict, replace

import pytest
import selection
import torch
from made_up_results import HARDWARE, PEAK_RATES, kernel_row, model_row

from benchmarks import take
from benchmarks.lease import context, figures
from benchmarks.predict import chips
from benchmarks.table5 import select
from deit_fast.bench import results
from deit_fast.kernels import _tuned
from deit_fast.kernels.linear.configs import HOPPER_CONFIGS

H100 = chips.H100.chip
RUN, AGAIN = "2026-11-27T01:00:00Z", "2026-11-28T02:00:00Z"
COMMIT, BUILD = "c" * 40, "d" * 12
B, S = (select([f"DeiT-{name} distilled"])[0] for name in "BS")
OURS = "deit_fast_engine_bf16"
README = "before\n<!-- results: begin -->\n<!-- results: end -->\nafter\n"


def figure(entry, mode=OURS, images_per_s=14_000.0, **changes):
    """Of a model, at batch 256."""
    made = {"tflops": 300.0, "commit": COMMIT, "build": BUILD, "run": RUN} | changes
    batch = made.pop("batch", 256)
    row = model_row(entry, mode, images_per_s, batch=batch, asked_batch=batch)
    return replace(row, **made)


def kernel(ms=0.1, **changes):
    made = {
        "network": "B",
        "case": "fc2",
        "batch": 256,
        "commit": COMMIT,
        "run": RUN,
        "build": BUILD,
    }
    made |= {"fraction_of_peak_rate": 0.7, "relative_error": 2e-3}
    return replace(kernel_row("linear", ms=ms), **made | changes)


@pytest.fixture
def lease(tmp_path):
    """Makes a folder as benchmarks.lease leaves it."""

    def make(*rows, header=None, choices=True, more=(), run=RUN):
        folder = tmp_path / "lease"
        folder.mkdir(exist_ok=True)
        kernels = results.kernel_digest()
        made = {
            "version": 1, "hardware": HARDWARE | {"gpu": H100.name},
            "chip": {"name": H100.name, "capability": [9, 0], "num_sms": 132},
            "slug": "h100-80gb-hbm3", "commit": COMMIT, "sources": "s", "kernels": kernels,
            "started": run, "runs": [], "finished": True,
        } | (header or {})  # fmt: skip
        (folder / "lease.json").write_text(json.dumps(made))
        ctx = context.Context(
            torch.device("cpu"), folder, False, 0.0, "throughput", run, made["kernels"], {}, folder
        )
        for name, value in PEAK_RATES.items():
            ctx.write("peak_rate", name=name, value=value)
        for row in rows:
            ctx.write("kernel" if hasattr(row, "op") else "model", **asdict(row))
        for kind, values in more:
            ctx.write(kind, **values)
        if choices:
            shape = {"M": 50688, "K": 768, "N": 768, "dtype": "bfloat16", "epilogue": "bias"}
            row = {"op": "linear", "shape": shape, "ms": 0.1, "others": {}}
            row["choice"] = {"implementation": "triton", **HOPPER_CONFIGS[3]}
            fold = {"op": "layer_norm_linear", "choice": {"implementation": "separate"}}
            fold |= {"shape": {"M": 50688, "K": 768, "N": 2304, "dtype": "bfloat16"}}
            head = {"gpu": H100.name, "capability": [9, 0], "torch": "1", "triton": "2"}
            choices = [row, fold | {"ms": 0.2, "others": {}}]
            table = head | {"date": run[:10], "choices": choices}
            (folder / "tuned.json").write_text(json.dumps(table))
        return folder

    return make


@pytest.fixture
def places(tmp_path):
    """Where results go, and the options that say so."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "README.md").write_text(README)
    (home / "LOG.md").write_text("# Log\n")
    options = {name: home / name for name in ("results", "tuned")}
    options |= {"readme": home / "README.md", "log": home / "LOG.md"}
    return home, [str(item) for k, v in options.items() for item in (f"--{k}", v)]


@pytest.fixture
def plots():
    selection.extra("bench", "matplotlib")


def writes_plots(test):
    return pytest.mark.slow(pytest.mark.usefixtures("plots")(test))


def everything(home):
    return {path: path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}


@writes_plots
def test_a_folder_is_taken(lease, places, capsys):
    home, options = places
    folder = lease(
        figure(B), figure(B, "eager_bf16", 9_000.0), figure(B, "deit_fast_bf16", 13_000.0),
        figure(S, "deit_fast_amp_bf16_train"),
        figure(S, protocol="latency", batch=1, images_per_s=1e3),
        figure(select(["TinyViT-21M"])[0]), kernel(), kernel(mode="eager"),
    )  # fmt: skip
    assert take.main([str(folder), *options]) == 0
    said = capsys.readouterr().out
    chip = home / "results" / "h100-80gb-hbm3"
    files = {path.stem: results.load(path) for path in chip.glob("*.json")}
    counts = {name: len(file.rows) for name, file in files.items()}
    assert counts == {
        "peak_rates": 0, "table5": 3, "train": 1, "latency": 1, "relatives": 1, "kernels": 2,
    }  # fmt: skip
    for file in files.values():
        assert file.hardware["gpu"] == H100.name and file.peak_rates == PEAK_RATES
        assert (file.commit, file.date) == (COMMIT, RUN[:10])
    table = json.loads((home / "tuned" / "h100-80gb-hbm3.json").read_text())
    assert len(_tuned.read(home / "tuned" / "h100-80gb-hbm3.json", H100)) == 2
    assert table["date"] == RUN[:10] and table["torch"] == "1"
    assert "DeiT-B" in (home / "README.md").read_text() and (chip / "report.html").exists()
    log = (home / "LOG.md").read_text()
    assert log.startswith("# Log\n\n- 2026-11-27, NVIDIA H100 80GB HBM3, cccccccccccc: peak rate")
    (line,) = [of for of in log.splitlines() if f"DeiT-B distilled, {OURS}, batch 256" in of]
    predicted, ratio = 16_000, float(line.rpartition(" ")[2])
    assert 0.9 * predicted < 14_000 / ratio < 1.1 * predicted, line
    (line,) = [of for of in log.splitlines() if "linear B fc2 batch 256" in of]
    assert "ms, measured 0.1, ratio 0." in line
    assert any("eager_bf16, batch 256: predicted - images/s" in of for of in log.splitlines())
    shown = [of for of in said.splitlines() if of.startswith("  ")]
    assert "linear B fc2" in shown[0] and len(shown) == 4  # the two peak rates are known as well
    assert said.splitlines()[-1].startswith("h100-80gb-hbm3: 6 model rows and 2 kernel rows taken")


@writes_plots
def test_taking_twice_changes_nothing(lease, places, monkeypatch):
    """Not even what the table, once it is there, would choose changes a prediction."""
    home, options = places
    monkeypatch.setattr(_tuned, "SHIPPED", home / "tuned")
    _tuned.forget()
    folder = lease(figure(B), kernel())
    take.main([str(folder), *options])
    _tuned.forget()
    figures._cache.clear()
    before = everything(home)
    assert take.main([str(folder), *options]) == 0 and everything(home) == before
    _tuned.forget()


@writes_plots
def test_a_resumed_folder_adds_what_is_new(lease, places):
    """Its last figure of a key counts; earlier lines of the log stay."""
    home, options = places
    take.main([str(lease(figure(B), figure(S))), *options])
    log = (home / "LOG.md").read_text()
    folder = lease(figure(B, images_per_s=15_000.0, run=AGAIN), run=AGAIN, choices=False)
    assert take.main([str(folder), *options]) == 0
    file = results.load(home / "results" / "h100-80gb-hbm3" / "table5.json")
    assert [row.images_per_s for row in file.rows] == [15_000.0, 14_000.0]
    after = (home / "LOG.md").read_text()
    added = [line for line in after.splitlines() if line and line not in log.splitlines()]
    assert after.startswith(log.rstrip("\n")) and all("2026-11-28" in line for line in added)
    assert len(added) == len(PEAK_RATES) + 1


def test_nothing_is_written_to_see_what_would_be(lease, places, capsys):
    home, options = places
    before = everything(home)
    assert take.main([str(lease(figure(B))), "--dry-run", *options]) == 0
    assert everything(home) == before and "1 model rows" in capsys.readouterr().out


def fails_smoke(**changes):
    row = {
        "family": "attention", "op": "attention", "network": "B", "case": "", "batch": 32,
        "dtype": "bf16", "backward": False, "error": 1.0, "pytorch_error": 1e-3,
        "status": "failed", "note": "relative error 1.0", "lost": False,
    }  # fmt: skip
    return ("smoke", row | changes)


@writes_plots
@pytest.mark.parametrize(
    "row, more, why",
    [
        (figure(S, tflops=900.0), (), "1.15 of the measured peak rate"),
        (figure(S, relative_error=0.5), (), "a relative error of 0.5"),
        (figure(S, ms_p80=-1.0), (), "times of"),
        (figure(S, images_per_s=20_000.0, ms_median=1.0), (), "20000.0 images/s, 256000 by its"),
        (figure(S), (fails_smoke(),), "attention failed the smoke test, and no note says so"),
        (kernel(fraction_of_peak_rate=1.2), (), "1.20 of the measured peak rate"),
        (kernel(served_by="triton"), (fails_smoke(op="linear"),), "linear failed the smoke test"),
    ],
)
def test_what_can_not_be_is_left_out(lease, places, capsys, row, more, why):
    home, options = places
    folder = lease(figure(B, "eager_bf16"), row, more=more)
    assert take.main([str(folder), *options]) == 1
    (line,) = [of for of in capsys.readouterr().out.splitlines() if of.startswith("left out")]
    assert why in line
    rows = [r for path in (home / "results").rglob("*.json") for r in results.load(path).rows]
    assert [r.mode for r in rows] == ["eager_bf16"]


@writes_plots
def test_what_pytorch_served_is_taken(lease, places):
    note = "PyTorch serves attention, which failed the smoke test"
    folder = lease(figure(B, note=note), more=(fails_smoke(),))
    assert take.main([str(folder), *places[1]]) == 0


def damage_middle(folder):
    path = folder / context.ROWS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "no row at all", *lines[2:]]) + "\n")


def unknown_field(folder):
    row = {"kind": "model", "step": "x", "run": RUN, "kernels": results.kernel_digest()}
    context.append(folder / context.ROWS, row | asdict(figure(B)) | {"colour": "red"})


@pytest.mark.parametrize(
    "header, break_it, said",
    [
        ({"kernels": "0" * 12}, None, "measured with kernels 000000000000 of commit cccc"),
        ({"hardware": HARDWARE | {"gpu": None}}, None, "a rehearsal without a GPU"),
        ({"version": 2}, None, "lacks version 1"),
        ({}, damage_middle, "rows.jsonl: line 3 is not JSON"),
        ({}, unknown_field, "has unknown fields ['colour']"),
        ({}, lambda folder: (folder / "lease.json").unlink(), "no lease.json"),
        ({}, lambda folder: (folder / "lease.json").write_text("{"), "not JSON of a lease"),
        ({}, lambda folder: (folder / "rows.jsonl").write_text(""), "no peak rate bf16_tflops"),
        (
            {},
            lambda folder: (folder / "tuned.json").write_text("[]"),
            "tuned.json: expected an object",
        ),
    ],
)
def test_folders_that_are_not_taken(lease, places, capsys, header, break_it, said):
    """One line, and nothing is written."""
    home, options = places
    folder = lease(figure(B), header=header)
    if break_it:
        break_it(folder)
    before = everything(home)
    assert take.main([str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and everything(home) == before


@writes_plots
def test_half_a_line_is_named(lease, places, capsys):
    folder = lease(figure(B))
    with (folder / context.ROWS).open("a") as file:
        file.write('{"kind": "model", "st')
    assert take.main([str(folder), *places[1]]) == 1
    assert "left out: line 8: cut off" in capsys.readouterr().out


def test_only_ten_are_shown():
    found = [figures.Figure(RUN, COMMIT, str(i), "ms", 1.0, float(i)) for i in range(1, 15)]
    found += [
        figures.Figure(RUN, COMMIT, "less", "ms", 1.0, 0.01),
        figures.Figure("", "", "-", "", None, 1.0),
    ]
    shown = [figure.what for figure in figures.furthest(found)]
    assert shown == ["less", *map(str, range(14, 5, -1))]
