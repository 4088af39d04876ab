"""What the CPU is, and what else ran on it while it was measured."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from deit_fast.bench import device

BUSY_PERCENT = 3.0  # of the machine's CPU time, taken by others: above, figures are disturbed
STEAL_PERCENT = 1.0
PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "openvino")
PROC = Path("/proc")


def versions() -> dict[str, str | None]:
    """Of Python and the packages that take part; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def facts() -> dict:
    """The CPU's name and its instruction set as PyTorch uses it, and the cores this process has."""
    return {
        "cpu": device.device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "isa": torch.backends.cpu.get_cpu_capability(),
    }


@dataclass(frozen=True)
class Load:
    """What a stretch of time was like."""

    load_average: float  # of the last minute, at its beginning
    other_percent: float  # of the machine's CPU time: other processes
    steal_percent: float  # other virtual machines, as far as the host tells

    @property
    def warning(self) -> str | None:
        """What makes its figures doubtful; None: nothing is known."""
        found = []
        if self.other_percent > BUSY_PERCENT:
            found.append(f"other processes took {self.other_percent:.0f}% of the CPU time")
        if self.steal_percent > STEAL_PERCENT:
            found.append(f"the host took {self.steal_percent:.1f}% (steal)")
        return " and ".join(found) or None


class Watch:
    """Measures what others than the given processes take, from when it is made."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = [os.getpid(), *pids]
        self._load = os.getloadavg()[0]
        self._total, self._busy, self._steal = _machine()
        self._own = _own(self._pids)

    def read(self) -> Load:
        """The load since it was made."""
        total, busy, steal = _machine()
        own = _own(self._pids) - self._own
        ticks = max(1, total - self._total)
        other = max(0.0, 100 * (busy - self._busy - own) / ticks)
        return Load(self._load, other, 100 * (steal - self._steal) / ticks)


def _machine():
    """Ticks of all CPUs: in all, busy, and steal."""
    user, nice, system, idle, iowait, irq, softirq, steal, *_ = map(
        int, (PROC / "stat").read_text().splitlines()[0].split()[1:]
    )
    busy = user + nice + system + irq + softirq
    return busy + idle + iowait + steal, busy, steal


def _own(pids):
    """Ticks that these processes have taken so far."""
    ticks = 0
    for pid in pids:
        try:  # the name, in brackets, may hold spaces
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except FileNotFoundError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks
