"""Work beside the steps, on cores of its own: compilation, paused while something is timed."""

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from .runner import become_child


class Background:
    """Processes that run functions until they end.

    Each is in a session of its own, whose whole group is paused, resumed and stopped.

    Args:
        log: File for what they print.
        cores: What they are pinned to; None: any.
    """

    def __init__(self, log: Path, cores: set[int] | None = None):
        self.log, self.cores = log, cores
        self._running: dict[str, int] = {}
        self.ended: dict[str, int] = {}  # name -> exit status, 0 for success

    def start(self, name: str, function: Callable[[], None]) -> None:
        """Fork a process, nicer than the steps, that runs `function`."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                become_child(self.log, self.cores)
                os.nice(10)
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        self._running[name] = pid

    def running(self) -> list[str]:
        """The names of those that have not ended."""
        for name, pid in list(self._running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self._running[name]
                self.ended[name] = os.waitstatus_to_exitcode(status)
        return list(self._running)

    def pause(self) -> None:
        """Stop all of them until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them go on."""
        self._signal(signal.SIGCONT)

    def wait(self, name: str, seconds: float) -> bool:
        """Whether it has ended, at the latest after so many seconds."""
        until = time.monotonic() + seconds
        while name in self.running() and time.monotonic() < until:
            time.sleep(0.05)
        return name not in self._running

    def stop(self) -> None:
        """Kill all of them."""
        self._signal(signal.SIGKILL)
        for pid in self._running.values():
            os.waitpid(pid, 0)
        self._running.clear()

    def _signal(self, number):
        for name in self.running():
            try:
                os.killpg(self._running[name], number)
            except ProcessLookupError:  # forked, and not yet a session of its own
                os.kill(self._running[name], number)
