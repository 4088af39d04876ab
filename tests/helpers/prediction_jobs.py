"""Jobs with predictions that depend on the path of the image alone."""

import numpy as np

from deit_fast.batch_inference import Batch
from deit_fast.predictions import Job

LABELS = [f'label, "{i}"' for i in range(10)]
PATHS = [f"photos/{i}.jpg" for i in range(23)]
PATHS[4], PATHS[5] = 'a "b",\nc.jpg', "\udcff.jpg"  # a line break; bytes that are no UTF-8
BROKEN = {PATHS[1], PATHS[7], PATHS[8], PATHS[22]}
CLASSES = {"topk": 2}


def batches(paths, size=4, embed=False):
    """Made-up predictions: numbers that depend on the path alone."""
    paths = list(paths)
    for first in range(0, len(paths), size):
        some = paths[first : first + size]
        readable = [PATHS.index(p) for p in some if p not in BROKEN]
        columns = {}
        if readable and embed:
            columns = {"embedding": np.array([[i, i / 2, -i] for i in readable], np.float32)}
        elif readable:
            columns = {
                "classes": np.array([[i % 10, (i + 1) % 10] for i in readable]),
                "scores": np.array([[0.5 + i / 100, i / 1000] for i in readable], np.float32),
            }
        yield Batch(some, ["is broken" if p in BROKEN else None for p in some], columns)


def job(out, embed=False, **options):
    return Job(out, CLASSES, None if embed else LABELS, embed, **options)


def run(out, embed=False, stop=None, **options):
    """Run to the end, or until `stop` batches are written, as if killed then."""
    one = job(out, embed, **options)
    one.begin(iter(PATHS))
    for count, batch in enumerate(batches(one.todo(), embed=embed)):
        if count == stop:
            for file in one._files.values():
                file.flush()
            one._unlock()
            return one
        one.write(batch)
    one.finish()
    return one


def whole(folder, name, embed=False):
    folder.mkdir(exist_ok=True)
    run(folder / name, embed)
    return folder / name
