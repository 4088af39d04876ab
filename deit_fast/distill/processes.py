"""The processes of a run, and the signals that stop it."""

import contextlib
import os
import signal
import threading
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Group:
    """The processes of a run: one, or as many as torchrun started."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    @contextlib.contextmanager
    def joined(cls):
        cuda = torch.cuda.is_available()
        world = int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else None
        if cuda:
            torch.cuda.set_device(device)
        if world == 1:
            yield cls(0, 1, device or torch.device("cpu"))
            return
        dist.init_process_group("nccl" if cuda else "gloo")
        try:
            yield cls(dist.get_rank(), world, device or torch.device("cpu"))
        finally:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, what) -> list:
        if self.world == 1:
            return [what]
        found = [None] * self.world
        dist.all_gather_object(found, what)
        return found


class Interrupted(RuntimeError):
    """SIGTERM or SIGINT came; its text says up to where everything is saved. `number` is the
    signal's."""

    def __init__(self, number: int, saved: str):
        super().__init__(saved)
        self.number = number


@contextlib.contextmanager
def signals():
    """A list that gets the numbers of SIGTERM and SIGINT as they come. A second Ctrl-C interrupts;
    a second SIGTERM does not: schedulers and torchrun both send it."""
    came = []

    def note(number, frame):
        if number == signal.SIGINT and number in came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
