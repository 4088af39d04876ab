"""Which tests run on a machine, and how the others say why not. A pytest plugin, and helpers.

    extra("train", "datasets")      in a test or a fixture: skipped where the package, the program
    tool("chromium")                or the data set is missing, for a reason that begins with
    data(folder, "Fashion-MNIST")   "extra train", "tool" or "data"
    compiler()                      of C and C++: for Inductor, and for libraries of the tests' own

    @where(lambda dtype, case: ...)     only these of a parametrised test's cases are tests

    @pytest.mark.gpu("what only a GPU shows")       skipped on the other machines, for that reason
    @pytest.mark.cpu("what only a CPU shows")       after "GPU: " or "CPU: "; none is an error
    pytest -m device                                the tests whose tensors are on the device

    pytest --no-skips-but="GPU tool"    fails if a test was skipped for a reason that begins with
                                        none of these words; --no-skips-but= if any was skipped

A test that calls one of the first four is marked slow, and fails without that mark: the default
run needs no more than what pip install '.[test]' brings, also where all is installed.
"""

import inspect
import os
import shutil
from importlib.util import find_spec

import pytest
import torch

_running = []  # the test that runs; more than one where a test runs pytest in its process


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.pop()


def _must_be_slow(what):
    if _running and not _running[-1].get_closest_marker("slow"):
        pytest.fail(f"{_running[-1].name} needs {what}: expected the mark slow", pytrace=False)


def extra(name, *packages):
    """Without importing them: that is the test's, and a package that is broken fails it."""
    _must_be_slow(f"the extra {name}")
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(
                f"extra {name}: {package} is missing, expected pip install 'deit_fast[{name}]'"
            )


def tool(*names):
    """The path of the first of these programs that there is."""
    _must_be_slow(" or ".join(names))
    for path in filter(None, map(shutil.which, names)):
        return path
    pytest.skip(f"tool: expected {' or '.join(names)}")


def compiler():
    tool(os.environ.get("CXX", "g++"))


def skip_without_tensor_descriptors(config, device):
    """Skip the test where `config` of a GEMM kernel needs them and the GPU has none."""
    if config["TMA"] and device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("GPU: this chip has no tensor descriptors")


def data(path, what):
    _must_be_slow(what)
    if not path.exists():
        pytest.skip(f"data: no {what} in {path}")


def where(holds):
    """`holds` is called with those of the test's parameters that it names."""

    def decorate(test):
        test.where = [*getattr(test, "where", ()), holds]
        return test

    return decorate


def _is_a_case(item):
    params = item.callspec.params if hasattr(item, "callspec") else {}
    return all(
        holds(**{name: params[name] for name in inspect.signature(holds).parameters})
        for holds in getattr(getattr(item, "function", None), "where", ())
    )


@pytest.hookimpl(tryfirst=True)  # before tiers.py, which is named before this
def pytest_collection_modifyitems(config, items):
    cases, others = [], []
    for item in items:
        (cases if _is_a_case(item) else others).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = cases
    for item in items:
        _mark(item)


def _mark(item):
    if "device" in getattr(item, "fixturenames", ()):
        item.add_marker("device")
    on_gpu = torch.cuda.is_available()
    for kind, runs in (("gpu", on_gpu), ("cpu", not on_gpu)):
        for mark in item.iter_markers(kind):
            if not (len(mark.args) == 1 and isinstance(mark.args[0], str)):
                raise pytest.UsageError(f"{item.nodeid}: the mark {kind} has no reason")
            if not runs:
                item.add_marker(pytest.mark.skip(reason=f"{kind.upper()}: {mark.args[0]}"))


def pytest_addoption(parser):
    parser.addoption(
        "--no-skips-but", metavar="WORDS",
        help="fail if a test was skipped for a reason that begins with none of these words",
    )  # fmt: skip


def _unwanted(config):
    """(where, reason) of the skipped tests that --no-skips-but does not allow."""
    allowed, terminal = config.getoption("--no-skips-but"), _terminal(config)
    if allowed is None or terminal is None:  # a worker of xdist's has no terminal
        return []
    words, found = tuple(allowed.replace(",", " ").split()), []
    for report in terminal.stats.get("skipped", ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not words or not reason.startswith(words):
            found.append((report.nodeid, reason))
    return found


def _terminal(config):
    return config.pluginmanager.get_plugin("terminalreporter")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        if _unwanted(session.config):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if unwanted := _unwanted(config):
        terminalreporter.section("skipped, and not allowed to be", red=True)
        for where, reason in unwanted:
            terminalreporter.line(f"{where}: {reason}")
