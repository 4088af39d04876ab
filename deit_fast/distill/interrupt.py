"""The signals that stop a run, which then saves its work first."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(RuntimeError):
    """SIGTERM or SIGINT came.

    Args:
        number: The signal's, an attribute too.
        saved: Up to where everything is saved: the message.
    """

    def __init__(self, number: int, saved: str):
        super().__init__(saved)
        self.number = number


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yield a list that gets the numbers of SIGTERM and SIGINT as they come.

    A second Ctrl-C raises KeyboardInterrupt. A second SIGTERM does nothing: schedulers and torchrun
    both send it. In a thread other than the main one nothing is caught.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in caught:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
