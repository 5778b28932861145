"""A model that knows nothing of it, over a long sequence: torchrun --nproc-per-node 2 long_llama.py"""

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import pypar.comm

dist.init_process_group("pypar")
pypar.register_with_transformers()
torch.manual_seed(0)  # every rank makes the same model and the same text
sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
config = LlamaConfig(**sizes, attn_implementation="pypar")
model = LlamaForCausalLM(config)
tokens = torch.randint(512, (1, 1025))
with pypar.shard_context(dist.group.WORLD, method="ring") as context:
    inputs, targets = context.shard(tokens[:, :-1], 1), context.shard(tokens[:, 1:], 1)
    logits = model(input_ids=inputs, position_ids=context.positions(1024)[None], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / 1024
    loss.backward()
for parameter in model.parameters():
    dist.all_reduce(parameter.grad)  # each rank has the share of its positions
dist.all_reduce(loss.data)
if dist.get_rank() == 0:
    print(f"loss {loss.item():.3f}")
dist.destroy_process_group()
