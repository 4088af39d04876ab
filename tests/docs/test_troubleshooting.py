"""docs/troubleshooting.md has an entry for every message of deit_fast and its kernels.

An entry is a row of a table with the heading "message" or "pattern". It quotes the message's
beginning, with "…" for what varies.
"""

import re

import pytest
from manual import DOCS
from messages import matches, messages


def entries(text):
    found, inside = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in line.split(" | ")]
        if line.startswith(("| message |", "| pattern |")):
            inside = cells[0].strip("| ")
        elif not line.startswith("|"):
            inside = ""
        elif inside and not line.startswith("|---"):
            assert (quoted := re.fullmatch(r"\| `([^`]+)`", cells[0])), f"line {number}: {line}"
            found.append((number, quoted[1], inside))
    return found


@pytest.fixture(scope="module")
def page():
    return entries((DOCS / "troubleshooting.md").read_text())


def test_every_message_has_an_entry(page):
    missing = [
        f"{message.where}: {message.template}"
        for message in messages()
        if not any(matches(entry, message.template) for _, entry, _ in page)
    ]
    assert not missing, "no entry in docs/troubleshooting.md for\n" + "\n".join(missing)


def test_every_entry_is_of_a_message(page):
    templates = [message.template for message in messages()]
    stale = [
        f"docs/troubleshooting.md:{number}: {entry}"
        for number, entry, _ in page
        if not any(matches(entry, template) for template in templates)
    ]
    assert not stale, "\n".join(stale)


def test_entries_say_something(page):
    """Not "…: …, expected …", which would hold for a message that nobody has explained. The few
    forms that need no explanation, of whatever argument, are in the table of patterns."""
    vague = [
        f"line {number}: {entry}"
        for number, entry, kind in page
        if kind == "message" and len(re.findall(r"[A-Za-z]", entry.replace("expected", ""))) < 3
    ]
    assert not vague
    assert sum(kind == "pattern" for _, _, kind in page) <= 20


def test_the_messages_that_are_found():
    found = [message.template for message in messages()]
    assert len(found) > 400
    for expected in (
        "engine: no such thing",
        "backend: {} ({}), expected one of {}",
        "data {}: no image in {}",
        "{} is ignored: {}",
        "{}: {} has shape {}, expected {}",
    ):
        assert (expected in found) == ("no such" not in expected), expected
    assert matches("backend: … (", found[found.index("backend: {} ({}), expected one of {}")])
    assert not matches("backend: none", "backend: {} ({}), expected one of {}")
