"""The ranks of a run, as torch.distributed has them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """One process's place among the ranks of a run: one rank, or as many as torchrun started.

    Attributes:
        rank: Of this process.
        world_size: How many ranks there are.
        device: Where this rank computes.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    @contextlib.contextmanager
    def joined(cls) -> Iterator["Ranks"]:
        """Join the process group that torchrun's variables name, and leave it at the end."""
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        if world_size == 1:
            yield cls(0, 1, device)
            return
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield cls(dist.get_rank(), world_size, device)
        finally:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes and reports."""
        return self.rank == 0

    def all_reduce(self, *numbers: float) -> list[float]:
        """Sum each number over all ranks, in fp64."""
        if self.world_size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_gather(self, value: Any) -> list:
        """Collect a value from every rank, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        found = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_gather(None)
