"""One process of several that train together, for test_training_loops.py:

python parallel_training.py RANK WORLD_SIZE RENDEZVOUS_FILE FOLDER
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checking import seeded
from modelling import tiny_pair
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import deit_fast
from deit_fast.layers import Block

BATCH, SIZE, STEPS = 4, 48, 2
BACKENDS = ("torch", "triton")


def model_of(backend):
    return tiny_pair(backend, num_heads=1, img_size=SIZE, init_values=0.5)[1].train()


def plain(model):
    return model


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(backend, wrap, rank=0, world_size=1):
    """Some steps on this rank's share of the batches: parameters, the last step's
    gradients, and logits of a grey image."""
    model = model_of(backend)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.02, momentum=0.9)
    generator = torch.Generator().manual_seed(seeded(1))
    for _ in range(STEPS):
        x = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).chunk(world_size)[rank]
        y = torch.randint(0, 11, (BATCH,), generator=generator).chunk(world_size)[rank]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
    trained = {
        kind + name: t.full_tensor() if hasattr(t, "full_tensor") else t.detach()
        for name, p in model.named_parameters()
        for kind, t in (("", p), ("grad of ", p.grad))
    }
    pruned, forward = [], Block.forward_prefix  # FSDP2's hooks leave the last block pruned
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Block, "forward_prefix", lambda *a, **k: pruned.append(1) or forward(*a, **k))
        logits = wrapped.eval()(x[:1].fill_(0.5))  # blocks hand row statistics to each other there
    assert pruned == [1] and deit_fast.report(model).unfused == []
    return trained | {"logits": logits}


def main(rank, world_size, rendezvous, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=int(rank), world_size=int(world_size)
    )
    for backend in BACKENDS:
        for wrap in (ddp, fsdp):
            trained = train(backend, wrap, int(rank), int(world_size))
            torch.save(trained, Path(folder) / f"{wrap.__name__}-{backend}-{rank}.pt")
        if rank == "0":
            torch.save(train(backend, plain), Path(folder) / f"plain-{backend}-0.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
