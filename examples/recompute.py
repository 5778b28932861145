"""Activations that backward computes again: python recompute.py"""

import torch

import pypar
from pypar.models import Decoder, DecoderConfig
from pypar.recomputation import SavedBytes

sizes = DecoderConfig(
    vocab_size=256, num_layers=8, d_model=128, num_heads=4, num_kv_heads=2, head_size=32, d_ff=352
)
model = Decoder(sizes)  # or any model: a blocks(), or layers in an nn.ModuleList
tokens = torch.randint(0, 256, (4, 128))
for policy in ("none", "selective", "full"):
    pypar.recompute(model, policy)
    model.zero_grad()
    with SavedBytes(model) as saved:
        loss = model(tokens[:, :-1], targets=tokens[:, 1:])
    num_bytes = saved.num_bytes
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
    print(f"{policy}: {num_bytes / 2**20:.1f} MiB of activations, norm of the gradients {norm:.6f}")
