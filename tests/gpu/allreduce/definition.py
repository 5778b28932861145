"""What an all-reduce must give, by numbers that torch computes one after another."""

import torch
from torch import Tensor


def total(parts: list[Tensor]) -> Tensor:
    """The sum in rank order, in fp32, not rounded."""
    result = torch.zeros_like(parts[0], dtype=torch.float32)
    for part in parts:
        result += part.float()
    return result


def drawn(ranks: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """One tensor a rank, of sizes so different that the order of the sum shows."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-2, 2, ranks)[torch.randperm(ranks, generator=generator)]
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for scale in scales]
