"""The deit-fast command: what all commands have in common."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_installed_command():
    command = Path(sys.executable).with_name("deit-fast")
    done = subprocess.run([command], capture_output=True, text=True)
    assert done.returncode == 2 and "COMMAND" in done.stderr
