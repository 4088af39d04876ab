"""What a checkpoint may hold beside tensors, what is refused by name, and that nothing runs."""

import argparse
import collections
import datetime
import decimal
import fractions
import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tarfile
import time
import types
import typing
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import selection
import timm
import torch
from checking import assert_equal, seeded

from deit_fast.checkpoint import allowed, read_checkpoint

STATE = {"weight": torch.arange(3.0)}


def write(path, content, form):
    """As torch.save did from 1.6 on, as before, or as a bare pickle."""
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, 2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


def refusal(path):
    with pytest.raises(ValueError, match=path.name) as error:
        read_checkpoint(path)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# What is beside the tensors

ANYTHING = {
    "arguments": argparse.Namespace(lr=5e-4, output_dir=pathlib.Path("runs/a"), betas=(0.9, 0.95)),
    "nested": argparse.Namespace(model=argparse.Namespace(depth=12)),
    "simple": types.SimpleNamespace(lr=1.0),
    "numbers": [np.float32(1), np.float64(2), np.int64(3), np.bool_(True), np.str_("a")],
    "dtypes": [np.dtype("float32"), np.dtype([("a", "i4")])],
    "arrays": [np.arange(3), np.random.RandomState(0).get_state()],
    "ordered": collections.OrderedDict(a=1),
    "counts": collections.Counter("aab"),
    "defaults": collections.defaultdict(list, {"loss": [1.0]}),
    "window": collections.deque([1.0, 2.0], maxlen=20),
    "paths": [pathlib.Path("a/b"), pathlib.PureWindowsPath("c:/d"), pathlib.PurePosixPath("/e")],
    "dates": [
        datetime.datetime(2021, 1, 15, tzinfo=datetime.timezone.utc), datetime.date(2021, 1, 15),
        datetime.time(1), datetime.timedelta(hours=53),
    ],
    "exact": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), uuid.UUID(int=1)],
    "sets": [{1, 2}, frozenset({3}), (4, 5), slice(6), range(7)],
    "bytes": [b"", b"a", bytearray(b"b")],
    "torch": [torch.Size([1]), torch.float16, torch.device("cpu"), torch.strided],
    "types": [int, float, bool, str, list, dict, typing.Any],
}  # fmt: skip


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", ANYTHING)
def test_what_trainers_save_beside_the_tensors(name, form, tmp_path):
    content = {"model": STATE, "args": ANYTHING[name], "by key": {form: ANYTHING[name]}}
    state = read_checkpoint(write(tmp_path / "a.pth", content, form))
    assert list(state) == ["weight"] and torch.equal(state["weight"], STATE["weight"])


class Elsewhere:
    """What another program's class leaves in a pickle, once it has that class's name."""

    def __reduce__(self):
        return Elsewhere, ("a", "b"), {"c": 1}


def rename(path, module, name):
    here = f"c{Elsewhere.__module__}\nElsewhere\n".encode()
    whole = path.read_bytes()
    assert here in whole
    path.write_bytes(whole.replace(here, f"c{module}\n{name}\n".encode()))
    return path


@pytest.mark.parametrize(
    "module, name",
    [
        ("pathlib", "WindowsPath"), ("pathlib._local", "PosixPath"), ("numpy", "dtype"),
        ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
        ("omegaconf.dictconfig", "DictConfig"), ("omegaconf.listconfig", "ListConfig"),
        ("omegaconf.base", "ContainerMetadata"), ("omegaconf.nodes", "AnyNode"),
        ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ],
)  # fmt: skip
def test_classes_that_need_not_be_installed(module, name, tmp_path):
    content = {"model": STATE, "config": Elsewhere(), Elsewhere: "as a key"}
    path = rename(write(tmp_path / "a.pth", content, "legacy"), module, name)
    assert_equal(read_checkpoint(path)["weight"], STATE["weight"])


def test_a_state_dict_of_another_kind_of_dict(tmp_path):
    content = {"state_dict": collections.defaultdict(torch.Tensor, STATE)}
    path = rename(write(tmp_path / "a.pth", content | {"x": Elsewhere()}, "legacy"), "uuid", "UUID")
    assert_equal(read_checkpoint(path)["weight"], STATE["weight"])


# What is refused


class Calls:
    """Unpickled, it is what `function` returns."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Config:
    """A class of the training code, whose state is set by a method of its own."""

    def __setstate__(self, state):
        pathlib.Path(state["ran"]).touch()


def configured(ran):
    config = Config()
    config.ran = str(ran)
    return config


def runs(ran):
    return Calls(os.system, f"touch {ran}")


def saved(ran):
    buffer = io.BytesIO()
    torch.save(runs(ran), buffer)
    buffer.seek(0)
    return buffer


# What runs when it is unpickled, and by what name it is refused
HOSTILE = {
    "shell": (runs, "posix.system"),
    "process": (
        lambda ran: Calls(subprocess.Popen, ["touch", str(ran)]), "(commands|subprocess).Popen"
    ),
    "eval": (lambda ran: Calls(eval, f"open({str(ran)!r}, 'w')"), "builtins.eval"),
    "exec": (lambda ran: Calls(exec, f"open({str(ran)!r}, 'w')"), "builtins.exec"),
    "open": (lambda ran: Calls(open, str(ran), "w"), "_?io.open"),
    "import": (lambda ran: Calls(importlib.import_module, "this"), "importlib.import_module"),
    "method": (lambda ran: Calls(pathlib.Path(ran).touch), "builtins.getattr"),
    "partial": (
        lambda ran: Calls(functools.partial(pathlib.Path.touch, ran)), "functools.partial"
    ),
    "attrgetter": (
        lambda ran: Calls(operator.methodcaller("touch"), ran), "operator.methodcaller"
    ),
    "map": (lambda ran: Calls(list, Calls(map, pathlib.Path.touch, [ran])), "builtins.map"),
    "pickle": (lambda ran: Calls(pickle.loads, pickle.dumps(runs(ran))), "pickle.loads"),
    "torch.load": (
        lambda ran: Calls(torch.load, saved(ran)), "torch.serialization.load"
    ),
    "storage": (
        lambda ran: Calls(torch.storage._load_from_bytes, saved(ran).getvalue()),
        "torch.storage._load_from_bytes",
    ),
    "training code": (configured, "test_checkpoint_pickles.Config"),
}  # fmt: skip
PLACES = {
    "alone": lambda it: it,
    "as weights": lambda it: {"model": it},
    "as a weight": lambda it: {"model": STATE | {"bias": it}},
    "beside": lambda it: {"model": STATE, "epoch": it},
    "attribute": lambda it: {"model": STATE, "args": argparse.Namespace(lr=1.0, then=it)},
    "deep": lambda it: {"model": STATE, "args": argparse.Namespace(a=argparse.Namespace(b=[it]))},
    "ordered": lambda it: collections.OrderedDict(STATE, then=it),
}


# a bare pickle's tensors are refused for themselves
@selection.where(lambda place, form: form != "pickle" or place in ("alone", "as weights"))
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_that_runs_is_run(name, place, form, tmp_path, capfd):
    make, refused = HOSTILE[name]
    path = write(tmp_path / "a.pth", PLACES[place](make(tmp_path / "ran")), form)
    assert re.search(f"tensors: {refused} is refused, and nothing .* was run", refusal(path))
    assert not (tmp_path / "ran").exists() and capfd.readouterr().out == ""


@pytest.mark.parametrize("name", HOSTILE)
def test_these_do_run_elsewhere(name, tmp_path, capfd, monkeypatch):
    """Else the test above would show nothing."""
    monkeypatch.delitem(sys.modules, "this", raising=False)
    made = HOSTILE[name][0](tmp_path / "ran")
    if name == "torch.load":
        made = Calls(functools.partial(torch.load, weights_only=False), *made.call[1])
    found = pickle.loads(pickle.dumps(made, 2))
    if name == "process":
        found.wait()
    assert (tmp_path / "ran").exists() or "Zen of Python" in capfd.readouterr().out


@pytest.mark.parametrize(
    "module, name",
    [
        ("__main__", "TrainConfig"), ("utils", "EasyDict"), ("easydict", "EasyDict"),
        ("omegaconf.omegaconf", "OmegaConf"), ("numpy", "load"), ("torch.hub", "load"),
        ("argparse", "Namespace.__init__"), ("builtins", "__import__"), ("pathlib", "os.system"),
    ],
)  # fmt: skip
def test_other_classes_are_refused_by_name(module, name, tmp_path):
    path = write(tmp_path / "a.pth", {"model": STATE, "config": Elsewhere()}, "legacy")
    message = refusal(rename(path, module, name))
    assert (
        f"{module}.{name} is refused" in message
        and "torch.save(model.state_dict(), FILE)" in message
    )


def test_a_whole_model_is_refused_by_the_name_of_its_class(tmp_path):
    model = timm.create_model("test_vit")
    assert "timm.models.vision_transformer.VisionTransformer is refused" in refusal(
        write(tmp_path / "a.pth", model, "zip")
    )


def test_names_cannot_speak_to_the_terminal(tmp_path):
    path = write(tmp_path / "a.pth", {"model": STATE, "config": Elsewhere()}, "legacy")
    message = refusal(rename(path, "a\x1b[2J", "b" * 200))
    assert "a\\x1b[2J.bbb" in message and len(message) < 400


STAND_IN = b"cargparse\nNamespace\n"
TRICKS = {
    "getattr of an import": b"cbuiltins\ngetattr\n(cimportlib\nimport_module\n(X\x02\0\0\0ostR"
    b"X\x06\0\0\0systemtR(X\x04\0\0\0truetR.",
    "call a string": b"X\x09\0\0\0os.system(tR.",
    "state of a class": STAND_IN + b"}X\x0c\0\0\0__setstate__" + STAND_IN + b"sb.",
    "attributes of a class": STAND_IN + b"N}X\x07\0\0\0__new__Ns\x86b.",
    "items of an object": STAND_IN + b")\x81X\x01\0\0\0aNs.",
    "appended to an object": STAND_IN + b")\x81Na.",
    "a new function": b"ccollections\ndefaultdict\n)\x81.",
    "a call the old way": b"(X\x04\0\0\0trueios\nsystem\n.",
    "names from the stack": b"\x8c\x02os\x8c\x06system\x93.",
    "an extension": b"\x82\x01.",
    "a persistent name": b"Pstorage\n.",
}


@pytest.mark.parametrize("trick", TRICKS)
def test_tricks_with_what_is_allowed(trick, tmp_path):
    before = dict(vars(allowed.Ignored))
    (tmp_path / "a.pth").write_bytes(b"\x80\x02" + TRICKS[trick])
    refusal(tmp_path / "a.pth")
    assert dict(vars(allowed.Ignored)) == before


def test_stand_ins_keep_nothing():
    made = allowed.Ignored("a", 2)
    made.__setstate__({"__class__": int, "a": 1})
    assert type(made) is allowed.Ignored and vars(made) == {}


def test_dicts_that_hold_themselves_and_dicts_without_end(tmp_path):
    loop = {"epoch": 1}
    loop |= {"model": loop, "state_dict": loop} | {f"entry {i}": loop for i in range(1000)}
    assert "holds no state dict" in refusal(write(tmp_path / "a.pth", loop, "zip"))
    loop = {"ema": STATE}
    loop["model"] = loop
    assert "one of 'ema' (1 tensor)" in refusal(write(tmp_path / "a.pth", loop, "zip"))
    deep = b"}X\x05\0\0\0model" * 10_000 + b"N" + b"s" * 10_000
    (tmp_path / "b.pth").write_bytes(b"\x80\x02" + deep + b".")
    refusal(tmp_path / "b.pth")
    within = {"a": {"b": {"c": STATE}}, "loop": loop}
    state = read_checkpoint(write(tmp_path / "c.pth", within, "zip"), "a.b.c")
    assert_equal(state["weight"], STATE["weight"])


def test_what_the_program_allows_is_left_as_it_was(tmp_path):
    path = write(tmp_path / "a.pth", {"model": STATE, "args": argparse.Namespace()}, "zip")
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = set(torch.serialization.get_safe_globals())
        read_checkpoint(path)
        assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_threads_do_not_forbid_each_other(tmp_path, monkeypatch):
    path = write(tmp_path / "a.pth", {"model": STATE, "args": argparse.Namespace()}, "zip")
    real, waits = torch.load, iter((0.05, 0.2))

    def late(*args, **kwargs):
        time.sleep(next(waits))
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "load", late)
    with ThreadPoolExecutor(2) as threads:
        states = list(threads.map(read_checkpoint, [path, path]))
    assert [list(state) for state in states] == [["weight"]] * 2


# What is no checkpoint


def test_damaged_files_never_escape_as_another_error(tmp_path):
    """Pickles of random bytes: the unpickler runs them and stumbles in every way it knows."""
    generator = torch.Generator().manual_seed(seeded(0))
    path = tmp_path / "damaged.pth"
    for length in range(1, 400):
        junk = torch.randint(0, 256, (length % 40 + 1,), generator=generator).tolist()
        path.write_bytes(b"\x80\x02" + bytes(junk))
        with pytest.raises(ValueError, match="damaged.pth") as error:
            read_checkpoint(path)
        assert len(str(error.value).splitlines()) == 1


def test_files_that_are_no_checkpoint(tmp_path):
    whole = write(tmp_path / "whole.pth", {"model": STATE}, "zip").read_bytes()
    buffer = io.BytesIO()
    torch.save({"model": {}}, buffer)
    files = {
        "truncated.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": b"not a checkpoint at all",
        "truncated.safetensors": b"\x10\0\0\0\0\0\0\0{}",
        "empty_model.pth": buffer.getvalue(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            read_checkpoint(tmp_path / name)
        assert len(str(error.value).splitlines()) == 1, name
    with pytest.raises(FileNotFoundError, match="no file"):
        read_checkpoint(tmp_path / "absent.pth")


def test_forms_that_are_not_read_are_named(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    assert "is a TorchScript archive" in refusal(tmp_path / "script.pt")
    with tarfile.open(tmp_path / "old.pth", "w") as tar:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert "is in torch's tar format of 2016" in refusal(tmp_path / "old.pth")
    (tmp_path / "new.pth").write_bytes(pickle.dumps({"model": {}}, 4))
    assert "in another pickle protocol than torch.save's own, 2" in refusal(tmp_path / "new.pth")
