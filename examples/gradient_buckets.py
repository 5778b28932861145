"""The reduction of gradients without the module: torchrun --nproc-per-node 2 gradient_buckets.py"""

import torch
import torch.distributed as dist

import pypar.comm

dist.init_process_group("pypar")
mesh = pypar.Mesh(dp=2)
torch.manual_seed(0)  # every rank makes the same model
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
buckets = pypar.GradientBuckets(model.parameters(), mesh.data, average=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
torch.manual_seed(1 + mesh.dp.rank)
for step in range(20):
    buckets.zero()
    x = torch.randn(2, 32, 16)
    with buckets.accumulate():  # all microbatches but the last: no communication
        (model(x[0]) - x[0].sum(1, keepdim=True)).square().mean().backward()
    (model(x[1]) - x[1].sum(1, keepdim=True)).square().mean().backward()  # buckets leave as they fill
    buckets.finish()  # param.grad is the mean over the ranks
    buckets.scale(0.5)  # two microbatches
    optimizer.step()
if dist.get_rank() == 0:
    sent = mesh.data.traffic.bytes_sent
    print(f"{buckets.num_buckets} buckets, {sent} bytes sent by this rank")
dist.destroy_process_group()
