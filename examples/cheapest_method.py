"""Which method of context parallelism is the fastest here: torchrun --nproc-per-node 2 cheapest_method.py"""

import torch
import torch.distributed as dist

import pypar.comm
from pypar.context_parallel import measure_costs

dist.init_process_group("pypar")
mesh = pypar.Mesh(cp=2)
measure_costs(mesh.cp, dtype=torch.float32)  # once for an axis and a dtype, about a second
q, k, v = (torch.randn(1, 512, heads, 64) for heads in (8, 2, 2))  # this rank's part
out = pypar.ring_attention(q, k, v, mesh.cp, method="auto", method_options={"explain": True})
dist.destroy_process_group()
