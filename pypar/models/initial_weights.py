"""First values of parameters: they follow from seed, name and shape, never from the layout."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def initial_weight(
    name: str, global_shape: tuple[int, ...], seed: int, std: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The whole first value of a parameter, from N(0, std^2), by seed, name and shape, never by the layout.

    name is the global parameter name ("layers.3.attention.q.weight"). Values are drawn in fp32 on the CPU and
    then rounded to dtype, so that dtypes agree as well.
    """
    if std < 0:
        raise ValueError(f"the standard deviation of {name} is {std}; it must be 0 or more")
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    weight = torch.empty(global_shape, dtype=torch.float32, device="cpu")
    return weight.normal_(0.0, std, generator=generator).to(dtype)
