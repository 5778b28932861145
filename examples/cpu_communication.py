"""torch's own DDP over shared memory, and what an axis counts: torchrun --nproc-per-node 2 cpu_communication.py"""

import torch
import torch.distributed as dist

import pypar.comm
from pypar.comm import all_reduce_start

dist.init_process_group("pypar")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))  # unchanged
model(torch.randn(8, 64)).sum().backward()

mesh = pypar.Mesh(dp=2)
handle = all_reduce_start(torch.ones(1 << 16), mesh.dp)  # started; whoever started it does not wait
total = handle.wait()
assert total[0] == 2
print(mesh.dp.traffic)  # bytes sent, calls, seconds that this rank was blocked
dist.destroy_process_group()
