"""States that lie on the host and come to the device as its budget allows: torchrun --nproc-per-node 2 chunks.py"""

import torch
import torch.distributed as dist
from torch import nn

import pypar.comm

dist.init_process_group("pypar")
mesh = pypar.Mesh(dp=2)
torch.manual_seed(0)  # every rank makes the same model
layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(4))
model = nn.Sequential(*layers, nn.Linear(16, 1))
store = pypar.zero(
    model,
    mesh,
    stage=3,
    blocks=["0", "1", "2", "3"],
    bucket_bytes=8 << 10,
    offload="chunks",
    device_bytes=64 << 10,
)
optimizer = torch.optim.AdamW(store.parameters(), lr=1e-2)
store.holds_states_of(optimizer)  # so that its states lie where their parameters do
torch.manual_seed(1 + mesh.dp.rank)
for step in range(10):
    store.zero_grad()
    x = torch.randn(32, 16)
    (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
    optimizer.step()
    store.publish()
if dist.get_rank() == 0:
    print("\n".join(store.places.lines()))
    print(f"the device held at most {store.places.device.peak:,} bytes")
dist.destroy_process_group()
