"""Random tensors that every process draws alike, and one number for how far two tensors are apart."""

import torch
from torch import Tensor


def draw(*shape: int, seed: int) -> Tensor:
    """Standard normal, fp32, a function of shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest error as a share of the largest expected value."""
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
