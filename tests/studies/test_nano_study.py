"""The study of deit_nano_fashion: its page, its commands, and the images it holds out."""

import json
from pathlib import Path

import numpy as np
import pytest

import deit_fast
from deit_fast._argparse import Parser
from deit_fast.cli.parsers import train
from deit_fast.distill.datasets import open_images
from studies import nano_fashion, nano_page, nano_plan

DOCS = Path(__file__).parents[2] / "docs" / "studies"


def study():
    return json.loads((DOCS / "nano_fashion.json").read_text())


def test_the_page_is_what_the_data_says():
    assert (DOCS / "nano_fashion.md").read_text() == nano_page.page(study())


def test_the_study_is_of_the_model_that_is_shipped():
    model = deit_fast.deit_nano_fashion()
    first = study()["runs"][1]
    assert first["run"] == "student-0"
    assert first["parameters"] == sum(p.numel() for p in model.parameters())
    card = Path(deit_fast.__file__).parent / "data" / "deit_nano_fashion" / "README.md"
    text = card.read_text()
    assert f"{first['parameters']:,}" in text
    for split in ("validation", "test"):
        for top1 in first[split].values():
            assert f"{top1:.2f}%" in text


def test_a_page_of_several_seeds_has_each_of_them():
    one = study()
    one["runs"], one["seeds"] = one["runs"][:2], [0]
    three = one | {"runs": [*one["runs"], *one["runs"][1:], *one["runs"][1:]], "seeds": [0, 1, 2]}
    pages = [nano_page.page(found) for found in (one, three)]
    assert "each seed |" not in pages[0] and "1 seed," in pages[0]
    assert "± 0.00" in pages[1] and "3 seeds," in pages[1]
    top1 = f"{one['runs'][1]['test']['joint']:.2f}"
    assert f"| {top1}, {top1}, {top1} |" in pages[1]


def test_the_commands_are_commands():
    parser = Parser()
    train.add_arguments(parser)
    found = []
    for name, command in nano_plan.commands(Path("runs"), [0, 1], quick=False):
        assert command[: len(nano_plan.PARALLEL)] == nano_plan.PARALLEL
        args = parser.parse_args(command[len(nano_plan.PARALLEL) :])
        assert args.out == Path("runs", name)
        found.append(args)
    teacher, *students = found
    assert teacher.teacher is None and [args.seed for args in students] == [0, 1]
    assert {args.teacher for args in students} == {str(teacher.out / "model")}
    for args in students:
        args.seed = args.out = None
    assert vars(students[0]) == vars(students[1])


@pytest.fixture
def data(tmp_path):
    """IDX files of twelve images of each of two classes, each of one grey."""
    labels = np.arange(24, dtype=np.uint8) % 2
    pixels = np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None, None], (24, 4, 4))
    for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
        sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
        content = bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()
        (tmp_path / f"train-{name}-ubyte").write_bytes(content)
    return tmp_path


def test_what_is_held_out_is_not_trained_on(data, monkeypatch):
    monkeypatch.setattr(nano_fashion, "HELD_OUT", 3)
    nano_fashion.hold_out(data, data / "parts")
    parts = [open_images(str(data / "parts"), split) for split in ("train", "validation")]
    greys = [part.pixels[:, 0, 0].tolist() for part in parts]
    assert sorted(greys[0] + greys[1]) == list(range(24))
    for part, each in zip(parts, (9, 3), strict=True):
        assert np.bincount(part.labels).tolist() == [each, each]
        assert (part.pixels[:, 0, 0] % 2 == part.labels).all()
    before = (data / "parts" / "t10k-images-idx3-ubyte").read_bytes()
    nano_fashion.hold_out(data, data / "parts")
    assert (data / "parts" / "t10k-images-idx3-ubyte").read_bytes() == before
