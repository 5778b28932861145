"""Recomputed layers, feed-forward parts in tiles and block inputs on the host: each fits a longer sequence."""

import torch

import pypar
from pypar.models import Decoder, DecoderConfig
from pypar.recomputation import SavedBytes

BUDGET = 60_000  # bytes of activations
WAYS = ("all kept", "recomputed", "in tiles", "block inputs on the host")


def decoder(num_layers, way):
    model = Decoder(DecoderConfig(64, num_layers, 32, 4, 2, 8, 96))
    if way in WAYS[2:]:
        for layer in model.layers.values():
            pypar.tiled(layer.feed_forward, 8)
    if way == WAYS[3]:
        return pypar.offload_activations(model, "full", min_bytes=1)
    return pypar.recompute(model, "none" if way == WAYS[0] else "full")


def held(model, length):
    tokens = torch.arange(length + 1)[None] % 64
    with SavedBytes(model) as saved:
        model(tokens[:, :-1], targets=tokens[:, 1:]).backward()
    return saved.peak_bytes


def longest(num_layers, way):
    """The longest sequence, to 2 tokens, whose activations fit the budget."""
    model = decoder(num_layers, way)
    fits, too_long = 2, 256
    assert held(model, too_long) > BUDGET
    while too_long - fits > 2:
        middle = (fits + too_long) // 2
        fits, too_long = (middle, too_long) if held(model, middle) <= BUDGET else (fits, middle)
    return fits


def test_each_way_fits_a_longer_sequence_and_the_last_whatever_the_depth():
    found = {way: longest(6, way) for way in WAYS}
    assert list(found.values()) == sorted(found.values())
    assert found["recomputed"] > 3 * found["all kept"]
    assert found["in tiles"] > 1.3 * found["recomputed"]
    assert found["block inputs on the host"] > 1.3 * found["in tiles"]
    assert longest(9, WAYS[3]) == found[WAYS[3]]
    assert longest(9, WAYS[2]) < 0.9 * found[WAYS[2]]
