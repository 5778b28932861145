"""Documents of several lengths in one tensor, with a window and a soft cap: python attention_documents.py"""

import torch

import pypar

q, k, v = (torch.randn(600, heads, 64, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2))
ends = torch.tensor([0, 250, 250, 600], dtype=torch.int32)  # three documents, one of them empty
options = {"causal": True, "window": (128, 0), "softcap": 30.0}
out = pypar.attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, **options)
out.sum().backward()
print(out.shape, out.dtype)
