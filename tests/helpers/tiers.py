"""Two tiers: what the default run has, and `slow`. And --seed. A pytest plugin.

A test function with many parameters runs, by default, with so few combinations that each value of
each parameter comes once at least; the other combinations are marked slow here. So are, by hand,
tests and cases that take long, and tests that need more than pytest (`selection.py`).

    pytest -m "slow or not slow"    everything
    pytest --seed 3                 other random inputs, and the tests in another order
    pytest --margins FILE           errors above 0.8 of their bound, a line of JSON for each
"""

import os
import random
from collections import Counter
from itertools import groupby

import pytest


def cover(cases: list[dict]) -> list[int]:
    """Which of these cases, {parameter: value}, have every value there is: always the one that has
    most of those still missing; of equals that whose values were chosen least, say not always the
    first dtype; of these the first."""
    missing = {pair for case in cases for pair in case.items()}
    chosen, often = [], Counter()
    while missing:
        most = max(len(missing & case.items()) for case in cases)
        best = [i for i, case in enumerate(cases) if len(missing & case.items()) == most]
        i = min(best, key=lambda i: sum(often[pair] for pair in cases[i].items()))
        missing -= cases[i].items()
        often.update(cases[i].items())
        chosen.append(i)
    return chosen


def slow(*values):
    """One case of a parametrised test, marked."""
    return pytest.param(*values, marks=pytest.mark.slow)


def slow_but(values, *quick):
    """The cases of a parametrised test, all marked but these."""
    assert set(map(repr, quick)) <= set(map(repr, values)), quick
    return [value if value in quick else slow(value) for value in values]


def _function(item):
    return item.nodeid.partition("[")[0]


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(config, items):
    for _, same in groupby(items, key=_function):
        group = [item for item in same if hasattr(item, "callspec")]
        free = [item for item in group if not item.get_closest_marker("slow")]
        for on_gpu in (False, True):  # each separately: elsewhere the latter are skipped
            mine = [item for item in free if bool(item.get_closest_marker("gpu")) == on_gpu]
            values = [{k: repr(v) for k, v in item.callspec.params.items()} for item in mine]
            chosen = set(cover(values))
            for i, item in enumerate(mine):
                if i not in chosen:
                    item.add_marker(pytest.mark.slow)
    if seed := config.getoption("--seed"):
        _shuffle(items, random.Random(seed))


def _shuffle(items, order):
    """Files, and the tests of each: what a file's tests share is made once."""
    files = [list(same) for _, same in groupby(items, key=lambda item: item.path)]
    order.shuffle(files)
    for tests in files:
        order.shuffle(tests)
    items[:] = [item for tests in files for item in tests]


def pytest_addoption(parser):
    parser.addoption(
        "--seed", type=int, default=0, help="of random inputs and, but for 0, of the tests' order"
    )
    parser.addoption("--margins", metavar="FILE", help="add errors above 0.8 of their bound")


@pytest.hookimpl(tryfirst=True)  # before a test file imports checking.py
def pytest_configure(config):
    os.environ["DEIT_FAST_TEST_SEED"] = str(config.getoption("--seed"))
    if path := config.getoption("--margins"):
        os.environ["DEIT_FAST_TEST_MARGINS"] = os.path.abspath(path)


def pytest_report_header(config):
    return f"seed: {config.getoption('--seed')}"


def pytest_terminal_summary(terminalreporter, config):
    if terminalreporter.stats.get("failed"):
        terminalreporter.line(f"again with the same draws: --seed {config.getoption('--seed')}")
