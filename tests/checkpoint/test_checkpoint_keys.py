"""Which entry of a checkpoint: `checkpoint_key`, and the commands' options for it."""

import json

import pytest
import safetensors.torch
import timm
import torch
from checking import assert_equal
from modelling import randomize
from small_runs import MODEL_ARGS, image_folders, options_of, settings
from torch import nn

import deit_fast
from deit_fast.checkpoint import read_checkpoint
from deit_fast.cli import main
from deit_fast.distill import recipe
from deit_fast.distill.student import build_student
from deit_fast.distill.teacher import load_teacher

CAT = str(deit_fast.__path__[0]) + "/data/cat.jpg"


def tensors(value, count=2):
    return {f"{name}.weight": torch.full((1,), value) for name in "abcdefgh"[:count]}


SEVERAL = {
    "model": tensors(1.0), "model_ema": tensors(2.0), "epoch": 3, "args": {"model": "deit"},
    "optimizer": {"state": {0: {"exp_avg": torch.zeros(1)}}, "param_groups": []},
    "scores": {"a.ckpt": torch.tensor(0.5), "b.ckpt": torch.tensor(0.6)},  # no network
    "deep": {"er": {"and": {"deeper": tensors(7.0)}}},  # found by its key alone
    "nets": {"a": {"state_dict": tensors(3.0)}, "b": {"model": tensors(4.0, 3)}},
    "flat": {f"{net}.{k}": t for net, v in (("student", 5.0), ("teacher", 6.0))
             for k, t in tensors(v).items()},
}  # fmt: skip


@pytest.mark.parametrize(
    "key, value",
    [
        (None, 1.0), ("model", 1.0), ("model_ema", 2.0), ("nets.a", 3.0), ("nets.b.model", 4.0),
        ("flat.student", 5.0), ("flat.teacher", 6.0), ("deep.er.and.deeper", 7.0),
    ],
)  # fmt: skip
def test_entries_by_key(key, value, tmp_path):
    torch.save(SEVERAL, tmp_path / "a.pth")
    state = read_checkpoint(tmp_path / "a.pth", key)
    assert state.keys() == tensors(value, len(state)).keys()
    assert all(t.item() == value for t in state.values())


def problem(content, path, key=None):
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as error:
        read_checkpoint(path, key)
    message = str(error.value)
    assert message.startswith(f"checkpoint: {path} ") and len(message.splitlines()) == 1
    return message.removeprefix(f"checkpoint: {path} ")


def test_entries_that_are_not_there_or_not_the_only_one(tmp_path):
    path = tmp_path / "a.pth"
    listed = (
        "expected as checkpoint_key one of 'nets.b.model' (3 tensors), 'model' (2 tensors), "
        "'model_ema' (2 tensors), 'flat.student' (2 tensors), 'flat.teacher' (2 tensors), "
        "'nets.a.state_dict' (2 tensors)"
    )
    for key in ("ema", "epoch", "args", "optimizer", "nets", "model.a.weight", "nets.c", "", "."):
        message = problem(SEVERAL, path, key)
        assert message == f"has no state dict at {key!r}, {listed}"
    assert problem(SEVERAL, path, "flat") == f"holds several networks, {listed}"
    two = {"model": tensors(1.0), "state_dict": tensors(2.0)}
    assert problem(two, path) == (
        "holds no state dict in a usual place, or several, expected as checkpoint_key one of "
        "'model' (2 tensors), 'state_dict' (2 tensors)"
    )
    unusual = {"net": tensors(1.0, 1), "epoch": 1}
    assert problem(unusual, path).endswith("expected as checkpoint_key one of 'net' (1 tensor)")
    assert problem({"epoch": 1}, path, "net") == "holds no state dict (names with tensors)"
    alone = tmp_path / "a.safetensors"
    assert problem(tensors(1.0), alone, "model_ema") == (
        "has no state dict at 'model_ema', for it is a single state dict: leave checkpoint_key out"
    )


def test_networks_beside_each_other_are_never_mixed(tmp_path):
    """Lightning's module with parameters of a loss, a student with its teacher, and averages."""
    path = tmp_path / "a.safetensors"
    for others, listed in (
        ({"loss.weight": torch.ones(1)}, "'model' (2 tensors), 'loss' (1 tensor)"),
        ({"scale": torch.ones(1)}, "'model' (2 tensors), 'scale' (1 tensor)"),
        ({"teacher.a.weight": torch.ones(1)}, "'model' (2 tensors), 'teacher' (1 tensor)"),
    ):
        content = {f"model.{k}": t for k, t in tensors(1.0).items()} | others
        message = problem(content, path)
        assert message == f"holds several networks, expected as checkpoint_key one of {listed}"
        assert read_checkpoint(path, "model").keys() == tensors(1.0).keys()
    content = {f"_orig_mod.{k}": t for k, t in content.items()}
    assert problem(content, path).endswith("of 'model' (2 tensors), 'teacher' (1 tensor)")
    assert read_checkpoint(path, "model").keys() == tensors(1.0).keys()
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1))
    assert "'model_ema.module' (2 tensors), 'model_ema.n_averaged' (1 tensor)" in problem(
        {"model": tensors(1.0), "model_ema": averaged.state_dict()}, tmp_path / "a.pth", "model_ema"
    )
    state = read_checkpoint(tmp_path / "a.pth", "model_ema.module")
    assert_equal(state["weight"], averaged.module.weight)


# From whoever calls


@pytest.fixture
def two(tmp_path):
    """A file with a model and an average, and their weights by key."""
    build = {"img_size": 16, "num_classes": 3} | MODEL_ARGS
    models = {
        key: randomize(timm.create_model("deit_tiny_patch16_224", **build), seed=number)
        for number, key in enumerate(("model", "model_ema"))
    }
    state = {key: model.state_dict() for key, model in models.items()}
    torch.save(state | {"epoch": 1}, tmp_path / "two.pth")
    return tmp_path / "two.pth", build, state


@pytest.mark.parametrize("key", [None, "model", "model_ema"])
def test_the_key_reaches_the_file(key, two, tmp_path):
    path, build, state = two
    expected = state[key or "model"]
    image_folders(tmp_path / "data", each=1)
    built = settings(
        tmp_path / "data", "deit_tiny", MODEL_ARGS, start=str(path), start_key=key, img_size=16
    )
    _, _, started = build_student(built, recipe.load("deit", drop_path=0.0))
    for model in (
        deit_fast.create_model("deit_tiny", checkpoint=path, checkpoint_key=key, **build),
        deit_fast.deit_tiny(checkpoint=path, checkpoint_key=key, **build),
        started,
    ):
        assert_equal(dict(model.state_dict()), dict(expected))


@pytest.mark.parametrize("key", [None, "model", "model_ema"])
def test_teachers_by_key(key, tmp_path):
    nets = {
        name: timm.create_model("test_resnet", num_classes=3) for name in ("model", "model_ema")
    }
    torch.save({name: net.state_dict() for name, net in nets.items()}, tmp_path / "a.pth")
    loaded = load_teacher("test_resnet", 3, 32, tmp_path / "a.pth", checkpoint_key=key)
    assert_equal(loaded.fc.weight, nets[key or "model"].fc.weight)


def test_a_key_without_a_file(tmp_path, two):
    image_folders(tmp_path / "data", each=1)
    deit_fast.save_pretrained(deit_fast.deit_tiny(**two[1]), tmp_path / "folder")
    with pytest.raises(ValueError, match="checkpoint_key: 'ema', but no checkpoint"):
        deit_fast.deit_tiny(checkpoint_key="ema")
    with pytest.raises(ValueError, match="teacher: checkpoint_key 'ema', but no checkpoint"):
        load_teacher("deit_tiny", 3, 32, checkpoint_key="ema")
    for start in (None, "pretrained", str(tmp_path / "folder")):
        chosen = settings(tmp_path / "data", "deit_tiny", start=start, start_key="ema")
        with pytest.raises(ValueError, match="start_key: 'ema', but no checkpoint file"):
            build_student(chosen, recipe.load("deit"))
    with pytest.raises(ValueError, match="model_args: checkpoint_key is decided by start_key"):
        settings(tmp_path / "data", model_args={"checkpoint_key": "ema"})


COMMANDS = {
    "classify": ["classify", "--model", "deit_tiny", CAT],
    "eval": ["eval", "DATA", "--model", "deit_tiny"],
    "export": ["export", "deit_tiny", "--format", "torch-export", "--out", "a.pt2"],
    "quantize": ["quantize", "deit_tiny"],
    "tokens": ["analyse", "tokens", "DATA", "--model", "deit_tiny_distilled"],
    "start": ["train", "DATA", "--out", "out", *options_of(workers=0)],
    "teacher": ["train", "DATA", "--out", "out", *options_of(workers=0, teacher="test_resnet")],
    "store": ["distill-store", "write", "DATA", "out", "--teacher", "test_resnet", "--epochs", "1",
              "--k", "1", "--workers", "0"],
}  # fmt: skip
OPTIONS = {"start": "--from", "teacher": "--teacher-checkpoint", "store": "--teacher-checkpoint"}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_a_key(name, two, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folders(tmp_path / "DATA")
    option = OPTIONS.get(name, "--checkpoint")
    key = f"{option}-key"
    assert main([*COMMANDS[name], option, str(two[0]), key, "ema"]) == 2
    message = capsys.readouterr().err
    assert "has no state dict at 'ema', expected as checkpoint_key one of 'model' (" in message
    assert main([*COMMANDS[name], key, "ema"]) == 2
    assert "'ema', but no checkpoint" in capsys.readouterr().err


def test_classify_by_the_entry_that_was_asked_for(tmp_path, capsys):
    model = randomize(deit_fast.deit_tiny()).eval()
    ema = {name: -t for name, t in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "model_ema": ema}, tmp_path / "a.pth")
    command = ["classify", "--model", "deit_tiny", "--json", "--topk", "1", CAT, "--checkpoint"]
    scores = {}
    for key in ("model", "model_ema"):
        assert main([*command, str(tmp_path / "a.pth"), "--checkpoint-key", key]) == 0
        scores[key] = json.loads(capsys.readouterr().out)[0]["predictions"][0]
    assert main([*command, str(tmp_path / "a.pth")]) == 0
    assert json.loads(capsys.readouterr().out)[0]["predictions"] == [scores["model"]]
    assert scores["model"] != scores["model_ema"]
    deit_fast.save_pretrained(model, tmp_path / "folder")
    command[2] = str(tmp_path / "folder")
    assert main([*command[:-1], "--checkpoint-key", "model"]) == 2
    assert "expected neither --checkpoint nor --checkpoint-key nor" in capsys.readouterr().err
