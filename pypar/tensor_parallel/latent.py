"""The first projection to keys and values of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pypar.comm import copy_to
from pypar.mesh import Axis


class LatentKeyValueLinear(nn.Linear):
    """`nn.Linear(in_features, out_features)`, whole on every rank, whose last features all heads share.

    x [..., in_features], the same on every rank -> [..., out_features], the same on every rank. The first outputs
    are the latent, which goes into a column-parallel layer, whose backward sums its gradient over tp. The last
    ``num_shared`` are a key that goes to this rank's heads as it is: its gradient is summed here.
    """

    def __init__(self, whole: nn.Linear, num_shared: int, axis: Axis) -> None:
        super().__init__(whole.in_features, whole.out_features, whole.bias is not None, device="meta")
        self.weight, self.bias = whole.weight, whole.bias
        self.num_shared, self.axis = num_shared, axis

    def forward(self, x: Tensor) -> Tensor:
        latent, shared = linear(x, self.weight, self.bias).split(
            [self.out_features - self.num_shared, self.num_shared], -1
        )
        return torch.cat((latent, copy_to(shared, self.axis)), -1)


def num_shared_features(model: nn.Module, name: str) -> int:
    """How many features of the projection ``name`` all heads share: `qk_rope_head_dim` of its attention or of a
    configuration. ValueError where none says so."""
    owner = model.get_submodule(name.rpartition(".")[0])
    for place in (owner, getattr(owner, "config", None), getattr(model, "config", None)):
        if type(size := getattr(place, "qk_rope_head_dim", None)) is int:
            return size
    raise ValueError(
        f"{name} is to be cut as 'latent_kv', but neither {type(owner).__name__} nor a configuration has "
        "qk_rope_head_dim, the number of features that all heads share; give the module this attribute"
    )
