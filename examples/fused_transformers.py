"""A Hugging Face model with pypar's norms, rotary embeddings, gates and loss: python fused_transformers.py"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import pypar

sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).train()
print(pypar.apply_fused(model))

ids = torch.randint(512, (1, 64))
out = model(input_ids=ids, labels=ids)
out.loss.backward()
print(f"loss {out.loss.item():.3f}, logits {out.logits}")
