"""A small model, whole and cut over tp, for tests of what a user's script does with its parameters."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import pypar
from pypar.mesh import Mesh
from pypar.sharded import Sharded

PLAN = {"tokens": "vocab", "up": "column", "down": "row", "head": "column_gather"}


class Model(nn.Module):
    """Cut are an embedding, a head, and a column and a row with biases; whole are a norm and the row's bias."""

    def __init__(self):
        super().__init__()
        self.tokens, self.norm = nn.Embedding(12, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 12, bias=False)

    def forward(self, ids):
        x = self.tokens(ids)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


def make(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Model().to(dtype)


def pair(mesh=None, seed=0, dtype=torch.float32):
    """(the whole model, the same one cut over tp), after a backward of one loss."""
    whole, cut = make(seed, dtype), pypar.parallelize(make(seed, dtype), mesh or Mesh(tp=2), PLAN)
    for model in (whole, cut):
        backward(model)
    return whole, cut


def backward(model, seed=1, scale=1.0):
    ids = torch.randint(12, (3, 5), generator=torch.Generator().manual_seed(seed))
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), (ids + 1).flatten() % 12)
    (scale * loss).backward()
    return loss.detach()


def full(x):
    """The whole tensor, whatever it is; every rank calls it."""
    return x.full_tensor() if isinstance(x, (Sharded, DTensor)) else x.detach()


def assert_same(cut, whole, rtol=1e-5, atol=1e-6):
    """The parameters, or tensors, of two models in order."""
    first, second = (m.parameters() if isinstance(m, nn.Module) else m for m in (cut, whole))
    for ours, theirs in zip(first, second, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(full(ours), full(theirs), rtol=rtol, atol=atol)
