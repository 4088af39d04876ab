"""Every comparison of the suite goes by a rule of tests/helpers/checking.py."""

import ast
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS / "helpers"), str(TESTS.parent)])}
WITH_A_TOLERANCE = ("allclose", "isclose", "assert_allclose", "testing.assert_close")


def is_number(node):
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def private_tolerance(node):
    """What is wrong with a part of a test, or None."""
    if isinstance(node, ast.Assert):
        for compared in (n for n in ast.walk(node.test) if isinstance(n, ast.Compare)):
            inside = list(ast.walk(compared))
            names = {ast.unparse(n.func) for n in inside if isinstance(n, ast.Call)}
            if "relative_error" in names and any(is_number(n) for n in inside):
                return "relative_error beside a number"
    if not isinstance(node, ast.Call):
        return None
    name, keywords = ast.unparse(node.func), {k.arg for k in node.keywords}
    if name.endswith(WITH_A_TOLERANCE):
        return name
    if keywords & {"atol", "rtol"}:
        return f"{name} with a tolerance"
    if name.endswith("approx") and (len(node.args) > 1 or keywords & {"rel", "abs"}):
        return f"{name} with a tolerance"
    return None


def private_tolerances(text, path):
    found = ((node, private_tolerance(node)) for node in ast.walk(ast.parse(text)))
    return [f"{path}:{node.lineno}: {what}" for node, what in found if what]


def test_no_test_keeps_a_private_tolerance():
    found = []
    for path in sorted(TESTS.rglob("*.py")):
        if path.name != "checking.py":
            found += private_tolerances(path.read_text(), path.relative_to(TESTS))
    assert not found, "\n".join(["expected the functions of tests/helpers/checking.py:", *found])


def test_private_tolerances_are_found():
    for text, what in (
        ("torch.testing.assert_close(a, b)", "torch.testing.assert_close"),
        ("assert not torch.allclose(a, b)", "torch.allclose"),
        ("np.testing.assert_allclose(a, b)", "np.testing.assert_allclose"),
        ("f(a, rtol=1)", "f with a tolerance"),
        ("assert a == pytest.approx(b, abs=1e-3)", "pytest.approx with a tolerance"),
        ("assert x and relative_error(a, b) < 0.4 * c", "relative_error beside a number"),
    ):
        assert private_tolerances(f"\n{text}\n", "a.py") == [f"a.py:2: {what}"]
    for text in (
        "assert_close(a, b)", "assert a == pytest.approx(b)", "x = relative_error(a, b)",
        "assert_at_most(relative_error(a, b), 0.4 * c)", "assert (a - b).max() < 3",
    ):  # fmt: skip
        assert not private_tolerances(text, "a.py")


def test_the_stand_in_needs_no_pytest():
    """It runs in environments with nothing but what a GPU machine has."""
    code = "import sys; sys.modules['pytest'] = None; import stand_in_cuda.exercise"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
