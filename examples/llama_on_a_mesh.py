"""A Hugging Face model, cut over tp and replicated over dp: torchrun --nproc-per-node 4 llama_on_a_mesh.py"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import pypar.comm

dist.init_process_group("pypar")  # CPUs, through shared memory; "nccl" on GPUs
mesh = pypar.Mesh(dp=2, tp=2)
torch.manual_seed(0)  # every rank makes the same model
config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=2)
model = LlamaForCausalLM(config)
model = pypar.DataParallel(pypar.parallelize(model, mesh), mesh.data)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
torch.manual_seed(1 + mesh.dp.rank)  # each dp rank has data of its own
for step in range(5):
    tokens = torch.randint(512, (4, 64))
    model(input_ids=tokens, labels=tokens).loss.backward()  # gradients are averaged meanwhile
    optimizer.step()
    optimizer.zero_grad()
dist.destroy_process_group()
