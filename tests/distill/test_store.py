"""Stores: what is in them, that they survive, that students see what the teacher saw, and what is
refused."""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import forked
import killed_writer
import numpy as np
import pytest
import selection
import timm
import torch
from checking import APART, BF16, FP16, FP32, assert_at_most, assert_close, assert_within, seeded
from PIL import Image
from small_runs import options_of, pictures, run, same
from tiers import slow
from torch.nn import functional as F

import deit_fast
from deit_fast.cli import main
from deit_fast.distill import augment, checkpoints, folder, recipe, teacher
from deit_fast.distill.datasets import open_images
from deit_fast.distill.processes import Interrupted
from deit_fast.distill.store import Damaged, Store, check, files, read, write
from deit_fast.distill.store import pictures as pictures_module
from deit_fast.distill.store.pictures import Pictures

DEIT = recipe.load("deit")
STORE = {"epochs": 3, "k": 2, "batch": 6, "img_size": 16}
SHIPPED = Path(deit_fast.__file__).parent / "data"
FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
module = sys.modules["deit_fast.distill.store.write"]  # its function hides it


def convnet(folder, classes=3, seed=0, in_chans=3, data=None):
    """Of pictures in `data` no class gets all."""
    torch.manual_seed(seeded(seed))
    model = timm.create_model("test_resnet", num_classes=classes, in_chans=in_chans)
    if in_chans == 1:
        model.pretrained_cfg = dict(model.pretrained_cfg) | {"mean": (0.286,), "std": (0.353,)}
    for name, parameter in model.named_parameters():  # answers that are neither sure nor all alike
        if name == "fc.weight":
            parameter.data.mul_(30)
    if data is not None:
        images = open_images(data, "train")
        pixels = np.stack([np.asarray(images.image(i)) for i in range(len(images))])
        with torch.no_grad():
            said = model.eval()((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
            model.fc.bias -= said.mean(0)
    deit_fast.save_pretrained(model, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def net(data, tmp_path_factory):
    return convnet(tmp_path_factory.mktemp("teacher") / "net", data=data)


def put(data, out, net, of=DEIT, **change):
    return write(data, out, net, of, **STORE | change)


@pytest.fixture(scope="module")
def whole(data, net, tmp_path_factory):
    """A store of three epochs that nothing disturbed."""
    out = tmp_path_factory.mktemp("store") / "whole"
    put(data, out, net)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def contents(store):
    return {path.name: path.read_bytes() for path in sorted(store.glob("epoch-*"))}


def learn(data, out, store, **kwargs):
    """A run of small_runs from a store; returns its last checkpoint."""
    given = {"img_size": None, "store": str(store)} | kwargs
    return run(data, out, **given)


# What is in it


def test_every_image_once_an_epoch_in_the_format_described(data, net, whole):
    store = Store(whole)
    seen = []
    for epoch in range(3):
        records = store.epoch(epoch)
        assert (
            sorted(record["index"] for record in records.all()) == list(range(24))
            and len(records) == 24
        )
        seen += [(epoch, *pair) for pair in records.all()[["index", "seed"]].tolist()]
        path = whole / f"epoch-{epoch:04d}-rank-0-of-1.records"
        content = path.read_bytes()
        assert len(content) == 64 + 24 * (8 + 4 * 2) + 4 * 4
        assert content[:8] == b"DFSTORE1" and content[8:24].hex() == store.manifest.key
        (index, seed), pairs = np.frombuffer(content, "<i4", 2, 64), content[72:80]
        assert (index, seed) == tuple(records[0][["index", "seed"]])
        assert np.array_equal(np.frombuffer(pairs, "<u2", 2), records[0]["classes"])
        assert np.array_equal(np.frombuffer(pairs, "<f2", 2, 4), records[0]["probs"])
    assert len({seed for *_, seed in seen}) == 72
    for place in (-1, 24):
        with pytest.raises(IndexError, match=f"record {place} of 24"):
            store.epoch(0)[place]
    assert [i for e, i, _ in seen if e == 0] != [i for e, i, _ in seen if e == 1]


def test_what_is_stored_is_what_the_teacher_says(data, net, whole):
    """By hand: augmented, mixed in pairs, softmax, the largest first."""
    store = Store(whole)
    model = teacher.load_teacher(net, 3, 16)
    images = open_images(data, "train")
    config = {k: store.manifest.transform[k] for k in ("input_size", "mean", "std")}
    change = augment.transform_of(DEIT, config)
    records = store.epoch(1).all()
    batch = []
    for record in records[:6]:
        augment.reseed(int(record["seed"]))
        batch.append(change(images.image(int(record["index"]))))
    mixed = 0
    for i in (0, 2, 4):
        augment.reseed(int(records[i]["seed"]) ^ int(records[i + 1]["seed"]))
        cutmix = np.random.rand(1) < 0.5
        lam = np.where(cutmix, np.random.beta(1.0, 1.0, 1), np.random.beta(0.8, 0.8, 1))
        np.random.rand(1)  # below mixup_prob 1
        if not cutmix[0]:
            a, b, share = batch[i], batch[i + 1], np.float32(lam[0])
            batch[i], batch[i + 1] = a * share + b * (1 - share), b * share + a * (1 - share)
            mixed += 1
        else:
            batch[i] = batch[i + 1] = None
    assert mixed  # CutMix is left to the test of bits
    made = Pictures(images, DEIT, config)
    stacked, *_ = made.collate([made[int(r["index"]), int(r["seed"])] for r in records[:6]])
    for x, y in zip(batch, stacked, strict=True):
        assert x is None or torch.equal(x, y)
    with torch.no_grad():
        expected = model(stacked).softmax(1).sort(descending=True)
    assert np.array_equal(records["classes"][:6], expected.indices[:, :2].numpy())
    probs = torch.from_numpy(records["probs"][:6].copy())
    assert_close(probs.float(), expected.values[:, :2], dtype=FP16)
    assert (records["probs"][:, 0] >= records["probs"][:, 1]).all()
    assert len(np.unique(records["classes"][:, 0])) > 1


def test_the_size_is_known_before(data, net, tmp_path, monkeypatch):
    events = []
    found = put(data, tmp_path / "a", net, report=events.append)
    (begin,) = (event for event in events if event["event"] == "begin")
    size = sum(len(content) for content in contents(tmp_path / "a").values())
    assert begin["bytes"] == found["bytes"] == size == 3 * (64 + 24 * 16 + 16)
    assert found["records"] == 24 and found["images_per_s"] > 0 and not found["unreadable"]
    usage = type("Usage", (), {"free": size - 1})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=f"{size - 1:,} bytes free, the store needs {size:,} more"):
        put(data, tmp_path / "b", net)
    again = put(data, tmp_path / "a", net)  # needs nothing more
    assert again["bytes"] == size and again["images_per_s"] is None


@pytest.mark.parametrize("workers", [0, 2])
def test_more_epochs_and_other_workers_make_the_same_files(workers, data, net, whole, tmp_path):
    put(data, tmp_path, net, epochs=1, workers=workers)
    put(data, tmp_path, net, workers=workers)
    assert contents(tmp_path) == contents(whole)
    with pytest.raises(ValueError, match="epochs: 2, but .* is to get 3"):
        put(data, tmp_path, net, epochs=2)


@pytest.mark.slow
def test_a_part_of_the_images(data, net, tmp_path):
    """Evenly of each class; an odd one at the end is not mixed, and not trained on."""
    put(data, tmp_path / "s", net, count=15, epochs=1)
    records = Store(tmp_path / "s").epoch(0)
    labels = open_images(data, "train").labels[records.all()["index"]]
    assert np.bincount(labels).tolist() == [5, 5, 5] and len(set(records.all()["index"])) == 15
    state = learn(data, tmp_path / "o", tmp_path / "s", recipe_of={"epochs": 1, "batch": 14})
    assert state["rows"][0]["epoch"] == 1
    with pytest.raises(ValueError, match="batch: 16, expected at most the 14 images"):
        learn(data, tmp_path / "p", tmp_path / "s", recipe_of={"epochs": 1, "batch": 16})


# The same pictures


def real_pictures(folder):
    """The photographs and the Fashion-MNIST pictures that come with the package."""
    for name, found in (("photo", SHIPPED.glob("*.jpg")), ("fashion", SHIPPED.glob("fashion/*"))):
        for split in ("train", "val"):
            (folder / split / name).mkdir(parents=True)
        for path in sorted(found):
            shutil.copy(path, folder / "train" / name)
        shutil.copy(path, folder / "val" / name)
    return folder


def seen_by(model, kept):
    model.register_forward_pre_hook(lambda module, args: kept.append(args[0].clone()))
    return model


@pytest.mark.parametrize("kind", ["files", pytest.param("idx", marks=pytest.mark.slow)])
def test_students_see_the_very_bits_that_the_teacher_saw(kind, tmp_path, monkeypatch):
    """Real pictures, everything of the recipe that is random, Mixup and CutMix in pairs; in any
    order, in batches of any size, by any number of workers."""
    if kind == "files":
        data, count, size, chans = real_pictures(tmp_path / "data"), None, 48, 3
        classes = 2
    else:
        selection.data(FASHION, "Fashion-MNIST")
        data, count, size, chans, classes = FASHION, 30, 28, 1, 10
    net = convnet(tmp_path / "net", classes, in_chans=chans)
    kept, load = [], module.load_teacher
    monkeypatch.setattr(module, "load_teacher", lambda *args: seen_by(load(*args), kept))
    plan = {"img_size": size, "epochs": 2, "batch": 8, "count": count}
    put(data, tmp_path / "s", net, **plan)
    store = Store(tmp_path / "s")
    records = store.manifest.records
    taught = torch.cat(kept).split(records)
    assert len(taught) == 2 and records == (14 if kind == "files" else 30)

    images = open_images(data, "train", mode="RGB" if chans == 3 else "L")
    config = {k: store.manifest.transform[k] for k in ("input_size", "mean", "std")}
    found, _ = read.pictures_of(store, images, recipe.load("deit", repeated_aug=1), config)
    for workers, batch in ((0, 2), (2, 6)):
        batches = read.Batches(records, [1, 0], batch, seed=5)
        source = read.loader(read.Taught(store, found), batches, workers)
        for epoch, stored in ((0, 1), (1, 0)):
            batches.begin(epoch)
            places = [place for b in batches for _, place in b]
            assert places != sorted(places)
            parts = list(source)
            assert torch.equal(torch.cat([x for x, *_ in parts]), taught[stored][places])
            expected = store.epoch(stored).all()[places]
            classes_of, probs = (torch.cat([target[i] for _, target, _ in parts]) for i in (0, 1))
            assert np.array_equal(classes_of.numpy(), expected["classes"])
            assert np.array_equal(probs.numpy(), expected["probs"])
    # and they were mixed: of pictures that were not, most differ
    alone = Pictures(images, recipe.load("deit", mixup=0.0, cutmix=0.0), config)
    of = store.epoch(0)
    single = [alone[int(of[i]["index"]), int(of[i]["seed"])][0] for i in range(records)]
    changed = [not torch.equal(x, y) for x, y in zip(single, taught[0], strict=True)]
    assert sum(changed) >= 0.7 * records


def test_pairs_stay_together_and_are_shared():
    """Whole pairs, each once, over the processes as one process would take them."""

    def epoch(seed=0, number=0, start=0, rank=0, world=1, batch=8):
        batches = read.Batches(51, [4, 7], batch, seed, rank, world)
        batches.begin(number, start)
        assert len(batches) == 50 // (batch * world)
        return list(batches)

    one = epoch()
    assert all(
        a[0] == b[0] == 4 and a[1] % 2 == 0 and b[1] == a[1] + 1
        for batch in one
        for a, b in zip(batch[::2], batch[1::2], strict=True)
    )
    places = [place for batch in one for _, place in batch]
    assert len(set(places)) == len(places) == 48 and max(places) < 50
    assert epoch(start=4) == one[4:]
    assert {stored for batch in epoch(number=1) for stored, _ in batch} == {7}
    orders = {tuple(p for b in epoch(seed, n) for _, p in b) for seed in (0, 1) for n in (0, 1)}
    assert len(orders) == 4
    shares = [epoch(rank=rank, world=2, batch=4) for rank in (0, 1)]
    for batch, a, b in zip(one, *shares, strict=True):
        pairs = [a[:2], b[:2], a[2:], b[2:]]
        assert batch == [place for pair in pairs for place in pair]


# Surviving


@pytest.mark.slow
def test_killed_again_and_again(data, net, tmp_path):
    """kill -9 at random row statistics: nothing is lost, doubled or torn, and the files are those of a
    writer that was never killed."""
    out = tmp_path / "killed"
    script = [sys.executable, killed_writer.__file__, data, net, out, "5", "0"]
    ended = subprocess.run(list(map(str, script)), capture_output=True, text=True, timeout=300)
    lines = [tuple(map(int, line.split())) for line in ended.stdout.splitlines()]
    assert [code for code, _ in lines] == [-signal.SIGKILL] * 5 + [0], ended.stdout + ended.stderr
    sizes = [size for _, size in lines]
    assert sizes == sorted(sizes) and len(set(sizes)) > 3  # it was killed at different places
    put(data, tmp_path / "whole", net, **killed_writer.PLAN)
    assert contents(out) == contents(tmp_path / "whole")


BLOCK = 6 * 16 + 4


@pytest.mark.parametrize(
    "left, whole_blocks",
    [(0, 0), (10, 0), (63, 0), (64, 0), (64 + 5, 0), (64 + BLOCK - 1, 0), (64 + BLOCK, 1),
     (64 + BLOCK + 16, 1), (64 + 4 * BLOCK - 4, 3), (64 + 4 * BLOCK, 4)],
)  # fmt: skip
def test_a_torn_end_is_cut_off(left, whole_blocks, data, net, whole, copy):
    """Wherever the writer died, after its last block and before the name too."""
    path = copy / "epoch-0001-rank-0-of-1.records"
    part = path.with_suffix(".part")
    part.write_bytes(path.read_bytes()[:left])
    path.unlink()
    (copy / "epoch-0002-rank-0-of-1.records").unlink()
    events = []
    put(data, copy, net, report=events.append)
    assert contents(copy) == contents(whole)
    first = next((e for e in events if e["event"] == "update"), None)
    assert (first["epoch"], first["written"]) == ((1, 6 * whole_blocks + 6) if whole_blocks < 4
                                                  else (2, 6))  # fmt: skip
    notes = [event["text"] for event in events if event["event"] == "note"]
    torn = left > 64 and (left - 64) % BLOCK > 0
    said = f"goes on behind its first {6 * whole_blocks} records"
    assert [text.rpartition(": ")[2] for text in notes] == [said] * torn


def test_what_is_wrong_inside_a_part_is_made_again(data, net, whole, copy):
    path = copy / "epoch-0002-rank-0-of-1.records"
    content = bytearray(path.read_bytes())
    content[64 + BLOCK + 3] ^= 1
    path.unlink()
    path.with_suffix(".part").write_bytes(content + b"more")
    notes = []
    put(data, copy, net, report=lambda e: notes.append(e.get("text")))
    assert contents(copy) == contents(whole)
    assert any(text and "goes on behind its first 6 records" in text for text in notes)


def test_another_order_is_not_gone_on_with(data, net, whole, copy, monkeypatch):
    """As another version of numpy may draw it: images would be lost and doubled."""
    path = copy / "epoch-0001-rank-0-of-1.records"
    content = path.read_bytes()[: 64 + 2 * BLOCK]
    path.unlink()
    path.with_suffix(".part").write_bytes(content)
    order_of = module.order_of
    for at, named in ((0, "index"), (1, "seed")):

        def other(*args, at=at):
            drawn = list(order_of(*args))
            drawn[at] = drawn[at][::-1].copy()
            return drawn

        monkeypatch.setattr(module, "order_of", other)
        with pytest.raises(ValueError, match=rf"\.part: {named} of records 0 to 5 is not what is"):
            put(data, copy, net)
    assert path.with_suffix(".part").read_bytes() == content


def test_a_signal_stops_it_between_blocks(data, net, whole, tmp_path):
    def report(event):
        if (event["event"], event.get("epoch"), event.get("written")) == ("update", 1, 12):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="epoch 2 of 3, record 12") as caught:
        put(data, tmp_path, net, report=report)
    assert caught.value.number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    put(data, tmp_path, net)
    assert contents(tmp_path) == contents(whole)


def test_two_writers_do_not_share_a_folder(data, net, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PATIENCE", 0)

    def report(event):
        put(data, tmp_path, net)

    with pytest.raises(ValueError, match="another run writes into"):
        put(data, tmp_path, net, report=report)


@pytest.mark.slow
def test_two_writers_do_not_share_a_file(data, net, whole, copy, monkeypatch):
    """Whatever their ranks are; one that is left by a killed writer's workers is waited for."""
    path = copy / "epoch-0001-rank-0-of-1.records"
    part = path.with_suffix(".part")
    content = path.read_bytes()[: 64 + BLOCK + 5]
    path.unlink()
    part.write_bytes(content)
    with open(part, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        monkeypatch.setattr(folder, "PATIENCE", 0.2)
        with pytest.raises(
            ValueError, match=r"another process writes into .*0001-rank-0-of-1.part"
        ):
            put(data, copy, net)
        assert part.read_bytes() == content
        monkeypatch.setattr(folder, "PATIENCE", 60)
        threading.Timer(1, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        put(data, copy, net)
    assert contents(copy) == contents(whole)


def test_a_file_that_changed_is_not_sealed(whole, copy):
    path = copy / "epoch-0001-rank-0-of-1.records"
    part = path.with_suffix(".part")
    path.rename(part)
    writer = files.Writer(copy, Store(copy).manifest, 1, 0)
    assert writer.done == 24
    with open(part, "ab") as other:
        other.write(b"x")
    with pytest.raises(Damaged, match=r"\.part, byte 464: 465 bytes, expected 464 for 24 records"):
        writer.seal()
    writer.close()
    assert part.exists() and not path.exists()


@pytest.mark.parametrize("size", [64, 300])
def test_a_header_that_a_power_failure_left_empty(size, data, net, whole, copy):
    path = copy / "epoch-0001-rank-0-of-1.records"
    path.unlink()
    path.with_suffix(".part").write_bytes(bytes(size))
    notes = []
    put(data, copy, net, report=lambda e: notes.append(e.get("text")))
    assert contents(copy) == contents(whole)
    assert any(text and "header is all zeros: goes on behind its first 0" in text for text in notes)


@pytest.mark.slow
def test_torchrun(data, net, whole, tmp_path):
    """Two processes write what one does, each its half, and train as one does. They have the
    variables that torchrun gives them; tests/test_train.py has torchrun itself."""
    two = tmp_path / "two"
    write_two = ["distill-store", "write", str(data), str(two), "--teacher", str(net), "--workers"]
    write_two += ["0", "--epochs", "2", "--k", "2", "--batch", "6", "--img-size", "16"]
    train = ["distill-store", "train", str(data), str(two), "--workers", "0"]
    train += options_of(**{"drop-path": 0, "seed": 3, "opt": "sgd", "lr": 0.05})  # as there
    train[train.index("--img-size") : train.index("--img-size") + 2] = []
    train[train.index("--repeated-aug") : train.index("--repeated-aug") + 2] = []

    def started(command):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        place |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        envs = [os.environ | place | {"RANK": n, "LOCAL_RANK": n} for n in "01"]
        ended = forked.run(*[["deit_fast", *command]] * 2, envs=envs)
        assert [done.returncode for done in ended] == [0, 0], ended
        return "".join(done.stderr for done in ended)

    started(write_two)
    torn = two / "epoch-0001-rank-1-of-2.records"
    torn.with_suffix(".part").write_bytes(torn.read_bytes()[: 64 + BLOCK + 5])
    torn.unlink()
    said = started(write_two)  # of the process that does not talk
    assert said.count("goes on behind its first 6 records") == 1 and "rank-1-of-2.part" in said
    started([*train, "--out", str(tmp_path / "ranks")])
    assert sorted(contents(two)) == [
        f"epoch-000{epoch}-rank-{rank}-of-2.records" for epoch in (0, 1) for rank in (0, 1)
    ]
    for epoch in (0, 1):
        one, both = (Store(path).epoch(epoch).all() for path in (whole, two))
        for name in ("index", "seed", "classes"):
            assert np.array_equal(one[name], both[name])
        assert_close(torch.from_numpy(both["probs"]), torch.from_numpy(one["probs"]))
    assert main([*train, "--out", str(tmp_path / "one")]) == 0
    one, many = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("one", "ranks"))
    for a, b in zip(one["rows"], many["rows"], strict=True):
        assert_within(b["loss"], a["loss"], APART[FP32])
    for name, tensor in one["model"].items():
        assert_close(many["model"][name], tensor, name)


# Damage


def flip(content, place, bit=4):
    changed = bytearray(content)
    changed[place] ^= bit
    return bytes(changed)


DAMAGES = {  # what is done to a file -> offset, reason
    "truncated": (lambda c: c[:200], 200, "200 bytes, expected 464 for 24 records"),
    "one byte short": (lambda c: c[:-1], 463, "463 bytes, expected 464"),
    "empty": (lambda c: b"", 0, "ends within the header"),
    "longer": (lambda c: c + b"x", 464, "465 bytes, expected 464"),
    "magic": (lambda c: flip(c, 2), 0, "begins with b'DFWTORE1', expected b'DFSTORE1'"),
    "header": (lambda c: flip(c, 30), 60, "the header's checksum is"),
    "header's checksum": (lambda c: flip(c, 61), 60, "the header's checksum is"),
    "record": (lambda c: flip(c, 64 + BLOCK + 40), 64 + BLOCK, "the checksum of records 6 to 11, "
               f"at byte {64 + 2 * BLOCK - 4}, is"),
    "checksum": (lambda c: flip(c, 64 + 2 * BLOCK - 2), 64 + BLOCK, "checksum of records 6 to 11"),
    "blocks swapped": (
        lambda c: c[:64] + c[64 + BLOCK : 64 + 2 * BLOCK] + c[64 : 64 + BLOCK]
        + c[64 + 2 * BLOCK :], 64, "the checksum of records 0 to 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_rest_is_used(damage, data, net, whole, copy, capsys):
    path = copy / "epoch-0001-rank-0-of-1.records"
    change, offset, reason = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(Damaged) as caught:
        Store(copy).verify(1)
    assert (caught.value.path, caught.value.offset) == (path, offset)
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"store: {path}, byte {offset}: ")
    for epoch in (0, 2):
        Store(copy).verify(epoch)
    assert main(["distill-store", "info", str(copy)]) == 1
    said = capsys.readouterr().out
    assert f"epoch 1: {caught.value}" in said and "2 of 3 epochs are whole" in said
    # deleted, it is made again
    path.unlink()
    put(data, copy, net)
    assert contents(copy) == contents(whole)


def test_a_file_in_anothers_place(data, net, whole, copy, tmp_path):
    first, second = (copy / f"epoch-000{epoch}-rank-0-of-1.records" for epoch in (0, 1))
    shutil.copy(first, second)
    with pytest.raises(Damaged, match="byte 24: epoch is 0, expected 1"):
        Store(copy).epoch(1)
    put(data, tmp_path / "other", net, seed=1)
    one, other = (Store(path).epoch(1).all() for path in (whole, tmp_path / "other"))
    assert all(not np.array_equal(one[name], other[name]) for name in ("index", "seed"))
    shutil.copy(tmp_path / "other" / second.name, second)
    with pytest.raises(Damaged, match="byte 8: key is .*, expected"):
        Store(copy).epoch(1)
    with pytest.raises(Damaged, match="byte 8: key is"):
        put(data, copy, net)  # nor does a writer go on with it
    second.rename(second.with_suffix(".part"))
    with pytest.raises(Damaged, match=r"\.part, byte 8: key is"):
        put(data, copy, net)


@pytest.mark.slow
def test_intact_epochs_stay_usable(data, net, whole, copy, tmp_path):
    """As many as are needed, in order; which is said."""
    path = copy / "epoch-0001-rank-0-of-1.records"
    path.write_bytes(flip(path.read_bytes(), 100))
    events = []
    state = learn(data, tmp_path / "a", copy, recipe_of={"epochs": 2}, report=events.append)
    assert state["identity"]["settings"]["store"]["epochs"] == [0, 2]
    (note,) = (event["text"] for event in events if event["event"] == "note")
    assert str(path) in note and "byte 64" in note and "left out" in note
    with pytest.raises(ValueError, match="epochs: 3, but .* has 2 that can be used .1 is damaged"):
        learn(data, tmp_path / "b", copy)
    path.rename(path.with_suffix(".part"))
    with pytest.raises(ValueError, match="is not complete, write it to its end"):
        learn(data, tmp_path / "b", copy)
    path.with_suffix(".part").unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        learn(data, tmp_path / "b", copy)
    assert check(data, copy, net)["records"] == 48
    for epoch in (0, 2):
        (copy / f"epoch-000{epoch}-rank-0-of-1.records").unlink()
    with pytest.raises(ValueError, match="has no whole epoch"):
        check(data, copy, net)


@pytest.mark.slow
def test_a_run_goes_on_whatever_happens_to_epochs_it_needs_no_more(whole, data, copy, tmp_path):
    """Repaired or newly damaged: the run keeps the epochs it began with."""
    expected = learn(data, tmp_path / "expected", whole, recipe_of={"epochs": 2})
    files_of = [copy / f"epoch-000{epoch}-rank-0-of-1.records" for epoch in (0, 1, 2)]
    contents_of = [path.read_bytes() for path in files_of]

    def stop(event):
        if event["event"] == "update" and (event["epoch"], event["update"]) == (1, 1):
            raise KeyboardInterrupt

    def begin(out):
        with pytest.raises(KeyboardInterrupt):
            learn(data, out, copy, recipe_of={"epochs": 2}, report=stop, save_every=1)

    begin(tmp_path / "a")
    files_of[0].write_bytes(flip(contents_of[0], 100))  # is behind it
    files_of[2].unlink()  # was never asked for
    state = learn(data, tmp_path / "a", copy, recipe_of={"epochs": 2})
    assert same(state, expected)
    files_of[2].write_bytes(contents_of[2])
    begin(tmp_path / "b")
    files_of[0].write_bytes(contents_of[0])
    files_of[2].write_bytes(flip(contents_of[2], 100))
    with pytest.raises(Damaged, match="epoch-0002.*, byte 64"):  # is still to come
        learn(data, tmp_path / "b", copy, recipe_of={"epochs": 2})
    files_of[2].write_bytes(contents_of[2])
    state = learn(data, tmp_path / "b", copy, recipe_of={"epochs": 2})
    assert state["identity"]["settings"]["store"]["epochs"] == [1, 2]


@pytest.mark.slow
def test_no_more_epochs_are_read_than_are_needed(data, copy, tmp_path, monkeypatch):
    """And what is not written is not called damaged."""
    first = copy / "epoch-0000-rank-0-of-1.records"
    first.rename(first.with_suffix(".part"))
    looked, damage, events = [], Store.damage, []
    monkeypatch.setattr(Store, "damage", lambda s, e: looked.append(e) or damage(s, e))
    learn(data, tmp_path / "a", copy, recipe_of={"epochs": 1}, report=events.append)
    assert looked == [0, 1]
    (note,) = (event["text"] for event in events if event["event"] == "note")
    assert note == "store: 1 epoch is not written, and left out: 0"
    with pytest.raises(ValueError, match="has 2 that can be used .1 is not written: .*complete"):
        learn(data, tmp_path / "b", copy)


def test_a_damaged_manifest_is_refused(data, net, copy):
    path = copy / "manifest.json"
    content = path.read_text()
    for changed in (
        content[:-20], "", "[]", content.replace('"k": 2', '"k": 1'),
        content.replace('"format": 1', '"format": 2'), content.replace("amp", "pma"),
        content.replace('"epochs": 3', '"epochs": 2'), content.replace('"torch": "', '"torch": "9'),
        content.replace('"notes": {', '"notes": {"x": 1, '), content.replace("checksum", "x"),
    ):  # fmt: skip
        assert changed != content
        path.write_text(changed)
        with pytest.raises(Damaged, match="manifest.json, byte 0: "):
            Store(copy)
        with pytest.raises(Damaged, match="manifest.json, byte 0: "):
            put(data, copy, net)
        assert path.read_text() == changed
    path.unlink()
    with pytest.raises(FileNotFoundError, match="copy has no manifest.json"):
        Store(copy)
    with pytest.raises(ValueError, match="has epoch-0000.* and no manifest.json"):
        put(data, copy, net)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"epochs": "3"}, "epochs is '3', expected int"),
        ({"epochs": True}, "epochs is True, expected int"),
        ({"epochs": 0}, "epochs is 0, expected 1 or more"),
        ({"batch": 0}, "batch is 0, expected 1 or more"),
        ({"notes": []}, r"notes is \[\], expected dict"),
        ({"notes": {"teacher": "x"}}, "notes has no versions"),
        ({"notes": {"teacher": "x", "versions": 1}}, "notes has versions 1, expected dict"),
        ({"sample": "x"}, "sample is 'x', expected dict"),
        ({"teacher": {}}, "teacher has no architecture"),
    ],
)
def test_a_manifest_of_other_types_is_refused(change, reason, data, net, copy):
    """Though its key and checksum are right."""
    dataclasses.replace(Store(copy).manifest, **change).write(copy)
    for call in (lambda: Store(copy), lambda: put(data, copy, net), lambda: check(data, copy, net)):
        with pytest.raises(Damaged, match=f"manifest.json, byte 0: {reason}"):
            call()


# What does not fit


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "seed 0, now 1"),
        ({"k": 3}, "k 2, now 3"),
        ({"batch": 8}, "batch 6, now 8"),
        ({"amp": "bf16"}, "amp 'none', now 'bf16'"),
        ({"count": 12}, "records 24, now 12"),
        ({"img_size": 32}, r"transform input_size \[3, 16, 16\], now \[3, 32, 32\]"),
        ({"of": recipe.load("deit", hflip=0.0)}, "transform hflip 0.5, now 0.0"),
        ({"of": recipe.load("deit", cutmix=0)}, "transform cutmix 1.0, now 0.0"),
    ],
)
def test_a_store_of_something_else_is_not_gone_on_with(change, named, data, net, copy):
    before = contents(copy)
    with pytest.raises(ValueError, match=f"out: .* is another store: .*{named}"):
        put(data, copy, net, **change)
    assert contents(copy) == before


def test_another_teacher(data, net, copy, tmp_path):
    other = convnet(tmp_path / "net", seed=1)
    with pytest.raises(ValueError, match="is another store: teacher weights '.*', now"):
        put(data, copy, other)
    with pytest.raises(ValueError, match="teacher: .*/net is .*, expected that of .*copy"):
        check(data, copy, other)
    put(data, copy, shutil.copytree(net, tmp_path / "moved"))  # the same, elsewhere


@pytest.mark.slow
def test_another_data_set(data, net, copy, tmp_path):
    def refused(changed, what):
        with pytest.raises(ValueError, match=f"is another store: images {what}"):
            put(changed, copy, net)
        with pytest.raises(ValueError, match=f"is of another data: .*{what}"):
            learn(changed, tmp_path / "o", copy)
        with pytest.raises(ValueError, match=f"is of another data: .*{what}"):
            check(changed, copy, net)

    refused(pictures(tmp_path / "more", each=9), "count 24, now 27")
    named = Path(shutil.copytree(data, tmp_path / "named"))
    (named / "train/class1/3.png").rename(named / "train/class1/9.png")
    refused(named, "names")
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    put(moved, copy, net)  # the same, elsewhere
    (moved / "train/class1/3.png").rename(moved / "train/class2/x.png")
    refused(moved, "labels")


@pytest.mark.slow
def test_other_pixels_and_other_versions(data, net, copy, tmp_path, monkeypatch):
    """Versions that make the same pixels are noted, those that make others refused."""
    real = pictures_module.versions()
    for where in (module, pictures_module):
        monkeypatch.setattr(where, "versions", lambda: real | {"PIL": "99"})
    notes = []
    learn(data, tmp_path / "a", copy, recipe_of={"epochs": 1}, report=notes.append)
    (note,) = (event["text"] for event in notes if event["event"] == "note")
    assert f"PIL {real['PIL']}, now 99; sample pictures are the same" in note
    notes = []
    assert check(data, copy, net, report=notes.append)["mean_difference"] == 0
    assert [event["text"] for event in notes] == [note]
    notes = []
    put(data, copy, net, epochs=4, report=notes.append)
    assert [event["text"] for event in notes if event["event"] == "note"] == [note]
    changed = Path(shutil.copytree(data, tmp_path / "changed"))
    first = changed / "train/class0/0.png"
    pixels = np.asarray(Image.open(first)).copy()
    pixels[2:14, 2:14] ^= 1
    Image.fromarray(pixels).save(first)
    for call in (
        lambda: learn(changed, tmp_path / "b", copy),
        lambda: check(changed, copy, net),
        lambda: put(changed, copy, net),
    ):
        with pytest.raises(ValueError, match="not, bit for bit.* .PIL .*, now 99"):
            call()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": 0}, "k: 0, expected 1 to 3, which is how many classes"),
        ({"k": 4}, "k: 4, expected 1 to 3"),
        ({"epochs": 0}, "epochs: 0, expected 1 or more"),
        ({"batch": 7}, "batch: 7, expected an even number"),
        ({"batch": 0}, "batch: 0, expected 2 or more"),
        ({"workers": -1}, "workers: -1, expected 0 or more"),
        ({"amp": "fp8"}, "amp: 'fp8', expected one of none, bf16, fp16"),
        ({"seed": -1}, "seed: -1, expected 0 to"),
        ({"count": 25}, "count: 25, expected 1 to 24"),
    ],
)
def test_refused_by_write(change, message, data, net, tmp_path):
    with pytest.raises(ValueError, match=message):
        put(data, tmp_path / "s", net, **change)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"img_size": 32}, "img_size: 32, but the pictures of .* have 16"),
        ({"mean": (0.1, 0.2, 0.3)}, r"mean: \(0.1, 0.2, 0.3\), but"),
        ({"count": 4}, "count: 4, but the images are those of"),
        ({"distill": "hard", "teacher": "x"}, "distill: 'hard' with a store, expected 'none'"),
        ({"model_args": {"in_chans": 1}}, "mean: .* expected 1 numbers"),
        ({"recipe_of": {"erasing": 0.0}}, "is of another transform: erasing 0.25, now 0.0"),
        (
            {"recipe_of": {"repeated_aug": 3}},
            "repeated_aug: 3, expected 1: an epoch of .* each image",
        ),
        (
            {"recipe_of": {"batch": 9}},
            "batch: 9 images in each process, expected an even number for",
        ),
        ({"recipe_of": {"epochs": 4}}, "epochs: 4, but .* has 3 that can be used"),
        ({"recipe_of": {"batch": 26}}, "batch: 26, expected at most the 24 images"),
        ({"store": "nowhere"}, "nowhere has no manifest.json"),
    ],
)
def test_refused_by_train(change, message, data, whole, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(data, tmp_path, **{"img_size": None, "store": str(whole)} | change)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_an_answer_that_is_no_number(data, net, tmp_path, monkeypatch):
    load = module.load_teacher

    def spoilt(*args):
        model = load(*args)
        model.fc.weight.data[0] = torch.inf
        return model

    monkeypatch.setattr(module, "load_teacher", spoilt)
    with pytest.raises(FloatingPointError, match="teacher: its answer is not finite"):
        put(data, tmp_path, net)


@pytest.mark.slow
def test_unreadable_pictures_give_way_and_records_say_to_which(net, tmp_path):
    data = pictures(tmp_path / "data")
    broken = data / "train" / "class1" / "3.png"
    broken.write_bytes(b"no picture")
    found = put(data, tmp_path / "s", net)
    assert list(found["unreadable"]) == [str(broken)]
    drawn = Store(tmp_path / "s").epoch(0).all()["index"].tolist()
    assert sorted(drawn) == sorted([*range(11), *range(12, 24), 12])
    events = []
    learn(data, tmp_path / "o", tmp_path / "s", recipe_of={"epochs": 1}, report=events.append)
    assert not [event for event in events if event["event"] == "note"]  # it is not looked at
    for path in (data / "train").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="^data: 10 images in a row are unreadable"):
        put(data, tmp_path / "t", net)


def test_an_image_that_broke_after_the_teacher_saw_it(data, net, whole, tmp_path, monkeypatch):
    changed = Path(shutil.copytree(data, tmp_path / "data"))
    broken = changed / "train" / "class1" / "3.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"an image is unreadable: .*1/3.png: .*the teacher saw"):
        learn(changed, tmp_path / "o", whole)
    # and where it is not one of the sample
    monkeypatch.setattr(pictures_module, "SAMPLED", 2)
    put(data, tmp_path / "s", net)
    place = Store(tmp_path / "s").epoch(0).all()["index"].tolist().index(11)
    named = rf"^data: an image is unreadable: .*1/3.png: .* record {place} of .*h-0000-.*records"
    with pytest.raises(ValueError, match=named):
        learn(changed, tmp_path / "o", tmp_path / "s", recipe_of={"epochs": 1})
    with pytest.raises(ValueError, match=r"1/3.png: .* record \d+ of .*records"):
        check(changed, tmp_path / "s", net)


@pytest.mark.slow
def test_an_image_that_was_repaired_after_the_teacher_missed_it(data, net, tmp_path):
    """It stays out of what is written, and the writer goes on with what it began."""
    changed, out = Path(shutil.copytree(data, tmp_path / "data")), tmp_path / "s"
    broken = changed / "train" / "class1" / "3.png"
    content = broken.read_bytes()
    broken.write_bytes(b"no picture")
    put(changed, out, net, epochs=2)
    path = out / "epoch-0001-rank-0-of-1.records"
    first = Store(out).epoch(0).all()["index"].tolist()
    was = path.read_bytes()
    path.unlink()
    path.with_suffix(".part").write_bytes(was[: 64 + 3 * BLOCK])
    broken.write_bytes(content)
    assert check(changed, out, net)["mean_difference"] == 0
    put(changed, out, net, epochs=2)
    assert path.read_bytes()[: 64 + 3 * BLOCK] == was[: 64 + 3 * BLOCK]
    assert Store(out).epoch(0).all()["index"].tolist() == first and 11 not in first
    assert check(changed, out, net)["mean_difference"] == 0
    learn(changed, tmp_path / "o", out, recipe_of={"epochs": 2})


# Learning from it


def test_the_loss_is_the_dense_formula():
    """With two heads the mean of both."""
    torch.manual_seed(seeded(0))
    z, d = torch.randn(2, 6, 7, dtype=torch.float32).requires_grad_()
    probs, classes = torch.randn(6, 7).softmax(1).topk(3)
    probs = probs.half()
    target = torch.zeros(6, 7, dtype=torch.float64)
    for b in range(6):
        target[b] = (1 - probs[b].double().sum()) / 4
        target[b, classes[b]] = probs[b].double()
    expected = [F.cross_entropy(x.double(), target) for x in (z, d)]
    one = read.objective(z, None, classes, probs)
    both = read.objective((z, d), None, classes, probs)
    assert_close(one, expected[0].float())
    assert_close(both, (sum(expected) / 2).float())
    got, true = torch.autograd.grad(both, d)[0], torch.autograd.grad(sum(expected) / 2, d)[0]
    assert_close(got, true)


@pytest.mark.parametrize(
    "model, model_args",
    [
        ("deit_tiny_distilled", {}),
        slow("tiny_vit_5m_224", {"embed_dims": [16, 32, 32, 32], "depths": [1, 1, 1, 1],
                                 "num_heads": [1, 1, 1, 1], "window_sizes": [2, 2, 2, 2]}),
        slow("cait_xxs24_224", {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}),
    ],
    ids=["deit", "tiny_vit", "cait"],
)  # fmt: skip
def test_students(model, model_args, data, net, whole, tmp_path, monkeypatch):
    """Any model, without a teacher in memory, going on bit for bit."""
    store = whole
    if model == "tiny_vit_5m_224":  # which divides its pictures by 32
        store = tmp_path / "store"
        put(data, store, net, img_size=32)
    monkeypatch.setattr("deit_fast.distill.train.load_teacher", None)
    options = {"model": model, "model_args": model_args, "recipe_of": {"drop": 0.0}}

    def stop(event):
        if event["event"] == "update" and (event["epoch"], event["update"]) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(data, tmp_path / "o", store, report=stop, save_every=1, **options)
    state = learn(data, tmp_path / "o", store, save_every=1, **options)
    assert same(state, learn(data, tmp_path / "p", store, workers=2, **options))
    facts = json.loads((tmp_path / "o" / "run.json").read_text())
    assert facts["distill"] == "store" and facts["teacher"] == f"{net}, K = 2"
    assert facts["distill_token"] == ("both" if model == "deit_tiny_distilled" else "class")
    size = 32 if model == "tiny_vit_5m_224" else 16
    assert facts["img_size"] == size
    found = deit_fast.from_pretrained(tmp_path / "o" / "model", strict=False)
    assert tuple(found.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)


def test_a_student_learns_what_the_teacher_says(tmp_path):
    """Not the labels: from a teacher that calls every class by the next one's name."""
    data = pictures(tmp_path / "data")
    plain = {"mixup": 0.0, "cutmix": 0.0, "auto_augment": "none", "erasing": 0.0, "scale": 0.8,
             "color_jitter": 0.0}  # fmt: skip

    class Next(torch.nn.Module):
        num_classes = 3
        pretrained_cfg = {"architecture": "next", "input_size": (3, 16, 16),
                          "mean": (0.5,) * 3, "std": (0.5,) * 3}  # fmt: skip

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(20.0))

        def forward(self, x):  # the colour tells the class
            return self.scale * x.mean((2, 3)).roll(1, 1)

    taught = Next()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_teacher", lambda *args: taught)
        write(data, tmp_path / "s", "next", recipe.load("deit", **plain), epochs=12, k=2, batch=8)
    records = Store(tmp_path / "s").epoch(0).all()
    said = dict(zip(records["index"].tolist(), records["classes"][:, 0].tolist(), strict=True))
    by_class = [{said[i] for i in range(8 * c, 8 * c + 8)} for c in range(3)]
    assert all(len(found) == 1 for found in by_class) and len(set.union(*by_class)) == 3
    names = [found.pop() for found in by_class]
    assert names != [0, 1, 2]
    learn(
        data, tmp_path / "o", tmp_path / "s", model="deit_tiny",
        recipe_of=plain | {"epochs": 12, "ema": 0.0, "drop": 0.0, "drop_path": 0.0, "lr": 3e-3},
    )  # fmt: skip
    model = deit_fast.from_pretrained(tmp_path / "o" / "model").eval()
    images = open_images(data, "validation")
    pixels = np.stack([np.asarray(images.image(i)) for i in range(24)])
    with torch.no_grad():
        found = model((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).argmax(1)
    right = (found == torch.tensor(names)[torch.from_numpy(images.labels)]).float().mean()
    assert right > 0.8


@pytest.mark.slow
def test_another_store_is_another_run(data, net, whole, tmp_path):
    learn(data, tmp_path / "o", whole, recipe_of={"epochs": 1})
    put(data, tmp_path / "s", net, k=1)
    with pytest.raises(ValueError, match="other settings: store {'key': .*, now {'key'"):
        learn(data, tmp_path / "o", tmp_path / "s", recipe_of={"epochs": 1})
    learn(data, tmp_path / "o", shutil.copytree(whole, tmp_path / "moved"), recipe_of={"epochs": 1})


# Asking again


def test_check_finds_no_difference_where_there_is_none(data, net, whole):
    assert check(data, whole, net) == {
        "records": 72, "mean_difference": 0.0, "different_indices": 0.0
    }  # fmt: skip
    assert check(data, whole, net, samples=7)["records"] == 12
    with pytest.raises(ValueError, match="samples: 0, expected 1 or more"):
        check(data, whole, net, samples=0)


def test_check_measures_differences(data, net, whole, copy):
    """Of another precision; and a known one, put in with a checksum that is right."""
    found = check(data, whole, net, amp="bf16")
    assert found["mean_difference"] > 0
    assert_at_most(found["mean_difference"], APART[BF16])
    with pytest.raises(ValueError, match="amp: 'fp8'"):
        check(data, whole, net, amp="fp8")
    store = Store(copy)
    path = copy / "epoch-0002-rank-0-of-1.records"
    content = bytearray(path.read_bytes())
    record = np.frombuffer(content, store.manifest.record, 6, 64)
    was = record["probs"][3, 0]
    record["probs"][3, 0] = was - np.float16(0.25)
    record["classes"][3] = record["classes"][3, ::-1]
    content[64 + 6 * 16 : 64 + BLOCK] = files.checksum(
        bytes(content[:64]), 0, bytes(content[64 : 64 + 6 * 16])
    ).to_bytes(4, "little")
    path.write_bytes(content)
    store.verify(2)
    found = check(data, copy, net)
    change = float(was) - float(was - np.float16(0.25))
    assert found["mean_difference"] == pytest.approx(change / 144)
    assert found["different_indices"] == pytest.approx(2 / 144)


def test_a_checksum_is_of_its_place_and_its_file():
    """And not the constant that a CRC of something with its CRC is."""
    manifests = [
        files.Manifest({}, {}, {}, "", 3, 2, 24, 6, seed, 1, "none", 3, {}) for seed in (0, 1)
    ]
    headers = [m.header(epoch, 0) for m in manifests for epoch in (0, 1)]
    assert all(zlib.crc32(h[:-4]) == int.from_bytes(h[-4:], "little") for h in headers)
    found = {files.checksum(h, block, b"records") for h in headers for block in (0, 1)}
    assert len(found) == 8
    longer = dataclasses.replace(manifests[0], epochs=9, notes={"teacher": "x"})
    assert longer.key == manifests[0].key != manifests[1].key


@pytest.mark.parametrize("records", [24, 23, 7, 2, 1])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_of_whole_pairs(records, world):
    manifest = files.Manifest({}, {}, {}, "", 3, 2, records, 6, 0, world, "none", 1, {})
    shares = [manifest.share(rank) for rank in range(world)]
    ends = [0, *(first + count for first, count in shares)]
    assert ends[:-1] == [first for first, _ in shares] and ends[-1] == records
    assert all(end % 2 == 0 for end in ends[:-1])
    assert max(count for _, count in shares) - min(count for _, count in shares) <= 3


# The command


def test_the_command(data, net, tmp_path, capsys):
    store, out = str(tmp_path / "store"), str(tmp_path / "out")
    plan = ["--epochs", "2", "--k", "2", "--batch", "6", "--img-size", "16", "--workers", "0"]
    plan += ["--mixup", "0", "--hflip", "0.25"]
    write_it = ["distill-store", "write", str(data), store, "--teacher", str(net), *plan]
    assert main(write_it) == 0
    said = capsys.readouterr()
    assert "2 epochs of 24 records: the store will take 928 bytes" in said.err
    assert f"{store}: 2 epochs of 24 records, 928 bytes" in said.out
    assert main(write_it) == 0
    assert "928 bytes, all of it was there" in capsys.readouterr().out
    assert main(["distill-store", "info", store]) == 0
    said = capsys.readouterr().out
    assert f"teacher   {net} (test_resnet, weights " in said and "2 of 2 epochs are whole" in said
    assert "K = 2, 16 bytes" in said and "hflip=0.25" in said and "mixup=0.0" in said
    assert main(["distill-store", "check", str(data), store, "--teacher", str(net)]) == 0
    said = capsys.readouterr().out
    assert "48 records: mean absolute difference" in said and "0.00e+00, different indices" in said
    state = deit_fast.from_pretrained(net, strict=False).state_dict()
    torch.save({"ema": state}, tmp_path / "net.pth")
    taught = ["--teacher", "test_resnet", "--teacher-checkpoint", str(tmp_path / "net.pth")]
    assert main(["distill-store", "check", str(data), store, *taught]) == 2
    taught += ["--teacher-checkpoint-key", "ema"]
    assert main(["distill-store", "check", str(data), store, *taught]) == 0
    assert "0.00e+00, different indices" in capsys.readouterr().out
    small = options_of(**{"workers": 0})
    for name in ("--img-size", "--repeated-aug"):
        small[small.index(name) : small.index(name) + 2] = []
    assert main(["distill-store", "train", str(data), store, "--out", out, *small]) == 0
    assert main(["train", str(data), "--store", store, "--out", out + "2", *small]) == 0
    one, two = (checkpoints.load(Path(o, "checkpoint.pt")) for o in (out, out + "2"))
    assert same(one, two) and one["identity"]["recipe"]["hflip"] == 0.25
    capsys.readouterr()
    assert main(["analyse", "table", out]) == 0
    assert "from a store" in capsys.readouterr().out
    mine = tmp_path / "mine.json"  # gives way to the store
    mine.write_text(json.dumps({"base": "deit", "hflip": 0.1, "mixup": 0.3, "clip_grad": 3.0}))
    own = [*small, "--recipe", str(mine)]
    assert main(["train", str(data), "--store", store, "--out", out + "4", *own]) == 0
    own = checkpoints.load(Path(out + "4", "checkpoint.pt"))["identity"]["recipe"]
    assert (own["hflip"], own["mixup"], own["clip_grad"]) == (0.25, 0.0, 3.0)
    capsys.readouterr()
    other = [*small, "--hflip", "0.5"]
    assert main(["train", str(data), "--store", store, "--out", out + "3", *other]) == 2
    assert "another transform: hflip 0.25, now 0.5" in capsys.readouterr().err
    assert main([*write_it, "--seed", "4"]) == 2
    assert "deit-fast distill-store: out: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["distill-store", "train", str(data), store, "--out", out, "--teacher", "x"])
