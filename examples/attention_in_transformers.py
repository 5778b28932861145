"""A Hugging Face model whose attention is pypar's: python attention_in_transformers.py"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pypar

pypar.register_with_transformers()  # the attention and its mask function, together
sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
config = LlamaConfig(**sizes, attn_implementation="pypar")
model = LlamaForCausalLM(config)
print(model(input_ids=torch.randint(512, (1, 64))).logits.shape)
