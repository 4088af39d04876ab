"""No test is skipped unseen: the helpers' reasons, and --no-skips-but."""

import shutil
import sys
from pathlib import Path

import pytest
import selection
import torch

pytest_plugins = ["pytester"]

SKIPS = """
import pytest, selection
from pathlib import Path

@pytest.mark.gpu("shows what only a GPU can")
def test_on_a_gpu(): pass

@pytest.mark.parametrize("one", [1, 2])
@pytest.mark.parametrize("two", [1, 2])
@selection.where(lambda two, one: two >= one)
@selection.where(lambda one: one < 5)
def test_passes(one, two): assert two >= one
"""
EXTRA = """
@pytest.mark.slow
def test_of_an_extra(): selection.extra("train", "pytest", "no_such_package")
"""
TOOL = """
import pytest, selection
@pytest.mark.slow
def test_by_a_tool(): selection.tool("no-such-a", "no-such-b")
"""
FILE = "import pytest\npytest.skip('windows: not here', allow_module_level=True)\n"
DATA = """
@pytest.fixture(params=["a", "b"])
def images(request): selection.data(Path("absent"), "images")
@pytest.mark.slow
def test_on_data(images): pass
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """files, options -> what pytest said, in a folder with these test files and the plugin."""
    monkeypatch.setenv("PYTHONPATH", str(Path(selection.__file__).parent))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\n")
    folder = pytester.mkdir("tests")
    (folder / "conftest.py").write_text('pytest_plugins = ["selection"]\n')

    def run(files, *options):
        for i, text in enumerate(files):
            (folder / f"test_{i}.py").write_text(text)
        return pytester.runpytest("-p", "no:cacheprovider", *options)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["", "xdist"])
def test_no_skips_but(run, workers):
    files = [SKIPS + EXTRA + DATA, TOOL, FILE]
    done = run(files, *workers, "--no-skips-but=GPU")
    assert done.ret == 1
    said = done.stdout.str().split("skipped, and not allowed to be")[1]
    for line in (
        "tests/test_0.py::test_of_an_extra: extra train: no_such_package is missing, expected pip "
        "install 'deit_fast[train]'",
        "tests/test_0.py::test_on_data[a]: data: no images in absent",
        "tests/test_0.py::test_on_data[b]: data: no images in absent",
        "tests/test_2.py: windows: not here",
        "tests/test_1.py::test_by_a_tool: tool: expected no-such-a or no-such-b",
    ):
        assert said.count(line) == 1, said
    assert "test_on_a_gpu" not in said and "3 passed, 6 skipped" in said
    for words in ("GPU,extra train, data tool windows", "tool GPU ext dat win"):
        done = run(files, *workers, f"--no-skips-but={words}")
        assert done.ret == 0 and "not allowed to be" not in done.stdout.str(), done.stdout.str()


@pytest.mark.slow
def test_no_skips_but_alone(run):
    assert run([SKIPS + EXTRA]).ret == 0
    assert run([SKIPS], "--no-skips-but", "GPU").ret == 0
    for words in ("", "PU"):
        done = run([SKIPS], f"--no-skips-but={words}")
        assert done.ret == 1 and "test_on_a_gpu: GPU: shows what" in done.stdout.str()
    assert run([FILE], "--no-skips-but=GPU").ret == 1  # else 5: nothing ran
    failing = SKIPS + "\ndef test_fails(): assert 0\n"
    assert run([failing], "--no-skips-but=GPU").ret == 1
    assert run(["!"], "--no-skips-but=GPU").ret == 2  # what pytest says of an error stays


MARKS = """
import pytest

@pytest.mark.gpu("real memory")
def test_on_a_gpu(): pass

@pytest.mark.cpu("a chip is simulated")
def test_on_a_cpu(): pass

@pytest.fixture
def device(): return "cpu"

@pytest.fixture
def tensor(device): return [device]

def test_by_way_of_a_fixture(tensor): pass
"""


@pytest.mark.parametrize("on_gpu", [True, False])
def test_marks_say_why(run, monkeypatch, on_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    done = run([MARKS], "-rs")
    assert done.parseoutcomes() == {"passed": 2, "skipped": 1}
    said = "CPU: a chip is simulated" if on_gpu else "GPU: real memory"
    assert f": {said}\n" in done.stdout.str()
    assert run([MARKS], "-m", "device").parseoutcomes() == {"passed": 1, "deselected": 2}
    for wrong in ("gpu", "cpu()", "gpu(reason='said by name')", "cpu(3)"):
        done = run([f"import pytest\n@pytest.mark.{wrong}\ndef test_it(): pass\n"])
        assert done.ret == pytest.ExitCode.USAGE_ERROR
        assert f"test_it: the mark {wrong[:3]} has no reason" in done.stderr.str()


UNMARKED = """
import pytest, selection
from pathlib import Path

@pytest.fixture
def images(): selection.data(Path("/"), "images")

def test_by_way_of_a_fixture(images): pass
def test_of_an_extra(): selection.extra("test", "pytest")
def test_by_a_tool(): selection.tool("sh")

@pytest.mark.slow
def test_marked(images): selection.extra("test", "pytest"), selection.tool("sh")
"""


def test_what_needs_more_is_marked_slow(run):
    """Also where there is all that it needs."""
    done = run([UNMARKED], "-rA")
    assert done.parseoutcomes() == {"passed": 1, "failed": 2, "errors": 1}
    for line in (
        "test_by_way_of_a_fixture needs images: expected the mark slow",
        "test_of_an_extra needs the extra test: expected the mark slow",
        "test_by_a_tool needs sh: expected the mark slow",
    ):
        assert line in done.stdout.str()


@pytest.mark.slow
def test_what_is_there_is_not_skipped(tmp_path, monkeypatch):
    selection.extra("test", "pytest", "xdist")
    selection.data(tmp_path, "folder")
    assert selection.tool("no-such-a", "sh") == shutil.which("sh")
    monkeypatch.setitem(sys.modules, "pytest", None)  # as for a package that is not installed
    with pytest.raises(pytest.skip.Exception, match="extra test: pytest is missing"):
        selection.extra("test", "pytest")
