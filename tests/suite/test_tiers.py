"""Which tests run by default, and in which order."""

import json
import re
from pathlib import Path

import pytest
import tiers

pytest_plugins = ["pytester"]

CASES = """
import pytest, tiers
from tiers import slow, slow_but

SHAPES = [{"M": 3}, {"M": 70}, {"M": 500}]

@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("case", slow_but(SHAPES, {"M": 3}, {"M": 70}), ids=str)
def test_kernel(case, dtype): pass

@pytest.mark.parametrize("a, b", [(1, 2), slow(3, 4)])
def test_layer(a, b): assert a < b

@pytest.mark.slow
def test_long(): pass
"""


def test_cover_has_each_value_and_not_always_the_first():
    cases = [{"n": n, "dtype": d, "bias": b} for n in range(4) for b in (0, 1) for d in "bhf"]
    chosen = [cases[i] for i in tiers.cover(cases)]
    assert len(chosen) == 4 and {c["n"] for c in chosen} == set(range(4))
    assert [c["dtype"] for c in chosen] == ["b", "h", "f", "b"]
    assert [c["bias"] for c in chosen] == [0, 1, 0, 1]
    assert tiers.cover([]) == [] and tiers.cover([{"a": 1}, {"a": 1}]) == [0]


def test_slow_but_names_what_there_is():
    assert tiers.slow_but([1, 2], 1) == [1, tiers.slow(2)]
    with pytest.raises(AssertionError, match="3"):
        tiers.slow_but([1, 2], 3)


@pytest.fixture
def run(pytester, monkeypatch):
    """options -> the tests that ran, in order, and what pytest said."""
    monkeypatch.setenv("PYTHONPATH", str(Path(tiers.__file__).parent))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    for name in ("DEIT_FAST_TEST_SEED", "DEIT_FAST_TEST_MARGINS"):  # which the plugin sets
        monkeypatch.setenv(name, "")
    pytester.makeini("[pytest]\naddopts = -m 'not slow'\nmarkers = slow: long\n")
    pytester.makeconftest('pytest_plugins = ["tiers"]\n')

    def run(*options, more=""):
        pytester.makepyfile(test_cases=CASES + more, test_others="def test_one(): pass")
        said = pytester.runpytest("-p", "no:cacheprovider", "-v", *options).stdout.str()
        return re.findall(r"::(\S+(?:\[.*\])?) (?:PASSED|FAILED)", said), said

    return run


def test_each_value_once_by_default(run):
    ran, _ = run()
    assert sorted(ran) == [
        "test_kernel[{'M': 3}-bf16]", "test_kernel[{'M': 3}-fp32]", "test_kernel[{'M': 70}-fp16]",
        "test_layer[1-2]", "test_one",
    ]  # fmt: skip
    assert len(run("-m", "slow or not slow")[0]) == 9 + 2 + 1 + 1
    assert len(run("-m", "slow")[0]) == 13 - len(ran)


def test_a_seed_orders_and_is_said_by_what_fails(run):
    everything = ("-m", "slow or not slow")
    one, two, again = (run(*everything, f"--seed={n}")[0] for n in (1, 2, 1))
    assert one == again and len({tuple(o) for o in (one, two, run(*everything)[0])}) == 3
    assert sorted(one) == sorted(two)
    line = "again with the same draws: --seed 5"
    assert line in run("--seed=5", more="\ndef test_it(): assert 0\n")[1]
    assert line not in run("--seed=5")[1]


DRAWS = """
import checking, torch

def test_it():
    checking.seed(0)
    checking.assert_at_most(0.9, 1.0, str(torch.rand(1).item()))
    checking.assert_at_most(0.7, 1.0, "far from it")
"""


def test_a_seed_makes_other_draws_and_margins_are_kept(run, pytester):
    """Also where conftest.py has imported checking.py before the options are known."""
    pytester.makeconftest('import checking\npytest_plugins = ["tiers"]\n')
    run("--collect-only", more=DRAWS)
    for seed in (0, 3):
        options = (f"--seed={seed}", "--margins=file", "-k", "test_it")
        pytester.runpytest_subprocess(*options).assert_outcomes(passed=1)
    first, second = map(json.loads, (pytester.path / "file").read_text().splitlines())
    assert (first["seed"], second["seed"]) == (0, 3) and first["what"] != second["what"]
    assert first["margin"] == 0.9 and first["test"] == "test_cases.py::test_it"
