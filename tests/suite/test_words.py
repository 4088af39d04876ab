"""Names and prose use the field's words, not those that this project once coined."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("kernels", "deit_fast", "benchmarks", "studies", "examples", "docs", "tests")
COINED = re.compile(
    r"eight.bits|\bin little\b|multiprocessor|matrix product|made again|\bpretend|\brivals?\b"
    r"|\bceilings\b|row moments|\bswapped\b|logarithms of the sums",
    re.IGNORECASE,
)
# what old files hold, and the list of what was renamed
EXEMPT = {"CHANGELOG.md", "test_words.py", "before_0.1", "results.py", "test_results.py"}


def files():
    yield from ROOT.glob("*.md")
    for folder in FOLDERS:
        for suffix in ("*.py", "*.md", "*.sh"):
            yield from (ROOT / folder).rglob(suffix)


def coined(text):
    lines = enumerate(text.splitlines(), 1)
    return [(number, word[0]) for number, line in lines for word in COINED.finditer(line)]


def test_words_are_the_fields():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {word}"
        for path in files()
        if not EXEMPT & set(path.parts)
        for number, word in coined(path.read_text())
    ]
    assert not found, "\n".join(found)
    assert coined("a model in\nEight Bits, swapped") == [(2, "Eight Bits"), (2, "swapped")]
