"""The job on a local Ray cluster, for test_ray.py: python ray_classify.py FOLDER EMPTY_FOLDER OUT

A process of its own, because Ray leaves threads of its own, and no handler for a crash, in one that
has used it.
"""

import pickle
import sys
from pathlib import Path

import ray
import ray.data
from modelling import tiny_pair

from deit_fast.integrations.ray import classify


def main(folder, empty, out):
    # two decoders at most: each worker imports PyTorch and timm
    ray.init(num_cpus=3, num_gpus=0, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    model, found = tiny_pair()[1], {}
    rows = classify([folder], model, batch_size=32, topk=2, embed=True).take_all()
    found["rows"] = [dict(row) for row in rows]
    found["model"] = model.backend, model.training
    try:
        classify([empty], model)
    except ValueError as error:
        found["empty"] = str(error)
    Path(out).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
