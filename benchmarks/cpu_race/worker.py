"""The process of one contender: builds it, then answers one line of JSON for each line it reads.

    {"turn": seconds}  ->  {"times": [ms, ...], "cpu_ms": CPU time of a call, "faults": of a call}

The first line it writes is {"logits": [...]}, or {"unavailable": why}. Whatever goes wrong is the
last line, {"failed": why}.
"""

import argparse
import json
import os
import resource
import sys
import time
import warnings
from typing import TextIO

ALONE_MS = 250.0  # a call this long brings its weights into the caches itself


def turn(call, images, seconds: float, last_ms: float) -> dict:
    """Time calls for about that long, at least one."""
    if last_ms < ALONE_MS:
        call(images)
    times: list[float] = []
    before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        call(images)
        times.append(1e3 * (time.perf_counter() - start))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    used = 1e3 * (time.process_time() - cpu)
    return {"times": times, "cpu_ms": used / len(times), "faults": faults / len(times)}


def main() -> None:
    """Take part in the race; say what went wrong."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not come between
    try:
        take_part(out)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print(json.dumps({"failed": reason}), file=out)


def take_part(out: TextIO) -> None:
    """Build the contender, say so, and take turns until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("contender")
    parser.add_argument("timm_name")
    parser.add_argument("batch", type=int)
    parser.add_argument("threads", type=int)
    args = parser.parse_args()

    import numpy as np
    import torch

    from benchmarks.cpu_race import contenders

    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    model = contenders.model_of(args.timm_name)
    size = model.patch_embed.img_size
    images = np.random.default_rng(1).standard_normal((args.batch, 3, *size), dtype=np.float32)
    try:
        call = contenders.CONTENDERS[args.contender][1](model, images, args.threads)
        logits = call(images)
    except ImportError as error:
        print(json.dumps({"unavailable": str(error)}), file=out)
        return
    print(json.dumps({"logits": logits.astype(float).ravel().tolist()}), file=out)
    last = 0.0
    for line in sys.stdin:
        done = turn(call, images, json.loads(line)["turn"], last)
        last = done["times"][-1]
        print(json.dumps(done), file=out)


if __name__ == "__main__":
    main()
