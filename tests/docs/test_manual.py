"""The README and the manual: every block runs or parses, every link leads somewhere."""

import re
import subprocess
import sys

import manual
import pytest
import selection
import yaml
from manual import DOCS, PAGES, ROOT

# Pages whose blocks run in a few seconds; the others are slow
CHEAP = {"docs/index.md", "docs/numerics.md", "docs/limits.md", "docs/guide/chips.md"}


def name(page):
    return str(page.relative_to(ROOT))


def with_blocks_that_run():
    for page in PAGES:
        if any(b.language == "python" or b.directive == "run" for b in manual.blocks(page)):
            slow = name(page) not in CHEAP
            yield pytest.param(page, marks=pytest.mark.slow if slow else (), id=name(page))


@pytest.mark.parametrize("page", list(with_blocks_that_run()))
def test_blocks_run(page, tmp_path, monkeypatch):
    manual.run_page(page, tmp_path, monkeypatch)


def is_served(words):
    return "examples/serve_http.py" in words


def test_commands_parse(monkeypatch, capsys):
    """All but pytest's, whose options take seconds to find out, and the server's."""
    assert not wrong_commands(
        monkeypatch, capsys, lambda words: "pytest" not in words[:3] and not is_served(words)
    )


@pytest.mark.slow
def test_commands_of_the_server_parse(monkeypatch, capsys):
    selection.extra("serve", "uvicorn", "fastapi")
    assert not wrong_commands(monkeypatch, capsys, is_served)


@pytest.mark.slow
def test_commands_of_pytest_parse(monkeypatch, capsys):
    assert not wrong_commands(monkeypatch, capsys, lambda words: "pytest" in words[:3])


def wrong_commands(monkeypatch, capsys, asked):
    wrong = []
    for page in PAGES:
        for block in manual.blocks(page):
            if block.language != "bash" or block.directive.startswith("skip"):
                continue
            for line, command in manual.commands(block):
                for words in filter(asked, manual.simple_commands(command)):
                    try:
                        manual.parse_command(words, monkeypatch)
                    except AssertionError as error:
                        said = capsys.readouterr().err.strip().splitlines()
                        wrong.append(f"{name(page)}:{line}: {error} {said[-1] if said else ''}")
    return "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_have_a_language_and_directives_are_known(page):
    manual.check_directives(page)


def prose(page):
    """The page without its code, line by line."""
    text = page.read_text()
    without = re.sub(r"(?ms)^ *```.*?^ *```", lambda code: "\n" * code[0].count("\n"), text)
    return re.sub(r"`[^`\n]*`", "", without).splitlines()


def anchors(page):
    found = set()
    text = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text())
    for title in re.findall(r"(?m)^#+ (.+)$", text):
        if given := re.search(r"\{ *#([\w-]+) *\}", title):
            found.add(given[1])
            continue
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title))
        found.add(re.sub(r"[-\s]+", "-", words.strip().lower()))
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    wrong = []
    for number, line in enumerate(prose(page), 1):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            there = page if not path else (page.parent / path).resolve()
            if DOCS in there.parents and there.name in ("contributing.md", "changelog.md"):
                continue  # pages that docs/hooks.py adds
            if not there.exists() or anchor and anchor not in anchors(there):
                wrong.append(f"{name(page)}:{number}: {target}")
    assert not wrong, "\n".join(wrong)


def test_every_page_is_in_the_navigation():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    named = set(re.findall(r"[\w/-]+\.md", str(config["nav"])))
    pages = {str(page.relative_to(DOCS)) for page in PAGES if DOCS in page.parents}
    generated = set(re.findall(r'": "([\w-]+\.md)"', (DOCS / "hooks.py").read_text()))
    assert named == pages | generated


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    selection.extra("docs", "mkdocs", "material", "mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = re.compile(
        r"<(?:script|link|img|source|iframe)\b[^>]*(?:src|href)=\"(?:https?:)?//[^>]*"
    )
    pages = list(tmp_path.rglob("*.html"))
    found = [match for page in pages for match in loaded.findall(page.read_text())]
    assert not found
    reference = (tmp_path / "reference/cli.html").read_text()
    assert "deit-fast classify" in reference and "--checkpoint-key" in reference
    assert len(pages) > 30
