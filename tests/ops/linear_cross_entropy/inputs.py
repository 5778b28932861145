"""Inputs of the tests of linear_cross_entropy."""

import torch


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(tokens=130, width=16, words=77, dtype=torch.float32):
    hidden, weight = numbers(tokens, width).to(dtype), numbers(words, width, seed=1).to(dtype)
    target = torch.randint(words, (tokens,), generator=torch.Generator().manual_seed(2))
    return hidden.requires_grad_(), weight.requires_grad_(), target
