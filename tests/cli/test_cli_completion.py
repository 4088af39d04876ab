"""deit-fast completion, in a real shell."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from selection import tool

from deit_fast import _names
from deit_fast.cli import main
from deit_fast.cli.parsers import COMMANDS
from deit_fast.distill import recipe

COMPLETE = """
source "$1"
function=$(complete -p deit-fast | sed 's/.*-F \\([^ ]*\\).*/\\1/')
shift
COMP_WORDS=(deit-fast "$@"); COMP_CWORD=$#; COMPREPLY=()
$function deit-fast
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("completion") / "deit-fast"
    path.write_text(completion("bash"))
    return path


def completion(shell):
    done = subprocess.run(
        [sys.executable, "-m", "deit_fast", "completion", shell], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def complete(script, *words, **options):
    """What bash offers for the last of the words."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("tool: expected bash")
    done = subprocess.run(
        [bash, "--norc", "-c", COMPLETE, "bash", script, *words], capture_output=True, text=True,
        **options,
    )  # fmt: skip
    assert not done.stderr
    return done.stdout.split()


def test_bash_completes(script, tmp_path):
    for name in ("photo.jpg", "mine.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "photos").mkdir()
    assert set(complete(script, "")) >= set(COMMANDS)
    assert complete(script, "cl") == ["classify"]
    assert complete(script, "distill-store", "wr") == ["write"]
    assert complete(script, "eval", "d", "--che") == ["--checkpoint", "--checkpoint-key"]
    assert complete(script, "distill-store", "check", "d", "s", "--sam") == ["--samples"]
    assert complete(script, "export", "m", "--format", "") == list(_names.EXPORT_FORMATS)
    assert complete(script, "quantize", "m", "--format", "f") == ["fp8"]
    assert complete(script, "classify", "pho", cwd=tmp_path) == ["photo.jpg", "photos"]
    assert complete(script, "train", "d", "--out", "", cwd=tmp_path) == ["photos"]
    models = complete(script, "bench", "deit_base", cwd=tmp_path)
    assert models == [name for name in _names.MODELS if name.startswith("deit_base")]
    assert complete(script, "classify", "--model", "pho", cwd=tmp_path) == ["photos"]
    recipes = complete(script, "train", "d", "--recipe", "", cwd=tmp_path)
    assert recipes == [*recipe.NAMES, "mine.json"]


def test_it_is_installed_as_the_docs_say(script):
    assert "-F _shtab_deit_fast deit-fast" in subprocess.run(
        ["bash", "--norc", "-c", f"source {script}; complete -p deit-fast"],
        capture_output=True, text=True,
    ).stdout  # fmt: skip


@pytest.mark.slow
def test_the_installed_command_prints_it():
    command = Path(sys.executable).with_name("deit-fast")
    line = f"source <({command} completion bash); complete -p deit-fast"
    done = subprocess.run(["bash", "--norc", "-c", line], capture_output=True, text=True)
    assert "_shtab_deit_fast deit-fast" in done.stdout


@pytest.mark.slow
def test_zsh_takes_it(tmp_path):
    zsh = tool("zsh")
    (tmp_path / "_deit-fast").write_text(completion("zsh"))
    line = f"fpath=({tmp_path} $fpath); autoload -U compinit; compinit -u -D; whence -w _deit-fast"
    done = subprocess.run([zsh, "-f", "-c", line], capture_output=True, text=True)
    assert "_deit-fast: function" in done.stdout, done.stderr
    assert not subprocess.run([zsh, "-f", "-n", tmp_path / "_deit-fast"]).returncode


def test_unknown_shells(capsys):
    with pytest.raises(SystemExit):
        main(["completion", "fish"])
    assert "'fish', expected one of bash, zsh, tcsh" in capsys.readouterr().err
