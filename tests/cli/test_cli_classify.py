"""deit-fast classify, as a user calls it."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from checking import SIXTH_DIGIT, assert_at_most, seed
from modelling import TINY
from PIL import Image

import deit_fast
from deit_fast import bulk
from deit_fast.cli import main

DATA = Path(deit_fast.__file__).parent / "data"
CAT = str(DATA / "cat.jpg")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    model = timm.create_model("deit_tiny_distilled_patch16_224")
    safetensors.torch.save_file(model.state_dict(), path)
    return str(path)


def classify(*args):
    return main(["classify", "--model", "deit_tiny_distilled", *args])


def test_classify_prints_what_timm_predicts(checkpoint, capsys):
    assert classify("--checkpoint", checkpoint, "--topk", "3", "--json", CAT) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    model = timm.create_model("deit_tiny_distilled_patch16_224").eval()
    model.load_state_dict(safetensors.torch.load_file(checkpoint))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        scores = model(transform(Image.open(CAT).convert("RGB"))[None]).softmax(-1)[0]
    top = scores.topk(3)
    assert [p["class"] for p in entry["predictions"]] == top.indices.tolist()
    scores = torch.tensor([p["score"] for p in entry["predictions"]])
    assert_at_most((scores - top.values).abs().max().item(), SIXTH_DIGIT, "scores")
    names = timm.data.ImageNetInfo()
    assert entry["predictions"][0]["label"] == names.index_to_description(top.indices[0].item())


def test_classify_reports_bad_files_and_goes_on(checkpoint, tmp_path, capsys):
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(Path(CAT).read_bytes()[:9000])
    text = tmp_path / "notes.md"
    text.write_text("no picture")
    Image.new("RGBA", (30, 20)).save(tmp_path / "alpha.png")
    files = [
        CAT,
        str(truncated),
        str(text),
        str(tmp_path / "absent.png"),
        str(tmp_path / "alpha.png"),
    ]
    assert classify("--checkpoint", checkpoint, "--json", *files) == 1
    entries = json.loads(capsys.readouterr().out)
    assert [e["image"] for e in entries] == files
    assert ["error" in e for e in entries] == [False, True, True, True, False]
    assert "truncated" in entries[1]["error"] and entries[3]["error"] == "no such file"

    assert classify("--checkpoint", checkpoint, *files[:3]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0] == CAT and len(captured.out.splitlines()) == 6
    assert "notes.md: cannot identify image file" in captured.err
    assert classify("--checkpoint", checkpoint, str(text)) == 1


def test_classify_more_images_than_a_batch(checkpoint, capsys):
    photos = sorted(map(str, DATA.glob("*.jpg")))
    options = ("--checkpoint", checkpoint, "--json", "--batch", "2")
    assert classify(*options, *photos, *photos[:1]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert len(entries) == 5 and entries[0]["predictions"] == entries[4]["predictions"]
    assert entries[0]["predictions"] != entries[1]["predictions"]


def many(folder, count):
    """A folder of photographs, small ones, and a few files that are none."""
    (folder / "more").mkdir(parents=True)
    for i, path in enumerate(sorted(DATA.glob("*.jpg"))):
        Image.open(path).resize((40 + i, 36)).save(folder / f"small{i}.png")
    for i in range(count):
        name = f"more/{i:04d}.png" if i % 3 else f"{i:04d}.png"
        if i % 100 == 7:
            (folder / name).write_bytes(b"none")
        else:
            os.link(folder / f"small{i % 4}.png", folder / name)
    return count + 4


BULK = ["--model", "deit_tiny_distilled", "--no-pretrained", "--img-size", "32", "--topk", "1"]


def test_classify_folder_and_its_own_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    total = many(tmp_path / "photos", 40)
    assert main(["classify", *BULK, "photos", "--out", "a.csv", "--workers", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"a.csv: {total} images, 1 of them unreadable" in captured.err
    assert re.search(r"44 images in \d+\.\d s, [\d.]+ images/s \(fp32 on cpu\)", captured.err)
    assert re.search(r"waiting for the decoder: \d+% of the time, 2 workers", captured.err)
    rows = list(csv.DictReader(open("a.csv", newline="")))
    assert main(["classify", *BULK, "photos", "--json", "--batch", "1"]) == 1
    entries = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in rows] == [e["image"] for e in entries] and len(rows) == total
    for row, entry in zip(rows, entries, strict=True):
        assert row["error"] == entry.get("error", "")
        if not row["error"]:
            (p,) = entry["predictions"]
            assert (row["class_1"], row["label_1"]) == (str(p["class"]), p["label"])
            apart = abs(float(row["score_1"]) - p["score"])
            assert_at_most(apart, SIXTH_DIGIT, "score")
    assert main(["classify", *BULK, "photos", "--out", "a.csv"]) == 2
    assert "a.csv exists" in capsys.readouterr().err
    assert main(["classify", *BULK, "photos", "--out", "f.npy", "--embed"]) == 0
    assert np.load("f.npy").shape == (43, 192)


@pytest.mark.slow
def test_killed_again_and_again_nothing_is_lost_or_doubled(tmp_path, monkeypatch, capsys):
    """SIGKILL, for real, at whatever moment it comes. The state is written behind every batch: a
    fast machine does all of it in seconds."""
    monkeypatch.chdir(tmp_path)
    total = many(tmp_path / "photos", 450)
    command = ["classify", *BULK, "photos"]
    assert main([*command, "--out", "whole.csv"]) == 0
    command += ["--batch", "8", "--workers", "1"]
    deit = "import sys; from deit_fast import cli, outputs; outputs.EVERY = 0; sys.exit(cli.main())"
    state = tmp_path / "a.csv.partial/state.json"
    done = []
    for _ in range(2):
        wanted = done[-1] + 100 if done else 1
        run = subprocess.Popen(
            [sys.executable, "-c", deit, *command, "--out", "a.csv"],
            start_new_session=True, stderr=subprocess.PIPE,
        )  # fmt: skip
        while run.poll() is None and (not state.exists() or done_in(state) < wanted):
            time.sleep(0.02)
        assert run.poll() is None, "the run was over before it could be killed"
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        done.append(done_in(state))
        assert not (tmp_path / "a.csv").exists()
    assert 0 < done[0] < done[1] < total
    assert main([*command, "--out", "a.csv"]) == 0
    assert f"resumed: {done[1]} of {total} images are done" in capsys.readouterr().err
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not state.parent.exists()


def done_in(state):
    return json.loads(state.read_text())["done"]


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    many(tmp_path / "photos", 30)
    real, calls = bulk.Predictor.__call__, []

    def interrupted(self, pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(bulk.Predictor, "__call__", interrupted)
    command = ["classify", *BULK, "photos", "--out", "a.jsonl", "--batch", "8"]
    assert main(command) == 130
    assert "interrupted after 16 of 34 images" in capsys.readouterr().err
    assert main(command) == 0
    assert "resumed: 16 of 34 images are done" in capsys.readouterr().err
    rows = [json.loads(line)["image"] for line in open("a.jsonl")]
    assert len(set(rows)) == len(rows) == 34


def test_odd_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.link(many_one(tmp_path), b"\xff.png")
    assert main(["classify", *BULK, ".", "--batch", "1"]) == 0
    assert "./\\udcff.png" in capsys.readouterr().out
    assert main(["classify", *BULK, ".", "--out", "o[b].csv"]) == 0
    assert "o[b].csv: 2 images" in capsys.readouterr().err


def many_one(folder):
    Image.open(CAT).resize((40, 36)).save(folder / "one.png")
    return folder / "one.png"


def test_a_folder_is_a_model(tmp_path, capsys):
    seed(3)
    model = deit_fast.deit_tiny_distilled(heads="distill", **TINY).eval()
    deit_fast.save_pretrained(model, tmp_path / "model")
    assert main(["classify", "--model", str(tmp_path / "model"), "--json", CAT]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    predictor = bulk.Predictor(model, 1)
    expected = predictor(predictor.decoder(CAT)[None])
    assert [p["class"] for p in entry["predictions"]] == expected["classes"][0].tolist()
    assert [p["label"] for p in entry["predictions"]][0] == f"class {expected['classes'][0][0]}"
    assert main(["classify", "--model", str(tmp_path / "model"), "--pretrained", CAT]) == 2
    assert "a folder with weights of its own" in capsys.readouterr().err


def test_another_model_does_not_continue(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    many(tmp_path / "photos", 6)
    monkeypatch.setattr(bulk.Predictor, "__call__", lambda *_: exec("raise KeyboardInterrupt"))
    command = ["classify", *BULK, "photos", "--out", "a.csv"]
    assert main(command) == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--heads", "distill"]) == 2
    assert "heads 'joint', this one has 'distill'" in capsys.readouterr().err
    assert main([*command, "--heads", "distill", "--restart"]) == 0


@pytest.mark.slow
def test_heads_and_other_models(checkpoint, tmp_path, capsys):
    scores = {}
    for heads in ("joint", "joint_softmax", "class", "distill"):
        assert classify("--checkpoint", checkpoint, "--heads", heads, "--json", CAT) == 0
        top = json.loads(capsys.readouterr().out)[0]["predictions"]
        scores[heads] = top[0]["score"]
        assert 0 < sum(p["score"] for p in top) <= 1
    assert len(set(scores.values())) == 4
    assert main(["classify", "--model", "vit_tiny_patch16_224", "--no-pretrained", CAT]) == 0
    assert "random weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["--topk", "0", CAT], "--topk: 0, expected 1 or more"),
        (["--checkpoint", "absent.pth", CAT], "checkpoint: no file absent.pth"),
        (["--checkpoint", CAT, CAT], "cat.jpg is no checkpoint"),
        (["--pretrained", "--checkpoint", "x.pth", CAT], "expected one of them, got both"),
        (["--model", "deit_huge", CAT], "Unknown model"),
        (["--batch", "0", CAT], "--batch: 0, expected 1 or more"),
        (["--workers", "-1", CAT], "--workers: -1, expected 0 or more"),
        (["--embed", CAT], "--embed: expected --out FILE"),
        (["--json", "--out", "x.jsonl", CAT], "--json: goes to standard output"),
        (["--out", "x.txt", CAT], "--out x.txt: classes are written as .csv, .jsonl, .parquet"),
        (["--out", "absent/x.csv", CAT], "there is no folder absent"),
        (["nowhere"], "no image, folder, pattern or list nowhere"),
        (["*.none"], "no images found in *.none"),
        (["--model", "deit_tiny", "--no-pretrained", "--heads", "distill", CAT], "has one head"),
    ],
)
def test_wrong_calls_get_one_line_and_exit_code_2(args, message, capsys):
    assert classify(*args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1] and lines[-1].startswith("deit-fast classify: ")
