"""Stochastic rounding to bf16 by random numbers that depend on an element's place alone, and not on who computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from pypar.ops.adamw.arguments import Place

_WORD, _LONG = (1 << 32) - 1, (1 << 64) - 1


def step_key(seed: int, step: int) -> int:
    """64 bits for all elements of one update."""
    return _mixed(seed + step * 0x9E3779B97F4A7C15)


def random_words(key: int, place: Place, count: int, device: torch.device) -> Tensor:
    """int64 [count] in [0, 2**32): 32 random bits for each element, of its number in the whole."""
    index = torch.arange(count, device=device)
    number = place.first + index // place.run * place.stride + index % place.run
    high, words = number >> 32, torch.zeros_like(number)
    for above in high.unique().tolist():
        here = _mixed(key + above)
        x = (number & _WORD) ^ (here & _WORD)
        x = (((x ^ (x >> 16)) * 0x21F0AAAD & _WORD) + (here >> 32)) & _WORD
        x = (x ^ (x >> 15)) * 0x735A2D97 & _WORD
        words = torch.where(high == above, x ^ (x >> 15), words)
    return words


def round_by(x: Tensor, random: Tensor) -> Tensor:
    """fp32 x as bf16, up where the bits that bf16 has no room for exceed random's 16: on average x itself."""
    bits = x.view(torch.int32) + random.int()
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return rounded.where(x == x, torch.nan)


def _mixed(x: int) -> int:
    """splitmix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _LONG
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _LONG
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _LONG
    return x ^ (x >> 31)
