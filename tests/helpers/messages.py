"""The messages of errors and warnings in the source, as templates: "{}" for what varies.

A message is the first argument of what is raised, or of warnings.warn. Where it is a variable, or a
constant that is formatted, its assignments in the same file are taken. `PREFIXES` has the text that
an exception or a helper puts before its argument.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
STORE = "store: {}, byte {}: "
# name of what is called -> (text before, index of the argument)
PREFIXES = {
    "data_error": ("data {}: ", 1), "Damaged": (STORE, 2), "Unwritten": (STORE, 2),
    "self._corrupt": ("{}: ", 0), "argparse.ArgumentError": ("", 1),
}  # fmt: skip
# their argument is no message: where a run was saved, a signal
NO_MESSAGE = {"Interrupted", "KeyboardInterrupt", "SystemExit", "AttributeError"}


class Message(NamedTuple):
    where: str  # file:line
    template: str


def messages():
    found = []
    for folder in ("deit_fast", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ROOT / "deit_fast/kernels" not in path.parents:
                found += _of_file(path)
    return found


def _of_file(path):
    tree = ast.parse(path.read_text())
    assigned = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            assigned.setdefault(node.targets[0].id, []).append(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            call = node
        else:
            continue
        name = ast.unparse(call.func)
        before, index = PREFIXES.get(name, ("", 0))
        if name in NO_MESSAGE or len(call.args) <= index:
            continue
        for template in _templates(call.args[index], assigned):
            if re.search(r"[a-z]{2}", template):  # else all of it comes from elsewhere
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield Message(where, before + template)


def _templates(node, assigned):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = (v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        return ["".join(map(str, parts))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = (_templates(n, assigned) or ["{}"] for n in (node.left, node.right))
        return [a + b for a in left for b in right]
    if isinstance(node, ast.IfExp):
        return _templates(node.body, assigned) + _templates(node.orelse, assigned)
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".format"):
        return _templates(node.func.value, assigned)
    if isinstance(node, ast.Name):
        others = {name: values for name, values in assigned.items() if name != node.id}
        return [t for value in assigned.get(node.id, ()) for t in _templates(value, others)]
    return []


def matches(entry, template):
    """Whether the message begins as `entry` does, in which "…" stands for one word that varies."""
    pattern = r"[^ \n,:;()]+".join(re.escape(part) for part in entry.removesuffix("…").split("…"))
    return re.match(pattern, re.sub(r"\{[^}]*\}", "\0", template)) is not None
