"""A model of which each rank keeps a part of everything: torchrun --nproc-per-node 2 zero.py"""

import torch
import torch.distributed as dist
from torch import nn

import pypar.comm

dist.init_process_group("pypar")
mesh = pypar.Mesh(dp=2)
torch.manual_seed(0)  # every rank makes the same model
blocks = [nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4)]
model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(*blocks), nn.Linear(16, 1))
store = pypar.zero(model, mesh, stage=3, blocks=["1.0", "1.1", "1.2", "1.3"])
optimizer = torch.optim.AdamW(store.parameters(), lr=1e-2)  # of this rank's rows
torch.manual_seed(1 + mesh.dp.rank)  # each rank has data of its own
for step in range(20):
    store.zero_grad()
    x = torch.randn(2, 32, 16)
    with store.accumulate():  # all microbatches but the last
        (model(x[0]) - x[0].sum(1, keepdim=True)).square().mean().div(2).backward()
    loss = (model(x[1]) - x[1].sum(1, keepdim=True)).square().mean() / 2
    loss.backward()  # gradients of this rank's rows are the mean over the ranks when this returns
    store.clip_grad_norm(1.0)
    optimizer.step()
    store.publish()
if dist.get_rank() == 0:
    kept, gathered = store.memory()["parameters"], store.peak_memory()["gathered"]
    print(
        f"loss {loss.item():.3f}; this rank keeps {kept} bytes of parameters and gathered at most {gathered}"
    )
whole = store.state_dict()  # what one process's model.state_dict() would be, on every rank
dist.destroy_process_group()
