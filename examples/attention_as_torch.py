"""The signature and the meaning of torch's own function: python attention_as_torch.py"""

import torch
from torch.nn.functional import scaled_dot_product_attention

import pypar

q, k, v = (torch.randn(2, 8, 128, 64) for _ in range(3))  # [B, N, T, H], as torch has it
mask = torch.rand(2, 1, 128, 128) < 0.5  # True where a query sees a key
mask |= torch.eye(128, dtype=torch.bool)
ours = pypar.scaled_dot_product_attention(q, k, v, attn_mask=mask)
torch.testing.assert_close(ours, scaled_dot_product_attention(q, k, v, attn_mask=mask), rtol=1e-5, atol=1e-5)
