"""The sdist and the wheel of a release: what they hold, and that one builds the other.

.ci/release also installs the wheel in an environment of its own, and uses it.
"""

import email
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import selection

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
FOLDERS = ("deit_fast", "kernels", "tests", "benchmarks", "docs", "examples", "studies")
DIST_INFO = f"deit_fast-{VERSION}.dist-info"
FILES = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")


def sources():
    """{name in the wheel: contents} of the package, as the checkout has them."""
    found = {}
    for top, installed in (("deit_fast", "deit_fast"), ("kernels", "deit_fast/kernels")):
        for folder, folders, names in os.walk(ROOT / top):  # does not follow a link to kernels
            folders[:] = [f for f in folders if f != "__pycache__"]
            for path in (Path(folder) / name for name in names):
                found[f"{installed}/{path.relative_to(ROOT / top)}"] = path.read_bytes()
    return found


def build(source, out, *options):
    """Where this environment's setuptools is new enough: nothing is downloaded."""
    env = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", out, source],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "absent from the `packages`" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with sdist and wheel, and the files of the wheel built without an sdist."""
    selection.extra("release", "build", "twine")
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("extra release: setuptools is old, expected pip install 'deit_fast[release]'")
    work = tmp_path_factory.mktemp("release")
    source = work / "a-checkout"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for path in ROOT.iterdir():
        if path.name in FOLDERS:
            shutil.copytree(path, source / path.name, ignore=ignored, symlinks=True)
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, source)
    if not (source / "deit_fast/kernels").is_symlink():  # as a developer's checkout has it
        (source / "deit_fast/kernels").symlink_to("../kernels")
    build(source, work / "dist")
    build(source, work / "direct", "--wheel")
    return work / "dist", work / "direct"


def contents(path):
    """{name: bytes} of a wheel or an sdist, without the sdist's folder."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(path) as archive:
        files = [member for member in archive if member.isfile()]
        return {m.name.partition("/")[2]: archive.extractfile(m).read() for m in files}


def wheel_of(folder):
    return folder / f"deit_fast-{VERSION}-py3-none-any.whl"


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    found, expected = contents(wheel_of(built[0])), sources()
    of_the_wheel = {f"{DIST_INFO}/{name}" for name in FILES}
    assert found.keys() == expected.keys() | of_the_wheel
    assert {name: found[name] for name in expected} == expected
    for name in (
        "py.typed", "kernels/linear/op.py", "kernels/tuned/README.md", "data/cat.jpg",
        "data/deit_nano_fashion/model.safetensors", "distill/recipes/deit.json",
    ):  # fmt: skip
        assert f"deit_fast/{name}" in found
    assert b"Apache License" in found[f"{DIST_INFO}/licenses/LICENSE"]


@pytest.mark.slow
def test_the_sdist_holds_what_the_wheel_is_built_from(built):
    found = contents(built[0] / f"deit_fast-{VERSION}.tar.gz")
    expected = {name.replace("deit_fast/kernels/", "kernels/") for name in sources()}
    root = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml", "setup.py"}
    made = {"MANIFEST.in", "PKG-INFO", "setup.cfg"}
    rest = {name for name in found if not name.startswith("deit_fast.egg-info/")}
    assert rest == expected | root | made


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(built):
    one, other = (hashlib.sha256(wheel_of(folder).read_bytes()).hexdigest() for folder in built)
    assert one == other


def paths_in(files, paths):
    return [f"{name}: {path}" for name in files for path in paths if path.encode() in files[name]]


@pytest.mark.slow
def test_no_path_of_the_machine_is_in_a_release(built):
    paths = {str(ROOT), str(built[0].parent), tempfile.gettempdir() + "/", sys.prefix}
    if len(home := str(Path.home())) > 1:
        paths.add(home + "/")
    for path in built[0].iterdir():
        assert not paths_in(contents(path), paths), path.name
    assert paths_in({"a": b"x = '/tmp/b'"}, {"/tmp/"}) == ["a: /tmp/"]


@pytest.mark.slow
def test_an_index_can_show_it(built):
    files = sorted(map(str, built[0].iterdir()))
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr
    metadata = email.message_from_bytes(contents(wheel_of(built[0]))[f"{DIST_INFO}/METADATA"])
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme = metadata.get_payload(decode=True).decode()
    assert readme.strip() == (ROOT / "README.md").read_text().strip()
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    beyond, lowest = re.fullmatch(r"<3\.(\d+),>=3\.(\d+)", metadata["Requires-Python"]).groups()
    minors = re.findall(r"Python :: 3\.(\d+)$", "\n".join(metadata.get_all("Classifier")), re.M)
    assert minors == [str(minor) for minor in range(int(lowest), int(beyond))]
