"""Attention, forward and backward, on one device: python attention.py"""

import torch

import pypar

q, k, v = (torch.randn(1, 1024, heads, 64, requires_grad=True) for heads in (8, 4, 4))  # [B, T, N, H]
out, lse = pypar.attention(q, k, v, causal=True, return_lse=True)
out.sum().backward()
print(out.shape, lse.shape, k.grad.shape)
