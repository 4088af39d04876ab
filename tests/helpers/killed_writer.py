"""A soft-label store that is being written and killed again and again, for test_store_writer.py:

python killed_writer.py DATA TEACHER STORE KILLS SEED
"""

import contextlib
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from small_runs import ended

from deit_fast.distill import recipe
from deit_fast.distill.store import write

PLAN = {"epochs": 12, "k": 2, "batch": 2, "img_size": 16}


def wait(seconds, event):
    time.sleep(seconds)


def size(store):
    with contextlib.suppress(FileNotFoundError):  # renamed just now
        return sum(path.stat().st_size for path in Path(store).glob("epoch-*"))
    return 0


def main(data, teacher, store, kills, seed):
    """Start, kill when it has written some more, as often as asked; then let it finish. Prints each
    exit code and how many bytes of records were there."""
    torch.set_num_threads(1)
    draw = random.Random(int(seed))
    for kill in (*[True] * int(kills), False):
        child = os.fork()  # spares the seconds of importing
        if child == 0:
            try:
                pause = 0.01 if kill else 0.0
                write(
                    data, store, teacher, recipe.load("deit"), **PLAN, report=partial(wait, pause)
                )
                os._exit(0)
            except BaseException as error:
                print(repr(error), flush=True)
                os._exit(1)
        if kill:
            enough = size(store) + draw.randint(1, 700)
            while size(store) < enough and not ended(child):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, size(store), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
