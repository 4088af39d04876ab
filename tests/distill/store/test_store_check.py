"""`check`, which asks the teacher again; and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import APART, BF16, assert_at_most
from small_runs import options_of, same
from small_stores import BLOCK

import deit_fast
from deit_fast.cli import main
from deit_fast.distill import checkpoints
from deit_fast.distill.store import Store, check
from deit_fast.distill.store.format import checksum


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
    content[64 + 6 * 16 : 64 + BLOCK] = checksum(
        bytes(content[:64]), 0, bytes(content[64 : 64 + 6 * 16])
    ).to_bytes(4, "little")
    path.write_bytes(content)
    store.verify(2)
    found = check(data, copy, net)
    change = float(was) - float(was - np.float16(0.25))
    assert found["mean_difference"] == pytest.approx(change / 144)
    assert found["different_indices"] == pytest.approx(2 / 144)


def test_the_store_command(data, net, tmp_path, capsys):
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
    assert main(["distill-store", "info", store, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["whole"], found["damaged"], found["epochs"], found["bytes"]) == (True, {}, 2, 928)
    assert found["transform"]["hflip"] == 0.25 and len(found["key"]) == 32
    check = ["distill-store", "check", str(data), store, "--teacher", str(net)]
    assert main([*check, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {"records": 48, "mean_difference": 0.0, "different_indices": 0.0}
    assert main(check) == 0
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
    assert "soft-label store" in capsys.readouterr().out
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
