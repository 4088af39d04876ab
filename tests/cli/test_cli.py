"""The deit-fast command: what all commands have in common."""

import subprocess
import sys
from pathlib import Path

import pytest

from deit_fast.cli import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_examples(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0 and "\nExamples:\n" in capsys.readouterr().out


@pytest.mark.slow
def test_installed_command():
    command = Path(sys.executable).with_name("deit-fast")
    done = subprocess.run([command], capture_output=True, text=True)
    assert done.returncode == 2 and "COMMAND" in done.stderr
