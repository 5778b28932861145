"""The layers themselves, with sequence parallelism: torchrun --nproc-per-node 2 tensor_parallel_layers.py"""

import torch
import torch.distributed as dist

import pypar.comm
from pypar.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)

dist.init_process_group("pypar")
mesh = pypar.Mesh(tp=2)
torch.manual_seed(0)
embedding = VocabParallelEmbedding(512, 64, mesh.tp, sequence_parallel=True)
widen = ColumnParallelLinear(64, 256, mesh.tp, sequence_parallel=True)
narrow = RowParallelLinear(256, 64, mesh.tp, sequence_parallel=True)
head = ColumnParallelLinear(64, 512, mesh.tp, sequence_parallel=True)
tokens, targets = torch.randint(512, (2, 4, 128))  # the same on every rank
x = embedding(tokens)  # [B, T/R, D]: between the layers each rank has its part of the positions
x = x + narrow(torch.nn.functional.gelu(widen(x)))
loss = vocab_parallel_cross_entropy(head(x), targets, mesh.tp).mean()  # no rank holds all logits
loss.backward()
print(f"loss {loss.item():.3f}, {mesh.tp.traffic.bytes_sent} bytes sent")
dist.destroy_process_group()
