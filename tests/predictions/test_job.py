"""A job: no interruption loses or doubles a prediction."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import prediction_jobs
import pytest
from prediction_jobs import LABELS, PATHS, batches, job, run, whole

from deit_fast.batch_inference import Batch
from deit_fast.predictions import Job
from deit_fast.predictions import job as job_module


def state_of(folder):
    return {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("embed, name", [(False, "a.csv"), (False, "a.jsonl"), (True, "a.npy")])
@pytest.mark.parametrize("every", [0.0, 1e9])
def test_resumed_runs_equal_one_that_was_not_interrupted(tmp_path, monkeypatch, embed, name, every):
    """Stopped after every number of batches, with the last state of then, or with the first."""
    expected = whole(tmp_path / "whole", name, embed)
    monkeypatch.setattr(job_module, "SAVE_INTERVAL", every)
    for stop in range(6):
        out = tmp_path / f"{stop}" / name
        out.parent.mkdir()
        run(out, embed, stop)
        assert not out.exists()
        one = run(out, embed)
        assert one.resumed
        for made in expected.parent.iterdir():
            assert (out.parent / made.name).read_bytes() == made.read_bytes(), stop
        assert len(list(out.parent.iterdir())) == len(list(expected.parent.iterdir()))


def test_interrupted_again_and_again(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "SAVE_INTERVAL", 0.0)
    expected, out = whole(tmp_path / "whole", "a.csv"), tmp_path / "a.csv"
    done = []
    for _ in range(5):
        done.append(run(out, stop=1).state["done"])
        with open(tmp_path / "a.csv.partial/rows.jsonl", "ab") as file:
            file.write(b'{"image": "torn')
    assert done == [4, 8, 12, 16, 20]
    run(out)
    assert out.read_bytes() == expected.read_bytes()


def test_resuming_keeps_the_images_that_were_found(tmp_path):
    run(tmp_path / "a.csv", stop=2)
    one = job(tmp_path / "a.csv")
    one.begin(iter(["another.jpg"]))
    assert (one.state["total"], list(one.todo())) == (23, PATHS[one.state["done"] :])


def test_a_run_killed_while_it_looked_for_images_begins_anew(tmp_path):
    one = job(tmp_path / "a.csv")
    (one.folder / "files.jsonl").write_text('"photos/0.jpg"\n"pho')
    one._unlock()
    one = run(tmp_path / "a.csv")
    assert not one.resumed and one.state["done"] == 23


def ruin(name, change):
    def apply(folder):
        path = folder / name
        text = path.read_text()
        path.write_text(change(text)) if change else path.unlink()

    return apply


def edited(**changes):
    return ruin("state.json", lambda text: json.dumps(json.loads(text) | changes))


@pytest.mark.parametrize(
    "harm, message",
    [
        (ruin("state.json", lambda t: t[:20]), "state.json can't be read"),
        (ruin("state.json", lambda t: "[]"), "state.json can't be read"),
        (ruin("state.json", lambda t: ""), "state.json can't be read"),
        (edited(done=None), "state.json can't be read"),
        (edited(done=-1), "state.json can't be read"),
        (edited(done=24), "state.json can't be read"),
        (edited(failed=13), "state.json can't be read"),
        (edited(done=11), "do not belong together"),
        (edited(rows=100), "do not belong together"),
        (ruin("state.json", None), "state.json is missing"),
        (ruin("rows.jsonl", None), "rows.jsonl is missing"),
        (ruin("files.jsonl", None), "files.jsonl is missing"),
        (ruin("files.jsonl", lambda t: t[:30]), "files.jsonl ends after 2 images"),
        (ruin("files.jsonl", lambda t: t[: t.index('"photos/19')]), "ends after 19 images"),
        (ruin("files.jsonl", lambda t: t[:-1]), "files.jsonl ends after 23 images"),
        (ruin("rows.jsonl", lambda t: t[:50]), "rows.jsonl is shorter than state.json says"),
        (ruin("rows.jsonl", lambda t: t.replace("/11.jpg", "/12.jpg")), "belong together"),
        (ruin("files.jsonl", lambda t: t.replace("/11.jpg", "/12.jpg")), "belong together"),
    ],
)
def test_corrupt_leftovers_are_refused_and_kept(tmp_path, monkeypatch, harm, message):
    monkeypatch.setattr(job_module, "SAVE_INTERVAL", 0.0)
    out = tmp_path / "a.csv"
    run(out, stop=3)
    folder = tmp_path / "a.csv.partial"
    harm(folder)
    before = state_of(folder)
    with pytest.raises(ValueError, match=message) as error:
        job(out)
    assert "\n" not in str(error.value) and "--restart" in str(error.value)
    assert state_of(folder) == before and not out.exists()
    one = run(out, restart=True)
    assert not one.resumed and out.exists()


def test_features_that_are_too_short(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "SAVE_INTERVAL", 0.0)
    run(tmp_path / "a.npy", True, stop=2)
    with open(tmp_path / "a.npy.partial/features.npy", "r+b") as file:
        file.truncate(140)
    with pytest.raises(ValueError, match="features.npy is shorter"):
        job(tmp_path / "a.npy", True)


def test_another_runs_leftovers(tmp_path):
    run(tmp_path / "a.csv", stop=1)
    with pytest.raises(ValueError, match="topk 2, this one has 3.*--restart"):
        Job(tmp_path / "a.csv", {"topk": 3}, LABELS)
    assert run(tmp_path / "a.csv").resumed


def test_an_existing_output_is_kept_until_the_new_one_is_complete(tmp_path):
    out = tmp_path / "a.csv"
    out.write_text("earlier")
    with pytest.raises(FileExistsError, match="a.csv exists; --overwrite"):
        job(out)
    run(out, stop=2, overwrite=True)
    assert out.read_text() == "earlier"
    run(out, overwrite=True)
    assert out.read_bytes().startswith(b"image,error,class_1")


def test_interrupted_within_a_write(tmp_path, monkeypatch):
    """Ctrl-C may come between any two lines; what is saved then is of one moment."""
    expected = whole(tmp_path / "whole", "a.npy", embed=True)
    for name in ("rows", "features"):
        out = tmp_path / name / "a.npy"
        out.parent.mkdir()
        one = run(out, True, stop=2)
        one = job(out, True)
        one.begin(())
        real = one._files[name]

        class Interrupted:
            def write(self, data, real=real):
                real.write(data)
                raise KeyboardInterrupt

            def __getattr__(self, attribute, real=real):
                return getattr(real, attribute)

        one._files[name] = Interrupted()
        with pytest.raises(KeyboardInterrupt):
            one.write(next(batches(one.todo(), embed=True)))
        one.save()
        one._unlock()
        assert run(out, True).resumed
        assert out.read_bytes() == expected.read_bytes()


def test_a_run_that_is_not_complete_is_not_put_in_place(tmp_path):
    one = run(tmp_path / "a.csv", stop=2)
    one = job(tmp_path / "a.csv")
    one.begin(())
    with pytest.raises(ValueError, match="0 of 23 images are done|8 of 23 images are done"):
        one.finish()
    assert not (tmp_path / "a.csv").exists() and one.folder.exists()


def test_an_output_that_came_meanwhile_is_kept(tmp_path):
    one = job(tmp_path / "a.csv")
    one.begin(iter(PATHS))
    for batch in batches(one.todo()):
        one.write(batch)
    (tmp_path / "a.csv").write_text("another's")
    with pytest.raises(FileExistsError):
        one.finish()
    one._unlock()
    assert (tmp_path / "a.csv").read_text() == "another's"
    assert run(tmp_path / "a.csv", overwrite=True).resumed


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    folder = tmp_path / "a.csv.partial"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(ValueError, match="holds thesis.txt, which is no file of a job"):
            job(tmp_path / "a.csv", restart=restart)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "LOCK_TIMEOUT", 0.0)
    first = job(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="in use: another run writes"):
        job(tmp_path / "a.csv", restart=True)
    first._unlock()
    run(tmp_path / "a.csv")


def test_no_images(tmp_path):
    one = job(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="no images found"):
        one.begin([])
    assert list(tmp_path.iterdir()) == []

    def failing():
        yield "a.jpg"
        raise PermissionError(13, "Permission denied", "photos/secret")

    with pytest.raises(PermissionError, match="photos/secret"):
        job(tmp_path / "a.csv").begin(failing())
    assert list(tmp_path.iterdir()) == []


HELPERS = Path(prediction_jobs.__file__).parent
FULL = """
import resource, sys
from prediction_jobs import PATHS, batches, job
from deit_fast.predictions import job as job_module
job_module.SAVE_INTERVAL = 0.0
one = job(sys.argv[1])
one.begin(iter(PATHS))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # no file grows beyond
try:
    for batch in batches(one.todo()):
        one.write(batch)
except OSError as error:
    print(error)
    sys.exit(2)
"""


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path):
    expected, out = whole(tmp_path / "whole", "a.csv"), tmp_path / "a.csv"
    command = [sys.executable, "-c", FULL, str(out)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=HELPERS)
    assert found.returncode == 2, found.stderr
    assert found.stdout.count("can't write") == found.stdout.count("\n") == 1
    assert "a.csv.partial: File too large" in found.stdout
    state = json.loads((tmp_path / "a.csv.partial/state.json").read_text())
    assert 0 < state["done"] < 23
    one = run(out)
    assert one.resumed and out.read_bytes() == expected.read_bytes()


def test_a_disk_that_fills_at_the_very_end(tmp_path, monkeypatch):
    out = tmp_path / "a.csv"
    out.write_text("earlier")

    def replace(source, target):
        if str(target) == str(out):
            raise OSError(28, "No space left on device")
        real(source, target)

    real = job_module.os.replace
    monkeypatch.setattr(job_module.os, "replace", replace)
    with pytest.raises(OSError, match="No space left on device; what its state.json counts") as why:
        run(out, overwrite=True)
    assert out.read_text() == "earlier" and why.tb  # which holds the run, as Python 3.13 does
    monkeypatch.undo()
    assert run(out, overwrite=True).resumed
    assert len(list(csv.reader(out.open(newline="", errors="surrogateescape")))) == 24


def test_a_job_interrupted_before_0_1_is_resumed(tmp_path):
    before = Path(__file__).parents[1] / "data/before_0.1/interrupted.csv.partial"
    shutil.copytree(before, tmp_path / "interrupted.csv.partial")
    description = {"topk": 1, "model": "tiny"}
    one = Job(tmp_path / "interrupted.csv", description, ["cat", "dog"])
    assert one.resumed and one.state["done"] == 2
    one.begin(())
    assert list(one.todo()) == ["c.jpg", "d.jpg"]
    columns = {"classes": np.array([[0], [1]]), "scores": np.array([[0.5], [0.25]], np.float32)}
    one.write(Batch(["c.jpg", "d.jpg"], [None, None], columns))
    one.finish()
    assert (tmp_path / "interrupted.csv").read_text().splitlines() == [
        "image,error,class_1,label_1,score_1",
        "a.jpg,,1,dog,0.75", "b.jpg,is broken,,,", "c.jpg,,0,cat,0.5", "d.jpg,,1,dog,0.25",
    ]  # fmt: skip
