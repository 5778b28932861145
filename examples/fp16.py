"""fp16 in a script, with one verdict on all ranks: torchrun --nproc-per-node 2 fp16.py"""

import torch
import torch.distributed as dist

import pypar.comm

dist.init_process_group("pypar")
mesh = pypar.Mesh(dp=2)
model = pypar.DataParallel(
    torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
)
optimizer = pypar.AdamW(model.parameters(), lr=1e-2)
scaler = pypar.GradScaler(mesh.world, "cpu", hysteresis=2)  # "cuda" on GPUs
torch.manual_seed(dist.get_rank())
for step in range(20):
    x = torch.randn(32, 16)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}, scale {scaler.get_scale():g}")
dist.destroy_process_group()
