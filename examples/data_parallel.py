"""Replicas of a model, each with data of its own: torchrun --nproc-per-node 2 data_parallel.py"""

import torch
import torch.distributed as dist

import pypar.comm

dist.init_process_group("pypar")
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
model = pypar.DataParallel(model)  # every rank gets rank 0's weights
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(dist.get_rank())  # each rank has data of its own
for step in range(20):
    optimizer.zero_grad()
    for microbatch in range(2):
        x = torch.randn(32, 16)
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean() / 2
        if microbatch == 0:
            with model.no_sync():  # adds up locally
                loss.backward()
    loss.backward()  # gradients are the mean over the ranks when this returns
    optimizer.step()
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}")
dist.destroy_process_group()
