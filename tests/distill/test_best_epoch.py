"""The epoch that a run ends with: by which metric, when it stops early, and what a kill leaves."""

import csv
import json

import pytest
import torch
from small_runs import RECIPE, Stop, options_of, run, same, settings, start
from tiers import slow

import deit_fast
from deit_fast.cli import main
from deit_fast.distill import best_epoch, checkpoints
from deit_fast.distill.recipe import load
from deit_fast.distill.run import Run
from deit_fast.distill.student import Settings
from deit_fast.distill.train import train

ROWS = [  # of a distilled model, whose second epoch was not evaluated
    {
        "epoch": epoch,
        "scores": {
            "top1": {"class": top1, "joint": joint}, "loss": loss, "balanced": {"class": balanced}
        },
    }
    for epoch, top1, joint, loss, balanced in [
        (1, 0, 9, 0.7, 5), (2, 0, 0, 0.9, 0), (3, 7, 9, 0.6, 6), (4, 99, 8, 0.8, 6),
    ]
]  # fmt: skip
del ROWS[1]["scores"]


@pytest.mark.parametrize("metric, epoch", [("top1", 1), ("loss", 3), ("balanced", 3), ("", 4)])
def test_the_first_of_the_best(metric, epoch):
    """Of a distilled model `joint` decides."""
    assert best_epoch.best_row(ROWS, metric)["epoch"] == epoch


def test_patience():
    ended = [best_epoch.has_ended(ROWS, "top1", patience) for patience in range(5)]
    assert ended == [False, True, True, True, False]  # 0: never; the best was 3 epochs ago
    assert not best_epoch.has_ended(ROWS[:2], "top1", 1)  # the second was not evaluated
    assert not best_epoch.has_ended([], "loss", 1)


def spoilt(monkeypatch, first, factor=0.0):
    """From that epoch on (from 0), its weights are worth nothing before they are evaluated."""
    end = Run._end_epoch

    def spoil(self, *args):
        if self.epoch >= first:
            for model in self.learner.models:
                model.head.weight.data *= factor
                model.head_dist.weight.data *= factor
        return end(self, *args)

    monkeypatch.setattr(Run, "_end_epoch", spoil)


@pytest.mark.parametrize("metric", ["loss", slow("top1"), slow("balanced")])
def test_a_run_ends_with_its_best_epoch(metric, data, tmp_path, monkeypatch):
    """Whose weights, scores and averages are those; and it stops as soon as its patience ends."""
    events, weights = [], {}

    def report(event):
        events.append(event)
        if event["event"] == "epoch":
            state = checkpoints.load(tmp_path / "checkpoint.pt")
            weights[event["epoch"]] = state["model"], state["ema"]
            assert len(list(tmp_path.glob("best-*.pt"))) == 1

    spoilt(monkeypatch, 2)
    options = {"best": metric, "patience": 2, "recipe_of": {"epochs": 9}}
    state = run(data, tmp_path, report=report, **options)
    scores = [row["scores"] for row in state["rows"]]
    values = [best_epoch.score(row, metric) for row in scores]
    best = values.index(max(values)) + 1
    assert best <= 2 and len(scores) == best + 2
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["epoch"] == best and result["top1"] == scores[best - 1]["top1"]
    assert (result["best"], result["epochs"], result["stopped_early"]) == (metric, best + 2, True)
    assert result["ema"] == state["rows"][best - 1]["ema"]
    for folder, expected in zip(("model", "model-ema"), weights[best], strict=True):
        model = deit_fast.from_pretrained(tmp_path / folder)
        assert same(model.state_dict(), expected)
    assert not same(weights[best][0], state["model"])
    text = events[-1]["text"]
    assert text == f"stops early: no epoch after {best} has a better {metric}"
    before = {path.name: path.read_bytes() for path in tmp_path.glob("model/*")}
    assert same(run(data, tmp_path, **options), state)  # again: nothing is trained, all is there
    assert {path.name: path.read_bytes() for path in tmp_path.glob("model/*")} == before


def test_without_a_metric_nothing_changes(whole_run):
    result = json.loads((whole_run[0] / "result.json").read_text())
    assert not result.keys() & {"best", "epochs", "stopped_early"}
    identity = whole_run[1]["identity"]
    assert not identity["settings"].keys() & {"best", "patience", "lora"}
    assert not identity["recipe"].keys() & {"freeze", "balance"}


def test_metrics_are_in_the_log(whole_run):
    rows = list(csv.DictReader(open(whole_run[0] / "log.csv")))
    last = whole_run[1]["rows"][-1]
    for prefix, scores in (("", last["scores"]), ("ema/", last["ema"])):
        assert float(rows[-1][f"{prefix}val_loss"]) == scores["loss"] > 0
        assert float(rows[-1][f"{prefix}balanced/joint"]) == scores["balanced"]["joint"]


def test_killed_between_the_weights_and_their_checkpoint(data, tmp_path, monkeypatch):
    """The best weights of before are still there; afterwards, nothing too much is."""
    whole = run(data, tmp_path / "whole", best="loss", recipe_of={"epochs": 3})
    save = checkpoints.save

    def killed(path, state):
        if path.name == "checkpoint.pt" and state["epoch"] == 2:
            raise Stop
        save(path, state)

    monkeypatch.setattr(checkpoints, "save", killed)
    out = tmp_path / "out"
    with pytest.raises(Stop):
        run(data, out, best="loss", recipe_of={"epochs": 3})
    monkeypatch.undo()
    assert checkpoints.load(out / "checkpoint.pt")["update"] == 3
    assert sorted(p.name for p in out.glob("best-*")) == ["best-1.pt", "best-2.pt"]
    assert same(run(data, out, best="loss", recipe_of={"epochs": 3}), whole)
    for name in ("best-3.pt", "model/model.safetensors", "model-ema/model.safetensors"):
        files = [folder / name for folder in (out, tmp_path / "whole")]
        if name == "best-3.pt":
            assert same(*map(checkpoints.load, files))
        else:
            assert files[0].read_bytes() == files[1].read_bytes()
    assert [p.name for p in out.glob("best-*")] == ["best-3.pt"]


def test_a_full_disk_while_the_best_weights_are_written(data, tmp_path, monkeypatch):
    save = checkpoints.write_atomically

    def full(path, write):
        def fail(file):
            write(file)
            raise OSError(28, "No space left on device")

        save(path, fail if path.name == "best-2.pt" else write)

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    with pytest.raises(OSError, match="best-2.pt cannot be written .*No space"):
        run(data, tmp_path / "out", best="loss")
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "out").glob("best-*")) == ["best-1.pt"]
    state = checkpoints.load(tmp_path / "out" / "checkpoint.pt")
    assert (state["epoch"], state["update"]) == (1, 3)  # it is evaluated again, not trained
    assert same(run(data, tmp_path / "out", best="loss"), run(data, tmp_path / "w", best="loss"))


def test_lost_weights_are_an_error(data, tmp_path):
    start(data, tmp_path, 2, 1, best="top1")
    (path,) = tmp_path.glob("best-*.pt")
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match=f"out: .*{path.name} is not there, expected the best wei"):
        run(data, tmp_path, best="top1")
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match=f"checkpoint .*{path.name}: is damaged"):
        run(data, tmp_path, best="top1", patience=0)
    run(data, tmp_path, restart=True, recipe_of={"epochs": 1})
    assert not list(tmp_path.glob("best-*.pt"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"best": "top5"}, "best: 'top5', expected '' or one of top1, loss, balanced"),
        ({"patience": 3}, r"patience: 3 with no metric, expected one as best: top1, .*\(--best\)"),
        ({"best": "loss", "patience": -1}, "patience: -1, expected 0 or more"),
    ],
)
def test_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Settings("data", "deit_tiny", **options)


def test_evaluated_now_and_then(data, tmp_path, monkeypatch):
    """Epochs count, not evaluations; what was not evaluated cannot be the best."""
    spoilt(monkeypatch, 2)
    chosen = load("deit", **RECIPE | {"epochs": 9})
    result = train(settings(data, best="loss", patience=3), chosen, tmp_path, eval_every=2)
    assert (result["epoch"], result["epochs"], result["stopped_early"]) == (2, 6, True)
    assert torch.load(tmp_path / "best-2.pt").keys() == {"model", "ema", "format"}


def test_the_command_says_which_epoch(data, tmp_path, monkeypatch, capsys):
    spoilt(monkeypatch, 1)
    command = ["train", str(data), "--out", str(tmp_path), "--workers", "0"]
    command += options_of(epochs=5, patience=2, best="loss", model="deit_tiny_distilled")
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path}: epoch 1 of 3, stopped early, best loss: top-1 cla")
    assert "stops early: no epoch after 1 has a better loss" in printed.err
