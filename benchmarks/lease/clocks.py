"""The GPU's clocks, power and temperature while the steps run, as nvidia-smi samples them."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CLOCKS = "clocks.csv"
QUERY = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu"


@contextmanager
def sampled(path: Path) -> Iterator[None]:
    """Within it nvidia-smi, where it is installed, appends four samples a second to the file."""
    command = [
        "nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-lms", "250",
    ]  # fmt: skip
    process = None
    if shutil.which(command[0]):
        with path.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()
