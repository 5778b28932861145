"""A model of one's own on the tp axis, by a plan of one's own: torchrun --nproc-per-node 2 own_model.py"""

import torch
import torch.distributed as dist
from torch import nn

import pypar.comm


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.widen = nn.Linear(64, 256)
        self.narrow = nn.Linear(256, 64)

    def forward(self, x):
        return x + self.narrow(nn.functional.gelu(self.widen(self.norm(x))))


dist.init_process_group("pypar")
mesh = pypar.Mesh(tp=2)
torch.manual_seed(0)  # every rank makes the same model, and sees the same data
model = nn.Sequential(*(Block() for _ in range(3)), nn.Linear(64, 1))
plan = {"*.widen": "column", "*.narrow": "row"}  # the last layer stays whole
model = pypar.parallelize(model, mesh, plan, verify=(torch.randn(8, 64),))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(10):
    x = torch.randn(32, 64)
    (model(x) - x.mean(1, keepdim=True)).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the norm of the whole model
    optimizer.step()
    optimizer.zero_grad()
weight = model[0].widen.weight
print(weight.shape, weight.full_tensor().shape)  # a cut parameter answers for the whole tensor
dist.destroy_process_group()
