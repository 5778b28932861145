"""Attention over a sequence that is spread over the ranks: torchrun --nproc-per-node 4 ring_attention.py"""

import torch
import torch.distributed as dist

import pypar.comm
from pypar.context_parallel import shard, unshard

dist.init_process_group("pypar")
group, length = dist.group.WORLD, 4097  # lengths need not divide
torch.manual_seed(0)  # the same sequence everywhere; of it, each rank keeps its part
q, k, v = (shard(torch.randn(1, length, heads, 64), 1, group, "zigzag") for heads in (8, 2, 2))
q.requires_grad_()
options = {"causal": True, "window": (1024, 0), "length_q": length, "length_k": length}
out = pypar.ring_attention(q, k, v, group, layout="zigzag", method="ring", **options)
out.sum().backward()
whole = unshard(out.detach(), 1, group, "zigzag", length)  # only where a rank wants to see all of it
print(dist.get_rank(), out.shape, q.grad.shape, whole.shape)
dist.destroy_process_group()
