"""A model in two stages, 1F1B, gradients of all microbatches added: torchrun --nproc-per-node 2 pipeline.py"""

import torch
import torch.distributed as dist
from torch import nn

import pypar.comm
from pypar.pipeline_parallel import PipelineRuntime, schedules

dist.init_process_group("pypar")
mesh = pypar.Mesh(pp=2)
torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)]
own = nn.Sequential(*(layers[:2] if mesh.pp.rank == 0 else layers[2:]))  # this rank's stage
microbatches = [torch.randn(8, 16) for _ in range(4)]  # the same on every rank


def stage(received, microbatch):
    """The first stage receives None; the last one returns the loss, scaled."""
    x = own(microbatch if received is None else received)
    return x if mesh.pp.rank == 0 else (x - microbatch).square().mean() / len(microbatches)


schedule = schedules.build("one_f_one_b", mesh.pp.size, len(microbatches))
runtime = PipelineRuntime(stage, mesh.pp, schedule)
optimizer = torch.optim.AdamW(own.parameters(), lr=1e-2)
for step in range(10):
    losses = runtime.step(microbatches)  # [] but on the last stage
    optimizer.step()
    optimizer.zero_grad()
if losses:
    print(f"loss {sum(losses).item():.3f}")
dist.destroy_process_group()
