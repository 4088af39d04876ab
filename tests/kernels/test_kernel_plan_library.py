"""The library of launch plans: built once, and what is said where it can't be."""

import os
import subprocess
import sys
import threading

import pytest
import selection
import torch

from deit_fast.kernels import _plan_library as library


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As in a process that has not asked for it, with an empty cache."""
    monkeypatch.setenv("DEIT_FAST_CACHE", str(tmp_path))
    for name, value in {"WANTED": "", "loaded": None, "_why_not": None, "_build": None}.items():
        monkeypatch.setattr(library, name, value)
    return tmp_path


def without_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.mark.slow
def test_it_is_built_once(fresh):
    selection.compiler()
    assert library.status() == "to be built at the first call on a GPU"
    assert library.library() is None and library.status() == "being built"
    assert library.wait() is library.library() is library.loaded
    assert library.status() == "ready"
    (built,) = (fresh / "plans").glob("*.so")
    assert torch.__version__ in built.name
    before = built.stat().st_mtime_ns
    assert library.build() == built and built.stat().st_mtime_ns == before
    library.loaded = library._build = None
    assert library.status() == "built"  # as another process says


def compiler(folder, monkeypatch, script):
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return path


def test_processes_that_build_at_once_wait_for_one(fresh, monkeypatch):
    log = fresh / "log"
    script = f'echo >> {log}; sleep 0.3; while [ "$1" != -o ]; do shift; done; echo built > $2'
    compiler(fresh, monkeypatch, script)
    monkeypatch.setattr(library, "why_not_buildable", lambda: None)
    found = []
    threads = [threading.Thread(target=lambda: found.append(library.build())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and len(set(found)) == 1 and found[0].read_text() == "built\n"
    assert log.read_text() == "\n"


def test_without_a_compiler_python_serves(fresh, monkeypatch):
    without_compiler(monkeypatch)
    why = "there is no C++ compiler 'no-such-compiler'; install one, or name one in CXX"
    assert library.status() == f"none: {why}"
    assert library.wait() is None and library.library() is None
    assert library.status() == f"none: {why}"


def test_a_compiler_that_fails_is_named(fresh, monkeypatch):
    path = compiler(fresh, monkeypatch, "echo first >&2; echo disk full >&2; exit 1")
    monkeypatch.setattr(library, "why_not_buildable", lambda: None)
    assert library.wait() is None
    assert library.status() == f"none: {path} failed: disk full"


def test_a_folder_that_cannot_be_written(fresh, monkeypatch):
    (fresh / "plans").write_text("a file")
    monkeypatch.setattr(library, "why_not_buildable", lambda: None)
    assert library.wait() is None and "plans" in library.status()


def test_plans_that_are_wanted_are_not_left_out_in_silence(fresh, monkeypatch):
    without_compiler(monkeypatch)
    monkeypatch.setattr(library, "WANTED", "1")
    with pytest.raises(RuntimeError, match="DEIT_FAST_PLANS is 1, but there are no launch plans"):
        library.library()


@pytest.mark.parametrize("missing", ["linux", "triton"])
def test_what_it_needs(monkeypatch, missing):
    if missing == "linux":
        monkeypatch.setattr(sys, "platform", "win32")
    else:
        monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    expected = {"linux": "plans need Linux", "triton": "Triton is not installed"}
    assert library.why_not_buildable() == expected[missing]


def started(value, code):
    env = os.environ | {"DEIT_FAST_PLANS": value}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_the_environment_variable():
    done = started("yes", "import deit_fast.kernels")
    assert "DEIT_FAST_PLANS: 'yes', expected 0, 1 or nothing" in done.stderr
    code = "from deit_fast.kernels import _plan_library as p; print(p.wait(), p.status())"
    assert started("0", code).stdout == "None none: DEIT_FAST_PLANS is 0\n"
