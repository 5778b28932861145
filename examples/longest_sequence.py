"""The longest sequence whose activations fit a budget, by what is kept of them: python longest_sequence.py"""

import torch

import pypar
from pypar.models import Decoder, DecoderConfig
from pypar.recomputation import SavedBytes

BUDGET = 2 << 20  # bytes of activations on the device
sizes = DecoderConfig(
    vocab_size=256, num_layers=6, d_model=64, num_heads=4, num_kv_heads=2, head_size=16, d_ff=176
)


def held(model: Decoder, length: int) -> int:
    """The most bytes of activations at once in a step over one sequence."""
    tokens = torch.arange(length + 1)[None] % 256
    with SavedBytes(model) as saved:
        model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    return saved.peak_bytes


def longest(model: Decoder) -> int:
    fits, too_long = 16, 32
    while held(model, too_long) <= BUDGET:
        fits, too_long = too_long, 2 * too_long
    while too_long - fits > 16:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if held(model, middle) <= BUDGET else (fits, middle)
    return fits


model = Decoder(sizes)  # its head and loss never have more than a chunk's logits
print(f"all kept: {longest(model)} tokens")
print(f"recomputed: {longest(pypar.recompute(model))} tokens")
pypar.recompute(model, "none")
for layer in model.layers.values():
    pypar.tiled(layer.feed_forward, 16)
print(f"and in tiles: {longest(pypar.recompute(model))} tokens")
moved = pypar.offload_activations(model, "full", min_bytes=1 << 12)
print(f"and block inputs on the host: {longest(moved)} tokens")
