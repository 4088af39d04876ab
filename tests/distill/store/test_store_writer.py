"""Writers that are killed, interrupted or not alone."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading

import forked
import killed_writer
import numpy as np
import pytest
import torch
from checking import APART, FP32, assert_close, assert_within
from small_runs import options_of
from small_stores import (
    BLOCK,
    epoch_files,
    write_module,
    write_store,
)

from deit_fast.cli import main
from deit_fast.distill import checkpoints, run_folder
from deit_fast.distill.interrupt import Interrupted
from deit_fast.distill.store import Damaged, Store
from deit_fast.distill.store.writer import Writer


@pytest.mark.slow
def test_a_writer_killed_again_and_again(data, net, tmp_path):
    """kill -9 at random moments: nothing is lost, doubled or torn, and the files are those of a
    writer that was never killed."""
    out = tmp_path / "killed"
    script = [sys.executable, killed_writer.__file__, data, net, out, "5", "0"]
    ended = subprocess.run(list(map(str, script)), capture_output=True, text=True, timeout=300)
    lines = [tuple(map(int, line.split())) for line in ended.stdout.splitlines()]
    assert [code for code, _ in lines] == [-signal.SIGKILL] * 5 + [0], ended.stdout + ended.stderr
    sizes = [size for _, size in lines]
    assert sizes == sorted(sizes) and len(set(sizes)) > 3  # it was killed at different places
    write_store(data, tmp_path / "whole", net, **killed_writer.PLAN)
    assert epoch_files(out) == epoch_files(tmp_path / "whole")


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
    write_store(data, copy, net, report=events.append)
    assert epoch_files(copy) == epoch_files(whole)
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
    write_store(data, copy, net, report=lambda e: notes.append(e.get("text")))
    assert epoch_files(copy) == epoch_files(whole)
    assert any(text and "goes on behind its first 6 records" in text for text in notes)


def test_another_order_is_not_gone_on_with(data, net, whole, copy, monkeypatch):
    """As another version of numpy may draw it: images would be lost and doubled."""
    path = copy / "epoch-0001-rank-0-of-1.records"
    content = path.read_bytes()[: 64 + 2 * BLOCK]
    path.unlink()
    path.with_suffix(".part").write_bytes(content)
    order_of = write_module.order_of
    for at, named in ((0, "index"), (1, "seed")):

        def other(*args, at=at):
            drawn = list(order_of(*args))
            drawn[at] = drawn[at][::-1].copy()
            return drawn

        monkeypatch.setattr(write_module, "order_of", other)
        with pytest.raises(ValueError, match=rf"\.part: {named} of records 0 to 5 is not what is"):
            write_store(data, copy, net)
    assert path.with_suffix(".part").read_bytes() == content


def test_a_signal_stops_it_between_blocks(data, net, whole, tmp_path):
    def report(event):
        if (event["event"], event.get("epoch"), event.get("written")) == ("update", 1, 12):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="epoch 2 of 3, record 12") as caught:
        write_store(data, tmp_path, net, report=report)
    assert caught.value.number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    write_store(data, tmp_path, net)
    assert epoch_files(tmp_path) == epoch_files(whole)


def test_two_writers_do_not_share_a_folder(data, net, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0)

    def report(event):
        write_store(data, tmp_path, net)

    with pytest.raises(ValueError, match="another run writes into"):
        write_store(data, tmp_path, net, report=report)


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
        monkeypatch.setattr(run_folder, "PATIENCE", 0.2)
        with pytest.raises(
            ValueError, match=r"another process writes into .*0001-rank-0-of-1.part"
        ):
            write_store(data, copy, net)
        assert part.read_bytes() == content
        monkeypatch.setattr(run_folder, "PATIENCE", 60)
        threading.Timer(1, lambda: fcntl.flock(held, fcntl.LOCK_UN)).start()
        write_store(data, copy, net)
    assert epoch_files(copy) == epoch_files(whole)


def test_a_file_that_changed_is_not_sealed(whole, copy):
    path = copy / "epoch-0001-rank-0-of-1.records"
    part = path.with_suffix(".part")
    path.rename(part)
    writer = Writer(copy, Store(copy).manifest, 1, 0)
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
    write_store(data, copy, net, report=lambda e: notes.append(e.get("text")))
    assert epoch_files(copy) == epoch_files(whole)
    assert any(text and "header is all zeros: goes on behind its first 0" in text for text in notes)


@pytest.mark.slow
def test_two_ranks_write_and_train(data, net, whole, tmp_path):
    """Two processes write what one does, each its half, and train as one does. They have the
    variables that torchrun gives them; tests/distill/test_run.py has torchrun itself."""
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
    assert sorted(epoch_files(two)) == [
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
